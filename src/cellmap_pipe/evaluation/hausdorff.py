"""Hausdorff distances between label sets, over all their voxels (CHALLENGE section 4.3), exact on tight boxes.

Objects that fill their box go through a distance transform of the box; those that do not (thin filaments, parts far
apart) go through a KD-tree on surface voxels, so that the cost grows with the objects' voxels and not with their boxes.
"""

from collections.abc import Sequence

import edt
import numpy as np
from scipy.spatial import cKDTree

from cellmap_pipe.evaluation.overlap import Objects, Runs, voxels_of

# Box voxels per object voxel from which the KD-tree is cheaper than the distance transform (measured, 2-16 equal)
SPARSE = 12
# Rounds in which single far voxels are measured to discard others by the triangle inequality
PRUNING_ROUNDS = 16


class HausdorffDistances:
    """Distances in nm between truth objects and unions of predicted components of one pair of volumes.

    truth, pred: label volumes (z, y, x), C-contiguous. voxel_nm: (z, y, x). cap_nm: distances beyond it count as it.
    """

    def __init__(
        self,
        truth: np.ndarray,
        pred: np.ndarray,
        runs: Runs,
        truths: Objects,
        preds: Objects,
        voxel_nm: Sequence[float],
        cap_nm: float,
    ) -> None:
        self.truth, self.pred, self.runs, self.truths, self.preds = truth, pred, runs, truths, preds
        self.voxel_nm = np.asarray(voxel_nm, np.float64)
        self.cap_nm = cap_nm

    def __call__(self, i: int, parts: Sequence[int]) -> float:
        """Return the distance between truth object `i` and the union of components `parts` (positions, not ids)."""
        lower = np.minimum(self.truths.lower[i], self.preds.lower[parts].min(0))
        upper = np.maximum(self.truths.upper[i], self.preds.upper[parts].max(0))
        filled = int(self.truths.size[i]) + int(self.preds.size[parts].sum())
        if int(np.prod(upper - lower)) <= SPARSE * filled:
            return min(self._in_box(i, parts, lower, upper), self.cap_nm)
        return min(self._between_points(i, parts), self.cap_nm)

    def _in_box(self, i: int, parts: Sequence[int], lower: np.ndarray, upper: np.ndarray) -> float:
        box = tuple(slice(lo, hi) for lo, hi in zip(lower.tolist(), upper.tolist(), strict=True))
        a = self.truth[box] == self.truths.ids[i]
        components = self.pred[box]
        b = components == self.preds.ids[parts[0]]
        for part in parts[1:]:
            b |= components == self.preds.ids[part]
        return max(self._farthest_in_box(a, b), self._farthest_in_box(b, a))

    def _farthest_in_box(self, a: np.ndarray, b: np.ndarray) -> float:
        """Return the largest distance from a voxel of `a` to the nearest of `b`: 0 unless it lies outside `b`."""
        outside = a > b
        if not outside.any():
            return 0.0
        squared = edt.edtsq(~b, anisotropy=tuple(self.voxel_nm.tolist()), black_border=False, parallel=1)
        return float(np.sqrt(np.float64(squared[outside].max())))

    def _between_points(self, i: int, parts: Sequence[int]) -> float:
        a_runs = self.truths.runs_of(i)
        b_runs = np.concatenate([self.preds.runs_of(part) for part in parts])
        extra = b_runs[self.truths.index[b_runs] != i]
        missed = a_runs[~np.isin(self.preds.index[a_runs], parts)]
        extra_points = self._positions(voxels_of(self.runs, extra))
        # A voxel is at least as far from the object as from its box: often enough to know that the cap is reached
        box_lower, box_upper = self.truths.lower[i] * self.voxel_nm, (self.truths.upper[i] - 1) * self.voxel_nm
        beyond = np.maximum(np.maximum(box_lower - extra_points, extra_points - box_upper), 0.0)
        if len(beyond) and np.sqrt((beyond**2).sum(1).max()) >= self.cap_nm:
            return self.cap_nm
        distance = 0.0
        if len(extra):
            tree = self._surface_tree(a_runs, self.truth)
            distance = farthest(extra_points, tree, distance)
        if len(missed) and distance < self.cap_nm:
            tree = self._surface_tree(b_runs, self.pred)
            distance = farthest(self._positions(voxels_of(self.runs, missed)), tree, distance)
        return distance

    def _positions(self, flat: np.ndarray) -> np.ndarray:
        return np.stack(np.unravel_index(flat, self.truth.shape), 1) * self.voxel_nm

    def _surface_tree(self, selected: np.ndarray, volume: np.ndarray) -> cKDTree:
        """Return a KD-tree (nm) of the voxels of `selected` runs that have a neighbour of another label in `volume`.

        The voxel of a set nearest to a voxel outside has a face neighbour outside: a step along the axis on which they
        are furthest apart would come nearer. So the surface suffices.
        """
        flat = voxels_of(self.runs, selected)
        values, shape = volume.reshape(-1), volume.shape
        labels = values[flat]
        position = np.unravel_index(flat, shape)
        inner = np.ones(len(flat), bool)
        for axis, step in enumerate((shape[1] * shape[2], shape[2], 1)):
            for sign, border in ((-1, 0), (1, shape[axis] - 1)):
                candidates = np.flatnonzero(inner)
                inside = position[axis][candidates] != border
                inner[candidates[~inside]] = False
                candidates = candidates[inside]
                inner[candidates] = values[flat[candidates] + sign * step] == labels[candidates]
        outer = ~inner
        points = np.stack([axis[outer] for axis in position], 1) * self.voxel_nm
        return cKDTree(points, balanced_tree=False, compact_nodes=False)


def farthest(points: np.ndarray, tree: cKDTree, floor: float) -> float:
    """Return the larger of `floor` and the largest distance from one of `points` (n, 3) to its nearest in `tree`.

    The nearest tree point of one far point bounds the distances of its neighbours from above: measured one by one, the
    farthest first, a few points discard most of the others before the rest are queried at once.
    """
    bound = np.full(len(points), np.inf)
    candidate = int(np.argmax(((points - tree.data[0]) ** 2).sum(1)))
    for _ in range(PRUNING_ROUNDS):
        distance, nearest = tree.query(points[candidate])
        floor = max(floor, float(distance))
        bound = np.minimum(bound, np.sqrt(((points - tree.data[nearest]) ** 2).sum(1)))
        alive = bound > floor
        n_alive = int(np.count_nonzero(alive))
        if not n_alive:
            return floor
        discarded_little = n_alive > 0.8 * len(points)
        points, bound = points[alive], bound[alive]
        if discarded_little:
            break
        candidate = int(np.argmax(bound))
    return max(floor, float(tree.query(points)[0].max()))
