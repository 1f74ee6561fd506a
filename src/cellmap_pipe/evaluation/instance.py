"""Counts and Hausdorff scores of one instance label (CHALLENGE section 4.3)."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation.components import Components
from cellmap_pipe.evaluation.hausdorff import HausdorffDistances
from cellmap_pipe.evaluation.inputs import (
    LAYER_BYTES,
    SLAB_BYTES,
    SLAB_VOXELS,
    as_array,
    check_pred,
    check_shapes,
    check_truth,
    masked,
    object_ids,
    read_slabs,
)
from cellmap_pipe.evaluation.matching import match
from cellmap_pipe.evaluation.overlap import count_overlaps, find_objects, find_runs
from cellmap_pipe.evaluation.rules import Rules, get_rules
from cellmap_pipe.evaluation.tasks import available_bytes

MAX_EDGES = 5_000_000
SKIPPED = "skipped_too_many_instances"
# Bytes of working memory per run, and per voxel of a volume with dense objects, which may fill their boxes (measured)
RUN_BYTES = 100
VOXEL_BYTES = 14


def score_instance(
    pred: Any,
    truth: Any,
    voxel_size: Sequence[float],
    mask: Any = None,
    rules: str | Rules = "csc-2026.06",
    *,
    memory_gb: float | None = None,
) -> dict[str, Any]:
    """Return the official raw record of an instance label: `score_instance_by` one version of the rules."""
    (record,) = score_instance_by(pred, truth, voxel_size, mask, (rules,), memory_gb).values()
    return record


def score_instance_by(
    pred: Any,
    truth: Any,
    voxel_size: Sequence[float],
    mask: Any = None,
    rules: Sequence[str | Rules] = ("csc-2026.06", "clean"),
    memory_gb: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the official raw records of an instance label by several versions of the rules, by their names.

    Keys: tp, fp, fn (objects), hausdorff_norm_sum, n_hausdorff, status.
    pred, truth: label arrays (z, y, x), numpy, zarr or alike, read once, slab by slab (`read_slabs`), or nested lists;
    0 is background. Predicted objects are the connected components (26 neighbours) of equal non-zero values.
    voxel_size: (z, y, x) in nm. `mask` multiplies both.
    memory_gb: working memory beyond inputs that are numpy arrays, None = as much as is fastest; of the result only
    digits beyond the seventh depend on it: distances in large boxes are then those of a tree, in float64 and not in
    float32. It does not bound what is kept of the volumes, some RUN_BYTES per run of equal voxels along x (blobs make
    0.01 to 0.1 runs per voxel of the volume, noise up to one), nor what the input itself needs to give one plane. Noise
    that the rules refuse to match anyway is not kept; of other noise, MemoryError says when it exceeds what is
    available.
    Raises DataError for arrays that cannot be compared, ConfigError for unknown rules.
    """
    versions = [get_rules(each) for each in rules]
    pred, truth, mask = as_array(pred), as_array(truth), as_array(mask)
    check_shapes(pred, truth, mask)
    if len(voxel_size) != 3 or not all(math.isfinite(v) and v > 0 for v in voxel_size):
        raise DataError(f"voxel size {list(voxel_size)} must be three positive numbers (z, y, x) in nm")
    memory = math.inf if memory_gb is None else memory_gb * 1e9
    shape = tuple(int(n) for n in truth.shape)
    ids = cache(lambda: object_ids(truth, mask, memory))

    def watch(n_runs: int, least_components: int) -> None:
        if not len(ids()) or too_many_instances(least_components, int(ids()[-1])):
            raise _SettledError
        if RUN_BYTES * n_runs > available_bytes():
            raise MemoryError(f"prediction and truth have {n_runs:,} runs along x so far, as noise has")

    try:
        runs = find_runs(_checked_slabs(pred, truth, mask, memory), shape, watch)
    except _SettledError:
        if len(ids()):
            return {each.name: skipped_record(len(ids()), each) for each in versions}
        n_pred = _count_components(_checked_slabs(pred, truth, mask, memory))
        return {each.name: _record(0, n_pred, 0, {}, _cap(shape, voxel_size), voxel_size, each) for each in versions}
    truths, preds = find_objects(runs, runs.truth), find_objects(runs, runs.pred)
    n_truth, n_pred = len(truths.ids), runs.n_pred
    rows = columns = np.zeros(0, np.int64)
    if n_truth and n_pred:
        if too_many_instances(n_pred, int(truths.ids[-1])):
            return {each.name: skipped_record(n_truth, each) for each in versions}
        rows, columns, common = count_overlaps(runs, truths, preds)
        if len(rows) > MAX_EDGES:
            return {each.name: skipped_record(n_truth, each) for each in versions}
        iou = (common / (truths.size[rows] + preds.size[columns] - common)).astype(np.float32)
        rows, columns = match(rows, columns, iou)

    cap, free = _cap(shape, voxel_size), memory - RUN_BYTES * len(runs.start)
    distance_to = HausdorffDistances(runs, truths, preds, voxel_size, cap, free)
    records = {}
    for each in versions:
        joined = _joined(truths.ids, rows, columns, n_pred, each)
        distances = {i: distance_to(i, parts) for i, parts in joined.items()}
        records[each.name] = _record(len(rows), n_pred, n_truth, distances, cap, voxel_size, each)
    return records


