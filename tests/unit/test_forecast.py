import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.errors import ConfigError, ContractError
from cellmap_pipe.evaluation.bootstrap import bootstrap
from cellmap_pipe.evaluation.challenge import aggregate
from cellmap_pipe.evaluation.forecast import forecast, presence, read_validation

INSTANCE, SEMANTIC = ["mito", "nuc", "ves"], ["er", "pm", "golgi"]
counts = st.integers(0, 3)


@st.composite
def validation(draw):
    """Return records of a few crops, each with some of the classes; failed and missing ones among them."""
    records = []
    for crop in range(draw(st.integers(0, 5))):
        for label in draw(st.sets(st.sampled_from([*INSTANCE, *SEMANTIC]))):
            record = {"crop": f"d/crop{crop}", "label": label, "tp": draw(counts), "fp": draw(counts)}
            record |= {"fn": draw(counts), "status": draw(st.sampled_from(["scored", "scored", "missing", "failed"]))}
            if label in INSTANCE:
                n = draw(counts)
                record |= {"hausdorff_norm_sum": n * draw(st.sampled_from([0.0, 0.3, 1.0])), "n_hausdorff": n}
            records.append(record)
    return records


def value(scores, label):
    entry = scores[label]
    return entry["combined_score"] if "combined_score" in entry else entry["iou"]


def overall(scores, labels, unknown):
    """Return the score of one pool of records: the classes of a kind, each counting, 0 for those that cannot score.

    unknown: what classes count that are not in the pool, None to leave them out.
    """
    means = []
    for kind in (INSTANCE, SEMANTIC):
        values = []
        for label in sorted(set(labels) & set(kind)):
            known = value(scores, label) if label in scores else unknown.get(label)
            values += [known] if known is not None else []
        means.append(sum(values) / len(values) if values else 0.0)
    return math.sqrt(means[0] * means[1])


def plain_forecast(records, labels, unanswered, n, seed):
    """Return score, low and high by one aggregate for each draw."""
    used = [r for r in records if r["status"] != "failed" and r["label"] in set(labels) - set(unanswered)]
    seen = {record["label"] for record in used}
    nothing = dict.fromkeys(set(labels) - seen, 0.0)
    score = overall(aggregate(used)["label_scores"], labels, nothing)
    crops = sorted({record["crop"] for record in used})
    if not crops:
        return score, 0.0, 0.0
    times = np.random.default_rng(seed).multinomial(len(crops), [1 / len(crops)] * len(crops), size=n)
    draws = []
    for of_crop in times:
        drawn = [r for crop, k in zip(crops, of_crop, strict=True) for r in used if r["crop"] == crop for _ in range(k)]
        draws.append(overall(aggregate(drawn)["label_scores"], labels, nothing))
    return score, *np.percentile(draws, [2.5, 97.5])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    records=validation(),
    labels=st.sets(st.sampled_from([*INSTANCE, *SEMANTIC])),
    unanswered=st.sets(st.sampled_from([*INSTANCE, *SEMANTIC])),
)
def test_forecast_is_the_mean_over_all_classes_of_the_manifest_for_every_draw(records, labels, unanswered):
    result = forecast(records, labels, unanswered, n=40, seed=3)
    expected = plain_forecast(records, labels, unanswered, 40, 3)
    assert [result["score"], result["low"], result["high"]] == pytest.approx(expected, abs=1e-12)
    assert result["unanswered"] == sorted(labels & unanswered)
    scored = {r["label"] for r in records if r["status"] != "failed"}
    assert result["unvalidated"] == sorted(labels - unanswered - scored)
    assert set(result["label_scores"]) == labels
    for label, entry in result["label_scores"].items():
        zero = label in result["unanswered"] or label in result["unvalidated"]
        assert 0 <= entry["low"] <= entry["high"] <= 1
        assert (entry["crops"] == 0) == zero
        assert entry["score"] == (
            0 if zero else value(aggregate([r for r in records if r["label"] == label])["label_scores"], label)
        )
    json.dumps(result, allow_nan=False)


