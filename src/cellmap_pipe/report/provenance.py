"""From each number of the report back to what it was made of: files by digest, settings, code; and whether they agree.

A result's fingerprint is a hash of everything that determines it, the fingerprint of what it was made from among it.
Here the chain is followed backwards, and each link that can be computed again is: what is recorded is compared with
what lies there.
"""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import metadata
from pathlib import Path as FilePath
from typing import Any

from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.errors import CellmapError
from cellmap_pipe.evaluation.challenge import aggregate
from cellmap_pipe.fetched import fetch_digest
from cellmap_pipe.files import check_file, digest, file_digest, read_json, write_json, write_text
from cellmap_pipe.prepare.splits import read_folds
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.report.pages import Cell, Column, Content, folded, heading, page, paragraph, table
from cellmap_pipe.report.tables import OVERALL, read_csv
from cellmap_pipe.training.fingerprint import FINGERPRINT, fingerprint

Path = str | os.PathLike[str]
Record = Mapping[str, Any]

FORMAT = 1

# Hex digits of a digest that the page shows; the JSON has them all.
_SHOWN = 16

_AGREES, _DIFFERS = "#009E73", "#D55E00"

# The numbers of a source and fold that a row of scores.csv begins with.
_NUMBERS = ("score", "score_clean", "dice")

_STYLE = """
.verdict { border-left: 6px solid; padding: .4rem .8rem; max-width: 62rem; }
.verdict.good { border-color: #009E73; background: #eefaf5; }
.verdict.bad { border-color: #C00000; background: #fdecea; color: #8b0000; font-weight: 600; }
.chain { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .3rem 0; list-style: none; }
a { color: #005a8c; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; scroll-margin-top: .5rem; }
h3:target { background: #fff3bf; }
td:nth-child(n + 3) { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .92em; }
"""


