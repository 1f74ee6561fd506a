"""Datalists: MONAI reads them, the sides are disjoint, and only crops that are kept are listed."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cellmap_pipe.errors import ConfigError, ContractError
from cellmap_pipe.files import describe_file
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.datalist import write_datafold, write_datalists
from cellmap_pipe.prepare.nifti import write_nifti

CROPS = {"a/crop1": 0, "a/crop2": 1, "a/crop3": 1, "b/crop4": 0, "b/crop5": -1}
LABELS_NM = {"a/crop1": 8, "a/crop2": 8, "a/crop3": 32, "b/crop4": 32, "b/crop5": 32}


@pytest.fixture
def results(tmp_path):
    """A results folder with five converted crops, of which b/crop4 is rejected; b/crop5 has other classes."""
    nifti = tmp_path / "results/nifti/8nm"
    records = []
    for crop in CROPS:
        stem = crop.replace("/", "_")
        files = {"image": nifti / f"images/{stem}_0000.nii.gz", "label": nifti / f"labels/{stem}.nii.gz"}
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(crop.encode())
        records.append(
            {
                "crop": crop,
                "dataset": crop.split("/")[0],
                "annotated": ["nuc"] if crop == "b/crop5" else ["pm", "mito"],
                "label_lattice": {"voxel_nm": [LABELS_NM[crop]] * 3},
                "files": {kind: describe_file(path, nifti) for kind, path in files.items()},
            }
        )
    folder = tmp_path / "results"
    for i in range(2):
        (folder / f"shard{i}.json").write_text(json.dumps({"grid": "8nm", "records": records[i::2]}))
    verdicts = [f"{crop},{'reject' if crop == 'b/crop4' else 'keep'}" for crop in CROPS]
    (folder / "crops.csv").write_text("\n".join(["crop,verdict", *verdicts]))
    folds = [f"{crop},{crop},{fold}" for crop, fold in CROPS.items()]
    (folder / "folds.csv").write_text("\n".join(["crop,group,fold", *folds]))
    return folder


def write(results, *folds, grid="8nm", grids=None):
    outputs = {fold: results / f"datalist/8nm/fold{fold}.json" for fold in folds}
    shards = [results / "shard0.json", results / "shard1.json"]
    nifti_dir = results / "nifti/8nm"
    write_datalists(
        results / "crops.csv",
        results / "folds.csv",
        shards,
        outputs,
        nifti_dir=nifti_dir,
        grid=grid,
        grids=grids or {"8nm": [8, 8, 8]},
    )
    return [json.loads(path.read_text()) for path in outputs.values()]


def crops_of(side):
    return [entry["crop"] for entry in side]


def test_sides_are_disjoint_and_hold_the_kept_crops(results):
    first, second, everything = write(results, 0, "1", "all")
    assert crops_of(first["validation"]) == ["a/crop1"]
    assert crops_of(first["training"]) == ["a/crop2", "a/crop3", "b/crop5"]
    assert crops_of(second["validation"]) == ["a/crop2", "a/crop3"]
    assert crops_of(second["training"]) == ["a/crop1", "b/crop5"]
    assert crops_of(everything["training"]) == ["a/crop1", "a/crop2", "a/crop3", "b/crop5"]
    assert everything["validation"] == []


def test_monai_reads_the_datalist_and_finds_the_files(results):
    from monai.data import load_decathlon_datalist

    write(results, 0)
    path = results / "datalist/8nm/fold0.json"
    for side, n in (("training", 3), ("validation", 1)):
        entries = load_decathlon_datalist(path, is_segmentation=True, data_list_key=side)
        assert len(entries) == n
        for entry in entries:
            stem = entry["crop"].replace("/", "_")
            assert entry["image"] == str(results / f"nifti/8nm/images/{stem}_0000.nii.gz")
            assert entry["label"] == str(results / f"nifti/8nm/labels/{stem}.nii.gz")
            assert entry["annotated_classes"] == (["nuc"] if entry["crop"] == "b/crop5" else ["pm", "mito"])
            assert entry["fold"] == CROPS[entry["crop"]]
            assert entry["dataset"] == entry["crop"].split("/")[0]


def test_crops_outside_the_fold_table_are_on_no_side(results):
    (results / "folds.csv").write_text("crop,group,fold\na/crop1,a,0\na/crop2,a,-1\n")
    (listed,) = write(results, 0)
    assert crops_of(listed["training"]) == ["a/crop2"]
    assert crops_of(listed["validation"]) == ["a/crop1"]


def test_fold_without_validation_crops_is_named(results):
    with pytest.raises(ConfigError, match=r"fold 2 has no validation crop.*folds\.run"):
        write(results, 2)
    assert not (results / "datalist/8nm/fold2.json").exists()


def test_fold_without_training_crops_is_named(results):
    (results / "folds.csv").write_text("crop,group,fold\na/crop1,a,0\n")
    with pytest.raises(ConfigError, match="fold 0 has no training crop"):
        write(results, 0)


TWO = {"8nm": [8, 8, 8], "32nm": [32, 32, 32]}


@pytest.mark.parametrize(("grid", "validated"), [("8nm", "a/crop2"), ("32nm", "a/crop3")])
def test_a_crop_is_validated_on_the_grid_nearest_its_labels_alone(results, grid, validated):
    (alone,) = write(results, 1)
    (listed,) = write(results, 1, grid=grid, grids=TWO)
    assert crops_of(listed["validation"]) == [validated]
    assert listed["training"] == alone["training"]  # labels of any voxel size teach on every grid
    (everything,) = write(results, "all", grid=grid, grids=TWO)
    assert len(everything["training"]) == 4


@pytest.mark.parametrize(
    ("grids", "native", "other"),
    [
        ({"native": "native"}, ["a/crop2", "a/crop3"], []),
        ({"native": "native", "16nm": [16, 16, 16]}, ["a/crop2", "a/crop3"], ["a/crop2", "a/crop3"]),
        ({"native": "native", "8nm": [8, 8, 8]}, ["a/crop3"], ["a/crop2"]),
    ],
)
def test_the_native_grid_is_the_nearest_to_every_crop_but_those_of_another_grids_voxels(results, grids, native, other):
    assert crops_of(write(results, 1, grid="native", grids=grids)[0]["validation"]) == native
    for grid in grids.keys() - {"native"}:
        assert crops_of(write(results, 1, grid=grid, grids=grids)[0]["validation"]) == other


def test_a_grid_that_is_nearest_to_no_crop_of_a_fold_is_validated_on_all_with_a_warning(results, caplog):
    with caplog.at_level(logging.WARNING):
        (fine,) = write(results, 0, grid="8nm", grids=TWO)
        assert not caplog.text
        (coarse,) = write(results, 0, grid="32nm", grids=TWO)
    assert crops_of(fine["validation"]) == crops_of(coarse["validation"]) == ["a/crop1"]
    assert "fold 0: of the grids 8nm, 32nm, 32nm is the nearest to the labels of none of its crops (1)" in caplog.text


def test_missing_nifti_is_named_with_the_remedy(results):
    (results / "nifti/8nm/labels/a_crop2.nii.gz").unlink()
    with pytest.raises(ContractError, match=r"a_crop2\.nii\.gz: missing.*-R convert"):
        write(results, 0)


# all folds in one list


def write_all(results):
    out = results / "datalist/8nm/datafold.json"
    shards = [results / "shard0.json", results / "shard1.json"]
    write_datafold(results / "crops.csv", results / "folds.csv", shards, out, nifti_dir=results / "nifti/8nm")
    return out


def names(side):
    return [entry["crop"]["name"] for entry in side]


def read_fold(path, fold):
    from monai.auto3dseg.utils import datafold_read

    return datafold_read(str(path), str(path.parent), fold=fold)


def test_datafold_read_gives_the_sides_of_each_fold(results):
    path = write_all(results)
    for fold in (0, 1):
        (listed,) = write(results, fold)
        training, validation = read_fold(path, fold)
        assert names(training) == crops_of(listed["training"])
        assert names(validation) == crops_of(listed["validation"])
    # what DataAnalyzer asks for: every crop, those of fold -1 included
    training, validation = read_fold(path, -1)
    assert names(training) == ["a/crop1", "a/crop2", "a/crop3", "b/crop5"]
    assert validation == []
    assert json.loads(path.read_text())["testing"] == []


def test_datafold_read_finds_the_files_and_leaves_names_and_classes_alone(results):
    training, validation = read_fold(write_all(results), 0)
    entries = training + validation
    assert len(entries) == 4
    for entry in entries:
        crop = entry["crop"]["name"]
        stem = crop.replace("/", "_")
        assert Path(entry["image"]).resolve() == results / f"nifti/8nm/images/{stem}_0000.nii.gz"
        assert Path(entry["label"]).resolve() == results / f"nifti/8nm/labels/{stem}.nii.gz"
        assert Path(entry["image"]).is_file() and Path(entry["label"]).is_file()
        assert entry["crop"]["dataset"] == crop.split("/")[0]
        assert entry["annotated_classes"] == (
            {"mito": 0, "nuc": 1, "pm": 0} if crop == "b/crop5" else {"mito": 1, "nuc": 0, "pm": 1}
        )


def test_load_decathlon_datalist_reads_the_list_of_all_folds(results):
    from monai.data import load_decathlon_datalist

    path = write_all(results)
    assert load_decathlon_datalist(path, data_list_key="testing") == []
    entries = load_decathlon_datalist(path)
    assert [Path(entry["image"]).is_file() for entry in entries] == [True] * 4
    assert [entry.get("fold") for entry in entries] == [0, 1, 1, None]
    assert set(entries[0]["annotated_classes"]) == {"mito", "nuc", "pm"}


def test_autorunner_takes_the_folds_as_they_are(results):
    from monai.apps.auto3dseg import AutoRunner

    path = write_all(results)
    before = path.read_bytes()
    assert AutoRunner.inspect_datalist_folds(SimpleNamespace(data_src_cfg={}), str(path)) == 2
    assert path.read_bytes() == before


def test_crops_with_different_classes_are_put_into_one_batch(results):
    from monai.data import list_data_collate

    (results / "folds.csv").write_text("crop,group,fold\na/crop1,a,0\na/crop2,a,1\nb/crop5,b,1\n")
    batch = list_data_collate(read_fold(write_all(results), 0)[0])
    assert batch["annotated_classes"]["nuc"].tolist() == [0, 1]


def test_given_partition_has_its_training_crops_in_every_training(results):
    (results / "folds.csv").write_text("crop,group,fold\na/crop1,a,0\na/crop2,a,-1\n")
    path = write_all(results)
    assert [names(side) for side in read_fold(path, 0)] == [["a/crop2"], ["a/crop1"]]
    assert [names(side) for side in read_fold(path, -1)] == [["a/crop1", "a/crop2"], []]


def test_fold_without_a_crop_is_warned_of(results, caplog):
    (results / "folds.csv").write_text("crop,group,fold\na/crop1,a,0\na/crop2,a,2\nb/crop4,a,1\n")
    with caplog.at_level(logging.WARNING):
        write_all(results)
    assert "no crop of fold 1 passed the quality check" in caplog.text


def test_list_without_a_crop_is_refused(results):
    (results / "folds.csv").write_text("crop,group,fold\nb/crop4,b,0\n")
    with pytest.raises(ConfigError, match=r"no crop passed the quality check.*quality\.keep"):
        write_all(results)


def test_data_analyzer_runs_on_the_list(results, tmp_path):
    from monai.apps.auto3dseg import DataAnalyzer

    generator = np.random.default_rng(0)
    contents = {"a/crop1": [0, 1, 2, 255], "a/crop2": [0], "a/crop3": [255], "b/crop5": [1, 300]}
    shards = {i: json.loads((results / f"shard{i}.json").read_text()) for i in range(2)}
    for shard in shards.values():
        for record in shard["records"]:
            values = contents.get(record["crop"], [0])
            lattice = Lattice((8, 8, 8), (-4, 100, 3000), (12, 14, 16))
            label = generator.choice(values, lattice.shape).astype(np.uint16 if max(values) > 255 else np.uint8)
            image = generator.integers(1, 255, lattice.shape).astype(np.uint8)
            for kind, volume in (("image", image), ("label", label)):
                path = results / "nifti/8nm" / record["files"][kind]["path"]
                write_nifti(path, volume, lattice)
                record["files"][kind] = describe_file(path, results / "nifti/8nm")
    for i, shard in shards.items():
        (results / f"shard{i}.json").write_text(json.dumps(shard))
    path = write_all(results)
    analyzer = DataAnalyzer(
        str(path), str(path.parent), output_path=str(tmp_path / "stats.yaml"), device="cpu", worker=0
    )
    found = analyzer.get_all_case_stats()
    summary = found["stats_summary"]
    assert summary["n_cases"] == 4
    assert summary["image_stats"]["spacing"]["mean"] == [8, 8, 8]
    assert sorted(summary["label_stats"]["labels"]) == [0, 1, 2, 255, 300]
    assert [Path(case["image_filepath"]).name for case in found["stats_by_cases"]] == [
        "a_crop1_0000.nii.gz",
        "a_crop2_0000.nii.gz",
        "a_crop3_0000.nii.gz",
        "b_crop5_0000.nii.gz",
    ]
