"""EM on any lattice: the right resolution level by nanometres, resampled, with the voxels that are really there marked.

A chunk that was never downloaded reads as zeros, which is not resin but nothing: its voxels are not valid.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cellmap_pipe.errors import DataError, GeometryError
from cellmap_pipe.geometry import Lattice, Vec3, nearest_level, vec3
from cellmap_pipe.prepare.ngff import Image, Level, chunk_shape, chunks_on_disk, open_level, read_box
from cellmap_pipe.prepare.resample import AxisWeights, apply_weights, inside, lattice_weights, z_slabs

logger = logging.getLogger(__name__)

# Source voxels that are held at once as float32 (about 130 MB), unless one layer of chunks is larger.
SLAB_VOXELS = 32 * 1024**2


@dataclass(frozen=True)
class EMBlock:
    """EM on a target lattice.

    image: uint8 (z, y, x), 0 where not valid. valid: bool of the same shape, or None if every voxel is: inside the EM
    and with all its chunks on disk. level: the name of the level it comes from. factors: target voxel / level voxel.
    """

    image: np.ndarray
    valid: np.ndarray | None
    level: str
    factors: Vec3


def read_em(image: Image, target: Lattice, *, max_upsample: float) -> EMBlock:
    """Return the EM of `image` on the lattice `target`, from the level that `choose_level` finds.

    Area mean where the target voxel is at least as large as the level's, linear between centres where it is finer. A
    voxel is valid if at least half of it lies inside the EM's box and no chunk that it draws on is missing. Memory: the
    result, plus a slab of the level along z.
    Raises GeometryError if the EM is too coarse for the target, DataError for a damaged chunk or a dtype not uint8.
    """
    level = choose_level(image, target, max_upsample)
    if level.dtype != "uint8":
        raise DataError(f"{level.path}: EM of dtype {level.dtype}; uint8 is expected: convert it first")
    array = open_level(level)
    weights = lattice_weights(level.lattice, target)
    validity = _Validity(level, weights)
    result = np.zeros(target.shape, np.uint8)
    valid = None if validity.complete else np.zeros(target.shape, bool)
    rows, columns = weights[1:]
    for first, last in z_slabs(weights, chunk_shape(level)[0], SLAB_VOXELS):
        part = weights[0].rows(first, last)
        if valid is not None:
            valid[first:last] = validity.slab(first, last)
            if not valid[first:last].any():
                continue
        block = read_box(array, level, (part.start, rows.start, columns.start), (part.stop, rows.stop, columns.stop))
        if all(w.identity for w in weights):
            result[first:last] = block
        else:
            result[first:last] = np.rint(apply_weights(block, (part, rows, columns)))
        if valid is not None:
            result[first:last][~valid[first:last]] = 0
    factors = vec3([t / v for t, v in zip(target.voxel_nm, level.lattice.voxel_nm, strict=True)])
    return EMBlock(result, valid, level.path.rsplit("/", 1)[-1], factors)


def choose_level(image: Image, target: Lattice, max_upsample: float) -> Level:
    """Return the level to read for `target`: by voxel size in nm (`geometry.nearest_level`).

    Downloads often hold some levels only, with the metadata of all: a level that has much less of its chunks under the
    target on disk than another gives way to it, a finer one first, else a coarser one within `max_upsample`.
    Raises GeometryError if every level on disk is too coarse.
    """
    candidates = list(image.levels)
    lattices = [level.lattice for level in candidates]
    order = [nearest_level(lattices, target.voxel_nm, max_upsample)]
    order += range(order[0] - 1, -1, -1)  # finer: they cost more to read, but lose nothing
    for i in range(order[0] + 1, len(candidates)):
        try:
            nearest_level([lattices[i]], target.voxel_nm, max_upsample)
        except GeometryError:
            break
        order.append(i)
    shares = []
    for i in order:
        shares.append(_share_on_disk(candidates[i], target))
        if shares[-1] == 1:
            break
    # levels differ a little in what their chunks cover; only a real difference is worth another resolution
    chosen = next(i for i, share in zip(order, shares, strict=False) if share >= 0.5 * max(shares))
    if chosen != order[0]:
        logger.info("%s: not all on disk here, %s is used", candidates[order[0]].path, candidates[chosen].path)
    return candidates[chosen]


def _share_on_disk(level: Level, target: Lattice) -> float:
    """Return the share of the chunks under `target` that are on disk; 1 where the target lies wholly outside."""
    weights = lattice_weights(level.lattice, target)
    if not all(w.covered.any() for w in weights):
        return 1.0
    present = chunks_on_disk(level, [w.start for w in weights], [w.stop for w in weights])
    return float(present.mean())


class _Validity:
    """Which target voxels are inside the image and draw on chunks that are all on disk."""

    def __init__(self, level: Level, weights: Sequence[AxisWeights]) -> None:
        chunks = chunk_shape(level)
        self.weights = weights
        self.missing = ~chunks_on_disk(level, [w.start for w in weights], [w.stop for w in weights])
        self.touched = [_touched_chunks(w, c, n) for w, c, n in zip(weights, chunks, self.missing.shape, strict=True)]

    @property
    def complete(self) -> bool:
        return not self.missing.any() and bool(inside(self.weights).all())

    def slab(self, first: int, last: int) -> np.ndarray:
        """Return the validity of the target planes [first, last), bool (z, y, x)."""
        z = self.weights[0]
        part = AxisWeights(z.start, z.matrix, z.covered[first:last], z.identity)
        valid = inside([part, *self.weights[1:]])
        if self.missing.any():
            count = np.einsum("zc,cde->zde", self.touched[0][first:last], self.missing.astype(np.float32))
            count = np.einsum("zde,yd->zye", count, self.touched[1])
            valid &= (count @ self.touched[2].T) == 0
        return valid


def _touched_chunks(weights: AxisWeights, chunk: int, n_chunks: int) -> np.ndarray:
    """Return whether each target voxel draws on a chunk along an axis, float32 0/1 (targets, chunks from the first)."""
    touched = np.zeros((weights.matrix.shape[0], n_chunks), np.float32)
    entries = weights.matrix.tocoo()
    drawn = entries.data > 1e-6
    touched[entries.row[drawn], (entries.col[drawn] + weights.start) // chunk - weights.start // chunk] = 1
    return touched
