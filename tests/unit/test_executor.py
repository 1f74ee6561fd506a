"""What Snakemake's executor for Slurm makes of what sacct says, and whom it cancels."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import snakemake_executor_plugin_slurm as plugin

from cellmap_pipe.cluster.executor import mend_executor
from cellmap_pipe.errors import ConfigError

LISTED = "printf '%s\\n' '7|CANCELLED by 1000' '8|COMPLETED' '9|'"


@pytest.fixture
def mended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The executor as the workflow has it, for the length of a test."""
    for owner, name in ((plugin, "query_job_status"), (plugin.Executor, "check_active_jobs")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(plugin.Executor, "cancel_jobs", plugin.Executor.cancel_jobs)
    mend_executor()
    mend_executor()
    yield
    del plugin.mended


def states(command: str) -> dict[str, str] | None:
    found: dict[str, str] | None = asyncio.run(plugin.query_job_status(command, logging.getLogger()))[0]
    return found


@pytest.mark.usefixtures("mended")
def test_a_job_that_somebody_cancelled_is_one_that_the_executor_knows_as_ended() -> None:
    assert states(LISTED) == {"7": "CANCELLED", "8": "COMPLETED", "9": ""}
    assert states("true") == {}
    assert states("false") is None


def test_the_first_word_is_still_to_be_taken() -> None:
    """Remove that from `_ended` when this fails: a version of the executor does that by itself."""
    assert (states(LISTED) or {})["7"] == "CANCELLED by 1000"


@pytest.mark.usefixtures("mended")
def test_a_preempted_job_that_slurm_does_not_start_again_counts_as_cancelled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed = "printf '%s\\n' '7|PREEMPTED' '8|PREEMPTED' '9|RUNNING'"
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    squeue.write_text("#!/bin/sh\nprintf '8\\n9\\n'\n")  # 8 goes back to the queue
    squeue.chmod(0o755)
    assert states(listed) == {"7": "CANCELLED", "8": "PREEMPTED", "9": "RUNNING"}
    assert states(listed) == {"7": "CANCELLED", "8": "PREEMPTED", "9": "RUNNING"}
    assert [record.message.split(" was")[0] for record in caplog.records] == ["Slurm job 7"], "said once"
    # where the queue is not known, nothing is given up
    squeue.write_text("#!/bin/sh\nexit 1\n")
    assert states(listed) == {"7": "PREEMPTED", "8": "PREEMPTED", "9": "RUNNING"}


class Unhurried:
    """The limit of queries per second, which is not what is tested."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass


def executor_of(status: str) -> Any:
    """Return what the real `check_active_jobs` needs of its executor. status: the command to be asked."""
    settings = SimpleNamespace(init_seconds_before_status_checks=1, status_attempts=2, keep_successful_logs=True)
    reported: list[str] = []
    return SimpleNamespace(
        workflow=SimpleNamespace(executor_settings=settings),
        logger=logging.getLogger("executor"),
        run_uuid="cellmap_0815",
        status_rate_limiter=Unhurried(),
        get_status_command=lambda: status,
        next_seconds_between_status_checks=1,
        _status_query_failures=0,
        _status_query_calls=0,
        _status_query_total_seconds=0.0,
        _status_query_min_seconds=None,
        _status_query_max_seconds=0.0,
        _status_query_cycle_rows=[],
        report_job_success=lambda job: reported.append(job.external_jobid),
        reported=reported,
    )


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize("status", ["sacct", "squeue"])
def test_no_job_is_forgotten_while_slurm_does_not_tell_of_any(
    status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    answers = {"scontrol": "echo 'MinJobAge = 300 sec'", status: f"test -e {tmp_path}/up && printf '7|COMPLETED\\n'"}
    for name, script in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    jobs = [SimpleNamespace(external_jobid=number, aux={}) for number in ("7", "8")]
    executor = executor_of(status)

    async def look() -> list[Any]:
        return [job async for job in plugin.Executor.check_active_jobs(executor, jobs)]

    for said in (1, 2):
        assert asyncio.run(look()) == jobs == executor.looked_at
        assert [record.message for record in caplog.records] == said * [
            "Slurm does not tell the states of jobs; they are asked for again."
        ]
    (tmp_path / "up").touch()
    assert asyncio.run(look()) == jobs[1:]
    assert executor.reported == ["7"]
    assert len(caplog.records) == 2, "said of rounds without an answer alone"


def test_jobs_are_still_to_be_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove that from `_lose_none` when this fails: a version of the executor does that by itself."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "sacct").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "sacct").chmod(0o755)
    jobs = [SimpleNamespace(external_jobid="7", aux={})]

    async def look() -> list[Any]:
        return [job async for job in plugin.Executor.check_active_jobs(executor_of("sacct"), jobs)]

    assert asyncio.run(look()) == []


def test_an_interrupt_cancels_every_job_also_what_is_looked_at_or_being_submitted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    scancel = tmp_path / "scancel"
    scancel.write_text(f"#!/bin/sh\necho $* $(cat {tmp_path}/taken) >> {tmp_path}/called\n")
    scancel.chmod(0o755)
    (tmp_path / "taken").touch()
    cancelled: list[list[str]] = []
    jobs = [SimpleNamespace(external_jobid=number) for number in ("7", "8")]

    class Executor:
        run_uuid = "cellmap_0815"
        logger = logging.getLogger("executor")
        _job_submission_executor = ThreadPoolExecutor(1)

        async def check_active_jobs(self, active_jobs: list[Any]) -> Any:
            self.cancel_jobs([])  # the interrupt
            yield active_jobs[1]

        def cancel_jobs(self, active_jobs: list[Any]) -> None:
            cancelled.append([job.external_jobid for job in active_jobs])

    monkeypatch.setattr(plugin, "Executor", Executor)
    monkeypatch.setattr(plugin, "query_job_status", plugin.query_job_status)
    mend_executor()
    del plugin.mended

    async def look() -> list[Any]:
        return [job async for job in executor.check_active_jobs(list(jobs))]

    executor = Executor()
    executor.cancel_jobs([])
    assert asyncio.run(look()) == jobs[1:]
    executor.cancel_jobs(jobs[1:])
    assert cancelled == [[], ["7", "8"], ["8"]]

    # what waits for sbatch is not submitted any more, and what sbatch is taking just then is cancelled by its name
    submitted: list[str] = []
    begun = threading.Event()

    def taken() -> None:
        begun.set()
        time.sleep(0.5)
        (tmp_path / "taken").write_text("9 is in the queue")

    executor._job_submission_executor = pool = ThreadPoolExecutor(1)
    pool.submit(taken)
    pool.submit(submitted.append, "10")
    assert begun.wait(10)
    executor.cancel_jobs([])
    assert submitted == []
    assert (tmp_path / "called").read_text().splitlines()[-1] == "--name=cellmap_0815 9 is in the queue"
    assert not caplog.records
    scancel.write_text("#!/bin/sh\necho 'cannot contact' >&2\nexit 1\n")
    executor.cancel_jobs([])
    assert "may be left; see `squeue --me`" in caplog.text and "cannot contact" in caplog.text


def test_another_version_of_the_executor_is_refused_with_the_one_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(plugin, "query_job_status")
    with pytest.raises(ConfigError, match=r"is not made as version 2\.8\.0, .*; install that: pip install sn"):
        mend_executor()
    assert not hasattr(plugin, "mended")
