"""Plans of crops: the same levels, factors, voxels and reasons as the conversion that follows, from geometry alone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.errors import GeometryError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.chunks import ChunkSettings, chunk_crop
from cellmap_pipe.prepare.convert import bulk_paths, convert_shard, read_nifti
from cellmap_pipe.prepare.crops import write_crops
from cellmap_pipe.prepare.ngff import read_image
from cellmap_pipe.prepare.plan import grown_box, plan_crop
from cellmap_pipe.prepare.resample import lattice_weights

RNG = np.random.default_rng(5)
CONTEXT_NM = 20


class Crop:
    """One crop of one class on disk, its conversion to a grid, and its plan."""

    def __init__(self, folder, ngff, em, label):
        self.folder, root = folder, folder / "data/jrc_a/jrc_a.zarr"
        (em_voxel, em_start, em_shape, em_levels), (label_voxel, label_start, label_shape) = em, label
        volume = RNG.integers(60, 200, em_shape).astype(np.uint8)
        ngff(root / "em", volume, em_voxel, em_start, levels=em_levels)
        labels = RNG.integers(0, 2, label_shape).astype(np.uint8)
        ngff(root / "gt/crop1/mito", labels, label_voxel, label_start)
        self.levels = [level.lattice for level in read_image(root / "em").levels]
        self.label = Lattice(label_voxel, label_start, label_shape)

    def convert(self, voxel_nm, max_upsample):
        data = {"root": str(self.folder / "data"), "labels_path": "gt", "em_path": "em", "crops": None}
        write_crops(data, self.folder / "crops.csv")
        convert_shard(
            self.folder / "crops.csv",
            self.folder / "shard.json",
            data_root=data["root"],
            shard=0,
            shards=1,
            grid_name="grid",
            voxel_nm=voxel_nm or "native",
            classes=["mito"],
            labels={"empty": "absent"},
            max_upsample=max_upsample,
            nifti_dir=self.folder / "nifti",
            workers=1,
        )
        return json.loads((self.folder / "shard.json").read_text())["records"][0]

    def plan(self, voxel_nm, max_upsample):
        return plan_crop(self.levels, self.label, voxel_nm, max_upsample=max_upsample, context_nm=CONTEXT_NM)


# EM (voxel, translation, shape, levels), labels (voxel, translation, shape), grid: labels finer, coarser, off the EM's
# voxels, beyond the EM's box, anisotropic
CASES = {
    "labels twice as fine": (
        ((8, 8, 8), (0, 0, 0), (24, 24, 24), 2),
        ((4, 4, 4), (30, 30, 30), (16, 16, 16)),
        (8, 8, 8),
    ),
    "coarse labels": (((4, 4, 4), (0, 0, 0), (32, 32, 32), 3), ((16, 16, 16), (22, 22, 22), (4, 4, 4)), (16, 16, 16)),
    "off the voxels": (((8, 8, 8), (0, 0, 0), (24, 24, 24), 2), ((4, 4, 4), (35, 33, 31), (15, 16, 17)), (8, 8, 8)),
    "upsampled": (((8, 8, 8), (0, 0, 0), (16, 16, 16), 1), ((8, 8, 8), (32, 32, 32), (6, 6, 6)), (4, 4, 4)),
    "beyond the EM": (((8, 8, 8), (0, 0, 0), (12, 12, 12), 1), ((8, 8, 8), (48, 32, 32), (8, 6, 6)), (8, 8, 8)),
    "native, anisotropic": (
        ((5.24, 4, 4), (0, 0, 0), (16, 24, 24), 2),
        ((2.62, 2, 2), (20.3, 21, 19), (12, 14, 16)),
        None,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_plan_says_what_conversion_and_training_store_do(tmp_path, ngff, case):
    em, label, voxel_nm = case
    crop = Crop(tmp_path, ngff, em, label)
    plan, record = crop.plan(voxel_nm, 4), crop.convert(voxel_nm, 4)
    assert record["status"] == "ok"
    assert plan.target.same_as(Lattice.from_dict(record["lattice"]))
    assert record["em_level"]["path"].endswith(f"s{plan.level}")
    assert plan.em.to_dict()["voxel_nm"] == record["em_level"]["voxel_nm"]
    assert plan.em_factors == pytest.approx(record["em_level"]["factors"])
    assert plan.em_inside == pytest.approx(record["em_inside_fraction"], abs=1e-6)
    paths = bulk_paths(tmp_path / "nifti", record["crop"])
    assert read_nifti(paths["image"]).shape == read_nifti(paths["label"]).shape == plan.target.shape
    store = ChunkSettings(tmp_path / "data", tmp_path / "nifti", tmp_path / "store", CONTEXT_NM, 4)
    stored = chunk_crop(record, store)
    assert plan.stored.same_as(Lattice.from_dict(stored["lattice"]))
    for kind, expected in (("image", plan.image_bytes), ("label", plan.label_bytes)):
        assert np.load(tmp_path / "store" / stored["files"][kind]["path"], mmap_mode="r").nbytes == expected


@pytest.mark.parametrize(
    ("em_voxel", "label_voxel", "reason"),
    [
        ((16, 16, 16), (4, 4, 4), "finest level on disk would be upsampled 4.00 times"),
        ((4, 4, 4), (16, 16, 16), "labels of 16x16x16 nm would be upsampled 4.00 times"),
    ],
)
def test_the_reason_against_a_plan_is_that_of_the_conversion(tmp_path, ngff, em_voxel, label_voxel, reason):
    crop = Crop(tmp_path, ngff, (em_voxel, (0, 0, 0), (24, 24, 24), 2), (label_voxel, (32, 32, 32), (4, 4, 4)))
    record = crop.convert([4, 4, 4], 3)
    with pytest.raises(GeometryError, match=reason) as fault:
        crop.plan((4, 4, 4), 3)
    assert (record["status"], record["cause"]) == ("failed", str(fault.value))


def test_labels_outside_the_em_have_no_plan():
    em, label = Lattice((8, 8, 8), (0, 0, 0), (10, 10, 10)), Lattice((4, 4, 4), (1000, 0, 0), (8, 8, 8))
    with pytest.raises(GeometryError, match=r"outside EM: the label box from 998x-2x-2 .* to 76x76x76 nm"):
        plan_crop([em], label, (8, 8, 8), max_upsample=4)


def test_context_ends_with_the_em_and_is_whole_voxels():
    em = Lattice((4, 4, 4), (0, 0, 0), (30, 30, 30))
    box = Lattice((8, 8, 8), (22, 50, 98), (4, 4, 2))
    grown, offset = grown_box(box, em, 20)
    assert offset == (2, 3, 3) and grown.shape == (9, 10, 6)
    assert grown_box(box, em, 0) == (box, (0, 0, 0))
    free, offset = grown_box(box, None, 20)
    assert offset == (3, 3, 3) and free.shape == (10, 10, 8)


SIZES = st.sampled_from([1.62, 2.0, 2.62, 4.0, 8.0, 16.0])
VOXELS = st.tuples(SIZES, SIZES, SIZES)
few = settings(max_examples=80, deadline=None, derandomize=True)


@few
@given(VOXELS, VOXELS, st.none() | VOXELS, st.tuples(*[st.floats(-300, 300)] * 3), st.tuples(*[st.integers(1, 40)] * 3))
def test_the_em_box_is_what_the_resampling_draws_on(em_voxel, label_voxel, grid, start, shape):
    levels = [
        Lattice([v * 2**k for v in em_voxel], [v * (2**k - 1) / 2 for v in em_voxel], [n // 2**k for n in (64, 50, 40)])
        for k in range(3)
    ]
    label = Lattice(label_voxel, start, shape)
    try:
        plan = plan_crop(levels, label, grid, max_upsample=100, context_nm=30)
    except GeometryError as error:
        assert "outside EM" in str(error) and label.overlap_fraction(levels[0]) == 0
        return
    weights = lattice_weights(plan.em, plan.stored)
    assert plan.em_box == (tuple(w.start for w in weights), tuple(w.stop for w in weights))
    assert plan.em_bytes_read == np.prod([w.stop - w.start for w in weights])
    # a voxel painted in the world is in the target voxel that says so, and drawn on by it
    middle = [n // 2 for n in plan.target.shape]
    world = plan.target.world_of(middle)
    for axis in range(3):
        assert label.lower_nm[axis] - 1e-6 <= world[axis]
        at = round(plan.em.index_of(world)[axis])
        if 0 <= at < plan.em.shape[axis]:
            assert plan.em_box[0][axis] <= at < plan.em_box[1][axis]


def test_levels_may_come_in_any_order():
    fine, coarse = Lattice((4, 4, 4), (0, 0, 0), (40, 40, 40)), Lattice((8, 8, 8), (2, 2, 2), (20, 20, 20))
    label = Lattice((8, 8, 8), (18, 18, 18), (8, 8, 8))
    plans = [plan_crop(levels, label, (8, 8, 8), max_upsample=4) for levels in ([fine, coarse], [coarse, fine])]
    assert [plan.level for plan in plans] == [1, 0]
    assert plans[0].em == plans[1].em == coarse and plans[0].em_inside == plans[1].em_inside == 1
