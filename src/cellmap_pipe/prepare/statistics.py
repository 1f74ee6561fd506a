"""Statistics of a grid's kept crops: intensities per dataset over valid EM, and how often each class is present.

Both come from the crops' records (histograms and counts by state), so no voxel is read again, and a class is counted
where it is known, by its state, never by the position of a value in an array.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cellmap_pipe.intensity import LEVELS, percentile

# The intensities that normalisation maps to 0 and 1.
PERCENTILES = (0.5, 99.5)


def summarise(grid: str, records: Iterable[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """Return what statistics.json holds: {"grid", "datasets", "classes"}.

    records: of the kept crops (prepare.convert). Per dataset: intensity percentiles, mean and standard deviation of
    the valid voxels, pooled over its crops, and their number. Per class: crops that annotate it, crops that hold it,
    voxels by state, and its share of the voxels in which it is known (null where it is known in none).
    """
    records = list(records)
    datasets = sorted({record["dataset"] for record in records})
    return {
        "grid": grid,
        "datasets": {name: _intensities([r for r in records if r["dataset"] == name]) for name in datasets},
        "classes": {name: _occurrence(name, records) for name in classes},
    }


def _intensities(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    histogram = np.zeros(LEVELS, np.int64)
    for record in records:
        histogram += np.asarray(record["em_stats"]["histogram"], np.int64)
    voxels = int(histogram.sum())
    intensities = np.arange(LEVELS)
    mean = float((histogram * intensities).sum() / voxels)
    variance = float((histogram * (intensities - mean) ** 2).sum() / voxels)
    return {
        "percentiles": {f"{q:g}": percentile(histogram, q) for q in PERCENTILES},
        "mean": round(mean, 4),
        "std": round(variance**0.5, 4),
        "voxels": voxels,
    }


def _occurrence(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = [record["counts"][name] for record in records]
    total = {state: sum(count[state] for count in counts) for state in ("present", "absent", "unknown")}
    known = total["present"] + total["absent"]
    return {
        "crops_annotated": sum(name in record["annotated"] for record in records),
        "crops_present": sum(count["present"] > 0 for count in counts),
        **total,
        "foreground_fraction": round(total["present"] / known, 8) if known else None,
    }
