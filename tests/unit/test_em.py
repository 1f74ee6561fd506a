import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.errors import DataError, GeometryError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare import em as em_module
from cellmap_pipe.prepare.em import choose_level, read_em
from cellmap_pipe.prepare.ngff import read_image

VOXEL, ORIGIN, SHAPE = (5.24, 4.0, 4.0), (100.0, -40.0, 7.0), (24, 32, 28)
PER_VOXEL = 8  # grey values


def painted(lattice, axis):
    """Grey values that rise along one axis with the world position: area means and interpolation keep them."""
    i, n = np.arange(lattice.shape[axis]), lattice.shape
    world = lattice.translation_nm[axis] + i * lattice.voxel_nm[axis]
    shape = [-1 if k == axis else 1 for k in range(3)]
    return np.broadcast_to((PER_VOXEL * (world - ORIGIN[axis]) / VOXEL[axis]).reshape(shape), n)


@pytest.fixture(scope="module")
def images(tmp_path_factory, ngff):
    folder = tmp_path_factory.mktemp("em")
    volumes = [np.rint(painted(Lattice(VOXEL, ORIGIN, SHAPE), axis)).astype(np.uint8) for axis in range(3)]
    return [read_image(ngff(folder / f"{i}", v, VOXEL, ORIGIN, levels=3)) for i, v in enumerate(volumes)]


@pytest.fixture
def image(images):
    return images[1]


FACTORS = st.sampled_from([0.5, 0.7, 1.0, 1.31, 2.0, 2.6])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.tuples(FACTORS, FACTORS, FACTORS),
    st.tuples(*[st.floats(1, 12)] * 3),
    st.sampled_from([400, 32 * 1024**2]),
    st.integers(0, 2),
)
def test_every_target_shows_what_is_painted_at_its_world_position(images, factors, start, budget, axis):
    image = images[axis]
    voxel = [f * v for f, v in zip(factors, VOXEL, strict=True)]
    full = image.levels[0].lattice
    centre = [lo + s * v + t for lo, s, v, t in zip(full.lower_nm, start, VOXEL, voxel, strict=True)]
    room = [int((hi - c) / t) - 1 for hi, c, t in zip(full.upper_nm, centre, voxel, strict=True)]
    target = Lattice(voxel, centre, [max(1, min(6, n)) for n in room])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(em_module, "SLAB_VOXELS", budget)
        block = read_em(image, target, max_upsample=4)
    assert block.valid is None
    # one grey value from rounding source and result, and an eighth of a voxel where the area cuts through voxels
    assert np.abs(block.image - painted(target, axis)).max() <= 1 + PER_VOXEL / 8
    level = {level.path.rsplit("/", 1)[-1]: level for level in image.levels}[block.level]
    assert block.factors == pytest.approx([t / v for t, v in zip(voxel, level.lattice.voxel_nm, strict=True)])


def test_the_levels_own_lattice_is_copied(image):
    target = image.levels[1].lattice.window((2, 3, 1), (5, 6, 7))
    block = read_em(image, target, max_upsample=1)
    assert block.level == "s1" and block.valid is None and block.factors == (1, 1, 1)
    assert np.array_equal(block.image, np.rint(painted(target, 1)).astype(np.uint8))


def test_beyond_the_em_nothing_is_valid_and_the_image_is_zero(image):
    target = image.levels[0].lattice.window((-3, 0, 23), (10, 8, 10))
    block = read_em(image, target, max_upsample=1)
    expected = np.zeros(target.shape, bool)
    expected[3:, :, :5] = True
    assert np.array_equal(block.valid, expected)
    assert not block.image[~expected].any() and block.image[expected].any()


def test_a_target_that_misses_the_em_is_wholly_invalid(image):
    block = read_em(image, image.levels[0].lattice.window((100, 0, 0), (4, 4, 4)), max_upsample=1)
    assert not block.valid.any() and not block.image.any()


def copied(image, tmp_path):
    shutil.copytree(image.path, tmp_path / "em")
    return tmp_path / "em"


