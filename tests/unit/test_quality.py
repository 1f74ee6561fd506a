"""Verdicts: each fault of a crop has its cause in words, and the configuration has the last one."""

import csv
import json
import re
from itertools import product

import numpy as np
import pytest

from cellmap_pipe.errors import ConfigError, ContractError
from cellmap_pipe.prediction.plan import estimate_bytes, make_plans
from cellmap_pipe.prediction.volumes import READ_PLANES
from cellmap_pipe.prepare.quality import judge, needed_memory, read_verdicts, write_quality

SETTINGS = {"min_em_fraction": 0.5, "min_std": 2.0, "max_train_gb": None, "max_predict_gb": None}
CLASSES = ["pm", "mito"]
USUAL = {"memory_gb": None, "planes": "all", "output": "uint8", "tta": 1}
MODELS = [
    {"name": "small", "patch": [16, 16, 16], "overlap": 0.5, "batch": 1, "classes": 2, **USUAL},
    {"name": "large", "patch": [32, 32, 32], "overlap": 0.5, "batch": 2, "classes": 2, **USUAL},
]
IN_PLACE = {"verdict": "in place", "shift": [0, 0, 0], "scale": 1, "margin": 1.5}


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
        "contradictions": [],
        "instances": {},
        "label_dtype": "uint8",
        "em_valid_fraction": 1.0,
        "em_inside_fraction": 1.0,
        "em_stats": stats(np.random.default_rng(0).integers(60, 200, 120)),
        "registration": IN_PLACE,
        "warnings": [],
        **changes,
    }


def failed(crop, cause, kind="unreadable"):
    return record(crop, status="failed", cause=cause, kind=kind, lattice=None, em_stats=None, counts={}, annotated=[],
                  em_valid_fraction=0.0, em_inside_fraction=0.0, label_dtype="", registration=None)  # fmt: skip


def certificate(verdict, **changes):
    return {"registration": {**IN_PLACE, "verdict": verdict, **changes}}


MISREGISTERED = "misregistered: labels are off by (+3, +0, -12) voxels (z, y, x)"
TWICE = "resolution mismatch: labels show twice the image's field of view (they fit best at scale 2)"
HALF = "resolution mismatch: labels show half the image's field of view (they fit best at scale 0.5)"
NOTHING_KNOWN = {name: {"present": 0, "absent": 0, "unknown": 120} for name in CLASSES}
TOO_COARSE = "labels of 64x64x64 nm would be upsampled 8.00 times"


def status_failed(kind, cause):
    return {"status": "failed", "kind": kind, "cause": cause}


@pytest.mark.parametrize(
    ("changes", "verdict", "cause"),
    [
        ({}, "keep", ""),
        ({"em_inside_fraction": 0.86, "em_valid_fraction": 0.86}, "keep", ""),
        ({"em_inside_fraction": 0.2, "em_valid_fraction": 0.2}, "reject", "outside EM"),
        ({"em_inside_fraction": 0.0, "em_valid_fraction": 0.0, "em_stats": stats([0])}, "reject", "outside EM"),
        ({"em_valid_fraction": 0.0, "em_stats": stats([0])}, "reject", "EM not downloaded"),
        ({"em_stats": stats(np.zeros(120, int))}, "reject", "blank EM"),
        ({"em_stats": stats([255] * 1000 + [0])}, "reject", "blank EM"),
        ({"em_stats": stats([100, 101] * 60)}, "flag", "low contrast"),
        (certificate("not assessable", margin=None), "keep", ""),
        (certificate("displaced", shift=[-3, 0, 12]), "flag", MISREGISTERED),
        (certificate("rescaled", scale=2, shift=[5, 5, 5]), "flag", TWICE),
        (certificate("rescaled", scale=0.5), "flag", HALF),
        ({"counts": NOTHING_KNOWN}, "reject", "nothing known"),
        ({"annotated": [], "counts": NOTHING_KNOWN}, "reject", "unannotated"),
        (status_failed("unannotated", "nothing annotated"), "reject", "unannotated"),
        (status_failed("unreadable", "s0/0: damaged chunk"), "reject", "unreadable: s0/0: damaged chunk"),
        (status_failed("resolution mismatch", TOO_COARSE), "reject", f"resolution mismatch: {TOO_COARSE}"),
    ],
)
def test_each_fault_has_its_cause(changes, verdict, cause):
    assert judge(record(**changes), SETTINGS) == (verdict, cause)


