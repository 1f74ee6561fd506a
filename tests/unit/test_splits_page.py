"""The page of the folds counts both sides class by class, measures distances, and is refused where crops leak."""

import csv
import json
import re

import pytest

from cellmap_pipe.errors import ContractError
from cellmap_pipe.report.splits import write_splits

# crop: dataset, fold, x of its box in nm, classes present, verdict
CROPS = {
    "jrc_hela-2/crop1": ("jrc_hela-2", 0, 0, "pm;nuc", "keep"),
    "jrc_hela-2/crop2": ("jrc_hela-2", 1, 1000, "pm", "keep"),
    "jrc_hela-3/crop3": ("jrc_hela-3", 1, 0, "nuc", "keep"),
    "jrc_hela-3/crop4": ("jrc_hela-3", 1, 5000, "ecs", "reject"),
    "other/crop5": ("other", 0, 0, "ecs", "keep"),
}


def write(path, rows):
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def page_of(folder, crops=CROPS, *, margin_nm=500.0, both=(), datasplit=None, keep=None):
    box = {"voxel_nm": "8;8;8", "shape": "50;50;50"}
    classes = {"annotated": "pm;nuc;ecs", "listed": ""}
    listed = [
        {"crop": name, "dataset": crop[0], "translation_nm": f"0;0;{crop[2]}", **classes, **box}
        for name, crop in crops.items()
    ]
    folds = [
        {"crop": name, "group": name, "fold": crop[1], "grouped_by": "datasplit" if datasplit else "crop"}
        for name, crop in crops.items()
    ]
    quality = [
        {"crop": name, "verdict": crop[4], "present_classes": crop[3], "supervised_pairs": 2_000_000, **box}
        for name, crop in crops.items()
    ]
    sides = {
        "training": [{"crop": name} for name, crop in crops.items() if crop[1] != 0]
        + [{"crop": name} for name in both],
        "validation": [{"crop": name} for name, crop in crops.items() if crop[1] == 0],
    }
    (folder / "8nm").mkdir(exist_ok=True)
    (folder / "8nm/fold0.json").write_text(json.dumps(sides))
    write_splits(
        write(folder / "crops.csv", listed),
        write(folder / "folds.csv", folds),
        {"8nm": write(folder / "quality.csv", quality)},
        [folder / "8nm/fold0.json"],
        folder / "splits.html",
        classes=["ecs", "pm", "nuc"],
        run=["0"],
        group="crop",
        margin_nm=margin_nm,
        n=2,
        seed=0,
        datasplit=datasplit,
        keep=keep,
    )
    return (folder / "splits.html").read_text()


def rows(text, name):
    """Return the cells of a table's rows as text."""
    body = text.split(f'id="{name}"')[1].split("<tbody>")[1].split("</tbody>")[0]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row.split("</td>")[:-1]] for row in body.strip().splitlines()]


def test_classes_are_counted_on_both_sides_of_each_fold(tmp_path):
    found = {row[0]: row[1:] for row in rows(page_of(tmp_path), "classes_8nm")}
    # annotated, present, fold 0 validation and training, fold 1 validation and training
    assert found["pm"] == ["4", "2", "1", "1", "1", "1", "&ndash;"]
    assert found["nuc"] == ["4", "2", "1", "1", "1", "1", "&ndash;"]
    assert found["ecs"][:6] == ["4", "1", "1", "0", "0", "1"]  # the rejected crop does not count
    assert found["ecs"][6] == "fold 0 never sees it in training"  # fold 1 is not trained


