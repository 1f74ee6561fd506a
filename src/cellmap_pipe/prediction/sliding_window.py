"""Sliding-window prediction in one pass along z: memory is bounded by patch and cross-section, never by depth.

The weight of a window is the product of one weight per axis, and these are normalised beforehand so that at every voxel
they add up to one; the blended probability is then a plain sum, and it folds up axis by axis. The windows of one row
along x are added up in a *strip* (one patch high); finished lines of the strip are weighted along z and added to the
*carry*, which holds the planes that the next row of windows still changes; finished planes leave as uint8.
A voxel gets the same terms in the same order however the volume is cut, so any cut gives the same bits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch

from cellmap_pipe.errors import ConfigError, DataError
from cellmap_pipe.geometry import Shape3, shape3
from cellmap_pipe.prediction.plan import Box, Plan, columns, estimate_bytes, make_plan, planes_needed

Network = Callable[[torch.Tensor], torch.Tensor]

# Planes that are written together, and the grain of columns, where the output does not say how its chunks lie.
DEFAULT_DEPTH = 64
DEFAULT_COLUMN = 64

_TYPES = {np.dtype(np.float16): torch.float16, np.dtype(np.float32): torch.float32}

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


def _read_mirrored(source: Source, lower: Shape3, upper: Shape3, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Return image and validity of a box that may reach beyond what the source has."""
    index = [_mirrored(a, b, axis.domain) for a, b, axis in zip(lower, upper, plan, strict=True)]
    corner = shape3([i.min() for i in index])
    image, valid = source.read(corner, shape3([i.max() + 1 for i in index]))
    if image.dtype != np.uint8:
        raise DataError(f"the image is {image.dtype}, expected uint8; convert it or choose another array")
    if valid is None:
        valid = np.ones(image.shape, bool)
    for axis, (i, first) in enumerate(zip(index, corner, strict=True)):
        if not np.array_equal(i - first, np.arange(image.shape[axis])):
            image, valid = image.take(i - first, axis), valid.take(i - first, axis)
    return image, valid


