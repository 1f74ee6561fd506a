"""One process at a time trains in a run directory; a dead one does not hold it."""

import json
import multiprocessing
import os
import socket
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from cellmap_pipe.errors import TrainingError
from cellmap_pipe.training import owner
from cellmap_pipe.training.owner import Owner, is_stale


def holder(**changes: Any) -> dict[str, Any]:
    content = {"token": "t", "host": "elsewhere", "pid": 1, "started": 1, "job": None, "heartbeat": time.time()}
    return {**content, **changes}


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
    (tmp_path / "owner.json").write_text(json.dumps(holder(host=socket.gethostname(), pid=os.getpid(), started=1)))
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
