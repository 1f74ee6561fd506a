"""Trainings that are killed again and again end bit by bit as one that was left alone."""

import re
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training_case import finish, flattened, start, start_dying, start_ranks, write_request

Request = dict[str, Any]

# Everything that a training carries from step to step has a part: the prior of the classes, smoothed scores, passes,
# mixed patches, the average of the weights, batch-norm statistics, checkpoints that are kept.
SETTINGS: dict[str, Any] = {
    "arguments": {"init_filters": 8, "blocks_down": [1, 1, 1], "norm": "BATCH"},
    "loss": "balanced_tversky",
    "smoothing": 0.5,
    "accumulate": 2,
    "keep_every": 8,
    "steps_per_epoch": 4,
    "validate_every": 2,
}


# No kill is meant for these last steps: on a loaded machine it may come late.
SPARE_STEPS = 16


def launch(request: Request, world: int) -> list[BaseProcess]:
    return [start(request)] if world == 1 else start_ranks(request, world)


def steps_of(request: Request) -> list[int]:
    return sorted(int(path.name[4:13]) for path in Path(request["run_dir"]).glob("step*.pt"))


def writing(request: Request) -> set[str]:
    """Return the names of the checkpoints that are being written."""
    return {path.name for path in Path(request["run_dir"]).glob(".partial-*-step*.pt")}


def ending(request: Request) -> list[Any]:
    """Return what a training hands on, and all that its last checkpoint and those kept for good hold."""
    published = [Path(path).read_bytes() for path in request["outputs"].values()]
    found = {int(path.name[4:13]): path for path in Path(request["run_dir"]).glob("step*.pt")}
    last, every = request["settings"]["max_steps"], request["settings"]["keep_every"]
    kept = [found[step] for step in (*range(every, last, every), last)]
    return [published, [list(flattened(torch.load(path, weights_only=True))) for path in kept]]


def starts(request: Request) -> int:
    """Return how many times a training began its steps."""
    log = Path(request["log"])
    return log.read_text().count("patches per step") if log.exists() else 0


def wait_for_start(request: Request, processes: list[BaseProcess], earlier: int) -> None:
    while starts(request) <= earlier:
        assert all(process.is_alive() for process in processes), Path(request["log"]).read_text()
        time.sleep(0.005)


def strike(request: Request, world: int, random: Random) -> None:
    """Start a training and kill one of its processes at any moment, that of the start included where there is one.

    (Ranks that have not found each other yet do not miss one that is killed; torchrun ends them.)
    """
    earlier, step = starts(request), next_step(request, random)
    processes = launch(request, world)
    moment = time.monotonic() + random.uniform(0, 1.5)
    if world > 1:
        wait_for_start(request, processes, earlier)
    while all(process.is_alive() for process in processes):
        if max(steps_of(request), default=-1) >= step or time.monotonic() > moment:
            time.sleep(random.uniform(0, 0.05))
            break
        time.sleep(0.0002)
    victim = random.randrange(world)
    processes[victim].kill()
    assert finish(*processes)[victim] == -signal.SIGKILL, Path(request["log"]).read_text()


def strike_in_writing(request: Request, world: int, random: Random) -> None:
    """Start a training and kill its first rank, which writes, inside a checkpoint."""
    processes = start_dying(request, world, next_step(request, random), random.randrange(50_000))
    assert finish(*processes)[0] == -signal.SIGKILL, Path(request["log"]).read_text()
    assert writing(request)


def next_step(request: Request, random: Random) -> int:
    """Return a step soon after the last checkpoint, so early that a training ends by itself before no strike."""
    reached = max(steps_of(request), default=0)
    return min(reached + random.randint(1, 6), request["settings"]["max_steps"] - SPARE_STEPS)


@pytest.mark.parametrize(
    ("world", "kills", "torn"), [(1, 12, 4), (2, 6, 1), (4, 3, 0)], ids=["alone", "two ranks", "four ranks"]
)
def test_kills_at_any_moment_change_no_bit_of_the_result(tmp_path: Path, world: int, kills: int, torn: int) -> None:
    random = Random(world)
    settings = {**SETTINGS, "batch": 4 // world, "max_steps": SPARE_STEPS + 2 * kills}
    whole, killed = (write_request(tmp_path, name, **settings) for name in ("whole", "killed"))
    assert finish(*launch(whole, world)) == [0] * world, Path(whole["log"]).read_text()
    for number in range(kills):
        (strike_in_writing if number < 2 * torn and number % 2 == 0 else strike)(killed, world, random)
    earlier = starts(killed)
    terminated = launch(killed, world)
    wait_for_start(killed, terminated, earlier)
    terminated[-1].terminate()
    assert finish(*terminated) == [1] * world
    last = Path(killed["log"]).read_text().splitlines()[-1]
    assert re.search("ERROR .* stopped by (SIGTERM|a signal) after step", last)
    assert finish(*launch(killed, world)) == [0] * world, Path(killed["log"]).read_text()
    assert ending(killed) == ending(whole)
    assert not writing(killed)
