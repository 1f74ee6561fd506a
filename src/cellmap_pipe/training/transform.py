"""Carries out variations on the training device: symmetry, affine map, noise, blur, low resolution.

Image and labels go through one description of the geometry, so they cannot part: where the same voxel goes is computed
once. A map that keeps the axes is a product of one matrix per axis, and so are blur and low resolution: whatever of
them a sample has is multiplied into three matrices first and acts on the image at once.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from cellmap_pipe.geometry import Vec3
from cellmap_pipe.prepare.state_table import UNKNOWN_ROW
from cellmap_pipe.training.augment import Matrix3, Variation
from cellmap_pipe.training.expand import Expander, slabs

# Standard deviations after which a Gaussian ends, as in scipy.
TRUNCATE = 4.0

# Rows of a patch that are turned at once.
TURNED_ROWS = 32

Geometry = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def varied(
    image: Tensor, label: Tensor, crops: Sequence[int], variations: Sequence[Variation], expander: Expander
) -> tuple[Tensor, Tensor]:
    """Return the network's input, float32 (B, 1, z, y, x), and the label maps (B, z, y, x) after the variations.

    image: uint8 (B, z, y, x); label: label maps of the same shape; both on the expander's device and unchanged after
    it. Outside of the patch labels are unknown and EM is mirrored at the end voxels, once: further out the last voxel
    repeats. The result is overwritten by the expander's next call. On one device equal variations give equal bits.
    """
    images = expander.buffer("image", (len(image), 1, *image.shape[1:]), torch.float32)
    labels = expander.buffer("label", label.shape, label.dtype)
    for row, (crop, variation) in enumerate(zip(crops, variations, strict=True)):
        _vary(image[row], label[row], crop, variation, expander, images[row, 0], labels[row])
    return images, labels


def _vary(
    stored: Tensor, label: Tensor, crop: int, variation: Variation, expander: Expander, image: Tensor, moved: Tensor
) -> None:
    """Write one sample's input to `image` and its label map to `moved`."""
    shape = stored.shape
    scratch = expander.buffer("scratch", shape, torch.float32)
    factors = None if variation.affine is None else scaling(variation.affine)
    matrices: list[Tensor | None] = [None, None, None]
    if variation.affine is None or factors:
        symmetric = expander.buffer("turned", shape, torch.uint8)
        turn(stored, variation, symmetric)
        expander.expand(symmetric, crop, variation, image)
    if variation.affine is None:
        turn(label, variation, moved)
    elif factors:
        resample(None, label, origin_of(variation, shape), None, moved)
        matrices = [scaling_matrix(*axis) for axis in zip(shape, factors, variation.anchor, strict=True)]
    else:
        expander.expand(stored, crop, variation, scratch)
        resample(scratch, label, origin_of(variation, shape), image, moved)
    if variation.noise:
        multiply(image, matrices, scratch)
        add_noise(image, variation)
        matrices = [None, None, None]
    for axis, n in enumerate(shape):
        for matrix in (blur_matrix(n, variation.blur[axis]), low_resolution_matrix(n, variation.zoom)):
            matrices[axis] = product(matrix, matrices[axis])
    multiply(image, matrices, scratch)


# -- geometry ---------------------------------------------------------------------------------------------------------


def turn(volume: Tensor, variation: Variation, out: Tensor) -> None:
    """Write the volume (z, y, x) to `out` after the variation's symmetry of the cube."""
    before = [variation.permutation[axis] for axis in variation.flipped]
    source = (volume.flip(before) if before else volume).permute(variation.permutation)
    # a copy of exchanged axes at once would use each cache line many times, but long after it has left the cache
    for start in range(0, out.shape[1], TURNED_ROWS):
        out[:, start : start + TURNED_ROWS].copy_(source[:, start : start + TURNED_ROWS])


def scaling(affine: Matrix3) -> Vec3 | None:
    """Return the factors of an affine map that only scales, None for one that turns."""
    if any(affine[a][b] for a in range(3) for b in range(3) if a != b):
        return None
    return affine[0][0], affine[1][1], affine[2][2]


def origin_of(variation: Variation, shape: Sequence[int]) -> Geometry:
    """Return matrix and offset from a voxel of the new patch to where its content was, symmetry and affine in one."""
    matrix = np.asarray(variation.affine)
    anchor = np.asarray(variation.anchor, dtype=np.float64)
    offset = anchor - matrix @ anchor
    found = np.empty((3, 3)), np.empty(3)
    for axis, before in enumerate(variation.permutation):
        flip = axis in variation.flipped
        found[0][before] = -matrix[axis] if flip else matrix[axis]
        found[1][before] = shape[axis] - 1 - offset[axis] if flip else offset[axis]
    return found


