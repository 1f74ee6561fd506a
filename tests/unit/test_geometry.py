import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.errors import GeometryError
from cellmap_pipe.geometry import Lattice, gap_nm, nearest_grid, nearest_level, vec3

SIZES = st.sampled_from([1.62, 1.74, 2.0, 2.62, 4.0, 5.24, 8.0, 16.0, 32.0, 47.5])
VOXELS = st.tuples(SIZES, SIZES, SIZES)
POSITIONS = st.tuples(*[st.floats(-1e6, 1e6, allow_nan=False)] * 3)
SHAPES = st.tuples(*[st.integers(1, 400)] * 3)
few = settings(max_examples=60, deadline=None, derandomize=True)


@few
@given(VOXELS, POSITIONS, SHAPES, st.tuples(*[st.floats(-500, 500)] * 3))
def test_nanometres_in_are_nanometres_out(voxel, translation, shape, index):
    lattice = Lattice(voxel, translation, shape)
    assert lattice.index_of(lattice.world_of(index)) == pytest.approx(index, abs=1e-6)
    assert Lattice.from_dict(lattice.to_dict()) == lattice


def test_translation_is_the_centre_of_the_first_voxel():
    # 32 nm labels over 8 nm EM lie 12 nm off its centres, yet begin at the same edge
    labels = Lattice((32, 32, 32), (12, 12, 12), (10, 10, 10))
    em = Lattice((8, 8, 8), (0, 0, 0), (40, 40, 40))
    assert labels.lower_nm == em.lower_nm == (-4, -4, -4)
    assert labels.upper_nm == em.upper_nm == (316, 316, 316)


@few
@given(VOXELS, POSITIONS, SHAPES, VOXELS)
def test_a_covering_grid_begins_at_the_lower_edge_and_ends_within_half_a_voxel(voxel, translation, shape, grid):
    box = Lattice(voxel, translation, shape)
    cover = Lattice.covering(box.lower_nm, box.upper_nm, grid)
    assert cover.lower_nm == pytest.approx(box.lower_nm, abs=1e-6)
    for end, edge, size, n in zip(cover.upper_nm, box.upper_nm, grid, cover.shape, strict=True):
        assert abs(end - edge) <= size / 2 * (1 + 1e-3) or n == 1


@few
@given(VOXELS, POSITIONS, SHAPES)
def test_covering_a_box_with_its_own_voxel_gives_the_box_back(voxel, translation, shape):
    box = Lattice(voxel, translation, shape)
    assert Lattice.covering(box.lower_nm, box.upper_nm, voxel).same_as(box)


def test_padding_and_windows_move_the_origin_by_whole_voxels():
    box = Lattice((4, 2, 1), (100, 50, 25), (10, 10, 10))
    assert box.window((1, 2, 3), (2, 2, 2)) == Lattice((4, 2, 1), (104, 54, 28), (2, 2, 2))
    assert box.padded((1, 0, 2), (0, 1, 1)) == Lattice((4, 2, 1), (96, 50, 23), (11, 11, 13))


def test_overlap_and_gap_are_measured_between_edges():
    a = Lattice((10, 10, 10), (5, 5, 5), (10, 10, 10))
    b = Lattice((10, 10, 10), (5, 5, 85), (10, 10, 10))
    c = Lattice((10, 10, 10), (5, 5, 135), (10, 10, 10))
    assert a.overlap_fraction(b) == pytest.approx(0.2)
    assert a.overlap_fraction(c) == 0
    assert gap_nm(a, c) == pytest.approx(30)
    assert gap_nm(a, b) < 0


@pytest.mark.parametrize("bad", [(0, 1, 1), (1, -1, 1), (1, 1, math.nan)])
def test_a_voxel_size_must_be_positive(bad):
    with pytest.raises(GeometryError, match="voxel size"):
        Lattice(bad, (0, 0, 0), (1, 1, 1))
    with pytest.raises(GeometryError, match="three numbers"):
        vec3([1, 2])


def pyramid(voxel, n=4):
    return [Lattice([v * 2**k for v in voxel], (0, 0, 0), (8, 8, 8)) for k in range(n)]


def test_the_level_is_the_coarsest_that_is_fine_enough_on_every_axis():
    levels = pyramid((4, 4, 4))
    assert nearest_level(levels, (8, 8, 8), 4) == 1
    assert nearest_level(levels, (10, 10, 10), 4) == 1
    assert nearest_level(levels, (16, 16, 7.9), 4) == 0
    assert nearest_level(levels, (1000, 1000, 1000), 4) == 3
    assert nearest_level(list(reversed(levels)), (8, 8, 8), 4) == 2  # in any order


def test_the_finest_level_is_upsampled_only_within_the_bound():
    assert nearest_level(pyramid((8, 8, 8)), (2, 2, 2), 4) == 0
    with pytest.raises(GeometryError, match=r"5\.33 times.*levels on disk: 8x8x8; 16x16x16"):
        nearest_level(pyramid((8, 8, 8)), (1.5, 2, 2), 4)


def test_a_rounded_voxel_size_counts_as_the_same():
    assert nearest_level(pyramid((2.62, 2, 2)), (2.6200000001, 2, 2), 1) == 0
    assert nearest_level(pyramid((4, 4, 4)), (7.95, 7.95, 7.95), 1) == 1


def test_the_nearest_grid_is_nearest_by_ratio():
    grids = {"8nm": (8, 8, 8), "32nm": (32, 32, 32)}
    assert nearest_grid(grids, (4, 4, 4)) == "8nm"
    assert nearest_grid(grids, (64, 64, 64)) == "32nm"
    assert nearest_grid(grids, (16, 16, 16)) == "8nm"  # equally near: the finer
