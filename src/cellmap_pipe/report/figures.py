"""The report's charts: training curves, scores per class, and what the ensemble gains."""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.colours import SERIES, colour_of
from cellmap_pipe.files import read_json
from cellmap_pipe.report.canvas import drawing, write_message
from cellmap_pipe.report.ceiling import read_ceilings
from cellmap_pipe.report.tables import ENSEMBLE, Scores, grid_ceiling, read_metrics, read_scores
from cellmap_pipe.report.versions import rules_name

Path = str | os.PathLike[str]

_LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = "osvPXD^*"

# More sources than this are drawn as a heat map: bars would become too thin to compare.
_MOST_BARS = 6

# A score by the rules `clean` is drawn where it differs by more than this from the official one.
_NOTABLE = 0.05


def _series(names: Sequence[str]) -> dict[str, str]:
    """Return a colour per name: black for the ensemble; models beyond the palette share colours."""
    models = [name for name in names if name != ENSEMBLE]
    return {name: SERIES[index % len(SERIES)] for index, name in enumerate(models)} | {ENSEMBLE: "#000000"}


def _columns(path: Path) -> dict[str, np.ndarray]:
    """Return the columns of a history.csv as float arrays, NaN where a cell is empty."""
    with open(path, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    names = list(rows[0]) if rows else []
    return {name: np.array([float(row[name]) if row[name] else np.nan for row in rows]) for name in names}


def training_curves(histories: Sequence[Path], metrics: Sequence[Path], out: Path) -> None:
    """Draw loss, validation Dice and learning rate of all runs over their optimiser steps.

    histories, metrics: history.csv and metrics.json of the same runs in the same order. A model has a colour, a fold a
    line style; a marker shows the checkpoint that was kept, a tick at the left edge the untrained network's Dice.
    """
    runs = [
        (read_json(metric, "run `snakemake -R train`"), _columns(history))
        for history, metric in zip(histories, metrics, strict=True)
    ]
    if not runs:
        write_message(out, "No run yet.")
        return
    models = list(dict.fromkeys(str(metric["model"]) for metric, _ in runs))
    folds = list(dict.fromkeys(str(metric["fold"]) for metric, _ in runs))
    colours = _series(models)
    with drawing(out, (12.0, 3.4 + 0.16 * max(0, len(runs) - 8))) as figure:
        loss, dice, rate = figure.subplots(1, 3)
        for metric, history in runs:
            _draw_run(
                metric, history, (loss, dice, rate), colours, _LINES[folds.index(str(metric["fold"])) % len(_LINES)]
            )
        loss.set(title="Training loss", xlabel="step", ylabel="loss (no unit)")
        loss.set_ylim(bottom=0)
        dice.set(title="Validation", xlabel="step", ylabel="mean Dice over classes (no unit)", ylim=(0, 1))
        rate.set(title="Learning rate", xlabel="step", ylabel="learning rate (no unit)")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        for axes in (loss, dice, rate):
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.set_xlim(left=0)
        figure.legend(*dice.get_legend_handles_labels(), loc="outside right upper")


def _draw_run(
    metric: Mapping[str, Any],
    history: Mapping[str, np.ndarray],
    panels: tuple[Axes, Axes, Axes],
    colours: Mapping[str, str],
    line: Any,
) -> None:
    loss, dice, rate = panels
    style = {"color": colours[str(metric["model"])], "linestyle": line, "linewidth": 1.5}
    steps = history.get("step", np.zeros(0))
    label = f"{metric['model']}, fold {metric['fold']}"
    for axes, name in ((loss, "loss"), (rate, "lr")):
        values = history.get(name, np.full(len(steps), np.nan))
        filled = np.isfinite(values)
        axes.plot(steps[filled], values[filled], **style)
    values = history.get("mean_dice", np.full(len(steps), np.nan))
    measured = np.isfinite(values)
    dice.plot(steps[measured], values[measured], label=label, marker=".", markersize=4, **style)
    if metric.get("best_mean_dice") is not None:
        dice.plot(
            metric["best_step"],
            metric["best_mean_dice"],
            marker="o",
            markersize=8,
            markerfacecolor="none",
            color=style["color"],
        )
    if metric.get("untrained_mean_dice") is not None:
        dice.plot(0, metric["untrained_mean_dice"], marker="_", markersize=14, color=style["color"], clip_on=False)


def _by_source(score_jsons: Sequence[Path]) -> dict[str, list[Scores]]:
    scores = read_scores(score_jsons)
    return {
        source: [entry for entry in scores if entry.source == source]
        for source in dict.fromkeys(entry.source for entry in scores)
    }


def _mean(values: Sequence[float | None]) -> float:
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers else float("nan")


def _scored_classes(sources: Mapping[str, Sequence[Scores]]) -> list[str]:
    named = {name for entries in sources.values() for entry in entries for name in entry.classes}
    return [name for name in CLASSES if name in named]


def _rules(sources: Mapping[str, Sequence[Scores]]) -> str:
    return rules_name(*(str(entry.content["rules"]) for entries in sources.values() for entry in entries))


def class_scores(
    score_jsons: Sequence[Path], out: Path, *, metrics_jsons: Sequence[Path] = (), ceiling_jsons: Sequence[Path] = ()
) -> None:
    """Draw Dice and challenge score per class of every source, with the score of an empty answer beside them.

    metrics_jsons, ceiling_jsons: as for the table of scores; the bars show the grid's ceiling where it is known.
    Several folds are averaged. Up to six sources are drawn as bars, more as a heat map.
    """
    sources = _by_source(score_jsons)
    classes = _scored_classes(sources)
    if not classes:
        write_message(out, "No validation crop was scored.")
        return
    dice = _table(sources, classes, lambda entry, name: entry.dice.get(name))
    score, clean, empty = (
        _table(sources, classes, partial(Scores.class_score, variant=variant))
        for variant in ("aggregate", "clean", "background")
    )
    rules = _rules(sources)
    metrics, ceilings = read_metrics(metrics_jsons), read_ceilings(ceiling_jsons)
    limits = {
        (entry.source, entry.fold): grid_ceiling(entry, metrics.get((entry.source, entry.fold), {}), ceilings)
        for entries in sources.values()
        for entry in entries
    }
    limit = _table(sources, classes, lambda entry, name: limits[entry.source, entry.fold].classes.get(name))
    if len(sources) <= _MOST_BARS:
        height = 1.4 + len(classes) * (0.14 * len(sources) + 0.12)
        with drawing(out, (11.0, height)) as figure:
            _score_bars(figure, list(sources), classes, dice, score, clean, np.fmax.reduce(empty), limit, rules)
    else:
        with drawing(out, (3.0 + 0.85 * len(sources), 1.8 + 0.42 * len(classes))) as figure:
            _score_maps(figure, list(sources), classes, dice, score, rules)


def _table(
    sources: Mapping[str, Sequence[Scores]], classes: Sequence[str], value: Callable[[Scores, str], float | None]
) -> np.ndarray:
    """Return the means over folds of `value` as an array (sources, classes), NaN where it is defined nowhere."""
    return np.array(
        [[_mean([value(entry, name) for entry in entries]) for name in classes] for entries in sources.values()]
    )


def _score_bars(
    figure: Figure,
    sources: list[str],
    classes: list[str],
    dice: np.ndarray,
    score: np.ndarray,
    clean: np.ndarray,
    empty: np.ndarray,
    limit: np.ndarray,
    rules: str,
) -> None:
    colours = _series(sources)
    thickness = 0.8 / len(sources)
    rows = np.arange(len(classes))
    panels = figure.subplots(1, 2, sharey=True)
    for row in rows[np.isnan(dice).all(axis=0)]:
        panels[0].text(0.01, row, "in no crop", va="center", fontsize=6, color="#555555")
    for axes, values in zip(panels, (dice, score), strict=True):
        for index, source in enumerate(sources):
            centre = rows - 0.4 + thickness * (index + 0.5)
            axes.barh(centre, values[index], thickness * 0.92, color=colours[source], label=source)
            for y, value in zip(centre, values[index], strict=True):
                if np.isfinite(value):
                    axes.text(value + 0.008, y, f"{value:.2f}", va="center", fontsize=6)
        axes.set_xlim(0, 1.06)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    # the official rules have artefacts: where they matter, the honest score stands beside theirs
    artefact = np.abs(clean - score) > _NOTABLE
    centres = rows + (thickness * (np.arange(len(sources)) + 0.5) - 0.4)[:, None]
    diamonds = {
        "marker": "D",
        "markersize": 5,
        "markerfacecolor": "white",
        "markeredgecolor": "black",
        "linestyle": "none",
        "clip_on": False,
    }
    (marks,) = panels[1].plot(
        clean[artefact], centres[artefact], **diamonds, label="by the rules 'clean', where far off"
    )
    marks.set_in_layout(False)  # without any mark its extent is the figure's corner, and the layout would reach for it
    known = np.isfinite(limit)
    if known.any():
        half = 0.5 * thickness
        panels[1].vlines(
            limit[known],
            centres[known] - half,
            centres[known] + half,
            color="#666666",
            linewidth=1.6,
            linestyle=(0, (1, 1)),
            label="the grid's ceiling",
        )
    panels[1].vlines(empty, rows - 0.42, rows + 0.42, color="black", linewidth=1.6, label="nothing marked")
    panels[0].set(title="Dice", xlabel="Dice over known voxels (no unit)", ylabel="class")
    panels[1].set(title=f"Challenge score, rules {rules}", xlabel="IoU, or instance score where marked * (no unit)")
    panels[0].set_yticks(rows, [f"{name}{'*' if CLASSES[name].instance else ''}" for name in classes])
    panels[0].set_ylim(len(classes) - 0.4, -0.6)
    for tick, name in zip(panels[0].get_yticklabels(), classes, strict=True):
        tick.set_bbox(
            {"boxstyle": "square,pad=0.15", "facecolor": "none", "edgecolor": colour_of(name), "linewidth": 1.6}
        )
    (diamond, *bars), (meaning, *names) = panels[1].get_legend_handles_labels()
    figure.legend([*bars, diamond], [*names, meaning], loc="outside upper center", ncols=min(5, len(sources) + 3))


def _score_maps(
    figure: Figure, sources: list[str], classes: list[str], dice: np.ndarray, score: np.ndarray, rules: str
) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("Dice", f"Challenge score, rules {rules}\n(IoU; * instance)")
    for axes, values, title in zip(panels, (dice, score), titles, strict=True):
        picture = axes.imshow(values.T, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for column, row in np.ndindex(values.shape):
            value = values[column, row]
            if np.isfinite(value):
                axes.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="black" if value > 0.55 else "white",
                )
        axes.set_title(title)
        axes.set_xticks(range(len(sources)), sources, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
        axes.set_xlabel("source")
    panels[0].set_ylabel("class")
    panels[0].set_yticks(
        range(len(classes)), [f"{name}{'*' if CLASSES[name].instance else ''}" for name in classes], fontsize=7
    )
    figure.colorbar(picture, ax=panels, label="score (no unit)", shrink=0.6)


def ensemble_gain(score_jsons: Sequence[Path], out: Path) -> None:
    """Draw the ensemble against each single model: the overall challenge score and mean Dice, then Dice per class.

    Several folds are averaged, over those that all sources have, so that each is measured on the same crops.
    """
    sources = _by_source(score_jsons)
    singles = {source: entries for source, entries in sources.items() if source != ENSEMBLE}
    if ENSEMBLE not in sources or not singles:
        write_message(out, "Nothing to compare: the ensemble and at least one model must be scored.")
        return
    folds = set.intersection(*({entry.fold for entry in entries} for entries in sources.values()))
    if not folds:
        write_message(out, "Nothing to compare: no fold is scored for the ensemble and every model.")
        return
    shared = {source: [entry for entry in entries if entry.fold in folds] for source, entries in sources.items()}
    occurring = {
        name
        for entries in shared.values()
        for entry in entries
        for name, value in entry.dice.items()
        if value is not None
    }
    classes = [name for name in _scored_classes(shared) if name in occurring]
    labels = ["challenge score", "mean Dice", *classes]
    values = {
        source: [
            _mean([entry.overall() for entry in entries]),
            _mean([entry.mean_dice for entry in entries]),
            *(_mean([entry.dice.get(name) for entry in entries]) for name in classes),
        ]
        for source, entries in shared.items()
    }
    rows = np.arange(len(labels))
    colours = _series(list(singles))
    with drawing(out, (8.0, 1.5 + 0.27 * len(labels))) as figure:
        axes = figure.subplots()
        spread = np.array([values[source] for source in singles])
        axes.hlines(rows, np.fmin.reduce(spread), np.fmax.reduce(spread), color="#bbbbbb", linewidth=1.2)
        for index, source in enumerate(singles):
            axes.plot(
                values[source],
                rows,
                linestyle="none",
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=6,
                markerfacecolor="none",
                markeredgewidth=1.4,
                color=colours[source],
                label=source,
            )
        axes.plot(
            values[ENSEMBLE],
            rows,
            linestyle="none",
            marker="|",
            markersize=15,
            markeredgewidth=3,
            color="black",
            label=ENSEMBLE,
        )
        axes.axhline(1.5, color="#999999", linewidth=0.8)
        axes.set_yticks(rows, labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_xlabel(f"overall score, rules {_rules(sources)}, or Dice (no unit)")
        axes.set_ylabel("overall, then Dice of each class")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
