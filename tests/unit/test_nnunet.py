"""The nnU-Net export: what nnU-Net v2 demands of a raw dataset holds, and no unknown voxel is called background."""

import json
import logging
import re

import nibabel
import numpy as np
import pytest

from cellmap_pipe.errors import CellmapError, ConfigError
from cellmap_pipe.files import describe_file, file_digest
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare import nnunet
from cellmap_pipe.prepare.nifti import write_nifti
from cellmap_pipe.prepare.nnunet import exclusive_classes, export_nnunet, label_values, value_of_rows
from cellmap_pipe.prepare.state_table import UNKNOWN_ROW, encode_table, infer_states, standard_rows

CLASSES = ["pm", "mito", "mito_mem", "nuc"]  # mito contains mito_mem
NAME = "Dataset801_8nm"
FOLDS = {"a/crop1": 0, "a/crop2": 1, "a/crop3": 1, "b/crop4": 0, "b/crop5": -1, "b/crop6": 0}
LATTICE = Lattice((5.24, 4, 4), (-2.62, 100, 3000), (5, 6, 7))


def table_of(annotated, extra=()):
    """A crop's state table: standard rows, and rows 10, 11, ... for the given states of the annotated classes."""
    table = np.full((512, len(CLASSES)), 2, np.uint8)
    rows = standard_rows(annotated, CLASSES)
    table[: len(rows)] = rows
    if extra:
        table[10 : 10 + len(extra)] = infer_states(np.array(extra, np.uint8), annotated, CLASSES)
    return table


class Grid:
    """Converted crops of one grid: records and NIfTI pairs, of which b/crop4 is rejected and b/crop5 has wide rows."""

    def __init__(self, folder):
        self.folder, self.nifti = folder, folder / "nifti/8nm"
        self.raw = folder / "nnunet/raw" / NAME
        generator = np.random.default_rng(0)
        self.labels, self.tables, self.records = {}, {}, {}
        for crop in FOLDS:
            annotated = ["nuc"] if crop == "b/crop6" else CLASSES
            # both pm and nuc marked (row 10); mito without its part (11)
            extra = [] if crop == "b/crop6" else [[1, 0, 0, 1], [0, 1, 0, 0]]
            self.tables[crop] = table_of(annotated, extra)
            values = [0, UNKNOWN_ROW] if crop == "b/crop6" else [0, 1, 2, 3, 4, 10, 11, UNKNOWN_ROW]
            if crop == "b/crop5":
                values.append(300)
                self.tables[crop][300] = self.tables[crop][1]
            label = generator.choice(values, LATTICE.shape).astype(np.uint16 if crop == "b/crop5" else np.uint8)
            self.records[crop] = {"crop": crop, "classes": CLASSES, "annotated": annotated, "files": {}}
            self.records[crop]["lattice"] = LATTICE.to_dict()
            self.write(crop, label)
            self.write(crop, generator.integers(0, 255, LATTICE.shape).astype(np.uint8), "image")
        verdicts = [f"{crop},{'reject' if crop == 'b/crop4' else 'keep'}" for crop in FOLDS]
        (folder / "crops.csv").write_text("\n".join(["crop,verdict", *verdicts]))
        rows = [f"{crop},{crop},{fold},crop" for crop, fold in FOLDS.items()]
        (folder / "folds.csv").write_text("\n".join(["crop,group,fold,grouped_by", *rows]))

    def write(self, crop, volume, kind="label"):
        stem = crop.replace("/", "_")
        path = self.nifti / f"{kind}s" / (f"{stem}_0000.nii.gz" if kind == "image" else f"{stem}.nii.gz")
        write_nifti(path, volume, LATTICE)
        if kind == "label":
            self.labels[crop] = volume
            used = np.unique(volume)
            self.records[crop]["table"] = encode_table(self.tables[crop], used)
        self.records[crop]["files"][kind] = describe_file(path, self.nifti)

    def export(self, classes=CLASSES, workers=1):
        (self.folder / "shard0.json").write_text(json.dumps({"records": list(self.records.values())}))
        out = self.folder / "nnunet/8nm.json"
        export_nnunet(
            self.folder / "crops.csv",
            self.folder / "folds.csv",
            [self.folder / "shard0.json"],
            out,
            nifti_dir=self.nifti,
            raw_dir=self.raw.parent,
            workers=workers,
            name=NAME,
            classes=classes,
        )
        return json.loads(out.read_text())

    def exported(self, case):
        """The exported label, (z, y, x)."""
        return np.asarray(nibabel.load(self.raw / f"labelsTr/{case}.nii.gz").dataobj).T


@pytest.fixture
def grid(tmp_path):
    return Grid(tmp_path)


