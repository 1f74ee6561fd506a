"""Image and labels undergo one geometry, which is that of scipy and of the specimen, and known voxels stay in view."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from cellmap_pipe.intensity import lookup_table
from cellmap_pipe.training.augment import Augmentation, Matrix3, Variation, affine_matrix
from cellmap_pipe.training.expand import Expander
from cellmap_pipe.training.transform import blur_matrix, low_resolution_matrix, resample, turn, varied

torch.set_num_threads(1)

UNKNOWN = 255
GEOMETRY = {
    "flips": True,
    "rotations": True,
    "affine": True,
    "brightness": False,
    "contrast": False,
    "gamma": False,
    "blur": False,
    "low_resolution": False,
    "noise": 0.0,
}
ALL = dict.fromkeys(GEOMETRY, True) | {"noise": 0.1}


def plain_expander(lo: float = 0, hi: float = 255) -> Expander:
    return Expander(np.full((1, 1, 256), UNKNOWN, np.uint8), [(lo, hi)], torch.device("cpu"))


def noise_volume(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8))


def one(image: torch.Tensor, label: torch.Tensor, variation: Variation) -> tuple[np.ndarray, np.ndarray]:
    """Return image in 0..255 and label map of one sample after the variation, (z, y, x)."""
    images, labels = varied(image[None], label[None], [0], [variation], plain_expander())
    return images[0, 0].numpy().astype(np.float64) * 255, labels[0].numpy().copy()


def matrix_of(seed: int, shape: tuple[int, ...], voxel: tuple[float, ...] = (8, 8, 8)) -> Matrix3:
    rng = np.random.default_rng(seed)
    matrix = affine_matrix(rng.uniform(-0.5, 0.5, 3), rng.uniform(0.7, 1.4), voxel, shape)
    assert matrix is not None
    return matrix


def test_no_variation_changes_no_bit() -> None:
    image, label = noise_volume((2, 6, 7, 8)), noise_volume((2, 6, 7, 8), 1)
    images, labels = varied(image, label, [0, 0], [Variation()] * 2, plain_expander(40, 220))
    np.testing.assert_array_equal(images[:, 0].numpy(), lookup_table(40, 220)[image.numpy()])
    assert torch.equal(labels, label)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.permutations(range(3)), st.sets(st.integers(0, 2)), st.sampled_from(((40, 40, 40), (1, 5, 5), (3, 3, 3))))
def test_symmetries_are_those_of_numpy(order: list[int], flipped: set[int], shape: tuple[int, ...]) -> None:
    if any(shape[axis] != shape[before] for axis, before in enumerate(order)):
        order = [0, 2, 1]
    volume = noise_volume(shape)
    found = torch.empty_like(volume)
    turn(volume, Variation(permutation=tuple(order), flipped=tuple(sorted(flipped))), found)
    np.testing.assert_array_equal(found.numpy(), np.flip(volume.numpy().transpose(order), tuple(flipped)))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    numbers=st.lists(st.floats(0, 1, exclude_max=True), min_size=Augmentation.NUMBERS, max_size=Augmentation.NUMBERS),
    affine=st.sampled_from(("turn", "scale", "both", "none")),
    shape=st.sampled_from(((20, 20, 20), (12, 20, 20), (1, 20, 20), (20, 20, 1))),
    voxel=st.sampled_from(((8.0, 8.0, 8.0), (16.0, 8.0, 8.0), (40.0, 8.0, 8.0), (8.0, 6.0, 4.0))),
    data=st.data(),
)
def test_labels_and_image_come_from_the_same_place(
    numbers: list[float], affine: str, shape: tuple[int, ...], voxel: tuple[float, ...], data: st.DataObject
) -> None:
    """Both hold their coordinates, one axis at a time: a label is the coordinate nearest to the image's."""
    numbers[4] = numbers[4] * 0.2 if affine in ("turn", "both") else 0.5
    numbers[7] = numbers[7] * 0.2 if affine in ("scale", "both") else 0.5
    anchor = data.draw(st.tuples(*[st.integers(0, n - 1) for n in shape]))
    variation = Augmentation(GEOMETRY, shape, [voxel]).draw(numbers, 0, anchor)
    coordinates = torch.from_numpy(np.indices(shape).astype(np.uint8))
    for axis in range(3):
        image, label = one(coordinates[axis], coordinates[axis], variation)
        inside = label != UNKNOWN
        assert np.abs(image - label)[inside].max() <= 0.5 + 1e-4
        assert label[variation.anchor] == anchor[axis]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_a_patch_with_a_known_voxel_keeps_one(seed: int, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(((16, 16, 16), (1, 16, 16))))
    anchor = data.draw(st.tuples(*[st.integers(0, n - 1) for n in shape]))
    numbers = np.random.default_rng(seed).random(Augmentation.NUMBERS)
    numbers[[4, 7]] *= 0.2
    variation = Augmentation(ALL, shape, [(8, 8, 8)]).draw(numbers.tolist(), 0, anchor)
    label = torch.full(shape, UNKNOWN, dtype=torch.uint8)
    label[anchor] = 3
    assert (one(noise_volume(shape), label, variation)[1] == 3).any()


