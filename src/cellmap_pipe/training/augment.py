"""What is drawn for each sample: the symmetry, affine map and change of intensities that its patch undergoes.

Kinds, probabilities and ranges are those of nnU-Net's default trainer (version 2), with these differences:
- Values are uniform over their range; nnU-Net's gamma is as often below 1 as above. Blur and low resolution come up as
  often as their probability says; nnU-Net then leaves out each channel in half of the cases, the only one too.
- Intensities lie in [0, 1] by the dataset's constants, the same in prediction; nnU-Net's are z-scores of a volume.
  Gamma therefore acts on that range and not on the patch's own, keeps no mean and deviation, and what brightness lifts
  above 1 is cut off, as normalisation cuts it.
- Brightness, contrast and gamma come first instead of after noise and blur: they map one stored intensity to another,
  so they act on the 256 entries of the normalisation's table instead of on millions of voxels. The order among them is
  nnU-Net's. Interpolation and blur average intensities that are mapped already, a difference of second order in the
  contrast between neighbours; noise keeps the strength it was drawn with.
- Quarter turns join the mirroring, wherever voxels and patch allow them.
- Angles are those of the specimen, in nm, and the fixed point is the voxel that the patch was drawn for, not the
  patch's centre: a known voxel never leaves the patch.

Here are only numbers; `training.transform` and `training.expand` carry them out on the training device.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cellmap_pipe.geometry import Shape3, Vec3, shape3, vec3

Matrix3 = tuple[Vec3, Vec3, Vec3]

IDENTITY: Shape3 = (0, 1, 2)
IDENTITY_MATRIX: Matrix3 = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))

# The axes that a turn about z, y or x mixes.
PLANES = ((1, 2), (0, 2), (0, 1))
PAIRS = ((0, 1), (0, 2), (1, 2))

# Axes whose voxel sizes differ by less than this share of them are equal.
TOLERANCE = 0.01

# probability, lowest and highest value
ROTATION = (0.2, -math.pi / 6, math.pi / 6)
SCALING = (0.2, 0.7, 1.4)
BRIGHTNESS = (0.15, 0.75, 1.25)
CONTRAST = (0.15, 0.75, 1.25)
INVERTED_GAMMA = (0.1, 0.7, 1.5)
GAMMA = (0.3, 0.7, 1.5)
BLUR = (0.2, 0.5, 1.0)
LOW_RESOLUTION = (0.25, 0.5, 1.0)
NOISE_PROBABILITY = 0.1

# Voxels whose longest edge exceeds the other two by more than this factor are turned in the plane of those only.
ANISOTROPIC = 3.0


@dataclass(frozen=True)
class Variation:
    """The augmentation of one sample; the default leaves it as it is. Axes are (z, y, x).

    permutation, flipped: the axes are permuted, then flipped. affine: what then takes the offset of a voxel of the
    patch from `anchor` to the offset of the place its content comes from, in voxels. brightness, contrast,
    inverted_gamma and gamma act on normalised intensities, in this order. noise: standard deviation; seed: of the
    noise. blur: standard deviations in voxels. zoom: the share of the voxels per axis that low resolution leaves.
    """

    permutation: Shape3 = IDENTITY
    flipped: tuple[int, ...] = ()
    affine: Matrix3 | None = None
    anchor: Shape3 = (0, 0, 0)
    brightness: float = 1.0
    contrast: float = 1.0
    inverted_gamma: float = 1.0
    gamma: float = 1.0
    noise: float = 0.0
    seed: int = 0
    blur: Vec3 = (0.0, 0.0, 0.0)
    zoom: float = 1.0


class Augmentation:
    """Draws the variations of samples.

    settings: the `augment` section: flips, rotations, affine, brightness, contrast, gamma, blur, low_resolution (bool),
    noise (largest standard deviation). patch: (z, y, x) voxels. voxels: each crop's voxel size (z, y, x) in nm.
    """

    NUMBERS = 18

    def __init__(self, settings: Mapping[str, Any], patch: Sequence[int], voxels: Sequence[Sequence[float]]) -> None:
        self.settings = settings
        self.patch = shape3(patch)
        self.voxels = [vec3(voxel_nm) for voxel_nm in voxels]
        self.orders = [permutations(exchangeable_axes(voxel_nm, self.patch)) for voxel_nm in self.voxels]

    def draw(self, numbers: Sequence[float], crop: int, anchor: Shape3) -> Variation:
        """Return the variation of one sample.

        numbers: NUMBERS uniform ones in [0, 1), each with a meaning of its own: switching one kind off leaves the
        others as they were. anchor: the voxel of the patch that it was drawn for, which stays in view.
        """
        order, *flips, turn, turn_y, turn_x, scale = numbers[:8]
        brightness, contrast, inverted, gamma, noise, seed, blur, blur_y, blur_x, zoom = numbers[8:]
        on = self.settings
        orders = self.orders[crop]
        permutation = orders[int(order * len(orders))] if on["rotations"] else IDENTITY
        flipped = tuple(axis for axis in range(3) if flips[axis] < 0.5) if on["flips"] else ()
        affine = None
        if on["affine"] and (turn < ROTATION[0] or scale < SCALING[0]):
            angles = _spread(ROTATION, turn, turn_y, turn_x) or (0.0, 0.0, 0.0)
            affine = affine_matrix(angles, _drawn(SCALING, scale, 1.0), self.voxels[crop], self.patch)
        return Variation(
            permutation=permutation,
            flipped=flipped,
            affine=affine,
            anchor=self._turned(anchor, permutation, flipped),
            brightness=_drawn(BRIGHTNESS, brightness, 1.0) if on["brightness"] else 1.0,
            contrast=_drawn(CONTRAST, contrast, 1.0) if on["contrast"] else 1.0,
            inverted_gamma=_drawn(INVERTED_GAMMA, inverted, 1.0) if on["gamma"] else 1.0,
            gamma=_drawn(GAMMA, gamma, 1.0) if on["gamma"] else 1.0,
            noise=_drawn((NOISE_PROBABILITY, 0.0, on["noise"]), noise, 0.0),
            seed=int(seed * 2**53),
            blur=(_spread(BLUR, blur, blur_y, blur_x) or (0.0, 0.0, 0.0)) if on["blur"] else (0.0, 0.0, 0.0),
            zoom=_drawn(LOW_RESOLUTION, zoom, 1.0) if on["low_resolution"] else 1.0,
        )

    def _turned(self, voxel: Shape3, permutation: Shape3, flipped: Sequence[int]) -> Shape3:
        moved = [voxel[axis] for axis in permutation]
        return shape3([self.patch[i] - 1 - moved[i] if i in flipped else moved[i] for i in range(3)])


def exchangeable_axes(voxel_nm: Sequence[float], patch: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of axes that a quarter turn may exchange: equal in voxel size and in patch size."""
    return [(a, b) for a, b in PAIRS if patch[a] == patch[b] and abs(voxel_nm[a] / voxel_nm[b] - 1) < TOLERANCE]


