"""Statistics of a grid's kept crops: intensities per dataset over valid EM, and how often each class is present.

Both come from the crops' records (histograms and counts by state), so no voxel is read again, and a class is counted
where it is known, by its state, never by the position of a value in an array. Records are taken one at a time.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cellmap_pipe.intensity import LEVELS, MEASURED, intensity_range

STATES = ("present", "absent", "unknown")


def summarise(grid: str, records: Iterable[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """Return what statistics.json holds, from one pass over the records of the kept crops (prepare.convert).

    grid: its name. datasets: by name, intensity ranges (`intensity.MEASURED`), mean and standard deviation of the valid
    voxels, pooled over its crops, and their number. classes: see `_occurrence`. supervised_pairs: known pairs of voxel
    and class, all classes together. overlaps: by pair "a+b", voxels that two disjoint classes claim. contradictions:
    "crop: sentence".
    """
    histograms: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(LEVELS, np.int64))
    figures = {name: Counter[str]() for name in classes}
    overlaps: Counter[str] = Counter()
    contradictions = []
    for record in records:
        histograms[record["dataset"]] += np.asarray(record["em_stats"]["histogram"], np.int64)
        for name in classes:
            _count(figures[name], record, name)
        overlaps.update(record["overlaps"])
        contradictions += [f"{record['crop']}: {sentence}" for sentence in record["contradictions"]]
    return {
        "grid": grid,
        "datasets": {name: _intensities(histograms[name]) for name in sorted(histograms)},
        "classes": {name: _occurrence(figures[name]) for name in classes},
        "supervised_pairs": sum(figure["present"] + figure["absent"] for figure in figures.values()),
        "overlaps": {pair: overlaps[pair] for pair in sorted(overlaps) if overlaps[pair]},
        "contradictions": contradictions,
    }


def _intensities(histogram: np.ndarray) -> dict[str, Any]:
    voxels = int(histogram.sum())
    intensities = np.arange(LEVELS)
    mean = float((histogram * intensities).sum() / voxels)
    variance = float((histogram * (intensities - mean) ** 2).sum() / voxels)
    return {
        "ranges": {name: list(intensity_range(histogram, name)) for name in MEASURED},
        "mean": round(mean, 4),
        "std": round(variance**0.5, 4),
        "voxels": voxels,
    }


def is_true_negative(record: Mapping[str, Any], name: str) -> bool:
    """Return whether a crop (record of prepare.convert) says that it has nothing of a class.

    No voxel of the grid is of the class, and the crop either annotates it, with a voxel known to be of something else,
    or leaves no voxel unknown (arrays of other classes exclude it everywhere).
    """
    count = record["counts"][name]
    if count["present"] or not count["absent"]:
        return False
    return name in record["annotated"] or not count["unknown"]


def _count(figure: Counter[str], record: Mapping[str, Any], name: str) -> None:
    """Add the voxels by state of one class in one crop to its figure."""
    count, annotated = record["counts"][name], name in record["annotated"]
    figure.update({state: count[state] for state in STATES})
    if not annotated:
        figure["inferred"] += count["present"] + count["absent"]
    figure["crops_annotated"] += annotated
    figure["crops_present"] += count["present"] > 0
    figure["crops_absent"] += is_true_negative(record, name)


def _occurrence(figure: Mapping[str, int]) -> dict[str, Any]:
    """Return how often a class occurs.

    crops_annotated: crops that hold an array of it. crops_present: crops with a voxel of it. crops_absent: true
    negatives (`is_true_negative`). present, absent, unknown: voxels of
    the grid. supervised: present + absent; inferred: those of them in crops that do not annotate the class itself.
    foreground_fraction: present / supervised, null if nothing is. imbalance: absent / present, null if none is present.
    """
    present, absent = figure["present"], figure["absent"]
    supervised = present + absent
    return {
        **{key: figure[key] for key in ("crops_annotated", "crops_present", "crops_absent", *STATES)},
        "supervised": supervised,
        "inferred": figure["inferred"],
        "foreground_fraction": round(present / supervised, 8) if supervised else None,
        "imbalance": round(absent / present, 4) if present else None,
    }
