"""The best score that a grid allows: labels taken to the grid and back, scored like a prediction."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.errors import ContractError
from cellmap_pipe.evaluation import aggregate
from cellmap_pipe.evaluation.ceiling import LabelMapFile, ceiling_shard
from cellmap_pipe.evaluation.crops import evaluate_fold
from cellmap_pipe.files import digest, read_json, write_json
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prediction.postprocess import segment
from cellmap_pipe.prediction.store import create_probabilities
from cellmap_pipe.prepare.label_map import build_label_map
from cellmap_pipe.prepare.labels import PRESENT, read_label
from cellmap_pipe.prepare.nifti import read_nifti, write_nifti
from cellmap_pipe.prepare.state_table import count_states, decode_table, encode_table
from cellmap_pipe.report.ceiling import write_ceiling

OPTIONS: dict[str, Any] = {
    "workers": 1,
    "thresholds": {"default": 0.5},
    "derive": ["mito"],
    "labels": {"empty": "absent"},
}
CLASSES = ["pm", "ecs", "mito_mem", "mito_lum", "mito_ribo", "nuc"]
LABELS = "jrc_x/jrc_x.zarr/labels"


class Crops:
    """Crops of the challenge's layout under `folder`, brought to a grid as the conversion does."""

    def __init__(self, folder: Path, write: Callable[..., Path], voxel_nm: Any, grid_nm: Any) -> None:
        self.folder, self.write, self.voxel_nm, self.grid_nm, self.classes = folder, write, voxel_nm, grid_nm, CLASSES
        self.records: list[dict[str, Any]] = []
        self.rows: list[dict[str, str]] = []

    def add(
        self,
        number: int,
        arrays: dict[str, np.ndarray],
        translation_nm: Any = (100, 200, 300),
        coarse: Sequence[str] = (),
    ) -> "Crops":
        """Add a crop; the arrays of classes in `coarse` have voxels twice as large, from the same edge."""
        crop, place = f"jrc_x/crop{number}", f"{LABELS}/crop{number}"
        for name, values in arrays.items():
            voxel_nm, offset = np.array(self.voxel_nm), np.array(translation_nm)
            if name in coarse:
                voxel_nm, offset = 2 * voxel_nm, offset + voxel_nm / 2
            where = voxel_nm.tolist(), offset.tolist()
            self.write(self.folder / "data" / place / name, values, *where, annotation={})
        labels = [read_label(self.folder / "data" / place / name) for name in arrays]
        own = labels[0].level.lattice
        grid = Lattice.covering(own.lower_nm, own.upper_nm, self.grid_nm)
        made = build_label_map(labels, grid, self.classes, valid=None, max_upsample=8)
        write_nifti(self.folder / f"nifti/labels/{number}.nii.gz", made.rows, grid)
        self.records.append(
            {
                "crop": crop,
                "dataset": "jrc_x",
                "status": "ok",
                "lattice": grid.to_dict(),
                "label_lattice": own.to_dict(),
                "classes": self.classes,
                "annotated": list(arrays),
                "em": "jrc_x/jrc_x.zarr/em",
                "em_valid_fraction": 1.0,
                "em_level": {"path": "s0"},
                "table": encode_table(made.table, np.unique(made.rows)),
                "source_counts": made.source_counts,
                "counts": count_states(made.rows, made.table, self.classes),
                "input_digest": digest({name: values.tolist() for name, values in arrays.items()}),
                "files": {"label": {"path": f"labels/{number}.nii.gz", "sha256": digest(made.rows.tolist())}},
            }
        )
        shape = ";".join(map(str, own.shape))
        self.rows.append({"crop": crop, "labels": place, "annotated": ";".join(arrays), "shape": shape})
        return self

    def score(self, **more: Any) -> dict[tuple[int, str], dict[str, Any]]:
        """Return the records by (number of the crop, label)."""
        contract = {"grid": "g", "voxel_nm": self.grid_nm, "classes": self.classes, "records": self.records}
        write_json(self.folder / "convert.json", contract)
        with open(self.folder / "crops.csv", "w", newline="") as stream:
            table = csv.DictWriter(stream, list(self.rows[0]))
            table.writeheader()
            table.writerows(self.rows)
        inputs = self.folder / "convert.json", self.folder / "crops.csv", self.folder / "ceiling/shard0.json"
        options = {**OPTIONS, "data_root": self.folder / "data", "nifti_dir": self.folder / "nifti", **more}
        ceiling_shard(*inputs, **options)
        self.result = read_json(inputs[2])
        return {(int(r["crop"].split("crop")[1]), r["label"]): r for r in self.result["records"]}


