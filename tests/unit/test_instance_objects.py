"""Objects of a mask, in memory and slab by slab, against a plain reference of the whole volume."""

import logging
from pathlib import Path
from typing import Any
from unittest import mock

import edt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.segmentation import watershed

from cellmap_pipe.errors import DataError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prediction import instances
from cellmap_pipe.prediction.instances import Objects, find_objects
from cellmap_pipe.prediction.processing import Processing

CUBE = np.ones((3, 3, 3))


def plain(mask: np.ndarray, voxel_nm: tuple[float, ...], how: Processing, instance: bool = True) -> np.ndarray:
    """The rule as it reads, on the whole volume: ids (z, y, x)."""
    size_nm3 = float(np.prod(voxel_nm))
    mask = mask.copy()
    pockets, n = ndimage.label(~mask)
    faces = {int(i) for axis in range(3) for end in (0, -1) for i in np.unique(pockets.take(end, axis))}
    for i in set(range(1, n + 1)) - faces:
        if (pockets == i).sum() * size_nm3 < how.hole_nm3:
            mask[pockets == i] = True
    components, n = ndimage.label(mask, CUBE)
    objects = []
    for i in range(1, n + 1):
        inside = components == i
        parts = inside.astype(int)
        if instance and how.split_nm > 0:
            depth = edt.edt(inside, anisotropy=voxel_nm, black_border=False)
            seeds, found = ndimage.label(depth > how.split_nm, CUBE)
            if found > 1:
                parts = watershed(-depth, seeds, connectivity=3, mask=inside)
        objects += [parts == k for k in range(1, parts.max() + 1)]
    objects = [part for part in objects if part.sum() * size_nm3 >= how.min_size_nm3]
    ids = np.zeros(mask.shape, int)
    for number, part in enumerate(sorted(objects, key=lambda part: int(np.flatnonzero(part)[0])), start=1):
        ids[part] = number
    return ids


def smooth(rng: np.random.Generator, shape: tuple[int, ...], width: float) -> np.ndarray:
    """A random field whose values are evenly spread over [0, 1]."""
    field = ndimage.gaussian_filter(rng.random(shape), width, mode="wrap")
    return (field.ravel().argsort().argsort() / field.size).reshape(shape)


def slabs_of(planes: int, shape: tuple[int, ...]) -> float:
    """The memory_gb with which slabs of so many planes are worked on, and every object may be parted."""
    return planes * instances.SLAB_BYTES * shape[1] * shape[2] * 1.001 / 1e9


@st.composite
def cases(draw: st.DrawFn, sides: tuple[int, int] = (1, 12)) -> tuple[np.ndarray, tuple[float, ...], Processing, int]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.tuples(*[st.integers(*sides)] * 3))
    mask = smooth(rng, shape, draw(st.sampled_from([0, 0.6, 1.0, 2.0]))) < draw(
        st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0])
    )
    voxel_nm = draw(st.sampled_from([(4.0, 4.0, 4.0), (5.24, 4.0, 4.0), (30.0, 8.0, 6.0)]))
    voxel = float(np.prod(voxel_nm))
    how = Processing(
        hole_nm3=voxel * draw(st.sampled_from([0, 1.5, 4, 30])),
        split_nm=draw(st.sampled_from([0, 4.1, 6, 8.5, 12])),
        min_size_nm3=voxel * draw(st.sampled_from([0, 2, 4.5, 20])),
    )
    return mask, voxel_nm, how, draw(st.integers(1, sides[1] + 1))


def found(mask: np.ndarray, voxel_nm: tuple[float, ...], how: Processing, **more: Any) -> Objects:
    return find_objects(lambda first, last: mask[first:last], Lattice(voxel_nm, (0, 0, 0), mask.shape), how, **more)


def check(case: tuple[np.ndarray, tuple[float, ...], Processing, int], instance: bool) -> np.ndarray:
    """In memory and in slabs, all planes and some, against the plain reference, which is returned."""
    mask, voxel_nm, how, planes = case
    expected = plain(mask, voxel_nm, how, instance)
    Z = mask.shape[0]
    with mock.patch.object(instances, "PARTED_BYTES", 0):  # boxes always fit: slabs are what is asked about here
        for memory_gb in (None, slabs_of(planes, mask.shape)):
            with found(mask, voxel_nm, how, instance=instance, memory_gb=memory_gb) as objects:
                assert (objects.count, objects.dtype) == (expected.max(), np.uint16)
                np.testing.assert_array_equal(objects.ids(0, Z), expected)
                np.testing.assert_array_equal(objects.mask(0, Z), expected > 0)
                first, last = Z // 3, Z // 3 + max(1, Z // 2)
                np.testing.assert_array_equal(objects.ids(first, last), expected[first:last])
                np.testing.assert_array_equal(objects.mask(first, last), expected[first:last] > 0)
    return expected


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases(), st.booleans())
def test_objects_of_any_slabs_are_those_of_the_whole_volume(case: Any, instance: bool) -> None:
    check(case, instance)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(sides=(14, 26)))
