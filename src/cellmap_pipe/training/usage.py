"""What a training takes of the machine: time, memory and speed, line by line in a file of its run directory.

It says what happened, not what comes out: nothing of it is in a checkpoint or a declared output. No torch.
"""

import csv
import datetime
import io
import logging
import os
import resource
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from uuid import uuid4

logger = logging.getLogger(__name__)

NAME = "usage.csv"
COLUMNS = tuple(
    "attempt began utc step seconds steps patches waiting memory_gib gpu_memory_gib processes device host job".split()
)
CPU = "cpu"


@dataclass(frozen=True)
class Usage:
    """One line of the file: what one attempt did in the `seconds` (by the wall clock) since its last line, or start.

    attempt: one start of the training's processes, which `began` then. step: the optimiser's step that is reached.
    steps, patches: done in these seconds, none while it reads the store or validates; patches of all processes.
    waiting: share of the steps' time in which data were awaited. memory_gib: peak of the first process.
    processes: one per GPU. device: "cpu", or the GPU's name. job: Slurm's number.
    """

    attempt: str
    began: datetime.datetime
    utc: datetime.datetime
    step: int
    seconds: float
    steps: int
    patches: int
    waiting: float
    memory_gib: float
    gpu_memory_gib: float | None
    processes: int
    device: str
    host: str
    job: str | None


@dataclass(frozen=True)
class Cost:
    """What a training has cost so far, all its attempts together.

    hours: by the wall clock. gpu_hours, cpu_hours: of all processes, on GPUs and on CPUs. patches_per_s: while it made
    steps, all processes together; what it took to start and to validate is in the hours. waiting: the mean over that
    time, None without a step. memory_gib, gpu_memory_gib: peaks. device: the names, joined by commas.
    """

    attempts: int
    hours: float
    gpu_hours: float
    cpu_hours: float
    patches_per_s: float | None
    waiting: float | None
    memory_gib: float | None
    gpu_memory_gib: float | None
    device: str


class UsageLog:
    """Appends the lines of one attempt to the run directory's file; for the process that owns the directory alone.

    The attempt begins as this is made. A disk that takes no line costs no training, and the next line tells of that
    time, too.
    """

    def __init__(self, run_dir: Path, processes: int, device: str) -> None:
        self.path = run_dir / NAME
        self._same_before = (uuid4().hex[:8], _iso(time.time()))
        self._same_after = (processes, device, socket.gethostname(), os.environ.get("SLURM_JOB_ID", ""))
        self._told_at = time.monotonic()
        self._steps, self._patches, self._stepping, self._waited = 0, 0, 0.0, 0.0
        self._warned = False

    def count(self, steps: int, patches: int, seconds: float, waited: float) -> None:
        """Add steps to what the next line tells of. seconds: that they took; waited: those in which data lacked."""
        self._steps += steps
        self._patches += patches
        self._stepping += seconds
        self._waited += waited

    def write(self, step: int, gpu_memory_gib: float | None = None) -> None:
        """Append the line of what was done since the last one. step: where the training stands."""
        now = time.monotonic()
        values = [
            *self._same_before,
            *[_iso(time.time()), step, f"{now - self._told_at:.3f}", self._steps, self._patches],
            f"{min(self._waited / self._stepping, 1.0) if self._stepping else 0.0:.4f}",
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.3f}",
            "" if gpu_memory_gib is None else f"{gpu_memory_gib:.3f}",
            *self._same_after,
        ]
        try:
            _append(self.path, _line(values))
        except OSError as error:
            if not self._warned:
                logger.warning("%s: what the training takes could not be noted (%s)", self.path, error)
            self._warned = True
            return
        self._told_at = now
        self._steps, self._patches, self._stepping, self._waited = 0, 0, 0.0, 0.0


def read_usage(run_dir: Path) -> list[Usage]:
    """Return the lines of a run directory, in their order; none where there is no file, or none that can be read.

    A line that a kill or a full disk cut short is passed over, and so is what is no line of this file.
    """
    try:
        text = (run_dir / NAME).read_text(errors="replace")
    except OSError:
        return []
    *lines, _ = text.split("\n")
    return [usage for line in lines if (usage := _usage(line)) is not None]


def cost(lines: Sequence[Usage]) -> Cost:
    """Return what the lines of one training amount to."""
    stepping = [line for line in lines if line.steps]
    seconds = sum(line.seconds for line in stepping)
    gpu_memory = [line.gpu_memory_gib for line in lines if line.gpu_memory_gib is not None]
    return Cost(
        attempts=len({line.attempt for line in lines}),
        hours=sum(line.seconds for line in lines) / 3600,
        gpu_hours=sum(line.processes * line.seconds for line in lines if line.device != CPU) / 3600,
        cpu_hours=sum(line.processes * line.seconds for line in lines if line.device == CPU) / 3600,
        patches_per_s=sum(line.patches for line in stepping) / seconds if seconds else None,
        waiting=sum(line.waiting * line.seconds for line in stepping) / seconds if seconds else None,
        memory_gib=max((line.memory_gib for line in lines), default=None),
        gpu_memory_gib=max(gpu_memory, default=None),
        device=", ".join(dict.fromkeys(line.device for line in lines)),
    )


def _usage(line: str) -> Usage | None:
    """Return a line's content, None for the header and whatever else is no line. Quick: a run may have many."""
    try:
        # each line by itself, so that a quotation mark in a spoilt one does not swallow those after it
        row = next(csv.reader([line])) if '"' in line else line.split(",")
        attempt, began, utc, step, seconds, steps, patches, waiting, memory, gpu_memory, processes, *place = row
        device, host, job = place
        return Usage(
            attempt,
            datetime.datetime.fromisoformat(began),
            datetime.datetime.fromisoformat(utc),
            int(step),
            float(seconds),
            int(steps),
            int(patches),
            float(waiting),
            float(memory),
            float(gpu_memory) if gpu_memory else None,
            int(processes),
            device,
            host,
            job or None,
        )
    except (ValueError, csv.Error):
        return None


def _append(path: Path, line: bytes) -> None:
    """Append a line, after what is whole of the file: a part of a line would spoil this one, too. May raise OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        whole = size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            whole = os.pread(descriptor, size, 0).rfind(b"\n") + 1
            os.ftruncate(descriptor, whole)
        content = line if whole else _line(COLUMNS) + line
        written = os.pwrite(descriptor, content, whole)
        if written < len(content):  # the rest of a full disk
            os.ftruncate(descriptor, whole)
            raise OSError(f"only {written} of {len(content)} bytes were written; is the disk full?")
    finally:
        os.close(descriptor)


def _line(values: Sequence[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


def _iso(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
