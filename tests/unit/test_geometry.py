import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cellmap_pipe.errors import GeometryError
from cellmap_pipe.geometry import Lattice, gap_nm, nearest_grid, nearest_level, vec3
from cellmap_pipe.prepare.em import read_em
from cellmap_pipe.prepare.instances import resample_ids
from cellmap_pipe.prepare.label_map import build_label_map
from cellmap_pipe.prepare.labels import PRESENT, UNKNOWN, read_label
from cellmap_pipe.prepare.ngff import read_image

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
    assert nearest_grid({**grids, "own": "native"}, (16, 16, 16)) == "own"


# --- from the world to the disk and back: one object at a known place, in EM and labels of any voxel size

EM_VOXELS = [(4, 4, 4), (5.24, 4, 4), (3.48, 4, 4), (8, 8, 8), (16, 16, 16)]
LABEL_VOXELS = [(2, 2, 2), (2.62, 2, 2), (1.74, 2, 2), (4, 4, 4), (8, 8, 8), (16, 16, 16), (8, 16, 16), (32, 32, 32)]
GRIDS = ["native", (4, 4, 4), (8, 8, 8), (6, 4, 5), (16, 16, 16), (32, 32, 32)]
SIDE = 200  # nm of the label box
MAX_UPSAMPLE = 8


def box_of(side, voxel, start):
    """Return the lattice of about `side` nm whose lower edge is at `start`; shapes are even for the pyramid."""
    shape = [max(4, 4 * round(length / v / 4)) for length, v in zip(side, voxel, strict=True)]
    return Lattice(voxel, [a + v / 2 for a, v in zip(start, voxel, strict=True)], shape)


def painted(lattice, lower, upper, value):
    """Return `value` in the voxels whose centre lies in the world box, by translation + i * voxel alone."""
    volume = np.full(lattice.shape, value, np.uint8)
    for axis in range(3):
        at = lattice.translation_nm[axis] + np.arange(lattice.shape[axis]) * lattice.voxel_nm[axis]
        keep = (at >= lower[axis] - 1e-6) & (at < upper[axis] - 1e-6)
        volume *= keep.astype(np.uint8).reshape([-1 if k == axis else 1 for k in range(3)])
    return volume


def centre_of_mass(volume, lattice):
    """Return the centre of mass in nm."""
    total = volume.sum(dtype=float)
    index = [(volume.sum(axis=tuple({0, 1, 2} - {k}), dtype=float) * np.arange(n)).sum() / total
             for k, n in enumerate(volume.shape)]  # fmt: skip
    return np.array([t + i * v for t, i, v in zip(lattice.translation_nm, index, lattice.voxel_nm, strict=True)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(EM_VOXELS),
    st.sampled_from(LABEL_VOXELS),
    st.sampled_from(GRIDS),
    st.tuples(*[st.floats(0, 1)] * 3),
    st.tuples(*[st.floats(-20, 20)] * 3),
    st.sampled_from([-60, -13, 60]),
)
def test_an_object_is_found_where_it_was_painted(tmp_path_factory, ngff, em_voxel, voxel, grid, at, offset, margin):
    """margin: nm by which the EM is larger than the label box on each side; smaller if negative."""
    folder, origin = tmp_path_factory.mktemp("world"), np.array([23837.13, -7599, 400012])
    source = box_of([SIDE] * 3, voxel, origin)
    em_lattice = box_of([SIDE + 2 * margin] * 3, em_voxel, origin - margin + offset)
    target_voxel = voxel if grid == "native" else grid
    assume(all(max(v, e) <= MAX_UPSAMPLE * t for v, e, t in zip(voxel, em_voxel, target_voxel, strict=True)))
    target = Lattice.covering(source.lower_nm, source.upper_nm, target_voxel)

    # twice the largest voxel involved: at least one voxel of each lattice lies wholly inside the object
    size = 2 * np.max([target_voxel, voxel, em_voxel], axis=0)
    room_lower = np.max([source.lower_nm, em_lattice.lower_nm, target.lower_nm], axis=0)
    room_upper = np.min([source.upper_nm, em_lattice.upper_nm, target.upper_nm], axis=0)
    assume((room_upper - room_lower > 1.5 * size).all())
    centre = room_lower + size * 0.75 + np.array(at) * (room_upper - room_lower - 1.5 * size)
    truth, em_truth = (painted(part, centre - size / 2, centre + size / 2, 1) for part in (source, em_lattice))
    for part, volume in ((source, truth), (em_lattice, em_truth)):
        assert (np.abs(centre_of_mass(volume, part) - centre) <= 0.5 * np.array(part.voxel_nm) + 1e-6).all()
    em_path = ngff(folder / "em", 250 * em_truth, em_voxel, em_lattice.translation_nm, levels=3, chunks=(32, 32, 32))
    label = read_label(ngff(folder / "nuc", truth, voxel, source.translation_nm, chunks=(32, 32, 32)))

    em = read_em(read_image(em_path), target, max_upsample=MAX_UPSAMPLE)
    result = build_label_map([label], target, ["nuc"], valid=em.valid, max_upsample=MAX_UPSAMPLE)
    states = result.table[result.rows][..., 0]
    ids = np.concatenate([part for _, _, part in resample_ids(label, target)])
    half = 0.5 * np.array(target_voxel)
    assert (np.abs(centre_of_mass(em.image, target) - centre_of_mass(em_truth, em_lattice)) <= half + 1e-3).all()
    for found in (states == PRESENT, ids):
        assert (np.abs(centre_of_mass(found, target) - centre_of_mass(truth, source)) <= half + 1e-3).all()
    volume_nm = np.prod(target_voxel) * np.count_nonzero(states == PRESENT)
    assert 0.4 < volume_nm / (truth.sum() * np.prod(voxel)) < 2.5  # twice the scale would be 8 times the volume
    # what is known ends where EM or label box end; a coarse level may lack the EM's last planes
    known = np.argwhere(states != UNKNOWN)
    lower, upper = (np.array(target.world_of(index)) for index in (known.min(axis=0), known.max(axis=0)))
    lacking = 3 * np.array(em_voxel) * (np.array(em.factors) * em_voxel < np.array(target_voxel) - 1e-6)
    assert (np.abs(lower - half - np.max([source.lower_nm, em_lattice.lower_nm], axis=0)) <= half + 1e-3).all()
    assert (
        np.abs(upper + half - np.min([source.upper_nm, em_lattice.upper_nm], axis=0)) <= half + lacking + 1e-3
    ).all()
