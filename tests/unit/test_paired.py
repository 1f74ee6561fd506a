"""What the paired bootstrap claims: differences that are there, no ties that are none, and few by chance."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.evaluation.bootstrap import bootstrap
from cellmap_pipe.evaluation.challenge import aggregate
from cellmap_pipe.evaluation.paired import (
    FEWEST_UNITS,
    NOT_SHOWN,
    SHOWN,
    SHOWN_ALONE,
    TOO_FEW,
    Difference,
    class_differences,
    compare_sources,
    kinds_score,
    tie_groups,
)


def record(crop, label, tp, fp, fn, distance=None, status="scored"):
    """distance: of each object of an instance class."""
    found = {"crop": crop, "label": label, "tp": tp, "fp": fp, "fn": fn, "status": status}
    n = tp + fp + fn
    return found if distance is None else found | {"hausdorff_norm_sum": distance * n, "n_hausdorff": n}


def answers(rng, crops, quality, noise, hardness):
    """Return a source's records of `crops` crops: a semantic and an instance class whose scores lie near `quality`."""
    records = []
    for i in range(crops):
        share = np.clip(quality + hardness[i] + noise * rng.normal(size=2), 0.02, 0.98)
        tp, objects = round(10_000 * share[0]), round(40 * share[1])
        records.append(record(f"d{i % 7}/crop{i}", "er", tp, (10_000 - tp) // 2, (10_000 - tp) // 2))
        records.append(record(f"d{i % 7}/crop{i}", "mito", objects, 40 - objects, 40 - objects, share[1]))
    return records


def hardness(rng, crops):
    return 0.15 * rng.normal(size=crops)


def sources(seed, crops=30, **quality):
    rng = np.random.default_rng(seed)
    shared = hardness(rng, crops)
    return {name: answers(rng, crops, value, 0.03, shared) for name, value in quality.items()}


def scaled(overall, seed):
    """Return records of 24 crops whose overall score is `overall` to four digits, whatever their noise."""
    rng = np.random.default_rng(seed)
    low, high = 0.0, 1.0
    noise, hard = rng.normal(size=(24, 2)), np.random.default_rng(99).normal(size=24)
    for _ in range(60):
        quality = (low + high) / 2
        share = np.clip(quality + 0.12 * hard[:, None] + 0.04 * noise, 0.001, 0.999)
        records = []
        for i, (semantic, instance) in enumerate(share):
            tp, objects = round(1e6 * semantic), 1e5 * instance
            records.append(record(f"d/crop{i}", "er", tp, 1_000_000 - tp, 0))
            records.append(record(f"d/crop{i}", "mito", objects, 1e5 - objects, 1e5 - objects, 1.0))
        low, high = (quality, high) if aggregate(records)["overall_score"] < overall else (low, quality)
    assert f"{aggregate(records)['overall_score']:.4f}" == f"{overall:.4f}"
    return records


def test_0_5711_against_0_5694_is_a_tie():
    comparison = compare_sources({"winner": scaled(0.5711, 1), "second": scaled(0.5694, 2)})
    assert [f"{comparison.scores[name].score:.4f}" for name in comparison.order] == ["0.5711", "0.5694"]
    (pair,) = comparison.differences
    assert (pair.first, pair.second, pair.verdict) == ("winner", "second", NOT_SHOWN)
    assert f"{pair.difference:.4f}" == "0.0017" and pair.low < 0 < pair.high
    assert comparison.ranks() == {"winner": (1, 2), "second": (1, 2)}
    assert comparison.groups() == {"winner": "a", "second": "a"}


def test_a_small_difference_in_every_crop_is_shown_although_the_scores_intervals_overlap():
    worse = answers(np.random.default_rng(3), 24, 0.5, 0.0, hardness(np.random.default_rng(4), 24))
    better = [
        entry if entry["label"] == "mito" else {**entry, "tp": entry["tp"] + 100, "fp": max(0, entry["fp"] - 100)}
        for entry in worse
    ]
    comparison = compare_sources({"worse": worse, "better": better})
    (pair,) = comparison.differences
    assert comparison.order == ["better", "worse"]
    assert 0 < pair.difference < 0.02
    assert comparison.scores["worse"].high > comparison.scores["better"].low
    assert pair.verdict == SHOWN
    assert comparison.ranks() == {"better": (1, 1), "worse": (2, 2)}
    assert comparison.groups() == {"better": "a", "worse": "b"}


def test_scores_and_their_intervals_are_those_of_the_scores_files():
    found = sources(5, a=0.5, b=0.6)
    comparison = compare_sources(found, n=1000)
    for name, records in found.items():
        alone = bootstrap(records, n=1000)
        entry = comparison.scores[name]
        assert entry.score == pytest.approx(aggregate(records)["overall_score"], abs=1e-12)
        assert (entry.low, entry.high) == pytest.approx((alone["low"], alone["high"]), abs=1e-12)
    assert (comparison.crops, comparison.units, comparison.labels, comparison.left_out) == (30, 30, 60, 0)
    assert comparison.kinds == ("instance", "semantic")


def plain_differences(first, second, n, seed):
    """Return the differences of n draws of crops, one aggregate at a time."""
    crops = sorted({entry["crop"] for entry in first})
    times = np.random.default_rng(seed).multinomial(len(crops), [1 / len(crops)] * len(crops), size=n)
    result = []
    for draw in times:
        chosen = [crop for crop, count in zip(crops, draw, strict=True) for _ in range(count)]
        scores = [
            aggregate([entry for crop in chosen for entry in records if entry["crop"] == crop])["overall_score"]
            for records in (first, second)
        ]
        result.append(scores[0] - scores[1])
    return np.array(result)


def test_both_sources_are_scored_on_the_same_draws():
    found = sources(6, crops=8, a=0.6, b=0.5)
    (pair,) = compare_sources(found, n=50, seed=3).differences
    first, second = found[pair.first], found[pair.second]
    draws = plain_differences(first, second, 50, 3)
    without = np.array(
        [
            np.subtract(
                *(
                    aggregate([entry for entry in records if entry["crop"] != crop])["overall_score"]
                    for records in (first, second)
                )
            )
            for crop in sorted({entry["crop"] for entry in first})
        ]
    )
    jackknife = np.sqrt(7 / 8 * ((without - without.mean()) ** 2).sum())
    # no crop weighs much more than another: 1.960 is 2.528 for eight, 2.3646 (Student's t of 7 degrees) x sqrt(8 / 7)
    plain = np.percentile(draws, (0.57375, 99.42625))
    expected = pair.difference + (plain - pair.difference) * jackknife / draws.std()
    assert 1 < jackknife / draws.std() < 1.2
    assert (pair.low, pair.high) == pytest.approx(tuple(expected), abs=2e-4)


def skewed(seed, models, crops=40, classes=12):
    """Return records of models that are equally good: crops differ a thousandfold in voxels, few have a given class."""
    rng = np.random.default_rng(seed)
    result = {f"m{i}": [] for i in range(models)}
    for crop in range(crops):
        hard, size, luck = rng.normal(), 1e6 * np.exp(1.5 * rng.normal()), 0.3 * rng.normal(size=models)
        for label in np.flatnonzero(rng.random(classes) < 0.6):
            voxels = size * np.exp(1.5 * rng.normal() - 3)
            shares = 1 / (1 + np.exp(-(0.5 + 0.8 * hard + luck + 0.6 * rng.normal(size=models))))
            for i, share in enumerate(shares):
                counts = voxels * share, voxels * share * (1 - share), voxels * (1 - share)
                result[f"m{i}"].append(record(f"d/crop{crop}", f"c{label}", *counts))
    return result


def test_a_few_large_crops_do_not_make_equal_models_differ():
    """With the crops' number for the degrees of freedom a fifth of these comparisons of equal models claimed a pair."""
    claimed = [bool(compare_sources(skewed(seed, 5), n=300).shown()) for seed in range(100)]
    print(f"some pair of 10 differs: {sum(claimed)} of 100")
    assert sum(claimed) <= 11


def test_an_interval_rests_on_the_crops_that_decide_it():
    found = sources(5, crops=30, a=0.5, b=0.52)
    even = compare_sources(found).differences[0]
    large = {
        name: [
            {**entry, **{key: 300 * entry[key] for key in ("tp", "fp", "fn")}} if entry["crop"] == "d0/crop0" else entry
            for entry in records
        ]
        for name, records in found.items()
    }
    one = compare_sources(large).differences[0]
    assert one.high - one.low > 2 * (even.high - even.low)
    assert one.low <= one.difference <= one.high and one.verdict != SHOWN


def test_labels_that_failed_for_one_source_count_for_none():
    found = sources(7, a=0.6, b=0.5)
    found["a"][0] = {**found["a"][0], "status": "failed"}
    comparison = compare_sources(found)
    assert (comparison.labels, comparison.left_out) == (59, 1)
    assert comparison.scores["b"].score == pytest.approx(aggregate(found["b"][1:])["overall_score"])


def test_sources_that_answer_alike_are_a_tie_with_an_empty_interval():
    found = sources(8, a=0.6)
    (pair,) = compare_sources({"a": found["a"], "same": found["a"]}).differences
    assert (pair.difference, pair.low, pair.high, pair.verdict) == (0, 0, 0, NOT_SHOWN)


def test_crops_of_one_specimen_are_drawn_together():
    # ten crops agree because they are of one animal: that is one observation, not ten
    rng = np.random.default_rng(9)
    first, second = [], []
    for animal in range(8):
        shift = 800 * rng.normal()
        for i in range(10):
            for records, tp in ((first, 5000 + shift + 400), (second, 5000)):
                tp = round(tp)
                records.append(record(f"d{animal}/crop{i}", "er", tp, 10_000 - tp, 0))
                records.append(record(f"d{animal}/crop{i}", "mito", 5, 5, 0, 0.5))
    unit_of = {entry["crop"]: entry["crop"].split("/")[0] for entry in first}
    (by_crop,) = compare_sources({"a": first, "b": second}).differences
    together = compare_sources({"a": first, "b": second}, unit_of)
    (by_animal,) = together.differences
    assert (together.crops, together.units, by_animal.units) == (80, 8, 8)
    assert by_animal.difference == pytest.approx(by_crop.difference)
    assert by_animal.high - by_animal.low > 2 * (by_crop.high - by_crop.low)
    assert (by_crop.verdict, by_animal.verdict) == (SHOWN, NOT_SHOWN)


def test_too_few_crops_tell_nothing():
    assert 2 / 2**FEWEST_UNITS < 0.05 < 2 / 2 ** (FEWEST_UNITS - 1)
    found = sources(10, crops=FEWEST_UNITS - 1, a=0.8, b=0.2)
    comparison = compare_sources(found)
    assert comparison.differences[0].low > 0
    assert comparison.differences[0].verdict == TOO_FEW
    assert comparison.groups() == {"a": "a", "b": "a"}
    assert compare_sources(sources(10, crops=FEWEST_UNITS, a=0.8, b=0.2)).differences[0].verdict == SHOWN


def test_intervals_of_all_pairs_are_wider_than_those_of_one():
    comparison = compare_sources(sources(11, **{f"m{i}": 0.5 for i in range(6)}))
    assert len(comparison.differences) == 15
    for pair in comparison.differences:
        assert pair.low_all <= pair.low and pair.high <= pair.high_all
    assert all(pair.low_all < pair.low for pair in comparison.differences)
    (alone,) = compare_sources(sources(11, m0=0.5, m1=0.5)).differences
    assert (alone.low_all, alone.high_all) == (alone.low, alone.high)


def test_a_difference_that_holds_only_by_itself_is_said_to():
    assert Difference("a", "b", 0.03, 0.001, 0.06, -0.01, 0.07, 30).verdict == SHOWN_ALONE
    assert Difference("a", "b", 0.03, 0.001, 0.06, -0.01, 0.07, 5).verdict == TOO_FEW


def test_equal_models_seldom_seem_to_differ():
    """Of 150 comparisons of six equal models 5 % may claim some difference among all pairs; few crops cost a little."""
    claimed = alone = 0
    for seed in range(150):
        comparison = compare_sources(sources(1000 + seed, **{f"m{i}": 0.5 for i in range(6)}), n=400)
        claimed += bool(comparison.shown())
        alone += any(pair.verdict in (SHOWN, SHOWN_ALONE) for pair in comparison.differences)
    print(f"some pair of 15 differs: {alone} of 150 by its own interval, {claimed} by those of all")
    assert claimed <= 18
    assert alone > 2 * claimed


def test_only_one_kind_of_classes_is_compared_by_its_mean():
    found = {
        name: [entry for entry in records if entry["label"] == "er"]
        for name, records in sources(12, a=0.6, b=0.4).items()
    }
    comparison = compare_sources(found)
    assert comparison.kinds == ("semantic",)
    assert comparison.scores["a"].score == pytest.approx(aggregate(found["a"])["overall_semantic_score"])
    assert comparison.scores["a"].low <= comparison.scores["a"].score <= comparison.scores["a"].high
    assert comparison.differences[0].verdict == SHOWN


def test_each_class_is_compared_over_its_own_crops():
    found = sources(14, a=0.6, b=0.5)
    without = [entry for entry in found["b"] if entry["label"] == "er" or entry["crop"] != "d0/crop0"]
    by_class = class_differences(found["a"], without)
    assert {name: each.units for name, each in by_class.items()} == {"er": 30, "mito": 29}
    shared = [entry for entry in found["a"] if entry["label"] == "mito" and entry["crop"] != "d0/crop0"]
    expected = [aggregate(pool)["label_scores"]["mito"]["combined_score"] for pool in (shared, without)]
    assert by_class["mito"].difference == pytest.approx(expected[0] - expected[1])
    for each in by_class.values():
        assert 0 < each.low < each.difference < each.high and each.verdict == SHOWN
    alike = class_differences(found["a"], found["a"])
    assert {each.verdict for each in alike.values()} == {NOT_SHOWN}
    few = class_differences(found["a"][:4], found["b"][:4])
    assert {each.verdict for each in few.values()} == {TOO_FEW}
    assert class_differences([], found["a"]) == {}


def test_a_crop_without_classes_of_a_kind_counts_by_the_other():
    semantic, instance = sources(15, crops=1, a=0.6)["a"]
    assert kinds_score([semantic]) == aggregate([semantic])["overall_semantic_score"] > 0
    assert kinds_score([instance]) == aggregate([instance])["overall_instance_score"] > 0
    assert kinds_score([semantic, instance]) == pytest.approx(aggregate([semantic, instance])["overall_score"])
    assert kinds_score([]) is None
    assert kinds_score([{**semantic, "status": "failed"}]) is None


def test_nothing_in_common_gives_no_comparison():
    assert compare_sources({}).differences == []
    found = {"a": [record("d/crop1", "er", 1, 0, 0)], "b": [record("d/crop2", "er", 1, 0, 0)]}
    comparison = compare_sources(found)
    assert (comparison.differences, comparison.labels, comparison.left_out) == ([], 0, 2)


def test_the_same_records_give_the_same_comparison_in_any_order():
    found = sources(13, a=0.6, b=0.5, c=0.55)
    turned = {name: found[name][::-1] for name in reversed(found)}
    assert compare_sources(found).differences == compare_sources(turned).differences


def test_ties_need_not_be_transitive():
    assert tie_groups("abc", [("a", "c")]) == {"a": "a", "b": "a b", "c": "b"}
    assert tie_groups("abc", []) == dict.fromkeys("abc", "a")
    assert tie_groups("abc", itertools.combinations("abc", 2)) == {"a": "a", "b": "b", "c": "c"}


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 7).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.sampled_from(list(itertools.combinations(range(n), 2)) or [(0, 0)])))
    )
)
def test_letters_say_exactly_which_differences_are_shown(case):
    n, chosen = case
    order = [f"m{i}" for i in range(n)]
    shown = {(order[i], order[j]) for i, j in chosen if i != j}
    letters = {name: set(text.split()) for name, text in tie_groups(order, shown).items()}
    for pair in itertools.combinations(order, 2):
        assert bool(letters[pair[0]] & letters[pair[1]]) is (pair not in shown)
    assert all(letters.values())
    # no letter says what another one says already
    members = [{name for name in order if letter in letters[name]} for letter in set().union(*letters.values())]
    assert not any(a < b for a in members for b in members)
    assert math.comb(n, 2) >= len(shown)
