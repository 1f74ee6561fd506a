"""What real labels lose on a grid of 10 nm: printed per class, and within what their shapes allow."""

import math
from pathlib import Path

import pytest

from cellmap_pipe.evaluation import aggregate
from cellmap_pipe.evaluation.ceiling import ceiling_shard
from cellmap_pipe.files import read_json, write_json

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "real-em"
CROPS = ("crop101", "crop102", "crop401")


@pytest.fixture(scope="module")
def ceilings(real_em, tmp_path_factory):
    """Records by (crop, class) of a conversion to 10 nm."""
    folder = tmp_path_factory.mktemp("ceiling")
    shard = read_json(real_em.folder / "shard0.json")
    shard["records"] = [record for record in shard["records"] if record["crop"].endswith(CROPS)]
    write_json(folder / "shard0.json", shard)
    ceiling_shard(
        folder / "shard0.json",
        real_em.folder / "crops.csv",
        folder / "ceiling.json",
        data_root=DATA,
        nifti_dir=real_em.nifti,
        workers=2,
        thresholds={"default": 0.5},
        derive=[],
        labels={"empty": "absent"},
    )
    records = read_json(folder / "ceiling.json")["records"]
    return {(record["crop"].split("/")[1], record["label"]): record for record in records}


def test_every_annotated_class_has_a_ceiling(ceilings):
    assert {crop for crop, _ in ceilings} == set(CROPS)
    for (crop, label), record in ceilings.items():
        voxels = record["voxels"]
        score = aggregate([record])["label_scores"][label]
        size = " x ".join(f"{v:g}" for v in record["voxel_size"])
        total = sum(voxels.values())
        shown = "not there" if not total else f"IoU {voxels['tp'] / total:.3f}"
        kept = "" if not record["truth_nm3"] else f", keeps {100 * record['kept_nm3'] / record['truth_nm3']:.1f} %"
        official = score.get("combined_score", score.get("iou"))
        print(f"{crop} {label} at {size} nm: {shown}{kept}, official {official:.3f}")
        assert record["status"] == "scored"
        assert record["truth_nm3"] == pytest.approx(
            (voxels["tp"] + voxels["fn"]) * math.prod(record["voxel_size"]), rel=1e-6
        )


def test_labels_on_the_grid_itself_lose_nothing(ceilings):
    own = {key: record for key, record in ceilings.items() if key[0] == "crop101"}
    assert own and all(record["voxel_size"] == [10, 10, 10] for record in own.values())
    for key, record in own.items():
        assert (record["voxels"]["fp"], record["voxels"]["fn"]) == (0, 0), key
        assert record["kept_nm3"] == record["truth_nm3"]


def test_finer_and_coarser_labels_lose_some(ceilings):
    for (crop, label), record in ceilings.items():
        voxels = record["voxels"]
        if not record["truth_nm3"]:
            assert not any(voxels.values())
            continue
        iou = voxels["tp"] / sum(voxels.values())
        assert 0.3 < iou <= 1, (crop, label)
        assert 0.5 < record["kept_nm3"] / record["truth_nm3"] < 2, (crop, label)
