"""Masks of predicted classes made consistent with what the classes are: parts lie in their groups, others exclude."""

from collections.abc import Mapping, Sequence

import numpy as np

from cellmap_pipe.classes import contains, disjoint

# Voxels that are looked at together: their margins of 48 classes take 6 MB.
BLOCK = 1 << 15


def repair(values: Mapping[str, np.ndarray], thresholds: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Return consistent masks (bool) of all classes in `values`.

    values: 255 p by class, arrays of one shape (z, y, x). thresholds: p by class; a class's margin is p - threshold.
    In each voxel the classes above their thresholds are taken by falling margin (of equal ones the first in `values`).
    One is dropped if it shares no atom with one taken before, or if a group that contains it is neither taken nor
    above its own threshold by less than the class is above; otherwise it is taken together with all groups that
    contain it. Voxels whose masks are consistent stay as they are, so masks that were repaired are not changed again.
    Memory: the masks and a few megabytes.
    """
    names = list(values)
    shape = np.broadcast_shapes(*(array.shape for array in values.values()))
    masks = {name: np.zeros(shape, bool) for name in names}
    relations = _Relations(names)
    flat = [np.ascontiguousarray(values[name]).reshape(-1) for name in names]
    results = [masks[name].reshape(-1) for name in names]
    limits = np.array([255 * thresholds[name] for name in names], np.float32)[:, None]
    for first in range(0, len(flat[0]) if flat else 0, BLOCK):
        block = slice(first, first + BLOCK)
        margins = np.array([array[block] for array in flat], np.float32)
        margins -= limits
        taken = margins > 0
        wrong = np.flatnonzero(relations.inconsistent(taken))
        taken[:, wrong] = relations.taken(margins[:, wrong].T).T
        for result, row in zip(results, taken, strict=True):
            result[block] = row
    return masks


class _Relations:
    """What the given classes are to each other."""

    def __init__(self, names: Sequence[str]) -> None:
        self._disjoint = np.array([[disjoint(a, b) for b in names] for a in names], bool)
        self._groups = np.array([[contains(b, a) for b in names] for a in names], bool)  # [part, group]
        self._excluded, self._required = _byte_tables(self._disjoint), _byte_tables(self._groups)

    def inconsistent(self, taken: np.ndarray) -> np.ndarray:
        """Return in which voxels two classes exclude each other or a group is lacking. taken: bool (class, voxel)."""
        packed = np.packbits(taken, axis=0).T
        excluded, required = np.zeros_like(packed), np.zeros_like(packed)
        for byte, (exclude, require) in enumerate(zip(self._excluded, self._required, strict=True)):
            excluded |= exclude[packed[:, byte]]
            required |= require[packed[:, byte]]
        return np.asarray(((excluded & packed) | (required & ~packed)).any(axis=1))

    def taken(self, margins: np.ndarray) -> np.ndarray:
        """Return which classes each voxel keeps, bool. margins: (voxel, class)."""
        result = np.zeros(margins.shape, bool)
        order = np.argsort(-margins, axis=1, kind="stable")
        every = np.arange(len(margins))
        for rank in range(int((margins > 0).sum(axis=1).max(initial=0))):
            chosen = order[:, rank]
            margin = margins[every, chosen]
            rows = np.flatnonzero((margin > 0) & ~(result & self._disjoint[chosen]).any(axis=1))
            chosen, margin = chosen[rows], margin[rows]
            groups = self._groups[chosen]
            # Whatever excludes a group excludes its part, so a group never stands against what was taken before
            lacking = np.where(groups & ~result[rows], -margins[rows], -np.inf).max(axis=1)
            kept = margin > lacking
            rows, chosen = rows[kept], chosen[kept]
            result[rows] |= groups[kept]
            result[rows, chosen] = True
        return result


def _byte_tables(relation: np.ndarray) -> list[np.ndarray]:
    """Return for each byte of packed classes a table (256, bytes): the packed classes that its value is related to."""
    packed = np.packbits(relation, axis=1)
    tables = []
    for first in range(0, len(relation), 8):
        table = np.zeros((256, packed.shape[1]), np.uint8)
        for bit, row in enumerate(packed[first : first + 8]):
            table[(np.arange(256) >> (7 - bit) & 1).astype(bool)] |= row
        tables.append(table)
    return tables
