"""Resampling between lattices, separable and exact: area means, linear interpolation, and majorities of label states.

Along one axis each target voxel is a weighted mean of source voxels, a row of a sparse matrix; a box is resampled by
three such matrices, one after the other. Arrays are (z, y, x), positions in nm; boxes are compared by their edges.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.sparse import csr_matrix

from cellmap_pipe.geometry import TOLERANCE_NM, Lattice

# A target voxel this much smaller than the source's is still averaged, not interpolated: 2.6 nm from 2.62 nm, which
# `nearest_level` takes for the same.
FINER = 0.99

# Shares that differ by less count as equal: they are sums of float32 weights.
TIE = 1e-4


Span = tuple[int, int]  # first, and the one after the last


@dataclass(frozen=True)
class AxisWeights:
    """Weights of the source voxels in each target voxel along one axis.

    start: source index of the matrix's first column. matrix: (targets, columns) float32 with rows that sum to 1.
    covered: share of each target voxel that lies inside the source's extent, (targets,) in 0..1; a target voxel
    outside it repeats the nearest source voxel. identity: whether target voxel i is just source voxel start + i.
    ratio: target voxel / source voxel.
    """

    start: int
    matrix: csr_matrix
    covered: np.ndarray
    identity: bool
    ratio: float

    @property
    def stop(self) -> int:
        """The source index after the last column."""
        return self.start + int(self.matrix.shape[1])

    def rows(self, first: int, last: int) -> "AxisWeights":
        """Return the weights of the target voxels [first, last) alone."""
        part = self.matrix[first:last]
        lo, hi = int(part.indices.min()), int(part.indices.max()) + 1
        return AxisWeights(self.start + lo, part[:, lo:hi], self.covered[first:last], self.identity, self.ratio)


def axis_weights(source: Lattice, target: Lattice, axis: int, *, interpolate: bool = True) -> AxisWeights:
    """Return the weights that take `source` to `target` along `axis`.

    The area mean over the target voxel, or, where the target is finer and `interpolate` is set, linear interpolation
    between voxel centres.
    """
    n, size = source.shape[axis], source.voxel_nm[axis]
    ratio = target.voxel_nm[axis] / size
    begin = (target.lower_nm[axis] - source.lower_nm[axis]) / size
    count = target.shape[axis]
    snap = max(1e-6, TOLERANCE_NM / size)
    lower = _snapped(begin + np.arange(count) * ratio, snap)
    upper = _snapped(begin + np.arange(1, count + 1) * ratio, snap)
    inner_lower, inner_upper = np.clip(lower, 0, n), np.clip(upper, 0, n)
    covered = np.clip((inner_upper - inner_lower) / (upper - lower), 0, 1)
    if interpolate and ratio < FINER:
        centre = np.clip(_snapped((lower + upper) / 2 - 0.5, snap), 0, n - 1)
        left = np.minimum(np.floor(centre).astype(int), max(0, n - 2))
        index = np.stack([left, np.minimum(left + 1, n - 1)], axis=1)
        weight = np.stack([1 - (centre - left), centre - left], axis=1)
    else:
        left = np.clip(np.floor(inner_lower).astype(int), 0, n - 1)
        index = left[:, None] + np.arange(int(np.ceil(ratio)) + 2)
        weight = np.minimum(inner_upper[:, None], index + 1) - np.maximum(inner_lower[:, None], index)
        outside = covered <= 0
        weight[outside] = 0
        weight[outside, 0] = 1
    weight[weight < 1e-9] = 0
    weight /= weight.sum(axis=1, keepdims=True)
    row, tap = np.nonzero(weight)
    column = index[row, tap]
    start, stop = int(column.min()), int(column.max()) + 1
    matrix = csr_matrix((weight[row, tap].astype(np.float32), (row, column - start)), shape=(count, stop - start))
    matrix.sort_indices()
    identity = matrix.nnz == count == stop - start and bool(np.all(matrix.indices == np.arange(count)))
    return AxisWeights(start, matrix, covered.astype(np.float32), identity, ratio)


def lattice_weights(source: Lattice, target: Lattice, *, interpolate: bool = True) -> list[AxisWeights]:
    """Return the weights from `source` to `target` of the axes z, y and x."""
    return [axis_weights(source, target, axis, interpolate=interpolate) for axis in range(3)]


def apply_weights(block: np.ndarray, weights: Sequence[AxisWeights]) -> np.ndarray:
    """Return `block` resampled, float32 (targets z, y, x).

    block: the source voxels [start, stop) of each axis' weights, (z, y, x).
    """
    expected = tuple(w.matrix.shape[1] for w in weights)
    if block.shape != expected:
        raise ValueError(f"block of shape {block.shape} for weights over {expected} voxels")
    values = block.astype(np.float32, copy=False)
    # the axis that shrinks most first: the others then have less to do; not by the block's shape, lest the rounding of
    # float32 depend on how a volume is cut
    for axis in sorted(range(3), key=lambda i: -weights[i].ratio):
        if not weights[axis].identity:
            values = _apply_axis(values, weights[axis].matrix, axis)
    return values


def resample_mean(array: np.ndarray, source: Lattice, target: Lattice) -> np.ndarray:
    """Return `array` (on `source`, z, y, x) on `target` as float32.

    Area mean along an axis where the target voxel is at least as large, linear between centres where it is finer.
    Beyond the source's box the nearest voxel is repeated.
    """
    weights = lattice_weights(source, target)
    return apply_weights(np.asarray(array[tuple(slice(w.start, w.stop) for w in weights)]), weights)


def inside(weights: Sequence[AxisWeights]) -> np.ndarray:
    """Return which target voxels lie at least half inside the source's box on every axis, bool (z, y, x)."""
    z, y, x = (w.covered >= 0.5 - 1e-6 for w in weights)
    return z[:, None, None] & y[None, :, None] & x[None, None, :]


