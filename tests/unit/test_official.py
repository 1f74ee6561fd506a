"""Submissions against their truth: both rules at once, in parallel, within a memory budget."""

import json
import math
import os
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr

sys.path.insert(0, str(Path(__file__).parent))
from submission_case import zipped

from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation import aggregate, official
from cellmap_pipe.evaluation.container import open_container
from cellmap_pipe.evaluation.official import (
    LabelTask,
    clean_of,
    differing,
    public_result,
    score_submission,
    score_table,
    task_bytes,
)
from cellmap_pipe.evaluation.tasks import budget_bytes, run_tasks
from cellmap_pipe.files import read_json, write_json

VOXEL = (8.0, 8.0, 8.0)
TRANSLATION = (100.0, 200.5, 300.0)
V2 = {"zarr_format": 2, "fill_value": 0}


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
    for other in (zipped(submission), nested, volumes / "test.json"):
        again = score_submission(other, truth)
        assert again["records"] == result["records"]
        assert again["overall_score"] == result["overall_score"]
    assert "er" in score_table(result) and "csc-2026.06" in score_table(result)


def test_groups_and_zarr_v3_in_a_submission_are_missing_and_said_to_be_there(volumes):
    root = volumes / "submission.zarr"
    (root / "crop1/er").rename(root / "s0")
    (root / "crop1/er").mkdir()
    (root / "s0").rename(root / "crop1/er/s0")
    shutil.rmtree(root / "crop1/mito")
    zarr.create_array(root / "crop1/mito", data=np.ones((20, 20, 20), np.uint8), zarr_format=3)
    result = score_submission(root, volumes / "truth.zarr")
    assert {record["status"] for record in result["records"]["crop1"].values()} == {"missing"}
    first, second = result["warnings"]
    assert "crop1/er is a group (s0), and counts as missing" in first
    assert "crop1/mito is zarr v3, and counts as missing" in second
    assert first in score_table(result)


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


def test_geometry_that_cannot_be_compared_fails_its_label_by_name(volumes):
    shutil.rmtree(volumes / "submission.zarr/crop1")
    write(volumes / "submission.zarr", "crop1/er", np.zeros((4, 4), np.uint8), chunks=(4, 4), voxel_size=[4, 4, 4])
    write(volumes / "submission.zarr", "crop1/mito", np.zeros((4, 4, 4), np.uint8), voxel_size=[4, 4])
    attributes = {"voxel_size": [8, 8], "translation": TRANSLATION}
    (volumes / "truth.zarr/crop2/mito/.zattrs").write_text(json.dumps(attributes))
    failed = score_submission(volumes / "submission.zarr", volumes / "truth.zarr", workers=2)["failed"]
    assert [line.split(": ")[0] for line in failed] == ["crop1/er", "crop1/mito", "crop2/mito"]
    for line, cause in zip(failed, ["three axes", "of the prediction is [4.0, 4.0]", "of the target"], strict=True):
        assert cause in line and "Error" not in line


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


def test_resampled_predictions_need_more_memory_and_streamed_ones_no_more_than_their_slabs(volumes, tmp_path):
    task = LabelTask("", "", "crop1", "crop1", "er", "clean", 0)
    truths, answers = (open_container(volumes / name) for name in ("truth.zarr", "submission.zarr"))
    in_place = task_bytes(truths, answers, task)
    shutil.rmtree(volumes / "submission.zarr/crop1/er")
    write(volumes / "submission.zarr", "crop1/er", np.zeros((40, 40, 40), np.uint8), voxel_size=[4.0, 4.0, 4.0])
    assert task_bytes(truths, answers, task) > in_place + 16 * 40**3
    for root in ("truth.zarr", "submission.zarr"):  # no chunk is stored
        large = zarr.create_array(volumes / root / "crop1/pm", shape=[2000] * 3, chunks=[64] * 3, dtype="uint8", **V2)
        large.attrs["voxel_size"] = VOXEL
    truths, answers = (open_container(volumes / name) for name in ("truth.zarr", "submission.zarr"))
    assert task_bytes(truths, answers, LabelTask("", "", "crop1", "crop1", "pm", "clean", 0)) < 1.5e9


