"""Hausdorff distances between label sets, over all their voxels (CHALLENGE section 4.3), exact on tight boxes.

Objects that fill their box go through a distance transform of the box; those that do not (thin filaments, parts far
apart), or whose box does not fit into memory, go through a KD-tree on surface voxels, so that the cost grows with the
objects' voxels and not with their boxes. Of tiny ones all pairs of voxels are measured.
"""

import math
from collections.abc import Iterator, Sequence

import edt
import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from cellmap_pipe.evaluation.overlap import Objects, Runs, surface_of, voxels_of

# Box voxels per object voxel from which the KD-tree is cheaper than the distance transform (measured, 4-16 equal)
SPARSE = 12
# Pairs of voxels of two objects up to which all their distances are cheaper than either way (measured)
PAIRS = 20_000
# Rounds in which single far voxels are measured to discard others by the triangle inequality
PRUNING_ROUNDS = 16
# Bytes of working memory per voxel of a box, and per point that is searched or searched for (measured)
BOX_BYTES = 10
POINT_BYTES = 160
# Points that are searched for at a time: at most, and at least, however little memory there is
MOST_POINTS = 2_000_000
LEAST_POINTS = 200_000


class HausdorffDistances:
    """Distances in nm between truth objects and unions of predicted components of one pair of volumes.

    voxel_nm: (z, y, x). cap_nm: distances beyond it count as it. memory: bytes that a distance may take beyond the
    runs; how they are found, and so their digits beyond the seventh, depends on it.
    """

    def __init__(
        self,
        runs: Runs,
        truths: Objects,
        preds: Objects,
        voxel_nm: Sequence[float],
        cap_nm: float,
        memory: float = math.inf,
    ) -> None:
        self.runs, self.truths, self.preds = runs, truths, preds
        self.voxel_nm = np.asarray(voxel_nm, np.float64)
        self.cap_nm, self.memory = cap_nm, memory
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, i: int, parts: Sequence[int]) -> float:
        """Return the distance between truth object `i` and the union of components `parts` (positions, not ids)."""
        key = (i, *sorted(parts))
        if key not in self._known:
            self._known[key] = min(self._measure(i, list(key[1:])), self.cap_nm)
        return self._known[key]

    def _measure(self, i: int, parts: list[int]) -> float:
        a_runs = self.truths.runs_of(i)
        if len(parts) == 1:
            b_runs = self.preds.runs_of(parts[0])
            lower = np.minimum(self.truths.lower[i], self.preds.lower[parts[0]])
            upper = np.maximum(self.truths.upper[i], self.preds.upper[parts[0]])
        else:
            b_runs = np.sort(np.concatenate([self.preds.runs_of(part) for part in parts]))
            lower = np.minimum(self.truths.lower[i], self.preds.lower[parts].min(0))
            upper = np.maximum(self.truths.upper[i], self.preds.upper[parts].max(0))
        filled = int(self.truths.size[i]) + int(self.preds.size[parts].sum())
        box = math.prod((upper - lower).tolist())
        if int(self.truths.size[i]) * (filled - int(self.truths.size[i])) <= PAIRS:
            return self._by_pairs(a_runs, b_runs)
        if box <= SPARSE * filled and box * BOX_BYTES <= self.memory:
            return self._in_box(a_runs, b_runs, lower, upper)
        extra = b_runs[self.truths.index[b_runs] != i]
        missed = a_runs[~np.isin(self.preds.index[a_runs], parts)]
        if self._is_beyond_cap(extra, i):
            return self.cap_nm
        distance = self._between_points(extra, a_runs, 0.0)
        return self._between_points(missed, b_runs, distance)

    def _by_pairs(self, a_runs: np.ndarray, b_runs: np.ndarray) -> float:
        first, second = (
            self._positions(voxels_of(self.runs.start[selected], self.runs.length[selected]))
            for selected in (a_runs, b_runs)
        )
        distance = cdist(first, second)
        return max(float(distance.min(0).max()), float(distance.min(1).max()))

    def _in_box(self, a_runs: np.ndarray, b_runs: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
        a, b = self._painted(a_runs, lower, upper), self._painted(b_runs, lower, upper)
        distance = self._farthest_in_box(a, b)
        return distance if distance >= self.cap_nm else max(distance, self._farthest_in_box(b, a))

    def _painted(self, selected: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """Return where the runs are in their box, uint8 (z, y, x + 1): one more column, so that no row meets the next.

        Runs begin with +1 and end with -1, and the sum of these is the mask: no list of voxels is needed.
        """
        (z0, y0, x0), (Z, Y, X) = lower.tolist(), (upper - lower + (0, 0, 1)).tolist()
        rest, x = np.divmod(self.runs.start[selected], self.runs.shape[2])
        z, y = np.divmod(rest, self.runs.shape[1])
        begin = (z * Y + y) * X + x - ((z0 * Y + y0) * X + x0)
        steps = np.zeros(Z * Y * X, np.int8)
        steps[begin] = 1
        steps[begin + self.runs.length[selected]] -= 1
        return np.cumsum(steps, dtype=np.int8, out=steps).view(np.uint8).reshape(Z, Y, X)

    def _farthest_in_box(self, a: np.ndarray, b: np.ndarray) -> float:
        """Return the largest distance from a voxel of `a` to the nearest of `b`: 0 unless it lies outside `b`."""
        outside = a > b
        if not outside.any():
            return 0.0
        # uint8: the library takes twice as long for bool
        squared = edt.edtsq(b ^ 1, anisotropy=tuple(self.voxel_nm.tolist()), black_border=False, parallel=1)
        return math.sqrt(float(np.multiply(squared, outside, out=squared).max()))

    def _is_beyond_cap(self, extra: np.ndarray, i: int) -> bool:
        """Return whether a voxel of the runs is as far as the cap from the box of truth object `i`.

        It is at least as far from the object as from its box. Along a run the ends are farthest from a box.
        """
        start = self.runs.start[extra]
        ends = self._positions(np.append(start, start + self.runs.length[extra] - 1))
        lower, upper = self.truths.lower[i] * self.voxel_nm, (self.truths.upper[i] - 1) * self.voxel_nm
        beyond = np.maximum(np.maximum(lower - ends, ends - upper), 0.0)
        return bool(len(ends)) and math.sqrt((beyond**2).sum(1).max()) >= self.cap_nm

    def _between_points(self, selected: np.ndarray, others: np.ndarray, floor: float) -> float:
        """Return the larger of `floor` and the largest distance from a voxel of some runs to the nearest of `others`.

        The voxel of a set nearest to a voxel outside has a face neighbour outside: a step along the axis on which they
        are furthest apart would come nearer. So the surface of `others` suffices.
        """
        if not len(selected) or floor >= self.cap_nm:
            return floor
        most = max(self.memory / 2 / POINT_BYTES, LEAST_POINTS)
        surface = surface_of(self.runs.start[others], self.runs.length[others], self.runs.shape)
        targets = list(_pieces(*surface, most))
        tree = self._tree(*targets[0]) if len(targets) == 1 else None
        pieces = _pieces(self.runs.start[selected], self.runs.length[selected], min(most, MOST_POINTS))
        for start, length in pieces:
            points = self._positions(voxels_of(start, length))
            if tree is not None:
                floor = farthest(points, tree, floor)
            else:
                nearest = np.full(len(points), np.inf)
                for target in sorted(targets, key=lambda each: self._gap(start, each[0])):
                    bound = float(nearest.max())
                    if self._gap(start, target[0]) >= bound:
                        break
                    found, _ = self._tree(*target).query(points, distance_upper_bound=bound)
                    np.minimum(nearest, found, out=nearest)
                floor = max(floor, float(nearest.max()))
            if floor >= self.cap_nm:
                break
        return floor

    def _gap(self, first: np.ndarray, second: np.ndarray) -> float:
        """Return the distance along z, in nm, between two pieces by the starts of their runs, which ascend."""
        plane = self.runs.shape[1] * self.runs.shape[2]
        (a, b), (c, d) = ((int(start[0]) // plane, int(start[-1]) // plane) for start in (first, second))
        return max(0, c - b, a - d) * float(self.voxel_nm[0])

    def _positions(self, flat: np.ndarray) -> np.ndarray:
        return np.stack(np.unravel_index(flat, self.runs.shape), 1) * self.voxel_nm

    def _tree(self, start: np.ndarray, length: np.ndarray) -> cKDTree:
        return cKDTree(self._positions(voxels_of(start, length)), balanced_tree=False, compact_nodes=False)


def _pieces(start: np.ndarray, length: np.ndarray, most: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield runs in pieces of at most about `most` voxels, at least one run each."""
    ends = np.cumsum(length, dtype=np.int64)
    first = 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + most, "right")))
        yield start[first:last], length[first:last]
        first = last


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
