"""Whether labels lie where the image shows them: a comparison of EM and labels under all shifts of up to 48 voxels.

Membranes are dark, lumens bright, so the EM, smoothed and freed of slow gradients, correlates with the indicator of a
class, with one sign or the other, and most where both are in register. The normalised cross-correlations of a few
classes are computed for all shifts at once by FFT, and their squares added. A crop whose labels were displaced against
its image shows a clear maximum elsewhere; one without usable boundaries (all nucleus, or blank) shows none at all.
Arrays are (z, y, x); shifts are in voxels of the grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import fft, ndimage

from cellmap_pipe.prepare.labels import PRESENT, UNKNOWN

# Largest shift looked for, in voxels of the (binned) crop.
RANGE = 48

# Crops with more voxels are binned first: shifts of a few voxels are still found, in seconds.
MAX_VOXELS = 4 * 1024**2

# Classes compared: those with the most voxels on their rarer side have the most boundary.
MAX_CLASSES = 3
MIN_VOXELS = 500

# Least share of the known voxels that must still overlap the image for a shift to count.
MIN_OVERLAP = 0.3

# The best agreement must exceed the root mean square over all shifts this many times. Labels that have nothing to do
# with their image reach up to 5 by chance (16^3 to 64^3 voxels), real crops in place or displaced 6 to 19.
MIN_PEAK = 5.5

# A displaced maximum lies further away than this many voxels, and exceeds the value at identity this many times.
TOLERANCE = 2
MARGIN = 1.05


@dataclass(frozen=True)
class Registration:
    """How well labels and image agree in place.

    verdict: "in place", "displaced" or "not assessable". shift: (z, y, x) voxels by which the labels would have to move
    for the best agreement. best, identity: the agreement there and in place, from 0 to the root of the number of
    classes. classes: those compared.
    """

    verdict: str
    shift: tuple[int, int, int]
    best: float
    identity: float
    classes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate as JSON."""
        return {
            "verdict": self.verdict,
            "shift": list(self.shift),
            "best": round(self.best, 4),
            "identity": round(self.identity, 4),
            "classes": list(self.classes),
        }


