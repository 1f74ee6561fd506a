"""The report's charts: courses of the trainings and what they took, scores per class, differences between models."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.colours import SERIES, colour_of
from cellmap_pipe.evaluation.challenge import aggregate
from cellmap_pipe.evaluation.paired import Comparison, compare_sources, kinds_score, shared_records
from cellmap_pipe.report.canvas import drawing, write_message
from cellmap_pipe.report.ceiling import read_ceilings
from cellmap_pipe.report.comparison import VERDICTS_SHOWN, by_grid, pooled_records
from cellmap_pipe.report.tables import ENSEMBLE, Record, Scores, grid_ceiling, in_order, read_metrics, read_scores
from cellmap_pipe.report.training import Run, equal_budget, read_runs
from cellmap_pipe.report.versions import rules_name
from cellmap_pipe.training.alarms import MOST_WAITING
from cellmap_pipe.training.usage import Usage

Path = str | os.PathLike[str]

_LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = "osvPXD^*"

# Markers on the lines of models: the first for as many as there are colours, the next for as many again.
_ROUNDS = (".", "^", "s", "x")

# More sources than this are drawn as a heat map: bars would become too thin to compare.
_MOST_BARS = 6

# A score by the rules `clean` is drawn where it differs by more than this from the official one.
_NOTABLE = 0.05


def _series(names: Sequence[str]) -> dict[str, str]:
    """Return a colour per name: black for the ensemble; models beyond the palette share colours."""
    models = [name for name in names if name != ENSEMBLE]
    return {name: SERIES[index % len(SERIES)] for index, name in enumerate(models)} | {ENSEMBLE: "#000000"}


def training_curves(histories: Sequence[Path], metrics: Sequence[Path], out: Path) -> None:
    """Draw loss, validation Dice and learning rate of all runs over their optimiser steps.

    histories, metrics: history.csv and metrics.json of the same runs in the same order. A model has a colour, a fold a
    line style; a marker shows the checkpoint that was kept, a tick at the left edge the untrained network's Dice.
    """
    runs = read_runs(histories, metrics)
    if not runs:
        write_message(out, "No run yet.")
        return
    styles = _styles(runs)
    with drawing(out, (12.0, 3.4 + 0.16 * max(0, len(runs) - 8))) as figure:
        loss, dice, rate = figure.subplots(1, 3)
        for run, style in zip(runs, styles, strict=True):
            _draw_run(run, (loss, dice, rate), style)
        loss.set(title="Training loss", xlabel="step", ylabel="loss (no unit)")
        loss.set_ylim(bottom=0)
        dice.set(title="Validation", xlabel="step", ylabel="mean Dice over classes (no unit)", ylim=(0, 1))
        rate.set(title="Learning rate", xlabel="step", ylabel="learning rate (no unit)")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        for axes in (loss, dice, rate):
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.set_xlim(left=0)
        figure.legend(*dice.get_legend_handles_labels(), loc="outside right upper")


def _styles(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return how each run's line is drawn: a colour for its model, a line style for its fold.

    Models beyond the palette begin it again, with a marker that tells them from those before.
    """
    models = list(dict.fromkeys(run.model for run in runs))
    colours = _series(models)
    folds = list(dict.fromkeys(run.fold for run in runs))
    return [
        {
            "color": colours[run.model],
            "linestyle": _LINES[folds.index(run.fold) % len(_LINES)],
            "linewidth": 1.5,
            "marker": _ROUNDS[models.index(run.model) // len(SERIES) % len(_ROUNDS)],
            "markersize": 4,
        }
        for run in runs
    ]


def _few_marks(points: int) -> dict[str, Any]:
    """Return how often a line of so many points is marked: in long ones markers would hide it and fill the file."""
    return {"markevery": max(1, points // 12)}


def _draw_run(run: Run, panels: tuple[Axes, Axes, Axes], style: Mapping[str, Any]) -> None:
    loss, dice, rate = panels
    metric, history = run.metrics, run.history
    steps = history.get("step", np.zeros(0))
    label = _label(run)
    for axes, name in ((loss, "loss"), (rate, "lr")):
        values = history.get(name, np.full(len(steps), np.nan))
        filled = np.isfinite(values)
        axes.plot(steps[filled], values[filled], **style, **_few_marks(int(filled.sum())))
    values = history.get("mean_dice", np.full(len(steps), np.nan))
    measured = np.isfinite(values)
    dice.plot(steps[measured], values[measured], label=label, **style, **_few_marks(int(measured.sum())))
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


def _label(run: Run) -> str:
    return f"{run.model}, fold {run.fold}"


def training_usage(runs: Sequence[Run], out: Path, *, points: int = 120) -> None:
    """Draw speed, waiting for data and memory of all runs over their optimiser steps, as their usage.csv tells.

    Long runs are averaged to at most `points` points. A run directory without usage.csv has no line.
    """
    measured = [
        (run, style) for run, style in zip(runs, _styles(runs), strict=True) if any(line.steps for line in run.usage)
    ]
    if not measured:
        write_message(out, "No training has noted its speed and memory (usage.csv in its run directory).")
        return
    with drawing(out, (12.0, 3.4 + 0.16 * max(0, len(measured) - 8))) as figure:
        speed, waiting, memory = figure.subplots(1, 3)
        for run, style in measured:
            steps, (rate, share, host, gpu) = _course(run.usage, points)
            for axes, line in zip((speed, waiting, memory), (rate, share, host), strict=True):
                axes.plot(steps, line, label=_label(run), **style, **_few_marks(len(steps)))
            if np.isfinite(gpu).any():
                memory.plot(steps, gpu, **style | {"marker": "+", "markersize": 6}, **_few_marks(len(steps)))
        speed.set(title="Speed", xlabel="step", ylabel="patches per second, all processes")
        waiting.set(title="Waiting for data", xlabel="step", ylabel="share of the steps' time (%)", ylim=(0, 100))
        waiting.axhline(100 * MOST_WAITING, color="#666666", linewidth=1.0, linestyle=(0, (1, 1)))
        memory.set(
            title="Memory so far (+: of the GPU)", xlabel="step", ylabel="most memory of the first process (GiB)"
        )
        for axes in (speed, waiting, memory):
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.set_xlim(left=0)
        speed.set_ylim(bottom=0)
        memory.set_ylim(bottom=0)
        figure.legend(*speed.get_legend_handles_labels(), loc="outside right upper")


def _course(usage: Sequence[Usage], points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return steps (n,) and patches/s, waiting (%), memory and GPU memory so far in GiB (4, n), n at most `points`.

    In the order of the lines: where a kill lost some work the steps go back. GPU memory is NaN without a GPU.
    """
    lines = [line for line in usage if line.steps]
    parts = np.array_split(np.arange(len(lines)), min(points, len(lines)))
    chunks = [[lines[i] for i in part] for part in parts]
    seconds = np.array([max(sum(line.seconds for line in chunk), 1e-3) for chunk in chunks])
    host = [max(line.memory_gib for line in chunk) for chunk in chunks]
    gpu = [max((x for line in chunk if (x := line.gpu_memory_gib) is not None), default=np.nan) for chunk in chunks]
    values = [
        np.array([sum(line.patches for line in chunk) for chunk in chunks]) / seconds,
        100 * np.array([sum(line.waiting * line.seconds for line in chunk) for chunk in chunks]) / seconds,
        np.array(host),
        np.array(gpu),
    ]
    return np.array([chunk[-1].step for chunk in chunks]), np.array(values)


def budgets(runs: Sequence[Run], out: Path) -> None:
    """Draw the smoothed validation Dice of all runs over steps and over hours, and where their common budget ends."""
    budget = equal_budget(runs)
    if not budget.runs:
        write_message(out, "No training was validated.")
        return
    with drawing(out, (12.0, 3.8 + 0.16 * max(0, len(budget.runs) - 9))) as figure:
        by_steps, by_hours = figure.subplots(1, 2, sharey=True)
        for run, style in zip(budget.runs, _styles(budget.runs), strict=True):
            steps, dice = run.validations()
            by_steps.plot(steps, dice, label=_label(run), **style, **_few_marks(len(steps)))
            hours = run.hours_at(steps)
            if budget.hours is not None and hours is not None:
                by_hours.plot(hours, dice, **style, **_few_marks(len(hours)))
        kind = "GPU hours" if any(run.on_gpu for run in budget.runs) else "CPU hours (hours x processes)"
        by_steps.set(title="Over steps", xlabel="step", ylabel="smoothed mean Dice (no unit)", ylim=(0, 1))
        by_hours.set(title="Over hours", xlabel=kind if budget.hours is not None else "hours")
        for axes, limit in ((by_steps, budget.steps), (by_hours, budget.hours)):
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.set_xlim(left=0)
            if limit is not None:
                axes.axvline(limit, color="black", linewidth=1.0, linestyle=(0, (1, 1)))
                axes.text(limit, 1.0, "reached by all ", ha="right", va="top", fontsize=7)
        if budget.hours is None:
            by_hours.text(0.5, 0.5, budget.note, ha="center", va="center", wrap=True, transform=by_hours.transAxes)
            by_hours.set_xticks([])
        figure.legend(*by_steps.get_legend_handles_labels(), loc="outside right upper")


def differences(score_jsons: Sequence[Path], out: Path, *, grids: Mapping[str, str] | None = None) -> None:
    """Draw how far every source is behind the best one, with both intervals of the difference, by the official rules.

    Ties are grey: 0, the best source's own line, lies in their interval. grids: by model; each has a panel, for models
    of different grids are scored on different labels.
    """
    compared = {
        grid: comparison
        for grid, scores in by_grid(read_scores(score_jsons), grids or {}).items()
        if (comparison := compare_sources(pooled_records(scores))).differences
    }
    if not compared:
        write_message(out, "Nothing to compare: two sources must be scored on the same crops.")
        return
    heights = [1.0 + len(comparison.scores) for comparison in compared.values()]
    with drawing(out, (8.5, 1.0 + 0.6 * len(compared) + 0.32 * (sum(heights) - len(heights)))) as figure:
        panels = figure.subplots(len(compared), squeeze=False, height_ratios=heights)[:, 0]
        for axes, (grid, comparison) in zip(panels, compared.items(), strict=True):
            _draw_differences(axes, comparison)
            axes.set_title(f"grid {grid}" if len(compared) > 1 else "")
        figure.suptitle("95 % intervals: thick of one pair, thin of all pairs at once", fontweight="bold", fontsize=10)


def _draw_differences(axes: Axes, comparison: Comparison) -> None:
    best = comparison.order[0]
    behind = [each for each in comparison.differences if each.first == best]
    rows = np.arange(1, len(behind) + 1)
    axes.axvline(0, color="black", linewidth=1.0)
    axes.plot(0, 0, marker="D", markersize=6, color="black")
    for row, each in zip(rows, behind, strict=True):
        colour = VERDICTS_SHOWN[each.verdict]
        axes.hlines(row, -each.high_all, -each.low_all, color=colour, linewidth=1.2)
        axes.hlines(row, -each.high, -each.low, color=colour, linewidth=4.5)
        axes.plot(-each.difference, row, marker="|", markersize=13, markeredgewidth=2, color="black")
    axes.set_yticks([0, *rows], [best, *(f"{each.second}\n{each.verdict}" for each in behind)], fontsize=8)
    axes.set_ylim(len(behind) + 0.5, -0.5)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"overall score less that of {best} on the same {comparison.crops} crops (no unit)")
    axes.set_ylabel("source")


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


def ensemble_gain(score_jsons: Sequence[Path], out: Path, *, grids: Mapping[str, str] | None = None) -> None:
    """Draw the ensemble against each single model, by the official rules: the overall score, then that of each class.

    Pooled over the labels of crops that all were scored on, those of the page of comparisons. grids: by model; each has
    a panel, for models of different grids are scored on different labels.
    """
    scores = read_scores(score_jsons)
    panels = {}
    for grid, own in by_grid(scores, grids or {}).items():
        shared = shared_records(pooled_records(own))
        if ENSEMBLE in shared and len(shared) > 1 and shared[ENSEMBLE]:
            panels[grid] = shared
    if not panels:
        write_message(out, "Nothing to compare: the ensemble and a model must be scored on the same crops.")
        return
    drawn = {grid: {source: _gain_rows(found) for source, found in shared.items()} for grid, shared in panels.items()}
    heights = [len(of_source[ENSEMBLE]) + 2.0 for of_source in drawn.values()]
    colours = _series(list(dict.fromkeys(source for of_source in drawn.values() for source in of_source)))
    rules = rules_name(*(str(entry.content["rules"]) for entry in scores))
    with drawing(out, (8.0, 0.9 + 0.27 * sum(heights))) as figure:
        handles: dict[str, Artist] = {}
        all_axes = figure.subplots(len(drawn), squeeze=False, height_ratios=heights)[:, 0]
        for axes, (grid, of_source) in zip(all_axes, drawn.items(), strict=True):
            _draw_gain(axes, of_source, colours)
            axes.set_xlabel(f"score, rules {rules} (no unit)")
            axes.set_title(f"grid {grid}" if len(drawn) > 1 else "")
            found, names = axes.get_legend_handles_labels()
            handles |= dict(zip(names, found, strict=True))
        figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=4)


def _gain_rows(records: Sequence[Record]) -> dict[str, float]:
    """Return the overall score of records and that of each class, by name."""
    by_class = aggregate(records)["label_scores"]
    overall = kinds_score(records)
    rows = {"overall": float("nan") if overall is None else overall}
    for name in in_order(by_class):
        entry = by_class[name]
        rows[name] = float(entry["iou"] if "iou" in entry else entry["combined_score"])
    return rows


def _draw_gain(axes: Axes, of_source: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> None:
    labels = list(of_source[ENSEMBLE])
    values = {source: np.array([found[label] for label in labels]) for source, found in of_source.items()}
    singles = [source for source in values if source != ENSEMBLE]
    rows = np.arange(len(labels))
    spread = np.array([values[source] for source in singles])
    axes.hlines(rows, np.fmin.reduce(spread), np.fmax.reduce(spread), color="#bbbbbb", linewidth=1.2)
    for source in singles:
        marker = _MARKERS[list(colours).index(source) % len(_MARKERS)]
        axes.plot(
            values[source],
            rows,
            linestyle="none",
            marker=marker,
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
    axes.axhline(0.5, color="#999999", linewidth=0.8)
    axes.set_yticks(rows, labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_ylabel("overall, then each class")
