"""How far a score would move with other crops: its bootstrap interval."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellmap_pipe.evaluation.challenge import aggregate

PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Resampled:
    """Scores of every label over n draws of as many crops as there are, with replacement.

    draws: {label: score of each draw (n,), NaN where none of the drawn crops has a record of it}. instance: the labels
    scored by instance. n_crops: crops with a record, by label. crops: all of them.
    """

    draws: dict[str, np.ndarray]
    instance: frozenset[str]
    n_crops: dict[str, int]
    crops: int


def resample(records: Sequence[Mapping[str, Any]], n: int, seed: int) -> Resampled:
    """Return the scores of the labels over n draws of the records' crops (CHALLENGE section 4.7 for each draw).

    records: with `crop` and `label`, none of them failed, at least one.
    """
    return _weighted(records, lambda size: np.random.default_rng(seed).multinomial(size, [1 / size] * size, size=n))


def leave_one_out(records: Sequence[Mapping[str, Any]]) -> Resampled:
    """Return the scores of the labels without each of the crops in turn, in the order of their names.

    records: as for `resample`, of at least two crops.
    """
    return _weighted(records, lambda size: 1 - np.eye(size))


def _weighted(records: Sequence[Mapping[str, Any]], times_of: Callable[[int], np.ndarray]) -> Resampled:
    """Return the scores where each crop counts as often as `times_of` (number of crops) says, as (draws, crops)."""
    crops = {crop: i for i, crop in enumerate(sorted({record["crop"] for record in records}))}
    labels = {label: i for i, label in enumerate(sorted({record["label"] for record in records}))}
    counts = np.zeros((len(crops), len(labels), 6))
    instance = set()
    for record in records:
        row = [record["tp"], record["fp"], record["fn"]]
        row += [record.get("hausdorff_norm_sum", 0.0), record.get("n_hausdorff", 0), 1]
        counts[crops[record["crop"]], labels[record["label"]]] += row
        if "n_hausdorff" in record:
            instance.add(record["label"])
    times = times_of(len(crops)).astype(float)
    draws = {}
    for label, i in labels.items():
        tp, fp, fn, total, distances, seen = (times @ counts[:, i]).T
        with np.errstate(divide="ignore", invalid="ignore"):
            if label in instance:
                f1 = np.where(tp + fp + fn > 0, 2 * tp / (2 * tp + fp + fn), np.where(distances > 0, 0.0, 1.0))
                distance = np.where(distances > 0, total / distances, np.where(tp + fp + fn > 0, 0.0, 1.0))
                values = np.sqrt(f1 * distance)
            else:
                values = np.where(tp + fp + fn > 0, tp / (tp + fp + fn), 1.0)
        draws[label] = np.where(seen > 0, values, np.nan)
    n_crops = {label: int(np.count_nonzero(counts[:, i, 5])) for label, i in labels.items()}
    return Resampled(draws, frozenset(instance), n_crops, len(crops))


def overall(instance: Sequence[np.ndarray], semantic: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Return the overall score of each of n draws: root of the product of the means over the classes of each kind.

    instance, semantic: scores of each class per draw (n,), NaN where the draw says nothing of it; those are left out of
    that draw's mean, and a kind of which nothing is seen scores 0.
    """
    product = np.ones(n)
    for values in (instance, semantic):
        stacked = np.array(values).reshape(-1, n)
        seen = np.count_nonzero(~np.isnan(stacked), axis=0)
        product *= np.where(seen > 0, np.nansum(stacked, axis=0) / np.maximum(seen, 1), 0.0)
    return np.sqrt(product)


def bootstrap(records: Iterable[Mapping[str, Any]], n: int = 1000, seed: int = 0) -> dict[str, float]:
    """Return the overall score with its 95 % bootstrap interval over crops: score, low, high, crops, resamples.

    records: with `crop` and `label`. Crops are drawn with replacement, n times; a class that is in none of the drawn
    crops is left out of that draw's means, as in `aggregate`.
    """
    records = [record for record in records if record.get("status") != "failed"]
    score = aggregate(records)["overall_score"]
    if not records:
        return {"score": score, "low": 0.0, "high": 0.0, "crops": 0, "resamples": 0}
    resampled = resample(records, n, seed)
    kinds: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for label, values in resampled.draws.items():
        kinds[label in resampled.instance].append(values)
    low, high = np.percentile(overall(kinds[True], kinds[False], n), PERCENTILES)
    return {"score": score, "low": float(low), "high": float(high), "crops": resampled.crops, "resamples": n}
