"""Intensities: constants measured from histograms, and the table that training and prediction share."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.intensity import intensity_range, is_measured, lookup_table, percentile

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
NORMALISATIONS = ["percentile", "range", "uint8/255", [90, 210]]

voxels = st.lists(st.integers(0, 255), min_size=1, max_size=300)


def histogram(values):
    return np.bincount(values, minlength=256)


@SETTINGS
@given(voxels, st.sampled_from([0.0, 0.5, 37.0, 50.0, 99.5, 100.0]))
def test_percentile_of_a_histogram_is_numpys_of_the_voxels(voxels, q):
    assert percentile(histogram(voxels), q) == pytest.approx(np.percentile(voxels, q), abs=1e-9)


@SETTINGS
@given(voxels)
def test_measured_constants_are_those_of_the_voxels(voxels):
    expected = np.percentile(voxels, [0.5, 99.5])
    assert intensity_range(histogram(voxels), "percentile") == pytest.approx(expected, abs=1e-9)
    assert intensity_range(histogram(voxels), "range") == (min(voxels), max(voxels))


def test_percentiles_cut_off_the_outer_1_percent_and_the_range_does_not():
    values = np.random.default_rng(0).normal(120, 30, 100_000).clip(0, 255).astype(np.uint8)
    assert intensity_range(histogram(values), "percentile") == tuple(np.percentile(values, [0.5, 99.5]))
    assert intensity_range(histogram(values), "range") == (values.min(), values.max())
    assert values.min() < np.percentile(values, 0.5) and values.max() > np.percentile(values, 99.5)


def test_fixed_constants_hold_whatever_the_voxels_are():
    for counts in ([], histogram([7]), histogram([0, 255])):
        assert intensity_range(counts, "uint8/255") == (0.0, 255.0)
        assert intensity_range(counts, [90, 210.5]) == (90.0, 210.5)
    assert [is_measured(kind) for kind in NORMALISATIONS] == [True, True, False, False]


def test_constants_of_nothing_are_refused():
    for kind in ("percentile", "range"):
        with pytest.raises(ValueError, match="empty"):
            intensity_range(np.zeros(256, int), kind)
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


@pytest.mark.parametrize("normalisation", NORMALISATIONS, ids=str)
@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_constant_dataset_does_not_divide_by_zero(normalisation, value):
    table = lookup_table(*intensity_range(histogram([value] * 9), normalisation))
    assert np.isfinite(table).all()
    assert table.min() >= 0 and table.max() <= 1
    assert (np.diff(table) >= 0).all()
    if is_measured(normalisation):
        assert table[value] == 0
        assert (table[value + 1 :] == 1).all()
