"""Samples are functions of (seed, step, index); patches hold what the store holds."""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from training_case import CLASSES, SETTINGS, write_store

from cellmap_pipe.errors import TrainingError
from cellmap_pipe.prepare.labels import PRESENT, UNKNOWN
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.training.loader import Loader
from cellmap_pipe.training.sampling import (
    PARTNER,
    Patch,
    Patches,
    Sampler,
    generator,
    known_fraction,
    reflected,
    tiles,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(write_store(tmp_path_factory.mktemp("store")))


def sampler(store: Store, patch: tuple[int, int, int] = (8, 8, 8), **options: object) -> Sampler:
    patches = Patches(store, ["set-0/crop0", "set-1/crop1"], CLASSES, patch)
    return Sampler(patches, **{"seed": 0, "centred_fraction": 0.5, **options})  # type: ignore[arg-type]


def test_a_sample_depends_on_seed_step_index_and_purpose_alone(store: Store) -> None:
    first, second = sampler(store), sampler(store)
    keys = list(product(range(4), range(6)))
    drawn = [first.draw(*key) for key in keys]
    assert [second.draw(*key) for key in reversed(keys)] == drawn[::-1]
    assert len(set(drawn)) > len(drawn) // 2  # patches at the edge of a small crop may coincide
    assert sampler(store, seed=1).draw(0, 0) != drawn[0]
    assert first.draw(0, 0, PARTNER) != drawn[0]


def test_streams_of_neighbouring_samples_share_no_numbers() -> None:
    streams = [generator(0, 0, index, purpose).random(64) for index in range(8) for purpose in range(4)]
    assert len(np.unique(np.concatenate(streams))) == 8 * 4 * 64


@pytest.mark.parametrize("patch", [(16, 16, 16), (8, 24, 16), (48, 48, 48)])
def test_every_patch_shows_a_known_voxel(store: Store, patch: tuple[int, int, int]) -> None:
    drawing = sampler(store, patch)
    image, label = np.empty(patch, np.uint8), np.empty(patch, np.uint8)
    for index in range(30):
        drawn = drawing.draw(0, index)
        drawing.patches.copy(drawn, image, label)
        assert (drawing.patches.tables[drawn.crop][:, label] != UNKNOWN).any()


def test_centred_patches_show_the_class(store: Store) -> None:
    drawing = sampler(store, (8, 8, 8), centred_fraction=1.0)
    drawing.cumulative = np.array([0.0, 0.0, 1.0])  # only nuc
    label = np.empty((8, 8, 8), np.uint8)
    for index in range(20):
        drawn = drawing.draw(0, index)
        assert drawn.crop == 0  # the other crop does not annotate it
        drawing.patches.copy(drawn, np.empty((8, 8, 8), np.uint8), label)
        assert (drawing.patches.tables[0][2][label] == PRESENT).any()


def test_ranks_share_the_stream_of_one_process(store: Store) -> None:
    def stream(rank: int, world: int, batch: int, accumulate: int) -> list[list[bytes]]:
        options = {**SETTINGS, "batch": batch, "accumulate": accumulate}
        loader = Loader(sampler(store), options, rank=rank, world=world, first=3, last=6, pinned=False)
        steps: dict[int, list[bytes]] = {}
        for drawn in loader:
            steps.setdefault(drawn.step, []).extend(
                drawn.image[row].numpy().tobytes() + drawn.label[row].numpy().tobytes() for row in range(drawn.size)
            )
        loader.close()
        return list(steps.values())

    whole = stream(0, 1, 8, 1)
    parts = [stream(rank, 2, 2, 2) for rank in range(2)]
    assert len(whole) == 3
    for step, expected in enumerate(whole):
        shares = [set(part[step]) for part in parts]
        assert shares[0].isdisjoint(shares[1])
        assert shares[0] | shares[1] == set(expected)


def test_rarely_annotated_classes_weigh_more(store: Store) -> None:
    weights = np.diff(sampler(store).cumulative, prepend=0)
    assert weights[2] / weights[0] == pytest.approx(2**0.5)


def test_patch_outside_the_arrays_mirrors_em_and_knows_nothing(store: Store) -> None:
    patches = Patches(store, ["set-0/crop0"], CLASSES, (8, 8, 8))
    stored, labels = store.image("set-0/crop0"), store.label("set-0/crop0")
    image, label = np.empty((8, 8, 8), np.uint8), np.empty((8, 8, 8), np.uint8)
    patches.copy(Patch(0, (10, -3, stored.shape[2] - 5)), image, label)
    padded = np.pad(stored, ((0, 0), (3, 0), (0, 3)), mode="reflect")
    np.testing.assert_array_equal(image, padded[10:18, :8, -8:])
    assert (label[:, :3] == 255).all()
    assert (label[:, :, 5:] == 255).all()
    np.testing.assert_array_equal(label[:, 3:, :5], labels[10:18, :5, -5:])


@given(size=st.integers(1, 9), start=st.integers(-20, 20), length=st.integers(1, 30))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_mirroring_is_numpys(size: int, start: int, length: int) -> None:
    before, after = max(-start, 0), max(start + length - size, 0)
    padded = np.pad(np.arange(size), (before, after), mode="reflect")
    np.testing.assert_array_equal(reflected(start, length, size), padded[start + before : start + before + length])


@pytest.mark.parametrize("patch", [(16, 16, 16), (40, 12, 8), (64, 64, 64)])
def test_tiles_cover_every_labelled_voxel_once(store: Store, patch: tuple[int, int, int]) -> None:
    patches = Patches(store, ["set-0/crop0", "set-0/crop2"], CLASSES, patch)
    for crop, name in enumerate(patches.crops):
        seen = np.zeros(np.array(store.image(name).shape) + 128, int)
        for tile in (tile for tile in tiles(patches) if tile.patch.crop == crop):
            assert all(0 <= part.start < part.stop <= size for part, size in zip(tile.owned, patch, strict=True))
            box = tuple(
                slice(64 + start + part.start, 64 + start + part.stop)
                for start, part in zip(tile.patch.origin, tile.owned, strict=True)
            )
            seen[box] += 1
        record = store.crops[name]
        expected = np.zeros_like(seen)
        expected[
            tuple(
                slice(64 + offset, 64 + offset + length)
                for offset, length in zip(record["label_offset"], record["label_shape"], strict=True)
            )
        ] = 1
        np.testing.assert_array_equal(seen, expected)


def test_model_of_some_classes_samples_what_is_known_of_them(store: Store) -> None:
    patches = Patches(store, ["set-0/crop0", "set-1/crop1"], ["nuc"], (8, 8, 8))
    assert patches.tables.shape == (2, 1, 256)
    drawing = Sampler(patches, seed=0, centred_fraction=0.5)
    assert {drawing.draw(0, index).crop for index in range(20)} == {0}
    assert 0 < known_fraction(drawing) <= 1


def test_known_voxels_that_were_not_sampled_are_looked_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = store.positions("set-0/crop0")
    # the store sampled ecs alone, where nothing else is known
    monkeypatch.setattr(store, "positions", lambda crop: sampled[sampled[:, 0] == 0])
    patches = Patches(store, ["set-0/crop0"], ["nuc"], (8, 8, 8))
    patches.tables[:, :, :3] = UNKNOWN
    drawing = Sampler(patches, seed=0, centred_fraction=0.5)
    assert 0 < known_fraction(drawing) <= 1
    assert (store.label("set-0/crop0")[tuple(drawing._crop_positions(0)[-1].T)] == 3).all()


def test_nothing_known_is_an_error(store: Store) -> None:
    with pytest.raises(TrainingError, match="none of the 1 training crops has a known voxel of nuc"):
        Sampler(Patches(store, ["set-1/crop1"], ["nuc"], (8, 8, 8)), seed=0, centred_fraction=0.5)
    with pytest.raises(TrainingError, match="lacks the model's class 'er_mem'"):
        Patches(store, ["set-1/crop1"], ["er_mem"], (8, 8, 8))


def test_error_in_the_thread_is_raised_where_the_batch_is_awaited(store: Store) -> None:
    drawing = sampler(store)
    drawing.patches.crops[:] = ["gone", "gone"]
    loader = Loader(drawing, SETTINGS, rank=0, world=1, first=0, last=2, pinned=False)
    with pytest.raises(Exception, match="gone"):
        next(iter(loader))
    loader.close()
