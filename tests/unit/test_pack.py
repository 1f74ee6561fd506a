import json
import shutil
import sys
import zipfile
from pathlib import Path

import cc3d
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from submission_case import (
    LABELS,
    SHAPE,
    TRANSLATION,
    VOXEL,
    rewrite,
    segmentation,
    volumes_of,
    write,
    write_manifest,
    zipped,
)

from cellmap_pipe.errors import ConfigError, ContractError, DataError
from cellmap_pipe.evaluation import submission
from cellmap_pipe.evaluation.container import open_container
from cellmap_pipe.evaluation.flight import validate
from cellmap_pipe.evaluation.manifest import read_manifest
from cellmap_pipe.evaluation.official import score_submission
from cellmap_pipe.evaluation.submission import pack


def test_packed_submission_answers_every_row_and_passes_the_check(tmp_path):
    manifest = write_manifest(tmp_path / "manifest.csv", ["1", "2", "3"], [*LABELS, "pm"])
    pack(segmentation(tmp_path), manifest, tmp_path / "s.zip", tmp_path / "report.json", rules="csc-2026.06", workers=2)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["problems"] == [] and report["warnings"] == []
    assert report["rows"] == 15
    empty = ["crop1/pm", "crop2/pm", *(f"crop3/{label}" for label in sorted([*LABELS, "pm"]))]
    assert report["zero_rows"] == report["not_predicted"] == empty
    container = open_container(tmp_path / "s.zip")
    for crop in (1, 2):
        for label, values in volumes_of(crop).items():
            array = container.array(f"crop{crop}", label)
            assert np.array_equal(array[:], values)
            assert array.attributes == {"voxel_size": VOXEL, "translation": TRANSLATION, "shape": SHAPE}
            assert array.dtype == (np.uint16 if label in ("mito", "nuc") else np.uint8)
    assert not container.array("crop3", "mito")[:].any()


def test_packed_zip_is_plain_zarr_v2_and_scores_like_the_segmentation(tmp_path):
    manifest = write_manifest(tmp_path / "manifest.csv")
    source = segmentation(tmp_path)
    pack(source, manifest, tmp_path / "s.zip", tmp_path / "report.json")
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        archive.extractall(tmp_path / "s.zarr")
    group = zarr.open_group(tmp_path / "s.zarr", mode="r", zarr_format=2)
    assert np.array_equal(group["crop1/mito"][:], volumes_of(1)["mito"])
    truth = tmp_path / "truth.zarr"
    for crop in (1, 2):
        for label, values in volumes_of(crop + 5).items():
            write(truth, f"crop{crop}/{label}", values)
    assert score_submission(tmp_path / "s.zip", truth)["records"] == score_submission(source, truth)["records"]


def test_same_input_gives_the_same_bytes(tmp_path):
    manifest, source = write_manifest(tmp_path / "manifest.csv"), segmentation(tmp_path)
    for name, workers in (("a", 1), ("b", 3)):
        pack(source, manifest, tmp_path / f"{name}.zip", tmp_path / f"{name}.json", workers=workers)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_groups_are_formed_from_their_parts(tmp_path):
    mito = volumes_of(1)["mito"]
    record = {
        "name": "jrc_x/crop1",
        "dataset": "jrc_x",
        "status": "ok",
        "cause": "",
        "path": "v.zarr",
        "classes": ["mito_mem", "mito_lum", "mito_ribo", "golgi_mem", "golgi_lum", "er_mem", "er_mem_all"],
        "approximate": {"er_mem_all": ["eres_mem", "ne_mem"]},
        "target": {"voxel_nm": VOXEL, "translation_nm": TRANSLATION, "shape": SHAPE},
    }
    write(tmp_path, "v.zarr/mito_mem/s0", mito == 1)
    write(tmp_path, "v.zarr/mito_lum/s0", (mito == 2).astype(np.uint8))
    write(tmp_path, "v.zarr/golgi_mem/s0", (mito == 1).astype(np.uint8))
    write(tmp_path, "v.zarr/golgi_lum/s0", (mito == 2).astype(np.uint8))
    for label in ("mito_ribo", "er_mem", "er_mem_all"):
        write(tmp_path, f"v.zarr/{label}/s0", np.zeros(SHAPE, np.uint8))
    (tmp_path / "test.json").write_text(json.dumps({"records": [record]}))
    manifest = write_manifest(tmp_path / "manifest.csv", ["1"], ["mito", "golgi", "er", "er_mem_all"])
    pack(tmp_path / "test.json", manifest, tmp_path / "s.zip", tmp_path / "report.json")
    container = open_container(tmp_path / "s.zip")
    assert np.array_equal(container.array("crop1", "golgi")[:], (mito > 0).astype(np.uint8))
    assert np.array_equal(container.array("crop1", "mito")[:], mito)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["not_predicted"] == ["crop1/er"]
    assert report["approximate"] == {"crop1/er_mem_all": ["eres_mem", "ne_mem"]}


