"""The report's figures show something, are the same bytes each time, and use colours that all readers tell apart."""

import csv
import itertools
import json

import numpy as np
import pytest
import zarr
from PIL import Image
from skimage.color import rgb2lab

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.colours import colour_of
from cellmap_pipe.errors import ConfigError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.report.canvas import grey, grey_limits, overlaid, rgb, visible
from cellmap_pipe.report.figures import class_scores, ensemble_gain, training_curves
from cellmap_pipe.report.slices import predictions

FOURTEEN = (
    "ecs pm mito_mem mito_lum mito_ribo golgi_mem golgi_lum ves_mem ves_lum endo_mem endo_lum er_mem er_lum nuc"
).split()


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def has_colour(picture, name, tolerance=12):
    """Whether the legend's pure colour of a class is somewhere in the picture."""
    return (np.abs(picture - np.round(rgb(colour_of(name)) * 255)).max(axis=-1) <= tolerance).sum() > 20


# Machado, Oliveira and Fernandes 2009, severity 1.0, for linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("sight", SIGHT)
def test_the_default_classes_differ_for_every_kind_of_sight(sight):
    colours = np.array([rgb(colour_of(name)) for name in FOURTEEN], float)
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(SIGHT[sight]), 0, 1)
    lab = rgb2lab(np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)[None])[0]
    for first, second in itertools.combinations(range(len(FOURTEEN)), 2):
        assert np.linalg.norm(lab[first] - lab[second]) >= 18, (FOURTEEN[first], FOURTEEN[second])


def test_every_class_has_a_colour_of_its_own():
    assert len({colour_of(name) for name in CLASSES}) == len(CLASSES)
    with pytest.raises(ConfigError, match="did you mean 'mito_mem'"):
        colour_of("mito_men")


def test_overlay_paints_parts_over_groups_and_dims_what_is_unknown():
    image = np.full((1, 4), 0.5, np.float32)
    masks = {"mito_mem": np.array([[1, 0, 0, 0]], bool), "mito": np.array([[1, 1, 0, 0]], bool)}
    picture = overlaid(image, masks, known=np.array([[1, 1, 1, 0]], bool))
    assert np.allclose(picture[0, 0], 0.45 * 0.5 + 0.55 * rgb(colour_of("mito_mem")), atol=1e-6)
    assert np.allclose(picture[0, 1], 0.45 * 0.5 + 0.55 * rgb(colour_of("mito")), atol=1e-6)
    assert np.allclose(picture[0, 2], 0.5)
    assert (picture[0, 3] < 0.5).all()


def test_a_group_that_its_parts_cover_is_not_in_the_legend():
    part, group = np.array([[1, 1, 0]], bool), np.array([[1, 1, 0]], bool)
    assert visible({"mito": group, "mito_mem": part}) == {"mito_mem"}
    assert visible({"mito": ~group | group, "mito_mem": part, "pm": part & ~part}) == {"mito", "mito_mem"}


def test_blank_em_keeps_its_brightness_and_other_em_is_stretched():
    assert np.allclose(grey(np.full((4, 4), 51, np.uint8)), 0.2)
    assert grey(np.arange(100, 200, dtype=np.uint8).reshape(10, 10)).max() == 1
    assert grey_limits(np.empty(0, np.uint8)) == (0, 255)


def test_em_is_stretched_between_given_limits():
    assert np.allclose(grey(np.array([[40, 50, 60, 80]], np.uint8), (40, 60)), [0, 0.5, 1, 1])


LATTICE = Lattice((8, 8, 8), (104, 204, 304), (5, 40, 60))


def em_block(shape, seed=0):
    return np.random.default_rng(seed).integers(60, 200, shape, dtype=np.uint8)


def write_ngff(path, array, lattice):
    group = zarr.open_group(path, mode="w", zarr_format=2)
    group.create_array("s0", data=array, chunks=(5, 20, 30))
    transforms = [
        {"type": "scale", "scale": list(lattice.voxel_nm)},
        {"type": "translation", "translation": list(lattice.translation_nm)},
    ]
    axes = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    datasets = [{"path": "s0", "coordinateTransformations": transforms}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]


