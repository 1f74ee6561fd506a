import csv
import shutil

import numpy as np
import pytest

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.prepare.crops import annotated_classes, data_listing, find_crops, read_crops, write_crops

ONES = np.ones((4, 4, 4), np.uint8)


@pytest.fixture
def data(tmp_path, ngff):
    """Two datasets with three crops; `all` and unknown folders lie beside the classes."""
    root = tmp_path / "data"
    for dataset, crops in {"jrc_a": {"crop9": "pm ecs", "crop10": "nuc"}, "jrc_b": {"crop2": "pm all foo"}}.items():
        zarr_root = root / dataset / f"{dataset}.zarr"
        ngff(zarr_root / "em", ONES, (8, 8, 8), (0, 0, 0))
        for crop, names in crops.items():
            for name in names.split():
                ngff(zarr_root / "gt" / crop / name, ONES, (4, 4, 4), (-2, -2, 0.5))
    return {"root": str(root), "labels_path": "gt", "em_path": "em", "crops": None}


def test_crops_are_found_by_dataset_and_number(data):
    assert [crop.id for crop in find_crops(data)] == ["jrc_a/crop9", "jrc_a/crop10", "jrc_b/crop2"]


def test_the_table_has_a_row_per_crop_with_its_geometry(data, tmp_path):
    write_crops(data, tmp_path / "crops.csv")
    rows = read_crops(tmp_path / "crops.csv")
    assert [row["annotated"] for row in rows] == ["ecs;pm", "nuc", "pm"]
    assert rows[0] == {
        "crop": "jrc_a/crop9",
        "dataset": "jrc_a",
        "em": "jrc_a/jrc_a.zarr/em",
        "labels": "jrc_a/jrc_a.zarr/gt/crop9",
        "annotated": "ecs;pm",
        "listed": "",
        "masks": "",
        "voxel_nm": "4;4;4",
        "translation_nm": "-2;-2;0.5",
        "shape": "4;4;4",
        "problem": "",
    }


def test_masks_are_listed_beside_their_classes_not_as_classes(data, tmp_path, ngff):
    crop = tmp_path / "data/jrc_a/jrc_a.zarr/gt/crop9"
    before = data_listing(data)
    for name in ("pm_mask", "nuc_mask"):
        ngff(crop / name, ONES, (4, 4, 4), (-2, -2, 0.5))
    write_crops(data, tmp_path / "crops.csv")
    row = read_crops(tmp_path / "crops.csv")[0]
    assert (row["annotated"], row["masks"]) == ("ecs;pm", "pm")  # nuc has no array that it could mask
    assert annotated_classes(crop) == ["ecs", "pm"] and data_listing(data) != before


def table(path, *rows):
    with open(path, "w", newline="") as stream:
        csv.writer(stream, lineterminator="\r\n").writerows(rows)
    return str(path)


def test_only_listed_crops_are_taken_in_any_of_the_usual_forms(data, tmp_path):
    listed = [
        ("crop_name", "dataset", "class_label"),
        ("9", "jrc_a", "pm"),
        ("9", "jrc_a", "ecs"),
        ("crop2", "jrc_b", "pm"),
    ]
    data["crops"] = table(tmp_path / "manifest.csv", *listed)
    assert [crop.id for crop in find_crops(data)] == ["jrc_a/crop9", "jrc_b/crop2"]
    data["crops"] = table(tmp_path / "mine.csv", ("crop",), ("jrc_a/crop10",), ("2",))
    assert [crop.id for crop in find_crops(data)] == ["jrc_a/crop10", "jrc_b/crop2"]


def test_a_listed_crop_that_is_not_on_disk_is_kept_with_its_problem(data, tmp_path):
    data["crops"] = table(tmp_path / "m.csv", ("dataset", "crop_name"), ("jrc_a", "9"), ("jrc_a", "77"))
    write_crops(data, tmp_path / "crops.csv")
    problems = {row["crop"]: row["problem"] for row in read_crops(tmp_path / "crops.csv")}
    assert problems["jrc_a/crop9"] == "" and "no such crop folder" in problems["jrc_a/crop77"]


