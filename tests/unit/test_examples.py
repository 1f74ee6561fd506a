"""The page of best and worst crops ranks by the challenge's score, shows what is unknown, and outlives bad data."""

import base64
import csv
import io
import json
import re

import numpy as np
import pytest
import zarr
from PIL import Image

from cellmap_pipe.evaluation.challenge import aggregate
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.report.examples import write_examples

LATTICE = Lattice((8, 8, 8), (4, 4, 4), (6, 40, 60))


def semantic(crop, label, tp, fp, fn):
    voxels = {"tp": tp, "fp": fp, "fn": fn}
    dice = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None
    return {
        "crop": crop,
        "label": label,
        "kind": "semantic",
        "status": "scored",
        "dice": dice,
        "voxels": voxels,
        **voxels,
    }


def instance(crop, label, tp, fp, fn):
    return semantic(crop, label, tp, fp, fn) | {
        "kind": "instance",
        "hausdorff_norm_sum": 0.9 * tp,
        "n_hausdorff": tp + fn,
    }


def case(tmp_path, ngff, records, *, unknown=None):
    """Write EM, labels and segmentations of the crops that the records name; return the arguments of the page."""
    root, shape = tmp_path / "data", LATTICE.shape
    em = np.random.default_rng(0).integers(60, 200, shape, dtype=np.uint8)
    ngff(root / "em", em, LATTICE.voxel_nm, LATTICE.translation_nm)
    crops = sorted({record["crop"] for record in records})
    segments = []
    for crop in crops:
        truth = np.zeros(shape, np.uint8)
        truth[:, :20, :20] = 1
        for label in {record["label"] for record in records if record["crop"] == crop}:
            marked = truth.copy()
            annotation = None
            if unknown:
                marked[:, 30:] = 255
                annotation = {"annotation_type": {"encoding": {"unknown": 255, "present": 1, "absent": 0}}}
            ngff(
                root / "labels" / crop / label, marked, LATTICE.voxel_nm, LATTICE.translation_nm, annotation=annotation
            )
            store = zarr.open_group(tmp_path / f"volumes/{crop.replace('/', '_')}.zarr", mode="a", zarr_format=2)
            store.create_array(f"{label}/s0", data=np.roll(truth, 4, axis=2), chunks=(6, 40, 60))
        path = f"volumes/{crop.replace('/', '_')}.zarr"
        segments.append({"name": crop, "path": path, "target": LATTICE.to_dict(), "status": "ok"})
    (tmp_path / "validation.json").write_text(json.dumps({"records": segments}))
    with open(tmp_path / "crops.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["crop", "em", "labels"])
        writer.writerows([crop, "em", f"labels/{crop}"] for crop in crops)
    scores = {
        "model": "unet",
        "fold": "0",
        "rules": "csc-2026.06",
        "records": records,
        "clean_records": [],
        "failed": ["d/crop9/pm: no array"],
        "aggregate": aggregate(records),
        "mean_dice": 0.5,
        "dice": {},
    }
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    return [tmp_path / "scores.json"], [tmp_path / "validation.json"], tmp_path / "crops.csv", tmp_path / "page.html"


def page_of(tmp_path, ngff, records, **more):
    examples = more.pop("examples", 1)
    arguments = case(tmp_path, ngff, records, **more)
    write_examples(*arguments, data_root=tmp_path / "data", examples=examples)
    return arguments[-1].read_text()


def images(text):
    """Return the panels as RGB arrays by the words of their alternative text."""
    found = re.findall(r'<img src="data:image/webp;base64,([^"]+)"[^>]* alt="([^"]+)"', text)
    return [
        (alt, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int))
        for data, alt in found
    ]


