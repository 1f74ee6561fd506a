import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from cellmap_pipe.cli import main
from cellmap_pipe.errors import DataError

MANIFEST = "crop_name,dataset,class_label,voxel_size,translation,shape\n7,jrc_x,ecs,[8;8;8],[4;4;4],[6;6;6]\n"


def write_answers(path: Path, mask: np.ndarray) -> Path:
    """Write crop7/ecs in the challenge's format."""
    root = zarr.open_group(path, mode="w", zarr_format=2)
    array = root.create_array("crop7/ecs", data=mask.astype(np.uint8), chunks=(6, 6, 6))
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


def test_a_complete_submission_is_ready_to_send(tmp_path, mask, capsys):
    (tmp_path / "volumes.csv").write_text(MANIFEST)
    answer = write_answers(tmp_path / "answer.zarr", mask)
    assert main(["validate", str(answer), str(tmp_path / "volumes.csv"), "--workers", "1"]) == 0
    assert "ready to send" in capsys.readouterr().out


def test_a_missing_array_is_a_problem(tmp_path, mask, capsys):
    (tmp_path / "volumes.csv").write_text(MANIFEST + "7,jrc_x,nuc,[8;8;8],[4;4;4],[6;6;6]\n")
    answer = write_answers(tmp_path / "answer.zarr", mask)
    assert main(["validate", str(answer), str(tmp_path / "volumes.csv"), "--workers", "1"]) == 1
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
    paths = [str(tmp_path / name) for name in ("test.json", "volumes.csv", "submission.zip")]
    assert main(["pack", *paths, "--workers", "1"]) == 0
    assert "ready to send" in capsys.readouterr().out
    assert json.loads((tmp_path / "submission.json").read_text())["problems"] == []


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
