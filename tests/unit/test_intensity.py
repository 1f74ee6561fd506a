"""Intensities: percentiles from histograms, and the table that training and prediction share."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.intensity import lookup_table, percentile, percentile_range

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


@SETTINGS
@given(st.lists(st.integers(0, 255), min_size=1, max_size=300), st.sampled_from([0.0, 0.5, 37.0, 50.0, 99.5, 100.0]))
def test_percentile_of_a_histogram_is_numpys_of_the_voxels(voxels, q):
    histogram = np.bincount(voxels, minlength=256)
    assert percentile(histogram, q) == pytest.approx(np.percentile(voxels, q), abs=1e-9)


def test_percentile_range_is_the_inner_99_percent():
    voxels = np.random.default_rng(0).normal(120, 30, 100_000).clip(0, 255).astype(np.uint8)
    lo, hi = percentile_range(np.bincount(voxels, minlength=256))
    assert (lo, hi) == tuple(np.percentile(voxels, [0.5, 99.5]))


def test_percentile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="empty"):
        percentile(np.zeros(256, int), 50)
    with pytest.raises(ValueError, match="256"):
        percentile(np.ones(255, int), 50)


def test_lookup_table_maps_the_range_to_zero_and_one():
    table = lookup_table(50.5, 200.0)
    assert table.shape == (256,)
    assert table.dtype == np.float32
    expected = np.clip((np.arange(256) - 50.5) / 149.5, 0, 1)
    np.testing.assert_allclose(table, expected, atol=1e-7)
    assert table[0] == 0
    assert table[200] == 1


def test_lookup_table_of_a_constant_dataset_does_not_divide_by_zero():
    table = lookup_table(128.0, 128.0)
    assert np.isfinite(table).all()
    assert table[128] == 0
    assert table[129] == 1