def test_em_that_is_not_there_is_no_resin_even_if_any_share_would_do():
    anything = {**SETTINGS, "min_em_fraction": 0}
    assert judge(record(em_valid_fraction=0.0, em_stats=stats([0])), anything) == ("reject", "EM not downloaded")
    assert judge(record(em_inside_fraction=0.0, em_valid_fraction=0.0), anything) == ("reject", "outside EM")


def of_shape(*shape, **changes):
    return record(lattice={"voxel_nm": [8.0, 8.0, 4.0], "translation_nm": [0.0, 0.0, 0.0], "shape": shape}, **changes)


def test_training_needs_the_pair_with_its_context():
    need = needed_memory(of_shape(10, 20, 30), [], 20)
    assert (need.train, need.predict, need.model) == (16 * 26 * 40 * 2, 0, "")
    assert needed_memory(of_shape(10, 20, 30, label_dtype="uint16"), [], 0).train == 10 * 20 * 30 * 3


@pytest.mark.parametrize("shape", [(100, 150, 200), (513, 389, 316), (20, 20, 20)])
def test_prediction_needs_no_more_than_predicted_whatever_em_lies_round_the_crop(shape):
    need = needed_memory(of_shape(*shape), MODELS, 0)
    assert need.model == "large"
    box, depth = ((0, 0, 0), shape), min(64, shape[0])
    runs = []
    for context in product([(0, 0), (3, 11), (32, 0), (32, 32)], repeat=3):
        plans = make_plans(shape, (32, 32, 32), 0.5, context=context, voxel_nm=(8.0, 8.0, 4.0))
        runs.append(estimate_bytes(plans, box, 2, depth, 2, READ_PLANES))
    assert max(runs) == need.predict


def test_a_model_that_keeps_to_a_bound_needs_no_more():
    limited = [{**MODELS[1], "memory_gb": 0.01}]
    assert needed_memory(of_shape(100, 150, 200), limited, 0).predict == 10_000_000


def test_memory_does_not_count_the_depth_of_a_prediction_but_that_of_the_store():
    shallow, deep = (needed_memory(of_shape(n, 64, 64), MODELS, 0) for n in (192, 1920))
    assert deep.predict == pytest.approx(shallow.predict, rel=0.01)
    assert deep.train == 10 * shallow.train


@pytest.mark.parametrize(
    ("shape", "limits", "cause"),
    [
        ((1000, 100, 100), (0.01, None), r"needs 0.02 GB in training \(quality.max_train_gb is 0.01\)"),
        (
            (64, 64, 64),
            (0.01, 0.002),
            r"needs [\d.]+ GB in prediction with large \(quality.max_predict_gb is 0.002\)",
        ),
        (
            (512, 256, 256),
            (0.01, 0.01),
            r"needs [\d.]+ GB in training \(.* is 0.01\) and [\d.]+ GB in prediction with large \(.* is 0.01\)",
        ),
    ],
)
def test_a_crop_over_the_memory_budget_is_rejected(shape, limits, cause):
    crop = of_shape(*shape, registration=IN_PLACE | {"verdict": "displaced", "shift": [9, 9, 9]})
    memory = needed_memory(crop, MODELS, 0)
    verdict, said = judge(crop, {**SETTINGS, "max_train_gb": limits[0], "max_predict_gb": limits[1]}, memory)
    assert verdict == "reject" and re.fullmatch(f"too large for the memory budget: {cause}", said)
    assert judge(crop, SETTINGS, memory)[0] == "flag"


def written(tmp_path, records, keep=(), drop=(), **changes):
    path = tmp_path / "shard0.json"
    path.write_text(json.dumps({"grid": "8nm", "voxel_nm": [8, 8, 8], "classes": CLASSES, "records": records}))
    crops, statistics = tmp_path / "crops.csv", tmp_path / "statistics.json"
    settings = {**SETTINGS, **changes}
    overrides = {"keep": list(keep), "drop": list(drop)}
    write_quality([path], crops, statistics, settings=settings, **overrides, context_nm=16, models=MODELS)
    with crops.open() as stream:
        return {row["crop"]: row for row in csv.DictReader(stream)}, json.loads(statistics.read_text())


