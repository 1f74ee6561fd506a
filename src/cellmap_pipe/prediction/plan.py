"""Where the windows of a sliding-window prediction lie, what memory they take, and how a volume is cut to take less.

Nothing here needs torch: the quality check predicts memory with the same arithmetic by which `sliding_window` runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.geometry import Shape3, shape3

Box = tuple[Shape3, Shape3]  # lower and upper corner, in voxels of the predicted volume


@dataclass(frozen=True, eq=False)
class AxisWindows:
    """The windows along one axis of `size` voxels.

    starts: index of each window's first voxel; it is negative where context before the volume is used.
    domain: first and last-plus-one index that the source can give; what lies beyond is reflected.
    weights: float32 (windows, patch), adding up to one at every voxel of the volume, zero outside it.
    """

    size: int
    patch: int
    starts: tuple[int, ...]
    domain: tuple[int, int]
    weights: np.ndarray

    def touching(self, lower: int, upper: int) -> list[int]:
        """Return the numbers of the windows that reach into the voxels from `lower` up to `upper`."""
        return [i for i, start in enumerate(self.starts) if start < upper and start + self.patch > lower]


Plan = tuple[AxisWindows, AxisWindows, AxisWindows]


def axis_profile(patch: int, blending: str) -> np.ndarray:
    """Return the weight of each voxel of a window along one axis, float64 (patch,).

    "gaussian": centred, standard deviation an eighth of the patch (Isensee et al. 2021,
    doi:10.1038/s41592-020-01008-z). "constant": ones. Raises ConfigError for another name.
    """
    if blending == "constant":
        return np.ones(patch)
    if blending == "gaussian":
        distance = np.arange(patch, dtype=np.float64) - (patch - 1) / 2
        profile: np.ndarray = np.exp(-0.5 * (distance / (patch / 8)) ** 2)
        return profile
    raise ConfigError(f"predict.blending: unknown '{blending}'; allowed: gaussian, constant")


def axis_windows(
    size: int, patch: int, overlap: float, blending: str = "gaussian", before: int = 0, after: int = 0
) -> AxisWindows:
    """Return the windows that cover `size` voxels, evenly spaced and overlapping by `overlap` or a little more.

    before, after: voxels of real context on either side. Windows reach into it as far as that costs no further window;
    what a patch larger than volume and context lacks is reflected on both sides.
    Raises ConfigError unless 0 <= overlap < 1.
    """
    if not 0 <= overlap < 1:
        raise ConfigError(f"predict.overlap {overlap} must be at least 0 and below 1")
    step = max(1, math.floor(patch * (1 - overlap) + 1e-9))
    count = 1 if size <= patch else math.ceil((size - patch) / step) + 1
    spare = patch + (count - 1) * step - size
    low = -min(before, max(spare // 2, spare - after))
    high = size + min(after, spare + low)
    span = high - low - patch
    if count == 1:
        starts = [low - (-span) // 2]
    else:
        starts = [low + round(i * span / (count - 1)) for i in range(count)]
    weights = np.zeros((count, patch))
    total = np.zeros(size)
    profile = axis_profile(patch, blending)
    for i, start in enumerate(starts):
        inside = slice(max(start, 0) - start, min(start + patch, size) - start)
        weights[i, inside] = profile[inside]
        total[start + inside.start : start + inside.stop] += profile[inside]
    for i, start in enumerate(starts):
        inside = slice(max(start, 0) - start, min(start + patch, size) - start)
        weights[i, inside] /= total[start + inside.start : start + inside.stop]
    return AxisWindows(size, patch, tuple(starts), (low, high), weights.astype(np.float32))


def make_plan(
    shape: Sequence[int],
    patch: Sequence[int],
    overlap: float,
    blending: str = "gaussian",
    context: Sequence[tuple[int, int]] = ((0, 0), (0, 0), (0, 0)),
) -> Plan:
    """Return the windows along z, y and x of a volume of `shape`; context: voxels before and after it on each axis."""
    z, y, x = (
        axis_windows(n, p, overlap, blending, before, after)
        for n, p, (before, after) in zip(shape3(shape), shape3(patch), context, strict=True)
    )
    return z, y, x


@dataclass(frozen=True)
class Planes:
    """Planes that the carry and the output buffer hold, and the type of the carry's sums."""

    carry: int
    carry_type: np.dtype[Any]
    done: int


def planes_needed(z: AxisWindows, rows: Sequence[int], planes: int, depth: int) -> Planes:
    """Return how many planes carry and output buffer hold for a box of `planes` planes under the given rows along z.

    float16 in the carry errs by at most 1/16 of a uint8 step each time; more than three rows over a voxel take float32.
    The whole axis decides it, not the rows: a run that is resumed must give the same bits.
    """
    shortest = min((z.starts[b] - z.starts[a] for a, b in pairwise(rows)), default=z.patch)
    half = math.ceil(z.patch / min((b - a for a, b in pairwise(z.starts)), default=z.patch)) <= 3
    return Planes(
        carry=max(0, z.patch - shortest),
        carry_type=np.dtype(np.float16 if half else np.float32),
        done=min(planes, z.patch + depth - 1),
    )