def composed(variation: Variation, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return matrix and offset for scipy of what the affine map takes from a patch already turned."""
    matrix, anchor = np.asarray(variation.affine), np.asarray(variation.anchor)
    return matrix, anchor - matrix @ anchor


@pytest.mark.parametrize("shape", [(24, 24, 24), (9, 24, 24), (1, 24, 24)])
@pytest.mark.parametrize(("order", "flipped"), [((0, 1, 2), ()), ((0, 2, 1), (1,)), ((0, 1, 2), (0, 2))])
@pytest.mark.parametrize("turning", [True, False])
def test_an_affine_map_is_scipys_after_the_symmetry(
    shape: tuple[int, ...], order: tuple[int, ...], flipped: tuple[int, ...], turning: bool
) -> None:
    matrix = matrix_of(3, shape) if turning else affine_matrix((0, 0, 0), 1.2713, (8, 8, 8), shape)
    variation = Variation(permutation=order, flipped=flipped, affine=matrix, anchor=(0, 13, 8))
    image, label = noise_volume(shape), noise_volume(shape, 1)
    turned = [np.flip(volume.numpy().transpose(order), flipped) for volume in (image, label)]
    found = one(image, label, variation)
    mapping = composed(variation, shape)
    wanted = ndimage.affine_transform(turned[0].astype(np.float64), *mapping, order=1, mode="mirror")
    place = np.tensordot(mapping[0], np.indices(shape), 1) + mapping[1].reshape(3, 1, 1, 1)
    limit = np.array(shape).reshape(3, 1, 1, 1) - 1
    once = ((place >= -limit) & (place <= 2 * limit)).all(0)  # what is further out is not mirrored again
    np.testing.assert_allclose(found[0][once], wanted[once], atol=2e-3)
    nearest = ndimage.affine_transform(turned[1], *mapping, order=0, mode="constant", cval=UNKNOWN)
    # scipy ends at the centres of the end voxels, labels here at their edges
    within = ((place >= 0) & (place <= limit)).all(0)
    beyond = ((place < -0.5) | (place > limit + 0.5)).any(0)
    np.testing.assert_array_equal(found[1][within], nearest[within])
    assert (found[1][beyond] == UNKNOWN).all()
    assert 0.3 < within.mean() < once.mean()


@pytest.mark.parametrize("turning", [True, False])
def test_wide_label_maps_and_several_slabs_are_resampled_alike(turning: bool) -> None:
    shape = (20, 120, 120)
    label = torch.arange(math.prod(shape)).remainder(700).to(torch.int16).view(shape)
    matrix = matrix_of(5, shape) if turning else affine_matrix((0, 0, 0), 0.8271, (8, 8, 8), shape)
    variation = Variation(affine=matrix, anchor=(10, 60, 60))
    found = one(torch.zeros(shape, dtype=torch.uint8), label, variation)[1]
    wanted = ndimage.affine_transform(label.numpy(), *composed(variation, shape), order=0, cval=UNKNOWN)
    inside = wanted != UNKNOWN
    assert inside.mean() > 0.5
    assert (found == wanted)[inside].mean() > 0.9999  # places half-way between voxels may be rounded either way


def test_a_ball_in_nm_stays_a_ball() -> None:
    voxel = (16.0, 8.0, 8.0)
    shape = (32, 64, 64)
    centre = np.array([15, 32, 30])
    nm = (np.indices(shape) - centre.reshape(3, 1, 1, 1)) * np.reshape(voxel, (3, 1, 1, 1))
    distance = np.sqrt((nm**2).sum(0))
    ball = torch.from_numpy((distance < 150).astype(np.uint8))
    matrix = affine_matrix((0.5, -0.4, 0.3), 1.0, voxel, shape)
    found = one(ball, ball, Variation(affine=matrix, anchor=(15, 32, 30)))[1]
    assert (found[distance < 140] == 1).all()
    assert (found[(distance > 160) & (distance < 220)] == 0).all()


def test_scaling_alone_is_what_the_general_map_gives() -> None:
    shape = (20, 24, 28)
    image = noise_volume(shape)
    variation = Variation(affine=affine_matrix((0, 0, 0), 0.8, (8, 8, 8), shape), anchor=(5, 11, 20))
    matrix = np.asarray(variation.affine)
    general = torch.empty(shape)
    labels = torch.empty(shape, dtype=torch.uint8)
    anchor = np.array(variation.anchor)
    resample(image.float(), image, (matrix, anchor - matrix @ anchor), general, labels)
    found = one(image, image, variation)
    np.testing.assert_allclose(found[0], general.numpy(), atol=1e-3)
    np.testing.assert_array_equal(found[1], labels.numpy())


def test_blur_is_scipys_with_the_weights_of_what_lies_inside() -> None:
    shape = (9, 24, 1)
    image = noise_volume(shape)
    found = one(image, image, Variation(blur=(0.5, 0.9, 0.7)))[0]

    def blurred(volume: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(volume, (0.5, 0.9, 0), mode="constant")

    np.testing.assert_allclose(found, blurred(image.numpy().astype(np.float64)) / blurred(np.ones(shape)), atol=1e-3)


@pytest.mark.parametrize(("shape", "zoom"), [((24, 24, 24), 0.5), ((20, 120, 118), 0.73), ((1, 16, 16), 0.6)])
def test_low_resolution_is_nearest_down_and_linear_up(shape: tuple[int, ...], zoom: float) -> None:
    image = noise_volume(shape)
    found = one(image, image, Variation(zoom=zoom))[0]
    coarse = [max(1, round(n * zoom)) for n in shape]
    down = functional.interpolate(image[None, None].double(), size=coarse, mode="nearest-exact")
    wanted = functional.interpolate(down, size=shape, mode="trilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-3)


def test_noise_is_of_its_strength_repeats_and_comes_before_blur() -> None:
    shape = (24, 120, 120)
    grey = torch.full(shape, 100, dtype=torch.uint8)
    noisy = Variation(noise=0.1, seed=2**53 - 1)
    first, second = (one(grey, grey, noisy)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert abs((first / 255 - 100 / 255).std() - 0.1) < 0.002
    other = one(grey, grey, Variation(noise=0.1, seed=3))[0]
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.02
    # of two slabs, neither repeats the other
    assert abs(np.corrcoef(first[:6].ravel(), first[18:].ravel())[0, 1]) < 0.02
    smooth = one(grey, grey, Variation(noise=0.1, seed=3, blur=(1.0, 1.0, 1.0)))[0]
    assert smooth.std() < 0.3 * other.std()


@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_noise_is_added_to_what_the_affine_map_gave(angle: float) -> None:
    shape = (12, 20, 20)
    image = noise_volume(shape)
    affine = affine_matrix((angle, 0, 0), 1.2, (8, 8, 8), shape)
    moved, noisy = (one(image, image, Variation(affine=affine, noise=noise, seed=3))[0] for noise in (0.0, 0.1))
    noise = one(image, image, Variation(noise=0.1, seed=3))[0] - image.numpy()
    np.testing.assert_allclose(noisy - moved, noise, atol=1e-3)


@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_blur_and_then_low_resolution_follow_the_affine_map(angle: float) -> None:
    shape = (12, 20, 20)
    image = noise_volume(shape)
    moved = Variation(affine=affine_matrix((angle, 0, 0), 1.2, (8, 8, 8), shape))
    found = one(image, image, replace(moved, blur=(0.6, 0.8, 1.0), zoom=0.6))[0]
    wanted = one(image, image, moved)[0]
    for axis, (n, sigma) in enumerate(zip(shape, (0.6, 0.8, 1.0), strict=True)):
        for matrix in (blur_matrix(n, sigma), low_resolution_matrix(n, 0.6)):
            wanted = np.moveaxis(np.tensordot(matrix.numpy(), wanted, (1, axis)), 0, axis)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


class Shipping(TorchDispatchMode):
    """Notes of each conversion of what the host computed, in double precision, whether it waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
            self.waited.append(not (kwargs or {}).get("non_blocking", False))
        return function(*args, **(kwargs or {}))


def test_matrices_and_places_reach_the_device_without_waiting_for_it() -> None:
    shape = (6, 8, 8)
    turned = Variation(affine=matrix_of(1, shape), anchor=(3, 4, 4), blur=(1, 1, 1))
    scaled = Variation(affine=affine_matrix((0, 0, 0), 1.2, (8, 8, 8), shape), zoom=0.5)
    with Shipping() as shipping:
        one(noise_volume(shape), noise_volume(shape), turned)
        one(noise_volume(shape), noise_volume(shape), scaled)
    assert len(shipping.waited) > 6
    assert not any(shipping.waited)


def test_samples_of_a_batch_do_not_touch_each_other_and_inputs_stay() -> None:
    shape = (4, 12, 12, 12)
    image, label = noise_volume(shape), noise_volume(shape, 1)
    before = image.clone(), label.clone()
    variations = [
        Variation(affine=matrix_of(1, shape[1:]), anchor=(6, 6, 6), noise=0.1, seed=4, blur=(1, 1, 1), gamma=0.8),
        Variation(),
        Variation(flipped=(1,), zoom=0.5, contrast=0.8),
        Variation(affine=affine_matrix((0, 0, 0), 1.2, (8, 8, 8), shape[1:]), noise=0.1, seed=5),
    ]
    together = [part.clone() for part in varied(image, label, [0] * 4, variations, plain_expander())]
    assert torch.equal(image, before[0])
    assert torch.equal(label, before[1])
    for row, variation in enumerate(variations):
        alone = varied(image[row : row + 1], label[row : row + 1], [0], [variation], plain_expander())
        for joint, single in zip(together, alone, strict=True):
            assert torch.equal(joint[row], single[0])