def test_table_lists_every_crop_with_its_figures(tmp_path):
    rows, statistics = written(
        tmp_path,
        [
            record(
                "ds/crop2",
                overlaps={"mito+pm": 3},
                warnings=["odd", "strange"],
                contradictions=["mito is marked in 2 voxels where cell is absent"],
                instances={"mito": 7},
            ),
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
        "supervised_pairs": "180",
        "em_inside_fraction": "1.0000",
        "em_valid_fraction": "1.0000",
        "em_mean": rows["ds/crop2"]["em_mean"],
        "em_std": rows["ds/crop2"]["em_std"],
        "registration": "in place",
        "shift": "0;0;0",
        "scale": "1",
        "margin": "1.500",
        "train_mb": f"{2 * 8 * 9 * 10 / 1e6:.1f}",
        "predict_mb": f"{needed_memory(record(), MODELS, 16).predict / 1e6:.1f}",
        "overlaps": "mito+pm:3",
        "contradictions": "mito is marked in 2 voxels where cell is absent",
        "instances": "mito:7",
        "warnings": "odd | strange",
    }
    assert rows["ds/crop3"]["cause"] == "unreadable: no .zattrs"
    assert {rows["ds/crop3"][key] for key in ("scale", "shift", "margin", "train_mb", "predict_mb")} == {""}
    assert rows["ds/crop1"]["cause"] == "EM not downloaded" and rows["ds/crop1"]["train_mb"]
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


def test_a_crop_of_which_nothing_is_known_or_that_has_no_em_cannot_be_kept(tmp_path):
    records = [record("ds/crop1", counts=NOTHING_KNOWN), record("ds/crop2", em_valid_fraction=0.0, em_stats=stats([0]))]
    rows, _ = written(tmp_path, [*records, record("ds/crop3")], keep=["ds/crop1", "ds/crop2"])
    for crop, cause in (("ds/crop1", "nothing known"), ("ds/crop2", "EM not downloaded")):
        assert rows[crop]["verdict"] == "reject"
        assert rows[crop]["cause"] == f"{cause} (listed in quality.keep, but there is nothing to use)"


def test_a_certificate_that_says_nothing_has_no_figures(tmp_path):
    rows, _ = written(tmp_path, [record("ds/crop1", **certificate("not assessable", margin=0.0))])
    assert rows["ds/crop1"]["registration"] == "not assessable"
    assert {rows["ds/crop1"][key] for key in ("shift", "scale", "margin")} == {""}


def test_keep_overrides_the_memory_budget_and_a_resolution_mismatch(tmp_path):
    records = [record("ds/crop1"), record("ds/crop2", **certificate("rescaled", scale=2))]
    rows, _ = written(tmp_path, records, max_train_gb=1e-9)
    assert all(row["cause"].startswith("too large for the memory budget: needs") for row in rows.values())
    rows, _ = written(tmp_path, records, keep=["ds/crop1"], max_train_gb=1e-9)
    assert rows["ds/crop1"]["cause"].startswith("kept by quality.keep in spite of: too large for the memory budget")
    rows, _ = written(tmp_path, records, keep=["ds/crop2"])
    assert rows["ds/crop2"]["cause"] == f"kept by quality.keep in spite of: {TWICE}"


@pytest.mark.parametrize("key", ["contradictions", "instances", "registration.scale", "kind"])
def test_a_record_of_an_older_version_is_refused_with_the_remedy(tmp_path, key):
    old = record("ds/crop1") if key != "kind" else failed("ds/crop1", "damaged")
    if key.startswith("registration"):
        old["registration"] = {name: value for name, value in IN_PLACE.items() if name != "scale"}
    else:
        del old[key]
    with pytest.raises(ContractError, match=rf"shard0\.json: the record of ds/crop1 has no '{key}'.*-R convert"):
        written(tmp_path, [old])


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
