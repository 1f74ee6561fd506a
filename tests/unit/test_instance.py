import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial import cKDTree

from cellmap_pipe.errors import ConfigError, DataError
from cellmap_pipe.evaluation import hausdorff, inputs, instance, matching, overlap, score_instance
from cellmap_pipe.evaluation.instance import instance_bytes, score_instance_by, unanswered
from cellmap_pipe.evaluation.overlap import find_runs, surface_of, voxels_of
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


# Ways to the same distances: settings of `hausdorff` that force them, and memory_gb
WAYS = {
    "as measured": ({}, None),
    "pairs": ({"PAIRS": 10**9}, None),
    "boxes": ({"PAIRS": 0, "SPARSE": 10**9}, None),
    "points": ({"PAIRS": 0, "SPARSE": 0}, None),
    "boxes and points": ({"PAIRS": 9, "SPARSE": 1}, None),
    "points because boxes do not fit": ({"PAIRS": 0, "SPARSE": 10**9}, 1e-9),
    "points in pieces": ({"PAIRS": 0, "LEAST_POINTS": 3}, 1e-9),
    "points in larger pieces": ({"PAIRS": 0, "LEAST_POINTS": 100}, 1e-9),
}


def by_way(way, *arguments):
    """Return the records by all rules, with distances measured in that way."""
    constants, memory_gb = WAYS[way]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(hausdorff, name, value)
        return score_instance_by(*arguments, rules=tuple(RULES), memory_gb=memory_gb)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(WAYS)), st.booleans())