@pytest.fixture
def crops_of(tmp_path: Path, ngff: Callable[..., Path]) -> Callable[..., Crops]:
    return partial(Crops, tmp_path, ngff)


def iou(record: dict[str, Any]) -> float:
    voxels = record["voxels"]
    return float(voxels["tp"] / sum(voxels.values()))


def sheet(first: int, thickness: int, n: int = 32) -> np.ndarray:
    values = np.zeros((n, 8, 8), np.uint8)
    values[first : first + thickness] = 1
    return values


def ball(radius: float, n: int) -> np.ndarray:
    z, y, x = np.indices((n, n, n)) - (n - 1) / 2 + 0.3
    return (z**2 + y**2 + x**2 <= radius**2).astype(np.uint8)


def test_a_sheet_as_thick_as_a_voxel_cannot_exceed_0_65(crops_of: Any) -> None:
    """8 nm on labels of 1 nm, at every phase to a grid of 8 nm.

    A sheet that reaches by a share f < 1/2 into the next voxel is present in one voxel of the grid, and back on its own
    voxels again 8 nm thick, but f off: IoU is (1 - f) / (1 + f). At f = 1/2 both voxels are present, 16 nm come back.
    """
    crops = crops_of((1, 1, 1), (8, 8, 8))
    for phase in range(8):
        crops.add(phase, {"pm": sheet(24 + phase, 8, 56)})
    found = crops.score()
    scores = [iou(found[phase, "pm"]) for phase in range(8)]
    shares = [min(phase, 8 - phase) / 8 for phase in range(8)]
    assert scores == pytest.approx([0.5 if f == 0.5 else (1 - f) / (1 + f) for f in shares])
    assert min(scores) < 0.46 and np.mean(scores) < 0.65
    assert aggregate(found.values())["label_scores"]["pm"]["iou"] < 0.65
    thick = found[4, "pm"]
    assert (thick["truth_nm3"], thick["kept_nm3"], thick["grid_nm3"]) == (8 * 64, 16 * 64, 16 * 64)


def test_a_large_ball_is_kept(crops_of: Any) -> None:
    (record,) = crops_of((4, 4, 4), (8, 8, 8)).add(1, {"nuc": ball(20, 44)}).score().values()
    assert iou(record) > 0.95
    assert abs(record["kept_nm3"] / record["truth_nm3"] - 1) < 0.02
    assert (record["tp"], record["fp"], record["fn"]) == (1, 0, 0)
    assert 0.9 < record["hausdorff_norm_sum"] / record["n_hausdorff"] <= 1


