"""Which truth objects meet which predicted components, from runs of equal voxels along x.

Counting runs instead of voxels needs no sort over the volume, and the runs are a sparse copy of every object: its size,
box and voxels follow without another look at the volume, which is read once, slab by slab.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from cellmap_pipe.evaluation.components import Components


@dataclass(frozen=True)
class Runs:
    """Maximal pieces of rows along x in which (truth, component) is constant and not background in both, in C order.

    start: flat index of the first voxel (int64); length in voxels; truth: id; pred: number of the component, 0 none.
    shape: of the volume (z, y, x). n_pred: number of components.
    """

    shape: tuple[int, ...]
    start: np.ndarray
    length: np.ndarray
    truth: np.ndarray
    pred: np.ndarray
    n_pred: int


@dataclass(frozen=True)
class Objects:
    """The objects of one label volume: ascending `ids`, and per object its size, its box and its runs.

    lower, upper: (n, 3) voxel indices, upper exclusive. index: per run, the object's position in `ids`, -1 for none.
    order, first: the runs of object i are order[first[i]:first[i + 1]], in C order.
    """

    ids: np.ndarray
    size: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    index: np.ndarray
    order: np.ndarray
    first: np.ndarray

    def runs_of(self, i: int) -> np.ndarray:
        return self.order[self.first[i] : self.first[i + 1]]


# Runs after which it is asked whether they are needed: noise has as many as voxels
MANY_RUNS = 16_000_000


def find_runs(
    slabs: Iterable[tuple[np.ndarray, np.ndarray]],
    shape: tuple[int, ...],
    watch: Callable[[int, int], None] | None = None,
) -> Runs:
    """Return the foreground runs of a volume (z, y, x) given as slabs (truth ids, predicted values) along z.

    Of the prediction, the 26-connected components of equal non-zero values count. Only runs are kept of a slab.
    watch: told, each time that MANY_RUNS more are found, their number and that of components that there are at least;
    it may raise, so that what follows is not read.
    """
    X = shape[2]
    components = Components()
    nothing = np.zeros(0, np.int64)
    parts = [(nothing, nothing.astype(np.min_scalar_type(X)), nothing.astype(np.uint8), nothing.astype(np.uint32))]
    offset = n_runs = 0
    for truth, pred in slabs:
        if not truth.any() and not pred.any():
            components.skip()
            offset += truth.size
            continue
        labels, before = components.add_counted(pred)
        t = np.ascontiguousarray(truth, truth.dtype.newbyteorder("=")).reshape(-1)
        p = labels.reshape(-1)
        begins = np.empty(t.size, bool)
        np.not_equal(t[1:], t[:-1], out=begins[1:])
        begins[1:] |= p[1:] != p[:-1]
        begins[::X] = True  # a run ends with its row
        start = np.flatnonzero(begins)
        del begins
        run_t, run_p = t[start], p[start]
        keep = (run_t > 0) | (run_p > 0)
        length = np.diff(start, append=t.size)[keep].astype(np.min_scalar_type(X))
        run_p = run_p[keep]
        np.add(run_p, np.uint32(before), out=run_p, where=run_p > 0)
        parts.append((start[keep] + offset, length, run_t[keep], run_p))
        offset += t.size
        before, n_runs = n_runs, n_runs + len(length)
        if watch is not None and n_runs // MANY_RUNS > before // MANY_RUNS:
            watch(n_runs, components.least())
        del labels, t, p, start, run_t, keep
    numbers, n_pred = components.join()
    start, length, run_t, run_p = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Runs(shape, start, length, run_t, numbers[run_p], n_pred)


def find_objects(runs: Runs, labels: np.ndarray) -> Objects:
    """Return the objects of one of the two volumes; labels: `runs.truth` or `runs.pred`."""
    position = np.int32 if len(labels) < 2**31 else np.int64
    order = np.flatnonzero(labels).astype(position)
    order = order[np.argsort(labels[order], kind="stable")]
    sorted_labels = labels[order]
    new = np.ones(len(order), bool)
    new[1:] = sorted_labels[1:] != sorted_labels[:-1]
    first = np.flatnonzero(new)
    ids = sorted_labels[first]
    del sorted_labels
    index = np.full(len(labels), -1, position)
    index[order] = np.cumsum(new) - 1
    del new
    n = len(ids)
    size, lower, upper = np.zeros(n, np.int64), np.zeros((n, 3), np.int64), np.zeros((n, 3), np.int64)
    if n:
        length = runs.length[order].astype(np.int64)
        size[:] = np.add.reduceat(length, first)
        rest, x = np.divmod(runs.start[order], runs.shape[2])
        lower[:, 2] = np.minimum.reduceat(x, first)
        upper[:, 2] = np.maximum.reduceat(x + length, first)
        del x, length
        for axis, part in enumerate(np.divmod(rest, runs.shape[1])):
            lower[:, axis] = np.minimum.reduceat(part, first)
            upper[:, axis] = np.maximum.reduceat(part, first) + 1
    return Objects(ids, size, lower, upper, index, order, np.append(first, len(order)))


def count_overlaps(runs: Runs, truths: Objects, preds: Objects) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (truth position, component position, common voxels) of every pair that shares a voxel."""
    both = (truths.index >= 0) & (preds.index >= 0)
    key = truths.index[both] * np.int64(len(preds.ids)) + preds.index[both]
    pairs, inverse = np.unique(key, return_inverse=True)
    common = np.bincount(inverse, weights=runs.length[both], minlength=len(pairs)).astype(np.int64)
    return pairs // max(1, len(preds.ids)), pairs % max(1, len(preds.ids)), common


def voxels_of(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Return the flat indices (int64) of all voxels of runs."""
    length = length.astype(np.int64)
    before = np.cumsum(length) - length
    return np.repeat(start - before, length) + np.arange(int(length.sum()))


def surface_of(start: np.ndarray, length: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return runs (start, length), in C order, of the voxels of a set that have a face neighbour outside, and few more.

    start, length: the runs of the set, in C order. A voxel is left out where its row goes on at both sides and the runs
    above and below the middle of its own, in y and in z, cover it too: inner voxels may stay where rows have gaps.
    """
    Y, X = shape[1:]
    end = start + length
    new = np.append(True, (start[1:] != end[:-1]) | (start[1:] % X == 0))
    start, end = start[new], end[np.append(new[1:], True)]
    lower, upper, middle, y = start + 1, end - 1, (start + end) // 2, start // X % Y
    for step, inside in ((-X, y > 0), (X, y < Y - 1), (-X * Y, True), (X * Y, True)):
        near = np.searchsorted(start, middle + step, "right") - 1
        covered = inside & (near >= 0) & (middle + step < end[near])
        lower = np.where(covered, np.maximum(lower, start[near] - step), end)
        upper = np.where(covered, np.minimum(upper, end[near] - step), start)
    lower = np.minimum(lower, end)
    upper = np.maximum(lower, upper)
    starts = np.stack([start, upper], 1).reshape(-1)
    lengths = np.stack([lower - start, end - upper], 1).reshape(-1)
    return starts[lengths > 0], lengths[lengths > 0]
