"""Planes of validation crops: EM, truth and predictions; and the figure that puts all sources side by side."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from statistics import fmean
from typing import Any

import numpy as np
import zarr

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.evaluation.container import MASK_ARRAY
from cellmap_pipe.files import read_json
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.em import read_em
from cellmap_pipe.prepare.labels import PRESENT, UNKNOWN, LabelReader, read_label
from cellmap_pipe.prepare.ngff import read_image
from cellmap_pipe.report.canvas import (
    class_legend,
    drawing,
    grey,
    overlaid,
    show_plane,
    thinned,
    visible,
    write_message,
)
from cellmap_pipe.report.tables import ENSEMBLE, Scores, read_csv, read_scores

Path = str | os.PathLike[str]

# Pixels along the longer side of one drawn plane: more cannot be seen in the report.
_PANEL = 512

# Inches that all panels of a row share in the predictions.
_ROW_INCH = 11.0


@dataclass(frozen=True)
class _Source:
    """One source of one fold: its scores, and its segmented crops by name with the folder that paths start from."""

    scores: Scores
    segments: dict[str, Mapping[str, Any]]
    folder: FilePath


@dataclass(frozen=True)
class _Example:
    """One crop to show: its plane's EM (y, x), masks of the truth and of every source, and what is written below."""

    title: str
    image: np.ndarray
    truth: dict[str, np.ndarray]
    known: np.ndarray
    answers: list[dict[str, np.ndarray]]
    voxel_nm: tuple[float, float]


def predictions(
    score_jsons: Sequence[Path],
    segment_jsons: Sequence[Path],
    crops_csv: Path,
    out: Path,
    *,
    data_root: Path,
    examples: int = 2,
) -> None:
    """Draw EM, truth and predictions of the best and the worst validation crops of one fold.

    score_jsons, segment_jsons: `scores/{source}/fold{k}.json` and the validation segmentation that it scored, of the
    same sources in the same order. Crops are ranked by the mean Dice of the ensemble (or else of the best source) over
    the classes that occur; up to `examples` of either end are shown, at their own voxel size and middle z plane. Of
    more than four sources only the ensemble and the best three are drawn.
    """
    sources = [
        _Source(scores, segmented(path), FilePath(path).parent)
        for scores, path in zip(read_scores(score_jsons), segment_jsons, strict=True)
    ]
    shown = sorted(sources, key=lambda source: (source.scores.source != ENSEMBLE, -(source.scores.mean_dice or 0)))[:4]
    crops = {row["crop"]: row for row in read_csv(crops_csv)}
    ranked = _ranked(shown[0], set(crops)) if shown else []
    if not ranked:
        write_message(out, "No validation crop was scored.")
        return
    places = list(range(len(ranked)))
    if len(ranked) > 2 * examples:
        places = [*places[:examples], *places[-examples:]]
    drawn = [_example(ranked[place], _place(place, len(ranked)), crops, shown, FilePath(data_root)) for place in places]
    titles = ["EM", "Truth", *(f"{source.scores.source}, fold {source.scores.fold}" for source in shown)]
    heights = [_panel_height(example, _ROW_INCH / len(titles)) for example in drawn]
    size = (_ROW_INCH + 0.3, sum(heights) + 0.5 * len(drawn) + 0.7)
    with drawing(out, size) as figure:
        panels = figure.subplots(len(drawn), len(titles), squeeze=False, height_ratios=heights)
        for axes, title in zip(panels[0], titles, strict=True):
            axes.set_title(title)
        for row, example in zip(panels, drawn, strict=True):
            show_plane(row[0], example.image, example.voxel_nm)
            show_plane(row[1], overlaid(example.image, example.truth, example.known), example.voxel_nm)
            for axes, masks in zip(row[2:], example.answers, strict=True):
                show_plane(axes, overlaid(example.image, masks), example.voxel_nm)
            row[0].set_xlabel(example.title, fontsize=8, loc="left")
        class_legend(figure, _seen([masks for example in drawn for masks in (example.truth, *example.answers)]))


def segmented(segment_json: Path) -> dict[str, Mapping[str, Any]]:
    """Return the records of the volumes that were segmented, by name. Raises ContractError for an unreadable file."""
    records = read_json(segment_json, "run `snakemake -R segment`")["records"]
    return {str(record["name"]): record for record in records if record["status"] == "ok"}


def _seen(planes: Sequence[Mapping[str, np.ndarray]]) -> list[str]:
    """Return the classes that are not wholly painted over in at least one of the planes."""
    seen = {name for masks in planes for name in visible(masks)}
    return [name for name in CLASSES if name in seen]


