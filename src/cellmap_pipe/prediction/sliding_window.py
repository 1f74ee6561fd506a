"""Sliding-window prediction in one pass along z: memory is bounded by patch and cross-section, never by depth.

The weight of a window is the product of one weight per axis, and these are normalised beforehand so that at every voxel
they add up to one; the blended probability is then a plain sum, and it folds up axis by axis. The windows of one row
along x are added up in a *strip* (one patch high); finished lines of the strip are weighted along z and added to the
*carry*, which holds the planes that later rows of windows still change; finished planes go to a ring, and from there to
the thread that writes them. Several plans (a 2D network across each axis) share strip, carry and ring.
A voxel gets the same terms in the same order however the volume is cut, so any cut gives the same bits.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any, NoReturn, Protocol

import numpy as np
import torch

from cellmap_pipe.errors import ConfigError, DataError
from cellmap_pipe.geometry import Shape3, shape3, vec3
from cellmap_pipe.prediction.plan import (
    OUTPUTS,
    Box,
    Plan,
    Planes,
    Row,
    columns,
    estimate_bytes,
    make_plans,
    planes_needed,
    rows_of,
)
from cellmap_pipe.prediction.symmetries import Symmetry, symmetries

Network = Callable[[torch.Tensor], torch.Tensor]
Write = Callable[[int, int, np.ndarray], None]  # first plane, end plane, array (C, planes, y, x)

# Planes that are written together, and the grain of columns, where the output does not say how its chunks lie.
DEFAULT_DEPTH = 64
DEFAULT_COLUMN = 64

_TYPES = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
}

# Voxels that are folded at a time on the host: their float32 sums stay in a core's cache.
_BLOCK = 2**17

# Share of a GPU's memory that the sums may take; beyond it they are kept on the host.
_DEVICE_SHARE = 0.4


class PredictionError(DataError):
    """The network's answer for one window cannot be used."""


class Source(Protocol):
    """Where the image comes from: voxels of the predicted volume and, where there are any, around it."""

    def read(self, lower: Shape3, upper: Shape3) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the image (uint8, (z, y, x)) of a box and where it is valid (bool; None = everywhere)."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """An image in a numpy or zarr array (z, y, x), with nothing around it."""

    image: Any
    valid: Any = None

    def read(self, lower: Shape3, upper: Shape3) -> tuple[np.ndarray, np.ndarray | None]:
        box = tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))
        valid = None if self.valid is None else np.asarray(self.valid[box]).astype(bool, copy=False)
        return np.asarray(self.image[box]), valid


def _mirrored(lower: int, upper: int, domain: tuple[int, int]) -> np.ndarray:
    """Return the indices inside `domain` that stand for lower..upper-1, reflected beyond its ends."""
    first, length = domain[0], domain[1] - domain[0]
    index = np.arange(lower, upper) - first
    if length == 1:
        return np.full(upper - lower, first)
    index = np.abs(np.mod(index, 2 * (length - 1)))
    return first + np.minimum(index, 2 * (length - 1) - index)


def _read_mirrored(
    source: Source, lower: Shape3, upper: Shape3, domains: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return image and validity (None: everywhere) of a box that may reach beyond `domains`, what the source has."""
    index = [_mirrored(a, b, domain) for a, b, domain in zip(lower, upper, domains, strict=True)]
    corner = shape3([i.min() for i in index])
    image, valid = source.read(corner, shape3([i.max() + 1 for i in index]))
    if image.dtype != np.uint8:
        raise DataError(f"the image is {image.dtype}, expected uint8; convert it or choose another array")
    for axis, (i, first) in enumerate(zip(index, corner, strict=True)):
        if not np.array_equal(i - first, np.arange(image.shape[axis])):
            image = image.take(i - first, axis)
            valid = None if valid is None else valid.take(i - first, axis)
    return image, valid