def test_parts_of_objects_are_those_of_the_whole_volume(case: Any) -> None:
    check(case, True)


def balls(shape: tuple[int, ...], centres: list[tuple[int, ...]], radius: float) -> np.ndarray:
    z, y, x = np.indices(shape)
    return np.any([(z - a) ** 2 + (y - b) ** 2 + (x - c) ** 2 <= radius**2 for a, b, c in centres], axis=0)


def test_touching_balls_are_parted_at_their_neck() -> None:
    mask = balls((30, 30, 50), [(15, 15, 12), (15, 15, 30), (15, 15, 43)], 9.2)
    neck = Processing(split_nm=4 * 6.5)
    with found(mask, (4, 4, 4), neck, memory_gb=0.005) as objects:
        ids = objects.ids(0, 30)
    assert [ids[15, 15, x] for x in (12, 20, 22, 30, 43)] == [1, 1, 2, 2, 2]  # the last neck is wider
    assert (ids > 0).tolist() == mask.tolist()
    with found(mask, (4, 4, 4), Processing()) as objects:
        assert objects.count == 1


def test_the_volumes_faces_are_no_background() -> None:
    mask = np.zeros((9, 9, 9), bool)
    mask[:, :, :4] = True  # cut off by five faces
    how = Processing(hole_nm3=1000, split_nm=4 * 3)
    with found(mask, (4, 4, 4), how) as objects:
        assert objects.count == 1
    mask[4, 4, 0] = False  # a pocket that is open where the volume ends
    with found(mask, (4, 4, 4), how) as objects:
        np.testing.assert_array_equal(objects.mask(0, 9), mask)
    mask[4, 4, 0], mask[4, 4, 1] = True, False
    with found(mask, (4, 4, 4), how) as objects:
        assert objects.mask(4, 5)[0, 4, 1]


@pytest.mark.parametrize("memory_gb", [None, 1.0])
def test_an_object_too_large_to_be_parted_is_left_whole_and_named_whatever_the_memory(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, memory_gb: float | None
) -> None:
    mask = balls((30, 30, 50), [(15, 15, 12), (15, 15, 30)], 9.2)
    mask[2, 2, 45] = True
    monkeypatch.setattr(instances, "LARGEST_PARTED", 21 * 21 * 39 - 1)
    with found(mask, (4, 4, 4), Processing(split_nm=26), memory_gb=memory_gb) as objects:
        assert objects.count == 2
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "[6, 6, 3] to [25, 25, 40]" in warning and f"{mask.sum() - 1} voxels" in warning and "\n" not in warning


def test_little_memory_is_an_error_and_no_other_result() -> None:
    mask = balls((30, 30, 50), [(15, 15, 12), (15, 15, 30)], 9.2)
    for memory_gb in (None, 0.01, 0.002):
        with found(mask, (4, 4, 4), Processing(split_nm=26), memory_gb=memory_gb) as objects:
            assert objects.count == 2
    message = r"in the box \[6, 6, 3\] to \[25, 25, 40\] .* GB to be parted, more than .*; give the job more memory"
    with pytest.raises(DataError, match=message):
        found(mask, (4, 4, 4), Processing(split_nm=26), memory_gb=0.0008)


@pytest.mark.parametrize("planes", [82, 9])
def test_many_objects_have_wide_ids(planes: int) -> None:
    mask = np.zeros((82, 82, 82), bool)
    mask[::2, ::2, ::2] = True
    with found(mask, (4, 4, 4), Processing(), memory_gb=slabs_of(planes, mask.shape)) as objects:
        assert (objects.count, objects.dtype) == (41**3, np.uint32)
        np.testing.assert_array_equal(objects.ids(80, 81)[0, ::2, ::2].ravel(), np.arange(40 * 41**2, 41**3) + 1)


def test_scratch_leaves_nothing_behind(tmp_path: Path) -> None:
    mask = balls((30, 30, 50), [(15, 15, 12), (15, 15, 30)], 9.2)
    with mock.patch.object(instances, "PARTED_BYTES", 0):
        objects = found(mask, (4, 4, 4), Processing(split_nm=26), memory_gb=slabs_of(7, mask.shape), scratch=tmp_path)
    with objects:
        assert objects.count == 2 and not list(tmp_path.iterdir())  # nor does a killed job leave anything
    with pytest.raises(ValueError, match="closed"):
        objects.ids(0, 5)


def test_what_is_returned_is_the_callers() -> None:
    mask = balls((9, 9, 9), [(4, 4, 4)], 3)
    with found(mask, (4, 4, 4), Processing()) as objects:
        for planes in (objects.ids, objects.mask):
            planes(0, 9)[:] = 0
            assert planes(0, 9).any()


@pytest.mark.parametrize(("nm3", "voxels"), [(0, 1), (64, 1), (64.001, 2), (640, 10), (0.1 * 640, 1)])
def test_the_smallest_object_is_no_smaller_than_asked(nm3: float, voxels: int) -> None:
    assert instances.smallest_object(nm3, (4, 4, 4)) == voxels
