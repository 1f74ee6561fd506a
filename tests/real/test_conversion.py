"""Real EM in the challenge's layout: every crop is converted, and the counts are those that come with the data."""

import json
from pathlib import Path

import numpy as np
import pytest

from cellmap_pipe.prepare.convert import bulk_paths, read_nifti
from cellmap_pipe.prepare.labels import UNKNOWN
from cellmap_pipe.prepare.state_table import decode_table

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "real-em"
CLASSES = ["pm", "mito", "cyto", "nuc"]

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")


@pytest.fixture(scope="module")
def expected():
    return json.loads((DATA / "expected.json").read_text())


@pytest.fixture(scope="module")
def converted(real_em):
    return real_em.nifti, real_em.records


def test_every_crop_has_the_expected_voxels_and_geometry(converted, expected):
    _, records = converted
    assert set(records) == set(expected)
    for crop, truth in expected.items():
        record = records[crop]
        counts = {
            name: {k: entry[k] for k in ("present", "absent", "unknown")} for name, entry in truth["classes"].items()
        }
        assert record["source_counts"] == counts, crop
        if truth["classes"]:
            assert record["label_lattice"]["voxel_nm"] == truth["voxel_nm"], crop
            assert record["label_lattice"]["translation_nm"] == truth["translation_nm"], crop


def test_all_crops_but_the_unannotated_one_are_converted(converted):
    folder, records = converted
    failed = {crop: record["cause"] for crop, record in records.items() if record["status"] == "failed"}
    assert failed == {"fly_medulla-3/crop304": "nothing annotated"}
    for crop, record in records.items():
        if record["status"] == "ok":
            paths, shape = bulk_paths(folder, crop), tuple(record["lattice"]["shape"])
            assert read_nifti(paths["image"]).shape == read_nifti(paths["label"]).shape == shape
            assert record["lattice"]["voxel_nm"] == [10, 10, 10]


def test_the_level_follows_nanometres_not_names(converted):
    _, records = converted
    assert {crop.split("/")[1]: r["em_level"]["factors"][2] for crop, r in records.items() if r["em_level"]} == (
        pytest.approx(
            {f"crop{n}": 1.0 for n in (101, 102, 201, 202, 203, 301, 302, 303, 305)}
            | {"crop401": 10 / 4.6, "crop402": 10 / 4.6}
        )
    )
    assert records["fly_vnc-1/crop401"]["em_level"]["factors"][0] == pytest.approx(10 / 47.5)


def test_em_that_is_not_on_disk_is_not_valid(converted):
    _, records = converted
    assert records["fly_medulla-3/crop303"]["em_valid_fraction"] == 0
    assert records["fly_medulla-3/crop303"]["em_inside_fraction"] == 1
    others = [
        r for crop, r in records.items() if r["status"] == "ok" and crop.split("/")[1] not in ("crop303", "crop203")
    ]
    assert all(record["em_valid_fraction"] == 1 for record in others)


def test_labels_beyond_the_em_are_unknown(converted):
    folder, records = converted
    record = records["fly_medulla-1/crop203"]
    label = read_nifti(bulk_paths(folder, "fly_medulla-1/crop203")["label"])
    image = read_nifti(bulk_paths(folder, "fly_medulla-1/crop203")["image"])
    state = decode_table(record["table"], len(CLASSES))[label]
    assert (state[:, :, 120:] == UNKNOWN).all() and not image[:, :, 120:].any()
    assert not (state[:, :, :120, CLASSES.index("mito")] == UNKNOWN).any()
    assert record["em_inside_fraction"] == pytest.approx(120 / 140, abs=1e-6)


def test_annotation_overlaps_are_counted(converted):
    _, records = converted
    assert {crop: r["overlaps"] for crop, r in records.items() if r["overlaps"]} == {
        "fly_medulla-2/crop101": {"pm+mito": 8968}
    }


def test_a_class_that_is_not_annotated_is_unknown_except_where_another_excludes_it(converted):
    folder, records = converted
    record = records["fly_medulla-2/crop102"]
    state = decode_table(record["table"], len(CLASSES))[
        read_nifti(bulk_paths(folder, "fly_medulla-2/crop102")["label"])
    ]
    pm, others = state[..., 0], state[..., 1:]
    assert (others[pm == 1] == 0).all() and np.all(others[pm != 1] == UNKNOWN)