def test_dataset_follows_the_rules_of_nnunet(grid):
    grid.export()
    assert re.fullmatch(r"Dataset\d{3}_.+", grid.raw.name)
    description = json.loads((grid.raw / "dataset.json").read_text())
    assert {"channel_names", "labels", "numTraining", "file_ending"} <= set(description)
    ending = description["file_ending"]
    assert list(description["channel_names"]) == ["0"]
    assert description["channel_names"]["0"] not in ("CT", "noNorm", "rescale_0_1", "rgb_to_0_1")  # hence z-scored
    labels = description["labels"]
    assert list(labels.values()) == list(range(len(labels)))  # consecutive integers
    assert labels["background"] == 0 and labels["ignore"] == max(labels.values())
    cases = sorted(path.name.removesuffix(ending) for path in (grid.raw / "labelsTr").iterdir())
    assert cases == ["a_crop1", "a_crop2", "a_crop3", "b_crop5"]
    assert sorted(path.name for path in (grid.raw / "imagesTr").iterdir()) == [f"{case}_0000{ending}" for case in cases]
    assert description["numTraining"] == len(cases)
    for case in cases:
        image = nibabel.load(grid.raw / f"imagesTr/{case}_0000{ending}")
        label = nibabel.load(grid.raw / f"labelsTr/{case}{ending}")
        assert image.shape == label.shape == (7, 6, 5)
        assert np.array_equal(image.affine, label.affine)
        assert label.header.get_zooms() == pytest.approx((4, 4, 5.24))  # NibabelIO takes the spacing from here
        assert label.get_data_dtype() == np.uint8
        assert set(np.unique(label.dataobj)) <= set(labels.values())


def test_value_says_class_background_or_ignore_as_the_states_do(grid):
    grid.export()
    labels = json.loads((grid.raw / "dataset.json").read_text())["labels"]
    assert labels == {"background": 0, "pm": 1, "mito_mem": 2, "nuc": 3, "ignore": 4}
    for crop, label in grid.labels.items():
        if crop in ("b/crop4", "b/crop6"):
            continue
        states = grid.tables[crop][label][..., [0, 2, 3]]
        expected = np.full(label.shape, 4)
        expected[(states == 0).all(axis=-1)] = 0
        for value in (1, 2, 3):
            expected[(states[..., value - 1] == 1) & ((states == 1).sum(axis=-1) == 1)] = value
        found = grid.exported(crop.replace("/", "_"))
        assert np.array_equal(found, expected)
        assert set(np.unique(found)) == {0, 1, 2, 3, 4}
        # row 11 is mito and none of its parts that are configured: background; row 10 two classes: ignored
        assert (found[label == 11] == 0).all() and (found[label == 10] == 4).all()
        # row 2 is mito with mito_mem annotated, hence absent
        assert (found[label == 2] == 0).all()


def test_group_only_annotation_is_ignored_inside_and_background_outside():
    annotated = ["mito", "pm", "nuc"]
    table = table_of(annotated)[:, [0, 2, 3]]
    assert value_of_rows(table)[:5].tolist() == [0, 1, 4, 2, 3]


def test_nothing_is_background_where_a_class_is_unknown():
    table = table_of(["pm", "nuc"])[:, [0, 2, 3]]
    values = value_of_rows(table)
    assert values[0] == 4  # neither pm nor nuc, mito_mem unknown
    assert values[[1, 3, 4]].tolist() == [1, 2, 3]  # where a class is, the others are not
    assert values[UNKNOWN_ROW] == 4


@pytest.mark.parametrize(
    ("classes", "kept", "dropped"),
    [
        (["pm", "nuc", "ecs"], ["pm", "nuc", "ecs"], {}),
        (["mito", "mito_mem", "mito_lum"], ["mito_mem", "mito_lum"], {"mito": "mito_mem, mito_lum"}),
        (["cell", "er", "ne", "np_out"], ["np_out"], {"cell": "np_out", "er": "np_out", "ne": "np_out"}),
        # overlapping in part: the one of fewer atoms stays
        (["ne", "er_mem_all", "pm"], ["er_mem_all", "pm"], {"ne": "er_mem_all"}),
    ],
)
def test_classes_that_share_voxels_are_reduced_to_the_finest(classes, kept, dropped):
    assert exclusive_classes(classes) == (kept, dropped)
    assert label_values(kept)["ignore"] == len(kept) + 1


def test_group_whose_parts_are_all_exported_is_only_mentioned(grid, caplog):
    parts = ["mito_mem", "mito_lum", "mito_ribo"]
    for record in grid.records.values():
        record["classes"] = ["mito", *parts]
    with caplog.at_level(logging.INFO):
        grid.export(["mito", *parts])
    assert "mito is not exported: it is the union of classes that are (mito_mem, mito_lum, mito_ribo)" in caplog.text


def test_splits_are_the_folds(grid):
    grid.export()
    assert json.loads((grid.raw / "splits_final.json").read_text()) == [
        {"train": ["a_crop2", "a_crop3", "b_crop5"], "val": ["a_crop1"]},
        {"train": ["a_crop1", "b_crop5"], "val": ["a_crop2", "a_crop3"]},
    ]