def test_the_report_names_the_segmentations_that_were_packed(tmp_path):
    manifest, source = write_manifest(tmp_path / "manifest.csv"), segmentation(tmp_path)
    content = json.loads(source.read_text())
    for record, fingerprint in zip(content["records"], ("a" * 64, "b" * 64), strict=True):
        record["fingerprint"] = fingerprint
    source.write_text(json.dumps(content))
    _, report = packed(tmp_path, source, manifest)
    assert report["segmentations"] == {"jrc_x/crop1": "a" * 64, "jrc_x/crop2": "b" * 64}


def test_predictions_of_another_pipeline_have_no_fingerprints(tmp_path):
    write(tmp_path, "p.zarr/crop1/er", volumes_of(1)["er"])
    _, report = packed(tmp_path, tmp_path / "p.zarr", write_manifest(tmp_path / "manifest.csv", ["1"], ["er"]))
    assert report["segmentations"] is None


def test_progress_counts_the_arrays(tmp_path):
    told = []
    manifest = write_manifest(tmp_path / "manifest.csv", ["1"])
    pack(
        segmentation(tmp_path, [1]),
        manifest,
        tmp_path / "s.zip",
        tmp_path / "report.json",
        progress=lambda *counts: told.append(counts),
    )
    assert told == [(done, 4) for done in (1, 2, 3, 4)]


def test_groups_of_foreign_predictions_are_formed_without_some_of_their_parts_and_named(tmp_path):
    mito = volumes_of(1)["mito"]
    write(tmp_path, "p.zarr/crop1/mito_mem", (mito == 1).astype(np.uint8))
    write(tmp_path, "p.zarr/crop1/mito_lum", (mito == 2).astype(np.uint8))
    manifest = write_manifest(tmp_path / "manifest.csv", ["1"], ["mito", "cell", "golgi"])
    pack(tmp_path / "p.zarr", manifest, tmp_path / "s.zip", tmp_path / "report.json")
    container = open_container(tmp_path / "s.zip")
    assert np.array_equal(container.array("crop1", "mito")[:] > 0, mito > 0)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["approximate"] == {"crop1/mito": ["mito_ribo"]}
    assert report["not_predicted"] == ["crop1/cell", "crop1/golgi"]


def test_other_voxels_are_resampled_to_the_manifest_once(tmp_path):
    """Twice the voxel, same box: nearest ids and edges aligned."""
    geometry = ([2.0, 4.0, 4.0], [9.0, 98.5, 198.0], [48, 40, 44])
    manifest = write_manifest(tmp_path / "manifest.csv", ["1"], ["mito", "nuc"], geometry)
    pack(segmentation(tmp_path, [1]), manifest, tmp_path / "s.zip", tmp_path / "report.json")
    stored = open_container(tmp_path / "s.zip").array("crop1", "mito")
    assert np.array_equal(stored[:], volumes_of(1)["mito"].repeat(2, 0).repeat(2, 1).repeat(2, 2))
    assert json.loads((tmp_path / "report.json").read_text())["problems"] == []


