"""How stored uint8 intensities become a network's input: one table per dataset, used in training and prediction alike.

The constants are those of a dataset's valid voxels (EM on disk), never of one crop or patch: a patch's own range would
hide exactly the differences in brightness that tell lumen from membrane.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

LEVELS = 256

# The percentiles of a dataset's valid voxels that become 0 and 1, for each normalisation that is measured.
MEASURED: Mapping[str, tuple[float, float]] = {"percentile": (0.5, 99.5), "range": (0.0, 100.0)}

# One of MEASURED, "uint8/255", or the two intensities themselves: `train.normalisation` of config.yaml.
Normalisation = str | Sequence[float]


def percentile(histogram: Sequence[int] | npt.NDArray[np.integer], q: float) -> float:
    """Return percentile `q` (0 to 100) of the uint8 voxels that `histogram` counts, as numpy's default does.

    histogram: 256 counts, one per intensity. Between two order statistics the value is interpolated linearly.
    Raises ValueError if nothing was counted.
    """
    counts = np.asarray(histogram, dtype=np.int64)
    if counts.shape != (LEVELS,):
        raise ValueError(f"expected a histogram of {LEVELS} counts, got shape {counts.shape}")
    cumulative = np.cumsum(counts)
    total = int(cumulative[-1])
    if total == 0:
        raise ValueError("the histogram is empty: it has no percentiles")
    rank = q / 100 * (total - 1)
    below = int(np.floor(rank))
    above = min(below + 1, total - 1)
    low, high = np.searchsorted(cumulative, [below, above], side="right")
    return float(low + (high - low) * (rank - below))


def is_measured(normalisation: Normalisation) -> bool:
    """Return whether the constants of a normalisation depend on the dataset."""
    return isinstance(normalisation, str) and normalisation in MEASURED


def intensity_range(
    histogram: Sequence[int] | npt.NDArray[np.integer], normalisation: Normalisation
) -> tuple[float, float]:
    """Return the stored intensities that become 0 and 1, for the dataset whose valid voxels `histogram` counts.

    normalisation: "percentile" (0.5 and 99.5), "range" (the least and the greatest), "uint8/255", or two intensities;
    the last two hold whatever was counted. Raises ValueError if they are to be measured and nothing was counted.
    """
    if normalisation == "uint8/255":
        return 0.0, float(LEVELS - 1)
    if isinstance(normalisation, str):
        lower, upper = MEASURED[normalisation]
        return percentile(histogram, lower), percentile(histogram, upper)
    lo, hi = normalisation
    return float(lo), float(hi)


def lookup_table(lo: float, hi: float) -> npt.NDArray[np.float32]:
    """Return the network's input for each stored intensity: float32 (256,), clip((i - lo) / max(hi - lo, 1), 0, 1).

    The range is at least one intensity wide, so a nearly constant dataset is not blown up into noise.
    """
    intensities = np.arange(LEVELS, dtype=np.float64)
    return np.clip((intensities - lo) / max(hi - lo, 1.0), 0.0, 1.0).astype(np.float32)
