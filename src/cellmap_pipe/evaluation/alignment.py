"""Bringing a prediction to the voxels of the truth (CHALLENGE section 4.2)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter1d
from skimage.transform import rescale

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation.inputs import check_pred, slabs
from cellmap_pipe.evaluation.rules import Rules, get_rules

MAX_VOLUME_SIZE_RATIO = 16**3
THRESHOLD = 0.5
# Above 500 MiB of float32 the evaluator resamples cubes of 100 MiB one by one
BLOCKWISE_VOXELS = 500 * 2**20 // 4
BLOCK = int((100 * 2**20 // 4) ** (1 / 3))

Index3 = tuple[int, int, int]


def is_instance(label: str) -> bool:
    """Return whether the challenge scores the label by instance; labels it does not know are semantic."""
    return label in CLASSES and CLASSES[label].instance


def match_geometry(
    pred: np.ndarray,
    label: str,
    pred_voxel_size: Sequence[float] | None,
    pred_translation: Sequence[float] | None,
    voxel_size: Sequence[float],
    shape: Sequence[int],
    translation: Sequence[float],
    rules: str | Rules = "csc-2026.06",
) -> np.ndarray:
    """Return the prediction (z, y, x) on the target's voxels, an array of `shape`.

    pred_voxel_size, pred_translation: in nm, None where unknown. voxel_size, shape, translation: of the target.
    By the official rules this keeps the evaluator's quirks: whole-voxel shifts that can be one off, seams in large
    volumes, no threshold for a semantic prediction that needs no resampling. By `clean` the boxes are aligned by
    their edges, to the nearest voxel, resampled whole, and semantic floats are thresholded at 0.5 in the end.
    Raises DataError for a prediction that is not 3-D, empty, or more than 4096 times the target, and for a voxel size
    or translation that is none.
    """
    aligned = align(pred, label, pred_voxel_size, pred_translation, voxel_size, shape, translation, rules)
    return aligned if isinstance(aligned, np.ndarray) else aligned[0 : aligned.shape[0]]


def align(
    pred: Any,
    label: str,
    pred_voxel_size: Sequence[float] | None,
    pred_translation: Sequence[float] | None,
    voxel_size: Sequence[float],
    shape: Sequence[int],
    translation: Sequence[float],
    rules: str | Rules = "csc-2026.06",
) -> Any:
    """Return what `match_geometry` does, as an array whose planes [z0:z1] are made when they are asked for.

    pred: anything with shape, dtype and voxels by slices (numpy, zarr, ChunkedArray). Where no resampling is needed it
    is never read whole; where it lies on the target's voxels already it is returned itself. Else the resampled array.
    """
    geometry = pred_voxel_size, pred_translation, voxel_size, shape, translation
    ((aligned, _),) = align_by(pred, label, *geometry, rules=[rules])
    return aligned


def align_by(
    pred: Any,
    label: str,
    pred_voxel_size: Sequence[float] | None,
    pred_translation: Sequence[float] | None,
    voxel_size: Sequence[float],
    shape: Sequence[int],
    translation: Sequence[float],
    rules: Sequence[str | Rules],
) -> list[tuple[Any, list[Rules]]]:
    """Return `align` by several rules: every different array, with the rules that give it."""
    geometry = pred_voxel_size, pred_translation, voxel_size, shape, translation
    by_plan: dict[_Plan, list[Rules]] = {}
    for each in map(get_rules, rules):
        by_plan.setdefault(_plan(pred, label, *geometry, each), []).append(each)
    return [(_carry_out(plan, pred), of_plan) for plan, of_plan in by_plan.items()]


def held_bytes(aligned: Any) -> int:
    """Return the memory that an array of `align` holds: 0 where its planes are made when they are asked for."""
    if isinstance(aligned, Placed):
        return held_bytes(aligned.source)
    return int(aligned.nbytes) if isinstance(aligned, np.ndarray) else 0


def resampling_bytes(
    pred_shape: Sequence[int],
    pred_voxel_size: Sequence[float] | None,
    voxel_size: Sequence[float],
    itemsize: int,
    instance: bool,
) -> int:
    """Return an estimate of the memory that `align` takes by the official rules, which resample volumes or large cubes.

    itemsize: of the prediction's dtype, in bytes. 0 if nothing is resampled. Raises DataError as `align`.
    """
    if not needs_resampling(pred_voxel_size, voxel_size):
        return 0
    assert pred_voxel_size is not None
    scale = np.asarray(_sizes(pred_voxel_size, "prediction")) / np.asarray(voxel_size, float)
    n, m = math.prod(pred_shape), math.prod(_resampled_shape(pred_shape, scale.tolist()))
    # Of the volume or cube: as it is, as floats of 64 bits, and blurred; and what is made of it
    block = min(n, BLOCK**3) if n > BLOCKWISE_VOXELS else n
    return int(block * (itemsize + 16) + block / n * m * 8 + m * (itemsize if instance else 1))


def needs_resampling(pred_voxel_size: Sequence[float] | None, voxel_size: Sequence[float]) -> bool:
    """Return whether a prediction of that voxel size (None: unknown) is resampled. Raises DataError as `align`."""
    if pred_voxel_size is None:
        return False
    return not _same_voxel(_sizes(pred_voxel_size, "prediction"), _sizes(voxel_size, "target"))


@dataclass(frozen=True)
class _Plan:
    """What is done to a prediction, as far as rules differ in it.

    scale: target voxels per voxel of the prediction if it is resampled, then as the evaluator does or not (`official`).
    Voxel 0 of what results goes to `offset` in the target's `shape`; voxels outside [lower, upper) are 0 there.
    threshold: above which a semantic value that is not resampled belongs to the class, None if values are kept.
    """

    shape: Index3
    instance: bool
    scale: tuple[float, ...] | None
    official: bool
    threshold: float | None
    offset: Index3
    lower: Index3
    upper: Index3


def _plan(
    pred: Any,
    label: str,
    pred_voxel_size: Sequence[float] | None,
    pred_translation: Sequence[float] | None,
    voxel_size: Sequence[float],
    shape: Sequence[int],
    translation: Sequence[float],
    rules: Rules,
) -> _Plan:
    source_shape, target_shape = tuple(int(n) for n in pred.shape), _index(shape)
    if len(source_shape) != 3 or 0 in source_shape:
        raise DataError(f"prediction has shape {source_shape}; three axes (z, y, x), none empty, are needed")
    source_shape = _index(source_shape)
    ratio = math.prod(source_shape) / math.prod(target_shape)
    if ratio > MAX_VOLUME_SIZE_RATIO:
        raise DataError(
            f"prediction has {ratio:.0f} times the voxels of the target, more than {MAX_VOLUME_SIZE_RATIO}; "
            f"downsample it to {list(voxel_size)} nm"
        )
    voxel_size = _sizes(voxel_size, "target")
    translation = _three(translation, "translation of the target")
    instance, scale = is_instance(label), None
    centring, kept = (0, 0, 0), source_shape
    if pred_voxel_size is None:
        # The odd voxel is at the upper side of what is added and of what is cut off; no shift brings that back
        sizes = zip(target_shape, source_shape, strict=True)
        centring, kept = _index([(n - m) // 2 if n > m else -((m - n) // 2) for n, m in sizes]), target_shape
    elif needs_resampling(pred_voxel_size, voxel_size):
        ratios = np.asarray(_sizes(pred_voxel_size, "prediction")) / np.asarray(voxel_size, float)
        scale = tuple(ratios.tolist())
        source_shape = kept = _resampled_shape(source_shape, scale)
    shift = offset_voxels(pred_voxel_size, pred_translation, voxel_size, translation, rules)
    offset = _index([s + c for s, c in zip(shift, centring, strict=True)])
    lower = [max(0, o, s) for o, s in zip(offset, shift, strict=True)]
    ends = zip(target_shape, offset, source_shape, shift, kept, strict=True)
    upper = [min(n, o + m, s + k) for n, o, m, s, k in ends]
    semantic_floats = not instance and np.dtype(pred.dtype).kind == "f"
    return _Plan(
        shape=target_shape,
        instance=instance,
        scale=scale,
        official=rules.official_alignment if scale is not None else True,
        threshold=THRESHOLD if semantic_floats and not rules.official_alignment else None,
        offset=offset,
        lower=_index(lower),
        upper=_index([max(lo, hi) for lo, hi in zip(lower, upper, strict=True)]),
    )


def _carry_out(plan: _Plan, pred: Any) -> Any:
    """Return the array that the plan makes of the prediction."""
    threshold = plan.threshold
    if plan.scale is not None:
        scale, threshold = np.asarray(plan.scale), None
        if not plan.official:
            pred = Resampled(pred, _resampled_shape(pred.shape, plan.scale), plan.instance)
        elif math.prod(pred.shape) > BLOCKWISE_VOXELS:
            pred = _resample_blockwise(pred, scale, plan.instance)
        else:
            pred = _resample(_box(pred, (0, 0, 0), pred.shape), scale, plan.instance)
            pred = pred if plan.instance else pred > THRESHOLD
    placed = Placed(pred, plan.shape, plan.offset, plan.lower, plan.upper, threshold)
    return pred if placed.changes_nothing else placed


@dataclass(frozen=True)
class Placed:
    """An array moved into a box of `shape` by whole voxels, and cut off or filled up with 0 there; read plane by plane.

    source: its voxel 0 goes to `offset`; voxels of the box outside [lower, upper) are 0. threshold: the result is
    `source > threshold`, bool, if there is one. Reading raises DataError for values that cannot be thresholded.
    """

    source: Any
    shape: Index3
    offset: Index3
    lower: Index3
    upper: Index3
    threshold: float | None = None

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(bool if self.threshold is not None else self.source.dtype)

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        """The chunks of the source: a slab as thick as they are reads each of them twice at most."""
        return tuple(getattr(self.source, "chunks", None) or (1, *self.shape[1:]))

    @property
    def changes_nothing(self) -> bool:
        same_box = tuple(self.source.shape) == self.shape and self.offset == self.lower == (0, 0, 0)
        return same_box and self.upper == self.shape and self.threshold is None

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return whole planes along the first axis."""
        start, stop, _ = part.indices(self.shape[0])
        planes = np.zeros((max(0, stop - start), *self.shape[1:]), self.dtype)
        lower = (max(start, self.lower[0]), *self.lower[1:])
        upper = (min(stop, self.upper[0]), *self.upper[1:])
        if any(lo >= hi for lo, hi in zip(lower, upper, strict=True)):
            return planes
        source = ([lo - o for lo, o in zip(box, self.offset, strict=True)] for box in (lower, upper))
        values = _box(self.source, *source)
        if self.threshold is not None:
            check_pred(values)
            values = values > self.threshold
        (z0, *_), (z1, *_) = lower, upper
        planes[(slice(z0 - start, z1 - start), *map(slice, self.lower[1:], self.upper[1:]))] = values
        return planes