def test_a_listed_crop_that_is_not_on_disk_has_the_classes_and_the_box_of_the_list(data, tmp_path):
    columns = ("crop_name", "dataset", "class_label", "voxel_size", "translation", "shape")
    data["crops"] = table(
        tmp_path / "m.csv",
        columns,
        ("9", "jrc_a", "nuc", "[2;2;2]", "[1;1;1]", "[8;8;8]"),
        ("77", "jrc_a", "nuc", "[16;16;16]", "[8;8;8]", "[5;6;7]"),
        ("77", "jrc_a", "ecs", "[4;4;4]", "[100;2;2.5]", "[20;24;28]"),
        ("77", "jrc_a", "no_class", "", "", ""),
        ("78", "jrc_a", "pm", "", "", ""),
    )
    write_crops(data, tmp_path / "crops.csv")
    rows = {row["crop"]: row for row in read_crops(tmp_path / "crops.csv")}
    shown = {name: [row[key] for key in ("annotated", "listed", "voxel_nm", "shape")] for name, row in rows.items()}
    assert shown == {
        "jrc_a/crop9": ["ecs;pm", "nuc", "4;4;4", "4;4;4"],  # its box is that of the disk
        "jrc_a/crop77": ["", "ecs;nuc", "4;4;4", "20;24;28"],
        "jrc_a/crop78": ["", "pm", "", ""],
    }
    assert rows["jrc_a/crop77"]["translation_nm"] == "100;2;2.5"


def test_geometry_of_a_list_that_is_not_understood_is_told_with_its_line(data, tmp_path):
    columns = ("crop", "class_label", "voxel_size", "translation", "shape")
    for cells in (("[a;4;4]", "[0;0;0]", "[9;9;9]"), ("[4;4]", "[0;0;0]", "[9;9;9]"), ("[4;4;4]", "", "")):
        data["crops"] = table(tmp_path / "m.csv", columns, ("jrc_a/crop9", "pm", *cells))
        with pytest.raises(ConfigError, match=r"data\.crops .*m\.csv: line 2: "):
            write_crops(data, tmp_path / "crops.csv")


def test_missing_metadata_and_missing_em_are_told_without_stopping_the_others(data, tmp_path):
    root = tmp_path / "data"
    (root / "jrc_b/jrc_b.zarr/gt/crop2/pm/.zattrs").unlink()
    shutil.rmtree(root / "jrc_a/jrc_a.zarr/em")
    write_crops(data, tmp_path / "crops.csv")
    rows = {row["crop"]: row for row in read_crops(tmp_path / "crops.csv")}
    assert "no .zattrs" in rows["jrc_b/crop2"]["problem"] and rows["jrc_b/crop2"]["shape"] == ""
    assert "no EM group" in rows["jrc_a/crop9"]["problem"] and rows["jrc_a/crop9"]["shape"] == "4;4;4"


def test_faults_of_the_configuration_are_one_line_with_the_key(data, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.root .*nowhere does not exist; set data\.root"):
        find_crops(data | {"root": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match=r"holds no crop under .*/labels; set data\.root or data\.labels_path"):
        find_crops(data | {"labels_path": "labels"})
    with pytest.raises(ConfigError, match=r"data\.crops .*cannot be read"):
        find_crops(data | {"crops": str(tmp_path / "no.csv")})
    with pytest.raises(ConfigError, match="a column 'crop' or 'crop_name' is needed"):
        find_crops(data | {"crops": table(tmp_path / "c.csv", ("name",), ("9",))})
    with pytest.raises(ConfigError, match="'a/b_c' is not a crop"):
        find_crops(data | {"crops": table(tmp_path / "d.csv", ("crop",), ("a/b_c",))})


def test_the_listing_notices_new_crops_and_classes_and_never_raises(data, tmp_path, ngff):
    before = data_listing(data)
    assert data_listing(data) == before
    crop = tmp_path / "data/jrc_a/jrc_a.zarr/gt/crop9"
    ngff(crop / "er_mem", ONES, (4, 4, 4), (0, 0, 0))
    after = data_listing(data)
    assert after != before
    (crop.parent / "crop11").mkdir()
    assert data_listing(data) not in (before, after)
    assert data_listing({"root": str(tmp_path / "nowhere"), "labels_path": "gt", "em_path": "em"})
    assert data_listing({}) and data_listing(data | {"crops": "/nowhere.csv"}) != before


def test_classes_are_listed_by_id(data, tmp_path):
    assert annotated_classes(tmp_path / "data/jrc_a/jrc_a.zarr/gt/crop9") == ["ecs", "pm"]
    assert annotated_classes(tmp_path / "nowhere") == []