@dataclass(frozen=True)
class _Pieces:
    """What the pieces of a cut axis need: each distinct pair of own voxels and voxels under its windows, (pieces,).

    windows: how many windows touch the pieces, all together.
    """

    own: np.ndarray
    seen: np.ndarray
    windows: int

    @classmethod
    def of(cls, axis: AxisWindows, cuts: Sequence[tuple[int, int]]) -> "_Pieces":
        lower, upper = np.array(cuts, np.int64).T
        starts = np.array(axis.starts, np.int64)
        first = np.searchsorted(starts, lower - axis.patch, side="right")
        last = np.searchsorted(starts, upper, side="left") - 1
        seen = starts[last] + axis.patch - starts[first]
        own, under = np.unique(np.stack([upper - lower, seen]), axis=1)
        return cls(own, under, int((last - first + 1).sum()))


def _largest_bytes(
    plan: Plan, planes: tuple[int, int], y: _Pieces, x: _Pieces, channels: int, depth: int, batch: int, held: int
) -> int:
    """Return what `estimate_bytes` gives for the most demanding of the boxes over `planes` and all pieces."""
    z = plan[0]
    need = planes_needed(z, z.touching(*planes), planes[1] - planes[0], depth)
    window_line = 4 * z.patch * plan[1].patch
    area, seen = y.own[:, None] * x.own, y.seen[:, None] * x.seen
    sums = channels * ((need.carry * need.carry_type.itemsize + need.done) * area + window_line * x.own)
    image = 2 * (2 * z.patch + held) * seen  # image and validity, once more while new planes are read
    windows = window_line * plan[2].patch * (batch * (2 * channels + 2) + 1)
    return int((sums + image + windows + window_line * x.own).max())


def estimate_bytes(plan: Plan, box: Box, channels: int, depth: int, batch: int, held: int = 0) -> int:
    """Return the host memory in bytes that `stream` takes for a box, without what the network needs for itself.

    held: planes under the windows that the source keeps for itself between two reads.
    """
    (z0, y0, x0), (z1, y1, x1) = box
    y, x = _Pieces.of(plan[1], [(y0, y1)]), _Pieces.of(plan[2], [(x0, x1)])
    return _largest_bytes(plan, (z0, z1), y, x, channels, depth, batch, held)


def _cuts(size: int, parts: int, align: int) -> list[tuple[int, int]]:
    """Return `parts` nearly equal pieces of an axis that begin at multiples of `align`."""
    units = math.ceil(size / align)
    edges = [min(size, align * (units * i // parts)) for i in range(parts + 1)]
    return list(pairwise(edges))


def columns(
    plan: Plan,
    channels: int,
    depth: int,
    batch: int,
    align: tuple[int, int],
    memory_gb: float | None,
    held: int = 0,
) -> list[Box]:
    """Return the columns (boxes over the whole depth) in which a volume is predicted, one if it fits into memory.

    align: columns begin at multiples of these numbers of lines (y) and columns (x), the output's chunks.
    memory_gb: host memory in 10^9 bytes, without the network's own. Of the cuts that fit, that with the fewest windows.
    held: see `estimate_bytes`.
    Raises ConfigError, with the least memory that would do, if none fits.
    """
    z, y, x = plan
    whole: Box = ((0, 0, 0), (z.size, y.size, x.size))
    if memory_gb is None or estimate_bytes(plan, whole, channels, depth, batch, held) <= memory_gb * 1e9:
        return [whole]
    in_y, in_x = (
        [_Pieces.of(axis, _cuts(axis.size, n, a)) for n in range(1, math.ceil(axis.size / a) + 1)]
        for axis, a in zip((y, x), align, strict=True)
    )

    def largest(of_y: _Pieces, of_x: _Pieces) -> int:
        return _largest_bytes(plan, (0, z.size), of_y, of_x, channels, depth, batch, held)

    least = largest(in_y[-1], in_x[-1])
    if least > memory_gb * 1e9:
        raise ConfigError(
            f"predict.memory_gb {memory_gb:g} is too little for patch {(z.patch, y.patch, x.patch)} and {channels} "
            f"classes: it takes at least {math.ceil(least / 1e7) / 100:g} GB; raise it, or use a smaller patch"
        )
    best = (math.inf, 0, 0, 0)  # windows, bytes, parts along y and x
    for ny, of_y in enumerate(in_y, 1):
        if largest(of_y, in_x[-1]) > memory_gb * 1e9:
            continue
        for nx, of_x in enumerate(in_x, 1):
            windows = of_y.windows * of_x.windows
            if windows > best[0]:  # more parts only add windows
                break
            need = largest(of_y, of_x)
            if need <= memory_gb * 1e9:
                best = min(best, (windows, need, ny, nx))
                break
    cuts = [_cuts(axis.size, n, a) for axis, n, a in zip((y, x), best[2:], align, strict=True)]
    return [((0, y0, x0), (z.size, y1, x1)) for (y0, y1), (x0, x1) in product(*cuts)]
