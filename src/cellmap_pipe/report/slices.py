"""Planes of validation crops: EM, truth and predictions; and the figure that puts all sources side by side."""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from statistics import fmean
from typing import Any

import numpy as np
import zarr
from matplotlib.axes import Axes

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

# Sources that are drawn side by side, at most.
_MOST_SOURCES = 4

# Letters in a line, and in all, of what is written into or below a panel.
_LINE, _LONGEST = 26, 130


@dataclass(frozen=True)
class _Source:
    """One source of one fold: its scores, and its crops' records by name with the folder that paths start from."""

    scores: Scores
    records: dict[str, Mapping[str, Any]]
    folder: FilePath

    def has(self, crop: str) -> bool:
        """Return whether the crop was segmented."""
        return crop in self.records and self.records[crop]["status"] == "ok"


@dataclass(frozen=True)
class _Answer:
    """What a source answers in the plane of a crop: masks (y, x), and in words what it does not, and why."""

    masks: dict[str, np.ndarray]
    segmented: bool
    note: str


@dataclass(frozen=True)
class _Example:
    """One crop to show: its plane's EM (y, x), masks of the truth, every source's answer, and what is written below."""

    title: str
    image: np.ndarray
    truth: dict[str, np.ndarray]
    known: np.ndarray
    answers: list[_Answer]
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
    more than four sources only that one and three others are drawn: those that segmented most of these crops, and of
    them the best. Where a source did not segment a crop, its cause stands in the panel; where it left classes that are
    drawn to another grid, these are named below.
    """
    sources = [
        _Source(scores, _records(path), FilePath(path).parent)
        for scores, path in zip(read_scores(score_jsons), segment_jsons, strict=True)
    ]
    sources.sort(key=lambda source: (source.scores.source != ENSEMBLE, -(source.scores.mean_dice or 0)))
    crops = {row["crop"]: row for row in read_csv(crops_csv)}
    ranked = _ranked(sources[0], set(crops)) if sources else []
    if not ranked:
        write_message(out, "No validation crop was scored.")
        return
    places = list(range(len(ranked)))
    if len(ranked) > 2 * examples:
        places = [*places[:examples], *places[-examples:]]
    names = [ranked[place][0] for place in places]
    others = sorted(sources[1:], key=lambda source: -sum(map(source.has, names)))
    shown = [sources[0], *others[: _MOST_SOURCES - 1]]
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
            for axes, answer in zip(row[2:], example.answers, strict=True):
                _show_answer(axes, answer, example)
            row[0].set_xlabel(example.title, fontsize=8, loc="left")
        planes = [masks for example in drawn for masks in (example.truth, *(each.masks for each in example.answers))]
        class_legend(figure, _seen(planes))


def segmented(segment_json: Path) -> dict[str, Mapping[str, Any]]:
    """Return the records of the volumes that were segmented, by name. Raises ContractError for an unreadable file."""
    return {name: record for name, record in _records(segment_json).items() if record["status"] == "ok"}


def _records(segment_json: Path) -> dict[str, Mapping[str, Any]]:
    """Return the records of all volumes by name, whether they were segmented or not."""
    return {str(record["name"]): record for record in read_json(segment_json, "run `snakemake -R segment`")["records"]}


def _show_answer(axes: Axes, answer: _Answer, example: _Example) -> None:
    """Draw an answer over EM with its note below it; where there is none, the note over dimmed EM."""
    note = textwrap.fill(textwrap.shorten(answer.note, _LONGEST, placeholder=" ..."), _LINE)
    if answer.segmented:
        show_plane(axes, overlaid(example.image, answer.masks), example.voxel_nm)
        axes.set_xlabel(note, fontsize=7, loc="left")
        return
    show_plane(axes, overlaid(example.image, {}, np.zeros(example.image.shape, bool)), example.voxel_nm)
    shade = {"boxstyle": "square,pad=0.3", "facecolor": "black", "alpha": 0.6, "linewidth": 0}
    text = axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", va="center", fontsize=7, bbox=shade)
    text.set_color("white")


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
        if record["dice"] is not None and record["crop"] in listed and source.has(record["crop"]):
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
    target = Lattice.from_dict(lead.records[name]["target"])
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
        [_answer(source, name, annotated, middle, step) for source in sources],
        (target.voxel_nm[1] * step, target.voxel_nm[2] * step),
    )


def _answer(source: _Source, crop: str, annotated: Sequence[str], z: int, step: int) -> _Answer:
    """Return what a source answers of the annotated classes in plane `z` of a crop."""
    record = source.records.get(crop)
    if record is None or not source.has(crop):
        return _Answer({}, False, f"not segmented: {record['cause']}" if record else "not segmented: not predicted")
    elsewhere = record.get("elsewhere", [])  # records of earlier versions do not say
    asked = [name for name in annotated if name not in elsewhere]
    left = [name for name in annotated if name in elsewhere]
    masks = answer_plane(source.folder / record["path"], asked, z, step)
    return _Answer(masks, True, f"left to another grid: {', '.join(left)}" if left else "")


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
