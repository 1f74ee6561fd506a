"""Statistics of kept crops: from histograms and counts by state, equal to those of the voxels themselves."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.prepare.labels import ABSENT, PRESENT, UNKNOWN
from cellmap_pipe.prepare.state_table import count_states
from cellmap_pipe.prepare.statistics import summarise

CLASSES = ["pm", "mito", "nuc"]


class Crop:
    """A crop with its voxels: image, which of them are valid, and the state of every voxel and class (z, y, x, c)."""

    def __init__(self, rng, name, *, annotated, possible, overlaps=None, contradictions=()):
        shape = tuple(rng.integers(1, 7, 3))
        self.name, self.annotated = name, annotated
        self.image = rng.integers(rng.integers(0, 100), rng.integers(120, 256), shape).astype(np.uint8)
        self.valid = rng.random(shape) < rng.choice([1.0, 0.5])
        self.valid.flat[0] = True
        # a state table of a few rows in any order, and a label map that draws on some of them
        self.table = np.stack([rng.choice(list(states), 256) for states in possible], axis=1).astype(np.uint8)
        self.rows = rng.choice(rng.permutation(256)[:5], shape).astype(np.uint8)
        self.overlaps, self.contradictions = overlaps or {}, list(contradictions)

    @property
    def states(self):
        return self.table[self.rows]

    @property
    def dataset(self):
        return self.name.split("/")[0]

    def record(self):
        return {
            "crop": self.name,
            "dataset": self.dataset,
            "em_stats": {"histogram": np.bincount(self.image[self.valid], minlength=256).tolist()},
            "counts": count_states(self.rows, self.table, CLASSES),
            "annotated": self.annotated,
            "overlaps": self.overlaps,
            "contradictions": self.contradictions,
        }


ANY = (ABSENT, PRESENT, UNKNOWN)
POSSIBLE = st.tuples(*[st.sampled_from([(ABSENT,), (UNKNOWN,), (ABSENT, UNKNOWN), (PRESENT, ABSENT), ANY])] * 3)
ANNOTATED = st.lists(st.sampled_from(CLASSES), unique=True)


@st.composite
def crops(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    return [
        Crop(rng, f"{draw(st.sampled_from('ab'))}/crop{i}", annotated=draw(ANNOTATED), possible=draw(POSSIBLE))
        for i in range(draw(st.integers(0, 5)))
    ]


few = settings(max_examples=60, deadline=None, derandomize=True)


@few
@given(crops())
def test_every_class_is_counted_as_in_the_voxels_themselves(volumes):
    summary = summarise("8nm", (crop.record() for crop in volumes), CLASSES)
    for column, name in enumerate(CLASSES):
        states = [crop.states[..., column] for crop in volumes]
        n = {s: sum(int((part == s).sum()) for part in states) for s in ANY}
        here = [name in crop.annotated for crop in volumes]
        known = [part[part != UNKNOWN] for part in states]
        inferred = sum(part.size for part, own in zip(known, here, strict=True) if not own)
        without = [bool(part.size) and not part.any() for part in known]
        everywhere = [own or k.size == s.size for own, k, s in zip(here, known, states, strict=True)]
        supervised = np.concatenate([part.ravel() for part in known]) if known else np.empty(0)
        assert summary["classes"][name] == {
            "crops_annotated": sum(here),
            "crops_present": sum(bool(part.any()) for part in known),
            "crops_absent": sum(a and b for a, b in zip(without, everywhere, strict=True)),
            "present": n[PRESENT],
            "absent": n[ABSENT],
            "unknown": n[UNKNOWN],
            "supervised": supervised.size,
            "inferred": inferred,
            "foreground_fraction": pytest.approx(supervised.mean(), abs=1e-8) if supervised.size else None,
            "imbalance": pytest.approx(n[ABSENT] / n[PRESENT], abs=1e-4) if n[PRESENT] else None,
        }
    assert summary["supervised_pairs"] == sum(int((crop.states != UNKNOWN).sum()) for crop in volumes)


@few
@given(crops())
def test_intensities_are_those_of_the_valid_voxels_pooled_per_dataset(volumes):
    summary = summarise("8nm", (crop.record() for crop in volumes), CLASSES)
    assert set(summary["datasets"]) == {crop.dataset for crop in volumes}
    for dataset, entry in summary["datasets"].items():
        voxels = np.concatenate([crop.image[crop.valid] for crop in volumes if crop.dataset == dataset])
        assert entry["voxels"] == voxels.size
        assert entry["ranges"] == {
            "percentile": pytest.approx(np.percentile(voxels, [0.5, 99.5])),
            "range": [voxels.min(), voxels.max()],
        }
        assert entry["mean"] == pytest.approx(voxels.mean(), abs=1e-3)
        assert entry["std"] == pytest.approx(voxels.std(), abs=1e-3)


@few
@given(crops(), st.integers(0, 100))
def test_the_numbering_of_the_label_map_changes_nothing(volumes, seed):
    before = summarise("8nm", [crop.record() for crop in volumes], CLASSES)
    for crop in volumes:
        order = np.random.default_rng(seed).permutation(256)
        crop.table[order] = crop.table.copy()
        crop.rows = order.astype(np.uint8)[crop.rows]
    assert summarise("8nm", [crop.record() for crop in volumes], CLASSES) == before


def counted(crop, annotated, **states):
    counts = {name: dict(zip(("present", "absent", "unknown"), states[name], strict=True)) for name in CLASSES}
    histogram = np.bincount([90, 120, 150], minlength=256).tolist()
    return {"crop": crop, "dataset": "a", "em_stats": {"histogram": histogram}, "counts": counts,
            "annotated": annotated, "overlaps": {}, "contradictions": []}  # fmt: skip


def test_a_true_negative_is_annotated_or_known_in_every_voxel():
    records = [
        counted("a/crop1", ["pm", "mito"], pm=(10, 90, 0), mito=(0, 90, 10), nuc=(0, 100, 0)),
        counted("a/crop2", ["pm"], pm=(0, 100, 0), mito=(0, 10, 90), nuc=(0, 0, 100)),
        counted("a/crop3", ["nuc"], pm=(0, 0, 100), mito=(0, 0, 100), nuc=(0, 0, 100)),
    ]
    classes = summarise("8nm", records, CLASSES)["classes"]
    assert {name: entry["crops_absent"] for name, entry in classes.items()} == {"pm": 1, "mito": 1, "nuc": 1}
    assert {name: entry["crops_annotated"] for name, entry in classes.items()} == {"pm": 2, "mito": 1, "nuc": 1}
    assert {name: entry["inferred"] for name, entry in classes.items()} == {"pm": 0, "mito": 10, "nuc": 100}
    assert classes["pm"]["imbalance"] == 19 and classes["nuc"]["imbalance"] is None


def test_overlaps_are_added_up_and_every_contradiction_names_its_crop():
    rng = np.random.default_rng(1)
    pairs = [{"mito+pm": 3}, {"mito+pm": 4, "ecs+pm": 1}, {"mito+nuc": 0}]
    sentences = [["one"], [], ["two", "three"]]
    volumes = [
        Crop(rng, f"a/crop{i}", annotated=["pm"], possible=[ANY] * 3, overlaps=pairs[i], contradictions=sentences[i])
        for i in range(3)
    ]
    summary = summarise("8nm", [crop.record() for crop in volumes], CLASSES)
    assert summary["overlaps"] == {"ecs+pm": 1, "mito+pm": 7}
    assert summary["contradictions"] == ["a/crop0: one", "a/crop2: two", "a/crop2: three"]
    json.dumps(summary, allow_nan=False)


def test_records_are_taken_one_at_a_time():
    alive, most = Counter(), 0

    class Watched(dict):
        def __init__(self, *args):
            super().__init__(*args)
            alive["records"] += 1

        def __del__(self):
            alive["records"] -= 1

    def stream():
        nonlocal most
        for i in range(20):
            states = dict.fromkeys(CLASSES, (1, 1, 1))
            yield Watched(counted(f"a/crop{i}", ["pm"], **states))
            most = max(most, alive["records"])

    assert summarise("8nm", stream(), CLASSES)["classes"]["pm"]["present"] == 20
    assert most <= 2


def test_no_kept_crop_gives_empty_statistics():
    summary = summarise("8nm", [], CLASSES)
    assert summary["datasets"] == {} and summary["supervised_pairs"] == 0
    assert summary["classes"]["pm"]["present"] == 0
    assert summary["classes"]["nuc"]["foreground_fraction"] is None
