import errno
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cellmap_pipe.cli import main
from cellmap_pipe.errors import DataError

MANIFEST = "crop_name,dataset,class_label,voxel_size,translation,shape\n7,jrc_x,ecs,[8;8;8],[4;4;4],[6;6;6]\n"


NUC = "7,jrc_x,nuc,[8;8;8],[4;4;4],[6;6;6]\n"


def write_answers(path: Path, mask: np.ndarray, label: str = "ecs", dtype: Any = np.uint8) -> Path:
    """Write crop7/{label} in the challenge's format."""
    root = zarr.open_group(path, mode="a", zarr_format=2)
    array = root.create_array(f"crop7/{label}", data=mask.astype(dtype), chunks=(6, 6, 6))
    array.attrs.update({"voxel_size": [8, 8, 8], "translation": [4, 4, 4], "shape": [6, 6, 6]})
    return path


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((6, 6, 6), bool)
    mask[:3] = True
    return mask


def test_scores_are_printed_and_written(tmp_path, mask, capsys):
    truth, answer = write_answers(tmp_path / "truth.zarr", mask), write_answers(tmp_path / "answer.zarr", mask)
    out = tmp_path / "scores.json"
    assert main(["score", str(answer), str(truth), "--workers", "1", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["label_scores"]["ecs"]["iou"] == 1.0
    printed = capsys.readouterr().out
    assert "ecs" in printed
    assert "1.0000" in printed


def test_both_rules_stand_side_by_side_and_where_they_differ(tmp_path, capsys):
    truth, answer = np.zeros((6, 6, 6), np.uint8), np.zeros((6, 6, 6), np.uint8)
    truth[3:6, 3:6, 3:6] = 2
    truth[0, 0, 1] = 1  # component 1 of the answer, unmatched, joins it by its number
    answer[0, 0, 0], answer[3:6, 3:6, 3:6] = 5, 6
    for name, values in (("truth", truth), ("answer", answer)):
        write_answers(tmp_path / f"{name}.zarr", values, "nuc")
    paths = [str(tmp_path / name) for name in ("answer.zarr", "truth.zarr")]
    assert main(["score", *paths, "--memory-gb", "0.5"]) == 0
    printed = capsys.readouterr()
    header, row = printed.out.splitlines()[:2]
    assert header.split() == ["label", "F1", "Hausdorff", "csc-2026.06", "clean"]
    assert row.split()[0] == "nuc" and row.split()[3] != row.split()[4]
    assert "counts otherwise in crop7/nuc" in printed.out
    assert "rules csc-2026.06" in printed.out and "may differ" in printed.out
    assert printed.err == ""  # no terminal, no progress bar
    assert main(["score", *paths, "--rules", "csc-2026.07"]) == 0
    assert "csc-2026.07 is provisional" in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_how_far_the_scoring_is(tmp_path, mask, monkeypatch):
    paths = [str(write_answers(tmp_path / name, mask)) for name in ("answer.zarr", "truth.zarr")]
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["score", *paths, "--workers", "1"]) == 0
    assert "0/1" in sys.stderr.getvalue() and "1/1" in sys.stderr.getvalue()


def test_labels_that_fail_are_named_and_the_status_says_so(tmp_path, mask, capsys):
    truth, answer = write_answers(tmp_path / "truth.zarr", mask), write_answers(tmp_path / "answer.zarr", mask)
    for name, values in (("truth", mask), ("answer", np.full(mask.shape, np.nan))):
        write_answers(tmp_path / f"{name}.zarr", values, "er", dtype=np.asarray(values).dtype)
    assert main(["score", str(answer), str(truth), "--workers", "1", "--out", str(tmp_path / "new/scores.json")]) == 1
    assert "FAILED crop7/er: prediction has values that are not finite" in capsys.readouterr().out
    assert json.loads((tmp_path / "new/scores.json").read_text())["label_scores"]["ecs"]["iou"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "answer.zarr", "truth.zarr", "--rules", "cleen"], "unknown version 'cleen'; did you mean 'clean'?"),
        (["score", "truth.zarr", "none.zarr"], "none.zarr: there is no such"),
        (["score", "answer.zarr", "volumes.csv"], "volumes.csv: is not a readable zip file"),
        (["validate", "answer.zarr", "--manifest", "none.csv"], "none.csv: the manifest cannot be read"),
        (
            ["validate", "answer.zarr", "--manifest", "volumes.csv", "--scores", "none.json"],
            "none.json: cannot be read",
        ),
        (["validate", "answer.zarr", "--manifest", "volumes.csv", "--scores", "x.json"], "holds no validation scores"),
        (["pack", "none.zarr", "--manifest", "volumes.csv", "--out", "s.zip"], "none.zarr"),
    ],
)
def test_what_cannot_be_used_is_one_line_with_its_path(tmp_path, monkeypatch, mask, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "volumes.csv").write_text(MANIFEST)
    (tmp_path / "x.json").write_text("{}")
    write_answers(tmp_path / "truth.zarr", mask)
    write_answers(tmp_path / "answer.zarr", mask)
    assert main([*arguments, "--workers", "1"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("ERROR ") and message in printed and printed.count("\n") == 1


@pytest.mark.parametrize("value", ["0", "-1", "inf", "much"])
def test_memory_that_cannot_be_is_refused(value, capsys):
    with pytest.raises(SystemExit):
        main(["score", "a", "b", "--memory-gb", value])
    assert "argument --memory-gb:" in capsys.readouterr().err


def test_a_complete_submission_is_ready_to_send(tmp_path, mask, capsys):
    (tmp_path / "volumes.csv").write_text(MANIFEST)
    answer = write_answers(tmp_path / "answer.zarr", mask)
    manifest = ["--manifest", str(tmp_path / "volumes.csv"), "--workers", "1"]
    assert main(["validate", str(answer), *manifest]) == 0
    printed = capsys.readouterr().out
    assert "ready to send" in printed and "overall" not in printed


def test_the_score_to_expect_is_printed_with_its_interval_and_what_counts_nothing(tmp_path, mask, capsys):
    (tmp_path / "volumes.csv").write_text(MANIFEST + NUC + NUC.replace("nuc", "er") + NUC.replace("nuc", "pm"))
    for label in ("nuc", "er", "ecs", "pm"):
        answer = write_answers(tmp_path / "answer.zarr", mask & (label != "er"), label)
    fold = {"model": "net", "fold": "0", "rules": "csc-2026.06"}
    for number in (0, 1):
        counts = {"crop": f"x/crop{number}", "tp": 4 + number, "fp": 1, "fn": 1, "status": "scored"}
        records = [{**counts, "label": "ecs"}, {**counts, "label": "er"}]
        records.append({**counts, "label": "nuc", "hausdorff_norm_sum": 3.0, "n_hausdorff": 6})
        content = {**fold, "records": records, "clean_records": [{**records[0], "fp": 0}]}
        (tmp_path / f"fold{number}.json").write_text(json.dumps(content))
    scores = ["--scores", *(str(tmp_path / f"fold{number}.json") for number in (0, 1))]
    manifest = ["--manifest", str(tmp_path / "volumes.csv"), "--workers", "1"]
    assert main(["validate", str(answer), *manifest, *scores]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("warning: crop7/er") for line in lines)
    (overall,) = (line.split() for line in lines if line.startswith("overall"))
    low, score, high = float(overall[2]), float(overall[1]), float(overall[4])
    assert 0 < low <= score <= high < 1
    (clean,) = (line.split() for line in lines if line.startswith("by clean"))
    assert float(clean[2]) > score
    assert "no voxel in the submission, counted as 0: er" in lines
    assert "not in the validation scores, counted as 0: pm" in lines
    assert "crops of net; rules csc-2026.06; the score" in lines[-1]
    assert main(["pack", str(answer), *manifest, *scores, "--out", str(tmp_path / "s.zip")]) == 0
    packed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in packed if line.startswith("overall")] == [overall]


def test_a_missing_array_is_a_problem(tmp_path, mask, capsys):
    (tmp_path / "volumes.csv").write_text(MANIFEST + NUC)
    answer = write_answers(tmp_path / "answer.zarr", mask)
    assert main(["validate", str(answer), "--manifest", str(tmp_path / "volumes.csv"), "--workers", "1"]) == 1
    assert "crop7/nuc" in capsys.readouterr().out


def test_segmentations_are_packed_and_checked(tmp_path, mask, capsys):
    (tmp_path / "volumes.csv").write_text(MANIFEST)
    volume = zarr.open_group(tmp_path / "segment" / "jrc_x_crop7.zarr", mode="w", zarr_format=2)
    array = volume.create_array("ecs/s0", data=mask.astype(np.uint8), chunks=(6, 6, 6))
    place = {"voxel_size": [8, 8, 8], "translation": [4, 4, 4], "shape": [6, 6, 6]}
    array.attrs.update(place)
    lattice = {"voxel_nm": [8, 8, 8], "translation_nm": [4, 4, 4], "shape": [6, 6, 6]}
    record = {
        "name": "jrc_x/crop7",
        "dataset": "jrc_x",
        "path": "segment/jrc_x_crop7.zarr",
        "target": lattice,
        "lattice": lattice,
        "classes": ["ecs"],
        "status": "ok",
        "cause": "",
    }
    (tmp_path / "test.json").write_text(json.dumps({"records": [record]}))
    paths = {"--manifest": tmp_path / "volumes.csv", "--out": tmp_path / "new/submission.zip"}
    options = [str(word) for option in paths.items() for word in option]
    assert main(["pack", str(tmp_path / "test.json"), *options, "--workers", "1"]) == 0
    assert "ready to send" in capsys.readouterr().out
    assert json.loads((tmp_path / "new/submission.json").read_text())["problems"] == []


def test_an_error_is_one_line_and_exit_status_2(tmp_path, capsys):
    assert main(["score", str(tmp_path / "nothing.zip"), str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("ERROR ")
    assert message.count("\n") == 1
    assert "nothing.zip" in message


def test_the_phantom_is_written_where_asked(tmp_path, capsys, monkeypatch):
    asked = {}

    def write_challenge(root: Path, *, seed: int, out_json: Path) -> None:
        asked.update(root=root, seed=seed, out_json=out_json)

    monkeypatch.setattr("cellmap_pipe.phantom.write_challenge", write_challenge)
    assert main(["phantom", str(tmp_path), "--seed", "3"]) == 0
    assert asked == {"root": tmp_path, "seed": 3, "out_json": tmp_path / "phantom.json"}
    assert str(tmp_path) in capsys.readouterr().out


def test_faults_of_the_library_are_not_hidden(tmp_path, monkeypatch):
    def broken(root: Path, **_: object) -> None:
        raise DataError("crop7:\n  broken")

    monkeypatch.setattr("cellmap_pipe.phantom.write_challenge", broken)
    assert main(["phantom", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--grid", "8", "8"], "--grid 8 8: give three voxel sizes"),
        (["--grid", "8", "8", "8", "--options", "{anon"], "is not JSON"),
        (["--grid", "native", "--options", "[1]"], "must be a JSON object"),
        (["--grid", "native"], "name nothing to fetch"),
        (["--grid", "native", "--classes", "nucc"], "unknown class 'nucc'; did you mean 'nuc'?"),
    ],
)
def test_what_is_wrong_with_a_fetch_is_said_before_it_begins(tmp_path, capsys, extra, message):
    assert main(["fetch", "--root", str(tmp_path / "data"), "--source", str(tmp_path), *extra]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--workers", "0"), ("--retries", "-1"), ("--workers", "many")])
def test_a_number_that_cannot_be_is_refused_with_its_option(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit):
        main(["fetch", "--root", str(tmp_path), "--grid", "native", option, value])
    assert f"argument {option}:" in capsys.readouterr().err


def test_an_interrupt_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(root: Path, **_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cellmap_pipe.phantom.write_challenge", interrupted)
    assert main(["phantom", str(tmp_path)]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def unreadable(path: Path) -> None:
    """Make a file one that cannot be read by anybody, root included: a link to itself."""
    path.unlink()
    path.symlink_to(path.name)


def test_a_file_that_cannot_be_read_costs_its_label_alone(tmp_path, mask, capfd):
    truth, answer = tmp_path / "truth.zarr", tmp_path / "answer.zarr"
    for path in (truth, answer):
        write_answers(path, mask)
        write_answers(path, mask, "pm")
    unreadable(answer / "crop7/pm/0.0.0")
    assert main(["score", str(answer), str(truth), "--workers", "1", "--out", str(tmp_path / "s.json")]) == 1
    printed = capfd.readouterr()
    assert "0.0.0: cannot be read" in printed.out and "1 of 2 labels scored" in printed.out
    assert "Traceback" not in printed.err
    (tmp_path / "m.csv").write_text(MANIFEST + MANIFEST.splitlines()[1].replace("ecs", "pm") + "\n")
    arguments = ["--manifest", str(tmp_path / "m.csv"), "--workers", "1"]
    assert main(["validate", str(answer), *arguments]) == 1
    printed = capfd.readouterr()
    assert "problem: crop7/pm: " in printed.out and "crop7/ecs" not in printed.out
    assert "Traceback" not in printed.err
    assert main(["pack", str(answer), *arguments, "--out", str(tmp_path / "s.zip")]) == 2
    assert "0.0.0: cannot be read" in capfd.readouterr().err
    assert not (tmp_path / "s.zip").exists()


@pytest.mark.parametrize("command", ["score", "pack"])
def test_what_cannot_be_written_is_said_before_the_work(tmp_path, mask, monkeypatch, capsys, command):
    from cellmap_pipe.evaluation import official, submission

    def worked(*_: Any, **__: Any) -> None:
        raise AssertionError("began to work")

    monkeypatch.setattr(official, "score_submission", worked)
    monkeypatch.setattr(submission, "pack", worked)
    (tmp_path / "file").write_text("")
    (tmp_path / "m.csv").write_text(MANIFEST)
    answer = str(write_answers(tmp_path / "answer.zarr", mask))
    other = [answer] if command == "score" else ["--manifest", str(tmp_path / "m.csv")]
    for out, message in ((tmp_path, "is a folder"), (tmp_path / "file/out.x", "cannot be written")):
        assert main([command, answer, *other, "--out", str(out)]) == 2
        printed = capsys.readouterr().err
        assert f"{out}: {message}" in printed and printed.count("\n") == 1


def test_a_full_disk_is_named_and_the_scores_are_shown(tmp_path, mask, monkeypatch, capsys):
    def full(path: Path, _: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cellmap_pipe.cli.write_json", full)
    answer, out = str(write_answers(tmp_path / "answer.zarr", mask)), tmp_path / "s.json"
    assert main(["score", answer, answer, "--workers", "1", "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert f"{out}: cannot be written (No space left on device); make room there" in printed.err
    assert "overall" in printed.out


def test_rows_without_a_prediction_are_counted(tmp_path, mask, capsys):
    (tmp_path / "m.csv").write_text(MANIFEST + NUC)
    answer = str(write_answers(tmp_path / "answer.zarr", mask))
    assert main(["pack", answer, "--manifest", str(tmp_path / "m.csv"), "--out", str(tmp_path / "s.zip")]) == 0
    assert "1 of 2 rows were not predicted, and are zeros: crop7/nuc" in capsys.readouterr().out
