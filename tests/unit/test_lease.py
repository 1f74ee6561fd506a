"""Leases of GPUs between real processes; the GPUs are pretended."""

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cellmap_pipe.errors import TrainingError
from cellmap_pipe.training.lease import (
    LAUNCHER,
    VISIBLE,
    assign_gpus,
    lease,
    parse_listing,
    visible_gpus,
)

SIX = [f"GPU-{number}" for number in range(6)]
PATIENCE = 60

# Leases, becomes another program as `launch` does, says what it has and waits; `child` starts a process of its own.
TRAINING = """
import json, os, sys
from pathlib import Path
from cellmap_pipe.training.lease import lease
folder, gpus, count, name, poll = json.loads(sys.argv[1])
got = lease(gpus, count, {"model": name}, Path(folder), poll)
code = (
    "import subprocess, sys, time; child = subprocess.Popen(['sleep', '300'], stdout=subprocess.DEVNULL);"
    "print(sys.argv[1], child.pid, flush=True); time.sleep(300)"
)
os.execv(sys.executable, [sys.executable, "-c", code, json.dumps(got).replace(" ", "")])
"""


class Case:
    """Trainings that share the GPUs of one machine."""

    def __init__(self, folder: Path, gpus: list[str]) -> None:
        self.folder, self.gpus = folder, gpus
        self.started: list[subprocess.Popen[str]] = []
        self.children: list[int] = []

    def start(self, count: int, name: str = "net") -> subprocess.Popen[str]:
        arguments = json.dumps([str(self.folder), self.gpus, count, name, 0.05])
        process = subprocess.Popen([sys.executable, "-c", TRAINING, arguments], stdout=subprocess.PIPE, text=True)
        self.started.append(process)
        return process

    def gpus_of(self, process: subprocess.Popen[str]) -> list[str]:
        """Return what the training got; waits for it."""
        assert process.stdout is not None
        got, child = process.stdout.readline().split()
        self.children.append(int(child))
        return json.loads(got)


@pytest.fixture
def case(tmp_path):
    cases = []

    def make(gpus):
        cases.append(Case(tmp_path / "locks", gpus))
        return cases[-1]

    yield make
    for made in cases:
        for child in made.children:
            os.kill(child, signal.SIGKILL)
        for process in made.started:
            process.kill()
            process.communicate()


def has_output(process: subprocess.Popen[str]) -> bool:
    return bool(select.select([process.stdout], [], [], 0.5)[0])


def give_up(seconds: float) -> None:
    """Wait no longer; not by SIGINT, which a shell that runs the tests in the background has ignored."""
    raise KeyboardInterrupt


def test_three_trainings_on_two_gpus_each_share_six(case):
    machine = case(SIX)
    trainings = [machine.start(2) for _ in range(3)]
    got = [machine.gpus_of(training) for training in trainings]
    assert sorted(itertools.chain(*got)) == SIX


def test_the_third_on_four_gpus_waits_and_a_killed_one_leaves_its_gpus_to_it(case):
    machine = case(SIX[:4])
    first, second = machine.start(2), machine.start(2)
    of_first, of_second = machine.gpus_of(first), machine.gpus_of(second)
    third = machine.start(2)
    assert not has_output(third)
    first.kill()  # its child lives on, and has no part in the lease
    assert machine.gpus_of(third) == of_first
    assert second.poll() is None
    assert not set(of_first) & set(of_second)


def test_trainings_that_want_more_than_is_free_do_not_block_each_other(case):
    machine = case(SIX[:3])
    for _ in range(2):
        waiting = [machine.start(2) for _ in range(3)]
        left = list(waiting)
        deadline = time.monotonic() + PATIENCE
        while left:
            assert time.monotonic() < deadline
            for training in [one for one in left if has_output(one)]:
                assert len(machine.gpus_of(training)) == 2
                training.kill()
                left.remove(training)


def test_who_waits_says_for_whom(case, caplog, monkeypatch):
    machine = case(SIX[:2])
    holder = machine.start(1, "segresnet_ds")
    machine.gpus_of(holder)

    def end(_):
        holder.kill()
        holder.wait()

    monkeypatch.setattr("cellmap_pipe.training.lease.time.sleep", end)
    caplog.set_level("INFO")
    held = open_descriptors()
    assert lease(SIX[:2], 2, {}, machine.folder) == SIX[:2]
    waiting = [line for line in caplog.messages if line.startswith("waiting for 2 GPUs, 1 are free")]
    assert len(waiting) == 1
    assert f"GPU-0 by process {holder.pid} (model segresnet_ds) since 20" in waiting[0]
    for descriptor in open_descriptors() - held:
        os.close(descriptor)


