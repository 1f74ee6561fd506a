"""Counts and Hausdorff scores of one instance label (CHALLENGE section 4.3)."""

import math
from collections.abc import Sequence
from typing import Any

import cc3d
import numpy as np

from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation.hausdorff import HausdorffDistances
from cellmap_pipe.evaluation.inputs import as_array, check_pred, check_shapes, check_truth
from cellmap_pipe.evaluation.matching import match
from cellmap_pipe.evaluation.overlap import count_overlaps, find_objects, find_runs
from cellmap_pipe.evaluation.rules import Rules, get_rules

MAX_EDGES = 5_000_000
SKIPPED = "skipped_too_many_instances"


def score_instance(
    pred: Any, truth: Any, voxel_size: Sequence[float], mask: Any = None, rules: str | Rules = "csc-2026.06"
) -> dict[str, Any]:
    """Return the official raw record of an instance label.

    Keys: tp, fp, fn (objects), hausdorff_norm_sum, n_hausdorff, status.
    pred, truth: label arrays (z, y, x); 0 is background. Predicted objects are the connected components (26 neighbours)
    of equal non-zero values. voxel_size: (z, y, x) in nm. `mask` multiplies both. Memory: a small multiple of the
    inputs. Raises DataError for arrays that cannot be compared, ConfigError for unknown rules.
    """
    rules = get_rules(rules)
    pred, truth, mask = np.asarray(as_array(pred)), np.asarray(as_array(truth)), as_array(mask)
    check_shapes(pred, truth, mask)
    check_truth(truth)
    check_pred(pred)
    if len(voxel_size) != 3 or not all(math.isfinite(v) and v > 0 for v in voxel_size):
        raise DataError(f"voxel size {list(voxel_size)} must be three positive numbers (z, y, x) in nm")
    if mask is not None:
        known = np.asarray(mask) > 0
        pred, truth = pred * known, truth * known
    components, n_pred = _components(pred)
    truth = _contiguous(truth)
    cap = min(v * n for v, n in zip(voxel_size, truth.shape, strict=True)) / 2

    runs = find_runs(truth, components)
    truths, preds = find_objects(runs, runs.truth), find_objects(runs, runs.pred)
    n_truth = len(truths.ids)
    if not n_truth or not n_pred:
        rows = columns = np.zeros(0, np.int64)
    else:
        if too_many_instances(n_pred, int(truths.ids[-1])):
            return skipped_record(n_truth, rules)
        rows, columns, common = count_overlaps(runs, truths, preds)
        if len(rows) > MAX_EDGES:
            return skipped_record(n_truth, rules)
        iou = (common / (truths.size[rows] + preds.size[columns] - common)).astype(np.float32)
        rows, columns = match(rows, columns, iou)

    distances = np.full(n_truth, cap if rules.unmatched_at_cap else np.inf, np.float32)
    distance_to = HausdorffDistances(truth, components, runs, truths, preds, voxel_size, cap)
    for i, parts in _joined(truths.ids, rows, columns, n_pred, rules).items():
        distances[i] = distance_to(i, parts)
    unmatched = np.full(n_pred - len(rows), cap if rules.unmatched_at_cap else np.inf, np.float32)
    distances = np.concatenate([distances, unmatched])
    scores = rules.normalise(distances, cap, float(np.linalg.norm(np.asarray(voxel_size, np.float64))))
    return {
        "tp": len(rows),
        "fp": n_pred - len(rows),
        "fn": n_truth - len(rows),
        "hausdorff_norm_sum": float(scores.sum()),
        "n_hausdorff": len(scores),
        "status": "scored",
    }


def score_instance_by(
    pred: Any,
    truth: Any,
    voxel_size: Sequence[float],
    mask: Any = None,
    rules: Sequence[str | Rules] = ("csc-2026.06", "clean"),
    memory_gb: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Return `score_instance` by each of several rules, by their names."""
    return {get_rules(each).name: score_instance(pred, truth, voxel_size, mask, each) for each in rules}


def too_many_instances(n_pred: int, largest_truth_id: int) -> bool:
    """Return whether the evaluator refuses to match: nP / nG > 10 + 50 exp(-nG / 5), nG being the largest truth id."""
    return n_pred / largest_truth_id > 10 + 50 * math.exp(-largest_truth_id / 5)


def skipped_record(n_truth: int, rules: Rules) -> dict[str, Any]:
    """Return the record of a crop that is not matched: nothing, or all of its objects missed."""
    missed = n_truth if rules.skipped_is_missed else 0
    return {"tp": 0, "fp": 0, "fn": missed, "hausdorff_norm_sum": 0.0, "n_hausdorff": missed, "status": SKIPPED}


def _components(pred: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the components of the prediction, numbered in the evaluator's order, and their number."""
    if pred.dtype == np.float16:
        pred = pred.astype(np.float32)
    elif pred.dtype == bool:
        pred = pred.view(np.uint8)  # cc3d 4.1 fails on some thin masks of type bool
    components, n = cc3d.connected_components(_contiguous(pred), return_N=True)
    return _contiguous(components), int(n)


def _contiguous(labels: np.ndarray) -> np.ndarray:
    """Return the array in C order and native bytes: the order of voxels decides the numbers of components."""
    return np.ascontiguousarray(labels, labels.dtype.newbyteorder("="))


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