def test_rows_without_label_or_geometry_take_them_from_the_segmentation(tmp_path):
    manifest = write_manifest(tmp_path / "manifest.csv", ["1"], [""], ("", "", ""))
    pack(segmentation(tmp_path, [1]), manifest, tmp_path / "s.zip", tmp_path / "report.json", classes=["ecs"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["rows"], report["not_predicted"], report["problems"]) == (5, ["crop1/ecs"], [])


def test_failed_volumes_become_zeros_and_broken_contracts_are_named(tmp_path):
    manifest = write_manifest(tmp_path / "manifest.csv", ["1"])
    failed = segmentation(tmp_path, [1], status="failed")
    pack(failed, manifest, tmp_path / "s.zip", tmp_path / "report.json")
    assert len(json.loads((tmp_path / "report.json").read_text())["zero_rows"]) == 4
    source = segmentation(tmp_path, [1])
    shutil.rmtree(tmp_path / "volumes/jrc_x_crop1.zarr/er")
    (tmp_path / "s.zip").unlink()
    with pytest.raises(ContractError, match="er: missing; run again with -R segment"):
        pack(source, manifest, tmp_path / "s.zip", tmp_path / "report.json")
    assert not (tmp_path / "s.zip").exists()


def test_failed_volumes_still_give_their_rows_a_geometry(tmp_path):
    manifest = write_manifest(tmp_path / "manifest.csv", ["1"], ["er"], ("", "", ""))
    source = segmentation(tmp_path, [1], status="failed")
    pack(source, manifest, tmp_path / "s.zip", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["zero_rows"], report["problems"]) == (["crop1/er"], [])
    content = json.loads(source.read_text())
    del content["records"][0]["target"]
    source.write_text(json.dumps(content))
    pack(source, manifest, tmp_path / "s.zip", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"] == 0 and "crop1: no geometry" in report["problems"][0]


def test_ids_beyond_uint16_are_kept(tmp_path):
    source = segmentation(tmp_path, [1])
    big = volumes_of(1)["mito"].astype(np.uint32) * 70_000
    rewrite(tmp_path / "volumes", "jrc_x_crop1.zarr/mito/s0", big)
    pack(source, write_manifest(tmp_path / "m.csv", ["1"]), tmp_path / "s.zip", tmp_path / "r.json")
    array = open_container(tmp_path / "s.zip").array("crop1", "mito")
    assert array.dtype == np.uint32 and np.array_equal(array[:], big)


def packed(tmp_path, predictions, manifest, **options):
    """Pack and return the container of the submission and its report."""
    pack(predictions, manifest, tmp_path / "s.zip", tmp_path / "r.json", **options)
    return open_container(tmp_path / "s.zip"), json.loads((tmp_path / "r.json").read_text())


def write_predictions(root, crops=("crop1", "crop2")):
    for crop in crops:
        for label, values in volumes_of(int(crop[-1])).items():
            write(root, f"{crop}/{label}", values)
    return root


def test_a_zarr_folder_a_zip_and_segmentations_give_the_same_submission(tmp_path):
    manifest = write_manifest(tmp_path / "m.csv")
    folder = write_predictions(tmp_path / "p.zarr")
    reports = []
    for predictions in (folder, zipped(folder), segmentation(tmp_path)):
        _, report = packed(tmp_path, predictions, manifest)
        assert report["problems"] == report["warnings"] == report["not_predicted"] == []
        reports.append(report)
    fingerprints = [report.pop("segmentations") for report in reports]
    assert fingerprints[:2] == [None, None] and set(fingerprints[2]) == {"jrc_x/crop1", "jrc_x/crop2"}
    assert reports[0] == reports[1] == reports[2]


def write_levels(root, name, label, values, metadata=True):
    """Write an image of three levels: 2, 1 and 1/2 times the values' resolution, edges aligned."""
    voxel = np.array(VOXEL)
    lower = np.array(TRANSLATION) - voxel / 2
    fine = values.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    datasets = []
    for path, array, scale in (
        ("s0", fine, voxel / 2),
        ("s1", values, voxel),
        ("s2", values[::2, ::2, ::2], voxel * 2),
    ):
        place = {"voxel_size": scale.tolist(), "translation": (lower + scale / 2).tolist()}
        write(root, f"{name}/{label}/{path}", array, **(place if not metadata else {"voxel_size": None}))
        transformations = [{"type": "scale", "scale": place["voxel_size"]}]
        transformations.append({"type": "translation", "translation": place["translation"]})
        datasets.append({"path": path, "coordinateTransformations": transformations})
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    multiscales = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    (root / name / label / ".zgroup").write_text('{"zarr_format": 2}')
    (root / name / label / ".zattrs").write_text(json.dumps({"multiscales": multiscales} if metadata else {}))


@pytest.mark.parametrize("metadata", [True, False])
def test_of_several_levels_the_one_of_the_manifest_is_packed(tmp_path, metadata):
    mito = volumes_of(1)["mito"]
    write_levels(tmp_path / "p.zarr", "crop1", "mito", mito, metadata)
    manifest = write_manifest(tmp_path / "m.csv", ["1"], ["mito"])
    container, report = packed(tmp_path, tmp_path / "p.zarr", manifest)
    assert report["problems"] == report["warnings"] == []
    assert np.array_equal(container.array("crop1", "mito")[:], mito)
    double = write_manifest(tmp_path / "m.csv", ["1"], ["mito"], ([2.0, 4.0, 4.0], [9.0, 98.5, 198.0], [48, 40, 44]))
    container, report = packed(tmp_path, zipped(tmp_path / "p.zarr"), double)
    assert report["problems"] == report["warnings"] == []
    assert np.array_equal(container.array("crop1", "mito")[:], mito.repeat(2, 0).repeat(2, 1).repeat(2, 2))


def test_multiscales_that_are_not_understood_are_named(tmp_path):
    write_levels(tmp_path / "p.zarr", "crop1", "mito", volumes_of(1)["mito"])
    path = tmp_path / "p.zarr/crop1/mito/.zattrs"
    path.write_text(path.read_text().replace('"name": "z"', '"name": "t"'))
    with pytest.raises(DataError, match=r"crop1/mito/.zattrs: axes \['t', 'y', 'x'\] are not supported"):
        packed(tmp_path, tmp_path / "p.zarr", write_manifest(tmp_path / "m.csv", ["1"], ["mito"]))


def test_probabilities_are_resampled_before_they_are_compared(tmp_path):
    """A boundary that the probabilities put between two voxels stays there on finer voxels."""
    ramp = np.broadcast_to(np.linspace(0.0, 1.0, 11, dtype=np.float32), (4, 4, 11))
    write(tmp_path / "p.zarr", "crop1/er", ramp, voxel_size=[8.0] * 3, translation=[0.0] * 3)
    manifest = write_manifest(tmp_path / "m.csv", ["1"], ["er"], ([4.0] * 3, [-2.0] * 3, [8, 8, 22]))
    container, report = packed(tmp_path, tmp_path / "p.zarr", manifest)
    stored = container.array("crop1", "er")
    assert stored.dtype == np.uint8 and report["problems"] == []
    # The centres of fine voxels lie at -2, 2, 6 ... nm; the ramp passes 0.5 at voxel 5, 40 nm
    assert np.array_equal(stored[:], np.broadcast_to(np.arange(22) * 4 - 2 > 40, (8, 8, 22)))


def test_probabilities_on_the_voxels_of_the_manifest_are_compared_with_a_half(tmp_path):
    values = np.random.default_rng(0).random(SHAPE, np.float32)
    write(tmp_path / "p.zarr", "crop1/er", values)
    container, _ = packed(tmp_path, tmp_path / "p.zarr", write_manifest(tmp_path / "m.csv", ["1"], ["er"]))
    assert np.array_equal(container.array("crop1", "er")[:], values > 0.5)


def test_predictions_of_other_boxes_are_shifted_and_filled_up(tmp_path):
    mito = volumes_of(1)["mito"]
    corner = [t + 3 * v for t, v in zip(TRANSLATION, VOXEL, strict=True)]
    write(tmp_path / "p.zarr", "crop1/mito", mito[3:, 3:, 3:], translation=corner)
    container, report = packed(tmp_path, tmp_path / "p.zarr", write_manifest(tmp_path / "m.csv", ["1"], ["mito"]))
    expected = mito.copy()
    expected[:3], expected[:, :3], expected[:, :, :3] = 0, 0, 0
    assert np.array_equal(container.array("crop1", "mito")[:], expected)
    assert report["problems"] == [] and "crop1/mito: part of the crop" in report["warnings"][0]


@pytest.mark.parametrize(
    ("attributes", "fault"),
    [
        ({"translation": TRANSLATION[::-1]}, "outside the crop"),
        ({"translation": [TRANSLATION[0] + 2, *TRANSLATION[1:]]}, "between the voxels"),
        ({"translation": None}, "no geometry"),
        ({"voxel_size": None}, "no geometry"),
    ],
)
def test_predictions_that_lie_elsewhere_are_reported(tmp_path, attributes, fault):
    manifest = write_manifest(tmp_path / "m.csv", ["1"], ["mito"], (VOXEL, TRANSLATION, SHAPE))
    write(tmp_path / "p.zarr", "crop1/mito", volumes_of(1)["mito"], **attributes)
    container, report = packed(tmp_path, tmp_path / "p.zarr", manifest)
    lines = report["problems"] + report["warnings"]
    assert any(f"crop1/mito: {fault}: " in line for line in lines), lines
    assert container.array("crop1", "mito")[:].any() == (fault != "outside the crop")


@pytest.mark.parametrize(
    ("label", "values", "fault"),
    [
        ("mito", lambda v: v.astype(np.float32), "ids of dtype float32; integers"),
        ("mito", lambda v: -v.astype(np.int32), "negative ids"),
        ("mito", lambda v: v.astype(np.uint64) << 33, "ids above 2\\^32"),
        ("er", lambda v: np.full(SHAPE, np.nan, np.float32), "NaN or infinity"),
        ("er", lambda v: np.ones(SHAPE, complex), "dtype complex128"),
        ("er", lambda v: np.ones((4, 4), np.uint8), "three"),
    ],
)
def test_values_that_cannot_be_packed_are_refused_with_their_array(tmp_path, label, values, fault):
    write(tmp_path / "p.zarr", f"crop1/{label}", values(volumes_of(1)["mito"]))
    with pytest.raises(DataError, match=rf"crop1/{label}: .*{fault}"):
        packed(tmp_path, tmp_path / "p.zarr", write_manifest(tmp_path / "m.csv", ["1"], [label]))
    assert not (tmp_path / "s.zip").exists()


def test_what_the_check_of_the_result_cannot_see_is_reported(tmp_path):
    mito = volumes_of(1)["mito"].astype(np.uint8)
    mito[0, 0, 0] = 255
    write_predictions(tmp_path / "p.zarr", ["crop1"])
    rewrite(tmp_path / "p.zarr", "crop1/mito", mito)
    rewrite(tmp_path / "p.zarr", "crop1/er", volumes_of(1)["mito"])
    write(tmp_path / "p.zarr", "crop77/er", volumes_of(1)["er"])
    _, report = packed(tmp_path, tmp_path / "p.zarr", write_manifest(tmp_path / "m.csv", ["1"]))
    assert report["problems"] == []
    assert ["crop1/mito", "dtype that wraps ids"] in [line.split(": ")[:2] for line in report["warnings"]]
    assert ["crop1/er", "ids in a semantic class"] in [line.split(": ")[:2] for line in report["warnings"]]
    assert ["crop77", "extra crop"] in [line.split(": ")[:2] for line in report["warnings"]]


def test_damaged_and_absent_predictions_are_one_clear_line(tmp_path):
    manifest = write_manifest(tmp_path / "m.csv", ["1"])
    root = write_predictions(tmp_path / "p.zarr", ["crop1"])
    next(root.glob("crop1/er/[0-9]*")).write_bytes(b"broken")
    with pytest.raises(DataError, match=r"crop1/er/.*damaged chunk"):
        packed(tmp_path, root, manifest)
    with pytest.raises(DataError, match="there is no such submission"):
        packed(tmp_path, tmp_path / "absent.zarr", manifest)
    with pytest.raises(ContractError, match=r"absent.json: cannot be read"):
        packed(tmp_path, tmp_path / "absent.json", manifest)
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(DataError, match="holds no arrays"):
        packed(tmp_path, tmp_path / "empty.zarr", manifest)
    source = segmentation(tmp_path)
    shutil.rmtree(tmp_path / "volumes/jrc_x_crop2.zarr")
    with pytest.raises(ContractError, match=r"jrc_x_crop2\.zarr: the segmentation of jrc_x/crop2 is missing"):
        packed(tmp_path, source, manifest)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.05, 0.2, 0.5]), layer=st.sampled_from([7, 12]))
