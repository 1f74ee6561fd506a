"""Scores of a submission against its truth, in the official result's schema."""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation.alignment import is_instance, match_geometry, offset_voxels, same_voxel
from cellmap_pipe.evaluation.challenge import Record, aggregate, iterate, missing_label
from cellmap_pipe.evaluation.container import Container, open_container, shared_container
from cellmap_pipe.evaluation.instance import score_instance
from cellmap_pipe.evaluation.rules import Rules, get_rules
from cellmap_pipe.evaluation.semantic import score_semantic
from cellmap_pipe.evaluation.tasks import INSTANCE_BYTES, RESAMPLE_BYTES, SEMANTIC_BYTES, run_tasks

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
    what is available. progress: called with (labels done, labels in all).
    Further keys: records {crop: {label: record}}, failed ["crop/label: cause"], submitted_only (aggregate without
    missing labels), rules, provisional, note, digests. A label that cannot be scored is reported and left out; the
    others count. Raises DataError if submission or truth cannot be opened or share no crop.
    """
    rules = get_rules(rules)
    answers, truths = open_container(submission), open_container(truth)
    crops = truths.crops()
    names = _match_crops(answers, crops)
    tasks = [
        LabelTask(str(submission), str(truth), crop, names.get(crop), label, rules.name)
        for crop in crops
        for label in truths.labels(crop)
        if rules.masks_are_classes or not label.endswith("_mask")
    ]
    if not tasks:
        raise DataError(f"{truth}: holds no arrays crop{{N}}/{{label}} of zarr v2")
    costs = [task_bytes(truths, answers, task) for task in tasks]
    records: dict[str, dict[str, Record]] = {crop: {} for crop in crops}
    for done, (task, record) in enumerate(run_tasks(score_task, tasks, costs, workers, memory_gb), start=1):
        records[task.crop][task.label] = record
        if progress:
            progress(done, len(tasks))
    records = {crop: dict(sorted(labels.items())) for crop, labels in records.items() if labels}
    failed = [
        f"{crop}/{label}: {record['cause']}"
        for crop, labels in records.items()
        for label, record in labels.items()
        if record["status"] == "failed"
    ]
    for line in failed:
        logger.error("%s", line)
    return {
        **public_result(records),
        "total_evals": len(tasks),
        "num_evals_done": len(tasks) - len(failed),
        "git_version": f"cellmap_pipe {version('cellmap_pipe')}",
        "records": records,
        "failed": failed,
        "submitted_only": aggregate(records, include_missing=False),
        "rules": rules.name,
        "rules_description": rules.description,
        "provisional": rules.provisional,
        "note": rules.note,
        "digests": {"submission": answers.digest(), "truth": truths.digest()},
    }


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
    """Return the scores of `score_submission` as a table for a terminal, with the rules and their caveat."""
    lines = [f"{'label':<14}{'F1':>9}{'Hausdorff':>11}{'combined':>10}{'IoU':>9}"]
    for label, score in result["label_scores"].items():
        if "iou" in score:
            lines.append(f"{label:<14}{'':>30}{score['iou']:>9.4f}")
        else:
            f1, distance = score["f1"], score["normalized_hausdorff_distance"]
            lines.append(f"{label:<14}{f1:>9.4f}{distance:>11.4f}{score['combined_score']:>10.4f}")
    names = {"overall_instance_score": "instance", "overall_semantic_score": "semantic", "overall_score": "overall"}
    lines += [f"{name:<14}{result[key]:>9.4f}" for key, name in names.items()]
    lines.append(f"{result['num_evals_done']} of {result['total_evals']} labels scored; rules {result['rules']}")
    lines += [f"FAILED {line}" for line in result["failed"]]
    lines.append(result["note"])
    return "\n".join(lines)


@dataclass(frozen=True)
class LabelTask:
    """One (crop, label) to score: paths of submission and truth, the crop's name in the submission (None: missing)."""

    submission: str
    truth: str
    crop: str
    answer: str | None
    label: str
    rules: str


def score_task(task: LabelTask) -> Record:
    """Return the record of one (crop, label); status "failed" with its cause if it cannot be scored."""
    try:
        return _score_label(task)
    except MemoryError:
        raise
    except DataError as error:
        return {"status": "failed", "is_missing": False, "cause": str(error)}
    except Exception as error:  # one label's fault must not cost the others their score
        logger.exception("%s/%s", task.crop, task.label)
        return {"status": "failed", "is_missing": False, "cause": f"{type(error).__name__}: {error}"}


def _score_label(task: LabelTask) -> Record:
    rules = get_rules(task.rules)
    truth = shared_container(task.truth).array(task.crop, task.label)
    if truth is None or truth.voxel_size is None:
        raise DataError(f"{task.truth}: {task.crop}/{task.label} has no voxel_size; write it as attribute, in nm")
    pred = None if task.answer is None else shared_container(task.submission).array(task.answer, task.label)
    voxels = {"num_voxels": math.prod(truth.shape), "voxel_size": list(truth.voxel_size)}
    if pred is None:
        return {**missing_label(truth, task.label), **voxels}
    mask = shared_container(task.truth).array(task.crop, f"{task.label}_mask")
    translation = truth.translation or (0.0, 0.0, 0.0)
    offset = offset_voxels(pred.voxel_size, pred.translation, truth.voxel_size, translation, rules)
    in_place = (
        pred.voxel_size is not None
        and same_voxel(pred.voxel_size, truth.voxel_size)
        and pred.shape == truth.shape
        and not any(offset)
        and (rules.official_alignment or pred.dtype.kind != "f")
    )
    if in_place and not is_instance(task.label):
        return {**score_semantic(pred, truth, mask), **voxels, "is_missing": False}
    aligned = match_geometry(
        pred[:],
        task.label,
        pred.voxel_size,
        pred.translation,
        truth.voxel_size,
        truth.shape,
        translation,
        rules,
    )
    known = None if mask is None else mask[:]
    if is_instance(task.label):
        record = score_instance(aligned, truth[:], truth.voxel_size, known, rules)
    else:
        record = score_semantic(aligned, truth, known)
    return {**record, **voxels, "is_missing": False}


def task_bytes(truths: Container, answers: Container, task: LabelTask) -> int:
    """Return an estimate of the memory that scoring one label takes; 0 where its metadata cannot be read."""
    try:
        truth = truths.array(task.crop, task.label)
        pred = None if task.answer is None else answers.array(task.answer, task.label)
        resampled = truth is not None and pred is not None and not _same_voxel_sizes(pred.voxel_size, truth.voxel_size)
    except DataError:
        return 0
    n_truth, n_pred = (0 if array is None else math.prod(array.shape) for array in (truth, pred))
    per_voxel = INSTANCE_BYTES if is_instance(task.label) else SEMANTIC_BYTES
    return max(n_truth, n_pred) * per_voxel + (n_pred * RESAMPLE_BYTES if resampled else 0)


def _same_voxel_sizes(first: Sequence[float] | None, second: Sequence[float] | None) -> bool:
    return first is None or second is None or (len(first) == len(second) and same_voxel(first, second))


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
