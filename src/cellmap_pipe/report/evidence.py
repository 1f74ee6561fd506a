"""What every number of the report was made of, and whether it is still there; `provenance` shows it.

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
from importlib import metadata
from pathlib import Path as FilePath
from typing import Any

from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.errors import CellmapError
from cellmap_pipe.evaluation.bootstrap import bootstrap
from cellmap_pipe.evaluation.challenge import aggregate
from cellmap_pipe.evaluation.crops import pooled_dice
from cellmap_pipe.evaluation.paired import compare_sources
from cellmap_pipe.files import check_file, digest, file_digest, read_json
from cellmap_pipe.prediction.processing import configured, read_tuned
from cellmap_pipe.prepare.splits import read_folds
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.report.comparison import by_grid, pooled_records
from cellmap_pipe.report.tables import OVERALL, Scores, read_csv, read_scores
from cellmap_pipe.training.fingerprint import FINGERPRINT, fingerprint
from cellmap_pipe.training.usage import NAME as USAGE

Path = str | os.PathLike[str]
Record = Mapping[str, Any]

# Hex digits of a digest that the page shows; the JSON has them all.
SHOWN = 16

# Inputs that belong to no source, by what the page calls them: the data, and the tables that are made of all scores.
_DATA = {
    "crops": "crops",
    "folds": "folds",
    "quality": "quality",
    "converted": "convert",
    "ceilings": "ceiling",
    "stores": "chunk",
    "datalists": "datalist",
}
_TABLES = {"table": "scores", "crop_scores": "scores of crops", "ranking": "ranking", "comparison": "comparison"}

# The numbers of a source and fold that a row of scores.csv begins with.
_NUMBERS = ("score", "score_clean", "dice")


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


def collect(files: Mapping[str, Sequence[str]], settings: Mapping[str, Any], runs: FilePath) -> dict[str, Any]:
    """Return files, data, crops, trainings, tables, sources, submission and checks; see `write_provenance`."""
    evidence = Evidence()
    for paths in files.values():
        for path in paths:
            evidence.sha256(path)
    folds = read_folds(files["folds"][0])
    stores = {_json(path)["grid"]: path for path in files["stores"]}
    crops = _crops(files, folds, stores, evidence)
    trainings = _trainings(files, folds, stores, settings, runs, evidence)
    predictions = _by_source(files["predictions"])
    ensembles = _by_source(files["ensembles"])
    segmentations = _by_source(files["segmentations"])
    tuned = {FilePath(path).stem: path for path in files.get("tuned", ())}
    _check_weights(predictions, trainings, evidence)
    _check_ensembles(ensembles, predictions, evidence)
    made = {**predictions, **ensembles}
    _check_segmentations(segmentations, made, settings, evidence)
    _check_processing(segmentations, tuned, settings, evidence)
    table_rows = {(row["source"], row["fold"], row["class"]): row for path in files["table"] for row in read_csv(path)}
    sources = {}
    for path in files["scores"]:
        scores = _json(path)
        key = (str(scores["model"]), str(scores["fold"]), "validation")
        entry = _source(key, path, scores, segmentations, made, tuned, trainings)
        _check_scores(entry["anchor"], scores, folds, table_rows, evidence)
        _check_used(entry["anchor"], "scored", scores, segmentations[key], evidence)
        sources[f"{key[0]}/fold{key[1]}"] = entry
    grids = {str(training["model"]): str(training["grid"]) for training in trainings.values()}
    _check_ranking(files, grids, evidence)
    return {
        "files": dict(sorted(evidence.files.items())),
        "data": _named(_DATA, files),
        "crops": crops,
        "trainings": trainings,
        "tables": _named(_TABLES, files),
        "sources": sources,
        "submission": _submission(files, segmentations, made, tuned, evidence),
        "checks": evidence.checks,
    }


Key = tuple[str, str, str]  # source, fold, subset
Made = dict[Key, dict[str, Any]]


def _json(path: Path) -> Any:
    return read_json(path, "run `snakemake all`")


def _short(value: Any) -> str:
    return value[:SHOWN] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else str(value)


def _named(names: Mapping[str, str], files: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the inputs of some kinds by what the page calls them."""
    return {name: list(files.get(kind, ())) for kind, name in names.items()}