class Resampled:
    """A prediction (z, y, x) on other voxels over the same box, resampled plane by plane by the rules `clean`.

    Ids are taken from the nearest voxel. Semantic values (of integers: whether they are above 0) are interpolated
    linearly, after the Gaussian by which skimage's `rescale` avoids aliasing where voxels become larger, with the
    border's values beyond the border, and belong to the class above 0.5: bool. No plane depends on which others are
    asked for with it. Reading raises DataError for values that are no prediction.
    """

    def __init__(self, source: Any, shape: Index3, instance: bool) -> None:
        self._source, self.shape, self._instance = source, shape, instance
        self.dtype = np.dtype(source.dtype if instance else bool)
        factors = [n / m for n, m in zip(source.shape, shape, strict=True)]
        chunk = (getattr(source, "chunks", None) or (1,))[0]
        self.chunks = (max(1, int(chunk / factors[0])), *shape[1:])
        centres = [(np.arange(m) + 0.5) * f for m, f in zip(shape, factors, strict=True)]
        self._sigma = [max(0.0, (f - 1) / 2) for f in factors]
        self._radius = int(4 * self._sigma[0] + 0.5) + 1
        if instance:
            self._nearest = [np.minimum(c.astype(int), n - 1) for c, n in zip(centres, source.shape, strict=True)]
        self._position = [np.clip(c - 0.5, 0, n - 1) for c, n in zip(centres, source.shape, strict=True)]

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return whole planes along the first axis."""
        start, stop, _ = part.indices(self.shape[0])
        planes = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        if not len(planes):
            return planes
        depth, Y, X = self._source.shape
        lower = max(0, int(self._position[0][start]) - self._radius)
        upper = min(depth, int(self._position[0][stop - 1]) + 2 + self._radius)
        source = _box(self._source, (lower, 0, 0), (upper, Y, X))
        check_pred(source)
        for piece in slabs(planes.shape):
            planes[piece] = self._planes(source, lower, start + piece.start, start + piece.stop)
        return planes

    def _planes(self, source: np.ndarray, begin: int, start: int, stop: int) -> np.ndarray:
        """Return the planes [start, stop) from the source's planes from `begin` on."""
        if self._instance:
            z, y, x = self._nearest
            return source[z[start:stop] - begin][:, y][:, :, x]
        position = self._position[0][start:stop]
        lower = max(begin, int(position[0]) - self._radius)
        values = source[lower - begin : int(position[-1]) + 2 + self._radius - begin]
        values = values.astype(np.float32) if values.dtype.kind == "f" else (values > 0).astype(np.float32)
        for axis, at in enumerate((position - lower, *self._position[1:])):
            if self._sigma[axis]:
                values = gaussian_filter1d(values, self._sigma[axis], axis, mode="nearest")
            values = _interpolated(values, at, axis)
        return values > THRESHOLD


