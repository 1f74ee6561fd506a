"""Expansion: what prediction feeds, the states of the table for every row, and intensities varied through the table."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.intensity import lookup_table
from cellmap_pipe.prepare.labels import PRESENT, UNKNOWN
from cellmap_pipe.training.augment import Variation
from cellmap_pipe.training.expand import Expander

torch.set_num_threads(1)

CPU = torch.device("cpu")
EVERY = torch.arange(256, dtype=torch.uint8).view(1, 4, 8, 8)


def looked_up(tables: np.ndarray, label: torch.Tensor, crops: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return target and known-mask by looking up every voxel."""
    states = np.stack([tables[crop][:, volume.numpy()] for crop, volume in zip(crops, label, strict=True)])
    return states == PRESENT, states != UNKNOWN


def no_tables(classes: int = 1) -> np.ndarray:
    return np.full((2, classes, 256), UNKNOWN, np.uint8)


def test_images_are_what_prediction_feeds() -> None:
    expander = Expander(no_tables(), [(0, 255), (40, 220)], CPU)
    image = expander.image(torch.cat([EVERY, EVERY]), [1, 0])
    np.testing.assert_array_equal(image[0, 0].numpy(), lookup_table(40, 220)[EVERY[0].numpy()])
    np.testing.assert_array_equal(image[1, 0].numpy(), lookup_table(0, 255)[EVERY[0].numpy()])


def test_volumes_larger_than_a_slab_and_not_contiguous_are_expanded_whole() -> None:
    stored = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 60, 100, 62)).astype(np.uint8))
    stored = stored.permute(0, 3, 1, 2)
    tables = no_tables(2)
    tables[0, :, :200] = np.arange(400).reshape(2, 200) % 7 == 0
    expander = Expander(tables, [(3, 250)] * 2, CPU)
    np.testing.assert_array_equal(expander.image(stored, [0])[0, 0].numpy(), lookup_table(3, 250)[stored[0].numpy()])
    for wanted, found in zip(looked_up(tables, stored, [0]), expander.states(stored, [0]), strict=True):
        np.testing.assert_array_equal(found.numpy(), wanted)


def test_a_few_rows_give_their_states() -> None:
    tables = no_tables(2)
    tables[1, :, :3] = [[0, 1, 0], [0, 2, 1]]
    label = torch.tensor([0, 1, 2, 255], dtype=torch.uint8).view(1, 1, 1, 4)
    expander = Expander(tables, [(0, 255)] * 2, CPU)
    target, known = expander.states(label, [1])
    assert target.dtype == known.dtype == torch.bool
    assert target[0, :, 0, 0].tolist() == [[False, True, False, False], [False, False, True, False]]
    assert known[0, :, 0, 0].tolist() == [[True, True, True, False], [True, False, True, False]]
    assert not expander.states(label, [0])[1].any()


@settings(derandomize=True, deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), rows=st.sampled_from((256, 700)), kept=st.sampled_from((2, 20, 256)))
def test_states_are_those_of_a_look_up_whatever_the_table(seed: int, rows: int, kept: int) -> None:
    rng = np.random.default_rng(seed)
    # rows of long and short runs, classes with the same rows, classes with none, and all
    tables = rng.integers(0, 3, (2, 5, rows)).astype(np.uint8)
    tables[:, :, np.arange(rows) % kept != 0] = rng.integers(0, 3)
    tables[:, 4] = tables[:, 1]
    tables[0, 2], tables[1, 2] = PRESENT, UNKNOWN
    dtype = torch.uint8 if rows == 256 else torch.int16
    label = torch.from_numpy(rng.integers(0, rows, (3, 4, 12, 14))).to(dtype)
    expander = Expander(tables, [(0, 255)] * 2, CPU)
    crops = [1, 0, 1]
    for wanted, found in zip(looked_up(tables, label, crops), expander.states(label, crops), strict=True):
        np.testing.assert_array_equal(found.numpy(), wanted)
        assert set(np.unique(found.view(torch.uint8).numpy())) <= {0, 1}


def test_memory_is_reused_for_batches_of_other_sizes() -> None:
    tables = no_tables(3)
    tables[:, :, :2] = [[0, 1], [1, 0], [0, 0]]
    expander = Expander(tables, [(0, 255)] * 2, CPU)
    first = expander.states(EVERY.repeat(2, 1, 1, 1), [0, 1])[0]
    second = expander.states(EVERY, [1])[0]
    assert first.data_ptr() == second.data_ptr()
    assert second.shape == (1, 3, 4, 8, 8)
    np.testing.assert_array_equal(second.numpy(), looked_up(tables, EVERY, [1])[0])
    more = EVERY.repeat(3, 1, 1, 1)
    np.testing.assert_array_equal(expander.states(more, [0, 1, 0])[0].numpy(), looked_up(tables, more, [0, 1, 0])[0])


@pytest.mark.parametrize(
    ("variation", "wanted"),
    [
        (Variation(), lambda x: x),
        (Variation(brightness=1.25), lambda x: np.minimum(1.25 * x, 1)),
        (Variation(contrast=0.75), lambda x: 0.75 * (x - x.mean()) + x.mean()),
        (Variation(contrast=1.25), lambda x: np.clip(1.25 * (x - x.mean()) + x.mean(), x.min(), x.max())),
        (Variation(gamma=1.5), lambda x: x**1.5),
        (Variation(inverted_gamma=0.7), lambda x: 1 - (1 - x) ** 0.7),
        (Variation(brightness=0.8, gamma=0.9, inverted_gamma=1.2), lambda x: (1 - (1 - 0.8 * x) ** 1.2) ** 0.9),
    ],
)
def test_intensities_are_varied_as_if_voxel_by_voxel(variation: Variation, wanted: object) -> None:
    stored = torch.from_numpy(np.random.default_rng(1).integers(60, 256, (1, 7, 8, 9)).astype(np.uint8))
    found = Expander(no_tables(), [(40, 220)] * 2, CPU).image(stored, [0], [variation])[0, 0].numpy()
    plain = lookup_table(40, 220).astype(np.float64)[stored[0].numpy()]
    np.testing.assert_allclose(found, wanted(plain), atol=1e-6)
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize("value", [0, 40, 130, 255])
def test_constant_patches_stay_constant_and_within_the_range(value: int) -> None:
    stored = torch.full((1, 2, 3, 4), value, dtype=torch.uint8)
    strong = Variation(brightness=1.25, contrast=1.25, inverted_gamma=0.7, gamma=0.7)
    found = Expander(no_tables(), [(40, 220)] * 2, CPU).image(stored, [0], [strong])
    assert 0 <= found.min() == found.max() <= 1


def test_geometry_and_noise_are_not_of_an_image_alone() -> None:
    expander = Expander(no_tables(), [(0, 255)] * 2, CPU)
    plain = expander.image(EVERY, [0]).clone()
    elsewhere = Variation(flipped=(0,), noise=0.1, blur=(1, 1, 1), zoom=0.5)
    assert torch.equal(expander.image(EVERY, [0], [elsewhere]), plain)
