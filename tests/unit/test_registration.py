"""Displaced labels are found, and labels in place are left alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from cellmap_pipe.prepare.labels import ABSENT, PRESENT, UNKNOWN, UNKNOWN_ROW
from cellmap_pipe.prepare.registration import register

CLASSES = ["pm", "mito"]


def scene(seed: int, shape: tuple[int, int, int] = (56, 60, 64)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    assert found.verdict == "in place" and found.shift == (0, 0, 0) and found.best == found.identity


shifts = st.tuples(*[st.integers(-14, 14)] * 3).filter(lambda shift: max(map(abs, shift)) >= 3)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(shift=shifts, seed=st.integers(0, 3))
def test_a_displacement_of_three_voxels_or_more_is_found_and_measured(shift, seed):
    image, rows, table = scene(seed)
    found = register(image, moved(rows, shift), table, CLASSES, None)
    assert found.verdict == "displaced"
    assert found.shift == tuple(-part for part in shift)


def test_missing_em_does_not_count_as_an_image():
    image, rows, table = scene(1)
    valid = np.ones(image.shape, bool)
    valid[:20] = False
    image[:20] = 0
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


def test_large_crops_are_binned_and_their_shift_is_told_in_their_own_voxels():
    image, rows, table = scene(3, (200, 160, 150))
    found = register(image, moved(rows, (12, 0, -20)), table, CLASSES, None)
    assert found.verdict == "displaced"
    assert np.abs(np.add(found.shift, (12, 0, -20))).max() <= 2


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