def _interpolated(values: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    """Return the values at fractional indices along one axis, interpolated linearly."""
    below = at.astype(int)
    weight = (at - below).astype(np.float32)
    if not weight.any():
        return values.take(below, axis)
    weight = weight.reshape([-1 if k == axis else 1 for k in range(values.ndim)])
    first = values.take(below, axis)
    first += weight * (values.take(np.minimum(below + 1, values.shape[axis] - 1), axis) - first)
    return first


def _box(array: Any, lower: Sequence[int], upper: Sequence[int]) -> np.ndarray:
    """Return the voxels [lower, upper): of a ChunkedArray as a box, of others from whole planes."""
    if hasattr(array, "read"):
        return np.asarray(array.read(lower, upper))
    z, y, x = map(slice, lower, upper)
    return np.asarray(array[z])[:, y, x]


def _index(values: Sequence[int]) -> Index3:
    z, y, x = (int(v) for v in values)
    return z, y, x


def _sizes(values: Sequence[float], whose: str) -> tuple[float, ...]:
    """Return a voxel size by `_three`; it must be positive."""
    sizes = _three(values, f"voxel_size of the {whose}")
    if min(sizes) <= 0:
        raise DataError(f"voxel_size of the {whose} is {list(values)}; write three positive numbers (z, y, x) in nm")
    return sizes


def _three(values: Sequence[float], what: str) -> tuple[float, ...]:
    """Return the last three numbers, as the evaluator takes them; one stands for all axes.

    Raises DataError for other numbers of them, and for values that are not finite.
    """
    numbers = [float(v) for v in values][-3:]
    numbers = numbers * 3 if len(numbers) == 1 else numbers
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise DataError(f"{what} is {list(values)}; write three numbers (z, y, x) in nm")
    return tuple(numbers)


def _same_voxel(first: Sequence[float], second: Sequence[float]) -> bool:
    """Return whether the evaluator takes two voxel sizes as equal: numpy.allclose."""
    return bool(np.allclose(np.asarray(first, float), np.asarray(second, float)))


def offset_voxels(
    pred_voxel_size: Sequence[float] | None,
    pred_translation: Sequence[float] | None,
    voxel_size: Sequence[float],
    translation: Sequence[float],
    rules: Rules,
) -> Index3:
    """Return where voxel 0 of the (resampled) prediction goes in the target, in whole target voxels (z, y, x).

    Officially the prediction's translation is snapped down to multiples of the voxel, the target's is not: for a
    target off that grid a positive offset comes out one too small. By `clean` it is the offset of the lower edges,
    rounded.
    """
    if pred_translation is None:
        return 0, 0, 0
    source, target = (
        np.asarray(_three(pred_translation, "translation of the prediction")),
        np.asarray(translation, float),
    )
    voxel = np.asarray(voxel_size, float)
    if rules.official_alignment:
        difference = np.floor_divide(source, voxel) * voxel - target
        offset = np.floor_divide(np.abs(difference), voxel) * np.sign(difference)
    else:
        source_voxel = voxel if pred_voxel_size is None else np.asarray(_sizes(pred_voxel_size, "prediction"))
        offset = np.floor(((source - source_voxel / 2) - (target - voxel / 2)) / voxel + 0.5)
    return _index(offset.astype(int).tolist())


def _resampled_shape(shape: Sequence[int], scale: Sequence[float]) -> Index3:
    """Return the shape that skimage's `rescale` makes: rounded half to even, at least one voxel."""
    return _index([max(1, int(np.round(n * s))) for n, s in zip(shape, scale, strict=True)])


def _resample(block: np.ndarray, scale: np.ndarray, instance: bool) -> np.ndarray:
    """Return the block resampled as the evaluator does: nearest for ids, linear with anti-aliasing for the others."""
    if instance:
        # Float ids are blurred by the anti-aliasing: one of the evaluator's quirks
        return rescale(block, scale, order=0, mode="constant", preserve_range=True).astype(block.dtype)
    if block.dtype == bool:
        block = block.astype(np.float32)
    return rescale(block, scale, order=1, mode="constant", preserve_range=True)


def _resample_blockwise(pred: Any, scale: np.ndarray, instance: bool) -> np.ndarray:
    """Return what the evaluator makes of a large prediction: cubes resampled alone, some planes between left at 0."""
    result = np.zeros(_resampled_shape(pred.shape, scale.tolist()), pred.dtype if instance else bool)
    for start in product(*(range(0, n, BLOCK) for n in pred.shape)):
        source = _box(pred, start, [min(s + BLOCK, n) for s, n in zip(start, pred.shape, strict=True)])
        block = _resample(source, scale, instance)
        place = [int(s * f) for s, f in zip(start, scale, strict=True)]
        view = result[tuple(slice(p, p + n) for p, n in zip(place, block.shape, strict=True))]
        block = block[tuple(slice(0, n) for n in view.shape)]
        # The evaluator collects the cubes in float32 before it compares
        view[...] = block if instance else block.astype(np.float32) > np.float32(THRESHOLD)
    return result
