"""Datalists: MONAI reads them, the sides are disjoint, and only crops that are kept are listed."""

import json

import pytest

from cellmap_pipe.errors import ConfigError, ContractError
from cellmap_pipe.files import describe_file
from cellmap_pipe.prepare.datalist import write_datalists

CROPS = {"a/crop1": 0, "a/crop2": 1, "a/crop3": 1, "b/crop4": 0, "b/crop5": -1}


@pytest.fixture
def results(tmp_path):
    """A results folder with five converted crops, of which b/crop4 is rejected."""
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
                "annotated": ["pm", "mito"],
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


def write(results, *folds):
    outputs = {fold: results / f"datalist/8nm/fold{fold}.json" for fold in folds}
    shards = [results / "shard0.json", results / "shard1.json"]
    nifti_dir = results / "nifti/8nm"
    write_datalists(results / "crops.csv", results / "folds.csv", shards, outputs, nifti_dir=nifti_dir)
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
            assert entry["annotated_classes"] == ["pm", "mito"]
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


def test_missing_nifti_is_named_with_the_remedy(results):
    (results / "nifti/8nm/labels/a_crop2.nii.gz").unlink()
    with pytest.raises(ContractError, match=r"a_crop2\.nii\.gz: missing.*-R convert"):
        write(results, 0)
