"""Where a run stands: every training with its step, speed and score, and what the other rules' jobs do.

All of it is read from what the trainings leave in their folders; Slurm's queue adds which jobs wait, and why.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cellmap_pipe.cluster.queue import Job, jobs, reason_in_words
from cellmap_pipe.cluster.slurm import SlurmError, installed
from cellmap_pipe.log import ALL_ATTEMPTS, ATTEMPT
from cellmap_pipe.text import aligned
from cellmap_pipe.training.owner import IN_USE, is_stale
from cellmap_pipe.training.usage import Usage, cost, read_usage

# The speed is that of about so many last seconds: one that shares its machine changes its pace.
RECENT_SECONDS = 1800.0
LOG_BYTES = 2**20  # of the end of a log, which is read

SCORED = re.compile(rb"epoch \d+, step (\d+): loss .*mean Dice ([\d.]+), smoothed ([\d.]+)")
ERROR = re.compile(rb"^ERROR .*$", re.MULTILINE)
STOPPED = re.compile(r"stopped by .* after step \d+")
CHECKPOINT = re.compile(r"step(\d{9})-[0-9a-f]{16}\.pt")

HEADER = (
    *("model", "fold", "state", "step", "done", "left", "score", "at step", "patches/s", "waiting", "memory"),
    *("GPU memory", "GPU hours", "job", "why"),
)


@dataclass(frozen=True)
class Run:
    """One training.

    state: finished, running, starting (its job runs, it has not begun), queued, stopped (it goes on when it is started
    again) or failed. step: the last that is known. eta_s: seconds of steps and validations left, at the speed of late.
    score: smoothed Dice of the last validation, after `score_step`; of a finished one that of the best. waiting: share
    of the steps' time that data were awaited. memory_gib, gpu_memory_gib: peaks. gpu_hours: of all attempts. job:
    Slurm's number. host, pid: of who trains. why: why it waits, or how it ended.
    """

    model: str
    fold: str
    state: str
    step: int | None = None
    max_steps: int | None = None
    eta_s: float | None = None
    score: float | None = None
    score_step: int | None = None
    patches_per_s: float | None = None
    waiting: float | None = None
    memory_gib: float | None = None
    gpu_memory_gib: float | None = None
    device: str = ""
    attempts: int = 0
    gpu_hours: float = 0.0
    job: str | None = None
    host: str | None = None
    pid: int | None = None
    why: str = ""


@dataclass(frozen=True)
class Status:
    """All trainings of a run's folder, its other jobs, and what is to be said besides.

    others: queued, starting and running jobs by rule.
    """

    folder: str
    runs: list[Run]
    others: dict[str, dict[str, int]]
    notes: list[str]


def status(folder: Path, *, now: float | None = None) -> Status:
    """Return the status of the run in `folder`, where `results` and `runs` are. now: seconds of time.time()."""
    now = time.time() if now is None else now
    queue, notes = _queue(folder)
    trainings = {
        (job.wildcards.get("model", ""), job.wildcards.get("fold", "")): job for job in queue if job.rule == "train"
    }
    names = {(path.parent.name, path.name.removeprefix("fold")) for path in folder.glob("runs/*/fold*")}
    names |= {(path.parent.name, path.name.removeprefix("fold")) for path in folder.glob("results/train/*/fold*")}
    names = {(model, fold) for model, fold in names if fold.isdigit() or fold == "all"} | set(trainings)
    others: dict[str, Counter[str]] = {}
    for job in queue:
        if job.rule != "train":
            others.setdefault(job.rule, Counter())["queued" if job.waits else "running"] += 1
    if not names:
        notes.append(f"{folder}: no training has begun here")
    if any((folder / ".snakemake/locks").glob("*")):
        notes.append(
            "a Snakemake holds this folder; if none runs any more, it was killed: look at the jobs above, then "
            "`snakemake --unlock`"
        )
    return Status(
        str(folder),
        [_run(folder, *name, trainings.get(name), {job.id: job for job in queue}, now) for name in sorted(names)],
        {rule: dict(counts) for rule, counts in sorted(others.items())},
        notes,
    )


def as_json(found: Status) -> str:
    """Return a status as JSON; durations in seconds."""
    return json.dumps(asdict(found), indent=1)


def as_text(found: Status) -> str:
    """Return a status as a table of the trainings, then the other jobs, then notes."""
    lines = []
    if found.runs:
        rows = [_row(run) for run in found.runs]
        # what no training tells of takes no room: GPUs on a workstation without any, jobs without Slurm
        lines.append(aligned(rows, [name for name in HEADER if any(row[name] for row in rows)]))
        counts = Counter(run.state for run in found.runs)
        lines.append(f"{len(found.runs)} trainings: " + ", ".join(f"{n} {state}" for state, n in counts.most_common()))
    for rule, counted in found.others.items():
        lines.append(f"{rule}: " + ", ".join(f"{n} {state}" for state, n in sorted(counted.items())))
    return "\n".join([*lines, *found.notes])


def duration(seconds: float) -> str:
    """Return seconds as days, hours and minutes."""
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    return (f"{days} d " if days else "") + (f"{hours} h " if days or hours else "") + f"{minutes} min"


def _queue(folder: Path) -> tuple[list[Job], list[str]]:
    """Return the jobs of the Snakemake that works in `folder`, and what is to be said of the queue."""
    if not installed("squeue"):
        return [], []
    try:
        return [job for job in jobs(folder=folder) if job.rule], []
    except SlurmError as error:
        return [], [f"what waits in the queue is not known: {error}"]


def _run(folder: Path, model: str, fold: str, job: Job | None, queue: Mapping[str, Job], now: float) -> Run:
    run_dir, results = folder / f"runs/{model}/fold{fold}", folder / f"results/train/{model}/fold{fold}"
    request = read_object(run_dir / "request.json")
    settings = request.get("settings") or {}
    log = _tail(folder / (request.get("log") or f"logs/train/{model}_fold{fold}.log"))
    owner = read_object(run_dir / "owner.json")
    alive = bool(owner) and _lives(owner, queue, now)
    metrics = read_object(results / "metrics.json")
    lines = read_usage(run_dir)
    spent = cost(lines)
    recent = _recent(lines)
    attempts = _tail(run_dir / ALL_ATTEMPTS)
    errors = _errors(log)
    if errors and IN_USE in errors[-1]:  # said by a copy that did nothing; the one that trained has its own words
        errors = [line for line in _errors(attempts.rpartition(ATTEMPT.encode())[2]) if IN_USE not in line]
    error = errors[-1] if errors else ""

    step = max([line.step for line in lines[-1:]] + _checkpoints(run_dir), default=None)
    score, score_step = _score(attempts)
    if alive:
        state, why = "running", _walltime(job)
    elif job is not None and job.waits:
        state, why = "queued", _why(job)
    elif job is not None:
        state, why = "starting", f"its job runs on {job.node or 'a node'}; the training has not begun, or just ended"
    elif metrics:
        state, why, step = "finished", f"best weights of step {metrics.get('best_step')}", metrics.get("steps")
        score, score_step = metrics.get("best_smoothed_dice"), metrics.get("best_step")
    elif error and not STOPPED.search(error):
        state, why = "failed", error
    else:
        state, why = "stopped", error or "ended without a word (killed?); it goes on from its last checkpoint"

    total = metrics.get("steps") if state == "finished" else settings.get("max_steps")
    left = None
    if state == "running" and recent and step is not None and total is not None:
        seconds, steps = sum(line.seconds for line in recent), sum(line.steps for line in recent)
        silence = max(0.0, now - recent[-1].utc.timestamp())
        left = max(0.0, (total - step) * seconds / steps - silence) if steps else None
        if left is not None and job is not None and job.limit_s is not None and left > job.limit_s - job.elapsed_s:
            why = "; ".join(filter(None, [why, "its walltime ends before; it then goes on in the next attempt"]))
    speed = cost(recent)
    return Run(
        model=model,
        fold=fold,
        state=state,
        step=step,
        max_steps=total,
        eta_s=left,
        score=score,
        score_step=score_step,
        patches_per_s=speed.patches_per_s,
        waiting=speed.waiting,
        memory_gib=spent.memory_gib,
        gpu_memory_gib=spent.gpu_memory_gib,
        device=spent.device,
        attempts=spent.attempts,
        gpu_hours=spent.gpu_hours,
        job=job.id if job else (owner.get("job") if alive else None),
        host=owner.get("host") if alive else None,
        pid=owner.get("pid") if alive else None,
        why=why,
    )


def _lives(owner: Mapping[str, Any], queue: Mapping[str, Job], now: float) -> bool:
    """Return whether the training that an owner file names is going on.

    Slurm is not asked again about a job that is in the queue: there may be many. One that waits there was started again
    by Slurm, and what held the directory is gone with its node.
    """
    job = queue.get(str(owner.get("job")))
    return not job.waits if job is not None else not is_stale(dict(owner), now)


def _recent(lines: Sequence[Usage]) -> list[Usage]:
    """Return the last lines of the last attempt, without that of its start."""
    chosen: list[Usage] = []
    seconds = 0.0
    for line in reversed(lines):
        if line.attempt != lines[-1].attempt or seconds > RECENT_SECONDS:
            break
        chosen.append(line)
        seconds += line.seconds
    if chosen and (len(chosen) == len([line for line in lines if line.attempt == lines[-1].attempt])):
        chosen.pop()
    return chosen[::-1]


def _why(job: Job) -> str:
    words = reason_in_words(job.reason)
    if job.starts is None:
        return words
    return f"{words}; expected to start {job.starts:%d %b %H:%M}"


def _walltime(job: Job | None) -> str:
    if job is None or job.limit_s is None:
        return ""
    return f"walltime left {duration(max(job.limit_s - job.elapsed_s, 0))}"


def _errors(log: bytes) -> list[str]:
    return [line.decode(errors="replace") for line in ERROR.findall(log)]


def _score(log: bytes) -> tuple[float | None, int | None]:
    """Return the last validation's smoothed Dice that the log tells, and its step."""
    found = SCORED.findall(log)
    return (float(found[-1][2]), int(found[-1][0])) if found else (None, None)


