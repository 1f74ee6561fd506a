import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation import aggregate, missing_label
from cellmap_pipe.evaluation.bootstrap import bootstrap
from cellmap_pipe.evaluation.container import open_container
from cellmap_pipe.evaluation.official import (
    LabelTask,
    differing,
    score_submission,
    score_table,
    task_bytes,
)
from cellmap_pipe.evaluation.tasks import run_tasks

_spec = importlib.util.spec_from_file_location("scoring_reference", Path(__file__).with_name("scoring_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

VOXEL = (8.0, 8.0, 8.0)
TRANSLATION = (100.0, 200.5, 300.0)


def write(root, name, values, chunks=(8, 8, 8), **attributes):
    array = zarr.create_array(
        root / name, shape=values.shape, chunks=chunks, dtype=values.dtype, zarr_format=2, fill_value=0
    )
    array[:] = values
    array.attrs.update({"voxel_size": list(VOXEL), "translation": list(TRANSLATION), **attributes})


@pytest.fixture
def volumes(tmp_path):
    """Truth with two crops of mito and er, and a submission that is a shifted copy of it, without crop2/er."""
    rng = np.random.default_rng(0)
    for crop in ("crop1", "crop2"):
        mito = np.zeros((20, 20, 20), np.uint16)
        for i, start in enumerate(rng.integers(0, 14, (3, 3)), start=1):
            mito[tuple(slice(s, s + 5) for s in start)] = i
        er = (rng.random((20, 20, 20)) > 0.7).astype(np.uint8)
        for label, values in (("mito", mito), ("er", er)):
            write(tmp_path / "truth.zarr", f"{crop}/{label}", values)
            if (crop, label) != ("crop2", "er"):
                write(tmp_path / "submission.zarr", f"{crop}/{label}", np.roll(values, 1, 0))
    return tmp_path


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path


def random_records(rng, crops, labels):
    records = {}
    for crop in range(crops):
        for label in labels:
            if rng.random() < 0.3:
                continue
            record = {key: int(rng.integers(0, 4)) for key in ("tp", "fp", "fn")} | {"status": "scored"}
            if label in ("mito", "nuc"):
                n = sum(record[key] for key in ("tp", "fp", "fn"))
                record |= {"n_hausdorff": n, "hausdorff_norm_sum": float(n * rng.random())}
            records.setdefault(f"crop{crop}", {})[label] = record | {"is_missing": bool(rng.random() < 0.2)}
    return records


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_aggregate_equals_the_reference_in_either_form(seed):
    rng = np.random.default_rng(seed)
    records = random_records(rng, rng.integers(0, 4), ["mito", "nuc", "er", "pm"])
    scores, instance, semantic, overall = reference.overall(records)
    flat = [{"crop": c, "label": n, **record} for c, labels in records.items() for n, record in labels.items()]
    for result in (aggregate(records), aggregate(flat)):
        found = {n: s.get("iou", s.get("combined_score")) for n, s in result["label_scores"].items()}
        assert found == pytest.approx(scores)
        assert result["overall_instance_score"] == pytest.approx(instance)
        assert result["overall_semantic_score"] == pytest.approx(semantic)
        assert result["overall_score"] == pytest.approx(overall)
    found = {c: {n: r for n, r in labels.items() if not r["is_missing"]} for c, labels in records.items()}
    assert aggregate(records, include_missing=False)["overall_score"] == pytest.approx(reference.overall(found)[3])


def test_classes_that_are_empty_everywhere_are_perfect():
    nothing = {"tp": 0, "fp": 0, "fn": 0, "status": "scored"}
    pooled = {"mito": {**nothing, "hausdorff_norm_sum": 0.0, "n_hausdorff": 0}, "er": nothing}
    assert aggregate({"crop1": pooled})["overall_score"] == 1.0
    assert aggregate({})["overall_score"] == 0.0


def test_a_missing_semantic_label_misses_every_voxel_and_an_instance_label_every_object():
    truth = np.zeros((4, 4, 4), np.uint8)
    assert missing_label(truth, "er")["fn"] == 64
    truth[0, 0, 0], truth[3, 3, 3] = 5, 9
    record = missing_label(truth, "mito")
    assert (record["fn"], record["n_hausdorff"], record["hausdorff_norm_sum"]) == (2, 2, 0.0)
    assert record["is_missing"] and record["status"] == "missing"


def test_zip_folder_and_segmentation_json_score_alike(volumes):
    submission, truth = volumes / "submission.zarr", volumes / "truth.zarr"
    result = score_submission(submission, truth, workers=2)
    assert result["records"]["crop2"]["er"]["status"] == "missing"
    assert (result["total_evals"], result["failed"]) == (4, [])
    nested = volumes / "nested.zip"
    with zipfile.ZipFile(nested, "w") as archive:
        for file in sorted(submission.rglob("*")):
            if file.is_file():
                archive.write(file, Path("outer") / "my.zarr" / file.relative_to(submission))
    records = [
        {"name": f"jrc_x/{crop}", "dataset": "jrc_x", "path": f"volumes/{crop}.zarr", "status": "ok"}
        for crop in ("crop1", "crop2")
    ]
    for array in submission.glob("crop*/*"):  # ours lie in groups of their own
        shutil.copytree(array, volumes / "volumes" / f"{array.parent.name}.zarr" / array.name / "s0")
    (volumes / "test.json").write_text(json.dumps({"records": records}))
    for other in (zipped(submission, volumes / "s.zip"), nested, volumes / "test.json"):
        again = score_submission(other, truth)
        assert again["records"] == result["records"]
        assert again["overall_score"] == result["overall_score"]
    assert "er" in score_table(result) and "csc-2026.06" in score_table(result)


def test_crop_folders_may_lack_the_word_crop(volumes):
    expected = score_submission(volumes / "submission.zarr", volumes / "truth.zarr")["records"]
    for crop in ("1", "2"):
        (volumes / "submission.zarr" / f"crop{crop}").rename(volumes / "submission.zarr" / crop)
    assert score_submission(volumes / "submission.zarr", volumes / "truth.zarr")["records"] == expected


def test_one_damaged_chunk_fails_its_label_alone(volumes):
    chunk = volumes / "submission.zarr" / "crop1" / "er" / "0.0.0"
    chunk = chunk if chunk.is_file() else volumes / "submission.zarr" / "crop1" / "er" / "0" / "0" / "0"
    chunk.write_bytes(b"not a chunk")
    result = score_submission(volumes / "submission.zarr", volumes / "truth.zarr")
    assert len(result["failed"]) == 1
    assert "crop1/er" in result["failed"][0] and "damaged chunk" in result["failed"][0]
    assert result["records"]["crop1"]["mito"]["status"] == "scored"
    assert result["num_evals_done"] == 3


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        (np.zeros((20, 20), np.uint8), "three axes"),
        (np.full((20, 20, 20), np.nan, np.float32), "not finite"),
        (np.zeros((400, 400, 400), np.uint8), "4096"),
    ],
)
def test_bad_arrays_fail_by_name_and_the_others_count(volumes, values, fault):
    shutil.rmtree(volumes / "submission.zarr" / "crop1" / "mito")
    voxel = {"voxel_size": [0.4] * 3} if values.size > 10**6 else {}
    write(volumes / "submission.zarr", "crop1/mito", values, chunks=values.shape, **voxel)
    result = score_submission(volumes / "submission.zarr", volumes / "truth.zarr")
    assert len(result["failed"]) == 1 and result["failed"][0].startswith("crop1/mito")
    assert fault in result["failed"][0]


