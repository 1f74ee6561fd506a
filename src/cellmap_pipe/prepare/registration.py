"""Whether labels lie where the image shows them, at the right scale: EM compared with the boundaries of its labels.

Grey values change where classes do. EM and the indicators of a few classes, both freed of all that is wider than a few
voxels (what is left of an indicator is its boundary), are correlated for all shifts at once by FFT, and the squares of
the classes' correlations added; the sign of a class does not matter. The same is done with the image binned
by two (labels that cover twice the image's field of view) and with the labels binned by two (half of it). A
crop whose labels belong elsewhere, or to another scale, shows its peak there; one without usable boundaries (all
nucleus, or blank) shows none. A large crop is compared as a whole in bins, which finds scale and far shifts, and again
unbinned in the boxes with the most boundary, which finds shifts of few voxels.
Arrays are (z, y, x); shifts are in voxels of the grid.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import fft, ndimage

from cellmap_pipe.geometry import Vec3
from cellmap_pipe.prepare.labels import ABSENT, PRESENT, UNKNOWN

# Largest shift looked for, in voxels of the grid; other scales: how far labels may stick out of the image's field.
RANGE = 48
OUTSIDE = 4

# Larger crops are binned for the search over scales and far shifts, and looked at unbinned in so many boxes.
MAX_VOXELS = 4 * 1024**2
BOX = 128
BOXES = 2

# Classes compared: those with the most voxels on their rarer side have the most boundary.
MAX_CLASSES = 4
MIN_VOXELS = 200

# Standard deviations (voxels) of the Gaussians whose difference both sides are filtered with. Scales take the sharper
# pair: injected scale errors then peak at 7 to 23 times the chance level, not at 5 to 10. Shifts
# take the softer one: the sharper one puts the roughly drawn labels of real crops up to 3 voxels off, this one 1.4;
# where it shows no peak (small crops) the sharper one is asked.
SHIFT_BAND = (1.0, 3.0)
SCALE_BAND = (0.3, 2.0)

# Least share of the labels' boundary that must overlap the image for a shift to count.
MIN_OVERLAP = 0.3

# Least peak, in multiples of the chance level, for a verdict. Crops in place reach 5.9 (36^3 voxels) to 15 in synthetic
# cells (208 crops) and 12 to 58 in real EM (9 crops); scales that are wrong reach 3.5 to 5.4 there (166 surfaces), and
# labels that show another cell 5.7 to 10.
MIN_PEAK = 5.5

# A scale error must beat the best shift by SCALE_MARGIN, and be higher than wrong scales mostly get by chance, or else
# lead the next peak of its own scale, APART bins away: wrong scales do so 1.0 to 1.24 times (166 surfaces).
CERTAIN_SCALE_PEAK = 7.3
SCALE_MARGIN = 1.1
LEAD = 1.2
APART = 4

# A displaced peak is further away than this (Euclidean, in voxels) and higher than the agreement in place by this
# factor. Real crops in place peak up to 1.4 voxels away, 1.06 times as high.
TOLERANCE = 1.8
MARGIN = 1.02

# One class has few boundaries, and how roughly they were drawn decides. Of 2,340 boxes of 20 to 48 voxels a side that
# were cut out of real crops in place, 63 with one class peaked elsewhere, 3 with two; of 1,087 with one class and 48 to
# 96 voxels a side 58 did, all but one of them at most 6.8 voxels away. Whole crops (1.3 million voxels and more) did
# not. So a lone class in a small crop is displaced beyond this alone, and rescaled only by a CERTAIN_SCALE_PEAK.
LONE_VOXELS = 1_000_000
LONE_TOLERANCE = 7.0

# A peak in place that is at least this part of the highest is one of its own.
OWN_PEAK = 0.4


@dataclass(frozen=True)
class Registration:
    """How well labels and image agree in place.

    verdict: "in place", "displaced", "rescaled" or "not assessable". scale: how many times the image's field of view
    the labels cover, 0.5, 1 or 2. shift: (z, y, x) voxels by which the labels would have to move (after they are
    brought to scale about the lower corner), shift_nm in nm. best, identity: agreement there and in place, in multiples
    of the chance level (root mean square over all shifts); margin: their ratio. classes: those compared.
    """

    verdict: str
    scale: float = 1.0
    shift: tuple[int, int, int] = (0, 0, 0)
    shift_nm: Vec3 = (0.0, 0.0, 0.0)
    best: float = 0.0
    identity: float = 0.0
    margin: float = 0.0
    classes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate as JSON."""
        return {
            "verdict": self.verdict,
            "scale": self.scale,
            "shift": list(self.shift),
            "shift_nm": [round(part, 3) for part in self.shift_nm],
            "best": round(self.best, 2),
            "identity": round(self.identity, 2),
            "margin": round(self.margin, 3),
            "classes": list(self.classes),
        }


