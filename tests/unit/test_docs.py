"""What the documentation names exists: linked files, configuration keys, targets of the workflow."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr

from cellmap_pipe.cli import main
from cellmap_pipe.evaluation.rules import RULES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = yaml.safe_load((ROOT / "config/config.yaml").read_text())


def keys(section, prefix=""):
    for name, value in section.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_configuration_keys_exist(page):
    named = re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)`", page.read_text())
    of_config = [key for key in named if key.split(".")[0] in SECTIONS]
    assert set(of_config) <= set(keys(SECTIONS))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_configuration_files_exist(page):
    paths = re.findall(r"`((?:config|profiles|workflow|src)/[\w./+-]+)`", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


SCORING = (ROOT / "docs" / "scoring.md").read_text()
EVALUATION = ROOT / "src" / "cellmap_pipe" / "evaluation"


def literals(node: ast.expr) -> Iterator[str]:
    """Yield the texts that an expression can be."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from (*literals(node.body), *literals(node.orelse))


def faults_of(module: Path) -> set[str]:
    """Return the names of faults that a module of the evaluation gives."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        match node:
            case ast.Call(func=ast.Name(id="Problem" | "SubmissionError"), args=[_, name, *_]):
                names |= set(literals(name))
            case ast.Call(func=ast.Attribute(attr="setdefault"), args=[name, ast.List()]):
                names |= set(literals(name))
            case ast.Assign(targets=[ast.Name(id="fault")], value=value):
                names |= set(literals(value))
    return names


def test_every_fault_of_the_flight_check_is_explained_and_no_other():
    found = set().union(*map(faults_of, EVALUATION.glob("*.py"))) | {"unreadable submission"}
    tables = SCORING.split("## Flight check")[1]
    rows = [line for line in tables.splitlines() if line.startswith("| `")]
    explained = {name for row in rows for name in re.findall("`([^`]+)`", row.split("|")[1])}
    assert explained == found
    assert len(found) >= 50


def test_every_version_of_the_rules_is_explained():
    assert [name for name in RULES if f"| `{name}` |" not in SCORING] == []


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def write_array(root: zarr.Group, name: str, values: np.ndarray) -> None:
    array = root.create_array(name, data=values, chunks=values.shape)
    array.attrs.update({"voxel_size": [8.0] * 3, "translation": [4.0] * 3, "shape": list(values.shape)})


@pytest.fixture
def participant(tmp_path, monkeypatch):
    """A working directory with predictions, their truth, the table of volumes and validation scores."""
    monkeypatch.chdir(tmp_path)
    truth = zarr.open_group(tmp_path / "truth.zarr", mode="w", zarr_format=2)
    predictions = zarr.open_group(tmp_path / "predictions.zarr", mode="w", zarr_format=2)
    rows = ["crop_name,dataset,class_label,voxel_size,translation,shape"]
    for number in (1, 2):
        objects = np.zeros((8, 9, 10), np.uint16)
        objects[1:4, 2:5, 2:5], objects[5:7, 2:5, 6:9] = 1, 2
        for label, values in (("mito", objects), ("pm", (objects > 0).astype(np.uint8))):
            write_array(truth, f"crop{number}/{label}", values)
            write_array(predictions, f"crop{number}/{label}", np.where(objects == number, 0, values))
            rows.append(f"{number},jrc_x,{label},[8;8;8],[4;4;4],[8;9;10]")
    (tmp_path / "test_crop_manifest.csv").write_text("\n".join(rows) + "\n")
    record = {"crop": "jrc_x/crop9", "label": "pm", "status": "scored", "tp": 3, "fp": 1, "fn": 1}
    folder = tmp_path / "results/scores/ensemble"
    folder.mkdir(parents=True)
    content = {"model": "ensemble", "fold": "0", "rules": "csc-2026.06", "records": [record], "clean_records": []}
    (folder / "fold0.json").write_text(json.dumps(content))
    return tmp_path


def command(line: str) -> list[str]:
    """Return the arguments of a command line as a shell would give them."""
    words = shlex.split(line, comments=True)
    return [path for word in words for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]


def test_the_examples_can_be_run_as_they_stand(participant, capsys):
    lines = [line for block in blocks(SCORING, "") for line in block.splitlines() if line.startswith("cellmap-pipe ")]
    assert {line.split()[1] for line in lines} == {"score", "validate", "pack"}
    for line in lines:
        assert main(command(line)[1:]) == 0, (line, capsys.readouterr())
    printed = capsys.readouterr().out
    assert "csc-2026.07" in printed and "ready to send" in printed
    given = {"np": np, "prediction": np.ones((4, 5, 6), np.uint8), "truth": np.ones((4, 5, 6), np.uint8)}
    for block in blocks(SCORING, "python"):
        exec(compile(block, "docs/scoring.md", "exec"), given)
    result = json.loads((participant / "scores.json").read_text())
    assert given["aggregate"](result["records"])["overall_score"] == result["overall_score"] > 0


def test_the_command_lines_of_the_readme_are_those_of_the_parser(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = set(re.findall(r"^    ([a-z-]+)\s", capsys.readouterr().out, re.MULTILINE))
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^cellmap-pipe ([a-z-]+)", readme, re.MULTILINE)) <= commands
    for line in re.findall(r"^cellmap-pipe (?:validate|pack) .*", readme, re.MULTILINE):
        assert "--manifest" in line


def test_the_keys_of_the_result_files_are_all_explained(participant):
    assert main(["score", "predictions.zarr", "truth.zarr", "--out", "scores.json"]) == 0
    result = json.loads(Path("scores.json").read_text())
    record = result["records"]["crop1"]["mito"]
    assert [key for key in (*result, *record) if f"`{key}`" not in SCORING] == []