def isotropic(voxel_nm: Sequence[float]) -> bool:
    """Return whether any two axes are exchangeable in a cube of such voxels."""
    return len(exchangeable_axes(voxel_nm, (1, 1, 1))) == len(PAIRS)


def permutations(pairs: Sequence[tuple[int, int]]) -> list[Shape3]:
    """Return the axis orders that exchanging `pairs` can reach, the identity first."""
    found: list[Shape3] = [IDENTITY]
    for order in found:
        for a, b in pairs:
            swapped = list(order)
            swapped[a], swapped[b] = swapped[b], swapped[a]
            candidate = shape3(swapped)
            if candidate not in found:
                found.append(candidate)
    return found


def turnable_axes(voxel_nm: Sequence[float], patch: Sequence[int]) -> list[int]:
    """Return the axes in whose planes a patch may be turned by any angle.

    Not one along which the patch is one voxel, nor one along which voxels are far longer than along the others: a
    slight turn would fill a plane from several, each interpolated over a distance in which the structures change.
    """
    axes = [axis for axis in range(3) if patch[axis] > 1]
    lengths = sorted(voxel_nm)
    return [axis for axis in axes if not (voxel_nm[axis] == lengths[2] > ANISOTROPIC * lengths[1])]


def affine_matrix(
    angles: Sequence[float], factor: float, voxel_nm: Sequence[float], patch: Sequence[int]
) -> Matrix3 | None:
    """Return the matrix from offsets in the new patch to those in the old one, in voxels; None for the identity.

    angles: radians about z, y and x, in nm space; those that would turn an axis that is not turnable are left out.
    factor: above 1 makes objects smaller; for all axes but those along which the patch is one voxel.
    """
    rows = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    if any(angles):
        turnable = turnable_axes(voxel_nm, patch)
        for (a, b), angle in zip(PLANES, angles, strict=True):
            if a in turnable and b in turnable:
                cosine, sine = math.cos(angle), math.sin(angle)
                for row in rows:
                    row[a], row[b] = cosine * row[a] + sine * row[b], cosine * row[b] - sine * row[a]
    scaled = [size * (factor if n > 1 else 1.0) for size, n in zip(voxel_nm, patch, strict=True)]
    # plain arithmetic: numpy takes several times as long for so few numbers, and the loader waits for it
    first, second, third = (
        vec3([value * after / size for value, after in zip(row, scaled, strict=True)])
        for row, size in zip(rows, voxel_nm, strict=True)
    )
    matrix = (first, second, third)
    return None if matrix == IDENTITY_MATRIX else matrix


def _drawn(kind: tuple[float, float, float], number: float, otherwise: float) -> float:
    """Return a value of the kind's range if `number` is below its probability: what is below is uniform again."""
    probability, low, high = kind
    return low + (high - low) * number / probability if number < probability else otherwise


def _spread(kind: tuple[float, float, float], first: float, second: float, third: float) -> Vec3 | None:
    """Return a value per axis if `first` is below the kind's probability."""
    probability, low, high = kind
    if first >= probability:
        return None
    return vec3([low + (high - low) * number for number in (first / probability, second, third)])