def _panel_height(example: _Example, width_inch: float) -> float:
    """Return the height in inches of a panel that is `width_inch` wide; tall planes become narrower instead."""
    height, width = example.image.shape
    return width_inch * min(1.3, height * example.voxel_nm[0] / (width * example.voxel_nm[1]))


def _place(index: int, count: int) -> str:
    if count == 1:
        return "the only crop"
    return {0: f"best of {count}", count - 1: f"worst of {count}"}.get(index, f"{index + 1} of {count}")


def _ranked(source: _Source, listed: set[str]) -> list[tuple[str, float]]:
    """Return the crops that can be drawn with their mean Dice, best first; equal ones by name."""
    dice: dict[str, list[float]] = {}
    for record in source.scores.content["records"]:
        if record["dice"] is not None and record["crop"] in listed and record["crop"] in source.segments:
            dice.setdefault(record["crop"], []).append(float(record["dice"]))
    means = {crop: fmean(values) for crop, values in dice.items()}
    return sorted(means.items(), key=lambda item: (-item[1], item[0]))


def _example(
    ranked: tuple[str, float],
    place: str,
    crops: Mapping[str, Mapping[str, str]],
    sources: Sequence[_Source],
    data_root: FilePath,
) -> _Example:
    name, dice = ranked
    crop, lead = crops[name], sources[0]
    target = Lattice.from_dict(lead.segments[name]["target"])
    middle = target.shape[0] // 2
    step = thinned(max(target.shape[1:]), _PANEL)
    plane = target.window((middle, 0, 0), (1, *target.shape[1:]))
    annotated = sorted({str(record["label"]) for record in lead.scores.content["records"] if record["crop"] == name})
    truth, known = truth_plane(data_root / crop["labels"], annotated, plane, step)
    return _Example(
        f"{name}, {place}\nmean Dice {dice:.3f} ({lead.scores.source}), z = {plane.translation_nm[0]:,.0f} nm",
        em_plane(data_root / crop["em"], plane, step),
        truth,
        known,
        [_answer_plane(source, name, annotated, middle, step) for source in sources],
        (target.voxel_nm[1] * step, target.voxel_nm[2] * step),
    )


def _answer_plane(source: _Source, crop: str, annotated: Sequence[str], z: int, step: int) -> dict[str, np.ndarray]:
    """Return the masks (y, x) of the classes that a source segmented in plane `z` of a crop, {} if it did not."""
    if crop not in source.segments:
        return {}
    return answer_plane(source.folder / source.segments[crop]["path"], annotated, z, step)


def em_plane(em: FilePath, plane: Lattice, step: int) -> np.ndarray:
    """Return every `step`-th voxel (y, x) of the EM image at `em` on a lattice of one plane, as float32 in 0..1."""
    return grey(read_em(read_image(em), plane, max_upsample=math.inf).image[0, ::step, ::step])


def answer_plane(store: FilePath, classes: Sequence[str], z: int, step: int) -> dict[str, np.ndarray]:
    """Return the masks of those `classes` that a segmented volume has (y, x), on every `step`-th voxel of plane `z`."""
    return {
        name: np.asarray(zarr.open_array(store / name / MASK_ARRAY, mode="r")[z, ::step, ::step]) > 0
        for name in classes
        if (store / name).is_dir()
    }


def truth_plane(
    labels: FilePath, annotated: Sequence[str], plane: Lattice, step: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the masks of the annotated classes (y, x) on every `step`-th voxel of a plane, and where any is known."""
    shape = tuple(len(range(0, size, step)) for size in plane.shape[1:])
    known = np.zeros(shape, bool)
    masks: dict[str, np.ndarray] = {}
    for name in annotated:
        label = read_label(labels / name)
        lattice = label.level.lattice
        first = np.rint(lattice.index_of(plane.translation_nm)).astype(int)
        last = np.rint(lattice.index_of(plane.world_of([size - 1 for size in plane.shape]))).astype(int)
        axes = [
            np.linspace(a, b, size).round().astype(int) for a, b, size in zip(first, last, plane.shape, strict=True)
        ]
        inside = [(index >= 0) & (index < size) for index, size in zip(axes, lattice.shape, strict=True)]
        z, y, x = (np.clip(index, 0, size - 1) for index, size in zip(axes, lattice.shape, strict=True))
        y, x = y[::step], x[::step]
        lower, upper = (z[0], y.min(), x.min()), (z[0] + 1, y.max() + 1, x.max() + 1)
        states = LabelReader(label).read(lower, upper)[1][0][np.ix_(y - y.min(), x - x.min())]
        states[~(inside[0][0] & np.outer(inside[1][::step], inside[2][::step]))] = UNKNOWN
        masks[name] = states == PRESENT
        known |= states != UNKNOWN
    return masks, known
