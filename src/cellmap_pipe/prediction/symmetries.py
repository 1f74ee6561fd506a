"""Test-time augmentation: the symmetries of a cuboid of voxels under which a network's answers are averaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.geometry import Shape3, Vec3
from cellmap_pipe.training.augment import IDENTITY, PAIRS, exchangeable_axes, permutations

COUNTS = (1, 4, 8, 16, 48)


@dataclass(frozen=True)
class Symmetry:
    """One symmetry: the axes (z, y, x) are permuted, axis i being axis `permutation[i]` before; then `flipped`."""

    permutation: Shape3 = IDENTITY
    flipped: tuple[int, ...] = ()

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the view of a tensor (..., z, y, x)."""
        return self._flip(self._permute(tensor, self.permutation))

    def undo(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a view (..., z, y, x) as it lay before `apply`."""
        inverse = [self.permutation.index(axis) for axis in range(3)]
        return self._permute(self._flip(tensor), inverse)

    @staticmethod
    def _permute(tensor: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
        first = tensor.ndim - 3
        return tensor.permute(*range(first), *(first + axis for axis in order))

    def _flip(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flip([tensor.ndim - 3 + axis for axis in self.flipped]) if self.flipped else tensor


def symmetries(n: int, patch: Shape3, voxel_nm: Vec3) -> tuple[Symmetry, ...]:
    """Return the `n` symmetries that predictions are averaged over, the identity first.

    4: flips of y and x. 8: flips of all axes. 16: these and the exchange of y and x. 48: all of the cube. For a patch
    of one plane, (1, h, w), 8 are those of the square: flips of y and x and their exchange.
    patch: (z, y, x) in voxels. voxel_nm: voxel size (z, y, x) in nm; axes that are exchanged must be equal in both.
    Raises ConfigError, naming the numbers that would do, for one that these do not allow.
    """
    groups = _groups(patch, voxel_nm)
    if n not in groups:
        why = "" if n in COUNTS else f"is none of {', '.join(map(str, COUNTS))}; "
        raise ConfigError(
            f"predict.tta {n}: {why}patch {tuple(patch)} with voxels of {tuple(voxel_nm)} nm allows "
            f"{', '.join(map(str, groups))}; set predict.tta to one of these"
        )
    flips, orders = groups[n]
    return tuple(
        Symmetry(order, tuple(axis for axis, flipped in zip(flips, chosen, strict=True) if flipped))
        for order, chosen in product(orders, product((False, True), repeat=len(flips)))
    )


def _groups(patch: Shape3, voxel_nm: Vec3) -> dict[int, tuple[Sequence[int], list[Shape3]]]:
    """Return the numbers of symmetries that are allowed, with the axes that are flipped and the orders of axes."""
    pairs = exchangeable_axes(voxel_nm, patch)
    in_plane = permutations([pair for pair in pairs if pair == (1, 2)])
    groups: dict[int, tuple[Sequence[int], list[Shape3]]] = {1: ((), [IDENTITY]), 4: ((1, 2), [IDENTITY])}
    if patch[0] == 1:
        if len(in_plane) == 2:
            groups[8] = ((1, 2), in_plane)
        return groups
    groups[8] = ((0, 1, 2), [IDENTITY])
    if len(in_plane) == 2:
        groups[16] = ((0, 1, 2), in_plane)
    if len(pairs) == len(PAIRS):
        groups[48] = ((0, 1, 2), permutations(pairs))
    return groups