def test_a_crop_that_another_grid_is_asked_for_measures_no_class_here(tmp_path):
    page_of(tmp_path)
    # ecs of fold 0 is in other/crop5 alone, which the coarse grid validates
    datalists = {"8nm": ["jrc_hela-2/crop1"], "32nm": ["other/crop5"]}
    for grid, crops in datalists.items():
        (tmp_path / grid).mkdir(exist_ok=True)
        sides = {"training": [], "validation": [{"crop": name} for name in crops]}
        (tmp_path / grid / "fold0.json").write_text(json.dumps(sides))
    write_splits(
        tmp_path / "crops.csv",
        tmp_path / "folds.csv",
        dict.fromkeys(datalists, tmp_path / "quality.csv"),
        [tmp_path / grid / "fold0.json" for grid in datalists],
        tmp_path / "splits.html",
        classes=["ecs", "pm"],
        run=["0"],
        group="crop",
        margin_nm=0,
        n=2,
        seed=0,
    )
    text = (tmp_path / "splits.html").read_text()
    fine, coarse = ({row[0]: row[3:] for row in rows(text, f"classes_{grid}")} for grid in datalists)
    # fold 0 validation, validated here, training; fold 1, which is not trained, validation and training
    assert fine["ecs"] == ["1", "0", "0", "0", "1", "fold 0 never sees it in training; fold 0 cannot measure it"]
    assert coarse["ecs"] == ["1", "1", "0", "0", "1", "fold 0 never sees it in training"]
    assert fine["pm"] == ["1", "1", "1", "1", "1", "&ndash;"]
    assert coarse["pm"] == ["1", "0", "1", "1", "1", "fold 0 cannot measure it"]
    assert [row[4] for row in rows(text, "sizes_8nm")] == ["1", "&ndash;", "&ndash;", "&ndash;"]


def test_sizes_count_crops_in_use_their_volume_and_specimens(tmp_path):
    first = rows(page_of(tmp_path), "sizes_8nm")[1]
    # two HeLa datasets are one specimen; 50 voxels of 8 nm along each axis
    assert first == ["0", "training", "3", "2", "2", "2", "1", "0.128", "4.0"]


def test_the_nearest_pair_of_different_folds_is_measured(tmp_path):
    found = {row[0]: row for row in rows(page_of(tmp_path), "distances")}
    assert found["jrc_hela-2"][4] == "600" and found["jrc_hela-2"][6] == "at least the margin"
    assert found["jrc_hela-3"][6] == "in one fold only"


def test_crops_closer_than_the_margin_are_said_to_be(tmp_path):
    text = page_of(tmp_path, margin_nm=700.0)
    found = {row[0]: row for row in rows(text, "distances")}
    assert found["jrc_hela-2"][6] == "CLOSER THAN THE MARGIN"
    assert "not independent" in text


def test_shared_specimens_are_said(tmp_path):
    text = page_of(tmp_path)
    assert "1 of 2 specimens are on both sides of a fold (jrc_hela)" in text


def test_the_page_says_what_the_folds_follow_from(tmp_path):
    text = page_of(tmp_path)
    assert "folds.n = 2, folds.seed = 0, folds.group = crop, folds.margin_nm = 500" in text
    assert "from the list of crops and the seed alone" in text and "neighbours stay together" in text
    given = page_of(tmp_path, datasplit="mine/datasplit.csv")
    assert "folds.datasplit = mine/datasplit.csv, folds.margin_nm = 500" in given
    assert "Folds are those of mine/datasplit.csv" in given
    kept = page_of(tmp_path, keep="mine/folds.csv")
    assert "folds.seed = 0, folds.group = crop, folds.keep = mine/folds.csv, folds.margin_nm = 500" in kept
    assert "Crops that mine/folds.csv names (folds.keep) have the folds that it gives them" in kept
    for untrue in ("folds.n =", "folds.seed =", "folds.group =", "seed alone", "neighbours stay together"):
        assert untrue not in given


def test_a_crop_on_both_sides_is_refused(tmp_path):
    with pytest.raises(ContractError, match=r"fold0.json: leak: other/crop5 is in training and in validation"):
        page_of(tmp_path, both=["other/crop5"])
    assert not (tmp_path / "splits.html").exists()


def test_crops_of_different_folds_that_share_voxels_are_refused(tmp_path):
    crops = CROPS | {"jrc_hela-2/crop2": ("jrc_hela-2", 1, 392, "pm", "keep")}
    with pytest.raises(ContractError, match=r"folds.csv: leak: jrc_hela-2/crop1 \(fold 0\) and jrc_hela-2/crop2"):
        page_of(tmp_path, crops)


def test_a_fold_table_of_other_crops_is_refused(tmp_path):
    page_of(tmp_path)
    table = tmp_path / "folds.csv"
    table.write_text(table.read_text() + "new/crop7,new/crop7,0,crop\n")
    with pytest.raises(ContractError, match=r"new/crop7 is not in .*crops.csv"):
        write_splits(
            tmp_path / "crops.csv",
            table,
            {},
            [],
            tmp_path / "x.html",
            classes=[],
            run=[],
            group="crop",
            margin_nm=0,
            n=2,
            seed=0,
        )