def test_instance_groups_are_the_components_of_the_union_of_their_parts(tmp_path_factory, seed, share, layer):
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("group")
    parts = {label: (rng.random(SHAPE) < share).astype(np.uint8) for label in ("mito_mem", "mito_lum", "mito_ribo")}
    for label, values in parts.items():
        write(path / "p.zarr", f"crop1/{label}", values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submission, "CHUNK", layer)
        container, _ = packed(path, path / "p.zarr", write_manifest(path / "m.csv", ["1"], ["mito"]))
    union = np.logical_or.reduce([values > 0 for values in parts.values()])
    assert np.array_equal(container.array("crop1", "mito")[:], cc3d.connected_components(union.astype(np.uint8)))


def write_scores(path, labels, present):
    """Write validation scores of ten crops, `present` of which have the classes."""
    records = [
        {"crop": f"d/crop{i}", "label": label, "status": "scored", "tp": int(i < present), "fp": 1, "fn": 0}
        | ({"hausdorff_norm_sum": 1.0, "n_hausdorff": 2} if label in ("mito", "nuc") else {})
        for i in range(10)
        for label in labels
    ]
    path.write_text(json.dumps({"model": "ensemble", "rules": "csc-2026.07", "records": records, "clean_records": []}))
    return [path]


def test_the_report_forecasts_the_score_of_what_is_in_the_package(tmp_path):
    manifest = write_manifest(tmp_path / "m.csv", ["1"], [*LABELS, "pm"])
    source = write_predictions(tmp_path / "p.zarr", ["crop1"])
    rewrite(source, "crop1/er", np.zeros(SHAPE, np.uint8))
    _, report = packed(tmp_path, source, manifest, scores=write_scores(tmp_path / "v.json", ["mito", "er"], 9))
    predicted = report["forecast"]
    assert (predicted["unanswered"], predicted["unvalidated"]) == (["er", "pm"], ["mito_mem", "nuc"])
    assert (predicted["source"], predicted["rules"], predicted["provisional"]) == ("ensemble", "csc-2026.07", True)
    assert "provisional" in predicted["note"]
    assert 0 == predicted["score"] < predicted["overall_instance_score"]
    empty = [line for line in report["warnings"] if "all empty" in line]
    assert len(empty) == 1 and "crop1/er" in empty[0] and "9 of 10 validation crops have it" in empty[0]
    _, report = packed(tmp_path, source, manifest, scores=write_scores(tmp_path / "v.json", ["mito", "er"], 4))
    assert not any("all empty" in line for line in report["warnings"])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a,b\n1,2\n", "columns"),
        ("crop_name,class_label,voxel_size,translation,shape\n1,er,[4;4],[0;0;0],[4;4;4]\n", "line 2"),
        ("crop_name,class_label,voxel_size,translation,shape\n1,er,[4;4;x],[0;0;0],[4;4;4]\n", "line 2"),
        ("\ncrop_name,class_label,voxel_size,translation,shape\n\n1,er,[4;4;x],[0;0;0],[4;4;4]\n", "line 4"),
        ("crop_name,class_label,voxel_size,translation,shape\n1,er,[4;4;4],[0;0;0],[4.5;4;4]\n", "whole number"),
        ("crop_name,class_label,voxel_size,translation,shape\n1,er,[4;4;4],[0;0;0],[inf;4;4]\n", "line 2"),
        ("class_label,crop_name,voxel_size,translation,shape\ner\n", "line 2: crop_name is empty"),
        ("crop_name,class_label,voxel_size,translation,shape\n", "no rows"),
        ("crop_name;class_label;voxel_size\n1;er;4\n", "commas between them; it begins with 'crop_name;"),
        ("", "it is empty"),
        ('"' + "x" * 200_000, "no table of text"),
    ],
)
def test_unusable_manifests_are_refused(tmp_path, text, fault):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ConfigError, match=fault):
        read_manifest(tmp_path / "m.csv")


