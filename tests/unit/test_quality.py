"""Verdicts: each fault of a crop has its cause in words, and the configuration has the last one."""

import csv
import json

import numpy as np
import pytest

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.prepare.quality import judge, read_verdicts, write_quality

SETTINGS = {"min_em_fraction": 0.5, "min_std": 2.0}
CLASSES = ["pm", "mito"]


def stats(voxels):
    histogram = np.bincount(np.asarray(voxels), minlength=256)
    return {
        "min": int(np.min(voxels)),
        "max": int(np.max(voxels)),
        "mean": float(np.mean(voxels)),
        "std": float(np.std(voxels)),
        "histogram": histogram.tolist(),
    }


def record(crop="ds/crop1", **changes):
    return {
        "crop": crop,
        "dataset": crop.split("/")[0],
        "grid": "8nm",
        "status": "ok",
        "cause": "",
        "lattice": {"voxel_nm": [8.0, 8.0, 8.0], "translation_nm": [0.0, 0.0, 0.0], "shape": [4, 5, 6]},
        "classes": CLASSES,
        "annotated": ["pm"],
        "counts": {
            "pm": {"present": 20, "absent": 100, "unknown": 0},
            "mito": {"present": 0, "absent": 60, "unknown": 60},
        },
        "overlaps": {},
        "em_valid_fraction": 1.0,
        "em_inside_fraction": 1.0,
        "em_stats": stats(np.random.default_rng(0).integers(60, 200, 120)),
        "registration": {"verdict": "in place", "shift": [0, 0, 0]},
        "warnings": [],
        **changes,
    }


def failed(crop, cause):
    return record(crop, status="failed", cause=cause, lattice=None, em_stats=None, counts={}, annotated=[],
                  em_valid_fraction=0.0, em_inside_fraction=0.0)  # fmt: skip


MISREGISTERED = "misregistered: labels are off by (+3, +0, -12) voxels (z, y, x)"
NOTHING_KNOWN = {name: {"present": 0, "absent": 0, "unknown": 120} for name in CLASSES}


@pytest.mark.parametrize(
    ("changes", "verdict", "cause"),
    [
        ({}, "keep", ""),
        ({"em_inside_fraction": 0.86, "em_valid_fraction": 0.86}, "keep", ""),
        ({"em_inside_fraction": 0.2, "em_valid_fraction": 0.2}, "reject", "outside EM"),
        ({"em_valid_fraction": 0.0, "em_stats": stats([0])}, "reject", "EM not on disk"),
        ({"em_stats": stats(np.zeros(120, int))}, "reject", "blank EM"),
        ({"em_stats": stats([255] * 1000 + [0])}, "reject", "blank EM"),
        ({"em_stats": stats([100, 101] * 60)}, "flag", "low contrast"),
        ({"registration": {"verdict": "not assessable", "shift": [0, 0, 0]}}, "keep", ""),
        ({"registration": {"verdict": "displaced", "shift": [-3, 0, 12]}}, "flag", MISREGISTERED),
        ({"counts": NOTHING_KNOWN}, "reject", "nothing known"),
        ({"annotated": [], "counts": NOTHING_KNOWN}, "reject", "nothing annotated"),
        ({"status": "failed", "cause": "nothing annotated"}, "reject", "nothing annotated"),
        ({"status": "failed", "cause": "s0/0: damaged chunk"}, "reject", "unreadable: s0/0: damaged chunk"),
    ],
)
def test_each_fault_has_its_cause(changes, verdict, cause):
    assert judge(record(**changes), SETTINGS) == (verdict, cause)


def written(tmp_path, records, keep=(), drop=()):
    path = tmp_path / "shard0.json"
    path.write_text(json.dumps({"grid": "8nm", "voxel_nm": [8, 8, 8], "classes": CLASSES, "records": records}))
    crops, statistics = tmp_path / "crops.csv", tmp_path / "statistics.json"
    write_quality([path], crops, statistics, settings=SETTINGS, keep=list(keep), drop=list(drop))
    with crops.open() as stream:
        return {row["crop"]: row for row in csv.DictReader(stream)}, json.loads(statistics.read_text())


def test_table_lists_every_crop_with_its_figures(tmp_path):
    rows, statistics = written(
        tmp_path,
        [
            record("ds/crop2", overlaps={"mito+pm": 3}, warnings=["odd", "strange"]),
            record("ds/crop1", em_valid_fraction=0.1),
            failed("ds/crop3", "no\n.zattrs"),
        ],
    )
    assert list(rows) == ["ds/crop1", "ds/crop2", "ds/crop3"]
    assert rows["ds/crop2"] == {
        "crop": "ds/crop2",
        "verdict": "keep",
        "cause": "",
        "dataset": "ds",
        "voxel_nm": "8;8;8",
        "shape": "4;5;6",
        "annotated": "1",
        "present_classes": "pm",
        "known_fraction": "0.7500",
        "em_valid_fraction": "1.0000",
        "em_mean": rows["ds/crop2"]["em_mean"],
        "em_std": rows["ds/crop2"]["em_std"],
        "overlaps": "mito+pm:3",
        "warnings": "odd | strange",
    }
    assert rows["ds/crop3"]["cause"] == "unreadable: no .zattrs"
    assert statistics["grid"] == "8nm"
    assert statistics["classes"]["pm"]["crops_annotated"] == 1
    assert read_verdicts(tmp_path / "crops.csv") == {"ds/crop1": "reject", "ds/crop2": "keep", "ds/crop3": "reject"}


def test_keep_and_drop_have_the_last_word(tmp_path):
    records = [record("ds/crop1"), record("ds/crop2", em_stats=stats([100, 101] * 60)), failed("ds/crop3", "truncated")]
    rows, _ = written(tmp_path, records, keep=["ds/crop2", "ds/crop3"], drop=["ds/crop1"])
    assert rows["ds/crop1"]["verdict"] == "reject"
    assert rows["ds/crop1"]["cause"] == "dropped by quality.drop"
    assert rows["ds/crop2"]["verdict"] == "keep"
    assert "low contrast" in rows["ds/crop2"]["cause"]
    assert rows["ds/crop3"]["verdict"] == "reject"
    assert "nothing to use" in rows["ds/crop3"]["cause"]


def test_override_that_names_no_crop_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"quality\.keep.*'ds/crop11'.*did you mean 'ds/crop1'"):
        written(tmp_path, [record("ds/crop1")], keep=["ds/crop11"])
    with pytest.raises(ConfigError, match="both list 'ds/crop1'"):
        written(tmp_path, [record("ds/crop1")], keep=["ds/crop1"], drop=["ds/crop1"])


def test_reruns_write_the_same_bytes(tmp_path):
    records = [record("ds/crop1"), record("ds/crop2")]
    written(tmp_path, records)
    first = (tmp_path / "crops.csv").read_bytes(), (tmp_path / "statistics.json").read_bytes()
    written(tmp_path, records[::-1])
    assert ((tmp_path / "crops.csv").read_bytes(), (tmp_path / "statistics.json").read_bytes()) == first
