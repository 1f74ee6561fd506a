import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from label_case import GRIDS, annotation, plain_array, write_crop

from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare import instances as instances_module
from cellmap_pipe.prepare.instances import count_ids, resample_ids
from cellmap_pipe.prepare.labels import read_label


@pytest.mark.parametrize("dtype,largest,kept", [("u1", 254, "u2"), ("u2", 60000, "u2"), ("i4", 70000, "u4")])
def test_ids_keep_their_numbers_in_the_smallest_dtype(tmp_path, ngff, dtype, largest, kept):
    volume = np.random.default_rng(0).integers(0, largest, (9, 8, 7)).astype(dtype)
    volume[0, 0, 0] = largest
    (mito,) = write_crop(ngff, tmp_path, {"mito": volume}, kinds={"mito": "instance"})
    ids = np.concatenate([part for _, _, part in resample_ids(mito, mito.level.lattice)])
    assert ids.dtype == kept and np.array_equal(ids, volume)
    assert count_ids(mito) == len(np.unique(volume[volume > 0]))


def test_ids_beyond_32_bits_are_numbered_in_their_order(tmp_path, ngff):
    volume = np.array([0, 7, 2**40, 2**40, 2**33], np.uint64).reshape(1, 1, 5)
    (mito,) = write_crop(ngff, tmp_path, {"mito": volume}, kinds={"mito": "instance"})
    ((first, last, ids),) = resample_ids(mito, mito.level.lattice)
    assert (first, last, ids.dtype, ids.ravel().tolist()) == (0, 1, np.uint16, [0, 1, 3, 3, 2])


def test_unknown_and_masked_ids_do_not_count(tmp_path, ngff):
    volume = np.arange(250, 258, dtype=np.uint16).reshape(1, 1, 8)
    mask = np.ones(volume.shape, np.uint8)
    mask[0, 0, :2] = 0
    plain_array(tmp_path / "mito_mask", mask)
    stated = annotation("instance", "mito", absent=0, unknown=1)["cellmap"]["annotation"]
    mito = read_label(ngff(tmp_path / "mito", volume, (4, 4, 4), (0, 0, 0), annotation=stated))
    assert count_ids(mito) == 5
    ((_, _, ids),) = resample_ids(mito, mito.level.lattice)
    assert ids.ravel().tolist() == [0, 0, 252, 253, 254, 0, 256, 257]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.tuples(GRIDS, GRIDS, GRIDS), st.tuples(*[st.integers(-2, 2)] * 3), st.sampled_from([40, 8 * 1024**2]))
def test_each_voxel_has_the_id_at_its_centre(tmp_path_factory, ngff, voxel, offset, budget):
    volume = np.random.default_rng(1).integers(0, 9, (6, 7, 5)).astype(np.uint8)
    folder = tmp_path_factory.mktemp("ids")
    (mito,) = write_crop(ngff, folder, {"mito": volume}, (4, 3, 4), (3, 1, 0), {"mito": "instance"})
    source = mito.level.lattice
    target = Lattice.covering(source.lower_nm, source.upper_nm, voxel).window(offset, (4, 5, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instances_module, "SLAB_VOXELS", budget)
        slabs = list(resample_ids(mito, target))
    assert [slab[0] for slab in slabs[1:]] == [slab[1] for slab in slabs[:-1]] and slabs[-1][1] == 4
    ids = np.concatenate([slab[2] for slab in slabs])
    for at in np.ndindex(target.shape):
        index = np.array(source.index_of(target.world_of(at)))
        if ((index < -0.5 - 1e-6) | (index > np.array(source.shape) - 0.5 + 1e-6)).any():
            assert ids[at] == 0
        else:
            near = np.argwhere(
                np.abs(np.indices(source.shape).transpose(1, 2, 3, 0) - index).max(axis=-1) <= 0.5 + 1e-6
            )
            assert ids[at] in {volume[tuple(i)] for i in near}