class _Slab:
    """The image under the row of windows in work; going on to the next row takes only the new planes.

    The planes that the row after it needs are read by another thread meanwhile.
    """

    def __init__(self, source: Source, plans: Sequence[Plan], box: Box, rows: Sequence[Row], reader: Executor) -> None:
        self._source, self._reader = source, reader
        touched = [[(axis, axis.touching(box[0][i], box[1][i])) for i, axis in enumerate(plan) if i] for plan in plans]
        self.corner = tuple(
            min(axis.starts[chosen[0]] for axis, chosen in along) for along in zip(*touched, strict=True)
        )
        end = [
            max(axis.starts[chosen[-1]] + axis.patch for axis, chosen in along) for along in zip(*touched, strict=True)
        ]
        self._end = tuple(end)
        self._domains = [
            (min(axis.domain[0] for axis in along), max(axis.domain[1] for axis in along))
            for along in zip(*plans, strict=True)
        ]
        shape = (max(plan[0].patch for plan in plans), *(b - a for a, b in zip(self.corner, end, strict=True)))
        self._image = np.empty(shape, np.uint8)
        self._valid: np.ndarray | None = None  # until a voxel is not valid
        self._first = self._last = rows[0].start
        self._needs = _reads(plans, rows)
        self._next: Future[tuple[np.ndarray, np.ndarray | None]] | None = None
        self._request()

    def _request(self) -> None:
        """Have the next planes read, if any are to be read."""
        first, last = next(self._needs, (0, 0))
        self._next = None
        if last > first:
            lower, upper = shape3((first, *self.corner)), shape3((last, *self._end))
            self._next = self._reader.submit(_read_mirrored, self._source, lower, upper, self._domains)

    def advance(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return image and validity (None: everywhere) of planes `start` up to `end`, as they are until the next call.

        The planes of later calls begin at `start` or above it.
        """
        if end > self._last:
            assert self._next is not None
            image, valid = self._next.result()
            if valid is not None and self._valid is None:
                self._valid = np.ones(self._image.shape, bool)
            kept = max(0, self._last - start)
            for held, new in ((self._image, image), (self._valid, valid)):
                if held is not None:
                    held[:kept] = held[self._last - kept - self._first : self._last - self._first]
                    held[kept : kept + len(image)] = True if new is None else new
            self._first, self._last = start, end
            del image, valid, new  # before the next planes take their own memory
            self._request()
        part = slice(start - self._first, end - self._first)
        return self._image[part], None if self._valid is None else self._valid[part]


def _reads(plans: Sequence[Plan], rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Yield the planes that the rows read, (first, end), those of one row at a time; each is read once."""
    end = rows[0].start
    for row in rows:
        last = row.start + plans[row.plan][0].patch
        if last > end:
            yield max(end, row.start), last
            end = last


def _wrapped(first: int, last: int, base: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first plane, end plane, slot) of the parts of a range of planes that lie together in a ring.

    length: of the ring, whose slot 0 holds plane `base` and every `length`-th after it; none if it is 0.
    """
    while first < last and length:
        slot = (first - base) % length
        end = min(last, first + length - slot)
        yield first, end, slot
        first = end


class _Output:
    """The ring of finished planes, and the thread that hands them to `write`, piece by piece and in order.

    `planes` is where sums are finished, on their device; on a GPU its pieces are copied to the host before they leave.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        box: Box,
        depth: int,
        write: Write,
        writer: Executor,
        device: torch.device,
    ) -> None:
        """shape: (C, planes of the ring, y, x)."""
        self.planes = _buffer(shape, dtype, device)
        self._first, self._end = box[0][0], box[1][0]
        self._base = self._first // depth * depth
        #: the last piece, if it is incomplete, has a place of its own at the ring's end
        self._tail = max(self._base, self._end // depth * depth)
        self._length = shape[1] - (self._end - self._tail)
        on_device = device.type == "cuda"
        self._host = torch.empty(shape, dtype=dtype, pin_memory=True) if on_device else self.planes
        self._array = self._host.numpy()
        self._write, self._writer, self._depth = write, writer, depth
        self._ready = self._handed = self._first
        self._under_way: deque[tuple[int, Future[None]]] = deque()
        self._failed = False

    def places(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield (first plane, end plane, slot) of the parts of a range of planes that lie together in the ring."""
        if first < min(last, self._tail):
            yield from _wrapped(first, min(last, self._tail), self._base, self._length)
        if max(first, self._tail) < last:
            yield max(first, self._tail), last, self._length + max(first, self._tail) - self._tail

    def _settle(self, plane: int) -> None:
        """Wait until planes below `plane` are written. Raises what `write` raised."""
        while self._under_way and (self._under_way[0][0] < plane or self._under_way[0][1].done()):
            self._under_way.popleft()[1].result()

    def make_room(self, stop: int) -> None:
        """Wait until planes up to `stop` have a place in the ring."""
        self._settle(min(stop, self._tail) - self._length)

    def copy(self, final: int) -> None:
        """Copy pieces that are complete, as all planes below `final` are final, to the host."""
        ready = final if final == self._end else max(self._first, final // self._depth * self._depth)
        if self._host is not self.planes:
            self.make_room(ready)
            for first, last, slot in self.places(self._ready, ready):
                part = slice(slot, slot + last - first)
                for host, finished in zip(self._host, self.planes, strict=True):
                    host[part].copy_(finished[part], non_blocking=True)
        self._ready = ready

    def hand_over(self) -> None:
        """Have the copied pieces written."""
        if self._handed < self._ready and self._host is not self.planes:
            torch.cuda.current_stream(self.planes.device).synchronize()  # no wait where the row was checked for NaN
        while self._handed < self._ready:
            first = self._handed
            last = min((first // self._depth + 1) * self._depth, self._ready)
            ((_, _, slot),) = self.places(first, last)
            piece = self._array[:, slot : slot + last - first]
            self._under_way.append((first, self._writer.submit(self._write_next, first, last, piece)))
            self._handed = last
        self._settle(self._first)

    def _write_next(self, first: int, last: int, piece: np.ndarray) -> None:
        """Write a piece, unless an earlier one failed."""
        if not self._failed:
            self._failed = True  # until it has not
            self._write(first, last, piece)
            self._failed = False

    def finish(self) -> None:
        """Wait until everything is written."""
        self._settle(self._end)


class _Sums:
    """Weighted sums of the windows of all plans that touch one box of the volume, on `device`."""

    def __init__(
        self,
        plans: Sequence[Plan],
        box: Box,
        channels: int,
        need: Planes,
        output: _Output,
        finish: Callable[[int, torch.Tensor], torch.Tensor],
        scale: float,
        device: torch.device,
    ) -> None:
        """finish: what makes final sums of a channel into what is stored, in place. scale: of the sums, 1 or 255."""
        self._plans, self._box, self._output, self._finish, self._device = plans, box, output, finish, device
        (z0, y0, x0), (_, y1, x1) = box
        self._channels, self._lines, self._columns = channels, y1 - y0, x1 - x0
        self._carry = _buffer((channels, need.carry, self._lines, self._columns), _TYPES[need.carry_type], device)
        self._top = z0  # planes from the row's first up to this one have sums in the carry
        area = max(z.patch * y.patch for z, y, _ in plans) * self._columns
        self._strips = _buffer((channels * area,), torch.float32, device).zero_()
        plane = max(y.patch for _, y, _ in plans) * self._columns
        block = area if device.type == "cuda" else min(area, max(plane, _BLOCK))
        self._scratch = _buffer((block,), torch.float32, device)
        self._weights = [[torch.from_numpy(axis.weights).to(device) for axis in plan] for plan in plans]
        self._scale = scale / len(plans)
        self._total = torch.zeros((), dtype=torch.float64, device=device)

    def _strip(self, plan: int) -> torch.Tensor:
        """Return the strip, (C, z, y, x), of the windows of a plan: a ring of lines, zero where nothing is added."""
        shape = (self._channels, self._plans[plan][0].patch, self._plans[plan][1].patch, self._columns)
        return self._strips[: math.prod(shape)].view(shape)

    def _planes(self, row: Row) -> tuple[int, int]:
        """Return the box's planes under a row, (first, end)."""
        patch = self._plans[row.plan][0].patch
        return max(row.start, self._box[0][0]), min(row.start + patch, self._box[1][0])

    def add(self, row: Row, channel: int, probability: torch.Tensor, y: int, x: int) -> None:
        """Add one channel (z, y, x) of window (y, x) of the row to the strip, what lies in the box."""
        (_, y0, x0), (_, y1, x1) = self._box
        _, along_y, along_x = self._plans[row.plan]
        top, left = along_y.starts[y], along_x.starts[x]
        first, last = max(left, x0), min(left + along_x.patch, x1)
        _, weights_y, weights_x = self._weights[row.plan]
        weight_x = weights_x[x, first - left : last - left]
        planes = slice(*(plane - row.start for plane in self._planes(row)))
        strip = self._strip(row.plan)[channel, planes, :, first - x0 : last - x0]
        values = probability[planes, :, first - left : last - left].to(self._device)
        for a, b, slot in _wrapped(max(top, y0), min(top + along_y.patch, y1), 0, along_y.patch):
            weight = weights_y[y, a - top : b - top, None] * weight_x
            strip[:, slot : slot + b - a].addcmul_(values[:, a - top : b - top], weight)

    def fold(self, row: Row, y: int, next_line: int, valid: np.ndarray | None) -> None:
        """Take the finished lines of window line `y`, up to `next_line`, out of the strip.

        Planes are folded upwards: a plane's slot in the carry is read before that of the one that follows is written.
        valid: which voxels count, of the row's planes and the box's lines and columns, or None for all.
        """
        y0, y1 = self._box[0][1], self._box[1][1]
        lower, upper = self._planes(row)
        along_y = self._plans[row.plan][1]
        stop = min(max(row.stop, lower), upper)
        self._output.make_room(stop)
        held = min(max(self._top, lower), upper)  # planes below it have sums in the carry
        in_carry = _wrapped(lower, upper, self._box[0][0], self._carry.shape[1])
        seams = (first for first, _, _ in (*in_carry, *self._output.places(lower, stop)))
        edges = sorted({lower, stop, held, upper, *seams})
        for first, last, slot in _wrapped(max(along_y.starts[y], y0), min(next_line, y1), 0, along_y.patch):
            lines = slice(first - y0, last - y0)
            planes = max(1, len(self._scratch) // ((last - first) * self._columns))
            for begin, end in pairwise(edges):
                for a in range(begin, end, planes):
                    b = min(a + planes, end)
                    counted = None if valid is None or a >= stop else valid[a - row.start : b - row.start, lines]
                    self._fold_block(row, (a, b), lines, slot, held=a < held, final=a < stop, counted=counted)

    def _fold_block(
        self,
        row: Row,
        planes: tuple[int, int],
        lines: slice,
        slot: int,
        *,
        held: bool,
        final: bool,
        counted: np.ndarray | None,
    ) -> None:
        """Fold some planes and lines, few enough that they stay in the processor's cache from step to step.

        slot: of the first line in the strip. held: the carry has sums of these planes. final: they get no more.
        """
        first, last = planes
        count, height = last - first, lines.stop - lines.start
        weight = self._weights[row.plan][0][row.number, first - row.start : last - row.start] * self._scale
        weight = weight.view(-1, 1, 1)
        sums = self._scratch[: count * height * self._columns].view(count, height, self._columns)
        mask = None if counted is None else torch.from_numpy(counted).to(self._device)
        strip = self._strip(row.plan)[:, first - row.start : last - row.start, slot : slot + height]
        if held or not final:
            ((_, _, place),) = _wrapped(first, last, self._box[0][0], self._carry.shape[1])
            carry = self._carry[:, place : place + count, lines]
        if final:
            ((_, _, place),) = self._output.places(first, last)
            output = self._output.planes[:, place : place + count, lines]
        for channel in range(self._channels):
            torch.mul(strip[channel], weight, out=sums)
            strip[channel].zero_()
            if held:
                sums.add_(carry[channel])
            self._total += sums.sum()  # on its device: nobody waits for it here
            if not final:
                carry[channel].copy_(sums)
                continue
            finished = self._finish(channel, sums)
            output[channel].copy_(finished if mask is None else finished.mul_(mask))

    def finite(self) -> bool:
        """Return whether all sums so far are numbers. The one time that a row waits for the GPU."""
        return math.isfinite(float(self._total))

    def end_row(self, row: Row) -> None:
        """Note that all windows of the row are added; its final planes then go to the host."""
        z0, z1 = self._box[0][0], self._box[1][0]
        self._top = max(self._top, self._planes(row)[1])
        self._output.copy(min(max(row.stop, z0), z1))


def _buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor with undefined content. On the host by way of numpy, which asks for huge pages."""
    if device.type == "cpu":
        numpy_type = next(key for key, value in _TYPES.items() if value == dtype)
        return torch.from_numpy(np.empty(shape, numpy_type))
    return torch.empty(shape, dtype=dtype, device=device)


def _run(network: Network, images: torch.Tensor, least: int, exactly: int | None) -> torch.Tensor:
    """Return the logits (B, C, z, y, x). Raises PredictionError unless C >= `least` and, if given, C == `exactly`."""
    logits = network(images)
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else ()
    if len(shape) != 5 or (shape[0], *shape[2:]) != (images.shape[0], *images.shape[2:]):
        got = shape or type(logits).__name__
        raise PredictionError(f"the network gave {got} for an input of {tuple(images.shape)}; expected (B, C, z, y, x)")
    if shape[1] < least or exactly not in (None, shape[1]):
        raise PredictionError(f"the network gave {shape[1]} channels, expected {exactly or f'at least {least}'}")
    return logits


def _views(
    network: Network, images: torch.Tensor, plan: int, symmetry: Symmetry, least: int, exactly: int | None
) -> torch.Tensor:
    """Return the logits (B, C, z, y, x) of windows of a plan, of which the network sees one symmetry of its patch."""
    shown = symmetry.apply(images.movedim(2 + plan, 2))
    return symmetry.undo(_run(network, shown.contiguous(), least, exactly)).movedim(2, 2 + plan)


@torch.inference_mode()
def predict_box(
    network: Network,
    source: Source,
    plans: Sequence[Plan],
    box: Box,
    write: Write,
    *,
    channels: Sequence[int],
    depth: int = DEFAULT_DEPTH,
    normalise: np.ndarray,
    batch: int = 1,
    device: torch.device,
    network_channels: int | None = None,
    output: str = "uint8",
    thresholds: Sequence[float] | None = None,
    symmetries: Sequence[Symmetry] = (Symmetry(),),
) -> None:
    """Predict `box`, from its lowest plane upwards, and hand finished planes to `write`.

    plans: of `make_plans`; the mean of what they give is written. box: lower and upper corner in voxels of the volume.
    write: called as write(first plane, end plane, array (C, planes, y, x)), in order, in one other thread, while the
    network goes on; the array is valid until it returns. Pieces end at multiples of `depth`, or at the box's end.
    channels: those of the network's channels that are kept, in this order; network_channels: how many it must have in
    all, None for any number. normalise: float32 (256,) by uint8 value. batch: windows in one call of the network.
    output: see `plan.OUTPUTS`; "mask" needs `thresholds`, one per kept channel. symmetries: of the network's patch;
    probabilities are averaged over them.
    Windows without a valid voxel are left out; voxels that are not valid get 0.
    Raises PredictionError naming the window if a probability is NaN, ConfigError for another output, and what the
    source and `write` raise; no `write` is under way then.
    """
    finish, scale = _finishing(output, thresholds, len(channels))
    need = planes_needed(plans, box[0][0], box[1][0], depth)
    place = _sums_device(plans, box, len(channels), depth, output, device)
    rows = rows_of(plans, box[0][0], box[1][0])
    with _one_thread("reader") as reader, _one_thread("writer") as writer:
        ring = (len(channels), need.ring, box[1][1] - box[0][1], box[1][2] - box[0][2])
        finished = _Output(ring, _TYPES[OUTPUTS[output]], box, depth, write, writer, place)
        slab = _Slab(source, plans, box, rows, reader)
        sums = _Sums(plans, box, len(channels), need, finished, finish, scale, place)
        windows = _Windows(network, normalise, channels, network_channels, symmetries, batch, device)
        for row in rows:
            plan = plans[row.plan]
            image, valid = slab.advance(row.start, row.start + plan[0].patch)
            work = _Work(row, plan, box, image, None if valid is None or valid.all() else valid, slab.corner)
            windows.run(work, sums)
            sums.end_row(row)
            if not sums.finite():
                windows.blame(work)
            finished.hand_over()
        finished.finish()


@dataclass(frozen=True)
class _Work:
    """A row of windows of `plan`, and the image and validity (None: everywhere) under it.

    image, valid: (z, y, x), from the row's first plane and line and column `corner` on. box: what is predicted.
    """

    row: Row
    plan: Plan
    box: Box
    image: np.ndarray
    valid: np.ndarray | None
    corner: tuple[int, ...]

    def cut(self, array: np.ndarray, j: int, k: int) -> np.ndarray:
        """Return what lies under window (j, k) of the row."""
        _, y, x = self.plan
        top, left = y.starts[j] - self.corner[0], x.starts[k] - self.corner[1]
        return array[:, top : top + y.patch, left : left + x.patch]


class _Windows:
    """The network at work on one row of windows after the other."""

    def __init__(
        self,
        network: Network,
        normalise: np.ndarray,
        channels: Sequence[int],
        network_channels: int | None,
        symmetries: Sequence[Symmetry],
        batch: int,
        device: torch.device,
    ) -> None:
        self._network, self._channels, self._network_channels = network, channels, network_channels
        self._symmetries, self._batch, self._device = symmetries, batch, device
        self._table = torch.from_numpy(np.asarray(normalise, np.float32)).to(device)
        self._probability = torch.empty(0, device=device)

    def run(self, work: _Work, sums: _Sums) -> None:
        """Add the windows of a row to the sums."""
        row, y, counted = work.row, work.plan[1], None
        lower, upper = work.box
        if work.valid is not None:
            inside = tuple(slice(a - c, b - c) for a, b, c in zip(lower[1:], upper[1:], work.corner, strict=True))
            counted = work.valid[(slice(None), *inside)]
        lines = y.touching(lower[1], upper[1])
        line_ends = [*(y.starts[j] for j in lines[1:]), y.starts[lines[-1]] + y.patch]
        pending = iter(zip(lines, line_ends, strict=True))
        line, line_end = next(pending)
        for (j, k), probabilities in self._answers(work):
            while line != j:
                sums.fold(row, line, line_end, counted)
                line, line_end = next(pending)
            for kept, probability in enumerate(probabilities):
                sums.add(row, kept, probability, j, k)
        sums.fold(row, line, line_end, counted)
        for line, line_end in pending:
            sums.fold(row, line, line_end, counted)

    def blame(self, work: _Work) -> NoReturn:
        """Raise PredictionError naming the window of a row that gave NaN, found by running them again.

        To look at every window in the first place would cost a tenth of the stitching.
        """
        _, y, x = work.plan
        shape = tuple(axis.patch for axis in work.plan)
        for (j, k), probabilities in self._answers(work):
            if not all(math.isfinite(float(probability.sum())) for probability in probabilities):
                raise PredictionError(
                    f"the network gave NaN in the window at voxel {(work.row.start, y.starts[j], x.starts[k])} "
                    f"(z, y, x) of size {shape}; check its weights and the image there"
                )
        raise PredictionError(
            f"the network gave NaN in a window of size {shape} that begins in plane {work.row.start}, but not when it "
            "was run again; check the machine's memory and GPU"
        )

    def _answers(self, work: _Work) -> Iterator[tuple[tuple[int, int], Iterator[torch.Tensor]]]:
        """Yield the numbers along y and x of each window of a row that has a valid voxel, with its probabilities."""
        (_, *lower), (_, *upper) = work.box
        along = zip(work.plan[1:], lower, upper, strict=True)
        wanted = list(product(*(axis.touching(a, b) for axis, a, b in along)))
        if work.valid is not None:
            wanted = [place for place in wanted if work.cut(work.valid, *place).any()]
        for first in range(0, len(wanted), self._batch):
            places = wanted[first : first + self._batch]
            answers = self._probabilities(np.stack([work.cut(work.image, *place) for place in places]), work.row.plan)
            yield from zip(places, answers, strict=True)

    def _probabilities(self, images: np.ndarray, plan: int) -> Iterator[Iterator[torch.Tensor]]:
        """Yield the probabilities of each of the windows (B, z, y, x), channel by channel: the next overwrites it."""
        shown = self._lookup(images[:, None])
        least = max(self._channels) + 1
        if self._probability.shape != images.shape[1:]:
            self._probability = torch.empty(images.shape[1:], device=self._device)
        if len(self._symmetries) == 1:
            logits = _views(self._network, shown, plan, self._symmetries[0], least, self._network_channels)
            for answer in logits:
                yield (self._sigmoid(answer[channel]) for channel in self._channels)
            return
        mean = torch.zeros((len(images), len(self._channels), *images.shape[1:]), device=self._device)
        for symmetry in self._symmetries:
            logits = _views(self._network, shown, plan, symmetry, least, self._network_channels)
            for total, answer in zip(mean, logits, strict=True):
                for kept, channel in enumerate(self._channels):
                    total[kept].add_(self._sigmoid(answer[channel]))
            del logits, answer  # either would hold them beside those of the next view
        mean /= len(self._symmetries)
        for answer in mean:
            yield iter(answer)

    def _sigmoid(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(logits.float(), out=self._probability)  # in bfloat16 it would be rounded

    def _lookup(self, images: np.ndarray) -> torch.Tensor:
        """Return the intensities that the network sees, float32, of uint8 images."""
        if self._device.type == "cpu":
            return torch.from_numpy(self._table.numpy()[images])
        shown = torch.from_numpy(images).pin_memory().to(self._device, non_blocking=True)
        return self._table[shown.int()]


@contextmanager
def _one_thread(name: str) -> Iterator[Executor]:
    """Yield an executor of one thread; at the end what has not begun is left out, and the thread ends."""
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _finishing(
    output: str, thresholds: Sequence[float] | None, channels: int
) -> tuple[Callable[[int, torch.Tensor], torch.Tensor], float]:
    """Return what makes final sums of a channel into what is stored, in place, and the scale of the sums."""
    if output not in OUTPUTS:
        raise ConfigError(f"predict.output: unknown '{output}'; allowed: {', '.join(OUTPUTS)}")
    if output == "uint8":
        return lambda channel, sums: sums.add_(0.5), 255.0  # + 0.5, then cut off = rounded
    if output == "float16":
        return lambda channel, sums: sums.clamp_(max=1), 1.0
    if thresholds is None or len(thresholds) != channels:
        raise ConfigError(f"predict.output mask needs one threshold for each of {channels} classes; got {thresholds}")
    return lambda channel, sums: sums.gt_(thresholds[channel]).mul_(255), 1.0


def _sums_device(
    plans: Sequence[Plan], box: Box, channels: int, depth: int, output: str, device: torch.device
) -> torch.device:
    """Return where the sums are kept: beside the network if they take a minor part of its GPU, else on the host."""
    if device.type != "cuda":
        return torch.device("cpu")
    available = _DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory
    return device if estimate_bytes(plans, box, channels, depth, 1, output=output) <= available else torch.device("cpu")


@contextmanager
def evaluating(network: Network) -> Iterator[torch.device | None]:
    """Put a module into evaluation mode for a while; yield its device (None: the callable does not say)."""
    if not isinstance(network, torch.nn.Module):
        yield None
        return
    was_training = network.training
    network.eval()
    try:
        yield next((parameter.device for parameter in network.parameters()), None)
    finally:
        network.train(was_training)


def chunk_shape(out: Any) -> Shape3:
    """Return the (z, y, x) shape that `out` (C, z, y, x) is best written in: its shards, its chunks, or a default."""
    chunks = getattr(out, "shards", None) or getattr(out, "chunks", None)
    return shape3(chunks[1:]) if chunks else (DEFAULT_DEPTH, DEFAULT_COLUMN, DEFAULT_COLUMN)


def predict_array(
    network: Network,
    image: Any,
    *,
    patch: Sequence[int],
    overlap: float = 0.5,
    out: Any,
    classes: Sequence[int] | None = None,
    memory_gb: float | None = None,
    normalise: np.ndarray | None = None,
    blending: str = "gaussian",
    batch: int = 1,
    device: str | torch.device | None = None,
    valid: Any = None,
    thresholds: Sequence[float] | None = None,
    tta: int = 1,
    planes: str = "z",
    voxel_nm: Sequence[float] = (1, 1, 1),
) -> None:
    """Write the class probabilities of `image` to `out` (C, z, y, x): uint8, round(255 p), or float16, p.

    network: maps (B, 1, *patch) float32 to logits (B, C, *patch). A module is put into evaluation mode meanwhile.
    image: uint8 (z, y, x), numpy or zarr; read and written slab by slab, so memory does not grow with the depth.
    patch, overlap: window (z, y, x) and the least share by which neighbours overlap; an image smaller than the patch is
    reflected. A patch of one plane serves a 2D network.
    classes: numbers of the network's channels to keep, in the order of `out`; None keeps all.
    memory_gb: bound in 10^9 bytes on the memory taken beside the network; larger cross-sections are cut in columns.
    normalise: float32 (256,) intensity by uint8 value (`intensity.lookup_table`); None divides by 255.
    blending: weights of the windows, "gaussian" or "constant". batch: windows in one call of the network.
    valid: bool (z, y, x) or None; elsewhere the probability is 0 and no window is run for its sake.
    thresholds: one per kept class; the uint8 `out` is then 255 where p exceeds it, else 0. None writes probabilities.
    tta: views of each window that are averaged, see `symmetries`. planes: "z", or "all" to average what a 2D network
    sees across each axis, see `make_plans`. voxel_nm: voxel size (z, y, x) in nm, which decides whether these may be.
    Raises ConfigError (arguments, geometry, memory), DataError (image not 3-D, empty or not uint8; `valid` of another
    shape) and PredictionError naming the window (NaN).
    """
    if len(image.shape) != 3 or 0 in image.shape:
        raise DataError(f"the image has shape {tuple(image.shape)}, expected (z, y, x); pass one 3-D array with voxels")
    if np.dtype(image.dtype) != np.uint8:
        raise DataError(f"the image is {image.dtype}, expected uint8; convert it or choose another array")
    if valid is not None and tuple(valid.shape) != tuple(image.shape):
        raise DataError(f"valid has shape {tuple(valid.shape)}, the image {tuple(image.shape)}; they must be equal")
    if len(patch) != 3 or min(patch) < 1:
        raise ConfigError(f"patch {tuple(patch)} must be three sizes (z, y, x), each at least 1")
    if batch < 1:
        raise ConfigError(f"predict.batch {batch} must be at least 1")
    shape = shape3(image.shape)
    output = "mask" if thresholds is not None else "float16" if out.dtype == np.float16 else "uint8"
    if len(out.shape) != 4 or tuple(out.shape[1:]) != shape or np.dtype(out.dtype) != OUTPUTS[output]:
        expected = f"uint8 (classes, {', '.join(map(str, shape))})"
        raise ConfigError(f"out is {out.dtype} {tuple(out.shape)}; expected {expected}, or float16 for probabilities")
    channels = list(range(out.shape[0])) if classes is None else list(classes)
    if len(channels) != out.shape[0]:
        raise ConfigError(f"out has {out.shape[0]} channels for {len(channels)} classes")
    if not channels or min(channels) < 0:
        raise ConfigError(f"classes {channels} must be numbers of the network's channels, at least one, from 0 upwards")
    table = (np.arange(256) / 255).astype(np.float32) if normalise is None else np.asarray(normalise, np.float32)
    views = symmetries(tta, shape3(patch), vec3(voxel_nm))
    plans = make_plans(shape, patch, overlap, blending, planes=planes, voxel_nm=vec3(voxel_nm))
    depth, *align = chunk_shape(out)
    boxes = columns(
        plans,
        len(channels),
        depth,
        batch,
        (align[0], align[1]),
        memory_gb,
        output=output,
        symmetries=len(views),
    )
    with evaluating(network) as home:
        for box in boxes:
            predict_box(
                network,
                ArraySource(image, valid),
                plans,
                box,
                partial(_write_column, out, box),
                channels=channels,
                depth=depth,
                normalise=table,
                batch=batch,
                device=torch.device(device or home or "cpu"),
                network_channels=len(channels) if classes is None else None,
                output=output,
                thresholds=thresholds,
                symmetries=views,
            )


def _write_column(out: Any, box: Box, first: int, last: int, piece: np.ndarray) -> None:
    (_, y0, x0), (_, y1, x1) = box
    out[:, first:last, y0:y1, x0:x1] = piece