def several(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mito = np.zeros((20, 18, 16), np.uint8)
    mito[2:9, 2:9, 2:9], mito[12:18, 10:16, 6:14] = 1, 2
    mem = ((mito > 0) & (rng.random(mito.shape) > 0.5)).astype(np.uint8)
    lum = ((mito > 0) & (mem == 0)).astype(np.uint8)
    pm = ((mito == 0) & (rng.random(mito.shape) > 0.8)).astype(np.uint8)
    pm[:, :3] = 255
    none = np.zeros_like(mito)
    return {"pm": pm, "mito_mem": mem, "mito_lum": lum, "mito_ribo": none, "mito": mito, "ecs": none}


def test_the_crops_own_voxels_lose_nothing(crops_of: Any) -> None:
    found = crops_of((4, 4, 4), (4, 4, 4)).add(1, several()).score()
    assert [label for _, label in found] == ["ecs", "pm", "mito_mem", "mito_lum", "mito_ribo", "mito"]
    for (_, label), record in found.items():
        assert (record["voxels"]["fp"], record["voxels"]["fn"]) == (0, 0), label
        assert record["kept_nm3"] == record["truth_nm3"] == record["grid_nm3"]
        assert record["status"] == "scored" and record["voxel_size"] == [4, 4, 4]
    assert found[1, "mito"]["tp"] == 2 and found[1, "mito"]["hausdorff_norm_sum"] == 2
    scores = aggregate(found.values())["label_scores"]
    assert all(score.get("iou", score.get("combined_score")) == 1 for score in scores.values())


def test_unknown_voxels_do_not_count(crops_of: Any) -> None:
    values = sheet(14, 4)
    values[:14] = 255
    (record,) = crops_of((2, 2, 2), (8, 8, 8)).add(1, {"pm": values}).score().values()
    assert record["known_voxels"] == 18 * 64
    # half of each of two voxels: 255 holds the other half of the lower one, which counts nowhere
    assert record["voxels"] == {"tp": 4 * 64, "fp": 2 * 64, "fn": 0}


def test_absent_classes_are_not_resampled(tmp_path: Path, crops_of: Any) -> None:
    crops = crops_of((4, 4, 4), (8, 8, 8)).add(1, several())
    (tmp_path / "nifti/labels/1.nii.gz").unlink()
    found = crops.score()
    assert {label for _, label in found if found[1, label]["status"] == "scored"} == {"ecs", "mito_ribo"}
    assert found[1, "ecs"]["known_voxels"] == 20 * 18 * 16 and found[1, "ecs"]["truth_nm3"] == 0
    assert "-R convert" in found[1, "pm"]["cause"]


def test_a_group_without_its_parts_goes_to_the_grid_by_itself(crops_of: Any) -> None:
    found = crops_of((4, 4, 4), (8, 8, 8)).add(1, {"mito": several()["mito"]}).score()
    assert found.keys() == {(1, "mito")}
    assert iou(found[1, "mito"]) > 0.5 and found[1, "mito"]["grid_nm3"] > 0


def test_of_a_group_without_its_parts_nothing_is_predicted_where_there_is_no_em(tmp_path: Path, crops_of: Any) -> None:
    mito = np.ones((8, 8, 8), np.uint16)
    crops = crops_of((4, 4, 4), (8, 8, 8)).add(1, {"mito": mito}, (2, 2, 2))
    crops.write(tmp_path / "data/jrc_x/jrc_x.zarr/em", np.ones((2, 4, 4), np.uint8), (8, 8, 8), (4, 4, 4))
    crops.records[0]["em_valid_fraction"] = 0.5
    (record,) = crops.score().values()
    assert record["voxels"] == {"tp": 256, "fp": 0, "fn": 256} and record["grid_nm3"] == 32 * 512


def test_withdrawn_arrays_are_left_out(crops_of: Any) -> None:
    crops = crops_of((4, 4, 4), (8, 8, 8)).add(1, several())
    crops.records[0]["annotated"].remove("ecs")  # as the conversion records it
    found = crops.score(labels={"empty": "absent", "empty_by_class": {"ecs": "unknown"}})
    assert [label for _, label in found] == ["pm", "mito_mem", "mito_lum", "mito_ribo", "mito"]


def test_a_damaged_crop_costs_no_other_its_score(tmp_path: Path, crops_of: Any) -> None:
    crops = crops_of((4, 4, 4), (8, 8, 8)).add(1, several()).add(2, several(2))
    path = tmp_path / "nifti/labels/1.nii.gz"
    intact = path.read_bytes()
    path.write_bytes(intact[:200])
    found = crops.score(workers=2)
    assert {crop for (crop, _), record in found.items() if record["status"] == "failed"} == {1}
    assert iou(found[2, "pm"]) > 0
    assert aggregate(found.values())["label_scores"]["pm"]["tp"] == found[2, "pm"]["tp"]
    path.write_bytes(intact)
    assert all(record["status"] == "scored" for record in crops.score().values())  # a failure is not kept


def test_unchanged_crops_are_not_scored_again(tmp_path: Path, crops_of: Any) -> None:
    crops = crops_of((4, 4, 4), (8, 8, 8)).add(1, several()).add(2, several(2))
    first = crops.score()
    text = (tmp_path / "ceiling/shard0.json").read_bytes()
    for number in (1, 2):
        (tmp_path / f"nifti/labels/{number}.nii.gz").unlink()
    (tmp_path / "ceiling/shard0.json").unlink()
    assert crops.score() == first and (tmp_path / "ceiling/shard0.json").read_bytes() == text
    changed = crops.score(thresholds={"default": 0.4})
    assert changed[1, "pm"]["status"] == "failed"
    del crops.records[0]
    crops.score()
    assert [path.name for path in (tmp_path / "ceiling/shard0").iterdir()] == ["jrc_x_crop2.json"]


def test_a_crop_that_is_not_listed_is_named(crops_of: Any) -> None:
    crops = crops_of((4, 4, 4), (8, 8, 8)).add(1, several())
    crops.rows[0]["crop"] = "jrc_x/crop9"
    with pytest.raises(ContractError, match=r"jrc_x/crop1: .*crops\.csv; .*-R convert"):
        crops.score()


def full_path(crops: Crops) -> dict[tuple[int, str], dict[str, Any]]:
    """Write perfect predictions, segment and evaluate them as the workflow does, and return the records."""
    folder, predictions = crops.folder / "full", []
    for record in crops.records:
        number = record["crop"].split("crop")[1]
        lattice = Lattice.from_dict(record["lattice"])
        rows = read_nifti(crops.folder / "nifti" / record["files"]["label"]["path"])
        table = decode_table(record["table"], len(crops.classes))
        array = create_probabilities(folder / f"p/{number}.zarr", record["crop"], lattice, crops.classes, {})
        for channel in range(len(crops.classes)):
            array[channel] = 255 * (table[:, channel] == PRESENT)[rows].astype(np.uint8)
        predictions.append(
            {
                "name": record["crop"],
                "dataset": "jrc_x",
                "path": f"p/{number}.zarr",
                "lattice": record["lattice"],
                "target": record["label_lattice"],
                "classes": crops.classes,
                "fingerprint": "",
                "status": "ok",
                "cause": "",
            }
        )
    index = {"model": "m", "fold": "0", "subset": "validation", "records": predictions}
    write_json(folder / "predict.json", index)
    by_class = {key: {} for key in ("thresholds", "hole_nm3", "split_nm", "min_size_nm3")}
    segmentation = {"threshold": 0.5, **by_class, "derive": OPTIONS["derive"], "repair": False, "revision": 0}
    segment(
        [folder / "predict.json"],
        folder / "segment.json",
        store_dir=folder / "masks",
        settings=segmentation,
        subset="validation",
    )
    evaluate_fold(
        folder / "segment.json",
        crops.folder / "crops.csv",
        crops.folder / "data",
        folder / "scores.json",
        classes=crops.classes,
        derive=OPTIONS["derive"],
    )
    records = json.loads((folder / "scores.json").read_text())["records"]
    return {(int(r["crop"].split("crop")[1]), r["label"]): r for r in records}


@pytest.mark.parametrize("grid_nm", [(8, 8, 8), (5, 6, 3), (4, 4, 4)])
def test_the_ceiling_is_what_a_perfect_prediction_scores(crops_of: Any, grid_nm: Any) -> None:
    nuc = ball(6, 18)[:, :, :16].astype(np.uint16)
    crops = crops_of((4, 4, 4), grid_nm).add(1, several()).add(2, {"nuc": nuc}, (2.5, 0, 7))
    whole = several(3)
    whole["ecs"], whole["nuc"] = whole["mito"][::2, ::2, ::2], (whole["mito"] > 0).astype(np.uint8)[1::2, ::2, ::2]
    crops.add(3, whole, coarse=("ecs", "nuc"))
    found, full = crops.score(), full_path(crops)
    assert found.keys() == full.keys()
    for key, record in full.items():
        keys = set(record) - {"dice", "num_voxels", "voxel_size"}
        assert {name: found[key][name] for name in keys} == {name: record[name] for name in keys}, key


@settings(derandomize=True, deadline=None, max_examples=12)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 4]), st.floats(0.05, 0.95))
def test_counts_add_up_for_any_labels(tmp_path_factory: Any, ngff: Any, seed: int, factor: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.random((7, 8, 9)) < share).astype(np.uint8)
    values[rng.random(values.shape) < 0.1] = 255
    crops = Crops(tmp_path_factory.mktemp("any"), ngff, (4, 4, 4), (4 * factor,) * 3).add(1, {"pm": values})
    (record,) = crops.score().values()
    voxels = record["voxels"]
    assert voxels["tp"] + voxels["fn"] == (values == 1).sum()
    assert record["known_voxels"] == (values != 255).sum() >= sum(voxels.values())
    assert record["kept_nm3"] == 64 * (voxels["tp"] + voxels["fp"])
    if factor == 1:
        assert voxels["fp"] == voxels["fn"] == 0


