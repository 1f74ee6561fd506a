"""Bringing a prediction to the voxels of the truth (CHALLENGE section 4.2)."""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
from skimage.transform import rescale

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation.rules import Rules, get_rules

MAX_VOLUME_SIZE_RATIO = 16**3
THRESHOLD = 0.5
# Above 500 MiB of float32 the evaluator resamples cubes of 100 MiB one by one
BLOCKWISE_VOXELS = 500 * 2**20 // 4
BLOCK = int((100 * 2**20 // 4) ** (1 / 3))


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
    their edges, to the nearest voxel, resampled whole, and floats are thresholded at 0.5.
    Raises DataError for a prediction that is not 3-D, empty, or more than 4096 times the target.
    """
    rules = get_rules(rules)
    if pred.ndim != 3 or 0 in pred.shape:
        raise DataError(f"prediction has shape {pred.shape}; three axes (z, y, x), none empty, are needed")
    ratio = pred.size / math.prod(shape)
    if ratio > MAX_VOLUME_SIZE_RATIO:
        raise DataError(
            f"prediction has {ratio:.0f} times the voxels of the target, more than {MAX_VOLUME_SIZE_RATIO}; "
            f"downsample it to {list(voxel_size)} nm"
        )
    instance = is_instance(label)
    if not rules.official_alignment and not instance:
        pred = pred > (THRESHOLD if pred.dtype.kind == "f" else 0)
    if pred_voxel_size is not None and not same_voxel(pred_voxel_size, voxel_size):
        scale = np.asarray(pred_voxel_size, float) / np.asarray(voxel_size, float)
        if rules.official_alignment and pred.size > BLOCKWISE_VOXELS:
            pred = _resample_blockwise(pred, scale, instance)
        else:
            pred = _resample(pred, scale, instance, edge="constant" if rules.official_alignment else "edge")
            pred = pred if instance else pred > THRESHOLD
    elif pred_voxel_size is None:
        pred = _centred(pred, shape)
    return _placed(pred, shape, offset_voxels(pred_voxel_size, pred_translation, voxel_size, translation, rules))


def same_voxel(first: Sequence[float], second: Sequence[float]) -> bool:
    """Return whether the evaluator takes two voxel sizes as equal: numpy.allclose."""
    return bool(np.allclose(np.asarray(first, float), np.asarray(second, float)))


def offset_voxels(
    pred_voxel_size: Sequence[float] | None,
    pred_translation: Sequence[float] | None,
    voxel_size: Sequence[float],
    translation: Sequence[float],
    rules: Rules,
) -> tuple[int, int, int]:
    """Return where voxel 0 of the (resampled) prediction goes in the target, in whole target voxels (z, y, x).

    Officially the prediction's translation is snapped down to multiples of the voxel, the target's is not: for a
    target off that grid a positive offset comes out one too small. By `clean` it is the offset of the lower edges,
    rounded.
    """
    if pred_translation is None:
        return 0, 0, 0
    source, target = np.asarray(pred_translation, float), np.asarray(translation, float)
    voxel = np.asarray(voxel_size, float)
    if rules.official_alignment:
        difference = np.floor_divide(source, voxel) * voxel - target
        offset = np.floor_divide(np.abs(difference), voxel) * np.sign(difference)
    else:
        source_voxel = voxel if pred_voxel_size is None else np.asarray(pred_voxel_size, float)
        offset = np.floor(((source - source_voxel / 2) - (target - voxel / 2)) / voxel + 0.5)
    z, y, x = offset.astype(int).tolist()
    return z, y, x


def _resample(block: np.ndarray, scale: np.ndarray, instance: bool, edge: str) -> np.ndarray:
    """Return the block resampled as the evaluator does: nearest for ids, linear with anti-aliasing for the others."""
    if instance:
        # By default float ids are blurred by the anti-aliasing: one of the evaluator's quirks
        anti_aliasing = None if edge == "constant" else False
        resampled = rescale(block, scale, order=0, mode=edge, preserve_range=True, anti_aliasing=anti_aliasing)
        return resampled.astype(block.dtype)
    if block.dtype == bool:
        block = block.astype(np.float32)
    return rescale(block, scale, order=1, mode=edge, preserve_range=True)


def _resample_blockwise(pred: np.ndarray, scale: np.ndarray, instance: bool) -> np.ndarray:
    """Return what the evaluator makes of a large prediction: cubes resampled alone, some planes between left at 0."""
    shape = [max(1, int(np.round(n * s))) for n, s in zip(pred.shape, scale, strict=True)]
    result = np.zeros(shape, pred.dtype if instance else bool)
    for start in product(*(range(0, n, BLOCK) for n in pred.shape)):
        block = _resample(pred[tuple(slice(s, s + BLOCK) for s in start)], scale, instance, edge="constant")
        place = [int(s * f) for s, f in zip(start, scale, strict=True)]
        view = result[tuple(slice(p, p + n) for p, n in zip(place, block.shape, strict=True))]
        block = block[tuple(slice(0, n) for n in view.shape)]
        view[...] = block if instance else block > THRESHOLD
    return result


def _centred(pred: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the prediction padded with 0 or cropped about its centre, the odd voxel at the upper side."""
    missing = [max(0, n - m) for n, m in zip(shape, pred.shape, strict=True)]
    if any(missing):
        pred = np.pad(pred, [(k // 2, k - k // 2) for k in missing])
    start = [max(0, m - n) // 2 for n, m in zip(shape, pred.shape, strict=True)]
    return pred[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))]


def _placed(pred: np.ndarray, shape: Sequence[int], offset: Sequence[int]) -> np.ndarray:
    """Return an array of `shape`, zero but for the prediction with its voxel 0 at `offset`, clipped."""
    shape = tuple(int(n) for n in shape)
    if pred.shape == shape and not any(offset):
        return pred
    result = np.zeros(shape, pred.dtype)
    lower = [max(0, o) for o in offset]
    upper = [min(n, o + m) for n, o, m in zip(shape, offset, pred.shape, strict=True)]
    if all(lo < hi for lo, hi in zip(lower, upper, strict=True)):
        source = tuple(slice(lo - o, hi - o) for lo, hi, o in zip(lower, upper, offset, strict=True))
        result[tuple(slice(lo, hi) for lo, hi in zip(lower, upper, strict=True))] = pred[source]
    return result
