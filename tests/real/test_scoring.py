"""The official evaluator's own numbers, on small volumes: counts exact, floats to 1e-6."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import zarr

from cellmap_pipe.evaluation import aggregate, match_geometry, missing_label, score_instance, score_semantic
from cellmap_pipe.evaluation.alignment import align
from cellmap_pipe.evaluation.container import open_container
from cellmap_pipe.evaluation.manifest import read_manifest
from cellmap_pipe.evaluation.official import score_submission

DATA = Path(__file__).parents[3] / "shared" / "data"
CASES = DATA / "scoring"
MANIFEST = DATA / "manifests" / "test_crop_manifest.csv"

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"the golden scoring cases {CASES} are not here")


def expected(folder=CASES):
    path = folder / "expected.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def assert_same(found, wanted, where=""):
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(wanted, float):
        assert math.isclose(found, wanted, rel_tol=1e-6), (where, found, wanted)
    else:
        assert found == wanted, where


@pytest.mark.parametrize("name", expected())
def test_record_is_the_official_one(name):
    case, arrays = expected()[name], np.load(CASES / f"{name}.npz")
    mask = arrays.get("mask", None)
    if case["kind"] == "instance":
        record = score_instance(arrays["pred"], arrays["truth"], case["voxel_size"], mask)
    else:
        record = score_semantic(arrays["pred"], arrays["truth"], mask)
    added = {"num_voxels", "voxel_size", "is_missing"}  # by the caller
    assert set(record) == set(case["expected"]) - added
    assert_same(record, {key: value for key, value in case["expected"].items() if key not in added})


@pytest.mark.parametrize("name", expected(CASES / "alignment"))
def test_alignment_is_the_official_one(name, tmp_path):
    case, arrays = expected(CASES / "alignment")[name], np.load(CASES / "alignment" / f"{name}.npz")
    names = ("label", "pred_voxel_size", "pred_translation", "voxel_size", "shape", "translation")
    target = [case[key] for key in names]
    result = match_geometry(arrays["pred"], *target)
    assert result.dtype == case["expected_dtype"]
    assert np.array_equal(result, arrays["expected"])
    zarr.create_array(tmp_path / "p.zarr/crop1/x", data=arrays["pred"], chunks=(16,) * 3, zarr_format=2)
    streamed = align(open_container(tmp_path / "p.zarr").array("crop1", "x"), *target)
    planes = [streamed[z : z + 7] for z in range(0, case["shape"][0], 7)]
    assert np.array_equal(np.concatenate(planes), arrays["expected"])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("memory_gb", [None, 1e-6])
def test_submission_scores_are_the_official_ones(workers, memory_gb):
    folder = CASES / "submission"
    wanted = expected(folder)
    truth = folder / "truth.zarr"
    result = score_submission(folder / "submission.zarr", truth, workers=workers, memory_gb=memory_gb)
    own = {"total_evals", "git_version"}
    assert_same(result, {key: value for key, value in wanted["public"].items() if key not in own})
    crops = {key: value for key, value in wanted["extended"].items() if key.startswith("crop")}
    assert_same(result["records"], crops)
    assert result["rules"] == "csc-2026.06" and "may differ" in result["note"]


def test_aggregate_of_the_official_records_is_the_official_one():
    wanted = expected(CASES / "submission")
    total = aggregate(wanted["extended"])
    assert_same(total["label_scores"], wanted["extended"]["label_scores"])
    assert_same(total["overall_score"], wanted["public"]["overall_score"])


def test_missing_labels_are_the_official_ones():
    truth = open_container(CASES / "submission" / "truth.zarr")
    for label, wanted in expected(CASES / "submission")["extended"]["crop903"].items():
        record = missing_label(truth.array("crop903", label), label)
        assert_same(record, {key: value for key, value in wanted.items() if key != "voxel_size"})


@pytest.mark.skipif(not MANIFEST.is_file(), reason=f"the challenge's manifest {MANIFEST} is not here")
def test_the_challenge_manifest_is_read_completely():
    rows = read_manifest(MANIFEST)
    assert len(rows) == 413
    assert len({row.crop for row in rows}) == 16
    assert sum(row.lattice.voxels for row in rows) == pytest.approx(8.77e10, rel=1e-3)