@dataclass
class Evidence:
    """What was found: files by path with size and SHA-256, and the outcome of every comparison."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)

    def sha256(self, path: Path) -> str:
        """Return the digest of a file, which is read once. Raises OSError."""
        name = os.path.normpath(path)
        if name not in self.files:
            self.files[name] = {"size": os.path.getsize(name), "sha256": file_digest(name)}
        return str(self.files[name]["sha256"])

    def compare(self, of: str, what: str, recorded: Any, found: Any, where: str = "") -> None:
        """Note whether two values agree. of: the anchor that it is about; where: what else a reader has to know."""
        detail = (
            where if recorded == found else f"recorded {_short(recorded)}, found {_short(found)}; {where}".rstrip("; ")
        )
        self.checks.append({"of": of, "what": what, "agrees": recorded == found, "detail": detail})

    def count(self, of: str, what: str, faults: Sequence[str], number: int) -> None:
        """Note that `number` things were compared and which of them are at fault."""
        detail = f"{number - len(faults)} of {number}" + (f"; the first fault: {faults[0]}" if faults else "")
        self.checks.append({"of": of, "what": what, "agrees": not faults, "detail": detail})

    def of(self, anchor: str) -> list[dict[str, Any]]:
        return [check for check in self.checks if check["of"] == anchor]


def anchor_of(source: str, fold: str) -> str:
    """Return the anchor, in the page, of the chain of a row of scores.csv: `provenance.html#{source}-fold{fold}`."""
    return f"{source}-fold{fold}"


def write_provenance(
    inputs: Mapping[str, Any],
    out_json: Path,
    out_html: Path,
    *,
    settings: Mapping[str, Any],
    repository: Path,
    data_root: Path,
    runs: Path = "runs",
) -> None:
    """Write what every number of the report was made of as JSON and as a page, and whether it is still there.

    inputs: files by kind, one or several: crops, folds, table (scores.csv), quality, converted, stores (index.json of
    the training stores), datalists, metrics, weights, predictions, ensembles, tuned, segmentations, scores and, where
    there is one, submission (report.json) and archive (the zip). What each is about is read from it. settings: the
    resolved settings by stage. repository: a folder of the code, for its commit. runs: folder of the run directories.

    Compared are: scores with their records and with scores.csv; crops that were scored with the folds; the fingerprint
    of each segmentation and each ensemble with what it is computed from; recorded weights with the SHA-256 of model.pt;
    the fingerprint of each training with its settings, crops and code version; each array's own fingerprint, and files
    of data by size (`snakemake verify` reads them through). A difference is no error: the page says it in red.
    Raises ContractError for a JSON file that cannot be read.
    """
    files = {
        kind: [str(path) for path in ([value] if isinstance(value, str) else value)] for kind, value in inputs.items()
    }
    content = {
        "format": FORMAT,
        "code": describe_code(FilePath(repository)),
        "settings": _digested(settings),
        **collect(files, settings, FilePath(runs)),
        "fetched": fetch_digest(FilePath(data_root)),
    }
    write_json(out_json, content)
    write_text(out_html, _page(content))


def describe_code(folder: FilePath) -> dict[str, Any]:
    """Return the version of the package, of the stages' results, of the libraries that it asks for, and the commit."""
    libraries = {}
    for requirement in metadata.requires("cellmap_pipe") or []:
        name = re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0]
        try:
            libraries[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
    return {
        "cellmap_pipe": metadata.version("cellmap_pipe"),
        "git": git_state(folder),
        "python": platform.python_version(),
        "libraries": dict(sorted(libraries.items(), key=lambda item: item[0].lower())),
        "result_versions": dict(RESULT_VERSIONS),
    }


def git_state(folder: FilePath) -> dict[str, Any] | None:
    """Return the commit of the code in `folder` and whether its files differ from it; None if git does not hold it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

    try:
        if not git("ls-files", "--", ".").strip():
            return None  # a folder that only lies below a repository, such as an environment in a project of its own
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no").strip()),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _digested(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sha256": digest(settings),
        "stages": {stage: digest(values) for stage, values in settings.items()},
        "values": dict(settings),
    }


def collect(files: Mapping[str, Sequence[str]], settings: Mapping[str, Any], runs: FilePath) -> dict[str, Any]:
    """Return files, crops, trainings, sources, submission and checks; see `write_provenance`."""
    evidence = Evidence()
    for paths in files.values():
        for path in paths:
            evidence.sha256(path)
    folds = read_folds(files["folds"][0])
    stores = {_json(path)["grid"]: path for path in files["stores"]}
    crops = _crops(files, folds, stores, evidence)
    trainings = _trainings(files, stores, settings, runs, evidence)
    predictions = _by_source(files["predictions"])
    ensembles = _by_source(files["ensembles"])
    segmentations = _by_source(files["segmentations"])
    tuned = {FilePath(path).stem: path for path in files.get("tuned", ())}
    _check_weights(predictions, trainings, evidence)
    _check_ensembles(ensembles, predictions, evidence)
    made = {**predictions, **ensembles}
    _check_segmentations(segmentations, made, settings, evidence)
    table_rows = {(row["source"], row["fold"]): row for row in read_csv(files["table"][0]) if row["class"] == OVERALL}
    sources = {}
    for path in files["scores"]:
        scores = _json(path)
        key = (str(scores["model"]), str(scores["fold"]), "validation")
        entry = _source(key, path, scores, segmentations, made, tuned, trainings)
        _check_scores(entry["anchor"], scores, folds, table_rows.get(key[:2]), evidence)
        sources[f"{key[0]}/fold{key[1]}"] = entry
    return {
        "files": dict(sorted(evidence.files.items())),
        "crops": crops,
        "trainings": trainings,
        "sources": sources,
        "submission": _submission(files, segmentations, made, tuned, evidence),
        "checks": evidence.checks,
    }


Made = dict[tuple[str, str, str], dict[str, Any]]


def _json(path: Path) -> Any:
    return read_json(path, "run `snakemake all`")


def _short(value: Any) -> str:
    return value[:_SHOWN] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else str(value)


def _by_source(paths: Iterable[str]) -> Made:
    """Return what was made per (source, fold, subset): its files, records by volume with their folder, other keys."""
    made: Made = {}
    for path in paths:
        content = _json(path)
        key = (str(content["model"]), str(content["fold"]), str(content["subset"]))
        entry = made.setdefault(
            key, {"files": [], "records": {}, "weights": set(), "members": content.get("members", [])}
        )
        entry["files"].append(path)
        entry["weights"] |= {content["weights_sha256"]} if "weights_sha256" in content else set()
        for record in content["records"]:
            where = None if record["path"] is None else str(FilePath(path).parent / record["path"])
            entry["records"][str(record["name"])] = {**record, "path": where}
    return made


def _notes_of(store: Path) -> Mapping[str, Any]:
    """Return what a store of ours keeps about itself, {} where it cannot be read."""
    try:
        return dict(json.loads((FilePath(store) / ".zattrs").read_text())["cellmap_pipe"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _crops(
    files: Mapping[str, Sequence[str]], folds: Mapping[str, int], stores: Mapping[str, str], evidence: Evidence
) -> dict[str, Any]:
    """Return fold, verdict, conversion and digests of every crop; compare sizes of its files."""
    verdicts = {FilePath(path).parent.name: path for path in files["quality"]}
    crops: dict[str, Any] = {crop: {"fold": fold, "grids": {}} for crop, fold in sorted(folds.items())}
    for grid, path in verdicts.items():
        for row in read_csv(path):
            if row["crop"] in crops:
                crops[row["crop"]]["grids"][grid] = {"verdict": row["verdict"]}
    faults: list[str] = []
    count = 0
    for path in files["converted"]:
        shard = _json(path)
        nifti = FilePath(path).parents[2] / "nifti" / shard["grid"]
        for record in shard["records"]:
            entry = crops.get(record["crop"], {}).get("grids", {}).get(shard["grid"])
            if entry is None:
                continue
            found = record.get("files") or {}
            entry |= {"conversion": path, "input_digest": record["input_digest"]}
            entry |= {kind: file["sha256"] for kind, file in found.items()}
            count += len(found)
            for file in found.values():
                try:
                    check_file(file, nifti, "run `snakemake -R convert`")
                except CellmapError as error:
                    faults.append(str(error))
    evidence.count("data", "converted files are there with the recorded size", faults, count)
    for grid, path in stores.items():
        damaged: dict[str, str] = {}
        store = Store(path, damaged=damaged)
        for crop, record in store.crops.items():
            if grid in crops.get(crop, {}).get("grids", {}):
                crops[crop]["grids"][grid]["store"] = digest(record["content"])
        lost = [f"{crop}: {fault}" for crop, fault in damaged.items()]
        evidence.count("data", f"training store of {grid} is there with the recorded sizes", lost, len(store.crops))
    return crops


def _trainings(
    files: Mapping[str, Sequence[str]],
    stores: Mapping[str, str],
    settings: Mapping[str, Any],
    runs: FilePath,
    evidence: Evidence,
) -> dict[str, Any]:
    """Return weights, fingerprint and what both come from of each training; compute each fingerprint again."""
    weights = {os.path.normpath(FilePath(path).parent): path for path in files["weights"]}
    datalists = {
        (FilePath(path).parent.name, FilePath(path).stem.removeprefix("fold")): path for path in files["datalists"]
    }
    opened = {grid: Store(path, damaged={}) for grid, path in stores.items()}
    trainings: dict[str, Any] = {}
    for path in files["metrics"]:
        metrics = _json(path)
        model, fold, grid = str(metrics["model"]), str(metrics["fold"]), str(metrics["grid"])
        used, datalist = settings["train"][model], datalists[grid, fold]
        model_file = weights[os.path.normpath(FilePath(path).parent)]
        lists = _json(datalist)
        sides = [[str(entry["crop"]) for entry in lists[side]] for side in ("training", "validation")]
        name = f"{model}/fold{fold}"
        of = f"train-{anchor_of(model, fold)}"
        trainings[name] = {
            "anchor": of,
            "model": model,
            "fold": fold,
            "grid": grid,
            "weights": model_file,
            "weights_sha256": evidence.sha256(model_file),
            "metrics": path,
            "fingerprint": metrics["fingerprint"],
            "settings_sha256": digest(used),
            "steps": metrics["steps"],
            "best_step": metrics["best_step"],
            "datalist": datalist,
            "store": stores[grid],
            "training": sides[0],
            "validation": sides[1],
        }
        try:
            again: Any = fingerprint(used, opened[grid], *sides)
        except (CellmapError, KeyError, OSError) as error:
            again = f"cannot be computed ({' '.join(str(error).split())})"
        where = "from settings, crops in the training store and code version"
        evidence.compare(of, "fingerprint of the training", metrics["fingerprint"], again, where)
        run = runs / model / f"fold{fold}" / FINGERPRINT
        if run.is_file():
            evidence.compare(of, "fingerprint of the run directory", metrics["fingerprint"], _json(run)["fingerprint"])
    return trainings


def _check_weights(predictions: Made, trainings: Mapping[str, Any], evidence: Evidence) -> None:
    """Compare the weights that predictions record with model.pt, and each array's own note with its record."""
    for (model, fold, subset), entry in predictions.items():
        training = trainings.get(f"{model}/fold{fold}")
        of = anchor_of(model, fold)
        for recorded in sorted(entry["weights"]):
            found = training["weights_sha256"] if training else "no training"
            evidence.compare(of, f"weights of the {subset} predictions are those of model.pt", recorded, found)
        _check_arrays(of, f"{subset} predictions", entry, evidence)


def _check_arrays(of: str, what: str, entry: Mapping[str, Any], evidence: Evidence) -> None:
    made = {name: record for name, record in entry["records"].items() if record["status"] == "ok"}
    faults = [
        f"{record['path']}: another fingerprint than recorded, or none"
        for record in made.values()
        if _notes_of(record["path"]).get("fingerprint") != record["fingerprint"]
    ]
    evidence.count(of, f"{what}: arrays carry the recorded fingerprint", faults, len(made))


def _check_ensembles(ensembles: Made, predictions: Made, evidence: Evidence) -> None:
    """Compute the fingerprint of each averaged volume again from its members."""
    for (source, fold, subset), entry in ensembles.items():
        of = anchor_of(source, fold)
        members = {
            f"{model}/fold{of_fold}": made for (model, of_fold, kind), made in predictions.items() if kind == subset
        }
        lost = [name for name in entry["members"] if name not in members]
        evidence.count(of, f"{subset}: members of the ensemble are predicted", lost, len(entry["members"]))
        if lost:
            continue
        digests = sorted({sha for name in entry["members"] for sha in members[name]["weights"]})
        recorded = next(iter(entry["weights"]))
        evidence.compare(of, f"{subset}: weights of the members", recorded, digest(digests))
        faults, made = [], 0
        for name, record in entry["records"].items():
            if record["status"] != "ok":
                continue
            made += 1
            used = {member for weights in record["weights"].values() for member in weights}
            again = digest(
                {
                    "version": RESULT_VERSIONS["ensemble"],
                    "members": {member: members[member]["records"][name]["fingerprint"] for member in used},
                    "lattice": record["lattice"],
                    "weights": record["weights"],
                }
            )
            faults += [] if again == record["fingerprint"] else [name]
        evidence.count(of, f"{subset}: fingerprints follow from the members' and their weights", faults, made)
        _check_arrays(of, f"{subset} means", entry, evidence)


def _check_segmentations(segmentations: Made, made: Made, settings: Mapping[str, Any], evidence: Evidence) -> None:
    """Compute the fingerprint of each segmented volume again from its prediction and its processing."""
    for key, entry in segmentations.items():
        of = anchor_of(*key[:2])
        ready = {name: record for name, record in entry["records"].items() if record["status"] == "ok"}
        faults = []
        for name, record in ready.items():
            prediction = made.get(key, {"records": {}})["records"].get(name)
            again = digest(
                {
                    "version": RESULT_VERSIONS["segment"],
                    "revision": settings["segment"]["revision"],
                    "prediction": prediction and prediction["fingerprint"],
                    "target": record["target"],
                    "processing": record["processing"],
                    "repair": record["repair"],
                    "not_derived": record["not_derived"],
                }
            )
            faults += [] if again == record["fingerprint"] else [name]
        evidence.count(
            of, f"{key[2]}: segmentations follow from the predictions and their processing", faults, len(ready)
        )
        _check_arrays(of, f"{key[2]} segmentations", entry, evidence)


def _source(
    key: tuple[str, str, str],
    path: str,
    scores: Mapping[str, Any],
    segmentations: Made,
    made: Made,
    tuned: Mapping[str, str],
    trainings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the chain of one source and fold."""
    source, fold, _ = key
    segments, predicted = segmentations[key], made[key]
    members = list(predicted["members"])
    own = [] if members else [f"{source}/fold{fold}"]
    return {
        "anchor": anchor_of(source, fold),
        "numbers": {
            "score": scores["aggregate"]["overall_score"],
            "score_clean": scores["clean"]["overall_score"],
            "dice": scores["mean_dice"],
        },
        "rules": scores["rules"],
        "scores": path,
        "segmentation": segments["files"],
        "tuned": tuned.get(source),
        "predictions": predicted["files"],
        "members": members,
        "trainings": [name for name in (*members, *own) if name in trainings],
        "crops": sorted({str(record["crop"]) for record in scores["records"]}),
        "volumes": {
            name: {
                "prediction": predicted["records"].get(name, {}).get("fingerprint"),
                "segmentation": record["fingerprint"],
            }
            for name, record in sorted(segments["records"].items())
        },
    }


def _check_scores(
    of: str, scores: Mapping[str, Any], folds: Mapping[str, int], row: Mapping[str, str] | None, evidence: Evidence
) -> None:
    """Compute the score again from its records; compare it with scores.csv, and the scored crops with the folds."""
    recorded = f"{scores['aggregate']['overall_score']:.6g}"
    again = f"{aggregate(scores['records'])['overall_score']:.6g}"
    evidence.compare(of, "score is that of its records", recorded, again)
    numbers = (scores["aggregate"]["overall_score"], scores["clean"]["overall_score"], scores["mean_dice"])
    for name, value in zip(_NUMBERS, numbers, strict=True):
        shown = "" if value is None else f"{float(value):.6g}"
        evidence.compare(of, f"{name} in scores.csv is that of the scores file", shown, row[name] if row else "no row")
    crops = sorted({str(record["crop"]) for record in scores["records"]})
    outside = [crop for crop in crops if str(folds.get(crop)) != str(scores["fold"])]
    evidence.count(of, "scored crops are validation crops of this fold", outside, len(crops))


def _submission(
    files: Mapping[str, Sequence[str]],
    segmentations: Made,
    made: Made,
    tuned: Mapping[str, str],
    evidence: Evidence,
) -> dict[str, Any] | None:
    """Return the chain of the submission, None without one."""
    if not files.get("submission"):
        return None
    [report_json], [archive] = files["submission"], files["archive"]
    report = _json(report_json)
    evidence.compare("submission", "digest of the archive", report["sha256"], evidence.sha256(archive))
    key = next(found for found in segmentations if found[2] == "test")
    return {
        "anchor": "submission",
        "archive": archive,
        "sha256": report["sha256"],
        "rules": report["rules"],
        "checks": report_json,
        "segmentation": segmentations[key]["files"],
        "tuned": tuned.get(key[0]),
        "predictions": made[key]["files"],
        "members": list(made[key]["members"]),
        "volumes": {
            name: {
                "prediction": made[key]["records"].get(name, {}).get("fingerprint"),
                "segmentation": record["fingerprint"],
            }
            for name, record in sorted(segmentations[key]["records"].items())
        },
    }


def _page(content: Mapping[str, Any]) -> str:
    """Return the page of what `write_provenance` collected."""
    evidence = Evidence(files=dict(content["files"]), checks=list(content["checks"]))
    by_source: dict[str, list[str]] = {}
    for name, entry in content["sources"].items():
        by_source.setdefault(name.rsplit("/fold", 1)[0], []).append(entry["anchor"])
    parts = [
        *_verdict(evidence),
        paragraph(
            "Every number of the report stands in scores.csv under a source and a fold. Its chain stands below under "
            "the same names (address: provenance.html#SOURCE-foldFOLD): the scores, the segmentations that were "
            "scored, the predictions, the weights, the training, the data. Digests are SHA-256, of which the first "
            f"{_SHOWN} digits are shown; provenance.json has all of them, and all settings."
        ),
        paragraph(
            "A fingerprint is a hash of everything that determines a result, the fingerprint of what it was made from "
            "among it: those of trainings, ensembles and segmentations were computed again for this page. Converted "
            "files and training stores were compared by size; `snakemake verify` reads all of them."
        ),
        _links(by_source, content["submission"]),
        heading("Code"),
        *_code(content["code"]),
        heading("Settings"),
        paragraph(f"SHA-256 of all resolved settings: {content['settings']['sha256']}"),
        table(
            [
                Column("stage"),
                Column("result version", hint="raised when the stage's code gives other results"),
                Column("sha256"),
            ],
            [
                [stage, str(content["settings"]["values"].get("versions", {}).get(stage, "")), sha[:_SHOWN]]
                for stage, sha in content["settings"]["stages"].items()
            ],
            name="settings",
        ),
        heading("Scores"),
    ]
    for source, anchors in by_source.items():
        if len(anchors) > 1:
            parts += [
                _title(f"{source}, mean of folds", anchor_of(source, "mean")),
                paragraph("Mean of the folds below."),
            ]
        for name, entry in content["sources"].items():
            if entry["anchor"] in anchors:
                parts += _chain(name, entry, evidence, content["trainings"])
    parts.append(heading("Trainings"))
    for name, training in content["trainings"].items():
        parts += _training(name, training, evidence)
    if content["submission"]:
        parts += [heading("Submission"), *_chain("submission", content["submission"], evidence, content["trainings"])]
    parts += [_title("Data", "data"), *_data(content, evidence)]
    return page("Provenance", parts, style=_STYLE)


def _verdict(evidence: Evidence) -> list[str]:
    bad = [check for check in evidence.checks if not check["agrees"]]
    total = len(evidence.checks)
    if not bad:
        return [f'<p class="verdict good">All {total} comparisons agree: what is recorded is what lies there.</p>']
    lines = "".join(
        f'<li><a href="#{escape(check["of"], quote=True)}">{escape(check["of"])}</a>: {escape(check["what"])}: DIFFERS '
        f"({escape(check['detail'])})</li>"
        for check in bad
    )
    return [
        f'<div class="verdict bad">{len(bad)} of {total} comparisons DIFFER: what is recorded is not what lies there, '
        f"and numbers made of it cannot be trusted.<ul>{lines}</ul></div>"
    ]


def _title(text: str, anchor: str) -> str:
    return f'<h3 id="{escape(anchor, quote=True)}">{escape(text)}</h3>'


def _links(by_source: Mapping[str, Sequence[str]], submission: Mapping[str, Any] | None) -> str:
    items = [
        f"<li>{escape(source)}: "
        + ", ".join(f'<a href="#{escape(a, quote=True)}">{escape(a.rsplit("-", 1)[1])}</a>' for a in anchors)
        + "</li>"
        for source, anchors in by_source.items()
    ]
    items += ['<li><a href="#submission">submission</a></li>'] if submission else []
    items += ['<li><a href="#data">data</a></li>']
    return f'<ul class="chain" aria-label="chains">{"".join(items)}</ul>'


def _code(code: Mapping[str, Any]) -> list[str]:
    git = code["git"]
    commit = f"commit {git['commit']}" if git else "no commit known: the code is not in a git repository"
    state = ", with changes that are NOT committed" if git and git["dirty"] else ""
    libraries = [[name, version] for name, version in code["libraries"].items()]
    return [
        paragraph(
            f"This page was made with cellmap_pipe {code['cellmap_pipe']}, {commit}{state}; Python {code['python']}. "
            "Each result is bound to the code that made it by the result version of its stage, which its fingerprint "
            "contains."
        ),
        folded(
            f"{len(libraries)} libraries", [table([Column("library"), Column("version")], libraries, name="libraries")]
        ),
    ]


_CHAIN_COLUMNS = (
    Column("stage"),
    Column("file"),
    Column("sha256", hint=f"first {_SHOWN} digits"),
)
_CHECK_COLUMNS = (Column("comparison"), Column("result"), Column("detail"))


def _file_rows(stage: str, paths: Iterable[str | None], evidence: Evidence) -> list[list[Content]]:
    known = (path for path in paths if path)
    return [[stage, path, str(evidence.files[os.path.normpath(path)]["sha256"])[:_SHOWN]] for path in known]


def _check_table(anchor: str, evidence: Evidence) -> str:
    rows: list[list[Content]] = [
        [
            check["what"],
            Cell("agrees", _AGREES) if check["agrees"] else Cell("DIFFERS", _DIFFERS),
            check["detail"],
        ]
        for check in evidence.of(anchor)
    ]
    return table(_CHECK_COLUMNS, rows, name=f"checks_{anchor}")


def _chain(
    name: str, entry: Mapping[str, Any], evidence: Evidence, trainings: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return the section of one source and fold, or of the submission."""
    used = entry.get("trainings") or [member for member in entry["members"] if member in trainings]
    rows = _file_rows("scores", [entry.get("scores")], evidence)
    rows += _file_rows("archive", [entry.get("archive")], evidence)
    rows += _file_rows("flight check", [entry.get("checks")], evidence)
    rows += _file_rows("segmentation", entry["segmentation"], evidence)
    rows += _file_rows("post-processing", [entry["tuned"]], evidence)
    rows += _file_rows("ensemble" if entry["members"] else "prediction", entry["predictions"], evidence)
    rows += _file_rows("weights", [trainings[training]["weights"] for training in used], evidence)
    links = ", ".join(
        f'<a href="#{escape(str(trainings[training]["anchor"]), quote=True)}">{escape(training)}</a>'
        for training in used
    )
    numbers = entry.get("numbers", {})
    shown = ", ".join(f"{key} {value:.6g}" for key, value in numbers.items() if value is not None)
    said = f"{shown}, by the rules {entry['rules']}. " if shown else f"Rules {entry['rules']}. "
    volumes = [
        [volume, (prints["prediction"] or "")[:_SHOWN], (prints["segmentation"] or "")[:_SHOWN]]
        for volume, prints in entry["volumes"].items()
    ]
    columns = [Column("volume"), Column("prediction", hint="fingerprint"), Column("segmentation", hint="fingerprint")]
    return [
        _title(name, entry["anchor"]),
        f'<p>{escape(said)}Trained as: {links or "not known"}. Data: <a href="#data">crops and digests</a>.</p>',
        table(_CHAIN_COLUMNS, rows, name=f"chain_{entry['anchor']}"),
        _check_table(entry["anchor"], evidence),
        folded(f"{len(volumes)} volumes", [table(columns, volumes, name=f"volumes_{entry['anchor']}")]),
    ]


def _training(name: str, training: Mapping[str, Any], evidence: Evidence) -> list[str]:
    rows: list[list[Content]] = [
        *_file_rows("weights", [training["weights"]], evidence),
        *_file_rows("metrics", [training["metrics"]], evidence),
        *_file_rows("datalist", [training["datalist"]], evidence),
        *_file_rows("training store", [training["store"]], evidence),
        ["settings", f"train, {training['model']} (provenance.json)", training["settings_sha256"][:_SHOWN]],
        ["fingerprint", "settings, crops and code version", training["fingerprint"][:_SHOWN]],
    ]
    return [
        _title(name, training["anchor"]),
        paragraph(
            f"Grid {training['grid']}; {training['steps']} steps, weights of step {training['best_step']}; "
            f"{len(training['training'])} training and {len(training['validation'])} validation crops."
        ),
        table(_CHAIN_COLUMNS, rows, name=f"chain_{training['anchor']}"),
        _check_table(training["anchor"], evidence),
    ]


def _data(content: Mapping[str, Any], evidence: Evidence) -> list[str]:
    columns = [
        Column("crop"),
        Column("fold"),
        Column("grid"),
        Column("verdict"),
        Column("conversion", hint="the shard that lists what was converted"),
        Column("input", hint="digest of the arrays and settings that it was converted from"),
        Column("image", hint="sha256 of the NIfTI"),
        Column("label", hint="sha256 of the NIfTI"),
        Column("store", hint="digest of the voxels that networks are trained on"),
    ]
    rows: list[list[Content]] = [
        [
            crop,
            str(entry["fold"]),
            grid,
            found["verdict"],
            found.get("conversion", ""),
            *(str(found.get(key, ""))[:_SHOWN] for key in ("input_digest", "image", "label", "store")),
        ]
        for crop, entry in content["crops"].items()
        for grid, found in entry["grids"].items()
    ]
    fetched = [paragraph(f"Digest of what was fetched: {content['fetched']}")] if content["fetched"] else []
    chained = {"scores", "segment", "predict", "ensemble", "train", "tune"}
    others = [path for path in content["files"] if FilePath(path).parts[1:2] and FilePath(path).parts[1] not in chained]
    return [
        *fetched,
        _check_table("data", evidence),
        table(
            _CHAIN_COLUMNS,
            [row for path in others for row in _file_rows(FilePath(path).parts[1], [path], evidence)],
            name="files",
        ),
        table(columns, rows, name="crops"),
    ]
