"""Components of slabs, joined, against cc3d on the whole volume."""

from itertools import pairwise

import cc3d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.evaluation.components import Components

DTYPES = [np.bool_, np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int32, np.int64]
DTYPES += [np.float16, np.float32, np.float64, np.dtype(">u2"), np.dtype(">f8")]


def joined(values: np.ndarray, cuts: list[int]) -> tuple[np.ndarray, int]:
    components = Components()
    slabs = [components.add(values[first:last]) for first, last in pairwise([0, *cuts, len(values)])]
    numbers, n = components.join()
    return numbers[np.concatenate(slabs)], n


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.integers(1, 9)] * 3),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([0.1, 0.3, 0.7, 1.0]),
    st.booleans(),
)
def test_components_of_slabs_are_numbered_as_those_of_the_whole(seed, shape, dtype, n_values, density, fortran):
    rng = np.random.default_rng(seed)
    values = (rng.integers(1, n_values + 1, shape) * (rng.random(shape) < density)).astype(dtype)
    if fortran:
        values = np.asfortranarray(values)
    # As integers of native bytes: the values are whole numbers, and cc3d knows neither float16 nor swapped bytes
    expected, n = cc3d.connected_components(np.ascontiguousarray(values, np.int64), return_N=True)
    cuts = sorted({int(cut) for cut in rng.integers(0, shape[0] + 1, 3)})
    numbers, count = joined(values, cuts)
    assert count == n
    np.testing.assert_array_equal(numbers, expected)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(1, 7)] * 3), st.sampled_from([0.05, 0.3, 0.7, 1.0]))
def test_there_are_never_fewer_components_than_were_said_to_be_at_least(seed, shape, density):
    rng = np.random.default_rng(seed)
    values = (rng.integers(1, 3, shape) * (rng.random(shape) < density)).astype(np.uint8)
    components, least = Components(), [0]
    for plane in values:
        components.add(plane[None])
        least.append(components.least())
    assert max(least) <= components.join()[1]
    components.skip()
    assert components.least() == components.join()[1]


@pytest.mark.parametrize("dtype", [np.bool_, np.uint16, np.float32])
def test_read_only_memory_is_labelled_like_any_other(dtype):
    values = np.frombuffer(np.ones((2, 3, 3), dtype).tobytes(), dtype).reshape(2, 3, 3)
    assert joined(values, [1])[1] == 1


def test_equal_values_touch_across_the_plane_between_slabs_at_a_corner_only_too():
    values = np.zeros((2, 2, 2), np.uint16)
    values[0, 0, 0] = values[1, 1, 1] = 500
    assert joined(values, [1])[1] == 1
    values[1, 1, 1] = 501
    assert joined(values, [1])[1] == 2


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.dtype(">f4")])
@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1), (1, 1, 6), (3, 3, 6)])
def test_fractional_values_are_labelled_as_whole_ones(dtype, shape):
    values = np.zeros(shape, dtype)
    values.reshape(-1)[:6] = [0.25, 0.25, -0.0, 0.5, 0.5, 0.75]
    numbers, n = joined(values, [])
    assert n == 3
    assert numbers.reshape(-1)[:6].tolist() == [1, 1, 0, 2, 2, 3]
    assert joined(values, list(range(1, shape[0])))[1] == 3


def test_nothing_touches_across_skipped_planes():
    plane = np.ones((1, 3, 3), np.uint8)
    components = Components()
    first = components.add(plane)
    components.skip()
    second = components.add(plane)
    numbers, n = components.join()
    assert (n, numbers[first].max(), numbers[second].min()) == (2, 1, 2)


@pytest.mark.parametrize("slabs", [[], [np.zeros((2, 3, 4), np.uint8)], [np.zeros((0, 3, 4), np.uint8)]])
def test_background_has_no_components(slabs):
    components = Components()
    for values in slabs:
        assert not components.add(values).any()
    numbers, n = components.join()
    assert (numbers.tolist(), n) == ([0], 0)