def test_voxels_of_chunks_that_were_not_downloaded_are_invalid(image, tmp_path):
    path = copied(image, tmp_path)
    (path / "s0" / "1" / "1" / "1").unlink()
    sparse = read_image(path)
    block = read_em(sparse, sparse.levels[0].lattice, max_upsample=1)
    expected = np.ones(SHAPE, bool)
    expected[8:16, 8:16, 8:16] = False
    assert np.array_equal(block.valid, expected)
    finer = Lattice([v / 2 for v in VOXEL], sparse.levels[0].lattice.translation_nm, [2 * n - 1 for n in SHAPE])
    block = read_em(sparse, finer, max_upsample=2)
    # interpolation draws on the missing chunk up to one voxel away from it
    z, y, x = (np.isin(np.arange(2 * n - 1), np.arange(15, 32)) for n in SHAPE)
    assert np.array_equal(~block.valid, z[:, None, None] & y[None, :, None] & x[None, None, :])


@pytest.fixture(scope="module")
def sparse(images, tmp_path_factory):
    """EM of which a few chunks are not on disk."""
    path = tmp_path_factory.mktemp("sparse") / "em"
    shutil.copytree(images[0].path, path)
    for key in ("0/0/0", "1/2/1", "2/3/3"):
        (path / "s0" / key).unlink()
    return read_image(path)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 1.9])] * 3),
    st.tuples(*[st.integers(-40, 60)] * 3),
    st.tuples(*[st.integers(1, 40)] * 3),
    st.sampled_from([1, 300, 3000]),
)
def test_tiles_of_any_size_give_the_same_em_and_validity(sparse, factors, start, shape, budget):
    target = Lattice([f * v for f, v in zip(factors, VOXEL, strict=True)], np.add(ORIGIN, start), shape)
    whole = read_em(sparse, target, max_upsample=4)
    made = []

    def scratch(*arguments):
        made.append(np.full(*arguments[:1], 77, *arguments[1:]))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(em_module, "SLAB_VOXELS", budget)
        tiled = read_em(sparse, target, max_upsample=4, scratch=scratch)
    assert tiled.image is made[0] and (tiled.valid is None) == (whole.valid is None)
    assert whole.valid is None or np.array_equal(tiled.valid, whole.valid)
    valid = em_module.valid_voxels(sparse, target, whole.level)
    assert np.array_equal(valid, whole.valid) if valid is not None else whole.valid is None
    assert np.array_equal(tiled.image, whole.image)
    assert tiled.valid is None or not tiled.image[~tiled.valid].any()


def test_a_level_that_was_not_downloaded_gives_way_to_another(image, tmp_path):
    path = copied(image, tmp_path)
    shutil.rmtree(path / "s1" / "0")
    shutil.rmtree(path / "s1" / "1")
    sparse = read_image(path)
    grid = Lattice.covering(sparse.levels[0].lattice.lower_nm, sparse.levels[0].lattice.upper_nm, (12, 9, 9))
    assert choose_level(image, grid, 4).path.endswith("s1")
    assert choose_level(sparse, grid, 4).path.endswith("s0")
    for z in "012":
        shutil.rmtree(path / "s0" / z)
    assert choose_level(sparse, grid, 4).path.endswith("s2")  # coarser, within max_upsample
    block = read_em(sparse, grid, max_upsample=4)
    assert block.valid is None or block.valid.any()
    assert choose_level(sparse, grid, 1).path.endswith("s1")  # nothing allowed has it
    assert not read_em(sparse, grid, max_upsample=1).valid.any()


def test_em_that_is_too_coarse_is_refused(image):
    fine = Lattice((1, 1, 1), ORIGIN, (4, 4, 4))
    with pytest.raises(GeometryError, match=r"upsampled 5\.24 times"):
        read_em(image, fine, max_upsample=4)


def test_em_of_another_dtype_is_refused(tmp_path, ngff):
    path = ngff(tmp_path / "em", np.ones((8, 8, 8), np.uint16), (4, 4, 4), (0, 0, 0))
    with pytest.raises(DataError, match="s0: EM of dtype uint16; uint8 is expected"):
        read_em(read_image(path), Lattice((4, 4, 4), (0, 0, 0), (8, 8, 8)), max_upsample=1)