def open_descriptors() -> set[int]:
    return {int(entry.name) for entry in Path("/proc/self/fd").iterdir() if entry.exists()}


@pytest.fixture
def leased(monkeypatch):
    """What would be leased, as (GPUs to choose from, number)."""
    calls = []

    def take(gpus, count, _):
        calls.append((list(gpus), count))
        return list(gpus)[:count]

    monkeypatch.setattr("cellmap_pipe.training.lease.lease", take)
    return calls


@pytest.mark.parametrize(
    ("environment", "count", "choice"),
    [
        ({}, 2, SIX),
        ({VISIBLE: "4,GPU-1,0"}, 2, ["GPU-4", "GPU-1", "GPU-0"]),
        ({VISIBLE: "4,5"}, 2, ["GPU-4", "GPU-5"]),
        ({"SLURM_JOB_ID": "7", VISIBLE: "2,3,4"}, 2, ["GPU-2", "GPU-3", "GPU-4"]),
        ({"SLURM_JOB_ID": "7", VISIBLE: "2,3"}, 2, ["GPU-2", "GPU-3"]),
    ],
)
def test_gpus_are_leased_among_those_that_are_visible(leased, environment, count, choice):
    assert assign_gpus(count, {}, environment, SIX)
    assert leased == [(choice, count)]
    assert environment[VISIBLE] == ",".join(choice[:count])


@pytest.mark.parametrize(("listed", "present"), [("0,1", []), ("2,3", SIX[3:5]), ("0,1", SIX[:1])])
def test_what_slurm_gives_is_used_as_it_is_where_the_driver_does_not_confirm_it(leased, listed, present):
    environment = {"SLURM_JOB_ID": "7", VISIBLE: listed}
    before = dict(environment)
    assert assign_gpus(2, {}, environment, present)
    assert environment == before
    assert not leased


