"""Plain, slow scoring by CHALLENGE sections 4.3-4.7, to test the fast one against: loops, no distance transforms.

Only for volumes of a few thousand voxels with a handful of objects.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import product

import numpy as np

Volume = np.ndarray
Matching = dict[int, int]  # predicted component -> truth id


def components(pred: Volume) -> tuple[Volume, int]:
    """Return 26-connected components of equal non-zero values, numbered in the order in which a scan meets them."""
    result = np.zeros(pred.shape, int)
    n = 0
    steps = [step for step in product((-1, 0, 1), repeat=3) if any(step)]
    for start in np.ndindex(pred.shape):
        if not pred[start] or result[start]:
            continue
        n += 1
        result[start] = n
        queue = deque([start])
        while queue:
            voxel = queue.popleft()
            for step in steps:
                near = tuple(v + s for v, s in zip(voxel, step, strict=True))
                inside = all(0 <= v < size for v, size in zip(near, pred.shape, strict=True))
                if inside and pred[near] == pred[start] and not result[near]:
                    result[near] = n
                    queue.append(near)
    return result, n


def best_matchings(truth: Volume, pred: Volume, n_pred: int) -> list[Matching]:
    """Return every assignment of least cost: int((1 - IoU) 1e6) per match, 1,000,001 per unmatched truth id."""
    ids = [int(t) for t in np.unique(truth) if t]
    cost: dict[tuple[int, int], int] = {}
    for t, p in product(ids, range(1, n_pred + 1)):
        a, b = truth == t, pred == p
        common = int((a & b).sum())
        if common:
            iou = np.float32(common / int((a | b).sum()))
            cost[t, p] = int((1.0 - float(iou)) * 1e6)

    def assignments(rest: list[int], used: frozenset[int]) -> Iterator[tuple[int, Matching]]:
        if not rest:
            yield 0, {}
            return
        for total, matching in assignments(rest[1:], used):
            yield total + 1_000_001, matching
        for p in range(1, n_pred + 1):
            if (rest[0], p) in cost and p not in used:
                for total, matching in assignments(rest[1:], used | {p}):
                    yield total + cost[rest[0], p], {**matching, p: rest[0]}

    every = list(assignments(ids, frozenset()))
    least = min(total for total, _ in every)
    return [matching for total, matching in every if total == least]


def hausdorff(a: Volume, b: Volume, voxel_nm: tuple[float, ...], cap: float) -> float:
    """Return the larger directed distance between all voxels of two sets, at most the cap; infinity if b is empty."""
    if not b.any():
        return math.inf
    first, second = np.argwhere(a) * np.array(voxel_nm), np.argwhere(b) * np.array(voxel_nm)
    distance = np.sqrt(((first[:, None] - second[None]) ** 2).sum(-1))
    return min(float(max(distance.min(1).max(), distance.min(0).max())), cap)


def normalised(distance: float, cap: float, voxel_nm: tuple[float, ...], rules: str) -> float:
    """Return the score in [0, 1] of a distance; infinity is that of an object without counterpart."""
    diagonal = math.sqrt(sum(v * v for v in voxel_nm))
    if rules.startswith("csc-2026.07"):
        if math.isinf(distance):
            return 0.0
        if rules.endswith("exponential"):
            return 0.1 ** (distance / cap)
        at_cap = 1.01 ** (-cap / diagonal)
        return 0.1 + 0.9 * (1.01 ** (-distance / diagonal) - at_cap) / (1 - at_cap)
    return 1.01 ** (-min(distance, cap) / diagonal)


def instance_records(pred: Volume, truth: Volume, voxel_nm: tuple[float, ...], rules: str) -> list[dict]:
    """Return the records that the rules allow: one per assignment of least cost."""
    pred, n_pred = components(pred)
    ids = [int(t) for t in np.unique(truth) if t]
    largest = max(ids, default=0)
    cap = min(v * s for v, s in zip(voxel_nm, truth.shape, strict=True)) / 2
    if largest and n_pred and n_pred / largest > 10 + 50 * math.exp(-largest / 5):
        missed = len(ids) if rules == "clean" else 0
        status = "skipped_too_many_instances"
        return [{"tp": 0, "fp": 0, "fn": missed, "hausdorff_norm_sum": 0.0, "n_hausdorff": missed, "status": status}]
    matchings = best_matchings(truth, pred, n_pred) if largest and n_pred else [{}]
    records = []
    for matching in matchings:
        renumbered = np.zeros(pred.shape, int)
        for p in range(1, n_pred + 1):
            if p in matching:
                renumbered[pred == p] = matching[p]
            elif rules == "csc-2026.06":
                renumbered[pred == p] = p
        distances = [hausdorff(truth == t, renumbered == t, voxel_nm, cap) for t in ids]
        distances += [math.inf] * (n_pred - len(matching))
        total = sum(normalised(float(np.float32(d)), cap, voxel_nm, rules) for d in distances)
        records.append(
            {
                "tp": len(matching),
                "fp": n_pred - len(matching),
                "fn": len(ids) - len(matching),
                "hausdorff_norm_sum": total,
                "n_hausdorff": len(distances),
                "status": "scored",
            }
        )
    return records


def semantic_record(pred: Volume, truth: Volume) -> dict:
    """Return the counts of a semantic label, voxel by voxel."""
    record = {"tp": 0, "fp": 0, "fn": 0, "status": "scored"}
    for index in np.ndindex(truth.shape):
        p, t = pred[index] > 0, truth[index] > 0
        record["tp"] += int(p and t)
        record["fp"] += int(p and not t)
        record["fn"] += int(t and not p)
    return record


def overall(records: Mapping[str, Mapping[str, Mapping]]) -> tuple[dict[str, float], float, float, float]:
    """Return the score per class (combined or IoU), and the instance, semantic and overall scores."""
    labels = sorted({label for crop in records.values() for label in crop})
    scores, instance, semantic = {}, [], []
    for label in labels:
        found = [crop[label] for crop in records.values() if label in crop]
        tp, fp, fn = (sum(record[key] for record in found) for key in ("tp", "fp", "fn"))
        if "n_hausdorff" not in found[0]:
            scores[label] = tp / (tp + fp + fn) if tp + fp + fn else 1.0
            semantic.append(scores[label])
            continue
        total = sum(record["hausdorff_norm_sum"] for record in found)
        n = sum(record["n_hausdorff"] for record in found)
        if tp + fp + fn == 0 and n == 0:
            scores[label] = 1.0
        elif tp + fp + fn == 0 or n == 0:
            scores[label] = 0.0
        else:
            scores[label] = math.sqrt(2 * tp / (2 * tp + fp + fn) * total / n)
        instance.append(scores[label])
    means = [sum(values) / len(values) if values else 0.0 for values in (instance, semantic)]
    return scores, means[0], means[1], math.sqrt(means[0] * means[1])
