"""Checks of the arrays that are scored, and their slabs along z."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cellmap_pipe.errors import DataError

LARGEST_ID = 2**32
# Voxels per slab: temporary arrays of a few tens of megabytes
SLAB_VOXELS = 8_000_000
# Bytes of working memory per voxel of a slab of an instance label (measured)
SLAB_BYTES = 16
# Bytes of a layer of chunks that is read at once
LAYER_BYTES = 1 << 30


def as_array(values: Any) -> Any:
    """Return `values` as an array unless it is one, numpy or zarr. Raises DataError for ragged lists."""
    if values is None or hasattr(values, "shape"):
        return values
    try:
        return np.asarray(values)
    except ValueError as error:
        raise DataError(f"not an array (z, y, x): {error}") from error


def check_shapes(pred: Any, truth: Any, mask: Any = None) -> None:
    """Raise DataError unless the arrays (z, y, x) are 3-D, not empty and of one shape."""
    for name, array in (("truth", truth), ("prediction", pred), ("mask", mask)):
        if array is None:
            continue
        if len(array.shape) != 3:
            raise DataError(f"{name} has shape {tuple(array.shape)}; three axes (z, y, x) are needed")
        if 0 in array.shape:
            raise DataError(f"{name} is empty: shape {tuple(array.shape)}")
        if tuple(array.shape) != tuple(truth.shape):
            raise DataError(
                f"{name} has shape {tuple(array.shape)}, truth {tuple(truth.shape)}; align it with match_geometry first"
            )


def check_truth(truth: np.ndarray) -> None:
    """Raise DataError unless truth holds whole numbers from 0 to 2^32."""
    if truth.dtype.kind not in "bui":
        raise DataError(f"truth has dtype {truth.dtype}; labels must be integers or bool")
    if truth.dtype.kind == "i" and int(truth.min()) < 0:
        raise DataError(f"truth has negative ids (smallest {int(truth.min())}); 0 is background, objects are positive")
    if truth.dtype.itemsize > 4 and int(truth.max()) > LARGEST_ID:
        raise DataError(f"truth has ids above 2^32 (largest {int(truth.max())}); renumber its objects")


def check_pred(pred: np.ndarray) -> None:
    """Raise DataError unless the prediction is of bool, integers or finite floats of at most 64 bits."""
    if pred.dtype.kind not in "buif":
        raise DataError(f"prediction has dtype {pred.dtype}; bool, integers or floats are needed")
    if pred.dtype.kind == "f" and pred.dtype.itemsize > 8:
        raise DataError(f"prediction has dtype {pred.dtype}; floats of at most 64 bits are needed")
    if pred.dtype.kind == "f" and not np.isfinite(pred).all():
        raise DataError("prediction has values that are not finite (NaN or infinity)")
    if pred.dtype.kind in "ui" and pred.dtype.itemsize > 4 and int(pred.max(initial=0)) > LARGEST_ID:
        raise DataError(f"prediction has ids above 2^32 (largest {int(pred.max())}); renumber its objects")


def masked(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return values * mask, as the evaluator multiplies prediction and truth (CHALLENGE section 4.2, step 6).

    A mask of integers above 1 multiplies ids as well, and small types wrap around as numpy's do. Whole numbers stay
    such: where the product would be of floats, values are kept where the mask is above 0.
    """
    dtype = np.result_type(values, mask)
    if mask.dtype.kind not in "bui" or (dtype.kind == "f" and values.dtype.kind != "f"):
        return values * (mask > 0)
    if int(mask.max()) > 1 or int(mask.min()) < 0:
        return values * mask
    return (values * (mask > 0)).astype(dtype, copy=False)


def object_ids(truth: Any, mask: Any = None, memory: float = math.inf) -> np.ndarray:
    """Return the ascending ids above 0 of a truth array (z, y, x), multiplied by the mask; read as by `read_slabs`.

    Raises DataError for values that are no ids.
    """
    found = [np.zeros(0, np.uint8)]
    for t, m in read_slabs((truth, mask), memory):
        assert t is not None
        check_truth(t)
        found.append(np.unique(t if m is None else masked(t, m)))
    ids = np.unique(np.concatenate(found))
    return ids[ids > 0]


def slabs(shape: Sequence[int]) -> Iterator[slice]:
    """Yield slices along z that cover `shape` (z, y, x): about SLAB_VOXELS each, at least one plane."""
    thickness = max(1, SLAB_VOXELS // max(1, shape[1] * shape[2]))
    for start in range(0, shape[0], thickness):
        yield slice(start, min(start + thickness, shape[0]))


def read_slabs(arrays: Sequence[Any], memory: float = math.inf) -> Iterator[tuple[np.ndarray | None, ...]]:
    """Yield the next planes of several arrays (z, y, x) of one shape, about SLAB_VOXELS of each, in order.

    arrays: numpy arrays, of which slices are taken, or anything with `shape`, `dtype` and planes by [z0:z1]; None gives
    None. Of an array with `chunks` every layer of chunks is read once, and what is left of it is kept, unless a layer
    takes more than LAYER_BYTES or a quarter of `memory` (bytes): then its chunks are decoded once per slab.
    """
    shape = next(array.shape for array in arrays if array is not None)
    readers = [None if array is None else _Planes(array, min(LAYER_BYTES, memory / 4)) for array in arrays]
    plane = max(1, shape[1] * shape[2])
    thickness = max(1, int(min(SLAB_VOXELS, memory / 2 / SLAB_BYTES)) // plane)
    for first in range(0, shape[0], thickness):
        last = min(first + thickness, shape[0])
        yield tuple(None if reader is None else reader.read(first, last) for reader in readers)


class _Planes:
    """The planes of an array, asked for in order; of the last layer of chunks that was read, the rest is kept."""

    def __init__(self, array: Any, layer_bytes: float) -> None:
        self._array = array
        Z, Y, X = array.shape
        depth = array.chunks[0] if hasattr(array, "chunks") and not isinstance(array, np.ndarray) else 1
        self._depth = depth if min(depth, Z) * Y * X * array.dtype.itemsize <= layer_bytes else 1
        self._begin = 0
        self._kept: np.ndarray | None = None

    def read(self, first: int, last: int) -> np.ndarray:
        parts = []
        if self._kept is not None:
            parts.append(self._kept[first - self._begin : last - self._begin])
            first += len(parts[0])
            if first < last:  # two layers are never held
                parts[0] = parts[0].copy()
                self._kept = None
        if first < last:
            stop = min(-(-last // self._depth) * self._depth, self._array.shape[0])
            values = np.asarray(self._array[first:stop])
            parts.append(values[: last - first])
            if stop > last:
                self._begin, self._kept = last, values[last - first :]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