def register(
    image: np.ndarray, label_map: np.ndarray, table: np.ndarray, classes: Sequence[str], valid: np.ndarray | None
) -> Registration:
    """Return how EM and labels agree in place and under shifts.

    image: uint8 (z, y, x). label_map: rows of the state table `table` (rows, classes), same shape. valid: bool of the
    same shape, False where the EM is not on disk or outside its box; None = valid everywhere.
    """
    step = _binning(image.shape)
    fine = tuple(slice(0, n // s * s) for n, s in zip(image.shape, step, strict=True))
    rows = label_map[fine][tuple(slice(s // 2, None, s) for s in step)]
    binned = _mean(image[fine], step)
    if valid is not None:
        binned[~valid[fine][tuple(slice(s // 2, None, s) for s in step)]] = np.nan
    voxels = np.bincount(rows.ravel(), minlength=len(table))
    sides = np.stack([[(voxels[table[:, c] == state]).sum() for state in (PRESENT, 0)] for c in range(len(classes))])
    order = np.argsort(-sides.min(axis=1), kind="stable")[:MAX_CLASSES]
    chosen = [int(c) for c in order if sides[c].min() >= MIN_VOXELS]
    names = tuple(classes[c] for c in chosen)
    image_there = np.isfinite(binned)
    if not chosen or image_there.mean() < MIN_OVERLAP or np.nanstd(binned) == 0:
        return Registration("not assessable", (0, 0, 0), 0.0, 0.0, names)
    compare = _Comparison(binned)
    agreement = sum(compare.correlation(table[:, c][rows]) ** 2 for c in chosen) ** 0.5
    at = np.unravel_index(int(agreement.argmax()), agreement.shape)
    reach = [n // 2 for n in agreement.shape]
    shift = [int(index - half) for index, half in zip(at, reach, strict=True)]
    best, identity = float(agreement[at]), float(agreement[tuple(reach)])
    counted = agreement[agreement > 0]
    level = MIN_PEAK * float(np.sqrt(np.mean(counted**2))) if counted.size else np.inf
    if best < level:
        return Registration("not assessable", (0, 0, 0), best, identity, names)
    # A peak of its own in place: the other one is another object that looks like the labelled ones. Labels that are a
    # few voxels off stand on the flank of their peak instead.
    near, around = (_highest(agreement, reach, radius) for radius in (TOLERANCE, 3 * TOLERANCE))
    displaced = max(map(abs, shift)) > TOLERANCE and best >= identity * MARGIN and (near < level or near < around)
    z, y, x = (int(part * s) for part, s in zip(shift, step, strict=True))
    return Registration("displaced" if displaced else "in place", (z, y, x), best, identity, names)


class _Comparison:
    """An image, NaN where there is none, made ready to be correlated with the states of several classes."""

    def __init__(self, image: np.ndarray) -> None:
        there = np.isfinite(image)
        smooth = _band(image, there)
        self.reach = [min(RANGE, n - 1) for n in image.shape]
        self.size = [fft.next_fast_len(n + r, real=True) for n, r in zip(image.shape, self.reach, strict=True)]
        self.image, self.energy, self.there = (self._spectrum(v) for v in (smooth, smooth**2, there))

    def correlation(self, states: np.ndarray) -> np.ndarray:
        """Return the normalised cross-correlation with a class for all shifts, float32, identity in the middle.

        states: of the image's shape. The value at index i belongs to labels moved by i - n // 2 voxels per axis, n
        being the result's (odd) size. Shifts that leave less than MIN_OVERLAP of the known voxels on the image give 0.
        """
        known = states != UNKNOWN
        indicator = np.where(known, (states == PRESENT).astype(np.float32), 0)
        indicator[known] -= indicator[known].mean()
        labels, support, label_energy = (np.conj(self._spectrum(v)) for v in (indicator, known, indicator**2))
        overlap = self._inverse(self.there * support)
        energy = self._inverse(self.energy * support) * self._inverse(self.there * label_energy)
        result = self._inverse(self.image * labels) / np.sqrt(np.maximum(energy, 1e-6))
        result[overlap < MIN_OVERLAP * max(1, int(known.sum()))] = 0
        return result

    def _spectrum(self, values: np.ndarray) -> np.ndarray:
        return fft.rfftn(values.astype(np.float32), self.size)

    def _inverse(self, values: np.ndarray) -> np.ndarray:
        full = fft.irfftn(values, self.size)
        return full[np.ix_(*(np.arange(-r, r + 1) for r in self.reach))]


def _highest(agreement: np.ndarray, centre: Sequence[int], radius: int) -> float:
    """Return the highest agreement within `radius` voxels of `centre` on every axis."""
    return float(agreement[tuple(slice(max(0, c - radius), c + radius + 1) for c in centre)].max())


def _band(image: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Return the image smoothed by a voxel, less its mean over about 24, in standard deviations; 0 where none is."""
    filled = np.where(there, image, image[there].mean()).astype(np.float32)
    band = ndimage.gaussian_filter(filled, 1.0)
    band -= ndimage.gaussian_filter(band, 12.0)
    band[~there] = 0
    return band / max(float(band[there].std()), 1e-6)


def _binning(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return the bin sizes (z, y, x) that leave at most MAX_VOXELS voxels, halving the longest axis first."""
    step = [1, 1, 1]
    while np.prod([n // s for n, s in zip(shape, step, strict=True)]) > MAX_VOXELS:
        axis = max(range(3), key=lambda a: shape[a] // step[a])
        step[axis] *= 2
    return step[0], step[1], step[2]


def _mean(volume: np.ndarray, step: Sequence[int]) -> np.ndarray:
    """Return the means over bins, float32; the shape must be divisible by `step`."""
    result: np.ndarray = volume
    for axis, s in enumerate(step):
        if s > 1:
            split = (*result.shape[:axis], result.shape[axis] // s, s, *result.shape[axis + 1 :])
            result = result.reshape(split).mean(axis=axis + 1, dtype=np.float32)
    return result.astype(np.float32)