def _about(key: Key) -> tuple[str, str]:
    """Return the anchor of the section that something belongs to, and what its comparisons begin with there.

    What was made of the volumes to segment is behind the submission alone, where that of several sources comes
    together.
    """
    source, fold, subset = key
    if subset == "test":
        return "submission", f"{subset}, {source}/fold{fold}"
    return anchor_of(source, fold), subset


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
    folds: Mapping[str, int],
    stores: Mapping[str, str],
    settings: Mapping[str, Any],
    runs: FilePath,
    evidence: Evidence,
) -> dict[str, Any]:
    """Return weights, fingerprint and what both come from of each training; compute each fingerprint again."""
    weights, histories = (
        {os.path.normpath(FilePath(path).parent): path for path in files[kind]} for kind in ("weights", "history")
    )
    datalists = {
        (FilePath(path).parent.name, FilePath(path).stem.removeprefix("fold")): path for path in files["datalists"]
    }
    opened = {grid: Store(path, damaged={}) for grid, path in stores.items()}
    trainings: dict[str, Any] = {}
    for path in files["metrics"]:
        metrics = _json(path)
        model, fold, grid = str(metrics["model"]), str(metrics["fold"]), str(metrics["grid"])
        used, datalist = settings["train"][model], datalists[grid, fold]
        folder = os.path.normpath(FilePath(path).parent)
        model_file = weights[folder]
        lists = _json(datalist)
        sides = [[str(entry["crop"]) for entry in lists[side]] for side in ("training", "validation")]
        name = f"{model}/fold{fold}"
        of = f"train-{anchor_of(model, fold)}"
        run = runs / model / f"fold{fold}"
        usage = str(run / USAGE) if (run / USAGE).is_file() else None  # no output: a run directory may be gone
        if usage:
            evidence.sha256(usage)
        trainings[name] = {
            "anchor": of,
            "model": model,
            "fold": fold,
            "grid": grid,
            "weights": model_file,
            "weights_sha256": evidence.sha256(model_file),
            "metrics": path,
            "history": histories[folder],
            "usage": usage,
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
        wrong = [crop for crop in sides[0] if str(folds.get(crop)) in (fold, "None")]
        wrong += [crop for crop in sides[1] if str(folds.get(crop)) != fold]
        evidence.count(of, "crops of the datalist are on the side that their fold says", wrong, sum(map(len, sides)))
        where = "from settings, crops in the training store and code version"
        evidence.compare(of, "fingerprint of the training", metrics["fingerprint"], again, where)
        if (run / FINGERPRINT).is_file():
            found = _json(run / FINGERPRINT)["fingerprint"]
            evidence.compare(of, "fingerprint of the run directory", metrics["fingerprint"], found)
    return trainings


def _check_weights(predictions: Made, trainings: Mapping[str, Any], evidence: Evidence) -> None:
    """Compare the weights that predictions record with model.pt, and each array's own note with its record."""
    for key, entry in predictions.items():
        training = trainings.get(f"{key[0]}/fold{key[1]}")
        of, whose = _about(key)
        for recorded in sorted(entry["weights"]):
            found = training["weights_sha256"] if training else "no training"
            evidence.compare(of, f"{whose}: weights of the predictions are those of model.pt", recorded, found)
        _check_arrays(key, "predictions", entry, evidence)


def _check_arrays(key: Key, what: str, entry: Mapping[str, Any], evidence: Evidence) -> None:
    made = {name: record for name, record in entry["records"].items() if record["status"] == "ok"}
    faults = [
        f"{record['path']}: another fingerprint than recorded, or none"
        for record in made.values()
        if _notes_of(record["path"]).get("fingerprint") != record["fingerprint"]
    ]
    of, whose = _about(key)
    evidence.count(of, f"{whose}: arrays of the {what} carry the recorded fingerprint", faults, len(made))


def _check_ensembles(ensembles: Made, predictions: Made, evidence: Evidence) -> None:
    """Compute the fingerprint of each averaged volume again from its members."""
    for key, entry in ensembles.items():
        of, whose = _about(key)
        members = _members(predictions, key[2])
        lost = [name for name in entry["members"] if name not in members]
        evidence.count(of, f"{whose}: members of the ensemble are predicted", lost, len(entry["members"]))
        if lost:
            continue
        digests = sorted({sha for name in entry["members"] for sha in members[name]["weights"]})
        recorded = next(iter(entry["weights"]))
        evidence.compare(of, f"{whose}: weights of the members", recorded, digest(digests))
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
        evidence.count(of, f"{whose}: fingerprints follow from the members' and their weights", faults, made)
        _check_arrays(key, "means", entry, evidence)


def _members(made: Made, subset: str) -> dict[str, dict[str, Any]]:
    """Return what was made of a subset by the names that an ensemble's members have."""
    return {f"{model}/fold{fold}": entry for (model, fold, kind), entry in made.items() if kind == subset}


def _check_segmentations(segmentations: Made, made: Made, settings: Mapping[str, Any], evidence: Evidence) -> None:
    """Compute the fingerprint of each segmented volume again from its prediction and its processing."""
    for key, entry in segmentations.items():
        of, whose = _about(key)
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
            of, f"{whose}: segmentations follow from the predictions and their processing", faults, len(ready)
        )
        _check_arrays(key, "segmentations", entry, evidence)