def nearest_voxels(source: Lattice, target: Lattice) -> list[np.ndarray]:
    """Return the source index nearest each target voxel's centre, by axis z, y, x; at equal distance the upper one.

    Beyond the source's box the nearest voxel is repeated.
    """
    indices = []
    for axis, n in enumerate(source.shape):
        size, step = source.voxel_nm[axis], target.voxel_nm[axis]
        begin = (target.translation_nm[axis] - source.lower_nm[axis]) / size
        centre = _snapped(begin + np.arange(target.shape[axis]) * step / size, max(1e-6, TOLERANCE_NM / size))
        indices.append(np.clip(np.floor(centre), 0, n - 1).astype(int))
    return indices


def z_slabs(weights: Sequence[AxisWeights], chunk: int, max_voxels: int) -> Iterator[tuple[int, int]]:
    """Yield ranges [first, last) of target planes, so that a box too large for memory is resampled slab by slab.

    Each slab draws on whole layers of the source's chunks (`chunk` planes along z): few chunks are read twice. It needs
    about `max_voxels` source voxels at a time, or one layer if that is more.
    """
    z, y, x = (w.matrix for w in weights)
    layer = max(1, max_voxels // (y.shape[1] * x.shape[1] * chunk)) * chunk
    layers = (z.indices[z.indptr[:-1]] + weights[0].start) // layer
    edges = [0, *(np.flatnonzero(np.diff(layers)) + 1).tolist(), len(layers)]
    yield from pairwise(edges)


def tiles(weights: Sequence[AxisWeights], chunks: Sequence[int], max_voxels: int) -> Iterator[tuple[Span, Span]]:
    """Yield ranges of target planes and of target rows that draw on about `max_voxels` source voxels at a time.

    They draw on whole layers and rows of the source's chunks (`chunks`: z, y, x): few chunks are read twice.
    """
    z, y, x = weights
    for first, last in z_slabs(weights, chunks[0], max_voxels):
        for top, bottom in z_slabs([y, z.rows(first, last), x], chunks[1], max_voxels):
            yield (first, last), (top, bottom)


def _apply_axis(values: np.ndarray, matrix: csr_matrix, axis: int) -> np.ndarray:
    if axis == 0:
        flat = values.reshape(values.shape[0], -1)
        return np.asarray(matrix @ flat).reshape(matrix.shape[0], *values.shape[1:])
    result = np.empty((values.shape[0], *_replaced(values.shape[1:], axis - 1, matrix.shape[0])), np.float32)
    for plane, out in zip(values, result, strict=True):  # plane by plane: no transposed copy of the block
        out[...] = matrix @ plane if axis == 1 else (matrix @ plane.T).T
    return result


def _replaced(shape: Sequence[int], position: int, size: int) -> list[int]:
    return [size if i == position else n for i, n in enumerate(shape)]


def _snapped(values: np.ndarray, tolerance: float) -> np.ndarray:
    """Return `values`, those within `tolerance` of an integer rounded to it: voxel edges that coincide must stay so."""
    nearest = np.rint(values)
    return np.where(np.abs(values - nearest) <= tolerance, nearest, values)
