"""Which truth objects meet which predicted components, from runs of equal voxels along x.

Counting runs instead of voxels needs no sort over the volume, and the runs are a sparse copy of every object: its size,
box and voxels follow without another look at the volume.
"""

from dataclasses import dataclass

import numpy as np

from cellmap_pipe.evaluation.inputs import slabs


@dataclass(frozen=True)
class Runs:
    """Maximal pieces of rows along x in which (truth, component) is constant and not background in both.

    start: flat index of the first voxel (int64); length in voxels; truth, pred: ids. shape: of the volume (z, y, x).
    """

    shape: tuple[int, ...]
    start: np.ndarray
    length: np.ndarray
    truth: np.ndarray
    pred: np.ndarray


@dataclass(frozen=True)
class Objects:
    """The objects of one label volume: ascending `ids`, and per object its size, its box and its runs.

    lower, upper: (n, 3) voxel indices, upper exclusive. index: per run, the object's position in `ids`, -1 for none.
    order, first: the runs of object i are order[first[i]:first[i + 1]].
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


def find_runs(truth: np.ndarray, pred: np.ndarray) -> Runs:
    """Return the foreground runs of two C-contiguous label volumes (z, y, x) of one shape."""
    X = truth.shape[2]
    parts = []
    for part in slabs(truth.shape):
        t, p = truth[part].reshape(-1), pred[part].reshape(-1)
        begins = np.empty(t.size, bool)
        np.not_equal(t[1:], t[:-1], out=begins[1:])
        begins[1:] |= p[1:] != p[:-1]
        begins[::X] = True  # a run ends with its row
        start = np.flatnonzero(begins)
        length = np.diff(start, append=t.size).astype(np.int32)
        run_t, run_p = t[start], p[start]
        keep = (run_t > 0) | (run_p > 0)
        offset = part.start * truth.shape[1] * X
        parts.append((start[keep] + offset, length[keep], run_t[keep], run_p[keep]))
    start, length, run_t, run_p = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Runs(truth.shape, start, length, run_t, run_p)


def find_objects(runs: Runs, labels: np.ndarray) -> Objects:
    """Return the objects of one of the two volumes; labels: `runs.truth` or `runs.pred`."""
    order = np.flatnonzero(labels)
    order = order[np.argsort(labels[order], kind="stable")]
    sorted_labels = labels[order]
    new = np.ones(len(order), bool)
    new[1:] = sorted_labels[1:] != sorted_labels[:-1]
    first = np.flatnonzero(new)
    index = np.full(len(labels), -1, np.int64)
    index[order] = np.cumsum(new) - 1
    if not len(first):
        none = np.zeros((0, 3), np.int64)
        return Objects(sorted_labels, np.zeros(0, np.int64), none, none, index, order, np.zeros(1, np.int64))
    start, length = runs.start[order], runs.length[order].astype(np.int64)
    z, y, x = np.unravel_index(start, runs.shape)
    lower = np.stack([np.minimum.reduceat(axis, first) for axis in (z, y, x)], 1)
    upper = np.stack([np.maximum.reduceat(axis, first) for axis in (z + 1, y + 1, x + length)], 1)
    return Objects(
        ids=sorted_labels[first],
        size=np.add.reduceat(length, first),
        lower=lower,
        upper=upper,
        index=index,
        order=order,
        first=np.append(first, len(order)),
    )


def count_overlaps(runs: Runs, truths: Objects, preds: Objects) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (truth position, component position, common voxels) of every pair that shares a voxel."""
    both = (truths.index >= 0) & (preds.index >= 0)
    key = truths.index[both] * len(preds.ids) + preds.index[both]
    pairs, inverse = np.unique(key, return_inverse=True)
    common = np.bincount(inverse, weights=runs.length[both], minlength=len(pairs)).astype(np.int64)
    return pairs // max(1, len(preds.ids)), pairs % max(1, len(preds.ids)), common


def voxels_of(runs: Runs, selected: np.ndarray) -> np.ndarray:
    """Return the flat indices (int64, ascending within a run) of all voxels of the `selected` runs."""
    length = runs.length[selected].astype(np.int64)
    before = np.cumsum(length) - length
    return np.repeat(runs.start[selected] - before, length) + np.arange(int(length.sum()))
