"""What each training did and what it took: one row per run, its alarms, and the cost that stands beside the scores."""

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from cellmap_pipe.files import read_json, write_text
from cellmap_pipe.report.pages import Column, Content, heading, page, paragraph, table
from cellmap_pipe.training.alarms import MOST_WAITING
from cellmap_pipe.training.usage import CPU, Cost, Usage, cost, read_usage

Path = str | os.PathLike[str]

RUN_COLUMNS: tuple[Column, ...] = (
    Column("model"),
    Column("fold"),
    Column("steps", ",d", "optimiser steps"),
    Column("best step", ",d", "the step whose weights were kept"),
    Column("Dice", ".3f", "mean Dice over the classes, of the weights that were kept"),
    Column("smoothed", ".3f", "mean Dice smoothed over validations, by which the weights were chosen"),
    Column("untrained", ".3f", "mean Dice before the first step"),
    Column("patches/s", ".2f", "of all processes, while the training made steps"),
    Column("waiting for data (%)", ".0f", "share of that time in which the device had no data to work on"),
    Column("memory (GiB)", ".1f", "most memory of the first process"),
    Column("GPU memory (GiB)", ".1f", "most memory of the first GPU"),
    Column("attempts", "d", "how often the training was started: once, and after each walltime, kill or failure"),
    Column("hours", ",.3f", "by the clock, all attempts together, validations and what was lost in a kill included"),
    Column("GPU hours", ",.3f", "hours x GPUs"),
    Column("CPU hours", ",.3f", "hours x processes, where a training ran without GPUs"),
    Column("device", hint="what the training ran on"),
    Column("weights", ",d", "parameters of the network"),
    Column("patch (z y x, voxels)"),
    Column("grid"),
    Column("alarms", "d", "their number; they are named below"),
)

_SUMMED = ("steps", "attempts", "hours", "GPU hours", "CPU hours", "alarms")

NOT_MEASURED = "no usage.csv in the run directory: the run is of an earlier version, or its directory was removed"