def test_a_manifest_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "m.csv").write_bytes("crop_name,class_label".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"m\.csv: is no table of text in UTF-8"):
        read_manifest(tmp_path / "m.csv")


def test_manifests_are_read_as_spreadsheets_write_them(tmp_path):
    plain = write_manifest(tmp_path / "m.csv")
    lines = plain.read_text().splitlines()
    text = "\r\n".join(["", *lines[:3], "", *lines[2:], ",,,,,", "  "])
    (tmp_path / "other.csv").write_text("\ufeff" + text.replace(",", ", "))
    assert read_manifest(tmp_path / "other.csv") == read_manifest(plain)


def test_predictions_of_zarr_v3_are_never_packed_as_zeros_in_silence(tmp_path):
    root = write_predictions(tmp_path / "p.zarr")
    shutil.rmtree(root / "crop1/er")
    write(root, "crop1/er", volumes_of(1)["er"], zarr_format=3)
    write(root, "crop2/pm/deep/er", volumes_of(2)["er"])
    _, report = packed(tmp_path, root, write_manifest(tmp_path / "m.csv", labels=[*LABELS, "pm"]))
    assert [line.split(":")[:2] for line in report["problems"]] == [
        ["crop1/er", " not zarr v2"],
        ["crop2/pm", " unreadable array"],
    ]
    shutil.rmtree(root)
    write(root, "crop1/er", volumes_of(1)["er"], zarr_format=3)
    with pytest.raises(DataError, match="crop1/er is zarr v3"):
        packed(tmp_path, root, tmp_path / "m.csv")


