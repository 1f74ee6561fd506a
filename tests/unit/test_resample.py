from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.resample import (
    apply_weights,
    axis_weights,
    inside,
    lattice_weights,
    nearest_voxels,
    resample_mean,
    tiles,
    z_slabs,
)

few = settings(max_examples=15, deadline=None, derandomize=True)
RATIOS = st.sampled_from([1.0, 1.5, 2.0, 2.62 / 2, 3.7, 4.0])
OFFSETS = st.floats(-3, 3).map(lambda v: round(v, 2))


def overlap(lo, hi, i):
    """Length of [lo, hi) inside source voxel i, in source voxels."""
    return max(0.0, min(hi, i + 1) - max(lo, i))


def dense_area_mean(array, source, target):
    """The definition, voxel by voxel: mean of the source over the part of the target voxel inside the source's box."""
    result = np.full(target.shape, np.nan)
    for index in product(*map(range, target.shape)):
        total = weight = 0.0
        spans = []
        for axis, i in enumerate(index):
            lo = (target.lower_nm[axis] + i * target.voxel_nm[axis] - source.lower_nm[axis]) / source.voxel_nm[axis]
            hi = lo + target.voxel_nm[axis] / source.voxel_nm[axis]
            spans.append([overlap(lo, hi, j) for j in range(source.shape[axis])])
        for j in product(*map(range, source.shape)):
            w = spans[0][j[0]] * spans[1][j[1]] * spans[2][j[2]]
            total, weight = total + w * array[j], weight + w
        if weight > 1e-6:
            result[index] = total / weight
    return result


@few
@given(st.tuples(RATIOS, RATIOS, RATIOS), st.tuples(OFFSETS, OFFSETS, OFFSETS), st.integers(0, 2**31))
def test_the_area_mean_is_the_mean_over_the_voxels_area(ratio, offset, seed):
    array = np.random.default_rng(seed).integers(0, 255, (6, 5, 7)).astype(np.uint8)
    source = Lattice((2, 4, 3), (10, 20, 30), array.shape)
    voxel = [r * v for r, v in zip(ratio, source.voxel_nm, strict=True)]
    start = [lo + o * v + t / 2 for lo, o, v, t in zip(source.lower_nm, offset, source.voxel_nm, voxel, strict=True)]
    target = Lattice(voxel, start, (3, 3, 2))
    expected = dense_area_mean(array, source, target)
    result = resample_mean(array, source, target)
    covered = ~np.isnan(expected)
    assert result[covered] == pytest.approx(expected[covered], abs=0.02)
    assert covered[inside(lattice_weights(source, target))].all()


def test_a_finer_target_is_interpolated_between_centres():
    source = Lattice((4, 4, 4), (0, 0, 0), (1, 1, 3))
    target = Lattice((4, 4, 2), (0, 0, -1), (1, 1, 6))
    values = np.array([[[0.0, 4.0, 8.0]]])
    assert resample_mean(values, source, target).ravel().tolist() == [0, 1, 3, 5, 7, 8]


def test_a_target_that_counts_as_the_same_voxel_is_averaged():
    source = Lattice((2.62, 2, 2), (0, 0, 0), (6, 1, 1))
    target = Lattice((2.6, 2, 2), (-0.01, 0, 0), (5, 1, 1))
    values = np.array([0, 100, 0, 0, 100, 0.0]).reshape(6, 1, 1)
    expected = dense_area_mean(values, source, target).ravel()
    assert resample_mean(values, source, target).ravel() == pytest.approx(expected, abs=0.02)


def test_the_same_lattice_is_recognised_with_an_offset_and_rounding():
    source = Lattice((2.62, 2, 2), (23837.13, 7599, 35999), (10, 10, 10))
    weights = lattice_weights(source, source.window((2, 3, 4), (5, 5, 5)))
    assert all(w.identity for w in weights) and [w.start for w in weights] == [2, 3, 4]
    nudged = Lattice((2.6200000001, 2, 2), (23837.13, 7599, 35999), (10, 10, 10))
    assert all(w.identity for w in lattice_weights(source, nudged))


