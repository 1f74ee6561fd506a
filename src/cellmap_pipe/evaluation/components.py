"""Connected components of a volume that is given slab by slab along z, as if it were labelled whole."""

from typing import Literal

import cc3d
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Neighbours that connect voxels: those across a face, or across a face, an edge or a corner
Connectivity = Literal[6, 26]


class Components:
    """The 26-connected components of equal non-zero values of a volume (z, y, x), given slab by slab along z.

    Values: bool, integers or finite floats of at most 64 bits. Of the volume only one plane is kept. A slab takes
    4 bytes per voxel for its labels while it is labelled.
    """

    def __init__(self) -> None:
        self._count = 0
        self._links: list[np.ndarray] = []
        self._below: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, values: np.ndarray) -> np.ndarray:
        """Return the provisional labels (z, y, x), uint32, of the next slab: 0 is background, unique over all slabs.

        Pieces of one component in several slabs differ until `join` tells their number.
        """
        labels, before = self.add_counted(values)
        if before:
            np.add(labels, np.uint32(before), out=labels, where=labels > 0)
        return labels

    def add_counted(self, values: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the labels of the next slab from 1, uint32, and the number of labels of all slabs before it.

        `add` without its last pass over the voxels, for callers that keep only few of them.
        """
        before = self._count
        values = comparable(values)
        if not values.size:
            return np.zeros(values.shape, np.uint32), before
        labels, n = cc3d.connected_components(values, return_N=True, out_dtype=np.uint32)
        self._count += int(n)
        if self._below is not None:
            below_values, below_labels = self._below
            above = _shifted(labels[0], before)
            if below_labels.any() and above.any():
                touching = label(np.stack([below_values, values[0]]), 26)
                self._links.append(links(np.stack([below_labels, above]), touching))
        self._below = values[-1].copy(), _shifted(labels[-1], before)
        return labels, before

    def skip(self) -> None:
        """Let some planes of background follow: what comes next touches nothing before."""
        self._below = None

    def join(self) -> tuple[np.ndarray, int]:
        """Return the number (1 .. n) of every provisional label, uint32, [0] = 0; and n, the number of components.

        Components are numbered in the order of their first voxels (C order), as cc3d numbers those of a whole volume.
        """
        numbers = join_nodes(self._count + 1, self._links)
        return numbers.astype(np.uint32), int(numbers.max())

    def least(self) -> int:
        """Return how many components the volume has at least, whatever follows: what follows joins those cut off."""
        numbers, n = self.join()
        if self._below is None:
            return n
        cut_off = np.unique(numbers[self._below[1]])
        return n - max(0, int(np.count_nonzero(cut_off)) - 1)


def comparable(values: np.ndarray) -> np.ndarray:
    """Return the values in C order, native bytes and a type that cc3d labels; a copy only where needed.

    The order of voxels in memory decides the numbers of components. cc3d takes no read-only memory.
    """
    if values.dtype.kind == "f":  # by their bits: cc3d 4.1 splits runs of fractional values in nearly empty volumes
        values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
        values = np.where(values == 0, 0, values.view(f"u{values.dtype.itemsize}"))
    elif values.dtype == bool:
        values = values.view(np.uint8)  # cc3d 4.1 takes too small a table for thin masks of isolated voxels, and fails
    return np.require(values, values.dtype.newbyteorder("="), ["C", "W"])


def label(values: np.ndarray, connectivity: Connectivity) -> np.ndarray:
    """Return the components of equal non-zero values (z, y, x) as uint32, numbered in the order of first voxels."""
    return np.asarray(cc3d.connected_components(comparable(values), connectivity=connectivity, out_dtype=np.uint32))


def links(nodes: np.ndarray, touching: np.ndarray) -> np.ndarray:
    """Return pairs of nodes (n, 2), int64, that belong together because they touch between two adjacent planes.

    nodes: of the two planes, (2, y, x), 0 is none. touching: the components of these two planes by themselves. Voxels
    that are connected within one plane are of one node already, so these join exactly what has to be joined.
    """
    touching, nodes = touching.reshape(-1), nodes.reshape(-1)
    changed = np.append(True, (nodes[1:] != nodes[:-1]) | (touching[1:] != touching[:-1]))
    starts = np.flatnonzero((nodes > 0) & changed)
    touching, nodes = touching[starts], nodes[starts]
    order = np.lexsort((nodes, touching))
    touching, nodes = touching[order], nodes[order]
    same = (touching[1:] == touching[:-1]) & (nodes[1:] != nodes[:-1])
    return np.stack([nodes[:-1][same], nodes[1:][same]], 1).astype(np.int64)


def join_nodes(n: int, pairs: list[np.ndarray]) -> np.ndarray:
    """Return the group of each of the nodes 0 .. n - 1, int64: linked nodes share one.

    pairs: arrays (m, 2) of nodes. Groups are numbered from 0 in the order of their least nodes.
    """
    linked = np.concatenate([np.zeros((0, 2), np.int64), *pairs])
    if not len(linked):
        return np.arange(n)
    graph = coo_array((np.ones(len(linked), np.int8), (linked[:, 0], linked[:, 1])), shape=(n, n))
    count, groups = connected_components(graph, directed=False)
    least = np.empty(count, np.int64)
    least[groups[::-1]] = np.arange(n - 1, -1, -1)  # of equal indices the last assignment holds
    rank = np.empty(count, np.int64)
    rank[np.argsort(least)] = np.arange(count)
    return rank[groups]


def _shifted(plane: np.ndarray, before: int) -> np.ndarray:
    """Return the labels of a plane, uint32, as provisional ones: 0 where there is none."""
    return np.where(plane > 0, plane + np.uint32(before), np.uint32(0))
