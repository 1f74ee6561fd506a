"""Statistics of kept crops: from histograms and counts by state, equal to those of the voxels themselves."""

import numpy as np
import pytest

from cellmap_pipe.prepare.statistics import summarise

CLASSES = ["pm", "mito", "nuc"]


def record(crop, dataset, image, valid, counts, annotated):
    histogram = np.bincount(image[valid], minlength=256)
    return {
        "crop": crop,
        "dataset": dataset,
        "em_stats": {"histogram": histogram.tolist()},
        "counts": {name: dict(zip(("present", "absent", "unknown"), counts[name], strict=True)) for name in CLASSES},
        "annotated": annotated,
    }


@pytest.fixture
def volumes():
    rng = np.random.default_rng(3)
    images = [rng.integers(lo, hi, (6, 7, 8)).astype(np.uint8) for lo, hi in ((20, 90), (60, 220), (0, 255))]
    valid = [rng.random((6, 7, 8)) < share for share in (1.0, 0.6, 0.9)]
    return images, valid


@pytest.fixture
def summary(volumes):
    images, valid = volumes
    counts = [
        {"pm": (10, 90, 0), "mito": (0, 100, 0), "nuc": (0, 0, 100)},
        {"pm": (30, 60, 10), "mito": (5, 95, 0), "nuc": (0, 0, 100)},
        {"pm": (0, 0, 100), "mito": (0, 40, 60), "nuc": (0, 0, 100)},
    ]
    annotated = [["pm", "mito"], ["pm", "mito"], ["pm"]]
    datasets = ["a", "a", "b"]
    return summarise(
        "8nm",
        [record(f"{d}/crop{i}", d, images[i], valid[i], counts[i], annotated[i]) for i, d in enumerate(datasets)],
        CLASSES,
    )


def test_intensities_are_those_of_the_valid_voxels_pooled_per_dataset(volumes, summary):
    images, valid = volumes
    pooled = {"a": np.concatenate([images[0][valid[0]], images[1][valid[1]]]), "b": images[2][valid[2]]}
    assert set(summary["datasets"]) == {"a", "b"}
    for dataset, voxels in pooled.items():
        entry = summary["datasets"][dataset]
        assert entry["voxels"] == voxels.size
        for q in (0.5, 99.5):
            assert entry["percentiles"][f"{q:g}"] == pytest.approx(np.percentile(voxels, q))
        assert entry["mean"] == pytest.approx(voxels.mean(), abs=1e-3)
        assert entry["std"] == pytest.approx(voxels.std(), abs=1e-3)


def test_classes_are_counted_by_state_where_they_are_known(summary):
    assert summary["classes"]["pm"] == {
        "crops_annotated": 3,
        "crops_present": 2,
        "present": 40,
        "absent": 150,
        "unknown": 110,
        "foreground_fraction": pytest.approx(40 / 190, abs=1e-8),
    }


def test_class_known_nowhere_has_no_foreground_fraction(summary):
    assert summary["classes"]["nuc"]["foreground_fraction"] is None
    assert summary["classes"]["nuc"]["crops_annotated"] == 0


def test_no_kept_crop_gives_empty_statistics():
    summary = summarise("8nm", [], CLASSES)
    assert summary["datasets"] == {}
    assert summary["classes"]["pm"]["present"] == 0