def test_trainings_in_one_interactive_job_take_turns(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("cellmap_pipe.training.lease.TEMPORARY", tmp_path)
    monkeypatch.setattr("cellmap_pipe.training.lease.time.sleep", give_up)
    caplog.set_level("INFO")
    before = open_descriptors()
    first = {"SLURM_JOB_ID": "7", VISIBLE: "0,1"}
    assert assign_gpus(2, {"model": "net"}, first, SIX[3:5])
    assert first[VISIBLE] == "GPU-3,GPU-4"
    with pytest.raises(KeyboardInterrupt):
        assign_gpus(2, {}, {"SLURM_JOB_ID": "7", VISIBLE: "0,1"}, SIX[3:5])
    assert f"held are GPU-3 by process {os.getpid()} (model net)" in caplog.text
    for descriptor in open_descriptors() - before:
        os.close(descriptor)


def test_a_holder_without_a_readable_record_is_waited_for_too(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("cellmap_pipe.training.lease.time.sleep", give_up)
    caplog.set_level("INFO")
    before = open_descriptors()
    lease(SIX[:2], 2, {}, tmp_path)
    (tmp_path / "GPU-0" / "holder.json").unlink()
    (tmp_path / "GPU-1" / "holder.json").write_text('{"model": "ne')
    with pytest.raises(KeyboardInterrupt):
        lease(SIX[:2], 2, {}, tmp_path)
    assert "GPU-0 by a process that left no name; GPU-1 by a process that left no name" in caplog.text
    for descriptor in open_descriptors() - before:
        os.close(descriptor)


def test_a_full_disk_does_not_keep_a_training_from_its_gpu(tmp_path):
    before = open_descriptors()
    (tmp_path / "GPU-0").mkdir()
    (tmp_path / "GPU-0" / "holder.json").symlink_to("/dev/full")
    assert lease(SIX[:1], 1, {}, tmp_path) == ["GPU-0"]
    for descriptor in open_descriptors() - before:
        os.close(descriptor)


def test_where_there_can_be_no_locks_the_gpus_are_those_that_are_listed(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("cellmap_pipe.training.lease.TEMPORARY", tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / f"cellmap_pipe-{os.getuid()}").symlink_to(elsewhere)
    with pytest.raises(TrainingError, match=r"is no folder of this user's\); list the 2 that .* CUDA_VISIBLE_DEVICES"):
        assign_gpus(2, {}, {}, SIX)
    environment = {VISIBLE: "1,2"}
    assert assign_gpus(2, {}, environment, SIX)
    assert environment[VISIBLE] == "GPU-1,GPU-2"
    assert "no other job must use GPU-1, GPU-2" in caplog.text
    assert not list(elsewhere.iterdir())


def test_a_job_that_asks_for_no_gpu_sees_none(leased):
    environment = {VISIBLE: "0,1"}
    assert not assign_gpus(0, {}, environment, SIX)
    assert environment == {VISIBLE: ""}
    assert not leased


def test_a_machine_without_gpus_trains_on_its_processor(leased, caplog):
    environment: dict[str, str] = {}
    assert not assign_gpus(2, {}, environment, [])
    assert not environment
    assert "2 GPUs were asked for and this machine has none" in caplog.text


@pytest.mark.parametrize(
    ("environment", "present", "expected"),
    [
        ({}, SIX[:1], "the machine has 1 and this job may use 1 (CUDA_VISIBLE_DEVICES=unset); lower"),
        ({VISIBLE: "0"}, SIX, "the machine has 6 and this job may use 1 (CUDA_VISIBLE_DEVICES=0); lower"),
        ({VISIBLE: ""}, SIX, "may use 0"),
        ({"SLURM_JOB_ID": "7", VISIBLE: "0"}, SIX, "may use 1 (CUDA_VISIBLE_DEVICES=0); ask the scheduler for more"),
        ({"SLURM_JOB_ID": "7"}, SIX, "may use 0 (CUDA_VISIBLE_DEVICES=unset); ask the scheduler for more"),
        ({"SLURM_JOB_ID": "7"}, [], "may use 0"),
    ],
)
def test_fewer_gpus_than_asked_for_are_an_error(leased, environment, present, expected):
    with pytest.raises(TrainingError, match="2 GPUs were asked for") as caught:
        assign_gpus(2, {}, environment, present)
    assert expected in str(caught.value)
    assert "resources.train.gpus" in str(caught.value)
    assert not leased


def test_gpus_are_listed_by_uuid_and_divided_ones_by_their_parts():
    listing = (
        "GPU 0: NVIDIA L40S (UUID: GPU-aa-1)\n"
        "GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-bb-2)\n"
        "  MIG 3g.40gb     Device  0: (UUID: MIG-cc)\n"
        "  MIG 3g.40gb     Device  1: (UUID: MIG-dd)\n"
    )
    assert parse_listing(listing) == ["GPU-aa-1", "MIG-cc", "MIG-dd"]
    assert parse_listing("No devices found.\n") == []


def test_visible_devices_are_understood_as_cuda_does():
    present = ["GPU-aa", "GPU-ab", "GPU-b"]
    assert visible_gpus(present, None) == present
    assert visible_gpus(present, " 2, 0 ") == ["GPU-b", "GPU-aa"]
    assert visible_gpus(present, "GPU-b,GPU-aa") == ["GPU-b", "GPU-aa"]
    for ends in ("GPU-a", "7", "-1", "0", ""):  # ambiguous, not there, none, twice, nothing
        assert visible_gpus(present, f"0,{ends},1") == ["GPU-aa"]


RANK = """
import sys, time
from cellmap_pipe.training.lease import die_with_parent
die_with_parent()
print("alive", flush=True)
time.sleep(60)
"""

PARENT = """
import os, subprocess, sys, time
os.environ["{launcher}"] = str(os.getpid() + {offset})
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
print(rank.pid, rank.stdout.readline().decode().strip() or "dead", flush=True)
time.sleep(60)
"""


def started_rank(offset: int) -> tuple[subprocess.Popen[str], int, str]:
    code = PARENT.format(launcher=LAUNCHER, offset=offset)
    parent = subprocess.Popen([sys.executable, "-c", code, RANK], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, state = parent.stdout.readline().split()
    return parent, int(pid), state


def gone(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_a_rank_dies_with_its_launcher():
    parent, rank, state = started_rank(0)
    assert state == "alive"
    parent.kill()
    parent.communicate()
    assert gone(rank)


def test_a_rank_whose_launcher_went_before_it_asked_dies_at_once():
    parent, _, state = started_rank(1)
    parent.kill()
    parent.communicate()
    assert state == "dead"