def test_the_ends_of_the_ranking_are_shown(tmp_path, ngff):
    records = [semantic(f"d/crop{n}", "pm", 10 * n, 50, 0) for n in range(1, 6)]
    text = page_of(tmp_path, ngff, records, examples=2)
    cards = re.findall(r"<h3><span>(d/crop\d)</span><span>([^<]+)", text)
    assert cards == [
        ("d/crop5", "best of 5"),
        ("d/crop4", "2 of 5"),
        ("d/crop1", "worst of 5"),
        ("d/crop2", "4 of 5"),
    ]
    table = text.split('id="crops"')[1].split("</table>")[0]
    assert re.findall(r"<td>(d/crop\d)", table) == [f"d/crop{n}" for n in (5, 4, 3, 2, 1)]
    assert "d/crop9/pm: no array" in text


def test_a_crop_that_could_not_be_segmented_is_named_with_its_score_and_cause(tmp_path, ngff):
    records = [semantic("d/a", "pm", 40, 5, 5), {**semantic("d/b", "pm", 0, 0, 50), "status": "missing"}]
    arguments = case(tmp_path, ngff, records)
    content = json.loads(arguments[1][0].read_text())
    content["records"][1] |= {"status": "failed", "cause": "no EM", "path": None}
    arguments[1][0].write_text(json.dumps(content))
    write_examples(*arguments, data_root=tmp_path / "data")
    lines = arguments[-1].read_text().split('id="undrawn"')[1].split("</table>")[0]
    assert "<td>d/b</td>" in lines and ">0.000</td>" in lines and "<td>no EM</td>" in lines
    assert "d/a" not in lines


def test_each_class_is_shown_where_it_scores_least(tmp_path, ngff):
    records = [semantic(crop, "pm", tp, 50, 5) for crop, tp in (("d/a", 40), ("d/b", 20))]
    records += [semantic("d/a", "ecs", 10, 50, 5), semantic("d/b", "ecs", 0, 9, 0)]
    text = page_of(tmp_path, ngff, records)
    worst = re.findall(r"</span>(\w+) in (d/\w)</span>", text)
    assert worst == [("ecs", "d/a"), ("pm", "d/b")]  # ecs does not occur in b, whatever it scores there


def test_panels_are_em_truth_and_prediction_with_stripes_where_nothing_is_known(tmp_path, ngff):
    text = page_of(tmp_path, ngff, [semantic("d/a", "pm", 40, 5, 5)], unknown=True)
    (_, em), (name, truth), (_, answer) = images(text)[:3]
    assert name.startswith("Truth of d/a, z = ")
    height, width = truth.shape[:2]

    def reddish(picture, left, right):
        part = picture[: height // 3, int(left * width) : int(right * width)]
        return (part[..., 0] - part[..., 2] > 25).mean()

    assert reddish(em, 0, 1) < 0.02
    assert reddish(truth, 0, 0.3) > 0.8 and reddish(truth, 0.36, 1) < 0.05
    assert reddish(answer, 0.08, 0.38) > 0.8
    # stripes: brighter than the dimmed EM round them, in the truth alone
    below = slice(int(0.8 * height), height)
    assert truth[below].mean() < 0.8 * em[below].mean()
    assert abs(answer[below].mean() - em[below].mean()) < 6
    assert (np.abs(truth[below] - 150).max(axis=-1) < 25).mean() > 0.1


def test_a_crop_that_cannot_be_read_is_named_and_the_others_are_shown(tmp_path, ngff):
    records = [semantic(f"d/crop{n}", "pm", 10 * n, 50, 0) for n in (1, 2)]
    arguments = case(tmp_path, ngff, records)
    (tmp_path / "data/labels/d/crop1/pm/.zattrs").unlink()
    write_examples(*arguments, data_root=tmp_path / "data")
    text = arguments[-1].read_text()
    assert text.count("no image: ") == 2 and "crop1/pm" in text
    assert len(images(text)) == 3


def test_the_page_is_the_same_bytes_each_time_and_says_when_there_is_nothing(tmp_path, ngff):
    records = [semantic("d/a", "pm", 40, 5, 5)]
    assert page_of(tmp_path / "1", ngff, records) == page_of(tmp_path / "2", ngff, records)
    (tmp_path / "3").mkdir()
    assert "No validation crop was scored" in page_of(tmp_path / "3", ngff, [])


@pytest.fixture(autouse=True)
def folders(tmp_path):
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