def resample(source: Tensor | None, label: Tensor, geometry: Geometry, image: Tensor | None, moved: Tensor) -> None:
    """Write what the geometry takes from `source`, trilinear, to `image`, and from `label`, nearest, to `moved`.

    All are (z, y, x). Without a source only labels are resampled.
    """
    shape, device = label.shape, label.device
    around = functional.pad(label, (1,) * 6, value=UNKNOWN_ROW).view(-1)
    planes = (slabs(shape, device)[0].stop, *shape[1:])
    places, planar = (torch.empty((3, *planes), device=device) for _ in range(2))
    index = torch.empty((2, *planes), dtype=torch.int32, device=device)
    for slab in slabs(shape, device):
        n = slab.stop - slab.start
        _places(geometry, slab, shape, places[:, :n])
        if source is not None and image is not None:
            for axis, size in enumerate(shape):
                # mirrored, in grid_sample's -1 .. 1; it wants x first
                part = torch.mul(places[axis, :n], 2 / max(size - 1, 1), out=planar[2 - axis, :n])
                part.abs_().sub_(2).abs_().neg_().add_(1)
            grid = planar[:, :n].permute(1, 2, 3, 0)[None]
            sampled = functional.grid_sample(source[None, None], grid, padding_mode="border", align_corners=True)
            image[slab] = sampled[0, 0]
        row, rounded = index[:, :n]
        row.zero_()
        for axis, size in enumerate(shape):
            # rounded, counted from the padding, in which everything further out ends
            rounded.copy_(places[axis, :n].add_(1.5).clamp_(0, size + 1.5))
            row.mul_(size + 2).add_(rounded)
        torch.index_select(around, 0, row.view(-1), out=moved[slab].view(-1))


def _places(geometry: Geometry, slab: slice, shape: Sequence[int], out: Tensor) -> None:
    """Write to `out` (3, planes, y, x) where the voxels of a slab of planes come from, in voxels."""
    matrix, offset = geometry
    z, y, x = (np.arange(n) for n in (slab.stop, *shape[1:]))
    for axis in range(3):
        columns = matrix[axis, 0] * z[slab, None] + matrix[axis, 1] * y + offset[axis]
        first, last = (shipped(torch.from_numpy(values), out) for values in (columns, matrix[axis, 2] * x))
        torch.add(first[..., None], last, out=out[axis])


def shipped(values: Tensor, like: Tensor) -> Tensor:
    """Return what the host computed in the type and on the device of `like`, not waiting for what is queued there."""
    return values.to(like, non_blocking=True)


# -- noise, and what is one matrix per axis ---------------------------------------------------------------------------


def add_noise(image: Tensor, variation: Variation) -> None:
    """Add the variation's Gaussian noise to the image (z, y, x), the same for the same seed."""
    generator = torch.Generator(image.device).manual_seed(variation.seed)
    for slab in slabs(image.shape, image.device):
        part = image[slab]
        part.add_(torch.empty_like(part).normal_(generator=generator), alpha=variation.noise)


def scaling_matrix(n: int, factor: float, anchor: int) -> Tensor | None:
    """Return what takes n voxels to their places anchor + factor * (i - anchor), linear, mirrored at the end voxels."""
    if n == 1:
        return None
    place = anchor + factor * (torch.arange(n, dtype=torch.float64) - anchor)
    place = (n - 1 - (n - 1 - place.abs()).abs()).clamp_(min=0)
    return (1 - (place[:, None] - torch.arange(n)).abs()).clamp_(min=0)


def blur_matrix(n: int, sigma: float) -> Tensor | None:
    """Return what blurs n voxels by a Gaussian; at the ends what lies inside has all of the weight."""
    if n == 1 or not sigma:
        return None
    place = torch.arange(n, dtype=torch.float64)
    distance = (place[:, None] - place).abs()
    weights = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance <= int(TRUNCATE * sigma + 0.5))
    return weights / weights.sum(1, keepdim=True)


def low_resolution_matrix(n: int, zoom: float) -> Tensor | None:
    """Return what takes n voxels to the share `zoom` of them, nearest, and back, linear."""
    fewer = max(1, round(n * zoom))
    if fewer == n:
        return None
    units = torch.eye(n, dtype=torch.float64)[None]
    coarse = functional.interpolate(units, size=fewer, mode="nearest-exact")
    return functional.interpolate(coarse, size=n, mode="linear", align_corners=False)[0].T


def product(second: Tensor | None, first: Tensor | None) -> Tensor | None:
    """Return the product of two matrices of an axis, None being the identity."""
    if second is None or first is None:
        return first if second is None else second
    return second @ first


def multiply(image: Tensor, matrices: Sequence[Tensor | None], scratch: Tensor) -> None:
    """Multiply the image (z, y, x) by one matrix per axis, in place. scratch: of its shape."""
    z, y, x = (None if matrix is None else shipped(matrix, image) for matrix in matrices)
    if z is None and y is None and x is None:
        return
    source = image if z is None else scratch
    if z is not None:
        torch.mm(z, image.view(len(z), -1), out=scratch.view(len(z), -1))
    for slab in slabs(image.shape, image.device):
        part = source[slab]
        if y is not None:
            part = y @ part
        if x is not None:
            part = part @ x.T
        image[slab] = part