def unanswered(n_truth: int, shape: Sequence[int], voxel_size: Sequence[float], rules: str | Rules) -> dict[str, Any]:
    """Return the record of an all-background prediction of a crop with `n_truth` objects, as `score_instance` would.

    shape (z, y, x) in voxels of voxel_size (z, y, x) in nm.
    """
    return _record(0, 0, n_truth, {}, _cap(shape, voxel_size), voxel_size, get_rules(rules))


def instance_bytes(shape: Sequence[int], pred_itemsize: int, truth_itemsize: int) -> int:
    """Return an estimate, rather too high, of the working memory that scoring an instance label takes without limit.

    shape (z, y, x); itemsizes of the arrays' dtypes in bytes. Arrays that are read slab by slab are included, arrays in
    memory are not. With `memory_gb` it takes no more than that, and the runs.
    """
    voxels = math.prod(shape)
    slab = min(voxels, max(SLAB_VOXELS, shape[1] * shape[2]))
    layers = min(LAYER_BYTES, voxels * pred_itemsize) + min(LAYER_BYTES, voxels * truth_itemsize)
    return layers + slab * (SLAB_BYTES + pred_itemsize + truth_itemsize) + voxels * VOXEL_BYTES


def _cap(shape: Sequence[int], voxel_size: Sequence[float]) -> float:
    """Return the largest distance that counts, in nm."""
    return min(v * n for v, n in zip(voxel_size, shape, strict=True)) / 2


def _record(
    tp: int,
    n_pred: int,
    n_truth: int,
    distances: Mapping[int, float],
    cap: float,
    voxel_size: Sequence[float],
    rules: Rules,
) -> dict[str, Any]:
    """Return the raw record; distances: in nm, of the truth objects that any component answers."""
    unmatched = cap if rules.unmatched_at_cap else math.inf
    every = np.array([unmatched, *distances.values()], np.float32)
    scores = rules.normalise(every, cap, float(np.linalg.norm(np.asarray(voxel_size, np.float64))))
    n = n_truth + n_pred - tp
    return {
        "tp": tp,
        "fp": n_pred - tp,
        "fn": n_truth - tp,
        "hausdorff_norm_sum": float(scores[1:].sum() + (n - len(distances)) * scores[0]),
        "n_hausdorff": n,
        "status": "scored",
    }


def _checked_slabs(pred: Any, truth: Any, mask: Any, memory: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (truth, prediction) of each slab, times the mask. Raises DataError for values that cannot be scored."""
    for p, t, m in read_slabs((pred, truth, mask), memory):
        assert p is not None and t is not None
        check_truth(t)
        check_pred(p)
        yield (t, p) if m is None else (masked(t, m), masked(p, m))


class _SettledError(Exception):
    """No object of the prediction can be matched: how many there are is all that may count."""


def _count_components(slabs: Iterable[tuple[np.ndarray, np.ndarray]]) -> int:
    components = Components()
    for _, pred in slabs:
        components.add_counted(pred)
    return components.join()[1]


def too_many_instances(n_pred: int, largest_truth_id: int) -> bool:
    """Return whether the evaluator refuses to match: nP / nG > 10 + 50 exp(-nG / 5), nG being the largest truth id."""
    return n_pred / largest_truth_id > 10 + 50 * math.exp(-largest_truth_id / 5)


def skipped_record(n_truth: int, rules: Rules) -> dict[str, Any]:
    """Return the record of a crop that is not matched: nothing, or all of its objects missed."""
    missed = n_truth if rules.skipped_is_missed else 0
    return {"tp": 0, "fp": 0, "fn": missed, "hausdorff_norm_sum": 0.0, "n_hausdorff": missed, "status": SKIPPED}


def _joined(
    truth_ids: np.ndarray, rows: np.ndarray, columns: np.ndarray, n_pred: int, rules: Rules
) -> dict[int, list[int]]:
    """Return which components carry each truth object's number once the matched ones have been renumbered.

    Components are numbered 1..n_pred, so component k is at position k - 1. An unmatched one keeps its number k and, by
    rules with colliding ids, joins the truth object of number k.
    """
    joined = {int(i): [int(j)] for i, j in zip(rows, columns, strict=True)}
    if rules.colliding_ids:
        matched = np.zeros(n_pred + 1, bool)
        matched[columns + 1] = True
        for i in np.flatnonzero(truth_ids <= n_pred).tolist():
            k = int(truth_ids[i])
            if not matched[k]:
                joined.setdefault(i, []).append(k - 1)
    return joined
