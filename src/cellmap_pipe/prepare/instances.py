"""Instance ids of label arrays: how many there are, and their way to a grid. Arrays are (z, y, x)."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from cellmap_pipe.classes import get_class
from cellmap_pipe.errors import DataError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.labels import PRESENT, LabelArray, LabelReader, as_mapping
from cellmap_pipe.prepare.ngff import chunk_shape
from cellmap_pipe.prepare.resample import inside, lattice_weights, nearest_voxels, tiles

# Ids of one array that are told apart; more are no objects but values of something else.
MAX_IDS = 16 * 1024**2

# Source voxels read at once, unless one row of chunks along x is larger.
SLAB_VOXELS = 8 * 1024**2


def has_instances(label: LabelArray) -> bool:
    """Return whether the array's values are ids: the class is one of instances, and no metadata call it semantic."""
    kind = as_mapping(label.attributes["cellmap"]["annotation"].get("annotation_type"))
    return get_class(label.name).instance and kind.get("type") != "semantic_segmentation"


def count_ids(label: LabelArray) -> int:
    """Return how many ids an instance array holds: distinct values that are neither 0, nor unknown, nor masked.

    Raises DataError for a damaged chunk, values that are no labels, and more than MAX_IDS ids.
    """
    return len(_ids(label))


def resample_ids(label: LabelArray, target: Lattice) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (first, last, ids) of slabs of the target: the instance ids of its planes [first, last), (z, y, x).

    The id of a target voxel is that of the label voxel around its centre, 0 where that is unknown or masked, and where
    the target voxel lies less than half inside the label box. uint16 if the largest id fits, else uint32; ids that do
    not fit into uint32 are numbered 1.. in their order.
    Raises DataError as `count_ids` does.
    """
    numbers, dtype = _numbering(label)
    reader, (z, y, x) = LabelReader(label), nearest_voxels(label.level.lattice, target)
    covered = lattice_weights(label.level.lattice, target, interpolate=False)
    left, right = int(x[0]), int(x[-1]) + 1
    for (first, last), (top, bottom) in tiles(covered, chunk_shape(label.level), SLAB_VOXELS):
        if top == 0:
            slab = np.empty((last - first, *target.shape[1:]), dtype)
        at = z[first:last], y[top:bottom], x
        lower, upper = (int(z[first]), int(y[top]), left), (int(z[last - 1]) + 1, int(y[bottom - 1]) + 1, right)
        values, states = reader.read(lower, upper)
        values[states != PRESENT] = 0
        if numbers is not None:
            values = np.where(values > 0, np.searchsorted(numbers, values) + 1, 0)
        tile = values[np.ix_(*(index - lo for index, lo in zip(at, lower, strict=True)))]
        tile[~inside([covered[0].rows(first, last), covered[1].rows(top, bottom), covered[2]])] = 0
        slab[:, top:bottom] = tile
        if bottom == target.shape[1]:
            yield first, last, slab


def _numbering(label: LabelArray) -> tuple[np.ndarray | None, type[np.unsignedinteger[Any]]]:
    """Return (ids to be numbered in their order, or None if they stay, dtype that holds them)."""
    if np.dtype(label.level.dtype).itemsize <= 2:
        return None, np.uint16
    ids = _ids(label)
    largest = int(ids[-1]) if len(ids) else 0
    if largest > np.iinfo(np.uint32).max:
        return ids, np.uint16 if len(ids) <= np.iinfo(np.uint16).max else np.uint32
    return None, np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32


def _ids(label: LabelArray) -> np.ndarray:
    """Return the distinct ids of an instance array in their order, without 0, unknown and masked ones."""
    found = np.empty(0, np.dtype(label.level.dtype))
    for values, states in LabelReader(label).tiles():
        values[states != PRESENT] = 0
        flat = values.ravel()
        # one value of each run along x: sorting all voxels would take seconds per slab
        runs = flat[np.flatnonzero(np.diff(flat, prepend=~flat[:1]))]
        found = np.union1d(found, runs)
        if len(found) > MAX_IDS:
            raise DataError(f"{label.level.path}: more than {MAX_IDS} ids; is it an array of instances?")
    return found[found != 0]
