"""How far a score would move with other crops: its bootstrap interval."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cellmap_pipe.evaluation.challenge import aggregate


def bootstrap(records: Iterable[Mapping[str, Any]], n: int = 1000, seed: int = 0) -> dict[str, float]:
    """Return the overall score with its 95 % bootstrap interval over crops: score, low, high, crops, resamples.

    records: with `crop` and `label`. Crops are drawn with replacement, n times; a class that is in none of the drawn
    crops is left out of that draw's means, as in `aggregate`.
    """
    records = [record for record in records if record.get("status") != "failed"]
    crops = sorted({record["crop"] for record in records})
    score = aggregate(records)["overall_score"]
    if not crops:
        return {"score": score, "low": 0.0, "high": 0.0, "crops": 0, "resamples": 0}
    draws = np.random.default_rng(seed).multinomial(len(crops), [1 / len(crops)] * len(crops), size=n)
    means: dict[str, list[np.ndarray]] = {"combined": [], "iou": []}
    for label in sorted({record["label"] for record in records}):
        table = np.zeros((len(crops), 6))
        instance = False
        for record in records:
            if record["label"] == label:
                instance = "n_hausdorff" in record
                row = [record["tp"], record["fp"], record["fn"]]
                row += [record.get("hausdorff_norm_sum", 0.0), record.get("n_hausdorff", 0), 1]
                table[crops.index(record["crop"])] += row
        tp, fp, fn, total, count, seen = (draws @ table).T
        with np.errstate(divide="ignore", invalid="ignore"):
            if instance:
                f1 = np.where(tp + fp + fn > 0, 2 * tp / (2 * tp + fp + fn), np.where(count > 0, 0.0, 1.0))
                distance = np.where(count > 0, total / count, np.where(tp + fp + fn > 0, 0.0, 1.0))
                values = np.sqrt(f1 * distance)
            else:
                values = np.where(tp + fp + fn > 0, tp / (tp + fp + fn), 1.0)
        means["combined" if instance else "iou"].append(np.where(seen > 0, values, np.nan))
    overall = np.ones(n)
    for values in means.values():
        stacked = np.array(values) if values else np.zeros((0, n))
        seen = np.count_nonzero(~np.isnan(stacked), axis=0)
        overall *= np.where(seen > 0, np.nansum(stacked, axis=0) / np.maximum(seen, 1), 0.0)
    low, high = np.percentile(np.sqrt(overall), [2.5, 97.5])
    return {"score": score, "low": float(low), "high": float(high), "crops": len(crops), "resamples": n}
