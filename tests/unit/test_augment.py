"""Augmentation moves image and labels alike, keeps anisotropic axes, and repeats itself exactly."""

import numpy as np
import pytest
import torch

from cellmap_pipe.intensity import lookup_table
from cellmap_pipe.training.augment import (
    Expander,
    Variation,
    draw_variation,
    exchangeable_axes,
    permutations,
    turned,
    vary_intensity,
)
from cellmap_pipe.training.sampling import AUGMENTATION, generator

torch.set_num_threads(1)

ALL = {"flips": True, "rotations": True, "intensity": True, "noise": 0.1}


def test_isotropic_cubes_have_all_symmetries() -> None:
    orders = permutations(exchangeable_axes((8, 8, 8), (32, 32, 32)))
    assert len(set(orders)) == 6
    assert orders[0] == (0, 1, 2)
    drawn = {
        (variation.permutation, variation.flipped)
        for variation in (draw_variation(generator(0, 0, i, AUGMENTATION), ALL, orders) for i in range(1000))
    }
    assert len(drawn) == 48


@pytest.mark.parametrize(
    ("voxel_nm", "patch"), [((16, 8, 8), (32, 32, 32)), ((8, 8, 8), (16, 32, 32)), (None, (32, 32, 32))]
)
def test_anisotropic_voxels_or_patches_turn_in_the_plane_only(
    voxel_nm: tuple[float, ...] | None, patch: tuple[int, ...]
) -> None:
    assert permutations(exchangeable_axes(voxel_nm, patch)) == [(0, 1, 2), (0, 2, 1)]


def test_axes_that_all_differ_stay() -> None:
    assert permutations(exchangeable_axes((30, 8, 4), (32, 32, 32))) == [(0, 1, 2)]


def test_image_and_labels_move_alike() -> None:
    coordinates = torch.from_numpy(np.indices((6, 6, 6)).astype(np.uint8))
    code = coordinates[0] * 36 + coordinates[1] * 6 + coordinates[2]
    orders = permutations([(0, 1), (1, 2)])
    variations = [draw_variation(generator(0, 1, i, AUGMENTATION), ALL, orders) for i in range(8)]
    moved = turned(code.expand(8, -1, -1, -1), variations)
    axes = [turned(axis.expand(8, -1, -1, -1), variations) for axis in coordinates]
    assert torch.equal(moved, axes[0] * 36 + axes[1] * 6 + axes[2])
    for sample in moved:
        assert torch.equal(sample.flatten().sort().values, code.flatten().sort().values)


def test_each_kind_can_be_switched_off() -> None:
    orders = permutations([(0, 1), (1, 2)])
    off = {"flips": False, "rotations": False, "intensity": False, "noise": 0.0}
    for i in range(50):
        variation = draw_variation(generator(0, 0, i, AUGMENTATION), off, orders)
        assert variation == Variation(noise_seed=variation.noise_seed)


def test_intensity_variation_is_that_of_its_parameters_and_repeats() -> None:
    image = torch.rand(2, 1, 4, 4, 4)
    variations = [Variation(gamma=2.0, contrast=0.5, brightness=1.2), Variation(noise=0.1, noise_seed=7)]
    first = vary_intensity(image.clone(), variations)
    squared = image[0] ** 2
    torch.testing.assert_close(first[0], 1.2 * (0.5 * (squared - squared.mean()) + squared.mean()))
    assert 0.05 < float((first[1] - image[1]).std()) < 0.15
    assert torch.equal(first, vary_intensity(image.clone(), variations))


def test_expansion_gives_what_prediction_feeds_and_the_states_of_the_table() -> None:
    tables = np.full((2, 2, 256), 2, np.uint8)
    tables[1, :, :3] = [[0, 1, 0], [0, 2, 1]]
    expander = Expander(tables, [(0, 255), (40, 220)], torch.device("cpu"))
    stored = torch.arange(64, dtype=torch.uint8).view(1, 4, 4, 4) * 4
    np.testing.assert_array_equal(expander.image(stored, [1])[0, 0].numpy(), lookup_table(40, 220)[stored[0].numpy()])
    label = torch.tensor([0, 1, 2, 255], dtype=torch.uint8).view(1, 1, 1, 4)
    target, known = expander.states(label, [1])
    assert target[0, :, 0, 0].tolist() == [[False, True, False, False], [False, False, True, False]]
    assert known[0, :, 0, 0].tolist() == [[True, True, True, False], [True, False, True, False]]
    assert not expander.states(label, [0])[1].any()
