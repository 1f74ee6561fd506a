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
from cellmap_pipe.geometry import Shape3, Vec3, shape3
from cellmap_pipe.training.augment import isotropic

Box = tuple[Shape3, Shape3]  # lower and upper corner, in voxels of the predicted volume

# How probabilities are stored: round(255 p), p itself, or 255 where p exceeds the class's threshold, else 0.
OUTPUTS: dict[str, np.dtype[Any]] = {
    "uint8": np.dtype(np.uint8),
    "float16": np.dtype(np.float16),
    "mask": np.dtype(np.uint8),
}


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


# Windows along an axis that may have to be cut into columns.
LONG = 8


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
    size: int,
    patch: int,
    overlap: float,
    blending: str = "gaussian",
    before: int = 0,
    after: int = 0,
    *,
    even: bool = True,
) -> AxisWindows:
    """Return the windows that cover `size` voxels, overlapping by `overlap` or a little more.

    before, after: voxels of real context on either side. Windows reach into it as far as that costs no further window;
    what a patch larger than volume and context lacks is reflected on both sides. even: windows are evenly spaced; else
    all but the last lie a full step apart, and LONG or more of them begin at the first voxel.
    Raises ConfigError unless 0 <= overlap < 1.
    """
    if not 0 <= overlap < 1:
        raise ConfigError(f"predict.overlap {overlap} must be at least 0 and below 1")
    step = max(1, math.floor(patch * (1 - overlap) + 1e-9))
    count = 1 if size <= patch else math.ceil((size - patch) / step) + 1
    spare = patch + (count - 1) * step - size
    low = 0 if not even and count >= LONG else -min(before, max(spare // 2, spare - after))
    high = size + min(after, spare + low)
    span = high - low - patch
    if count == 1:
        starts = [low - (-span) // 2]
    elif even:
        starts = [low + round(i * span / (count - 1)) for i in range(count)]
    else:
        starts = [min(low + i * step, high - patch) for i in range(count)]
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
    """Return the windows along z, y and x of a volume of `shape`; context: voxels before and after it on each axis.

    They are even along z, where the closest two decide how many planes are held. Along y and x, steps of half a patch
    end where chunks do, and columns cut there share one line of windows, not two. An axis that is long enough to be cut
    gives up the context before it for that: half a step on average, of eight or more.
    """
    z, y, x = (
        axis_windows(n, p, overlap, blending, before, after, even=axis == 0)
        for axis, (n, p, (before, after)) in enumerate(zip(shape3(shape), shape3(patch), context, strict=True))
    )
    return z, y, x


def make_plans(
    shape: Sequence[int],
    patch: Sequence[int],
    overlap: float,
    blending: str = "gaussian",
    context: Sequence[tuple[int, int]] = ((0, 0), (0, 0), (0, 0)),
    *,
    planes: str = "z",
    voxel_nm: Vec3,
) -> tuple[Plan, ...]:
    """Return the plans whose results are averaged: one, or three for a 2D network that looks along every axis.

    shape, patch: (z, y, x) in voxels. context: voxels of real image before and after the volume on each axis.
    planes: "z", or "all" for a patch one plane thick, (1, h, w), in isotropic voxels (as `train.planes`): plan i then
    has windows of one voxel along axis i, (1, h, w), (h, 1, w) and (h, w, 1). voxel_nm: voxel size (z, y, x) in nm.
    Raises ConfigError for other planes.
    """
    if planes not in ("z", "all"):
        raise ConfigError(f"predict.planes: unknown '{planes}'; allowed: z, all")
    thickness, h, w = shape3(patch)
    patches = [(thickness, h, w)]
    if planes == "all" and thickness == 1 and isotropic(voxel_nm):
        patches += [(h, 1, w), (h, w, 1)]
    return tuple(make_plan(shape, each, overlap, blending, context) for each in patches)


@dataclass(frozen=True)
class Row:
    """The windows of one plan that begin at plane `start`, and the planes that are final once they are added.

    plan: number of the plan. number: of the row along the plan's z axis. stop: planes below it are final.
    """

    plan: int
    number: int
    start: int
    stop: int


def rows_of(plans: Sequence[Plan], z0: int, z1: int) -> list[Row]:
    """Return the rows of all plans that reach into the planes from `z0` up to `z1`, in the order in which they are run.

    The order, by first plane and then by plan, is that of the whole axis: a voxel gets its terms in the same order in
    any part of the volume.
    """
    rows = sorted((plan[0].starts[i], number, i) for number, plan in enumerate(plans) for i in plan[0].touching(z0, z1))
    stops = [start for start, _, _ in rows[1:]] + [z1]
    return [Row(plan, i, start, stop) for (start, plan, i), stop in zip(rows, stops, strict=True)]


@dataclass(frozen=True)
class Planes:
    """Planes that the carry and the ring of finished planes hold, and the type of the carry's sums.

    ring: a multiple of the depth of a piece and those of an incomplete last piece, or all planes that the box has.
    """

    carry: int
    carry_type: np.dtype[Any]
    ring: int


def planes_needed(plans: Sequence[Plan], z0: int, z1: int, depth: int) -> Planes:
    """Return how many planes carry and ring hold for a box over the planes from `z0` up to `z1`.

    float16 in the carry errs by at most 1/16 of a uint8 step each time; more than three rows over a voxel take float32.
    The whole axis decides it, not the rows: a run that is resumed must give the same bits.
    The ring has room for what a row finishes beside an incomplete piece, and for one piece that is being written.
    """
    z = plans[0][0]
    rows_over = math.ceil(z.patch / min((b - a for a, b in pairwise(z.starts)), default=z.patch))
    base, tail = z0 // depth * depth, max(z0 // depth, z1 // depth) * depth
    carry, finished, top = 0, 0, z0
    for row in rows_of(plans, z0, z1):
        stop = min(max(row.stop, z0), z1)
        top = max(top, min(row.start + plans[row.plan][0].patch, z1))
        carry = max(carry, top - stop)
        finished = max(finished, min(stop, tail) - max(row.start // depth * depth, base))
    pieces = max(2, math.ceil(finished / depth))
    return Planes(
        carry=carry,
        carry_type=np.dtype(np.float16 if rows_over <= 3 and len(plans) == 1 else np.float32),
        ring=min(pieces * depth, tail - base) + z1 - tail,
    )


@dataclass(frozen=True)
class _Pieces:
    """What the pieces of a cut axis need: each distinct pair of own voxels and voxels under its windows, (pieces,).

    windows: how many windows of each plan touch the pieces, all together.
    """

    own: np.ndarray
    seen: np.ndarray
    windows: np.ndarray

    @classmethod
    def of(cls, axes: Sequence[AxisWindows], cuts: Sequence[tuple[int, int]]) -> "_Pieces":
        """axes: the axis of each plan."""
        lower, upper = np.array(cuts, np.int64).T
        begin, end, windows = [], [], []
        for axis in axes:
            starts = np.array(axis.starts, np.int64)
            first = np.searchsorted(starts, lower - axis.patch, side="right")
            last = np.searchsorted(starts, upper, side="left") - 1
            begin.append(starts[first])
            end.append(starts[last] + axis.patch)
            windows.append((last - first + 1).sum())
        seen = np.max(end, axis=0) - np.min(begin, axis=0)
        own, under = np.unique(np.stack([upper - lower, seen]), axis=1)
        return cls(own, under, np.array(windows))


@dataclass(frozen=True)
class _Need:
    """The memory of boxes over the same planes, by how y and x are cut.

    plane: bytes per voxel of the cross-section that sums and ring take. line: bytes per column that they take besides.
    seen: bytes per voxel under the windows. windows: bytes of the windows in work.
    """

    plane: int
    line: int
    seen: int
    windows: int

    @classmethod
    def of(
        cls,
        plans: Sequence[Plan],
        planes: tuple[int, int],
        *,
        channels: int,
        depth: int,
        batch: int,
        held: int,
        output: str,
        symmetries: int,
    ) -> "_Need":
        need = planes_needed(plans, *planes, depth)
        highest = max(z.patch for z, _, _ in plans)
        window_line = max(4 * z.patch * y.patch for z, y, _ in plans)
        window = max(4 * z.patch * y.patch * x.patch for z, y, x in plans)
        views = channels if symmetries > 1 else 0  # their mean
        return cls(
            plane=channels * (need.carry * need.carry_type.itemsize + need.ring * OUTPUTS[output].itemsize),
            line=channels * window_line + max(4 * y.patch for _, y, _ in plans),
            seen=2 * (2 * highest + held),  # image and validity, once more while new planes are read
            windows=window * (batch * (2 * channels + 2 + views) + 1),
        )

    def largest(self, y: _Pieces, x: _Pieces) -> int:
        """Return the bytes that the most demanding of the boxes of all pieces takes."""
        area, seen = y.own[:, None] * x.own, y.seen[:, None] * x.seen
        return int((self.plane * area + self.line * x.own + self.seen * seen).max()) + self.windows


def estimate_bytes(
    plans: Sequence[Plan],
    box: Box,
    channels: int,
    depth: int,
    batch: int,
    held: int = 0,
    *,
    output: str = "uint8",
    symmetries: int = 1,
) -> int:
    """Return the host memory in bytes that `predict_box` takes for a box, without what the network needs for itself.

    channels: how many are kept. depth: planes that are written together. batch: windows in one call of the network.
    held: planes under the windows that the source keeps for itself between two reads. output: see OUTPUTS.
    symmetries: views of a window that are averaged.
    """
    (z0, y0, x0), (z1, y1, x1) = box
    y, x = (_Pieces.of([plan[axis] for plan in plans], [cut]) for axis, cut in ((1, (y0, y1)), (2, (x0, x1))))
    need = _Need.of(
        plans,
        (z0, z1),
        channels=channels,
        depth=depth,
        batch=batch,
        held=held,
        output=output,
        symmetries=symmetries,
    )
    return need.largest(y, x)


def count_windows(plans: Sequence[Plan], box: Box) -> int:
    """Return how many windows of all plans reach into a box."""
    return sum(math.prod(len(axis.touching(a, b)) for axis, a, b in zip(plan, *box, strict=True)) for plan in plans)


def _cuts(size: int, parts: int, align: int) -> list[tuple[int, int]]:
    """Return `parts` nearly equal pieces of an axis that begin at multiples of `align`."""
    units = math.ceil(size / align)
    edges = [min(size, align * (units * i // parts)) for i in range(parts + 1)]
    return list(pairwise(edges))


def columns(
    plans: Sequence[Plan],
    channels: int,
    depth: int,
    batch: int,
    align: tuple[int, int],
    memory_gb: float | None,
    held: int = 0,
    *,
    output: str = "uint8",
    symmetries: int = 1,
) -> list[Box]:
    """Return the columns (boxes over the whole depth) in which a volume is predicted, one if it fits into memory.

    align: columns begin at multiples of these numbers of lines (y) and columns (x), the output's chunks.
    memory_gb: host memory in 10^9 bytes, without the network's own. Of the cuts that fit, that with the fewest windows.
    channels, depth, batch, held, output, symmetries: see `estimate_bytes`.
    Raises ConfigError, with the least memory that would do, if none fits.
    """
    z, y, x = plans[0]
    whole: Box = ((0, 0, 0), (z.size, y.size, x.size))
    if memory_gb is None:
        return [whole]
    need = _Need.of(
        plans,
        (0, z.size),
        channels=channels,
        depth=depth,
        batch=batch,
        held=held,
        output=output,
        symmetries=symmetries,
    )
    in_y, in_x = (
        [
            _Pieces.of([plan[number] for plan in plans], _cuts(axis.size, n, a))
            for n in range(1, math.ceil(axis.size / a) + 1)
        ]
        for number, axis, a in zip((1, 2), (y, x), align, strict=True)
    )
    limit = memory_gb * 1e9
    least = need.largest(in_y[-1], in_x[-1])
    if least > limit:
        raise ConfigError(
            f"predict.memory_gb {memory_gb:g} is too little for patch {(z.patch, y.patch, x.patch)} and {channels} "
            f"classes: it takes at least {math.ceil(least / 1e7) / 100:g} GB; raise it, or use a smaller patch"
        )
    rows = np.array([len(plan[0].starts) for plan in plans])
    # more parts do not always mean more windows: it depends on how many reach across the lines where they are cut
    windows = (rows * np.array([of.windows for of in in_y])) @ np.array([of.windows for of in in_x]).T
    best = (math.inf, 0, 0, 0)  # windows, bytes, parts along y and x
    for ny, nx in zip(*np.unravel_index(np.argsort(windows, axis=None, kind="stable"), windows.shape), strict=True):
        if windows[ny, nx] > best[0]:
            break
        taken = need.largest(in_y[ny], in_x[nx])
        if taken <= limit:
            best = min(best, (int(windows[ny, nx]), taken, int(ny) + 1, int(nx) + 1))
    cuts = [_cuts(axis.size, n, a) for axis, n, a in zip((y, x), best[2:], align, strict=True)]
    return [((0, y0, x0), (z.size, y1, x1)) for (y0, y1), (x0, x1) in product(*cuts)]
