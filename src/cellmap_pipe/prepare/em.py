"""EM on any lattice: the right resolution level by nanometres, resampled, with the voxels that are really there marked.

A chunk that was never downloaded reads as zeros, which is not resin but nothing: its voxels are not valid.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cellmap_pipe.errors import DataError, GeometryError
from cellmap_pipe.geometry import Lattice, Vec3, nearest_level, vec3
from cellmap_pipe.prepare.ngff import Image, Level, chunk_shape, chunks_on_disk, open_level, read_box
from cellmap_pipe.prepare.resample import AxisWeights, apply_weights, inside, lattice_weights, tiles

logger = logging.getLogger(__name__)

# Source voxels that are held at once, as float32 where they are resampled (64 MB), unless one row of chunks is larger.
SLAB_VOXELS = 16 * 1024**2


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


def read_em(
    image: Image,
    target: Lattice,
    *,
    max_upsample: float,
    scratch: Callable[[Sequence[int], type[np.generic]], np.ndarray] = np.empty,
) -> EMBlock:
    """Return the EM of `image` on the lattice `target`, from the level that `choose_level` finds.

    Area mean where the target voxel is at least as large as the level's, linear between centres where it is finer. A
    voxel is valid if at least half of it lies inside the EM's box and no chunk that it draws on is missing. `scratch`
    (shape, dtype) allocates image and validity, one byte per voxel each; besides them a few times SLAB_VOXELS bytes
    are needed, however large the target is.
    Raises GeometryError if the EM is too coarse for the target, DataError for a damaged chunk or a dtype not uint8.
    """
    level = choose_level(image, target, max_upsample)
    if level.dtype != "uint8":
        raise DataError(f"{level.path}: EM of dtype {level.dtype}; uint8 is expected: convert it first")
    array = open_level(level)
    weights = lattice_weights(level.lattice, target)
    in_place = all(w.identity for w in weights)
    validity = _Validity(level, weights)
    result = scratch(target.shape, np.uint8)
    valid = None if validity.complete else scratch(target.shape, np.bool_)
    columns = weights[2]
    for (first, last), (top, bottom) in tiles(weights, chunk_shape(level), SLAB_VOXELS):
        planes, rows = weights[0].rows(first, last), weights[1].rows(top, bottom)
        tile = result[first:last, top:bottom]
        if valid is not None:
            tile_valid = validity.tile((first, last), (top, bottom), out=valid[first:last, top:bottom])
            if not tile_valid.any():
                tile[...] = 0
                continue
        lower, upper = zip(*((w.start, w.stop) for w in (planes, rows, columns)), strict=True)
        block = read_box(array, level, lower, upper)
        if in_place:
            tile[...] = block
        else:
            _resample(block, (planes, rows, columns), tile)
        if valid is not None:
            tile[~tile_valid] = 0
    factors = vec3([t / v for t, v in zip(target.voxel_nm, level.lattice.voxel_nm, strict=True)])
    return EMBlock(result, valid, level.path.rsplit("/", 1)[-1], factors)


def valid_voxels(image: Image, target: Lattice, level: str) -> np.ndarray | None:
    """Return which voxels of `target` are valid where the EM is read from the level of that name; see `EMBlock.valid`.

    No voxel is read. Raises DataError if the level is not on disk.
    """
    chosen = next((entry for entry in image.levels if Path(entry.path).name == level), None)
    if chosen is None:
        raise DataError(f"{image.path}: its level {level} is not on disk any more; fetch it again")
    validity = _Validity(chosen, lattice_weights(chosen.lattice, target))
    if validity.complete:
        return None
    depth, height, _ = target.shape
    return validity.tile((0, depth), (0, height), out=np.empty(target.shape, bool))


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


def context_on_disk(level: Level, lattice: Lattice, axis: int, before: int, after: int) -> tuple[int, int]:
    """Return how many voxels of `lattice` before and after it have all their EM on disk along an axis.

    At most `before` and `after`; none beyond the level's extent.
    """
    em, weights = level.lattice, lattice_weights(level.lattice, lattice)
    factor = lattice.voxel_nm[axis] / em.voxel_nm[axis]
    chunk = chunk_shape(level)[axis]
    gaps = lattice.lower_nm[axis] - em.lower_nm[axis], em.upper_nm[axis] - lattice.upper_nm[axis]
    result = []
    for side, (reach, gap) in enumerate(zip((before, after), gaps, strict=True)):
        count = min(reach, math.floor(gap / lattice.voxel_nm[axis] + 1e-6))
        if count <= 0:
            result.append(0)
            continue
        lower, upper = [w.start for w in weights], [w.stop for w in weights]
        width = math.ceil(count * factor)
        if side == 0:
            lower[axis], upper[axis] = max(0, lower[axis] - width), lower[axis]
        else:
            lower[axis], upper[axis] = upper[axis], min(em.shape[axis], upper[axis] + width)
        if lower[axis] >= upper[axis]:
            result.append(0)
            continue
        present = np.moveaxis(chunks_on_disk(level, lower, upper), axis, 0)
        layers = present.reshape(len(present), -1).all(axis=1)
        if not layers.all():  # one voxel less: it may draw on the missing layer
            first_chunk = lower[axis] // chunk
            if side == 0:
                on_disk = upper[axis] - (first_chunk + int(np.flatnonzero(~layers)[-1]) + 1) * chunk
            else:
                on_disk = (first_chunk + int(np.flatnonzero(~layers)[0])) * chunk - lower[axis]
            count = min(count, math.floor(on_disk / factor) - 1)
        result.append(max(0, count))
    return result[0], result[1]


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
        least = [int(w.covered.argmin()) for w in self.weights]
        outermost = inside([_part(w, (i, i + 1)) for w, i in zip(self.weights, least, strict=True)])
        return not self.missing.any() and bool(outermost.all())

    def tile(self, planes: tuple[int, int], rows: tuple[int, int], *, out: np.ndarray) -> np.ndarray:
        """Write the validity of the target's planes and rows [first, last) to `out`, bool (z, y, x), and return it."""
        z, y, x = self.weights
        out[...] = inside([_part(z, planes), _part(y, rows), x])
        touched = [self.touched[0][slice(*planes)], self.touched[1][slice(*rows)], self.touched[2]]
        gaps = self.missing[np.ix_(touched[0].any(axis=0), touched[1].any(axis=0))]
        if gaps.any():
            for plane, chunks in zip(out, touched[0], strict=True):
                missing = self.missing[chunks].any(axis=0).astype(np.float32)  # (y chunks, x chunks)
                plane &= touched[1].astype(np.float32) @ missing @ touched[2].T.astype(np.float32) == 0
        return out


