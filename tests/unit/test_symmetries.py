"""The symmetries of test-time augmentation: as many as were asked for, each undone exactly, refused where they must."""

import pytest
import torch

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.geometry import Shape3, Vec3
from cellmap_pipe.prediction.symmetries import Symmetry, symmetries

CUBE: Vec3 = (8, 8, 8)
FLAT: Vec3 = (20, 8, 8)
UNEVEN: Vec3 = (8, 6, 4)


@pytest.mark.parametrize(
    ("n", "patch", "voxel_nm"),
    [
        (1, (3, 4, 5), UNEVEN),
        (4, (3, 4, 5), UNEVEN),
        (8, (3, 4, 5), UNEVEN),
        (16, (3, 4, 4), FLAT),
        (16, (4, 4, 4), CUBE),
        (48, (4, 4, 4), CUBE),
        (4, (1, 4, 5), UNEVEN),
        (8, (1, 4, 4), FLAT),
    ],
)
def test_all_are_different_keep_the_patch_and_are_undone(n: int, patch: Shape3, voxel_nm: Vec3) -> None:
    chosen = symmetries(n, patch, voxel_nm)
    assert chosen[0] == Symmetry()
    tensor = torch.arange(2 * patch[0] * patch[1] * patch[2]).view(1, 2, *patch)
    views = [symmetry.apply(tensor) for symmetry in chosen]
    assert len({tuple(view.flatten().tolist()) for view in views}) == len(chosen) == n
    for symmetry, view in zip(chosen, views, strict=True):
        assert view.shape == tensor.shape
        assert torch.equal(symmetry.undo(view), tensor)


@pytest.mark.parametrize(
    ("n", "patch", "voxel_nm"), [(8, (2, 3, 3), FLAT), (16, (2, 3, 3), FLAT), (48, (3, 3, 3), CUBE)]
)
def test_one_after_another_is_one_of_them(n: int, patch: Shape3, voxel_nm: Vec3) -> None:
    tensor = torch.arange(patch[0] * patch[1] * patch[2]).view(patch)
    chosen = symmetries(n, patch, voxel_nm)
    views = {tuple(symmetry.apply(tensor).flatten().tolist()) for symmetry in chosen}
    for first in chosen:
        for second in chosen[:: len(chosen) // 4]:
            assert tuple(second.apply(first.apply(tensor)).flatten().tolist()) in views


@pytest.mark.parametrize(
    ("n", "patch", "voxel_nm", "largest"),
    [
        (16, (4, 4, 4), UNEVEN, 8),
        (16, (4, 4, 5), CUBE, 8),
        (48, (3, 4, 4), CUBE, 16),
        (48, (4, 4, 4), FLAT, 16),
        (8, (1, 4, 5), CUBE, 4),
        (16, (1, 4, 4), CUBE, 8),
        (48, (1, 4, 4), CUBE, 8),
        (5, (4, 4, 4), CUBE, 48),
    ],
)
def test_what_patch_and_voxels_do_not_allow_is_refused(n: int, patch: Shape3, voxel_nm: Vec3, largest: int) -> None:
    with pytest.raises(ConfigError, match=rf"predict\.tta {n}: .* allows 1, .*{largest}; set predict\.tta to one"):
        symmetries(n, patch, voxel_nm)
