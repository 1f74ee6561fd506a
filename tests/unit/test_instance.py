import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from cellmap_pipe.errors import ConfigError, DataError
from cellmap_pipe.evaluation import hausdorff, matching, score_instance
from cellmap_pipe.evaluation.rules import RULES

_spec = importlib.util.spec_from_file_location("scoring_reference", Path(__file__).with_name("scoring_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


def same(record, expected):
    return all(
        math.isclose(record[key], value, rel_tol=1e-6) if isinstance(value, float) else record[key] == value
        for key, value in expected.items()
    )


def boxes(rng, shape, n, ids):
    """Return random boxes with ids out of `ids`, later ones over earlier ones."""
    volume = np.zeros(shape, np.uint16)
    for _ in range(n):
        start = [rng.integers(0, s) for s in shape]
        volume[tuple(slice(a, a + rng.integers(1, 5)) for a in start)] = rng.choice(ids)
    return volume


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 12, 10**9]))
def test_records_equal_the_reference(seed, sparse):
    """By both rules, with either way of measuring distances forced on some objects."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(3, 9, 3))
    voxel = tuple(rng.choice([1.0, 1.74, 2.0, 8.0], 3))
    truth = boxes(rng, shape, rng.integers(0, 5), [1, 2, 3, 5])
    pred = boxes(rng, shape, rng.integers(0, 6), [1, 2, 3]).astype(rng.choice([np.uint8, np.int32, np.float32]))
    before = hausdorff.SPARSE
    hausdorff.SPARSE = sparse
    try:
        for rules in ("csc-2026.06", "clean"):
            record = score_instance(pred, truth, voxel, rules=rules)
            expected = reference.instance_records(pred, truth, voxel, rules)
            assert any(same(record, one) for one in expected), (record, expected)
    finally:
        hausdorff.SPARSE = before


def test_mask_multiplies_both():
    rng = np.random.default_rng(1)
    truth, pred = boxes(rng, (8, 8, 8), 4, [1, 2, 3]), boxes(rng, (8, 8, 8), 4, [1, 2, 3])
    mask = (rng.random((8, 8, 8)) > 0.2).astype(np.uint8)
    assert score_instance(pred, truth, (4, 4, 4), mask) == score_instance(pred * mask, truth * mask, (4, 4, 4))


def test_a_perfect_answer_scores_one_per_object():
    truth = boxes(np.random.default_rng(2), (12, 12, 12), 5, [1, 2, 3, 4, 5])
    n = len(np.unique(truth)) - 1
    for rules in RULES:
        record = score_instance(truth, truth, (4, 4, 4), rules=rules)
        if record["fp"] == 0:
            assert (record["tp"], record["hausdorff_norm_sum"]) == (n, pytest.approx(n))


def test_far_false_positive_collides_only_by_the_official_rules():
    truth, pred = np.zeros((40, 10, 10), np.uint8), np.zeros((40, 10, 10), np.uint8)
    truth[30:34, 2:6, 2:6] = 1
    pred[30:34, 2:6, 2:6] = 7
    pred[1, 1, 1] = 9  # scanned first, so it is component 1 and joins truth object 1
    cap = 1.01 ** (-5 / math.sqrt(3))
    assert score_instance(pred, truth, (1, 1, 1))["hausdorff_norm_sum"] == pytest.approx(2 * cap)
    assert score_instance(pred, truth, (1, 1, 1), rules="clean")["hausdorff_norm_sum"] == pytest.approx(1 + cap)
    july = score_instance(pred, truth, (1, 1, 1), rules="csc-2026.07")
    assert (july["hausdorff_norm_sum"], july["n_hausdorff"]) == (pytest.approx(1.0), 2)


@pytest.mark.parametrize("rules", ["csc-2026.07", "csc-2026.07-exponential"])
def test_provisional_rules_give_the_worst_match_a_tenth_and_misses_nothing(rules):
    truth, pred = np.zeros((20, 20, 20), np.uint8), np.zeros((20, 20, 20), np.uint8)
    truth[:, 0, 0] = 1
    pred[0, 0, :] = 1
    truth[10, 10, 10] = 2
    record = score_instance(pred, truth, (1, 1, 1), rules=rules)
    assert RULES[rules].provisional
    assert (record["tp"], record["fn"], record["n_hausdorff"]) == (1, 1, 2)
    assert record["hausdorff_norm_sum"] == pytest.approx(0.1)


def test_too_many_instances_drop_out_officially_and_are_missed_by_clean():
    truth, pred = np.zeros((11, 21, 21), np.uint8), np.zeros((11, 21, 21), np.uint8)
    truth[0, 0, 0] = 1
    pred[::2, ::2, ::2] = 1
    official = score_instance(pred, truth, (1, 1, 1))
    assert official["status"] == "skipped_too_many_instances"
    assert (official["fn"], official["n_hausdorff"]) == (0, 0)
    clean = score_instance(pred, truth, (1, 1, 1), rules="clean")
    assert (clean["tp"], clean["fn"], clean["n_hausdorff"], clean["hausdorff_norm_sum"]) == (0, 1, 1, 0.0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_sparse_assignment_equals_the_dense_one(seed):
    rng = np.random.default_rng(seed)
    table = np.where(rng.random((12, 15)) < 0.25, rng.random((12, 15)), 0).astype(np.float32)
    rows, columns = np.nonzero(table)
    iou = table[rows, columns]

    def value(limit):
        before = matching.DENSE_CELLS
        matching.DENSE_CELLS = limit
        try:
            r, c = matching.match(rows, columns, iou)
        finally:
            matching.DENSE_CELLS = before
        assert len(set(r.tolist())) == len(r) and len(set(c.tolist())) == len(c)
        return sum(1_000_001 - int((1 - float(x)) * 1e6) for x in table[r, c])

    assert value(0) == value(10**6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_pruned_search_finds_the_farthest_point(seed):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 40, (rng.integers(1, 200), 3)) * np.array([1.74, 2.0, 2.0])
    others = rng.integers(0, 40, (rng.integers(1, 200), 3)) * np.array([1.74, 2.0, 2.0])
    expected = np.sqrt(((points[:, None] - others[None]) ** 2).sum(-1)).min(1).max()
    assert hausdorff.farthest(points, cKDTree(others), 0.0) == pytest.approx(expected, rel=1e-12)


def test_ids_of_any_size_and_layout_score_the_same():
    rng = np.random.default_rng(3)
    truth, pred = boxes(rng, (9, 9, 9), 5, [1, 2, 3]), boxes(rng, (9, 9, 9), 5, [1, 2, 3])
    expected = score_instance(pred, truth, (2, 2, 2), rules="clean")
    large = truth.astype(np.uint64) * 1_000_000_000
    assert score_instance(np.asfortranarray(pred), np.asfortranarray(truth), (2, 2, 2), rules="clean") == expected
    assert score_instance(pred.astype(">u4"), large, (2, 2, 2), rules="clean") == expected


def test_nested_lists_are_arrays():
    assert score_instance([[[1, 0]]], [[[1, 0]]], (1, 1, 1), [[[1, 1]]])["tp"] == 1


@pytest.mark.parametrize(
    ("pred", "truth", "fault"),
    [
        (np.zeros((2, 2, 2), np.longdouble), np.zeros((2, 2, 2), np.uint8), "at most 64 bits"),
        (np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 2), np.uint8), "shape"),
        (np.zeros((0, 2, 2), np.uint8), np.zeros((0, 2, 2), np.uint8), "empty"),
        (np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 2), np.float64), "integers"),
        (np.zeros((2, 2, 2), np.uint8), np.full((2, 2, 2), -3, np.int32), "negative"),
        (np.zeros((2, 2, 2), np.uint8), np.full((2, 2, 2), 2**32 + 1, np.uint64), "2\\^32"),
        (np.full((2, 2, 2), np.inf), np.zeros((2, 2, 2), np.uint8), "not finite"),
    ],
)
def test_bad_arrays_are_refused_by_name(pred, truth, fault):
    with pytest.raises(DataError, match=fault):
        score_instance(pred, truth, (1, 1, 1))


def test_unknown_rules_and_voxel_sizes_are_refused():
    empty = np.zeros((2, 2, 2), np.uint8)
    with pytest.raises(ConfigError, match=r"csc-2026\.06"):
        score_instance(empty, empty, (1, 1, 1), rules="csc-2026.6")
    with pytest.raises(DataError, match="voxel size"):
        score_instance(empty, empty, (1, 0, 1))


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 7, 7)])
def test_thin_masks_of_isolated_voxels_are_scored_as_bool(shape):
    pred = np.zeros(shape, bool)
    pred[..., ::2, ::2] = True
    truth = np.zeros(shape, np.uint8)
    truth[0, 0, 0] = 1
    assert score_instance(pred, truth, (1, 1, 1)) == score_instance(pred.astype(np.uint8), truth, (1, 1, 1))
