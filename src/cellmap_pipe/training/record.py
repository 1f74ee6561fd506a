"""What a training says of itself while it runs: progress lines, one row per epoch, TensorBoard and MLflow.

Nothing of the clock reaches a result.
"""

import contextlib
import logging
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from cellmap_pipe.training.loader import Batch
from cellmap_pipe.training.optimisation import learning_rate
from cellmap_pipe.training.tracking import MlflowRun
from cellmap_pipe.training.usage import UsageLog

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 30.0
UNMEASURED_SECONDS = 1.0


@dataclass
class Progress:
    """What changes while training, besides tensors: numbers, text, lists and dicts of them, saved in every checkpoint.

    smoothed, best: of the mean Dice, as it chooses the weights that are kept. positives: voxels by class in the
    `looked_at` patches that were counted.
    """

    step: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    recorded: int = -1  # the last step after which an epoch was recorded
    smoothed: float | None = None
    best: float | None = None
    best_step: int = 0
    since_best: int = 0
    untrained: float | None = None
    skipped: list[str] = field(default_factory=list)  # crops of the fold that were damaged, and left out
    history: list[dict[str, Any]] = field(default_factory=list)
    positives: list[int] = field(default_factory=list)
    looked_at: int = 0
    alarms: dict[str, str] = field(default_factory=dict)
    finished: bool = False

    def judge(self, score: float, smoothing: float) -> bool:
        """Account for a validation's mean Dice and return whether its smoothed value is the best so far.

        smoothing: share of the earlier validations in that value; of the first it is the score itself.
        """
        self.smoothed = score if self.smoothed is None else smoothing * self.smoothed + (1 - smoothing) * score
        if self.best is None or self.smoothed > self.best:
            self.best, self.best_step, self.since_best = self.smoothed, self.step, 0
            return True
        self.since_best += 1
        return False


class Journal:
    """Writes the rows of a training's history to the log, to TensorBoard and, if asked for, to MLflow.

    For the length of a `with` block, by the first rank alone. progress: where the training stands; what TensorBoard
    has of later steps, which are trained again, is dropped. A disk that takes no more of TensorBoard's costs no
    training.
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], progress: Progress) -> None:
        self._open = contextlib.ExitStack()
        self._tensorboard: SummaryWriter | None = None
        with self._tolerant():
            # this step's values, too: a checkpoint of the best weights is written before them
            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=progress.step)
        for row in progress.history[-1:]:
            if row["step"] == progress.step:
                self._show(row)
        self._mlflow: MlflowRun | None = None
        if settings["mlflow"]:
            self._mlflow = self._open.enter_context(MlflowRun(settings["mlflow"], run_dir, settings))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)
        with self._tolerant():
            if self._tensorboard is not None:
                self._tensorboard.close()

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Warn of a fault of TensorBoard's files; from then on nothing is written to them, its thread has ended."""
        try:
            yield
        except OSError as error:
            self._tensorboard = None
            logger.warning("TensorBoard's files are written no further (%s); history.csv has all", error)

    def write(self, row: Mapping[str, Any], progress: Progress, epoch: int) -> None:
        """Record one epoch. row: see `Training`; scores that were not measured are None."""
        values = self._show(row)
        if self._mlflow is not None:
            self._mlflow.log(values, progress.step)
        shown = ""
        if row["mean_dice"] is not None:
            shown = (
                f", mean Dice {row['mean_dice']:.3f}, smoothed {row['smoothed_dice']:.3f}, best {progress.best:.3f} "
                f"at step {progress.best_step}"
            )
        logger.info("epoch %d, step %d: loss %.4f%s", epoch, progress.step, row["loss"], shown)

    def _show(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write a row to TensorBoard and return its values by name."""
        names = ("loss", "lr", "mean_dice", "smoothed_dice", "challenge_score")
        values = {name: row[name] for name in names} | {f"dice/{name}": dice for name, dice in row["dice"].items()}
        with self._tolerant():
            if self._tensorboard is not None:
                for name, value in values.items():
                    if value is not None:
                        self._tensorboard.add_scalar(name, value, row["step"])
                self._tensorboard.flush()
        return values


class Meter:
    """Measures the training steps between two lines of the log.

    On a GPU, which is given its work ahead, what counts is how long the device had none while data were awaited.
    """

    def __init__(self, patches_per_step: int, device: torch.device) -> None:
        self.patches_per_step = patches_per_step
        self.cuda = device.type == "cuda"
        self.seconds_per_step = UNMEASURED_SECONDS
        self._ended: torch.cuda.Event | None = None
        self._arrived: torch.cuda.Event | None = None
        self._restart()

    def _restart(self) -> None:
        self.line_at = time.perf_counter()
        self.seconds = self.waited = 0.0
        self.steps = 0
        self._told = (
            0,
            0.0,
            0.0,
        )  # steps, their seconds and those of them that were waited, of which is told elsewhere
        # of each step: end of the one before and arrival of its data, on the device; seconds that the host waited
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event, float]] = []

    def begin(self) -> None:
        """Note that a step begins."""
        self._began, self._awaited = time.perf_counter(), 0.0

    def fetch(self, batches: Iterator[Batch]) -> Batch:
        """Return the step's next batch, measuring how long it is waited for."""
        began = time.perf_counter()
        batch = next(batches)
        self._awaited += time.perf_counter() - began
        if self.cuda:
            self._arrived = _mark()
        return batch

    def end(self) -> None:
        """Note that the step's work is done, or queued on the device."""
        self.seconds += time.perf_counter() - self._began
        self.steps += 1
        self.seconds_per_step = self.seconds / self.steps
        if not self.cuda:
            self.waited += self._awaited
            return
        if self._ended is not None and self._arrived is not None:
            self._gaps.append((self._ended, self._arrived, self._awaited))
        self._ended = _mark()

    def due(self) -> bool:
        """Return whether it is time for a line."""
        return time.perf_counter() - self.line_at >= PROGRESS_SECONDS

    def waiting(self) -> float:
        """Return the share of the interval's steps in which the device waited for data."""
        return self._waited_seconds() / max(self.seconds, 1e-9)

    def _waited_seconds(self) -> float:
        gaps = [(ended.elapsed_time(arrived) / 1000, host) for ended, arrived, host in self._gaps if arrived.query()]
        return self.waited + sum(min(gap) for gap in gaps)

    def tell(self, usage: UsageLog, step: int) -> None:
        """Write a line of the training's usage: what was measured since the last one. step: where it stands."""
        now = (self.steps, self.seconds, self._waited_seconds())
        steps, seconds, waited = (new - old for new, old in zip(now, self._told, strict=True))
        self._told = now
        usage.count(int(steps), int(steps) * self.patches_per_step, seconds, waited)
        usage.write(step, torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None)

    def line(self, progress: Progress, settings: Mapping[str, Any]) -> str:
        """Return the progress line and begin a new interval."""
        left = round((settings["max_steps"] - progress.step) * self.seconds_per_step)
        text = (
            f"step {progress.step}/{settings['max_steps']}: "
            f"loss {progress.loss_sum / max(progress.loss_steps, 1):.4f}, "
            f"lr {learning_rate(progress.step - 1, settings):.2e}, "
            f"{self.patches_per_step / self.seconds_per_step:.2f} patches/s, "
            f"waiting for data {100 * self.waiting():.0f} %, "
            f"{left // 3600} h {left // 60 % 60:02d} min {left % 60:02d} s of steps left, "
            f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
        )
        if self.cuda:
            text += f", GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        self._restart()
        return text


def _mark() -> torch.cuda.Event:
    """Return a point in what the device is given to do."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