def square(x):
    return x * x


@pytest.mark.parametrize("workers", [1, 3])
def test_tasks_larger_than_the_budget_run_all_the_same(workers):
    done = dict(run_tasks(square, [1, 2, 3, 4], [10, 10**12, 5, 10**12], workers, memory_gb=1e-8))
    assert done == {1: 1, 2: 4, 3: 9, 4: 16}


def test_both_rules_are_those_of_each_alone(volumes):
    shutil.rmtree(volumes / "submission.zarr/crop1")
    rng = np.random.default_rng(1)
    for label, values in (
        ("mito", rng.integers(0, 3, (21, 20, 19)).astype(np.uint16)),
        ("er", rng.random((20, 9, 20))),
    ):
        # off the grid of voxels and one voxel above: the evaluator moves it too little
        write(volumes / "submission.zarr", f"crop1/{label}", values, translation=[108.0, 200.5, 308.0])
    paths = volumes / "submission.zarr", volumes / "truth.zarr"
    both, clean = score_submission(*paths), score_submission(*paths, rules="clean")
    assert clean_of(both) == clean["records"] == clean_of(clean)
    assert both["clean"] == public_result(clean["records"]) == clean["clean"]
    assert both["differs"] == differing(both["records"], clean["records"]) == ["crop1/er", "crop1/mito"]
    assert both["clean_records"] == {"crop1": clean["records"]["crop1"]}
    assert (clean["differs"], clean["clean_records"]) == ([], {})
    printed = score_table(both)
    assert "counts otherwise in crop1/er, crop1/mito" in printed and printed.splitlines()[0].endswith("clean")
    assert "otherwise" not in score_table(clean)


def test_every_aggregate_can_be_recomputed_from_the_file(volumes):
    write_json(volumes / "scores.json", score_submission(volumes / "submission.zarr", volumes / "truth.zarr"))
    result = read_json(volumes / "scores.json")
    assert public_result(result["records"]).items() <= result.items()
    assert aggregate(result["records"], include_missing=False) == result["submitted_only"]
    assert public_result(clean_of(result)) == result["clean"]
    counts = {"tp", "fp", "fn", "status", "is_missing", "num_voxels", "voxel_size"}
    assert set(result["records"]["crop1"]["er"]) == counts
    assert set(result["records"]["crop1"]["mito"]) == counts | {"hausdorff_norm_sum", "n_hausdorff"}


@pytest.mark.parametrize("rules", ["csc-2026.06", "clean", "csc-2026.07", "csc-2026.07-exponential"])
def test_no_result_holds_a_number_that_is_not_json(volumes, rules):
    for crop in ("crop1", "crop2"):
        array = zarr.open_array(volumes / "truth.zarr" / crop / "mito", mode="r+")
        array[:] = 0
    result = score_submission(volumes / "submission.zarr", volumes / "truth.zarr", rules=rules)
    json.dumps(result, allow_nan=False)
    assert all(math.isfinite(score) for score in (result["overall_score"], result["clean"]["overall_score"]))


@pytest.mark.parametrize("workers", [1, 2])
def test_no_score_depends_on_the_memory_it_is_given(volumes, workers):
    paths = volumes / "submission.zarr", volumes / "truth.zarr"
    little = score_submission(*paths, workers=workers, memory_gb=1e-6)
    assert little["records"] == score_submission(*paths)["records"]
    assert little["failed"] == []


def killed(task):
    if task.label == "mito" and task.crop == "crop1":
        os.kill(os.getpid(), signal.SIGKILL)
    return official._score_label(task)