@dataclass(frozen=True)
class Run:
    """One finished training: metrics.json, history.csv by column (NaN: not measured), the lines of its usage.csv."""

    metrics: dict[str, Any]
    history: dict[str, np.ndarray]
    usage: list[Usage]

    @property
    def model(self) -> str:
        return str(self.metrics["model"])

    @property
    def fold(self) -> str:
        return str(self.metrics["fold"])

    @cached_property
    def cost(self) -> Cost | None:
        """What it took, None where that was not measured."""
        return cost(self.usage) if self.usage else None

    @property
    def on_gpu(self) -> bool | None:
        """Whether all of it was computed on GPUs, None where that is not known or differs between attempts."""
        kinds = {line.device != CPU for line in self.usage}
        return kinds.pop() if len(kinds) == 1 else None

    @cached_property
    def course(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Steps, rising, and the hours x processes that led to each; None where the beginning was not measured.

        What was done twice because a kill lost it counts once, so that a lost node does no harm to a network that is
        compared with others. The cost counts it twice: it was paid.
        """
        points: list[tuple[int, float]] = []
        attempt = ""
        for line in self.usage:
            begun = line.step - line.steps
            if line.attempt != attempt:
                attempt = line.attempt
                if begun > (points[-1][0] if points else 0):
                    return None  # what came before was not measured
                points = _until(points, begun)
            points.append((line.step, points[-1][1] + line.processes * line.seconds / 3600))
        last = dict(points)  # of several lines of one step the last one, after its validation
        return (np.array(list(last)), np.array(list(last.values()))) if last else None

    def hours_at(self, steps: np.ndarray) -> np.ndarray | None:
        """Return the hours x processes that led to each of `steps`, None where they were not measured."""
        if self.course is None:
            return None
        return np.interp(steps, *self.course)

    def validations(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps of the validations and the smoothed mean Dice after each."""
        dice = self.history.get("smoothed_dice", np.zeros(0))
        measured = np.isfinite(dice)
        return self.history.get("step", np.zeros(0))[measured], dice[measured]

    def alarms(self) -> list[str]:
        """Return what was wrong with it, in words."""
        found = [str(message) for message in self.metrics.get("alarms") or []]
        found += [f"crop {name} is damaged and was left out" for name in self.metrics.get("skipped_crops") or []]
        waiting = self.cost.waiting if self.cost else None
        if waiting is not None and waiting > MOST_WAITING:
            found.append(
                f"the device waited for data {100 * waiting:.0f} % of the time: give the job more cores "
                "(resources.train.threads), a faster disk or fewer kinds of train.augment"
            )
        return found


def _until(points: Sequence[tuple[int, float]], step: int) -> list[tuple[int, float]]:
    """Return the course up to `step`, with a last point there; what came after was lost and is done again."""
    if not points:
        return [(step, 0.0)]
    hours = float(np.interp(step, [at for at, _ in points], [spent for _, spent in points]))
    return [*(point for point in points if point[0] < step), (step, hours)]


def read_history(path: Path) -> dict[str, np.ndarray]:
    """Return the columns of a history.csv as float arrays, NaN where a cell is empty."""
    with open(path, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    names = list(rows[0]) if rows else []
    return {name: np.array([float(row[name]) if row[name] else np.nan for row in rows]) for name in names}


def read_runs(histories: Sequence[Path], metrics: Sequence[Path], run_dirs: Sequence[Path] = ()) -> list[Run]:
    """Return the runs. The files, and the run directories if they are given, are of the same runs in the same order.

    A run directory may be gone, or hold no usage.csv. Raises ContractError for metrics that cannot be read.
    """
    usages = [read_usage(FilePath(folder)) for folder in run_dirs] or [[] for _ in metrics]
    return [
        Run(read_json(metric, "run `snakemake -R train`"), read_history(history), usage)
        for history, metric, usage in zip(histories, metrics, usages, strict=True)
    ]


def write_training(runs: Sequence[Run], out_html: Path) -> None:
    """Write the page of all runs: scores, speed, memory, waiting for data, attempts, hours, and alarms."""
    rows = [_row(run) for run in runs]
    parts = [
        paragraph(
            f"{len(runs)} trainings. Speed, memory and hours are what the runs noted of themselves while they ran "
            "(usage.csv in their run directories). Dice is measured on the validation crops as the training sees them, "
            "on its own grid; the challenge's scores are in the table of scores. Click on a column's head to sort; "
            "hover over it for its meaning."
        ),
        heading("Runs"),
        table(RUN_COLUMNS, rows, totals=_totals(rows), name="runs"),
    ]
    unmeasured = [f"{run.model}, fold {run.fold}" for run in runs if run.cost is None]
    if unmeasured:
        parts.append(paragraph(f"Not measured: {', '.join(unmeasured)} ({NOT_MEASURED})."))
    alarms: list[list[Content]] = [[run.model, run.fold, message] for run in runs for message in run.alarms()]
    parts.append(heading("Alarms"))
    if alarms:
        parts.append(table([Column("model"), Column("fold"), Column("alarm")], alarms, name="alarms"))
    else:
        parts.append(paragraph("No run raised any."))
    write_text(out_html, page("Training", parts))


def summed_hours(runs: Iterable[Run]) -> tuple[float | None, float | None]:
    """Return the GPU hours and the CPU hours of the runs together, None where one of them was not measured."""
    costs = [run.cost for run in runs]
    measured = [entry for entry in costs if entry is not None]
    if len(measured) < len(costs) or not costs:
        return None, None
    return sum(entry.gpu_hours for entry in measured), sum(entry.cpu_hours for entry in measured)


@dataclass(frozen=True)
class Budget:
    """What all `runs` could spend: steps, and hours x processes, None where these do not compare.

    note: why they do not, or which runs the hours do not count because they were not measured from the start.
    """

    runs: list[Run]
    steps: float
    hours: float | None
    note: str


def equal_budget(runs: Sequence[Run]) -> Budget:
    """Return the largest budget that all runs with a validation reached: steps, and hours on devices of one kind."""
    validated = [run for run in runs if len(run.validations()[0])]
    if not validated:
        return Budget([], 0, None, "no run was validated")
    steps = float(min(run.validations()[0][-1] for run in validated))
    measured = [run for run in validated if run.course is not None]
    lacking = [f"{run.model}, fold {run.fold}" for run in validated if run.course is None]
    note = f"the hours of {'; '.join(lacking)} were not measured from the start" if lacking else ""
    if not measured:
        return Budget(validated, steps, None, "the hours of no run were measured from the start")
    if len({run.on_gpu for run in measured}) > 1 or measured[0].on_gpu is None:
        return Budget(validated, steps, None, "some ran on GPUs and some did not, whose hours do not compare")
    devices = sorted({line.device for run in measured for line in run.usage})
    if len(devices) > 1:
        return Budget(validated, steps, None, f"they ran on {', '.join(devices)}, whose hours do not compare")
    ends = [found[0] for run in measured if (found := run.hours_at(run.validations()[0][-1:])) is not None]
    return Budget(validated, steps, float(min(ends)), note)


def reached(run: Run, *, steps: float | None = None, hours: float | None = None) -> tuple[float, float] | None:
    """Return step and smoothed Dice of the last validation within a budget of steps or hours, None if there is none."""
    at, dice = run.validations()
    spent = at if hours is None else run.hours_at(at)
    limit = steps if hours is None else hours
    if spent is None or limit is None:
        return None
    # what was divided and added up may miss its own limit by a rounding
    within = np.flatnonzero(spent <= limit * (1 + 1e-9))
    return (float(at[within[-1]]), float(dice[within[-1]])) if len(within) else None


def _row(run: Run) -> list[Content]:
    metrics, spent = run.metrics, run.cost
    waiting = spent.waiting if spent else None
    return [
        run.model,
        run.fold,
        metrics["steps"],
        metrics["best_step"],
        metrics["best_mean_dice"],
        metrics["best_smoothed_dice"],
        metrics["untrained_mean_dice"],
        spent.patches_per_s if spent else None,
        None if waiting is None else 100 * waiting,
        spent.memory_gib if spent else None,
        spent.gpu_memory_gib if spent else None,
        spent.attempts if spent else None,
        spent.hours if spent else None,
        spent.gpu_hours if spent else None,
        spent.cpu_hours if spent else None,
        spent.device if spent else "",
        metrics["parameters"],
        " x ".join(map(str, metrics["patch"])),
        str(metrics["grid"]),
        len(run.alarms()),
    ]


def _totals(rows: Sequence[Sequence[Content]]) -> list[Content]:
    """Return the last row: sums of what adds up; hours only where all were measured."""
    last: list[Content] = ["all", *[None] * (len(RUN_COLUMNS) - 1)]
    for index, column in enumerate(RUN_COLUMNS):
        values = [row[index] for row in rows]
        if column.name in _SUMMED and rows and None not in values:
            last[index] = sum(value for value in values if isinstance(value, int | float))
    return last
