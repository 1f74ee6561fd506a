"""One process at a time trains in a run directory; a dead one does not hold it."""

import json
import multiprocessing
import os
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cellmap_pipe.errors import TrainingError
from cellmap_pipe.training import owner
from cellmap_pipe.training.owner import Holder, Owner, is_stale, look_at


def holder(**changes: Any) -> dict[str, Any]:
    elsewhere = {"host": "elsewhere", "boot": "b", "namespace": "pid:[1]"}
    return {"token": "t", **elsewhere, "pid": 1, "started": 1, "job": None, "heartbeat": time.time(), **changes}


def write(folder: Path, content: dict[str, Any]) -> None:
    partial = folder / "partial.json"
    partial.write_text(json.dumps(content))
    partial.replace(folder / "owner.json")


def squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a `squeue` first on the path that runs `script`."""
    program = folder / "squeue"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_second_owner_is_kept_out_until_the_first_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with Owner(tmp_path):
        content = json.loads((tmp_path / "owner.json").read_text())
        assert (content["host"], content["pid"], content["job"]) == (socket.gethostname(), os.getpid(), "77")
        with (
            pytest.raises(TrainingError, match=f"in use by process {os.getpid()} on .*, Slurm job 77; wait for it"),
            Owner(tmp_path),
        ):
            pass
    with Owner(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def _hold(folder: str) -> None:
    with Owner(Path(folder)):
        time.sleep(60)


def test_killed_owner_is_replaced_at_once(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(str(tmp_path),))
    process.start()
    try:
        while not (tmp_path / "owner.json").exists():
            assert process.is_alive()
            time.sleep(0.01)
        with pytest.raises(TrainingError, match=f"process {process.pid}"), Owner(tmp_path):
            pass
    finally:
        process.kill()
        process.join()
    with Owner(tmp_path):
        assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()


def test_number_of_a_process_that_came_later_is_not_the_owner(tmp_path: Path) -> None:
    write(tmp_path, holder(**owner._machine(), pid=os.getpid(), started=1))
    with Owner(tmp_path):
        pass


def test_heartbeat_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "HEARTBEAT_SECONDS", 0.01)
    with Owner(tmp_path):
        first = json.loads((tmp_path / "owner.json").read_text())["heartbeat"]
        deadline = time.monotonic() + 60
        while json.loads((tmp_path / "owner.json").read_text())["heartbeat"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_elsewhere_silence_and_the_end_of_the_job_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    squeue(tmp_path, monkeypatch, "echo RUNNING")
    assert not is_stale(holder(job="5", heartbeat=now - 10_000), now)
    squeue(tmp_path, monkeypatch, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert is_stale(holder(job="5", heartbeat=now - 200), now)
    assert not is_stale(holder(job="5", heartbeat=now - 20), now)
    squeue(tmp_path, monkeypatch, "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert not is_stale(holder(job="5", heartbeat=now - 200), now)
    assert is_stale(holder(job="5", heartbeat=now - 1000), now)
    assert is_stale(holder(heartbeat=now - 1000), now)


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"host": socket.gethostname(), "token": "t"})])
def test_torn_owner_file_of_a_crashed_machine_is_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "owner.json").write_text(content)
    with Owner(tmp_path):
        assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()


def test_link_that_was_made_though_the_disk_says_it_was_there_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS asks a second time where the first answer was lost."""
    link = os.link

    def lost_answer(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(target)

    monkeypatch.setattr(os, "link", lost_answer)
    with Owner(tmp_path):
        assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_number_of_a_process_says_nothing_in_another_container_or_after_a_restart_of_the_machine() -> None:
    now = time.time()
    mine = {**owner._machine(), "pid": os.getpid(), "started": owner.start_ticks(os.getpid()), "heartbeat": now}
    assert look_at(holder(**mine), now) is Holder.LIVES
    assert look_at(holder(**{**mine, "pid": 2**22 + 1}), now) is Holder.GONE
    for changed in ({"namespace": "pid:[1]"}, {"boot": "another"}):
        assert look_at(holder(**{**mine, **changed}), now) is Holder.UNKNOWN
        assert look_at(holder(**{**mine, **changed, "pid": 2**22 + 1}), now) is Holder.UNKNOWN
        assert look_at(holder(**{**mine, **changed, "heartbeat": now - 1000}), now) is Holder.GONE


def test_ended_job_or_our_own_started_again_elsewhere_is_watched_and_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    squeue(tmp_path, monkeypatch, "echo COMPLETING")
    assert look_at(holder(job="5", heartbeat=now - 20), now) is Holder.ENDING
    for state in ("OUT_OF_MEMORY", "PREEMPTED"):
        squeue(tmp_path, monkeypatch, f"echo {state}")
        assert look_at(holder(job="5", heartbeat=now - 20), now) is Holder.ENDING
    squeue(tmp_path, monkeypatch, "echo RUNNING")
    assert look_at(holder(job="5", heartbeat=now - 20), now) is Holder.LIVES
    monkeypatch.setenv("SLURM_JOB_ID", "5")  # its node failed, and Slurm started it again under its number
    assert look_at(holder(job="5", heartbeat=now - 20), now) is Holder.ENDING


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a holder on another node whose job has ended a moment ago; it is watched for three seconds."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    squeue(bin_dir, monkeypatch, "echo COMPLETING")
    monkeypatch.setattr(owner, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(owner, "WATCH_SECONDS", 3.0)
    write(tmp_path, holder(job="5"))
    return tmp_path


def test_silent_holder_whose_job_has_ended_is_taken_over_soon(ended: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Owner(ended):
        assert json.loads((ended / "owner.json").read_text())["pid"] == os.getpid()
    assert "took over" in caplog.text and "process 1 on elsewhere, Slurm job 5, gone" in caplog.text


def beaten(folder: Path, seconds: float, leave: bool) -> threading.Thread:
    """Have a holder show its heartbeat for a while, and then leave or not."""

    def beat() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            write(folder, holder(job="5"))
            time.sleep(0.05)
        if leave:
            (folder / "owner.json").unlink()

    thread = threading.Thread(target=beat)
    thread.start()
    return thread


def test_holder_that_saves_while_its_job_ends_is_waited_for(ended: Path, caplog: pytest.LogCaptureFixture) -> None:
    thread = beaten(ended, 2.0, leave=True)
    began = time.monotonic()
    with Owner(ended):
        assert time.monotonic() - began > 1.5
    thread.join()
    assert "took over" not in caplog.text


def test_holder_that_beats_on_after_its_job_has_ended_is_an_error_in_the_end(
    ended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "PATIENCE_SECONDS", 1.5)
    thread = beaten(ended, 3.0, leave=False)
    with pytest.raises(TrainingError, match="in use by process 1 on elsewhere, Slurm job 5; wait for it"), Owner(ended):
        pass
    thread.join()


def test_container_of_this_machine_that_beats_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "LOOK_SECONDS", 0.02)
    content = holder(**{**owner._machine(), "namespace": "pid:[1]"})
    write(tmp_path, content)
    later = threading.Timer(0.5, write, [tmp_path, {**content, "heartbeat": content["heartbeat"] + 15}])
    later.start()
    with pytest.raises(TrainingError, match="in use by process 1 on"), Owner(tmp_path):
        pass
    later.join()


def test_waiting_for_a_holder_ends_when_a_stop_is_asked_for(ended: Path) -> None:
    with pytest.raises(TrainingError, match="asked to stop while waiting for process 1 on elsewhere"):
        Owner(ended, stopped=lambda: True).__enter__()
    assert json.loads((ended / "owner.json").read_text())["token"] == "t"


def test_owner_that_was_taken_over_is_told_once_and_leaves_the_file_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "HEARTBEAT_SECONDS", 0.02)
    told: list[str] = []
    with Owner(tmp_path, lost=told.append):
        deadline = time.monotonic() + 60
        while not told:
            assert time.monotonic() < deadline
            write(tmp_path, holder(job="9"))  # again: a beat that is under way writes over it
            time.sleep(0.01)
        time.sleep(0.2)
    assert len(told) == 1 and "was taken over by process 1 on elsewhere, Slurm job 9" in told[0]
    assert json.loads((tmp_path / "owner.json").read_text())["job"] == "9"


def test_file_that_was_deleted_by_hand_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "HEARTBEAT_SECONDS", 0.02)
    with Owner(tmp_path):
        (tmp_path / "owner.json").unlink()
        deadline = time.monotonic() + 60
        while not (tmp_path / "owner.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []
