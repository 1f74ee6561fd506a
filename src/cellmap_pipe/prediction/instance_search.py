"""Which processing of an instance class scores best: many settings on the probabilities of one crop at once.

Settings that differ only in the smallest size share their objects: these are found and compared with the truth once,
and each size only drops some of them. Distances cost more than the rest together, so they are measured for chosen
settings alone.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from cellmap_pipe.evaluation.inputs import check_shapes, check_truth
from cellmap_pipe.evaluation.instance import MAX_EDGES, score_instance, skipped_record, too_many_instances
from cellmap_pipe.evaluation.matching import match
from cellmap_pipe.evaluation.overlap import count_overlaps, find_runs
from cellmap_pipe.evaluation.overlap import find_objects as objects_in_runs
from cellmap_pipe.evaluation.rules import Rules, get_rules
from cellmap_pipe.evaluation.tasks import run_tasks
from cellmap_pipe.geometry import Lattice, shape3, vec3
from cellmap_pipe.prediction.instances import find_objects, smallest_object
from cellmap_pipe.prediction.postprocess import above
from cellmap_pipe.prediction.processing import Processing

Found = TypeVar("Found")

# What is tried of each class, beside its default
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
SPLITS = (0.0, 0.5, 1.0, 2.0)
SIZES = (0.0, *(2.0**k for k in range(-3, 6)))
# Voxels of the smallest object from which the others follow where the default has no smallest size
USUAL_VOXELS = 50
# Bytes of working memory per voxel of a crop (measured, with a margin), the copies that processes get included
BYTES_PER_VOXEL = 72


@dataclass(frozen=True)
class Table:
    """Counts of every setting on one crop, as the challenge counts them.

    tp, fp, fn: objects, int64, one per setting. skipped: whether the evaluator refuses to match (bool).
    n_truth: objects of the truth.
    """

    settings: tuple[Processing, ...]
    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    skipped: np.ndarray
    n_truth: int


def candidates(default: Processing, voxel_nm: Sequence[float]) -> list[Processing]:
    """Return the settings to try for an instance class, the default first, each once.

    The default's holes with every combination of: thresholds 0.3 to 0.7 and the default's; split_nm of 0, 1/2, 1 and
    2 times r0; smallest sizes of 0, 1/8, 1/4, ... 32 times s0. s0 is the default's smallest size, or USUAL_VOXELS
    voxels of voxel_nm (z, y, x); r0 is the radius of a ball of s0.
    """
    s0 = default.min_size_nm3 or USUAL_VOXELS * math.prod(voxel_nm)
    r0 = (3 * s0 / (4 * math.pi)) ** (1 / 3)
    tried = [
        Processing(threshold, default.hole_nm3, split * r0, size * s0)
        for threshold in sorted({*THRESHOLDS, default.threshold})
        for split in SPLITS
        for size in SIZES
    ]
    return list(dict.fromkeys([default, *tried]))


def search_table(
    probabilities: np.ndarray,
    truth: np.ndarray,
    known: np.ndarray | None,
    voxel_nm: Sequence[float],
    settings: Sequence[Processing],
    rules: str | Rules,
    *,
    workers: int = 1,
    memory_gb: float | None = None,
) -> Table:
    """Return the counts that `score_instance` would give for every setting, without distances.

    probabilities: 255 p, uint8 or float32 (z, y, x). truth: ids on the same voxels. known: where the truth is known,
    None = everywhere; it multiplies both. voxel_nm: (z, y, x). workers: processes, within memory_gb together.
    Raises DataError for arrays that cannot be compared.
    """
    check_shapes(probabilities, truth, known)
    check_truth(truth)
    rules = get_rules(rules)
    if known is not None:
        truth = truth * (known > 0)
    truth = np.ascontiguousarray(truth)
    tasks = [_Task(probabilities, truth, known, vec3(voxel_nm), group, rules.name) for group in _groups(settings)]
    rows = _by_setting(_count, tasks, workers, memory_gb)
    tp, fp, fn, skipped, n_truth = (np.array(column) for column in zip(*(rows[how] for how in settings), strict=True))
    return Table(tuple(settings), tp, fp, fn, skipped.astype(bool), int(n_truth[0]))


def rank(tables: Mapping[str, Table], crops: Iterable[str]) -> np.ndarray:
    """Return the positions of the settings, the best first, by their F1 pooled over `crops`.

    tables: by crop, of the same settings. Equally good settings stay in their order. A crop that the evaluator would
    skip counts as all missed, whatever the rules: else a search would seek to be skipped.
    """
    chosen = [tables[crop] for crop in crops]
    tp = sum(table.tp for table in chosen)
    wrong = sum(table.fp + np.where(table.skipped, table.n_truth, table.fn) for table in chosen)
    with np.errstate(invalid="ignore"):
        f1 = np.where(tp + wrong > 0, 2 * tp / (2 * tp + wrong), 1.0)
    return np.argsort(-f1, kind="stable")


def full_records(
    probabilities: np.ndarray,
    truth: np.ndarray,
    known: np.ndarray | None,
    voxel_nm: Sequence[float],
    settings: Sequence[Processing],
    rules: str | Rules,
    *,
    workers: int = 1,
    memory_gb: float | None = None,
) -> list[dict[str, Any]]:
    """Return the record of `score_instance`, with distances, of every setting; the arguments are `search_table`'s."""
    rules = get_rules(rules)
    tasks = [_Task(probabilities, truth, known, vec3(voxel_nm), group, rules.name) for group in _groups(settings)]
    records = _by_setting(_score, tasks, workers, memory_gb)
    return [records[how] for how in settings]


@dataclass(frozen=True)
class _Task:
    """Settings that differ in nothing but the smallest size, and the arrays of the crop."""

    probabilities: np.ndarray
    truth: np.ndarray
    known: np.ndarray | None
    voxel_nm: tuple[float, float, float]
    settings: tuple[Processing, ...]
    rules: str


def _by_setting(
    function: Callable[[_Task], dict[Processing, Found]],
    tasks: Sequence[_Task],
    workers: int,
    memory_gb: float | None,
) -> dict[Processing, Found]:
    """Return what `function` finds for the settings of all tasks, in parallel processes."""
    costs = [BYTES_PER_VOXEL * task.truth.size for task in tasks]
    found: dict[Processing, Found] = {}
    for _, of_task in run_tasks(function, tasks, costs, workers, memory_gb):
        found.update(of_task)
    return found


def _groups(settings: Sequence[Processing]) -> list[tuple[Processing, ...]]:
    groups: dict[Processing, list[Processing]] = {}
    for how in dict.fromkeys(settings):
        groups.setdefault(replace(how, min_size_nm3=0.0), []).append(how)
    return [tuple(group) for group in groups.values()]


def _objects(task: _Task) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of the objects of all sizes (z, y, x), and by id their size in voxels."""
    how = replace(task.settings[0], min_size_nm3=0.0)
    mask = partial(_planes, task.probabilities, how.threshold)
    lattice = Lattice(task.voxel_nm, (0, 0, 0), shape3(task.probabilities.shape))
    with find_objects(mask, lattice, how) as objects:
        ids = objects.ids(0, lattice.shape[0])
        return ids, np.bincount(ids.reshape(-1), minlength=objects.count + 1)


def _planes(probabilities: np.ndarray, threshold: float, first: int, last: int) -> np.ndarray:
    return above(probabilities[first:last], threshold)


def _count(task: _Task) -> dict[Processing, tuple[int, int, int, bool, int]]:
    """Return tp, fp, fn, skipped and the number of truth objects by setting."""
    ids, voxels = _objects(task)
    if task.known is not None:
        ids = ids * (task.known > 0)
    runs = find_runs([(task.truth, ids)], shape3(task.truth.shape))
    truths, preds = objects_in_runs(runs, runs.truth), objects_in_runs(runs, runs.pred)
    rows, columns, common = count_overlaps(runs, truths, preds)
    iou = (common / (truths.size[rows] + preds.size[columns] - common)).astype(np.float32)
    # the size that counts is that of the whole object, of which unknown voxels may leave several components
    first_voxel = runs.start[preds.order[preds.first[:-1]]]
    size = voxels[ids.reshape(-1)[first_voxel]]
    n_truth, rules = len(truths.ids), get_rules(task.rules)
    result = {}
    for how in task.settings:
        kept = size >= smallest_object(how.min_size_nm3, task.voxel_nm)
        n_pred = int(np.count_nonzero(kept))
        edges = kept[columns]
        skipped = bool(n_truth and n_pred) and (
            too_many_instances(n_pred, int(truths.ids[-1])) or int(np.count_nonzero(edges)) > MAX_EDGES
        )
        if skipped:
            result[how] = (0, 0, int(skipped_record(n_truth, rules)["fn"]), True, n_truth)
        else:
            tp = len(match(rows[edges], columns[edges], iou[edges])[0])
            result[how] = (tp, n_pred - tp, n_truth - tp, False, n_truth)
    return result


def _score(task: _Task) -> dict[Processing, dict[str, Any]]:
    ids, voxels = _objects(task)
    records = {}
    for how in task.settings:
        kept = voxels >= smallest_object(how.min_size_nm3, task.voxel_nm)
        chosen = ids * kept[ids]
        records[how] = score_instance(chosen, task.truth, task.voxel_nm, task.known, task.rules)
    return records
