"""Scores of a submission against its truth, in the official result's schema."""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation.alignment import align_by, held_bytes, is_instance, resampling_bytes
from cellmap_pipe.evaluation.challenge import Record, aggregate, iterate, missing_label
from cellmap_pipe.evaluation.container import Container, open_container, shared_container
from cellmap_pipe.evaluation.inputs import check_shapes
from cellmap_pipe.evaluation.instance import instance_bytes, score_instance_by
from cellmap_pipe.evaluation.rules import CLEAN, Rules, get_rules
from cellmap_pipe.evaluation.semantic import score_semantic
from cellmap_pipe.evaluation.tasks import LARGER, budget_bytes, run_tasks, semantic_bytes

logger = logging.getLogger(__name__)


def differing(first: Mapping[str, Mapping[str, Record]], second: Mapping[str, Mapping[str, Record]]) -> list[str]:
    """Return the `crop/label` whose counts or distances differ between two sets of records, sorted."""
    keys = ("tp", "fp", "fn", "hausdorff_norm_sum", "n_hausdorff", "status")
    names = {(crop, label) for records in (first, second) for crop, labels in records.items() for label in labels}
    return [
        f"{crop}/{label}"
        for crop, label in sorted(names)
        if any(
            first.get(crop, {}).get(label, {}).get(key) != second.get(crop, {}).get(label, {}).get(key) for key in keys
        )
    ]


