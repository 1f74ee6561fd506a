"""Sizes of the connected components of a stored array, one chunk in memory at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from cellmap_pipe.evaluation.components import join_nodes, label, links
from cellmap_pipe.evaluation.container import ChunkedArray

# Voxels counted at once: numpy takes 8 bytes for each of them
COUNTED_AT_ONCE = 2**24
# Half of the 26 neighbours of a chunk: each pair of chunks is met once
HALF_NEIGHBOURS = [(z, y, x) for z, y, x in product((-1, 0, 1), repeat=3) if (z, y, x) > (0, 0, 0)]


def component_sizes(array: ChunkedArray, chunks: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return the number of voxels of every component, int64, as the evaluator would find them.

    chunks: sorted indices of those that hold any voxel. Each is labelled by itself and joined to its neighbours, of
    which no more than their faces are kept, those of two layers of chunks.
    """
    sizes, pairs, count = [np.zeros(1, np.int64)], [], 0
    faces: dict[tuple[int, ...], dict[tuple[int, int], _Face]] = {}
    for index in chunks:
        voxels = array.chunk(index)
        if voxels is None:
            continue
        labels = label(voxels, 26)
        of_label = np.zeros(int(labels.max()) + 1, np.int64)
        flat = labels.reshape(-1)
        for start in range(0, len(flat), COUNTED_AT_ONCE):
            of_label += np.bincount(flat[start : start + COUNTED_AT_ONCE], minlength=len(of_label))
        own = {(axis, side): _Face.of(voxels, labels, count, axis, side) for axis in range(3) for side in (-1, 1)}
        faces = {near: kept for near, kept in faces.items() if near[0] >= index[0] - 1}
        for step in HALF_NEIGHBOURS:
            near = (index[0] - step[0], index[1] - step[1], index[2] - step[2])
            if near in faces:
                pairs += _links(faces[near], own, step)
        faces[index] = own
        sizes.append(of_label[1:])
        count += len(of_label) - 1
    numbers = join_nodes(count + 1, pairs)
    joined = np.bincount(numbers, np.concatenate(sizes))
    return joined[1:].astype(np.int64)


@dataclass(frozen=True)
class _Face:
    """The voxels on one side of a chunk (z, y, x; the axis it is across has length 1), and their nodes, int64."""

    values: np.ndarray
    nodes: np.ndarray

    @classmethod
    def of(cls, voxels: np.ndarray, labels: np.ndarray, before: int, axis: int, side: int) -> "_Face":
        """Return the lower (-1) or upper (1) face of a labelled chunk; before: number of nodes of the chunks before."""
        part = _at(side, axis)
        of_face = labels[part].astype(np.int64)
        return cls(voxels[part].copy(), np.where(of_face > 0, of_face + before, 0))


def _at(side: int, axis: int) -> tuple[slice, ...]:
    return tuple(
        slice(0, 1) if a == axis and side < 0 else slice(-1, None) if a == axis else slice(None) for a in range(3)
    )


def _links(
    lower: Mapping[tuple[int, int], _Face], upper: Mapping[tuple[int, int], _Face], step: tuple[int, int, int]
) -> list[np.ndarray]:
    """Return pairs of nodes of two neighbouring chunks that are one component.

    lower, upper: their faces by axis and side. step: from the lower chunk to the upper one, in chunks. They touch in a
    face, an edge or a corner: the axes with a step have length 1 there, and the first of them is that of the faces.
    """
    first, *others = [axis for axis in range(3) if step[axis]]
    below, above = lower[first, step[first]], upper[first, -step[first]]
    parts = []
    for face, sign in ((below, 1), (above, -1)):
        values, nodes = face.values, face.nodes
        for axis in others:
            part = _at(sign * step[axis], axis)
            values, nodes = values[part], nodes[part]
        if not nodes.any():
            return []
        parts.append((values, nodes))
    values, nodes = (np.concatenate(both, axis=first) for both in zip(*parts, strict=True))
    return [links(nodes, label(values, 26))]
