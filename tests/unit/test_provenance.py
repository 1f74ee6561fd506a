"""What the page of provenance rests on: the code's commit, and comparisons that say in words what differs.

The chain itself is followed over the demo's results, tests/workflow/test_report.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from submission_case import segmentation, write_manifest

from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.evaluation.submission import pack
from cellmap_pipe.report.evidence import Evidence, anchor_of, collect, describe_code, git_state

A, B = "a" * 64, "b" * 64


@pytest.fixture
def repository(tmp_path):
    names = {f"GIT_{who}_{what}": "x@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def git(*arguments):
        command = ["git", "-C", str(tmp_path), *arguments]
        subprocess.run(command, check=True, timeout=30, capture_output=True, env={**os.environ, **names})

    git("init", "--quiet")
    (tmp_path / "workflow").mkdir()
    (tmp_path / "workflow/Snakefile").write_text("one\n")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    return tmp_path


def test_the_commit_is_named_and_changes_that_are_not_in_it(repository):
    clean = git_state(repository / "workflow")
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (repository / "workflow/Snakefile").write_text("two\n")
    assert git_state(repository / "workflow") == {"commit": clean["commit"], "dirty": True}


def test_code_that_git_does_not_hold_has_no_commit(repository, tmp_path_factory):
    environment = repository / "venv"
    environment.mkdir()
    (environment / "module.py").write_text("")
    assert git_state(environment) is None  # not the commit of the project that it only lies in
    assert git_state(tmp_path_factory.mktemp("plain")) is None
    assert git_state(repository / "absent") is None


def test_code_names_libraries_and_result_versions(tmp_path):
    code = describe_code(tmp_path)
    assert {"torch", "monai", "zarr", "snakemake", "numpy"} <= set(code["libraries"])
    assert code["result_versions"] == RESULT_VERSIONS and code["git"] is None


def test_comparisons_say_what_was_recorded_and_what_was_found():
    evidence = Evidence()
    evidence.compare("x-fold0", "weights", A, A)
    evidence.compare("x-fold0", "weights", A, B, "in model.pt")
    evidence.count("data", "files", ["one: missing"], 3)
    assert [check["agrees"] for check in evidence.checks] == [True, False, False]
    assert evidence.of("x-fold0")[1]["detail"] == f"recorded {A[:16]}, found {B[:16]}; in model.pt"
    assert evidence.of("data")[0]["detail"] == "2 of 3; the first fault: one: missing"


def test_a_file_is_described_by_its_digest(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    evidence = Evidence()
    assert evidence.sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert evidence.files[str(path)]["size"] == 3


def test_rows_of_the_scores_have_an_anchor():
    assert (anchor_of("unet_3d", "0"), anchor_of("ensemble", "mean")) == ("unet_3d-fold0", "ensemble-foldmean")


PACKED = "the segmentations that were packed are those that are there"


@pytest.fixture
def submitted(tmp_path):
    """What the rule reads of a submission by a network that was trained on all crops: nothing is scored."""

    def written(name, text):
        (tmp_path / name).write_text(text)
        return [str(tmp_path / name)]

    source = segmentation(tmp_path, [1])
    content = json.loads(source.read_text())
    made = {"processing": {}, "repair": False, "not_derived": {}, "fingerprint": A}
    content["records"] = [{**record, **made} for record in content["records"]]
    source.write_text(json.dumps(content))
    of_volume = {"name": "jrc_x/crop1", "status": "ok", "path": "v.zarr", "fingerprint": B}
    member = {"model": "unet_3d", "fold": "all", "subset": "test", "weights_sha256": A, "records": [of_volume]}
    mean = {**member, "model": "ensemble", "members": ["unet_3d/foldall"]}
    mean["records"] = [{**of_volume, "lattice": {}, "weights": {}}]
    pack(source, write_manifest(tmp_path / "manifest.csv", ["1"]), tmp_path / "s.zip", tmp_path / "report.json")
    return {
        **{kind: [] for kind in ("quality", "converted", "stores", "datalists", "metrics", "weights", "history")},
        **{kind: [] for kind in ("table", "scores")},
        "folds": written("folds.csv", "crop,fold\n"),
        "predictions": written("member.json", json.dumps(member)),
        "ensembles": written("mean.json", json.dumps(mean)),
        "segmentations": [str(source)],
        "submission": [str(tmp_path / "report.json")],
        "archive": [str(tmp_path / "s.zip")],
    }


def of_submission(submitted):
    return collect(submitted, {"segment": {"revision": 0, "repair": False}}, Path("none"))


def test_what_is_said_of_the_volumes_to_segment_stands_with_the_submission_and_names_its_source(submitted):
    content = of_submission(submitted)
    said = [check["what"] for check in content["checks"] if check["of"] == "submission"]
    assert {check["of"] for check in content["checks"]} == {"data", "submission"}
    assert {what.split(":")[0] for what in said if ":" in what} == {"test, unet_3d/foldall", "test, ensemble/foldall"}
    assert content["submission"]["member_predictions"] == submitted["predictions"]


def test_a_segmentation_that_was_made_anew_after_packing_is_noticed(submitted):
    def packed():
        return [check["agrees"] for check in of_submission(submitted)["checks"] if check["what"] == PACKED]

    assert packed() == [True]
    source = Path(submitted["segmentations"][0])
    source.write_text(source.read_text().replace(A, B))
    assert packed() == [False]
    report = Path(submitted["submission"][0])
    content = json.loads(report.read_text())
    del content["segmentations"]  # of an earlier version
    report.write_text(json.dumps(content))
    assert packed() == []