def _source(
    key: Key,
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


def _check_processing(
    segmentations: Made, tuned: Mapping[str, str], settings: Mapping[str, Any], evidence: Evidence
) -> None:
    """Compare how each volume was processed with what tuning found and the settings say."""
    for key, entry in segmentations.items():
        source = key[0]
        found = read_tuned(tuned[source]) if source in tuned else None
        ready = {name: record for name, record in entry["records"].items() if record["status"] == "ok"}
        faults = []
        for volume, record in ready.items():
            choice = found.choice(volume) if found else None
            repair = settings["segment"]["repair"]
            repaired = bool(choice and choice.repair) if repair == "auto" else bool(repair)
            said = {name: (choice and choice.processing.get(name)) for name in record["processing"]}
            expected = {name: (how or configured(name, settings["segment"])).to_dict() for name, how in said.items()}
            differing = [
                name
                for name, used in record["processing"].items()
                # a union of parts is thresholded at theirs
                if any(used[key] not in (value, None) for key, value in expected[name].items())
            ]
            faults += [volume] if differing or record["repair"] != repaired else []
        of, whose = _about(key)
        evidence.count(of, f"{whose}: processing is that of the settings and of tuning", faults, len(ready))


def _check_scores(
    of: str,
    scores: Mapping[str, Any],
    folds: Mapping[str, int],
    rows: Mapping[tuple[str, str, str], Mapping[str, str]],
    evidence: Evidence,
) -> None:
    """Compute the scores again from their records; compare with scores.csv, and the scored crops with the folds."""
    parts = Scores(str(scores["model"]), str(scores["fold"]), dict(scores))
    records, row = scores["records"], rows.get((parts.source, parts.fold, OVERALL))
    again = {"aggregate": aggregate(records), "clean": aggregate(parts.clean_records())}
    recorded = _text(scores["aggregate"]["overall_score"])
    evidence.compare(of, "score is that of its records", recorded, _text(again["aggregate"]["overall_score"]))
    recorded = _text(scores["clean"]["overall_score"])
    evidence.compare(of, "score_clean is that of its records", recorded, _text(again["clean"]["overall_score"]))
    interval = bootstrap(records, n=scores["interval"]["resamples"] or 1)
    low, high = ([_text(each[end]) for each in (scores["interval"], interval)] for end in ("low", "high"))
    evidence.compare(of, "lower end of the interval is that of the records", *low)
    evidence.compare(of, "upper end of the interval is that of the records", *high)
    faults = []
    for name in parts.classes:
        found = [again[variant]["label_scores"].get(name) for variant in again]
        dice = pooled_dice(records, name)
        agrees = found == [scores[variant]["label_scores"].get(name) for variant in again]
        line = rows.get((parts.source, parts.fold, name), {})
        shown = [line.get(key) for key in ("score", "score_clean", "dice")]
        values = [parts.class_score(name), parts.class_score(name, "clean"), dice]
        agrees = agrees and dice == parts.dice.get(name) and shown == [_text(value) for value in values]
        faults += [] if agrees else [name]
    what = "score, score_clean and Dice of each class, also in scores.csv, are those of the records"
    evidence.count(of, what, faults, len(parts.classes))
    numbers = (scores["aggregate"]["overall_score"], scores["clean"]["overall_score"], scores["mean_dice"])
    for name, value in zip(_NUMBERS, numbers, strict=True):
        evidence.compare(
            of, f"{name} in scores.csv is that of the scores file", _text(value), row[name] if row else "no row"
        )
    crops = sorted({str(record["crop"]) for record in records})
    outside = [crop for crop in crops if str(folds.get(crop)) != parts.fold]
    evidence.count(of, "scored crops are validation crops of this fold", outside, len(crops))


def _check_used(of: str, how: str, content: Record, segments: Mapping[str, Any], evidence: Evidence) -> None:
    """Compare the segmentations that were scored or packed with those that are there; older files do not name them."""
    used = content.get("segmentations")
    if used is None:
        return
    there = {name: record["fingerprint"] for name, record in segments["records"].items()}
    names = sorted({*used, *there})
    faults = [name for name in names if name not in used or name not in there or used[name] != there[name]]
    evidence.count(of, f"the segmentations that were {how} are those that are there", faults, len(names))


def _check_ranking(files: Mapping[str, Sequence[str]], grids: Mapping[str, str], evidence: Evidence) -> None:
    """Compute the score of each source over all folds again and compare it with ranking.csv. grids: by model."""
    rows = [row for path in files.get("ranking", ()) for row in read_csv(path)]
    if not rows:
        return
    found = {(row["grid"], row["source"]): row["score"] for row in rows}
    for grid, scores in by_grid(read_scores(files["scores"]), grids).items():
        compared = compare_sources(pooled_records(scores), n=1).scores
        for source in sorted({each.source for each in scores}):
            of = anchor_of(source, next(each.fold for each in scores if each.source == source))
            what = "score in ranking.csv is that of the records of all folds"
            again = _text(compared[source].score if source in compared else None)
            evidence.compare(of, what, found.get((grid, source), "no row"), again, f"among the sources of grid {grid}")


def _text(value: float | None) -> str:
    """Return a number as it stands in a CSV."""
    return "" if value is None else f"{float(value):.6g}"


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
    _check_used("submission", "packed", report, segmentations[key], evidence)
    forecast, truth_scores = (next(iter(files.get(kind, ())), None) for kind in ("forecast", "truth_scores"))
    if truth_scores:
        what = "the archive that was scored against the truth is the one that is there"
        scored = _json(truth_scores)["digests"]["submission"]
        evidence.compare("submission", what, scored, evidence.sha256(archive))
    predictions = _members(made, key[2])
    members = list(made[key]["members"])
    return {
        "anchor": "submission",
        "archive": archive,
        "sha256": report["sha256"],
        "rules": report["rules"],
        "checks": report_json,
        "forecast": forecast,
        "truth_scores": truth_scores,
        "segmentation": segmentations[key]["files"],
        "tuned": tuned.get(key[0]),
        "predictions": made[key]["files"],
        "members": members,
        "member_predictions": [path for name in members if name in predictions for path in predictions[name]["files"]],
        "volumes": {
            name: {
                "prediction": made[key]["records"].get(name, {}).get("fingerprint"),
                "segmentation": record["fingerprint"],
            }
            for name, record in sorted(segmentations[key]["records"].items())
        },
    }