def test_crops_that_are_not_there_are_reported(tmp_path):
    root = write_predictions(tmp_path / "p.zarr")
    _, report = packed(tmp_path, root, write_manifest(tmp_path / "m.csv", ["1", "2", "3"]))
    assert report["problems"] == []
    assert [line.split(":")[:2] for line in report["warnings"]] == [["crop3", " crop not predicted"]]
    (tmp_path / "nested").mkdir()
    root.rename(tmp_path / "nested/jrc_x")
    with pytest.raises(DataError, match=r"none of its folders \(jrc_x\) is a crop of the manifest"):
        packed(tmp_path, tmp_path / "nested", tmp_path / "m.csv")


def test_arrays_of_other_names_are_reported_and_do_not_stop_the_others(tmp_path):
    root = write_predictions(tmp_path / "p.zarr")
    (root / "crop1/er").rename(root / "crop1/reticulum")
    _, report = packed(tmp_path, root, write_manifest(tmp_path / "m.csv"))
    assert [line.split(":")[:2] for line in report["warnings"]] == [["crop1/reticulum", " extra label"]]
    assert report["not_predicted"] == ["crop1/er"]


@pytest.mark.parametrize(
    ("out", "report"),
    [
        ("test.zip", "test.json"),  # what the command line makes of --out test.zip
        ("s.zip", "s.zip"),
        ("m.csv", "r.json"),
        ("p.zip", "r.json"),
        ("p.zarr/s.zip", "r.json"),
    ],
)
def test_nothing_that_is_read_is_replaced(tmp_path, out, report):
    manifest, source = write_manifest(tmp_path / "m.csv"), segmentation(tmp_path)
    folder = write_predictions(tmp_path / "p.zarr")
    predictions = {"test.zip": source, "p.zip": zipped(folder)}.get(out, folder)
    before = {path: path.read_bytes() for path in (source, manifest, zipped(folder))}
    with pytest.raises(ConfigError, match=r"would replace|lies in the folder"):
        pack(predictions, manifest, tmp_path / out, tmp_path / report)
    assert {path: path.read_bytes() for path in before} == before


def test_a_zip_beside_predictions_is_not_taken_for_them(tmp_path):
    root = write_predictions(tmp_path / "p.zarr")
    shutil.copy(zipped(root), root / "old.zip")
    with pytest.raises(DataError, match=r"holds old\.zip, which the evaluator takes, and the arrays of crop"):
        open_container(root)


def test_instances_as_a_mask_of_0_and_255_have_not_wrapped(tmp_path):
    root = write_predictions(tmp_path / "p.zarr")
    rewrite(root, "crop1/nuc", ((volumes_of(1)["nuc"] > 0) * 255).astype(np.uint8))
    manifest = write_manifest(tmp_path / "m.csv")
    assert validate(root, manifest) == []
    _, report = packed(tmp_path, root, manifest)
    assert report["problems"] == report["warnings"] == []