def test_records_equal_the_reference(seed, way, masked):
    """By all rules at once, with each way of measuring distances and any slabs."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(3, 9, 3))
    voxel = tuple(rng.choice([1.0, 1.74, 2.0, 8.0], 3))
    truth = boxes(rng, shape, rng.integers(0, 5), [1, 2, 3, 5])
    pred = boxes(rng, shape, rng.integers(0, 6), [1, 2, 3]).astype(rng.choice([np.uint8, np.int32, np.float32]))
    mask = (rng.random(shape) > 0.1).astype(np.uint8) if masked else None
    known = 1 if mask is None else mask
    records = by_way(way, pred, truth, voxel, mask)
    assert list(records) == list(RULES)
    for rules, record in records.items():
        expected = reference.instance_records(pred * known, truth * known, voxel, rules)
        assert any(same(record, one) for one in expected), (rules, record, expected)


@pytest.mark.parametrize("way", sorted(set(WAYS) - {"boxes", "points in pieces"}))
@pytest.mark.parametrize("seed", range(2))
def test_every_way_measures_the_same_on_branching_objects(way, seed):
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.random((30, 26, 34)), 1.6, mode="wrap")
    truth = ndimage.label(field > np.quantile(field, 0.7))[0].astype(np.uint16)
    pred = np.roll(np.where(rng.random(truth.shape) < 0.97, truth, 0), seed, axis=seed % 3)
    expected, records = by_way("boxes", pred, truth, (13.92, 16, 16)), by_way(way, pred, truth, (13.92, 16, 16))
    assert all(same(records[rules], record) for rules, record in expected.items())
    assert expected["clean"]["tp"] >= 3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(1, 12)] * 3), st.sampled_from([0.2, 0.6, 0.95, 1.0]))
def test_the_surface_of_a_set_holds_every_voxel_that_has_a_neighbour_outside(seed, shape, density):
    rng = np.random.default_rng(seed)
    inside = rng.random(shape) < density
    inside[tuple(n // 2 for n in shape)] = True
    truth, pieces = inside.astype(np.uint8), rng.integers(0, 2, shape).astype(np.uint8)
    runs = find_runs([(truth, pieces * truth)], shape)  # in several pieces per row
    start, length = surface_of(runs.start, runs.length, shape)
    surface = np.zeros(inside.size, int)
    np.add.at(surface, voxels_of(start, length), 1)
    surface = surface.reshape(shape)
    assert surface.max() <= 1 and not (surface > inside).any()
    inner = ndimage.binary_erosion(inside, border_value=1)
    assert (surface > 0)[inside & ~inner].all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 1e-9]), st.integers(1, 20))
def test_arrays_read_slab_by_slab_score_as_those_in_memory(seed, memory_gb, planes):
    rng = np.random.default_rng(seed)
    truth, pred = boxes(rng, (17, 6, 7), 8, [1, 2, 3, 9]), boxes(rng, (17, 6, 7), 9, [1, 2, 3])
    mask = (rng.random(truth.shape) > 0.1).astype(np.uint8)
    expected = score_instance_by(pred, truth, (4, 4, 4), mask)
    depths = rng.integers(1, 19, 3)
    arrays = [Layered(values, int(depth)) for values, depth in zip((pred, truth, mask), depths, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "SLAB_VOXELS", planes * 6 * 7)
        assert score_instance_by(arrays[0], arrays[1], (4, 4, 4), arrays[2], memory_gb=memory_gb) == expected
    if memory_gb is None:
        for array in arrays:
            assert array.layers == list(range(-(-17 // array.chunks[0])))  # each once, in order


class Layered:
    """An array that is read by planes, and notes the layers of chunks of every reading."""

    def __init__(self, values, depth):
        self.values, self.chunks, self.layers = values, (depth, *values.shape[1:]), []
        self.shape, self.dtype = values.shape, values.dtype

    def __getitem__(self, part):
        self.layers += range(part.start // self.chunks[0], -(-part.stop // self.chunks[0]))
        return self.values[part]


def test_a_distance_that_several_rules_need_is_measured_once(monkeypatch):
    rng = np.random.default_rng(5)
    truth, pred = boxes(rng, (12, 12, 12), 9, range(1, 9)), boxes(rng, (12, 12, 12), 9, range(1, 9))
    measured = []
    measure = hausdorff.HausdorffDistances._measure
    monkeypatch.setattr(
        hausdorff.HausdorffDistances,
        "_measure",
        lambda self, i, parts: measured.append((i, *parts)) or measure(self, i, parts),
    )
    together = score_instance_by(pred, truth, (4, 4, 4), rules=("clean", "csc-2026.06", "csc-2026.07"))
    assert len(measured) == len(set(measured)) > 0
    assert together == {name: score_instance(pred, truth, (4, 4, 4), rules=name) for name in together}


@pytest.mark.parametrize("rules", list(RULES))
@pytest.mark.parametrize("n_truth", [0, 1, 7])
def test_an_unanswered_crop_scores_as_one_that_is_answered_with_background(rules, n_truth):
    truth = np.zeros((5, 6, 31), np.uint16)
    truth[2, 3, 2 : 2 + 4 * n_truth : 4] = np.arange(n_truth) + 3
    expected = score_instance(np.zeros(truth.shape, np.uint8), truth, (8, 4, 2), rules=rules)
    assert unanswered(n_truth, truth.shape, (8, 4, 2), rules) == expected


@pytest.mark.parametrize(("dtype", "value"), [("?", 1), ("u1", 1), ("u1", 2), ("u1", 255), ("i2", 3)])
@pytest.mark.parametrize("seed", range(4))
def test_mask_multiplies_both(dtype, value, seed):
    """Ids too, which move collisions and the ratio rule, and wrap around in small types."""
    rng = np.random.default_rng(seed)
    shape = (8, 8, 8)
    truth, pred = (boxes(rng, shape, 4, [1, 2, 3]).astype(np.uint8) for _ in range(2))
    pred[rng.random(shape) < 0.08] = 2
    mask = ((rng.random(shape) > 0.2) * value).astype(dtype)
    assert score_instance(pred, truth, (4, 4, 4), mask) == score_instance(pred * mask, truth * mask, (4, 4, 4))


@pytest.mark.parametrize("value", [0.5, 1.0, 2.0])
def test_a_mask_of_floats_keeps_ids_where_it_is_above_zero(value):
    rng = np.random.default_rng(1)
    truth, pred = boxes(rng, (8, 8, 8), 4, [1, 2, 3]), boxes(rng, (8, 8, 8), 4, [1, 2, 3])
    mask = (rng.random((8, 8, 8)) > 0.2) * value
    assert score_instance(pred, truth, (4, 4, 4), mask) == score_instance(pred, truth, (4, 4, 4), mask > 0)


class Counted:
    """Planes of an array, and how many of them were read."""

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.planes = values, values.shape, values.dtype, 0

    def __getitem__(self, part):
        self.planes += len(self.values[part])
        return self.values[part]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ids", [[], [1], [1, 2, 3], [1, 60_000]])
def test_noise_is_scored_alike_whether_or_not_it_is_read_to_the_end(ids, masked, monkeypatch):
    rng = np.random.default_rng(len(ids))
    pred = rng.random((40, 9, 11), dtype=np.float32)
    truth = boxes(rng, pred.shape, 6, ids) if ids else np.zeros(pred.shape, np.uint16)
    mask = (rng.random(pred.shape) > 0.2).astype(np.uint8) if masked else None
    expected = score_instance_by(pred, truth, (4, 4, 4), mask, tuple(RULES))
    monkeypatch.setattr(inputs, "SLAB_VOXELS", 200)
    monkeypatch.setattr(overlap, "MANY_RUNS", 100)
    counted = Counted(pred)
    assert score_instance_by(counted, truth, (4, 4, 4), mask, tuple(RULES)) == expected
    refused = expected["clean"]["status"] != "scored"
    assert refused == (ids in ([1], [1, 2, 3]))
    assert (counted.planes < len(pred)) == refused


def test_noise_that_does_not_fit_into_memory_is_refused_before_it_fills_it(monkeypatch):
    monkeypatch.setattr(overlap, "MANY_RUNS", 100)
    monkeypatch.setattr(instance, "available_bytes", lambda: 1000)
    truth = np.full((9, 9, 9), 5000, np.uint16)
    with pytest.raises(MemoryError, match="runs along x"):
        score_instance(np.random.default_rng(0).random(truth.shape), truth, (4, 4, 4))


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


@pytest.mark.parametrize("shape", [(100, 100, 100), (400, 400, 400), (1000, 1000, 1000)])
def test_the_estimate_of_memory_holds_an_object_whose_box_fills_the_volume(shape):
    voxels = math.prod(shape)
    assert hausdorff.BOX_BYTES * voxels < instance_bytes(shape, 2, 2) < instance_bytes(shape, 4, 4) < 50 * voxels


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


@pytest.mark.parametrize(
    ("pred", "truth", "fault"),
    [(np.nan, 1, "not finite"), (1, -1, "negative"), (1, 2**33, "2\\^32")],
)
def test_a_bad_value_in_a_later_slab_is_named_too(pred, truth, fault, monkeypatch):
    monkeypatch.setattr(inputs, "SLAB_VOXELS", 9)
    arrays = [np.zeros((8, 3, 3), np.float64), np.zeros((8, 3, 3), np.int64)]
    arrays[0][7, 0, 0], arrays[1][7, 0, 0] = pred, truth
    with pytest.raises(DataError, match=fault):
        score_instance(*[Layered(values, 2) for values in arrays], (1, 1, 1))


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