def score_submission(
    submission: str | os.PathLike[str],
    truth: str | os.PathLike[str],
    *,
    rules: str | Rules = "csc-2026.06",
    workers: int = 1,
    memory_gb: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return the scores of a submission in the official result's schema, with the raw records.

    submission: zip file, zarr folder, or the JSON of segmentations. truth: zarr folder or zip with arrays
    crop{N}/{label} that carry voxel_size and translation (nm). memory_gb: of all workers together, default 80 % of
    what is available; a label that needs more is scored alone, slab by slab. progress: called with (labels done,
    labels in all).
    Further keys: records {crop: {label: record}}, failed ["crop/label: cause"], submitted_only (aggregate without
    missing labels), rules, provisional, note, digests, warnings (lines); clean (the public result of
    the rules `clean`), differs ["crop/label"] where these count otherwise, and their clean_records, so that
    `clean` can be recomputed too (`clean_of`). A label that cannot be scored is reported and left out; the others
    count. Raises DataError if submission or truth cannot be opened or share no crop.
    """
    rules = get_rules(rules)
    answers, truths = open_container(submission), open_container(truth)
    crops = truths.crops()
    names = _match_crops(answers, crops)
    budget = budget_bytes(memory_gb)
    tasks = [
        LabelTask(str(submission), str(truth), crop, names.get(crop), label, rules.name, budget)
        for crop in crops
        for label in truths.labels(crop)
        if rules.masks_are_classes or not label.endswith("_mask")
    ]
    if not tasks:
        raise DataError(f"{truth}: holds no arrays crop{{N}}/{{label}} of zarr v2{_instead(truths)}")
    warnings = [*_warnings(truths), *_overlooked(answers, names, tasks)]
    for line in warnings:
        logger.warning("%s", line)
    costs = [min(budget, task_bytes(truths, answers, task)) for task in tasks]
    records: dict[str, dict[str, Record]] = {crop: {} for crop in crops}
    clean_records: dict[str, dict[str, Record]] = {crop: {} for crop in crops}
    if progress:
        progress(0, len(tasks))
    scored = run_tasks(score_task, tasks, costs, workers, budget / 1e9, lost=_lost)
    for done, (task, by_rules) in enumerate(scored, start=1):
        records[task.crop][task.label] = by_rules[rules.name]
        if CLEAN in by_rules:
            clean_records[task.crop][task.label] = by_rules[CLEAN]
        if progress:
            progress(done, len(tasks))
    records, clean_records = _in_order(records), _in_order(clean_records)
    failed = [
        f"{crop}/{label}: {record['cause']}"
        for crop, labels in records.items()
        for label, record in labels.items()
        if record["status"] == "failed"
    ]
    for line in failed:
        logger.error("%s", line)
    differs = differing(records, clean_records)
    return {
        **public_result(records),
        "total_evals": len(tasks),
        "num_evals_done": len(tasks) - len(failed),
        "git_version": f"cellmap_pipe {version('cellmap_pipe')}",
        "records": records,
        "failed": failed,
        "submitted_only": aggregate(records, include_missing=False),
        "clean": public_result(clean_records),
        "differs": differs,
        "clean_records": _in_order(
            {
                crop: {label: record for label, record in labels.items() if f"{crop}/{label}" in differs}
                for crop, labels in clean_records.items()
            }
        ),
        "rules": rules.name,
        "rules_description": rules.description,
        "provisional": rules.provisional,
        "note": rules.note,
        "warnings": warnings,
        "digests": {"submission": answers.digest(), "truth": truths.digest()},
    }


def clean_of(result: Mapping[str, Any]) -> dict[str, dict[str, Record]]:
    """Return all records by the rules `clean` from a result of `score_submission`, to aggregate them anew."""
    differs = set(result["differs"])
    merged = {
        crop: {
            **{label: record for label, record in labels.items() if f"{crop}/{label}" not in differs},
            **result["clean_records"].get(crop, {}),
        }
        for crop, labels in result["records"].items()
    }
    return _in_order(merged)


def _in_order(records: Mapping[str, Mapping[str, Record]]) -> dict[str, dict[str, Record]]:
    return {crop: dict(sorted(labels.items())) for crop, labels in records.items() if labels}


def _instead(truths: Container) -> str:
    """Return what the truth holds where it holds no arrays, to follow a message: groups of levels, zarr v3, nothing."""
    for crop in ["", *truths.crops()]:
        if truths.read(f"{crop}/zarr.json" if crop else "zarr.json") is not None:
            return f"; {crop or 'it'} is zarr v3: write it with zarr_format=2"
        for name in truths.children(crop) if crop else ():
            inner = truths.children(f"{crop}/{name}")
            if "zarr.json" in inner:
                return f"; {crop}/{name} is zarr v3: write it with zarr_format=2"
            if inner:
                return f"; {crop}/{name} holds {', '.join(inner[:4])}: write one plain array for each label"
    return ""


def _warnings(truths: Container) -> list[str]:
    """Return what in the truth is passed over or assumed."""
    lines = []
    for crop in truths.crops():
        labels = truths.labels(crop)
        groups = [name for name in truths.children(crop) if name not in labels and truths.children(f"{crop}/{name}")]
        lines += [
            f"{truths.path}: {crop}/{name} is a group, not an array, and is not scored; write one plain array"
            for name in groups
        ]
        for label in labels:
            try:
                array = truths.array(crop, label)
                if array is not None and array.translation is None:
                    lines.append(
                        f"{truths.path}: {crop}/{label} has no translation; 0 nm is assumed, and predictions that "
                        "state theirs are moved accordingly: write it as attribute, centre of voxel 0 in nm"
                    )
            except DataError:
                pass  # the label's record says so
    return lines


def _overlooked(answers: Container, names: Mapping[str, str], tasks: Sequence["LabelTask"]) -> list[str]:
    """Return what in the submission is no array, as the evaluator needs it, though it has the name of a label."""
    lines = []
    arrays = {crop: set(answers.labels(folder)) for crop, folder in names.items()}
    for task in tasks:
        if task.crop not in names or task.label in arrays[task.crop]:
            continue
        name = f"{names[task.crop]}/{task.label}"
        if inner := answers.children(name):
            what = "is zarr v3" if "zarr.json" in inner else f"is a group ({', '.join(inner[:3])})"
            remedy = "write a plain array of zarr v2 (cellmap-pipe pack takes groups)"
            lines.append(f"{answers.path}: {name} {what}, and counts as missing; {remedy}")
    return lines


def public_result(records: Mapping[str, Mapping[str, Record]]) -> dict[str, Any]:
    """Return the official public scores: formulas only, of labels submitted at least once, and overall over all."""
    total = aggregate(records)
    submitted = {
        label for label, record in iterate(records) if not record.get("is_missing") and record["status"] != "failed"
    }
    return {
        **total,
        "label_scores": {
            label: {key: value for key, value in score.items() if key not in ("tp", "fp", "fn")}
            for label, score in total["label_scores"].items()
            if label in submitted
        },
    }


def score_table(result: Mapping[str, Any]) -> str:
    """Return the scores of `score_submission` as a table for a terminal, by its rules and `clean`."""
    both = result["rules"] != CLEAN
    first = max([14, *(len(label) + 2 for label in result["label_scores"])])
    last = max(10, len(result["rules"]) + 2)

    def row(label: str, f1: Any, distance: Any, score: Any, clean: Any) -> str:
        cells = [cell if isinstance(cell, str) else f"{cell:.4f}" for cell in (f1, distance, score, clean)]
        widths = (8, 11, last, 10) if both else (8, 11, last)
        return f"{label:<{first}}" + "".join(f"{cell:>{n}}" for cell, n in zip(cells, widths, strict=False)).rstrip()

    lines = [row("label", "F1", "Hausdorff", result["rules"], CLEAN)]
    clean = result["clean"]["label_scores"]
    for label, score in result["label_scores"].items():
        f1, distance = score.get("f1", ""), score.get("normalized_hausdorff_distance", "")
        lines.append(row(label, f1, distance, _score_of(score), _score_of(clean[label]) if label in clean else ""))
    for name in ("instance", "semantic", "overall"):
        key = "overall_score" if name == "overall" else f"overall_{name}_score"
        lines.append(row(name, "", "", result[key], result["clean"][key]))
    lines.append("The score is sqrt(F1 x Hausdorff) of instance labels, intersection over union of the others.")
    lines.append(f"{result['num_evals_done']} of {result['total_evals']} labels scored; rules {result['rules']}")
    if both and result["differs"]:
        where = _some(result["differs"])
        lines.append(f"{CLEAN} (the same metric without the evaluator's defects) counts otherwise in {where}")
    missing = [
        f"{crop}/{label}"
        for crop, labels in result["records"].items()
        for label, record in labels.items()
        if record["is_missing"]
    ]
    if missing:
        where = _some(missing)
        lines.append(f"{len(missing)} labels of the truth are not in the submission, and count as missed: {where}")
    lines += [f"WARNING {line}" for line in result["warnings"]]
    lines += [f"FAILED {line}" for line in result["failed"]]
    lines.append(result["note"])
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _score_of(score: Mapping[str, float]) -> float:
    return score["iou"] if "iou" in score else score["combined_score"]


@dataclass(frozen=True)
class LabelTask:
    """One (crop, label) to score: paths of submission and truth, the crop's name in the submission (None: missing).

    memory: bytes that it may take.
    """

    submission: str
    truth: str
    crop: str
    answer: str | None
    label: str
    rules: str
    memory: int


def score_task(task: LabelTask) -> dict[str, Record]:
    """Return the records of one (crop, label) by the task's rules and by `clean`, which lists no masks.

    Status "failed" with its cause where it cannot be scored.
    """
    try:
        return _score_label(task)
    except MemoryError:
        raise
    except DataError as error:
        return _failed(task, str(error))
    except Exception as error:  # one label's fault must not cost the others their score
        logger.exception("%s/%s", task.crop, task.label)
        return _failed(task, f"{type(error).__name__}: {error}")


def _lost(task: LabelTask) -> dict[str, Record]:
    return _failed(task, f"its process was killed or ran out of memory; {LARGER}")


def _failed(task: LabelTask, cause: str) -> dict[str, Record]:
    record = {"status": "failed", "is_missing": False, "cause": " ".join(cause.split())}
    return {rules.name: record for rules in _rules_of(task)}


def _rules_of(task: LabelTask) -> list[Rules]:
    """Return the rules that the label is scored by."""
    clean = get_rules(CLEAN)
    listed = [] if task.label.endswith("_mask") and not clean.masks_are_classes else [clean]
    return list(dict.fromkeys([get_rules(task.rules), *listed]))


def _score_label(task: LabelTask) -> dict[str, Record]:
    truth = shared_container(task.truth).array(task.crop, task.label)
    if truth is None or truth.voxel_size is None:
        raise DataError(f"{task.truth}: {task.crop}/{task.label} has no voxel_size; write it as attribute, in nm")
    pred = None if task.answer is None else shared_container(task.submission).array(task.answer, task.label)
    voxels = {"num_voxels": math.prod(truth.shape), "voxel_size": list(truth.voxel_size)}
    if pred is None:
        missing = {**missing_label(truth, task.label), **voxels}
        return {rules.name: missing for rules in _rules_of(task)}
    mask = shared_container(task.truth).array(task.crop, f"{task.label}_mask")
    check_shapes(truth, truth, mask)
    records: dict[str, Record] = {}
    place = (truth.voxel_size, truth.shape, truth.translation or (0.0, 0.0, 0.0))
    for aligned, of_rules in align_by(
        pred, task.label, pred.voxel_size, pred.translation, *place, rules=_rules_of(task)
    ):
        if is_instance(task.label):
            memory_gb = max(0, task.memory - held_bytes(aligned)) / 1e9
            records |= score_instance_by(aligned, truth, truth.voxel_size, mask, of_rules, memory_gb)
        else:
            counts = score_semantic(aligned, truth, mask)
            records |= {rules.name: counts for rules in of_rules}
    return {name: {**record, **voxels, "is_missing": False} for name, record in records.items()}


def task_bytes(truths: Container, answers: Container, task: LabelTask) -> int:
    """Return an estimate of the memory that scoring one label takes; 0 where its metadata cannot be read."""
    try:
        truth = truths.array(task.crop, task.label)
        pred = None if task.answer is None else answers.array(task.answer, task.label)
        if truth is None or truth.ndim != 3:
            return 0
        if pred is None or pred.ndim != 3:
            return semantic_bytes(truth)
        instance, itemsize = is_instance(task.label), pred.dtype.itemsize
        place = pred.voxel_size, truth.voxel_size or (1.0, 1.0, 1.0)
        extra = resampling_bytes(pred.shape, *place, itemsize, instance)
    except DataError:
        return 0
    if instance:
        return extra + instance_bytes(truth.shape, itemsize, truth.dtype.itemsize)
    return extra + semantic_bytes(truth, pred)


def _match_crops(answers: Container, crops: Sequence[str]) -> dict[str, str]:
    """Return the submission's folder of every truth crop that it answers; `crop` may be left out of all names."""
    folders = answers.crops()
    names = {crop: crop for crop in crops if crop in folders}
    if not names:
        names = {f"crop{folder}": folder for folder in folders if f"crop{folder}" in crops}
    if not names:
        raise DataError(
            f"{answers.path}: none of its folders ({', '.join(folders[:5]) or 'none'}) is a crop of the truth"
        )
    return names
