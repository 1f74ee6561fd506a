"""What Snakemake's executor for Slurm makes of what sacct says, and whom it cancels."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
    """Remove `_first_words` when this fails: a version of the executor does that by itself."""
    assert (states(LISTED) or {})["7"] == "CANCELLED by 1000"


def test_an_interrupt_while_states_are_asked_for_cancels_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[list[str]] = []
    jobs = [SimpleNamespace(external_jobid=number) for number in ("7", "8")]

    class Executor:
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

    # and what waits for sbatch is not submitted any more
    submitted: list[str] = []
    slow = threading.Event()
    executor._job_submission_executor = pool = ThreadPoolExecutor(1)  # type: ignore[attr-defined]
    pool.submit(slow.wait, 60)
    pool.submit(submitted.append, "9")
    executor.cancel_jobs([])
    slow.set()
    pool.shutdown(wait=True)
    assert submitted == []


def test_another_version_of_the_executor_is_refused_with_the_one_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(plugin, "query_job_status")
    with pytest.raises(ConfigError, match=r"is not made as version 2\.8\.0, .*; install that: pip install sn"):
        mend_executor()
    assert not hasattr(plugin, "mended")
