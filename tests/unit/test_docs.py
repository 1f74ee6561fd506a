"""What the documentation says holds: files, keys, targets and options exist, examples run, every error is explained."""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr

from cellmap_pipe.cli import build_parser, main
from cellmap_pipe.cluster.queue import REASONS
from cellmap_pipe.config import load_config
from cellmap_pipe.evaluation.rules import RULES

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "config/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
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


def test_every_page_is_reached_from_the_readme():
    reached, new = set(), [ROOT / "README.md"]
    while new:
        page = new.pop()
        if page not in reached:
            reached.add(page)
            links = re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", page.read_text())
            new += [(page.parent / link).resolve() for link in links]
    assert [page.name for page in PAGES if page.name != "README.md" and page not in reached] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_sections_exist(page):
    for link, section in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        text = (page.parent / link).read_text() if link else page.read_text()
        heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert section in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, (link, section)


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


def blocks(text: str, *languages: str) -> list[str]:
    """Return the fenced blocks of a page that are in one of the languages; "" is none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for language, body in fenced if language in languages]


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


# ---- Commands and configuration in the pages -----------------------------------------------------------------------


def command_lines(program: str) -> list[str]:
    """Return the lines of all pages' examples that call `program`, continued ones joined, each once."""
    found = {}
    for page in PAGES:
        for block in blocks(page.read_text(), "", "bash", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(f"{program} "):
                    found[line] = page.name
    return list(found)


def snakemake_parser():
    from snakemake.cli import get_argument_parser

    return get_argument_parser()


def snakemake_words() -> list[list[str]]:
    """Return the arguments of all examples of Snakemake; a placeholder for a model is a model."""
    lines = [
        *command_lines("snakemake"),
        *re.findall(r"`(snakemake [a-z-][^`]*)`", "".join(map(Path.read_text, PAGES))),
    ]
    lines += [line.split("head.sh", 1)[1] for line in command_lines("sbatch") if "head.sh" in line]
    return [
        shlex.split(re.sub(r"<(?:model|name)>|…|\.\.\.", lambda found: "unet_3d" if "<" in found.group() else "", line),
                    comments=True)[1:]
        for line in lines
    ]  # fmt: skip


def test_examples_of_snakemake_can_be_planned_as_they_stand(tmp_path):
    parser = snakemake_parser()
    targets: dict[str, None] = {}
    for words in snakemake_words():
        options, unknown = parser.parse_known_args(words)
        assert all(word.startswith("--slurm") for word in unknown), (words, unknown)
        for target in options.targets:
            if alias := re.fullmatch(r"(train|predict|evaluate|segment)_(\w+)", target):
                assert (ROOT / f"config/models/{alias[2]}.yaml").is_file(), words
                target = f"{alias[1]}_unet_3d"  # which fits the demo's patches
            targets[target] = None
        assert all((ROOT / profile).is_dir() for profile in options.profile or []), words
    assert {"all", "fetch_plan", "prediction_plan", "submission"} <= set(targets) and len(targets) >= 8
    # All at once: planning costs less than starting. The demo's volumes and truth are made first.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SNAKEMAKE")}
    planned = subprocess.run(
        [sys.executable, "-m", "snakemake", *targets, "-n", "--quiet", "--cores", "1", "--directory", str(tmp_path),
         "--snakefile", str(ROOT / "workflow/Snakefile"), "--configfile", str(ROOT / "config/demo.yaml")],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert planned.returncode == 0, planned.stdout[-2000:] + planned.stderr[-2000:]


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_examples_of_the_command_line_are_understood(capsys):
    lines = command_lines("cellmap-pipe")
    assert len(lines) >= 8
    for line in lines:
        try:
            build_parser().parse_args(shlex.split(line, comments=True)[1:])
        except SystemExit:
            pytest.fail(f"{line}\n{capsys.readouterr().err}")


def test_commands_and_options_that_the_pages_name_exist(capsys):
    text = "".join(map(Path.read_text, PAGES))
    commands = set(re.findall(r"^    ([a-z-]+)\s", help_of(capsys), re.MULTILINE))
    named = re.findall(r"`cellmap-pipe ([a-z-]+)([^`]*)`", text)
    assert {command for command, _ in named} <= commands and len(named) >= 4
    for command, rest in named:
        options = set(re.findall(r"--[a-z-]+", rest))
        assert options <= set(re.findall(r"--[a-z-]+", help_of(capsys, command))), (command, rest)


def test_targets_of_make_that_the_pages_name_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text()
        named = set(re.findall(r"`make ([a-z]+)`|^make ([a-z]+)", text, re.MULTILINE))
        assert {name for pair in named for name in pair if name} <= targets, page.name


def yaml_blocks() -> list[tuple[str, str]]:
    return [(page.name, block) for page in PAGES for block in blocks(page.read_text(), "yaml")]


def merged(base: dict, extra: dict) -> dict:
    """Return `base` with the entries of `extra`, as Snakemake merges configuration files."""
    both = {key: merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
            for key, value in extra.items()}  # fmt: skip
    return {**base, **both}


@pytest.mark.parametrize(
    ("page", "text"), yaml_blocks(), ids=[f"{name}{i}" for i, (name, _) in enumerate(yaml_blocks())]
)
def test_examples_of_configuration_are_accepted(page, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = yaml.safe_load(text)
    models = shutil.copytree(ROOT / "config/models", tmp_path / "config/models")
    shutil.copytree(ROOT / "config/architectures", tmp_path / "config/architectures")
    if given.keys() & {"executor", "default-resources", "set-resources", "jobs", "retries", "cores"}:
        profile = yaml.safe_load((ROOT / "profiles/longleaf/config.v9+.yaml").read_text())
        options = {name.removeprefix("--") for action in snakemake_parser()._actions for name in action.option_strings}
        plugin = f"{given.get('executor', 'slurm')}-"
        assert {key for key in given if not key.startswith(plugin)} <= options | profile.keys(), page
        return
    for key in ("crops", "volumes"):  # whether they exist is looked at, what is in them is not
        if path := given.get("data", {}).get(key):
            given["data"][key] = str(tmp_path / Path(path).name)
            (tmp_path / Path(path).name).touch()
    values = {**SECTIONS, "data": {**SECTIONS["data"], "root": str(tmp_path)}}
    if "network" in given:
        (models / "of_a_page.yaml").write_text(text)
        values["models"] = ["of_a_page"]
    else:
        assert given.keys() <= SECTIONS.keys(), page
        values = merged(values, given)
    config = load_config(values, schemas=ROOT / "workflow/schemas", models=models)
    if "network" in given:
        assert config.model("of_a_page").network == given["network"]


# ---- Errors --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def messages():
    spec = importlib.util.spec_from_file_location("docs_messages", ROOT / "docs/messages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_message_says_what_to_do_or_the_page_of_messages_does(messages):
    found, remedies = messages.messages(), messages.read_remedies()
    assert len(found) > 300
    assert messages.faults(found, remedies) == []
    page = messages.render(found, remedies)
    assert (ROOT / "docs/messages.md").read_text() == page, "run `python docs/messages.py`"


def test_a_new_message_without_remedy_is_found(messages, tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training/new.py").write_text(
        "from cellmap_pipe.errors import TrainingError\n"
        "class OddError(TrainingError): pass\n"
        "AGAIN = 'run it again'\n"
        "def f(n):\n"
        "    if n: raise OddError(f'{n}: the moon is {n:.1f} % full')\n"
        "    raise TrainingError(f'the tide is {n}; {AGAIN}')\n"
    )
    found = messages.messages(tmp_path)
    assert {one.text for one in found if one.place == "training/new.py"} == {
        "…: the moon is … % full",
        "the tide is …; run it again",
    }
    lines = [line for line in messages.faults(found, {}) if line.startswith("training/")]
    assert len(lines) == 1 and "'…: the moon is … % full' says not what to do" in lines[0]
    lines = messages.faults(found, {"the moon is": "wait", "the sun is": "wait"})
    assert [line for line in lines if "moon" in line] == []
    assert [line for line in lines if "sun" in line] == [
        "docs/remedies.yaml: no message has 'the sun is' any more; remove it"
    ]


# Of Snakemake, or put together from several texts
ELSEWHERE = {
    "Directory cannot be locked",
    "IncompleteFilesException",
    "lists an unknown class",
    "unreadable: labels of dtype ...",
    "fold ... has no validation crop",
    "the loss is nan at step ...",
    "runs/<model>/fold{k}.stale-...",
    "says another fingerprint of",
    "group er is approximate, without ...",
    "FAILED crop/label: ...",
    "give the folds of one model",
}


def texts_of_the_source() -> str:
    """Return all texts of library and workflow, those with values in them with a gap for each."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.JoinedStr(values=values):
                    found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in values))
                case ast.Constant(value=str(text)):
                    found.append(text)
    found += [re.sub(r'"\s*f?"', "", path.read_text()) for path in (ROOT / "workflow/rules").glob("*.smk")]
    return "\n".join(found)


def test_messages_that_troubleshooting_quotes_are_in_the_source():
    source = texts_of_the_source()
    tables = (ROOT / "docs/troubleshooting.md").read_text().split("## Before the first job")[1].split("## Slurm")[0]
    rows = [line.split("|")[1] for line in tables.splitlines() if line.startswith("| ")]
    quoted = {text for row in rows for text in re.findall("`([^`]+)`", row)}
    pieces = {text: [piece.strip(" '[];:,") for piece in re.split(r"\.\.\.|\d+", text)] for text in quoted}
    lost = {text for text in quoted if any(len(piece) > 5 and piece not in source for piece in pieces[text])}
    assert lost == ELSEWHERE & quoted and quoted >= ELSEWHERE


def test_every_reason_for_which_a_job_waits_is_explained():
    text = (ROOT / "docs/troubleshooting.md").read_text().split("### A job waits")[1].split("###")[0]
    named = re.findall(
        r"`([A-Za-z ]+)`", "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    )
    seldom = {"None", "Licenses", "Dependency|DependencyNeverSatisfied"}
    for pattern, _ in REASONS:
        assert pattern in seldom or any(re.fullmatch(pattern, reason) for reason in named), pattern
    assert [reason for reason in named if not any(re.fullmatch(pattern, reason) for pattern, _ in REASONS)] == []


# ---- Files for others ----------------------------------------------------------------------------------------------


def test_versions_of_package_citation_and_changelog_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert all("name" in author or {"family-names", "given-names"} <= author.keys() for author in citation["authors"])
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (.*)$", changelog, re.MULTILINE)[0] == "[Unreleased]"
    assert project["version"] in changelog
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", changelog, re.MULTILINE)) <= kinds


def test_the_workflow_catalog_finds_what_it_asks_for():
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert usage.keys() == {"mandatory-flags", "software-stack-deployment"}
    options = snakemake_parser().parse_args(usage["mandatory-flags"]["flags"].split())
    assert options.profile and all((ROOT / profile).is_dir() for profile in options.profile)
    deployment = usage["software-stack-deployment"]
    assert deployment.keys() == {"conda", "apptainer", "apptainer+conda", "report"}
    assert all(isinstance(value, bool) for value in deployment.values())
    rules = "".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    assert deployment["conda"] == ("conda:" in rules) and deployment["report"] == ("report(" in rules)
    assert (ROOT / "workflow/Snakefile").is_file() and (ROOT / "config/README.md").is_file()
    assert {"snakemake", "workflow"} <= set(re.findall(r"\w+", (ROOT / "README.md").read_text().lower()))


def test_the_words_of_the_design_are_in_the_glossary():
    rows = [line for line in (ROOT / "docs/glossary.md").read_text().splitlines() if line.startswith("| ")][1:]
    words = [line.split("|")[1].strip() for line in rows]
    plain = [word.strip("`").casefold() for word in words]
    assert plain == sorted(plain) and len(plain) == len(set(plain)) > 50
    known = {part.strip() for word in plain for part in word.split(",")}
    words = "dataset crop class atom group grid shard fold patch source translation level absent present unknown"
    assert set(words.split()) | {"run directory", "fingerprint", "owner file", "voxel size"} <= known