def register(
    image: np.ndarray,
    label_map: np.ndarray,
    table: np.ndarray,
    classes: Sequence[str],
    valid: np.ndarray | None,
    *,
    voxel_nm: Vec3 = (1.0, 1.0, 1.0),
) -> Registration:
    """Return how EM and labels agree in place, under shifts, and at half and twice the scale.

    image: uint8 (z, y, x). label_map: rows of the state table `table` (rows, classes), same shape. valid: bool of the
    same shape, False where the EM is not on disk or outside its box; None = valid everywhere. All three may be
    memory-mapped: they are read slab by slab. voxel_nm: of the grid, (z, y, x).
    """
    step = _binning(image.shape, voxel_nm)
    chosen = _choose(label_map, table, step)
    names = tuple(classes[c] for c in chosen)
    if not chosen:
        return Registration("not assessable", classes=names)
    states = table[:, chosen]
    whole = _read(image, label_map, states, valid, tuple(slice(0, n) for n in image.shape), step, voxel_nm)
    if whole.there.mean() < MIN_OVERLAP or np.std(whole.image[whole.there > 0.5]) == 0:
        return Registration("not assessable", classes=names)
    place = _surface([whole], 1.0, SHIFT_BAND)
    if max(step) > 1:
        boxes = _boxes(whole, image.shape)
        pairs = (_read(image, label_map, states, valid, box, (1, 1, 1), voxel_nm) for box in boxes)
        fine = _surface(pairs, 1.0, SHIFT_BAND)
        if fine.best >= MIN_PEAK and max(abs(np.multiply(place.shift, step))) <= RANGE + max(step):
            place = fine
    if place.best < MIN_PEAK:
        sharp = _surface([whole], 1.0, SCALE_BAND)
        place = sharp if sharp.lead >= LEAD else place
    found = max((_surface([whole], scale, SCALE_BAND) for scale in (0.5, 2.0)), key=lambda surface: surface.best)
    lone = len(chosen) == 1 and image.size < LONE_VOXELS
    enough = MIN_PEAK if found.lead >= LEAD and not lone else CERTAIN_SCALE_PEAK
    if found.best >= max(enough, SCALE_MARGIN * place.best):
        verdict = "rescaled"
    else:
        found, verdict = place, _judge(place, LONE_TOLERANCE if lone else TOLERANCE)
    identity = place.highest((0, 0, 0), 0)
    shift = tuple(int(part) for part in np.multiply(found.shift, found.step))
    return Registration(
        verdict,
        found.scale,
        (shift[0], shift[1], shift[2]),
        (shift[0] * voxel_nm[0], shift[1] * voxel_nm[1], shift[2] * voxel_nm[2]),
        found.best,
        identity,
        found.best / max(identity, 1.0),
        names,
    )


@dataclass(frozen=True)
class _Pair:
    """Means over bins, float32: image and where there is one (z, y, x), classes and where they are known (class, ...).

    step: bin sizes. weight: of the filters' width per axis, 1 on the axis of the smallest bins (in nm).
    """

    image: np.ndarray
    there: np.ndarray
    present: np.ndarray
    known: np.ndarray
    step: tuple[int, int, int]
    weight: tuple[float, ...]


@dataclass(frozen=True)
class _Surface:
    """Agreement of all shifts, over its root mean square; index 0 is the shift `lower`, in bins of `step`."""

    agreement: np.ndarray
    lower: tuple[int, ...]
    step: tuple[int, ...]
    scale: float

    @property
    def best(self) -> float:
        return float(self.agreement.max())

    @property
    def shift(self) -> list[int]:
        at = np.unravel_index(int(self.agreement.argmax()), self.agreement.shape)
        return [int(index + lower) for index, lower in zip(at, self.lower, strict=True)]

    @property
    def lead(self) -> float:
        """How many times higher the best peak is than the next one, APART bins away."""
        others = self.agreement.copy()
        centre = [s - lower for s, lower in zip(self.shift, self.lower, strict=True)]
        others[tuple(slice(max(0, c - APART), c + APART + 1) for c in centre)] = 0
        return self.best / max(float(others.max()), 1e-6)

    def highest(self, shift: Sequence[int], radius: int) -> float:
        """Return the highest agreement within `radius` bins of a shift on every axis."""
        centre = [s - lower for s, lower in zip(shift, self.lower, strict=True)]
        return float(self.agreement[tuple(slice(max(0, c - radius), c + radius + 1) for c in centre)].max())


