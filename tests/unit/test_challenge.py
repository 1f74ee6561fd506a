import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.evaluation import aggregate, missing_label
from cellmap_pipe.evaluation.bootstrap import bootstrap

_spec = importlib.util.spec_from_file_location("scoring_reference", Path(__file__).with_name("scoring_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


def random_records(rng, crops, labels):
    records = {}
    for crop in range(crops):
        for label in labels:
            if rng.random() < 0.3:
                continue
            record = {key: int(rng.integers(0, 4)) for key in ("tp", "fp", "fn")} | {"status": "scored"}
            if label in ("mito", "nuc"):
                n = sum(record[key] for key in ("tp", "fp", "fn"))
                record |= {"n_hausdorff": n, "hausdorff_norm_sum": float(n * rng.random())}
            records.setdefault(f"crop{crop}", {})[label] = record | {"is_missing": bool(rng.random() < 0.2)}
    return records


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_aggregate_equals_the_reference_in_either_form(seed):
    rng = np.random.default_rng(seed)
    records = random_records(rng, rng.integers(0, 4), ["mito", "nuc", "er", "pm"])
    scores, instance, semantic, overall = reference.overall(records)
    flat = [{"crop": c, "label": n, **record} for c, labels in records.items() for n, record in labels.items()]
    for result in (aggregate(records), aggregate(flat)):
        found = {n: s.get("iou", s.get("combined_score")) for n, s in result["label_scores"].items()}
        assert found == pytest.approx(scores)
        assert result["overall_instance_score"] == pytest.approx(instance)
        assert result["overall_semantic_score"] == pytest.approx(semantic)
        assert result["overall_score"] == pytest.approx(overall)
    found = {c: {n: r for n, r in labels.items() if not r["is_missing"]} for c, labels in records.items()}
    assert aggregate(records, include_missing=False)["overall_score"] == pytest.approx(reference.overall(found)[3])


def test_classes_that_are_empty_everywhere_are_perfect():
    nothing = {"tp": 0, "fp": 0, "fn": 0, "status": "scored"}
    pooled = {"mito": {**nothing, "hausdorff_norm_sum": 0.0, "n_hausdorff": 0}, "er": nothing}
    assert aggregate({"crop1": pooled})["overall_score"] == 1.0
    assert aggregate({})["overall_score"] == 0.0


def test_a_missing_semantic_label_misses_every_voxel_and_an_instance_label_every_object():
    truth = np.zeros((4, 4, 4), np.uint8)
    assert missing_label(truth, "er")["fn"] == 64
    truth[0, 0, 0], truth[3, 3, 3] = 5, 9
    record = missing_label(truth, "mito")
    assert (record["fn"], record["n_hausdorff"], record["hausdorff_norm_sum"]) == (2, 2, 0.0)
    assert record["is_missing"] and record["status"] == "missing"


def test_bootstrap_interval_holds_the_score():
    records = random_records(np.random.default_rng(4), 12, ["mito", "nuc", "er", "pm"])
    flat = [{"crop": c, "label": n, **record} for c, labels in records.items() for n, record in labels.items()]
    interval = bootstrap(flat, n=300)
    assert interval == bootstrap(flat, n=300)
    assert interval["score"] == aggregate(flat)["overall_score"]
    assert 0 <= interval["low"] < interval["score"] < interval["high"] <= 1
    assert bootstrap([])["crops"] == 0


def test_evaluation_is_imported_without_torch_or_matplotlib():
    code = (
        "import sys, cellmap_pipe.evaluation, cellmap_pipe.evaluation.crops, cellmap_pipe.evaluation.submission; "
        "sys.exit(bool({'torch', 'matplotlib', 'monai'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
