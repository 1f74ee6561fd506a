"""Real crops: those in place are left alone, the displaced one is flagged, and so are injected errors."""

import numpy as np
import pytest

from cellmap_pipe.prepare.convert import bulk_paths, read_nifti
from cellmap_pipe.prepare.registration import register
from cellmap_pipe.prepare.state_table import decode_table

CLASSES = ["pm", "mito", "cyto", "nuc"]


def pair(real_em, crop):
    """Image, label map and state table of a crop."""
    record = next(record for name, record in real_em.records.items() if name.endswith(crop))
    paths = bulk_paths(real_em.nifti, record["crop"])
    return read_nifti(paths["image"]), read_nifti(paths["label"]), decode_table(record["table"], len(CLASSES))


def test_only_the_displaced_crop_is_flagged(real_em):
    verdicts = {
        crop.split("/")[1]: record["registration"]["verdict"]
        for crop, record in real_em.records.items()
        if record["status"] == "ok"
    }
    assert verdicts.pop("crop305") == "displaced"
    assert verdicts.pop("crop303") == "not assessable"
    assert set(verdicts.values()) == {"in place"} and len(verdicts) == 9


@pytest.mark.parametrize("crop", ["crop101", "crop201", "crop301", "crop302"])
def test_a_displacement_of_three_voxels_is_detected(real_em, crop):
    image, rows, table = pair(real_em, crop)
    found = register(image[:, 3:], rows[:, :-3], table, CLASSES, None)
    assert found.verdict == "displaced"
    assert np.abs(np.subtract(found.shift, (0, -3, 0))).max() <= 1


@pytest.mark.parametrize("crop", ["crop101", "crop203", "crop302"])
def test_a_lone_class_in_a_small_box_is_left_alone_unless_it_is_far_off(real_em, crop):
    # drawn by hand, a few boundaries are a few voxels off in one direction; the whole crop is in place
    image, rows, table = pair(real_em, crop)
    lone = next(c for c in range(4) if verdict_of(image, rows, table, c) == "in place")
    random, found = np.random.default_rng(int(crop[4:])), []
    for _ in range(25):
        side = int(random.choice([32, 48, 64]))
        lower = [int(random.integers(0, n - side + 1)) for n in image.shape]
        box = tuple(slice(lo, lo + side) for lo in lower)
        found.append(verdict_of(image[box], rows[box], table, lone))
    assert set(found) <= {"in place", "not assessable"} and "in place" in found
    far, near = slice(12, 90), slice(0, 78)
    assert verdict_of(image[:90, :90, far], rows[:90, :90, near], table, lone) == "displaced"


def verdict_of(image, rows, table, column):
    return register(image, rows, table[:, [column]], [CLASSES[column]], None).verdict


@pytest.mark.parametrize("crop", ["crop201", "crop302"])  # benchmarks/registration.py injects more, into all four
def test_a_wrong_scale_is_detected(real_em, crop):
    image, rows, table = pair(real_em, crop)
    half = [n // 2 for n in image.shape]
    inner = tuple(slice(0, n) for n in half)
    found = register(image[inner], rows[1::2, 1::2, 1::2], table, CLASSES, None)
    assert (found.verdict, found.scale) == ("rescaled", 2)
    centre = tuple(slice(n // 2, n // 2 + n) for n in half)
    blown_up = rows[centre].repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    found = register(image[tuple(slice(0, 2 * n) for n in half)], blown_up, table, CLASSES, None)
    assert (found.verdict, found.scale) == ("rescaled", 0.5)