def test_forecast_of_all_that_was_validated_is_the_aggregate_and_its_bootstrap():
    records = []
    for crop in range(6):
        for label in ("mito", "er"):
            record = {"crop": f"crop{crop}", "label": label, "status": "scored", "tp": crop, "fp": 1, "fn": 2}
            records.append(record | ({"hausdorff_norm_sum": 1.5, "n_hausdorff": 3} if label == "mito" else {}))
    result, interval = forecast(records, ["mito", "er"], n=500), bootstrap(records, n=500)
    assert {key: result[key] for key in interval} == pytest.approx(interval)
    assert result["overall_semantic_score"] == aggregate(records)["overall_semantic_score"]
    halved = forecast(records, ["mito", "er", "pm"], n=500)
    assert halved["score"] == pytest.approx(result["score"] * math.sqrt(0.5))


def test_presence_counts_the_crops_whose_truth_has_the_class():
    def record(label, **more):
        return {"label": label, "status": "scored", "tp": 0, "fp": 5, "fn": 0, **more}

    # A missing semantic label counts all voxels as missed, whatever the truth; its foreground is under voxels
    missing = record("er", status="missing", fn=1000, voxels={"tp": 0, "fp": 0, "fn": 0})
    records = [record("er", tp=1), record("er"), missing, record("mito", fn=2), record("mito", status="failed")]
    assert presence(records) == {"er": (1, 3), "mito": (1, 1)}


def write_scores(path, crops, model="ensemble", rules="csc-2026.06"):
    records = [{"crop": crop, "label": "er", "status": "scored", "tp": 1, "fp": 0, "fn": 0} for crop in crops]
    clean = [{**record, "fp": 1} for record in records if record["crop"] == "d/crop1"]
    path.write_text(json.dumps({"model": model, "rules": rules, "records": records, "clean_records": clean}))
    return path


def test_folds_of_one_source_are_read_together(tmp_path):
    paths = [write_scores(tmp_path / f"fold{i}.json", [f"d/crop{i}"]) for i in range(2)]
    result = read_validation(paths)
    assert [record["crop"] for record in result.records] == ["d/crop0", "d/crop1"]
    assert (result.source, result.rules) == ("ensemble", "csc-2026.06")


def test_a_forecast_stands_beside_that_of_the_clean_rules(tmp_path):
    paths = [write_scores(tmp_path / f"fold{i}.json", [f"d/crop{i}"]) for i in range(2)]
    result = read_validation(paths).forecast(["er", "pm"], ["pm"])
    assert (result["rules"], result["unanswered"]) == ("csc-2026.06", ["pm"])
    assert result["label_scores"]["er"]["score"] == 1
    assert result["clean"]["label_scores"]["er"]["score"] == pytest.approx(2 / 3)  # it counts crop1 otherwise


@pytest.mark.parametrize(
    ("other", "error", "match"),
    [
        ({"model": "dints"}, ConfigError, "b.json: model dints, but .*a.json has ensemble"),
        ({"rules": "clean"}, ConfigError, "b.json: rules clean, but"),
        ({"crops": ["d/crop0"]}, ConfigError, "d/crop0/er is in .*a.json too; give every fold once"),
    ],
)
def test_scores_that_do_not_belong_together_are_refused(tmp_path, other, error, match):
    first = write_scores(tmp_path / "a.json", ["d/crop0"])
    second = write_scores(tmp_path / "b.json", **({"crops": ["d/crop1"]} | other))
    with pytest.raises(error, match=match):
        read_validation([first, second])


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"model": "m", "rules": "clean", "records": [1]}',
        '{"model": "m", "rules": "clean", "records": []}',
    ],
)
def test_files_without_validation_scores_are_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ContractError, match=r"a.json: .*give results/scores"):
        read_validation([tmp_path / "a.json"])
    with pytest.raises(ConfigError, match="no validation scores"):
        read_validation([])
