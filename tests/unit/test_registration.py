"""Displaced labels are found, and labels in place are left alone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from cellmap_pipe.prepare import registration
from cellmap_pipe.prepare.labels import ABSENT, PRESENT, UNKNOWN
from cellmap_pipe.prepare.registration import register
from cellmap_pipe.prepare.state_table import UNKNOWN_ROW

CLASSES = ["pm", "mito"]


def scene(seed: int, shape: tuple[int, int, int] = (40, 42, 44)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A noisy image in which pm is dark and mito grey, its label map, and the state table."""
    random = np.random.default_rng(seed)
    field = gaussian_filter(random.standard_normal(shape), 4)
    field /= field.std()
    rows = np.zeros(shape, np.uint8)
    rows[np.abs(field) < 0.15] = 1
    rows[field > 1.1] = 2
    grey = np.array([150, 70, 110])[rows] + 18 * random.standard_normal(shape)
    table = np.full((256, 2), UNKNOWN, np.uint8)
    table[0], table[1], table[2] = (ABSENT, ABSENT), (PRESENT, ABSENT), (ABSENT, PRESENT)
    return np.clip(gaussian_filter(grey, 0.7), 0, 255).astype(np.uint8), rows, table


def moved(rows: np.ndarray, shift: tuple[int, int, int]) -> np.ndarray:
    """The label map displaced by `shift` voxels; what comes in from outside is unknown."""
    result = np.full_like(rows, UNKNOWN_ROW)
    to = tuple(slice(max(0, d), n + min(0, d)) for d, n in zip(shift, rows.shape, strict=True))
    source = tuple(slice(max(0, -d), n + min(0, -d)) for d, n in zip(shift, rows.shape, strict=True))
    result[to] = rows[source]
    return result


@pytest.mark.parametrize("seed", range(4))
def test_labels_in_place_are_left_alone(seed):
    found = register(*scene(seed), CLASSES, None)
    assert found.verdict == "in place" and found.scale == 1 and found.shift == (0, 0, 0)
    assert found.best == found.identity and found.margin == 1


shifts = st.tuples(*[st.integers(-8, 8)] * 3).filter(lambda shift: max(map(abs, shift)) >= 3)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(shift=shifts, seed=st.integers(0, 3))
def test_a_displacement_of_three_voxels_or_more_is_found_and_measured(shift, seed):
    image, rows, table = scene(seed)
    found = register(image, moved(rows, shift), table, CLASSES, None)
    assert found.verdict == "displaced"
    assert found.shift == tuple(-part for part in shift)


@pytest.mark.parametrize(
    ("small", "off", "verdict"), [(True, 4, "in place"), (False, 4, "displaced"), (True, 12, "displaced")]
)
def test_a_lone_class_in_a_small_crop_is_displaced_only_far_off(monkeypatch, small, off, verdict):
    image, rows, table = scene(1)
    monkeypatch.setattr(registration, "LONE_VOXELS", image.size + small)
    found = register(image, moved(rows, (0, off, 0)), table[:, :1], CLASSES[:1], None)
    assert (found.verdict, found.shift) == (verdict, (0, -off, 0))


def test_missing_em_does_not_count_as_an_image():
    image, rows, table = scene(1)
    valid = np.ones(image.shape, bool)
    valid[:14] = False
    image[:14] = 0
    assert register(image, np.where(valid, rows, UNKNOWN_ROW), table, CLASSES, valid).verdict == "in place"


@pytest.mark.parametrize("case", ["blank", "unrelated", "one class everywhere", "nothing known"])
def test_a_crop_without_usable_boundaries_is_not_assessable(case):
    image, rows, table = scene(2)
    if case == "blank":
        image[:] = 90
    elif case == "unrelated":
        image = np.random.default_rng(0).integers(0, 255, image.shape).astype(np.uint8)
    else:
        rows = np.full_like(rows, 2 if case == "one class everywhere" else UNKNOWN_ROW)
    assert register(image, rows, table, CLASSES, None).verdict == "not assessable"


@pytest.mark.parametrize("shift", [(0, 3, 0), (12, 0, -20)])
def test_shifts_of_a_large_crop_are_found_to_the_voxel(shift, monkeypatch):
    monkeypatch.setattr(registration, "MAX_VOXELS", 40**3)
    monkeypatch.setattr(registration, "BOX", 48)
    image, rows, table = scene(3, (80, 72, 64))
    found = register(image, np.roll(rows, shift, axis=(0, 1, 2)), table, CLASSES, None, voxel_nm=(8.0, 4.0, 4.0))
    assert found.verdict == "displaced"
    assert found.shift == tuple(-part for part in shift)
    assert found.shift_nm == tuple(-part * v for part, v in zip(shift, (8, 4, 4), strict=True))


@pytest.mark.parametrize("inner", [(0, 0, 0), (10, 10, 11)])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_labels_of_half_or_twice_the_field_of_view_are_found(scale, inner):
    image, rows, table = scene(1)
    box = tuple(slice(lo, lo + n // 2) for lo, n in zip(inner, image.shape, strict=True))
    if scale == 2:
        image, rows = image[box], rows[::2, ::2, ::2]
    else:
        rows = rows[box].repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    found = register(image, rows, table, CLASSES, None)
    assert (found.verdict, found.scale) == ("rescaled", scale)
    assert found.margin > 1.5


def test_memory_mapped_volumes_give_the_same_certificate(tmp_path):
    image, rows, table = scene(2)
    valid = np.ones(image.shape, bool)
    valid[30:] = False
    mapped = []
    for name, volume in (("image", image), ("rows", rows), ("valid", valid)):
        np.save(tmp_path / name, volume)
        mapped.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    assert register(mapped[0], mapped[1], table, CLASSES, mapped[2]) == register(image, rows, table, CLASSES, valid)


def test_the_certificate_is_plain_json():
    found = register(*scene(0), CLASSES, None, voxel_nm=(8.0, 4.0, 4.0)).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == set("verdict scale shift shift_nm best identity margin classes".split())


@pytest.mark.parametrize(("radius", "contrast"), [(8, 60), (10, 40), (14, 30)])
def test_an_object_that_looks_like_the_labelled_one_does_not_displace_it(radius, contrast):
    random = np.random.default_rng(0)
    grid = np.indices((64, 64, 64))

    def ball(centre, size):
        return ((grid - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(axis=0) <= size**2

    image = 150 + 10 * random.standard_normal((64, 64, 64))
    image[ball((20, 20, 20), 8)] -= 30
    image[ball((42, 42, 42), radius)] -= contrast
    rows = ball((20, 20, 20), 8).astype(np.uint8)
    table = scene(0, (8, 8, 8))[2]
    assert register(np.clip(image, 0, 255).astype(np.uint8), rows, table, CLASSES, None).verdict != "displaced"