def test_a_voxel_half_inside_counts_as_inside():
    source = Lattice((2, 2, 2), (0, 0, 0), (4, 4, 4))
    at = lambda shift: inside(lattice_weights(source, Lattice((4, 4, 4), (1 - shift, 1, 1), (1, 1, 1))))  # noqa: E731
    assert at(2).all() and not at(2.1).any()


def test_labels_are_never_interpolated():
    source, target = Lattice((4, 4, 4), (0, 0, 0), (3, 3, 3)), Lattice((1, 1, 1), (-1.5, -1.5, -1.5), (12, 12, 12))
    matrix = axis_weights(source, target, 0, interpolate=False).matrix.toarray()
    assert np.array_equal(matrix, np.kron(np.eye(3), np.ones((4, 1))))


@few
@given(st.tuples(RATIOS, RATIOS, RATIOS), st.tuples(OFFSETS, OFFSETS, OFFSETS))
def test_the_nearest_voxel_is_the_one_around_the_centre(ratio, offset):
    source = Lattice((2, 4, 3), (10, 20, 30), (6, 5, 7))
    voxel = [r * v for r, v in zip(ratio, source.voxel_nm, strict=True)]
    target = Lattice(voxel, [10 + 2 * offset[0], 20 + 4 * offset[1], 30 + 3 * offset[2]], (3, 4, 5))
    for axis, found in enumerate(nearest_voxels(source, target)):
        for i, index in enumerate(found):
            at = source.index_of(target.world_of((i, i, i)))[axis]
            distances = [abs(at - k) for k in range(source.shape[axis])]
            assert distances[index] <= min(distances) + 1e-6


def test_between_two_voxels_the_upper_one_is_nearest():
    source, target = Lattice((4, 4, 4), (0, 0, 0), (4, 4, 4)), Lattice((8, 8, 8), (2, 2, 2), (2, 2, 2))
    assert [index.tolist() for index in nearest_voxels(source, target)] == [[1, 3]] * 3


def test_slabs_cover_the_target_once_and_respect_chunk_layers():
    source, target = Lattice((4, 4, 4), (0, 0, 0), (64, 8, 8)), Lattice((10, 4, 4), (3, 0, 0), (25, 8, 8))
    weights = lattice_weights(source, target)
    slabs = list(z_slabs(weights, 16, 16 * 64))
    assert slabs[0][0] == 0 and slabs[-1][1] == 25
    assert all(a[1] == b[0] for a, b in pairwise(slabs)) and len(slabs) == 4
    whole = np.random.default_rng(0).random(source.shape, np.float32)
    parts = []
    for first, last in slabs:
        part = weights[0].rows(first, last)
        parts.append(apply_weights(whole[part.start : part.stop], [part, *weights[1:]]))
    assert np.array_equal(np.concatenate(parts), resample_mean(whole, source, target))


@pytest.mark.parametrize("ratio", [(1.3, 1.7, 1.5), (0.7, 0.8, 2.5)])
def test_bytes_do_not_tell_how_a_volume_was_cut(ratio):
    source = Lattice((4, 4, 4), (0, 0, 0), (24, 24, 24))
    target = Lattice.covering(source.lower_nm, source.upper_nm, [4 * r for r in ratio])
    weights = lattice_weights(source, target)
    volume = np.random.default_rng(0).random(source.shape, np.float32)
    whole = apply_weights(volume, weights)
    for cut in product(*([(0, 1), (1, n)] for n in target.shape)):
        part = [w.rows(*span) for w, span in zip(weights, cut, strict=True)]
        block = volume[tuple(slice(w.start, w.stop) for w in part)]
        assert np.array_equal(apply_weights(block, part), whole[tuple(slice(*span) for span in cut)])


def test_tiles_cover_the_target_once():
    source, target = Lattice((4, 4, 4), (0, 0, 0), (30, 30, 8)), Lattice((10, 5, 4), (3, 0, 0), (12, 24, 8))
    weights = lattice_weights(source, target)
    for budget in (1, 1000, 10**6):
        seen = np.zeros(target.shape[:2], int)
        for planes, rows in tiles(weights, (8, 6, 8), budget):
            seen[slice(*planes), slice(*rows)] += 1
        assert (seen == 1).all()
