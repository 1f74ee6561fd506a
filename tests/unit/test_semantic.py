import importlib.util
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation import inputs, score_semantic

_spec = importlib.util.spec_from_file_location("scoring_reference", Path(__file__).with_name("scoring_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(1, 7)] * 3), st.booleans())
def test_counts_equal_the_reference(seed, shape, masked):
    rng = np.random.default_rng(seed)
    pred = rng.integers(0, 3, shape).astype(rng.choice([np.uint8, np.int16, np.float32]))
    truth = rng.integers(0, 2, shape).astype(np.uint8)
    mask = rng.integers(0, 2, shape).astype(np.uint8) if masked else None
    known = 1 if mask is None else mask
    assert score_semantic(pred, truth, mask) == reference.semantic_record(pred * known, truth * known)


def test_slabs_add_up_and_zarr_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "SLAB_VOXELS", 300)
    rng = np.random.default_rng(0)
    pred, truth, mask = (rng.integers(0, 2, (17, 9, 11)).astype(np.uint8) for _ in range(3))
    expected = reference.semantic_record(pred * mask, truth * mask)
    assert score_semantic(pred, truth, mask) == expected
    arrays = []
    for name, values, depth in (("p", pred, 4), ("t", truth, 6), ("m", mask, 17)):
        array = zarr.create_array(
            tmp_path / name, shape=values.shape, chunks=(depth, 9, 11), dtype="uint8", zarr_format=2
        )
        array[:] = values
        arrays.append(array)
    assert score_semantic(*arrays) == expected


@pytest.mark.parametrize(("dtype", "value"), [("?", 1), ("u1", 2), ("u1", 255), ("i2", 300), ("f4", 0.5)])
def test_mask_multiplies_both_and_wraps_around_as_they_do(dtype, value):
    rng = np.random.default_rng(0)
    pred, truth = (rng.choice([0, 1, 128], (4, 5, 6)).astype(np.uint8) for _ in range(2))
    mask = ((rng.random(pred.shape) > 0.2) * value).astype(dtype)
    assert score_semantic(pred, truth, mask) == reference.semantic_record(pred * mask, truth * mask)


def test_any_value_above_zero_counts_as_foreground():
    pred = np.full((2, 2, 2), 0.01, np.float32)
    assert score_semantic(pred, np.ones((2, 2, 2), bool))["tp"] == 8


def test_nested_lists_are_arrays():
    assert score_semantic([[[1, 0]]], [[[1, 1]]], [[[1, 1]]])["fn"] == 1


@pytest.mark.parametrize(
    ("pred", "truth", "fault"),
    [
        ([[[1], [1, 2]]], [[[1, 1]]], "not an array"),
        (np.zeros((2, 2, 2), np.longdouble), np.zeros((2, 2, 2), np.uint8), "at most 64 bits"),
        (np.zeros((2, 2, 3)), np.zeros((2, 2, 2), np.uint8), "shape"),
        (np.zeros((2, 2)), np.zeros((2, 2), np.uint8), "three axes"),
        (np.zeros((0, 2, 2)), np.zeros((0, 2, 2), np.uint8), "empty"),
        (np.zeros((2, 2, 2)), np.zeros((2, 2, 2), np.float32), "integers"),
        (np.zeros((2, 2, 2)), np.full((2, 2, 2), -1, np.int16), "negative"),
        (np.full((2, 2, 2), np.nan), np.zeros((2, 2, 2), np.uint8), "not finite"),
        (np.zeros((2, 2, 2), complex), np.zeros((2, 2, 2), np.uint8), "dtype"),
    ],
)
def test_bad_arrays_are_refused_by_name(pred, truth, fault):
    with pytest.raises(DataError, match=fault):
        score_semantic(pred, truth)