def test_the_page_tells_what_each_class_keeps(tmp_path: Path, crops_of: Any) -> None:
    crops = crops_of((4, 4, 4), (8, 8, 8)).add(1, several()).add(2, {"pm": sheet(13, 2)})
    crops.add(3, {"pm": 1 - sheet(0, 4)}).add(4, {"nuc": ball(11, 26)})
    found = crops.score()
    (tmp_path / "quality.csv").write_text(
        "crop,verdict,cause\njrc_x/crop1,keep,\njrc_x/crop2,keep,\njrc_x/crop3,flag,low contrast\njrc_x/crop4,keep,\n"
    )
    write_ceiling([tmp_path / "ceiling/shard0.json"], tmp_path / "quality.csv", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in text.splitlines() if line.startswith("<tr>")]
    rows = [[re.sub("<[^>]+>", "", cell) for cell in row] for row in rows]
    pm = next(row for row in rows if row[:3] == ["pm", "semantic", "4 x 4 x 4"])
    pooled = aggregate([found[1, "pm"], found[2, "pm"]])["label_scores"]["pm"]["iou"]
    kept = [sum(found[crop, "pm"][key] for crop in (1, 2)) for key in ("kept_nm3", "truth_nm3")]
    assert pm[3:6] == ["2", "2", f"{pooled:.3f}"] and pm[10:12] == [f"{pooled:.3f}", f"{100 * kept[0] / kept[1]:.1f}"]
    nuc = next(row for row in rows if row[0] == "nuc")
    assert float(nuc[5]) > 0.9 and nuc[7] == "1.000" and 0.9 < float(nuc[10]) <= 1
    ecs = next(row for row in rows if row[0] == "ecs")
    assert ecs[3:5] == ["1", "0"] and ecs[10] == "&ndash;"
    assert f"volume that is kept: pm ({pooled:.2f}, {100 * kept[0] / kept[1]:.0f} %)" in text
    before = (tmp_path / "page.html").read_bytes()
    write_ceiling([tmp_path / "ceiling/shard0.json"], tmp_path / "quality.csv", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == before


def test_label_maps_are_read_slab_by_slab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellmap_pipe.prepare.nifti.SLAB_VOXELS", 4 * 5 * 7)
    volume = np.random.default_rng(0).integers(0, 900, (39, 5, 7)).astype(np.uint16)
    write_nifti(tmp_path / "a.nii.gz", volume, Lattice((8, 8, 8), (0, 0, 0), volume.shape))
    label_map = LabelMapFile(tmp_path / "a.nii.gz", volume.shape)
    for first, last in [(0, 3), (2, 11), (2, 5), (30, 39), (38, 39), (1, 2)]:
        np.testing.assert_array_equal(label_map.planes(first, last), volume[first:last])
    with pytest.raises(ContractError, match="shape"):
        LabelMapFile(tmp_path / "a.nii.gz", (39, 5, 8)).planes(0, 1)


def test_no_score_depends_on_the_memory_it_is_given(crops_of: Any) -> None:
    rng = np.random.default_rng(0)
    nuc = np.kron(rng.integers(0, 2, (5, 4, 4)), np.ones((6, 6, 6), int)).astype(np.uint16)
    crops = crops_of((4, 4, 4), (8, 8, 8)).add(1, {"nuc": nuc, "pm": (nuc == 0).astype(np.uint8)}, coarse=["nuc"])
    expected = crops.score()
    shutil.rmtree(crops.folder / "ceiling")
    assert crops.score(memory_gb=1e-6) == expected
    assert {record["status"] for record in expected.values()} == {"scored"}