def _judge(place: _Surface, tolerance: float) -> str:
    """Return the verdict on a surface of shifts: in place, displaced or not assessable.

    tolerance: voxels that a peak in place may be away.
    """
    if place.best < MIN_PEAK:
        return "not assessable"
    # A peak of its own in place: the other one is another object that looks like the labelled ones. Labels that are a
    # few voxels off stand on the flank of their peak instead.
    near, around = (place.highest((0, 0, 0), radius) for radius in (1, 6))
    own = near >= max(MIN_PEAK, OWN_PEAK * place.best) and near >= around
    identity = place.highest((0, 0, 0), 0)
    away = float(np.linalg.norm(place.shift)) > tolerance and place.best >= MARGIN * identity
    return "displaced" if away and not own else "in place"


def _surface(pairs: Iterable[_Pair], scale: float, band: tuple[float, float]) -> _Surface:
    """Return the agreement of pairs of one shape, added up, under all shifts of the labels brought to `scale`."""
    total: np.ndarray = np.zeros(1, np.float32)
    for pair in pairs:
        there, known, image, present = pair.there, pair.known, pair.image, pair.present
        if scale == 2:
            there, image = _halved(there), _halved(image)
        elif scale == 0.5:
            known, present = (np.stack([_halved(one) for one in many]) for many in (known, present))
        if scale == 1:
            reach = [min(max(RANGE // s, 16), n - 1) for s, n in zip(pair.step, image.shape, strict=True)]
            lower, upper = [-r for r in reach], reach
        else:
            room = [m - n for m, n in zip(image.shape, known.shape[1:], strict=True)]
            lower, upper = [min(r, 0) - OUTSIDE for r in room], [max(r, 0) + OUTSIDE for r in room]
        sigmas = [[sigma * w for w in pair.weight] for sigma in band]
        total = total + _agreement(_band(image, there, sigmas), there > 0.5, present, known, sigmas, lower, upper)
    counted = total[total > 0]
    agreement = np.sqrt(total / counted.mean()) if counted.size else total
    step = tuple(s * max(1, int(scale)) for s in pair.step)
    return _Surface(agreement, tuple(lower), step, scale)


def _agreement(
    image: np.ndarray,
    there: np.ndarray,
    present: np.ndarray,
    known: np.ndarray,
    sigmas: Sequence[Sequence[float]],
    lower: Sequence[int],
    upper: Sequence[int],
) -> np.ndarray:
    """Return the sum over classes of the squared, self-normalised correlations for labels moved by lower..upper.

    The covariance of a class is divided by the root of the summed squares of its terms: where only its boundary counts,
    every shift has the same spread by chance, whatever overlaps. Shifts with too little boundary on the image give 0.
    """
    size = [
        fft.next_fast_len(max(n, m) + max(abs(lo), abs(up)) + 1, real=True)
        for n, m, lo, up in zip(image.shape, known.shape[1:], lower, upper, strict=True)
    ]
    at = np.ix_(*(np.arange(lo, up + 1) for lo, up in zip(lower, upper, strict=True)))

    def spectrum(values: np.ndarray) -> np.ndarray:
        return np.asarray(fft.rfftn(values.astype(np.float32), size))

    def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray(fft.irfftn(a * np.conj(b), size)[at])

    grey, energy = spectrum(image), spectrum(image**2)
    power = float(np.mean(image[there] ** 2))
    boundary: np.ndarray = np.zeros(known.shape[1:], np.float32)
    total: np.ndarray = np.zeros(1, np.float32)
    for one, its_known in zip(present, known, strict=True):
        edges = _band(one, its_known, sigmas)
        squares = edges**2
        floor = 0.02 * power * float(squares.sum()) + 1e-6
        spread = np.maximum(correlation(energy, spectrum(squares)), floor)
        total = total + correlation(grey, spectrum(edges)) ** 2 / spread
        boundary += squares
    overlap = correlation(spectrum(there), spectrum(boundary))
    expected = min(1.0, image.size / boundary.size) * float(boundary.sum())
    total[overlap < MIN_OVERLAP * expected] = 0
    return total


def _band(values: np.ndarray, weight: np.ndarray, sigmas: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the difference of two Gaussian means of the values that count, in standard deviations; 0 elsewhere."""
    counts = weight > 0.5
    inner, outer = (
        ndimage.gaussian_filter(np.where(counts, values, 0), sigma)
        / np.maximum(ndimage.gaussian_filter(counts.astype(np.float32), sigma), 1e-3)
        for sigma in sigmas
    )
    band = np.where(counts, inner - outer, 0)
    return band / max(float(band.std()), 1e-6)


def _choose(label_map: np.ndarray, table: np.ndarray, step: Sequence[int]) -> list[int]:
    """Return the classes to compare, most boundary first, by the voxels in the middle of the bins."""
    rows = label_map[tuple(slice(s // 2, None, s) for s in step)]
    voxels = np.bincount(rows.ravel(), minlength=len(table))
    sides = np.array([[voxels[column == state].sum() for state in (PRESENT, ABSENT)] for column in table.T])
    order = np.argsort(-sides.min(axis=1), kind="stable")[:MAX_CLASSES]
    return [int(c) for c in order if sides[c].min() >= MIN_VOXELS]


def _read(
    image: np.ndarray,
    label_map: np.ndarray,
    states: np.ndarray,
    valid: np.ndarray | None,
    box: tuple[slice, ...],
    step: tuple[int, int, int],
    voxel_nm: Vec3,
) -> _Pair:
    """Return a box of the crop in bins of `step`, read by layers of bins. states: of the classes compared, by row."""
    shape = tuple((b.stop - b.start) // s for b, s in zip(box, step, strict=True))
    volume = float(np.prod(step))
    grey, there = np.empty(shape, np.float32), np.ones(shape, np.float32)
    present, known = (np.empty((states.shape[1], *shape), np.float32) for _ in range(2))
    columns = [((column == PRESENT).astype(np.uint8), (column != UNKNOWN).astype(np.uint8)) for column in states.T]
    for z in range(shape[0]):
        start = box[0].start + z * step[0]
        layer = (
            slice(start, start + step[0]),
            *(slice(b.start, b.start + n * s) for b, n, s in _rest(box, shape, step)),
        )
        if valid is None:
            grey[z] = _sum(image[layer], step) / volume
        else:
            counts = np.asarray(valid[layer])
            there[z] = _sum(counts, step) / volume
            grey[z] = _sum(image[layer] * counts, step) / np.maximum(there[z] * volume, 1)
        rows = np.asarray(label_map[layer])
        for c, (is_present, is_known) in enumerate(columns):
            known[c, z] = _sum(is_known[rows], step) / volume
            present[c, z] = _sum(is_present[rows], step) / np.maximum(known[c, z] * volume, 1)
    size = np.multiply(step, voxel_nm)
    return _Pair(grey, there, present, known, step, tuple(float(size.min() / part) for part in size))


def _rest(*entries: Sequence[Any]) -> list[tuple[Any, ...]]:
    return list(zip(*(entry[1:] for entry in entries), strict=True))


def _sum(layer: np.ndarray, step: Sequence[int]) -> np.ndarray:
    """Return the sums over the bins of one layer of bins, float32 (y, x)."""
    plane = layer[0].astype(np.float32) if len(layer) == 1 else layer.sum(axis=0, dtype=np.float32)
    plane = np.sum([plane[i :: step[1]] for i in range(step[1])], axis=0) if step[1] > 1 else plane
    return np.sum([plane[:, i :: step[2]] for i in range(step[2])], axis=0) if step[2] > 1 else plane


def _halved(volume: np.ndarray) -> np.ndarray:
    """Return the means of blocks of two voxels per axis; an odd last one is left out."""
    even = volume[tuple(slice(0, n // 2 * 2) for n in volume.shape)]
    for axis in range(3):
        part = [slice(None)] * 3
        part[axis] = slice(0, None, 2)
        first = even[tuple(part)]
        part[axis] = slice(1, None, 2)
        even = (first + even[tuple(part)]) / 2
    return even


def _binning(shape: Sequence[int], voxel_nm: Vec3) -> tuple[int, int, int]:
    """Return the bin sizes that leave at most MAX_VOXELS bins, as near to cubes as may be."""
    step = [1, 1, 1]
    while np.prod([n // s for n, s in zip(shape, step, strict=True)]) > MAX_VOXELS:
        axis = min(range(3), key=lambda a: (step[a] * voxel_nm[a], -shape[a]))
        step[axis] += 1
    return step[0], step[1], step[2]


def _boxes(whole: _Pair, shape: Sequence[int]) -> list[tuple[slice, ...]]:
    """Return the boxes, all of one shape, in which the classes compared have the most boundary on the image."""
    sigmas = [[sigma * w for w in whole.weight] for sigma in SHIFT_BAND]
    boundary = whole.there * sum(
        _band(one, known, sigmas) ** 2 for one, known in zip(whole.present, whole.known, strict=True)
    )
    size = [max(1, min(BOX, n) // s) for n, s in zip(shape, whole.step, strict=True)]
    boxes = []
    for _ in range(BOXES):
        density = ndimage.uniform_filter(boundary, size, mode="constant")
        centre = np.unravel_index(int(density.argmax()), density.shape)
        taken, box = [], []
        for c, m, s, n in zip(centre, size, whole.step, shape, strict=True):
            length = min(BOX, n)
            start = min(max(0, (int(c) - m // 2) * s), n - length)
            box.append(slice(start, start + length))
            taken.append(slice(start // s, start // s + m))
        boundary[tuple(taken)] = 0
        boxes.append(tuple(box))
    return boxes