def test_masks_multiply_both_and_are_classes_only_officially(volumes):
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[:10] = 1
    write(volumes / "truth.zarr", "crop1/er_mask", mask)
    official = score_submission(volumes / "submission.zarr", volumes / "truth.zarr")
    clean = score_submission(volumes / "submission.zarr", volumes / "truth.zarr", rules="clean")
    assert official["records"]["crop1"]["er_mask"]["status"] == "missing"
    assert "er_mask" not in clean["records"]["crop1"]
    record = clean["records"]["crop1"]["er"]
    truth = zarr.open_array(volumes / "truth.zarr" / "crop1" / "er", mode="r")[:]
    assert record["tp"] + record["fn"] == np.count_nonzero(truth[:10])
    assert differing(official["records"], clean["records"])[-1:] != []


def test_provisional_rules_say_so(volumes):
    result = score_submission(volumes / "submission.zarr", volumes / "truth.zarr", rules="csc-2026.07")
    assert result["provisional"] and "provisional" in score_table(result)


def test_unusable_paths_are_refused(volumes):
    with pytest.raises(DataError, match="no such submission"):
        score_submission(volumes / "absent.zip", volumes / "truth.zarr")
    (volumes / "bad.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="not a readable zip"):
        score_submission(volumes / "bad.zip", volumes / "truth.zarr")
    write(volumes / "other.zarr", "crop77/mito", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(DataError, match="crop77"):
        score_submission(volumes / "other.zarr", volumes / "truth.zarr")


def test_bootstrap_interval_holds_the_score():
    records = random_records(np.random.default_rng(4), 12, ["mito", "nuc", "er", "pm"])
    flat = [{"crop": c, "label": n, **record} for c, labels in records.items() for n, record in labels.items()]
    interval = bootstrap(flat, n=300)
    assert interval == bootstrap(flat, n=300)
    assert interval["score"] == aggregate(flat)["overall_score"]
    assert 0 <= interval["low"] < interval["score"] < interval["high"] <= 1
    assert bootstrap([])["crops"] == 0


def test_larger_and_resampled_predictions_need_more_memory(volumes):
    task = LabelTask("", "", "crop1", "crop1", "er", "clean")
    truths, answers = (open_container(volumes / name) for name in ("truth.zarr", "submission.zarr"))
    assert task_bytes(truths, answers, task) == 12 * 20**3
    shutil.rmtree(volumes / "submission.zarr/crop1/er")
    write(volumes / "submission.zarr", "crop1/er", np.zeros((40, 40, 40), np.uint8), voxel_size=[4.0, 4.0, 4.0])
    assert task_bytes(truths, answers, task) == (12 + 16) * 40**3


def square(x):
    return x * x


@pytest.mark.parametrize("workers", [1, 3])
def test_tasks_larger_than_the_budget_run_all_the_same(workers):
    done = dict(run_tasks(square, [1, 2, 3, 4], [10, 10**12, 5, 10**12], workers, memory_gb=1e-8))
    assert done == {1: 1, 2: 4, 3: 9, 4: 16}


def test_evaluation_is_imported_without_torch_or_matplotlib():
    code = (
        "import sys, cellmap_pipe.evaluation, cellmap_pipe.evaluation.crops, cellmap_pipe.evaluation.submission; "
        "sys.exit(bool({'torch', 'matplotlib', 'monai'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