def _checkpoints(run_dir: Path) -> list[int]:
    return [int(match[1]) for path in run_dir.glob("step*.pt") if (match := CHECKPOINT.fullmatch(path.name))]


def _tail(path: Path) -> bytes:
    """Return the end of a file, nothing of one that is not there."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - LOG_BYTES))
            return stream.read()
    except OSError:
        return b""


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one where there is none, or none that is whole."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _row(run: Run) -> dict[str, str]:
    done = run.step / run.max_steps if run.step is not None and run.max_steps else None
    return {
        "model": run.model,
        "fold": run.fold,
        "state": run.state,
        "step": "" if run.step is None else f"{run.step}/{run.max_steps or '?'}",
        "done": "" if done is None else f"{done:.0%}",
        "left": "" if run.eta_s is None else duration(run.eta_s),
        "score": "" if run.score is None else f"{run.score:.3f}",
        "at step": "" if run.score_step is None else str(run.score_step),
        "patches/s": "" if run.patches_per_s is None else f"{run.patches_per_s:.1f}",
        "waiting": "" if run.waiting is None else f"{run.waiting:.0%}",
        "memory": "" if run.memory_gib is None else f"{run.memory_gib:.1f} GiB",
        "GPU memory": "" if run.gpu_memory_gib is None else f"{run.gpu_memory_gib:.1f} GiB",
        "GPU hours": f"{run.gpu_hours:.1f}" if run.gpu_hours else "",
        "job": run.job or (f"process {run.pid} on {run.host}" if run.host else ""),
        "why": run.why,
    }
