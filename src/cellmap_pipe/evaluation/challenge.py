"""The challenge score: records of every (crop, label), pooled per class, and the formulas on the pools."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cellmap_pipe.evaluation.alignment import is_instance
from cellmap_pipe.evaluation.inputs import as_array, object_ids

Record = dict[str, Any]
Records = Mapping[str, Mapping[str, Mapping[str, Any]]] | Iterable[Mapping[str, Any]]


def missing_label(truth: Any, label: str) -> Record:
    """Return the record of a label that was not submitted (CHALLENGE section 4.6).

    truth: array (z, y, x), numpy or zarr. Every truth object is missed, or, for a semantic label, every voxel of the
    crop, even where the truth is empty. Raises DataError for a truth that cannot be scored.
    """
    truth = as_array(truth)
    voxels = int(math.prod(truth.shape))
    if not is_instance(label):
        return {"tp": 0, "fp": 0, "fn": voxels, "status": "missing", "is_missing": True, "num_voxels": voxels}
    n = len(object_ids(truth))
    return {
        "tp": 0,
        "fp": 0,
        "fn": n,
        "hausdorff_norm_sum": 0.0,
        "n_hausdorff": n,
        "status": "missing",
        "is_missing": True,
        "num_voxels": voxels,
    }


def aggregate(records: Records, include_missing: bool = True) -> dict[str, Any]:
    """Return the scores per class and overall (CHALLENGE section 4.7).

    records: {crop: {label: record}}, or records that name their `label`. Counts are pooled per class over the crops;
    the overall scores are plain means over classes, and their geometric mean. Records that failed are left out,
    missing ones unless `include_missing`.
    Result: label_scores {label: {f1, normalized_hausdorff_distance, combined_score | iou, tp, fp, fn}},
    overall_instance_score, overall_semantic_score, overall_score.
    """
    pools: dict[str, dict[str, float]] = {}
    for label, record in iterate(records):
        if record.get("status") == "failed" or (record.get("is_missing") and not include_missing):
            continue
        pool = pools.setdefault(label, {"tp": 0, "fp": 0, "fn": 0})
        for key in ("tp", "fp", "fn"):
            pool[key] += record[key]
        if "n_hausdorff" in record:
            pool["sum"] = pool.get("sum", 0.0) + record["hausdorff_norm_sum"]
            pool["n"] = pool.get("n", 0) + record["n_hausdorff"]
    label_scores = {label: _class_score(pool) for label, pool in sorted(pools.items())}
    instance = [score["combined_score"] for score in label_scores.values() if "combined_score" in score]
    semantic = [score["iou"] for score in label_scores.values() if "iou" in score]
    overall_instance = sum(instance) / len(instance) if instance else 0.0
    overall_semantic = sum(semantic) / len(semantic) if semantic else 0.0
    return {
        "label_scores": label_scores,
        "overall_instance_score": overall_instance,
        "overall_semantic_score": overall_semantic,
        "overall_score": math.sqrt(overall_instance * overall_semantic),
    }


def _class_score(pool: Mapping[str, float]) -> dict[str, float]:
    tp, fp, fn = pool["tp"], pool["fp"], pool["fn"]
    counts = {"tp": tp, "fp": fp, "fn": fn}
    if "n" not in pool:
        return {"iou": tp / (tp + fp + fn) if tp + fp + fn else 1.0, **counts}
    if not tp + fp + fn and not pool["n"]:
        f1 = distance = 1.0
    else:
        f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
        distance = pool["sum"] / pool["n"] if pool["n"] else 0.0
    return {
        "f1": f1,
        "normalized_hausdorff_distance": distance,
        "combined_score": math.sqrt(f1 * distance),
        **counts,
    }


def iterate(records: Records) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (label, record) of either form of records; entries that are no records (overall scores) are passed over."""
    if not isinstance(records, Mapping):
        for record in records:
            yield record["label"], record
        return
    for crop in records.values():
        if isinstance(crop, Mapping):
            for label, record in crop.items():
                if isinstance(record, Mapping) and ("status" in record or "is_missing" in record):
                    yield label, record