def out_of_memory(task):
    if task.label == "mito" and task.crop == "crop1":
        raise MemoryError
    return official._score_label(task)


@pytest.mark.parametrize(("function", "workers"), [(killed, 2), (out_of_memory, 2), (out_of_memory, 1)])
def test_a_label_for_which_memory_does_not_suffice_fails_alone(volumes, monkeypatch, function, workers):
    paths = volumes / "submission.zarr", volumes / "truth.zarr"
    expected = score_submission(*paths)
    monkeypatch.setattr(official, "score_task", function)
    result = score_submission(*paths, workers=workers)
    (line,) = result["failed"]
    assert line.startswith("crop1/mito: ") and "--memory-gb" in line and "--workers" in line
    for crop, label in (("crop1", "er"), ("crop2", "mito"), ("crop2", "er")):
        assert result["records"][crop][label] == expected["records"][crop][label]
    assert result["clean_records"] == {}


def killed_once(path):
    if path.name == "c" and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name


def test_tasks_beside_one_that_was_killed_run_again(tmp_path):
    paths = [tmp_path / name for name in "abcde"]
    done = dict(run_tasks(killed_once, paths, [1] * 5, 2))
    assert done == {path: path.name for path in paths}
    with pytest.raises(DataError, match="--workers"):
        list(run_tasks(killed, [LabelTask("", "", "crop1", None, "mito", "clean", 0)] * 2, [1, 1], 2))


def test_the_budget_is_what_is_given_or_a_part_of_what_is_free():
    assert budget_bytes(2.5) == 2_500_000_000
    assert budget_bytes(None) > 0


@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        ("groups", "crop1/er holds .zattrs, .zgroup, s0: write one plain array for each label"),
        ("v3", "crop1/er is zarr v3: write it with zarr_format=2"),
        ("empty", "holds no arrays"),
    ],
)
def test_a_truth_without_arrays_says_what_it_holds_instead(volumes, layout, fault):
    truth = volumes / "other.zarr"
    if layout == "groups":
        group = zarr.open_group(truth / "crop1/er", mode="w", zarr_format=2)
        group.create_array("s0", shape=(4, 4, 4), dtype="uint8")
        group.attrs["multiscales"] = []
    elif layout == "v3":
        zarr.create_array(truth / "crop1/er", shape=(4, 4, 4), dtype="uint8", zarr_format=3)
    else:
        (truth / "crop1").mkdir(parents=True)
        (truth / "crop1/.zgroup").write_text("{}")
    with pytest.raises(DataError) as error:
        score_submission(volumes / "submission.zarr", truth)
    assert fault in str(error.value) and "other.zarr" in str(error.value)


def test_what_is_assumed_about_the_truth_is_said(volumes):
    group = zarr.open_group(volumes / "truth.zarr/crop1/nuc", mode="w", zarr_format=2)
    group.create_array("s0", shape=(4, 4, 4), dtype="uint8")
    for label, attributes in (("er", {"voxel_size": VOXEL}), ("mito", {"translation": TRANSLATION})):
        (volumes / f"truth.zarr/crop1/{label}/.zattrs").write_text(json.dumps(attributes))
    result = score_submission(volumes / "submission.zarr", volumes / "truth.zarr")
    first, second = result["warnings"]
    assert "crop1/nuc is a group" in first and "crop1/er has no translation; 0 nm is assumed" in second
    (line,) = result["failed"]
    assert line.startswith("crop1/mito: ") and "has no voxel_size" in line
    assert "WARNING" in score_table(result) and "FAILED crop1/mito" in score_table(result)


def test_a_mask_of_another_shape_is_named(volumes):
    write(volumes / "truth.zarr", "crop1/er_mask", np.ones((3, 3, 3), np.uint8))
    result = score_submission(volumes / "submission.zarr", volumes / "truth.zarr")
    (line,) = result["failed"]
    assert line.startswith("crop1/er: mask has shape")
