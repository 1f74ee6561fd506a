"""What is drawn: allowed symmetries and turns, angles in nm, and as many numbers whatever is switched on."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.training.augment import (
    Augmentation,
    Variation,
    affine_matrix,
    exchangeable_axes,
    isotropic,
    permutations,
    turnable_axes,
)

ALL = {
    "flips": True,
    "rotations": True,
    "affine": True,
    "brightness": True,
    "contrast": True,
    "gamma": True,
    "blur": True,
    "low_resolution": True,
    "noise": 0.1,
}
OFF = dict.fromkeys(ALL, False) | {"noise": 0.0}
PATCH = (32, 32, 32)
UNTOUCHED = Variation()


def drawn(switches: dict, count: int, voxel_nm: tuple[float, ...] = (8, 8, 8)) -> list[Variation]:
    augmentation = Augmentation(switches, PATCH, [voxel_nm])
    numbers = np.random.default_rng(0).random((count, Augmentation.NUMBERS)).tolist()
    return [augmentation.draw(row, 0, (5, 16, 20)) for row in numbers]


def test_isotropic_cubes_have_all_symmetries() -> None:
    orders = permutations(exchangeable_axes((8, 8, 8), PATCH))
    assert len(set(orders)) == 6
    assert orders[0] == (0, 1, 2)
    assert len({(variation.permutation, variation.flipped) for variation in drawn(ALL, 1000)}) == 48


@pytest.mark.parametrize(("voxel_nm", "patch"), [((16, 8, 8), PATCH), ((8, 8, 8), (16, 32, 32))])
def test_anisotropic_voxels_or_patches_exchange_the_axes_of_their_plane_only(
    voxel_nm: tuple[float, ...], patch: tuple[int, ...]
) -> None:
    assert permutations(exchangeable_axes(voxel_nm, patch)) == [(0, 1, 2), (0, 2, 1)]


def test_axes_that_all_differ_stay() -> None:
    assert permutations(exchangeable_axes((30, 8, 4), PATCH)) == [(0, 1, 2)]


@pytest.mark.parametrize(
    ("voxel_nm", "found"),
    [((8, 8, 8), True), ((8, 8.07, 8), True), ((8, 8, 8.1), False), ((8.1, 8, 8), False), ((8, 8, 4), False)],
)
def test_voxels_are_isotropic_to_one_percent(voxel_nm: tuple[float, ...], found: bool) -> None:
    assert isotropic(voxel_nm) is found


def test_each_crop_has_the_symmetries_of_its_own_voxels() -> None:
    augmentation = Augmentation(ALL, PATCH, [(8, 8, 8), (16, 8, 8), (30, 8, 4)])
    assert [len(orders) for orders in augmentation.orders] == [6, 2, 1]


@pytest.mark.parametrize(
    ("voxel_nm", "patch", "axes"),
    [
        ((8, 8, 8), PATCH, [0, 1, 2]),
        ((24, 8, 8), PATCH, [0, 1, 2]),
        ((24.1, 8, 8), PATCH, [1, 2]),
        ((30, 8, 4), PATCH, [1, 2]),
        ((8, 8, 8), (1, 32, 32), [1, 2]),
        ((8, 30, 4), (1, 32, 32), [2]),
    ],
)
def test_turns_by_any_angle_keep_to_the_fine_axes(
    voxel_nm: tuple[float, ...], patch: tuple[int, ...], axes: list[int]
) -> None:
    assert turnable_axes(voxel_nm, patch) == axes
    matrix = affine_matrix((0.3, 0.2, -0.4), 1.0, voxel_nm, patch)
    mixed = np.eye(3) if matrix is None else np.asarray(matrix)
    for a, b in itertools.permutations(range(3), 2):
        assert (mixed[a, b] != 0) == (len(axes) > 1 and a in axes and b in axes)


def test_an_affine_map_keeps_angles_and_ratios_in_nm() -> None:
    voxel = np.array([20.0, 8.0, 10.0])
    matrix = np.asarray(affine_matrix((0.3, 0.2, -0.4), 1.25, voxel, PATCH))
    in_nm = np.diag(voxel) @ matrix @ np.diag(1 / voxel)
    np.testing.assert_allclose(in_nm @ in_nm.T, 1.25**2 * np.eye(3), atol=1e-12)
    assert np.linalg.det(in_nm) > 0


def test_an_angle_about_an_axis_turns_the_other_two() -> None:
    np.testing.assert_allclose(
        affine_matrix((0, math.pi / 6, 0), 1.0, (8, 8, 8), PATCH),
        [[math.cos(math.pi / 6), 0, -0.5], [0, 1, 0], [0.5, 0, math.cos(math.pi / 6)]],
        atol=1e-15,
    )


def test_a_plane_is_neither_scaled_nor_turned_across() -> None:
    assert affine_matrix((0, 0, 0), 1.3, (8, 8, 8), (1, 32, 32)) == ((1, 0, 0), (0, 1.3, 0), (0, 0, 1.3))
    assert affine_matrix((0, 0.4, 0.4), 1.0, (8, 8, 8), (1, 32, 32)) is None


def test_each_kind_can_be_switched_off() -> None:
    for variation in drawn(OFF, 50):
        assert replace(variation, seed=0, anchor=(0, 0, 0)) == UNTOUCHED
        assert variation.anchor == (5, 16, 20)


@pytest.mark.parametrize("name", ALL)
def test_switching_one_kind_off_leaves_the_others_as_they_were(name: str) -> None:
    fields = {
        "flips": {"flipped"},
        "rotations": {"permutation"},
        "low_resolution": {"zoom"},
        "gamma": {"gamma", "inverted_gamma"},
    }.get(name, {name})
    if name in ("flips", "rotations"):
        fields = fields | {"anchor"}
    without = drawn(ALL | {name: OFF[name]}, 200)
    for full, rest in zip(drawn(ALL, 200), without, strict=True):
        assert replace(full, **{field: getattr(rest, field) for field in fields}) == rest


def test_kinds_come_up_as_often_and_as_strong_as_stated() -> None:
    variations = drawn(ALL, 20_000)
    for field, probability, low, high in [
        ("brightness", 0.15, 0.75, 1.25),
        ("contrast", 0.15, 0.75, 1.25),
        ("gamma", 0.3, 0.7, 1.5),
        ("inverted_gamma", 0.1, 0.7, 1.5),
        ("zoom", 0.25, 0.5, 1.0),
        ("noise", 0.1, 0.0, 0.1),
    ]:
        values = np.array([getattr(variation, field) for variation in variations])
        values = values[values != getattr(UNTOUCHED, field)]
        assert abs(len(values) / len(variations) - probability) < 0.015
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() < high
        assert abs(values.mean() - (low + high) / 2) < 0.02
    blurred = np.array([variation.blur for variation in variations if variation.blur != UNTOUCHED.blur])
    assert abs(len(blurred) / len(variations) - 0.2) < 0.015
    assert blurred.min() >= 0.5
    assert blurred.max() <= 1
    matrices = np.array([variation.affine for variation in variations if variation.affine is not None])
    assert abs(len(matrices) / len(variations) - 0.36) < 0.015
    factors = np.cbrt(np.linalg.det(matrices))
    assert abs((abs(factors - 1) > 1e-9).mean() - 0.2 / 0.36) < 0.02
    assert 0.7 <= factors.min() < 0.71
    assert 1.39 < factors.max() < 1.4
    turned = matrices[np.abs(matrices[:, 0, 1]) > 0] / factors[np.abs(matrices[:, 0, 1]) > 0, None, None]
    assert abs(len(turned) / len(matrices) - 0.2 / 0.36) < 0.02
    about_y = np.arcsin(np.clip(turned[:, 0, 2], -1, 1))  # the middle one of three turns
    assert np.degrees(np.abs(about_y)).max() == pytest.approx(30, abs=0.5)
    assert len({variation.seed for variation in variations}) == len(variations)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    numbers=st.lists(st.floats(0, 1, exclude_max=True), min_size=Augmentation.NUMBERS, max_size=Augmentation.NUMBERS),
    voxel=st.tuples(*[st.sampled_from((4.0, 8.0, 8.02, 30.0))] * 3),
    patch=st.tuples(*[st.sampled_from((1, 8, 16))] * 3),
    data=st.data(),
)
def test_every_draw_is_valid_and_its_anchor_inside(
    numbers: list[float], voxel: tuple[float, ...], patch: tuple[int, ...], data: st.DataObject
) -> None:
    anchor = data.draw(st.tuples(*[st.integers(0, n - 1) for n in patch]))
    variation = Augmentation(ALL, patch, [voxel]).draw(numbers, 0, anchor)
    assert tuple(patch[axis] for axis in variation.permutation) == patch
    assert all(0 <= place < n for place, n in zip(variation.anchor, patch, strict=True))
    if variation.affine is not None:
        for axis, n in enumerate(patch):
            if n == 1:
                assert variation.affine[axis] == tuple(float(axis == other) for other in range(3))