def test_contract_names_cases_digests_and_what_was_left_out(grid, caplog):
    with caplog.at_level(logging.INFO):
        contract = grid.export()
    assert contract["left_out"] == ["b/crop6"]
    assert contract["dropped_classes"] == {"mito": "mito_mem"}
    assert "mito is not exported, nor all of its parts" in caplog.text and "b/crop6" in caplog.text
    assert set(contract["cases"]) == {"a_crop1", "a_crop2", "a_crop3", "b_crop5"}
    folder = grid.folder / "nnunet" / contract["folder"]
    for case in contract["cases"].values():
        assert case["fold"] == FOLDS[case["crop"]]
        assert sum(case["voxels"].values()) == LATTICE.voxels
        label = grid.exported(case["crop"].replace("/", "_"))
        assert case["voxels"] == {
            name: np.count_nonzero(label == value)
            for name, value in contract["labels"].items()
            if (label == value).any()
        }
        for entry in case["files"].values():
            assert file_digest(folder / entry["path"]) == entry["sha256"]
            assert (folder / entry["path"]).stat().st_size == entry["size"]


def test_images_take_no_second_copy_on_one_file_system(grid):
    grid.export()
    source, target = grid.nifti / "images/a_crop1_0000.nii.gz", grid.raw / "imagesTr/a_crop1_0000.nii.gz"
    assert source.samefile(target)


def test_images_are_copied_where_links_are_not_possible(grid, monkeypatch):
    def refuse(*_):
        raise OSError("cross-device link")

    monkeypatch.setattr(nnunet.os, "link", refuse)
    grid.export()
    source, target = grid.nifti / "images/a_crop1_0000.nii.gz", grid.raw / "imagesTr/a_crop1_0000.nii.gz"
    assert not source.samefile(target)
    assert source.read_bytes() == target.read_bytes()


def test_only_what_changed_is_written_again(grid):
    first = grid.export()
    inodes = {path.name: path.stat().st_ino for path in (grid.raw / "labelsTr").iterdir()}
    (grid.raw / "labelsTr/a_crop3.nii.gz").unlink()
    grid.write("a/crop1", np.zeros(LATTICE.shape, np.uint8))
    second = grid.export()
    now = {path.name: path.stat().st_ino for path in (grid.raw / "labelsTr").iterdir()}
    assert set(now) == set(inodes)
    assert now["a_crop2.nii.gz"] == inodes["a_crop2.nii.gz"]
    assert {case for case in first["cases"] if first["cases"][case] != second["cases"][case]} == {"a_crop1"}
    assert not grid.exported("a_crop1").any()


def test_other_classes_give_other_labels(grid):
    grid.export()
    grid.export(["pm", "nuc"])
    states = grid.tables["a/crop2"][grid.labels["a/crop2"]]
    assert np.array_equal(grid.exported("a_crop2") == 2, (states[..., 3] == 1) & (states[..., 0] != 1))


def test_cases_that_are_gone_and_half_written_files_are_removed(grid):
    grid.export()
    (grid.raw / "imagesTr/.partial-1-a_crop1_0000.nii.gz").write_bytes(b"")
    verdicts = (grid.folder / "crops.csv").read_text().replace("a/crop2,keep", "a/crop2,flag")
    (grid.folder / "crops.csv").write_text(verdicts)
    grid.export()
    assert sorted(path.name for path in (grid.raw / "imagesTr").iterdir()) == [
        f"{case}_0000.nii.gz" for case in ("a_crop1", "a_crop3", "b_crop5")
    ]
    assert not (grid.raw / "labelsTr/a_crop2.nii.gz").exists()
    assert not (grid.raw / "records/a_crop2.json").exists()
    assert json.loads((grid.raw / "dataset.json").read_text())["numTraining"] == 3


def test_result_does_not_depend_on_the_number_of_processes(grid):
    first = grid.export()
    for path in (grid.raw / "labelsTr").iterdir():
        path.unlink()
    assert grid.export(workers=2) == first


def test_fold_without_validation_is_warned_of(grid, caplog):
    (grid.folder / "folds.csv").write_text("crop,group,fold\na/crop1,a,0\na/crop2,a,2\nb/crop4,b,1\n")
    with caplog.at_level(logging.WARNING):
        grid.export()
    assert "fold 1 has no case to validate" in caplog.text


def test_damaged_label_is_named_with_the_remedy(grid):
    path = grid.nifti / "labels/a_crop1.nii.gz"
    content = path.read_bytes()
    path.write_bytes(content[:-60] + bytes(60))  # as long as recorded
    with pytest.raises(CellmapError, match=r"a_crop1\.nii\.gz: damaged.*-R convert"):
        grid.export()
    assert not (grid.folder / "nnunet/8nm.json").exists()
    assert not (grid.raw / "labelsTr/a_crop1.nii.gz").exists()


def test_export_without_a_case_is_refused(grid):
    (grid.folder / "folds.csv").write_text("crop,group,fold\nb/crop6,b,0\n")
    with pytest.raises(ConfigError, match="no crop to export"):
        grid.export()