def score_file(path, source, fold, dice, records=()):
    def aggregate(shift):
        scores = {name: {"iou": max(0.0, value - shift)} for name, value in dice.items() if value is not None}
        return {"label_scores": scores, "overall_score": float(np.mean(list(dice.values()))) - shift}

    content = {
        "rules": "csc-2026.06",
        "model": source,
        "fold": fold,
        "records": list(records),
        "aggregate": aggregate(0.1),
        "clean": aggregate(0.1),
        "background": aggregate(1.0) | {"overall_score": 0.0},
        "mean_dice": float(np.mean(list(dice.values()))),
        "dice": dice,
        "ceiling": 0.185,
        "interval": {"low": 0.1, "high": 0.6},
        "failed": [],
        "note": "",
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def scored(tmp_path):
    """Two validation crops with EM, truth (on a finer grid for one of them) and segmentations of two sources."""
    root = tmp_path / "data"
    base = root / "d/d.zarr/recon-1"
    write_ngff(base / "em/fibsem-uint8", em_block((5, 80, 120)), Lattice((8, 8, 8), (104, 204, 304), (5, 80, 120)))
    fine = Lattice((4, 4, 4), (102, 202, 302), (10, 80, 120))
    rows, segments = [["crop", "em", "labels"]], []
    for name, lattice in (("crop1", LATTICE), ("crop2", fine)):
        truth = np.zeros(lattice.shape, np.uint8)
        truth[:, : lattice.shape[1] // 2, : lattice.shape[2] // 3] = 1
        write_ngff(base / f"labels/groundtruth/{name}/pm", truth, lattice)
        labels = f"d/d.zarr/recon-1/labels/groundtruth/{name}"
        rows.append([f"d/{name}", "d/d.zarr/recon-1/em/fibsem-uint8", labels])
        store = zarr.open_group(tmp_path / f"segment/volumes/d_{name}.zarr", mode="w", zarr_format=2)
        store.create_array("pm/s0", data=np.roll(truth, 3, axis=2), chunks=(5, 40, 60))
        segments.append(
            {"name": f"d/{name}", "path": f"volumes/d_{name}.zarr", "target": lattice.to_dict(), "status": "ok"}
        )
    with open(tmp_path / "crops.csv", "w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    segment = tmp_path / "segment/validation.json"
    segment.write_text(json.dumps({"records": segments}))
    records = [{"crop": f"d/crop{n}", "label": "pm", "dice": 0.9 - 0.1 * n} for n in (1, 2)]
    scores = [
        score_file(tmp_path / f"{source}.json", source, "0", {"pm": 0.8}, records) for source in ("unet", "ensemble")
    ]
    return scores, [segment, segment], tmp_path / "crops.csv", root


def test_predictions_show_em_truth_and_every_source(scored, tmp_path):
    scores, segments, crops, root = scored
    predictions(scores, segments, crops, tmp_path / "p.png", data_root=root)
    picture = pixels(tmp_path / "p.png")
    assert has_colour(picture, "pm")
    # reddish pixels in the columns of truth and both sources, none in that of the EM
    red = picture[..., 0] - picture[..., 2] > 60
    body = red[: int(0.93 * len(red))]
    quarters = np.array_split(body, 4, axis=1)
    assert not quarters[0].any()
    assert all(quarter.mean() > 0.02 for quarter in quarters[1:])


def test_a_panel_says_why_a_source_did_not_segment_a_crop_or_a_class(scored, tmp_path):
    scores, segments, crops, root = scored
    first, second = json.loads(segments[0].read_text())["records"]
    cause = "served by grid 32nm, the nearest to its voxels"
    partly = tmp_path / "segment/partly.json"
    partly.write_text(
        json.dumps({"records": [{**first, "status": "not served", "cause": cause}, {**second, "elsewhere": ["pm"]}]})
    )
    predictions(scores, [partly, segments[1]], crops, tmp_path / "p.svg", data_root=root)
    text = " ".join((tmp_path / "p.svg").read_text().replace("<!--", " ").replace("-->", " ").split())
    assert "not segmented: served by" in text and "left to another grid: pm" in text
    predictions(scores, segments, crops, tmp_path / "p.svg", data_root=root)
    assert "another grid" not in (tmp_path / "p.svg").read_text()


def test_predictions_prefer_sources_that_segmented_the_shown_crops(scored, tmp_path):
    scores, segments, crops, root = scored
    none = tmp_path / "segment/none.json"
    record = {"status": "not served", "cause": "served by grid 32nm", "path": None}
    none.write_text(json.dumps({"records": [{"name": f"d/crop{n}", **record} for n in (1, 2)]}))
    dice = {"absent": 0.9, "a": 0.7, "b": 0.5, "c": 0.3}
    more = [score_file(tmp_path / f"{name}.json", name, "0", {"pm": value}) for name, value in dice.items()]
    where = [none, *[segments[0]] * 3]
    predictions([scores[1], *more], [segments[1], *where], crops, tmp_path / "p.svg", data_root=root)
    text = (tmp_path / "p.svg").read_text()
    assert [name for name in ("ensemble", *dice) if f"{name}, fold 0" in text] == ["ensemble", "a", "b", "c"]


def test_predictions_are_the_same_bytes_each_time(scored, tmp_path):
    scores, segments, crops, root = scored
    for name in ("a.png", "b.png"):
        predictions(scores, segments, crops, tmp_path / name, data_root=root)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_predictions_say_so_when_nothing_was_scored(scored, tmp_path):
    _, segments, crops, root = scored
    empty = score_file(tmp_path / "none.json", "unet", "0", {"pm": 0.0})
    predictions([empty], segments[:1], crops, tmp_path / "p.png", data_root=root)
    assert pixels(tmp_path / "p.png").std() > 5


def write_run(folder, model, fold, shift):
    folder.mkdir()
    with open(folder / "history.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["step", "loss", "lr", "mean_dice", "dice_pm"])
        for step in range(50, 301, 50):
            dice = step / 600 + shift if step % 100 == 0 else ""
            writer.writerow([step, 1 / step + shift, 1e-3 * (1 - step / 400), dice, dice])
    (folder / "metrics.json").write_text(
        json.dumps(
            {"model": model, "fold": fold, "best_step": 300, "best_mean_dice": 0.5 + shift, "untrained_mean_dice": 0.05}
        )
    )
    return folder / "history.csv", folder / "metrics.json"


def test_training_curves_show_every_run(tmp_path):
    shifts = {("a", 0): 0.0, ("a", 1): 0.05, ("b", 0): 0.1, ("b", 1): 0.15}
    runs = [write_run(tmp_path / f"{model}{fold}", model, fold, shift) for (model, fold), shift in shifts.items()]
    histories, metrics = zip(*runs, strict=True)
    training_curves(histories, metrics, tmp_path / "t.png")
    picture = pixels(tmp_path / "t.png")
    assert (np.abs(picture - [0x00, 0x72, 0xB2]).max(axis=-1) < 40).sum() > 200
    assert (np.abs(picture - [0xD5, 0x5E, 0x00]).max(axis=-1) < 40).sum() > 200


def test_svg_has_no_date_and_is_the_same_bytes_each_time(tmp_path):
    history, metrics = write_run(tmp_path / "run", "a", 0, 0.0)
    for name in ("a.svg", "b.svg"):
        training_curves([history], [metrics], tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "<dc:date>" not in text


@pytest.mark.parametrize("sources", [2, 8])
def test_scores_are_drawn_as_bars_or_as_a_map(tmp_path, sources):
    names = ["ensemble", *(f"model_{index}" for index in range(1, sources))]
    files = [
        score_file(
            tmp_path / f"{name}.json", name, "0", {"pm": 0.3 + 0.05 * index, "nuc": 0.6}, [pm_of("d/crop1", 0.3)]
        )
        for index, name in enumerate(names)
    ]
    class_scores(files, tmp_path / "classes.png")
    ensemble_gain(files, tmp_path / "gain.png")
    assert pixels(tmp_path / "classes.png").std() > 20
    assert pixels(tmp_path / "gain.png").std() > 10


def pm_of(crop, share):
    counts = {"tp": round(1000 * share), "fp": 0, "fn": 1000 - round(1000 * share), "tn": 1000}
    return {"crop": crop, "label": "pm", "status": "scored", "kind": "semantic", "known_voxels": 2000, **counts}


def test_the_ensembles_gain_is_over_the_labels_that_all_were_scored_on(tmp_path):
    files = [
        score_file(tmp_path / f"{name}0.json", name, "0", {"pm": dice}, [pm_of("d/crop1", dice)])
        for name, dice in [("ensemble", 0.5), ("a", 0.4), ("b", 0.3)]
    ]
    ensemble_gain(files, tmp_path / "one.svg")
    lone = [
        score_file(tmp_path / f"{name}1.json", name, "1", {"pm": 0.9}, [pm_of("d/crop2", 0.9)])
        for name in ("ensemble", "a")
    ]
    ensemble_gain([*files, *lone], tmp_path / "two.svg")
    text = (tmp_path / "one.svg").read_text()
    assert all(name in text for name in ("ensemble", "overall", "pm"))
    assert text == (tmp_path / "two.svg").read_text()


def test_ensemble_without_models_says_that_there_is_nothing_to_compare(tmp_path):
    alone = score_file(tmp_path / "e.json", "ensemble", "0", {"pm": 0.5}, [pm_of("d/crop1", 0.5)])
    ensemble_gain([alone], tmp_path / "gain.svg")
    assert "Nothing to compare" in (tmp_path / "gain.svg").read_text()


def test_bars_fill_the_figure_although_no_artefact_is_marked(tmp_path):
    files = [score_file(tmp_path / f"{name}.json", name, "0", {"pm": 0.9, "nuc": 0.8}) for name in ("a", "b")]
    class_scores(files, tmp_path / "classes.png")
    picture = pixels(tmp_path / "classes.png")
    coloured = np.ptp(picture, axis=-1) > 80
    columns = np.flatnonzero(coloured.any(axis=0))
    assert coloured.mean() > 0.1
    assert np.ptp(columns) > 0.8 * picture.shape[1]