class _Slab:
    """The image under one row of windows along z; going on to the next row reads only the new planes."""

    def __init__(self, source: Source, plan: Plan, y: Sequence[int], x: Sequence[int]) -> None:
        self._source, self._plan = source, plan
        starts = [[axis.starts[i] for i in chosen] for axis, chosen in zip(plan[1:], (y, x), strict=True)]
        self.corner = tuple(min(s) for s in starts)
        self._end = tuple(max(s) + axis.patch for s, axis in zip(starts, plan[1:], strict=True))
        self._start: int | None = None
        self.image = np.empty(0, np.uint8)
        self.valid = np.empty(0, bool)

    def _read(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        return _read_mirrored(self._source, shape3((first, *self.corner)), shape3((last, *self._end)), self._plan)

    def advance(self, start: int) -> None:
        """Make the slab hold the planes of the windows that begin at plane `start`."""
        end = start + self._plan[0].patch
        if self._start is None or start >= self._start + self._plan[0].patch:
            image, valid = self._read(start, end)
            self.image, self.valid = image.copy(), valid.copy()  # the source may give views of what it holds
        elif start > self._start:
            moved = start - self._start
            image, valid = self._read(end - moved, end)
            for held, new in ((self.image, image), (self.valid, valid)):
                held[:-moved] = held[moved:]
                held[-moved:] = new
        self._start = start

    def cut(self, array: np.ndarray, y: int, x: int) -> np.ndarray:
        """Return the part of `array` (the slab's image or validity) under the window at line y, column x."""
        y, x = y - self.corner[0], x - self.corner[1]
        return array[:, y : y + self._plan[1].patch, x : x + self._plan[2].patch]


class _Sums:
    """Weighted sums of the windows that touch one box of the volume, on `device`."""

    def __init__(
        self, plan: Plan, box: Box, rows: Sequence[int], channels: int, depth: int, device: torch.device
    ) -> None:
        self._plan, self._box, self._depth, self._device = plan, box, depth, device
        z, y, _ = plan
        (z0, y0, x0), (z1, y1, x1) = box
        need = planes_needed(z, rows, z1 - z0, depth)
        lines, columns = y1 - y0, x1 - x0
        self._carry = torch.empty((channels, need.carry, lines, columns), dtype=_TYPES[need.carry_type], device=device)
        self._strip = torch.zeros((channels, z.patch, y.patch, columns), device=device)
        self._scratch = torch.empty(z.patch * y.patch * columns, device=device)
        self._done = torch.empty((channels, need.done, lines, columns), dtype=torch.uint8, device=device)
        self._done_from, self._done_to = z0, z0
        self._carried = 0
        self._weights = [torch.from_numpy(axis.weights).to(device) for axis in plan]

    def add(self, channel: int, probability: torch.Tensor, y: int, x: int) -> None:
        """Add one channel (z, y, x) of window (y, x) of the current row to the strip."""
        x0, x1 = self._box[0][2], self._box[1][2]
        start = self._plan[2].starts[x]
        first, last = max(start, x0), min(start + self._plan[2].patch, x1)
        weight = self._weights[1][y, :, None] * self._weights[2][x, None, first - start : last - start]
        target = self._strip[channel, :, :, first - x0 : last - x0]
        target.addcmul_(probability[:, :, first - start : last - start].to(self._device), weight)

    def fold(self, row: int, start: int, stop: int, y: int, next_line: int, valid: np.ndarray | None) -> None:
        """Take the finished lines of window line `y`, up to `next_line`, out of the strip.

        row, start: the current row along z and its first plane; planes from `start` up to `stop` are finished by it.
        valid: which of its voxels count, (patch, lines, columns) of the box, or None for all.
        """
        (z0, y0, _), (z1, y1, _) = self._box
        begin = self._plan[1].starts[y]
        patch, columns = self._plan[0].patch, self._strip.shape[3]
        first, last = max(begin, y0), min(next_line, y1)
        if first >= last:  # these lines lie before the box
            self._move_strip(next_line - begin)
            return
        lines = slice(first - y0, last - y0)
        kept = start + patch - stop
        from_plane, to_plane = max(start, z0), min(stop, z1)
        weight = (self._weights[0][row] * 255).view(-1, 1, 1)
        planes = self._scratch[: patch * (last - first) * columns].view(patch, last - first, columns)
        for channel in range(self._strip.shape[0]):
            torch.mul(self._strip[channel, :, first - begin : last - begin], weight, out=planes)
            if self._carried:
                planes[: self._carried].add_(self._carry[channel, : self._carried, lines])
            if kept:
                self._carry[channel, :kept, lines].copy_(planes[stop - start :])
            if to_plane > from_plane:
                finished = planes[from_plane - start : to_plane - start].add_(0.5)  # + 0.5, then cut off = rounded
                if valid is not None:
                    counted = torch.from_numpy(valid[from_plane - start : to_plane - start, lines])
                    finished.mul_(counted.to(self._device))
                target = self._done[channel, from_plane - self._done_from : to_plane - self._done_from, lines]
                target.copy_(finished)
        self._move_strip(next_line - begin)

    def _move_strip(self, lines: int) -> None:
        """Move the strip on by `lines`, in pieces that do not overlap."""
        height = self._strip.shape[2]
        for first in range(0, height - lines, lines):
            last = min(first + lines, height - lines)
            self._strip[:, :, first:last].copy_(self._strip[:, :, first + lines : last + lines])
        self._strip[:, :, max(height - lines, 0) :].zero_()

    def end_row(self, start: int, stop: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Finish the row, and with it planes `start` up to `stop`. Yields finished planes once they fill chunks."""
        z1 = self._box[1][0]
        self._carried = start + self._plan[0].patch - stop
        self._done_to = max(self._done_to, min(stop, z1))
        ready = z1 if self._done_to == z1 else self._done_to // self._depth * self._depth
        if ready > self._done_from:
            count, rest = ready - self._done_from, self._done_to - ready
            yield self._done_from, ready, self._done[:, :count].cpu().numpy()
            if rest:
                self._done[:, :rest] = self._done[:, count : count + rest].clone()
            self._done_from = ready


def _lookup(image: np.ndarray, table: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return the intensities that the network sees: `table` at each uint8 value, float32, same shape."""
    if device.type == "cpu":
        return torch.from_numpy(table[image])
    return torch.from_numpy(table).to(device)[torch.from_numpy(image).to(device).int()]


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


@torch.inference_mode()
def stream(
    network: Network,
    source: Source,
    plan: Plan,
    box: Box,
    *,
    channels: Sequence[int],
    depth: int = DEFAULT_DEPTH,
    normalise: np.ndarray,
    batch: int = 1,
    device: torch.device,
    network_channels: int | None = None,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (first plane, end plane, uint8 probabilities (C, planes, y, x)) of `box`, from its lowest plane upwards.

    box: lower and upper corner in voxels of the planned volume. Ends of the pieces are multiples of `depth`, or the end
    of the box. An array that was yielded is overwritten when the next is asked for.
    channels: those of the network's channels that are kept, in this order; network_channels: how many it must have in
    all, None for any number. normalise: float32 (256,) by uint8 value.
    Windows without a valid voxel are left out; voxels that are not valid get 0.
    Raises PredictionError naming the window if a probability is NaN.
    """
    (z0, y0, x0), (z1, y1, x1) = box
    z, y, x = plan
    rows, lines, columns = z.touching(z0, z1), y.touching(y0, y1), x.touching(x0, x1)
    slab = _Slab(source, plan, lines, columns)
    sums = _Sums(plan, box, rows, len(channels), depth, _sums_device(plan, box, len(channels), depth, device))
    probability = torch.empty((z.patch, y.patch, x.patch), device=device)
    inside = (slice(y0 - slab.corner[0], y1 - slab.corner[0]), slice(x0 - slab.corner[1], x1 - slab.corner[1]))
    line_ends = [*(y.starts[j] for j in lines[1:]), y.starts[lines[-1]] + y.patch]
    row_ends = [*(z.starts[i] for i in rows[1:]), z.starts[rows[-1]] + z.patch]
    for row, stop in zip(rows, row_ends, strict=True):
        start = z.starts[row]
        slab.advance(start)
        counted = None if slab.valid.all() else slab.valid[:, inside[0], inside[1]]
        wanted = [(j, k) for j, k in product(lines, columns) if slab.cut(slab.valid, y.starts[j], x.starts[k]).any()]
        pending = iter(zip(lines, line_ends, strict=True))
        line, line_end = next(pending)
        for first in range(0, len(wanted), batch):
            windows = wanted[first : first + batch]
            images = np.stack([slab.cut(slab.image, y.starts[j], x.starts[k]) for j, k in windows])
            logits = _run(network, _lookup(images[:, None], normalise, device), max(channels) + 1, network_channels)
            for number, (j, k) in enumerate(windows):
                while line != j:
                    sums.fold(row, start, stop, line, line_end, counted)
                    line, line_end = next(pending)
                total = torch.zeros((), device=device)
                for kept, channel in enumerate(channels):
                    torch.sigmoid(logits[number, channel].float(), out=probability)  # bfloat16 would round it
                    total += probability.sum()
                    sums.add(kept, probability, j, k)
                if not math.isfinite(float(total)):
                    corner = (start, y.starts[j], x.starts[k])
                    raise PredictionError(
                        f"the network gave NaN in the window at voxel {corner} (z, y, x) of size "
                        f"{(z.patch, y.patch, x.patch)}; check its weights and the image there"
                    )
        sums.fold(row, start, stop, line, line_end, counted)
        for line, line_end in pending:
            sums.fold(row, start, stop, line, line_end, counted)
        yield from sums.end_row(start, stop)


def _sums_device(plan: Plan, box: Box, channels: int, depth: int, device: torch.device) -> torch.device:
    """Return where the sums are kept: beside the network if they take a minor part of its GPU, else on the host."""
    if device.type != "cuda":
        return torch.device("cpu")
    available = _DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory
    return device if estimate_bytes(plan, box, channels, depth, 1) <= available else torch.device("cpu")


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
) -> None:
    """Write the class probabilities of `image` to `out`, uint8 (C, z, y, x), round(255 p).

    network: maps (B, 1, *patch) float32 to logits (B, C, *patch). A module is put into evaluation mode meanwhile.
    image: uint8 (z, y, x), numpy or zarr; read and written slab by slab, so memory does not grow with the depth.
    patch, overlap: window (z, y, x) and the least share by which neighbours overlap; an image smaller than the patch is
    reflected. A patch of one plane serves a 2D network.
    classes: numbers of the network's channels to keep, in the order of `out`; None keeps all.
    memory_gb: bound in 10^9 bytes on the memory taken beside the network; larger cross-sections are cut in columns.
    normalise: float32 (256,) intensity by uint8 value (`intensity.lookup_table`); None divides by 255.
    blending: weights of the windows, "gaussian" or "constant". batch: windows in one call of the network.
    valid: bool (z, y, x) or None; elsewhere the probability is 0 and no window is run for its sake.
    Raises ConfigError (arguments, geometry, memory), DataError (image not 3-D or not uint8) and PredictionError naming
    the window (NaN).
    """
    if len(image.shape) != 3:
        raise DataError(f"the image has shape {tuple(image.shape)}, expected (z, y, x); pass one 3-D array")
    if np.dtype(image.dtype) != np.uint8:
        raise DataError(f"the image is {image.dtype}, expected uint8; convert it or choose another array")
    if len(patch) != 3 or min(patch) < 1:
        raise ConfigError(f"patch {tuple(patch)} must be three sizes (z, y, x), each at least 1")
    if batch < 1:
        raise ConfigError(f"predict.batch {batch} must be at least 1")
    shape = shape3(image.shape)
    if len(out.shape) != 4 or tuple(out.shape[1:]) != shape or np.dtype(out.dtype) != np.uint8:
        expected = f"uint8 (classes, {', '.join(map(str, shape))})"
        raise ConfigError(f"out is {out.dtype} {tuple(out.shape)}; expected {expected}")
    channels = list(range(out.shape[0])) if classes is None else list(classes)
    if len(channels) != out.shape[0]:
        raise ConfigError(f"out has {out.shape[0]} channels for {len(channels)} classes")
    if not channels or min(channels) < 0:
        raise ConfigError(f"classes {channels} must be numbers of the network's channels, at least one, from 0 upwards")
    table = (np.arange(256) / 255).astype(np.float32) if normalise is None else np.asarray(normalise, np.float32)
    plan = make_plan(shape, patch, overlap, blending)
    depth, *align = chunk_shape(out)
    with evaluating(network) as home:
        chosen = torch.device(device or home or "cpu")
        for box in columns(plan, len(channels), depth, batch, (align[0], align[1]), memory_gb):
            (_, y0, x0), (_, y1, x1) = box
            pieces = stream(
                network,
                ArraySource(image, valid),
                plan,
                box,
                channels=channels,
                depth=depth,
                normalise=table,
                batch=batch,
                device=chosen,
                network_channels=len(channels) if classes is None else None,
            )
            for first, last, probabilities in pieces:
                out[:, first:last, y0:y1, x0:x1] = probabilities
