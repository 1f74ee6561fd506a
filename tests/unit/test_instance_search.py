"""Many settings of an instance class at once, against one segmentation and one score for each."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation import aggregate
from cellmap_pipe.evaluation.instance import score_instance
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prediction.instance_search import candidates, full_records, rank, search_table
from cellmap_pipe.prediction.instances import find_objects
from cellmap_pipe.prediction.processing import Processing

VOXEL_NM = (5.24, 4.0, 4.0)
VOXEL = math.prod(VOXEL_NM)
SETTINGS = [
    Processing(threshold, hole, split, size * VOXEL)
    for threshold in (0.4, 0.6)
    for hole in (0.0, 3 * VOXEL)
    for split in (0.0, 5.0, 8.1)
    for size in (30, 0, 6, 1e6)
]


def one_by_one(p: np.ndarray, truth: np.ndarray, known: Any, how: Processing, rules: str) -> dict[str, Any]:
    lattice = Lattice(VOXEL_NM, (0, 0, 0), p.shape)
    mask = p.astype(np.float32) > np.float32(255 * how.threshold)
    with find_objects(lambda first, last: mask[first:last], lattice, how) as objects:
        return score_instance(objects.ids(0, p.shape[0]), truth, VOXEL_NM, known, rules)


def example(seed: int, shape: tuple[int, int, int] = (14, 20, 18)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """255 p, truth ids and known mask of smooth blobs; the truth of some seeds is empty."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.random(shape), 1.8, mode="wrap")
    field = (field.ravel().argsort().argsort() / field.size).reshape(shape)
    noise = ndimage.gaussian_filter(rng.random(shape), 1, mode="wrap") - 0.5
    truth = ndimage.label(field > rng.choice([0.6, 0.8, 1.0]))[0]
    known = ndimage.gaussian_filter(rng.random(shape), 3, mode="wrap") > rng.choice([0, 0.5])
    p = (255 * np.clip(field + noise - 0.15, 0, 1)).astype(rng.choice([np.uint8, np.float32]))
    return p, truth.astype(np.uint16), known


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from(["csc-2026.06", "clean", "csc-2026.07"]))
def test_counts_and_records_are_those_of_each_setting_by_itself(seed: int, masked: bool, rules: str) -> None:
    p, truth, known = example(seed)
    mask = known if masked else None
    expected = [one_by_one(p, truth, mask, how, rules) for how in SETTINGS]
    table = search_table(p, truth, mask, VOXEL_NM, SETTINGS, rules)
    for key, column in (("tp", table.tp), ("fp", table.fp), ("fn", table.fn)):
        assert column.tolist() == [record[key] for record in expected]
    assert full_records(p, truth, mask, VOXEL_NM, SETTINGS[::5], rules) == expected[::5]


def test_processes_give_the_same_in_the_same_order() -> None:
    p, truth, known = example(3)
    arguments = (p, truth, known, VOXEL_NM, SETTINGS, "csc-2026.06")
    one, two = search_table(*arguments), search_table(*arguments, workers=2)
    assert np.array_equal([one.tp, one.fp, one.fn], [two.tp, two.fp, two.fn])
    assert full_records(*arguments) == full_records(*arguments, workers=2)


def test_settings_are_ranked_by_f1_pooled_over_the_crops_asked_for() -> None:
    crops = {f"crop{seed}": example(seed) for seed in (1, 4, 9)}
    tables = {name: search_table(*crop, VOXEL_NM, SETTINGS, "clean") for name, crop in crops.items()}
    for chosen in (["crop1"], ["crop4", "crop9"], list(crops)):
        pooled = []
        for how in SETTINGS:
            records = [{"label": "mito", **one_by_one(*crops[name], how, "clean")} for name in chosen]
            pooled.append(aggregate(records)["label_scores"]["mito"]["f1"])
        order = rank(tables, chosen).tolist()
        assert order == sorted(range(len(SETTINGS)), key=lambda i: -pooled[i])


@pytest.mark.parametrize("rules", ["csc-2026.06", "clean"])
def test_no_search_seeks_to_be_skipped(rules: str) -> None:
    """The official rules drop a crop with too many objects, which would be the best score of a bad threshold."""
    p = np.zeros((20, 20, 20), np.uint8)
    p[::4, ::4, ::4] = 100  # 125 specks
    p[1:4, 1:4, 1:4] = 200
    truth = np.zeros(p.shape, np.uint8)
    truth[2:9, 2:9, 2:9] = 1
    tried = [Processing(threshold=0.3), Processing(threshold=0.5)]
    table = search_table(p, truth, None, VOXEL_NM, tried, rules)
    assert table.skipped.tolist() == [True, False]
    assert table.fn.tolist() == [one_by_one(p, truth, None, how, rules)["fn"] for how in tried]
    assert rank({"crop": table}, ["crop"]).tolist() == [1, 0]


def test_candidates_begin_with_the_default_and_need_few_segmentations() -> None:
    for default in (Processing(), Processing(0.45, 100.0, 7.0, 5000.0)):
        tried = candidates(default, VOXEL_NM)
        assert tried[0] == default and len(set(tried)) == len(tried)
        assert 200 <= len(tried) <= 241
        assert len({(how.threshold, how.split_nm) for how in tried if how.split_nm}) <= 19
        assert {how.hole_nm3 for how in tried} == {default.hole_nm3}
    sizes = sorted({how.min_size_nm3 for how in candidates(Processing(), VOXEL_NM)})
    assert sizes[0] == 0 and sizes[4] == pytest.approx(50 * VOXEL)


def test_arrays_of_different_shapes_are_refused() -> None:
    with pytest.raises(DataError, match="truth"):
        search_table(np.zeros((4, 4, 4)), np.zeros((4, 4, 5), int), None, VOXEL_NM, [Processing()], "clean")