def _resample(block: np.ndarray, weights: Sequence[AxisWeights], out: np.ndarray) -> None:
    """Write `block`, the source voxels under `weights`, to `out`, resampled and rounded, a few planes at a time."""
    planes, rows, columns = weights
    wide = max(rows.matrix.shape[1] * columns.matrix.shape[1] * planes.matrix.shape[1] / len(out), out[0].size)
    step = max(1, int(SLAB_VOXELS / wide))
    for first in range(0, len(out), step):
        part = planes.rows(first, min(first + step, len(out)))
        values = apply_weights(block[part.start - planes.start : part.stop - planes.start], (part, rows, columns))
        np.rint(values, out=values)
        out[first : first + step] = values


def _part(weights: AxisWeights, span: tuple[int, int]) -> AxisWeights:
    """Return the weights with the covered shares of the target voxels [first, last) alone, as `inside` needs them."""
    return replace(weights, covered=weights.covered[slice(*span)])


def _touched_chunks(weights: AxisWeights, chunk: int, n_chunks: int) -> np.ndarray:
    """Return whether each target voxel draws on a chunk along an axis, bool (targets, chunks from the first)."""
    touched = np.zeros((weights.matrix.shape[0], n_chunks), bool)
    entries = weights.matrix.tocoo()
    drawn = entries.data > 1e-6
    touched[entries.row[drawn], (entries.col[drawn] + weights.start) // chunk - weights.start // chunk] = True
    return touched
