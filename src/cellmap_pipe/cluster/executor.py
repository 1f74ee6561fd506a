"""Faults of Snakemake's executor for Slurm (version 2.8.0), mended. Imports nothing slow before it is used."""

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from cellmap_pipe.cluster.slurm import SlurmError, ask
from cellmap_pipe.errors import ConfigError

PLUGIN, MENDED_VERSION = "snakemake-executor-plugin-slurm", "2.8.0"


def mend_executor() -> None:
    """Have the executor see which jobs ended, keep the others while Slurm is silent, and cancel all at an interrupt.

    Raises ConfigError if it is another than the one that has these faults: what would become of cancelled jobs, and of
    the jobs of an interrupted run, is not known then.
    """
    import snakemake_executor_plugin_slurm as plugin

    if not getattr(plugin, "mended", False):
        executor = getattr(plugin, "Executor", None)
        if not (
            inspect.iscoroutinefunction(getattr(plugin, "query_job_status", None))
            and inspect.isasyncgenfunction(getattr(executor, "check_active_jobs", None))
            and inspect.isfunction(getattr(executor, "cancel_jobs", None))
        ):
            raise ConfigError(
                f"{PLUGIN} {version(PLUGIN)} is not made as version {MENDED_VERSION}, which this workflow was tested "
                f"with; install that: pip install {PLUGIN}=={MENDED_VERSION}"
            )
        last = _Answer()
        plugin.query_job_status = _ended(plugin.query_job_status, last)
        _lose_none(plugin.Executor, last)
        plugin.mended = True


@dataclass
class _Answer:
    """Whether Slurm told the states of jobs when it was asked last."""

    came: bool = True


def _ended(query: Any, last: _Answer) -> Any:
    """Return the function that asks for the states of jobs, with such as the executor knows for jobs that have ended.

    Of a job ended by scancel sacct says "CANCELLED by 1000", which the executor knows no more than a state that is not
    over; and one that was PREEMPTED it leaves to Slurm, which starts it again where the partition's PreemptMode is
    REQUEUE, and not where it is CANCEL. Snakemake would wait for such jobs for ever. last: where it notes whether there
    was an answer.
    """
    told: set[str] = set()  # sacct goes on telling of them for two days

    @functools.wraps(query)
    async def ended(command: str, logger: Any) -> tuple[dict[str, str] | None, float | None]:
        states, seconds = await query(command, logger)
        last.came = states is not None
        if states is None:
            return None, seconds
        states = {job: (state.split() or [state])[0] for job, state in states.items()}
        preempted = {job for job, state in states.items() if state == "PREEMPTED"}
        gone = preempted and preempted - await asyncio.to_thread(_queued, preempted)
        for job in sorted(gone - told):
            logger.warning(f"Slurm job {job} was preempted, and Slurm does not start it again; it counts as cancelled.")
        told.update(gone)
        return states | dict.fromkeys(gone, "CANCELLED"), seconds

    return ended


def _queued(jobs: set[str]) -> set[str]:
    """Return which of the jobs are in the queue, all of them where that is not known."""
    try:
        return jobs & set(ask("squeue", "--me", "--noheader", "--format=%A").split())
    except SlurmError:
        return jobs


def _lose_none(executor: Any, last: _Answer) -> None:
    """Have the executor keep its jobs while Slurm is silent, and cancel all of them at an interrupt.

    It takes them off its list while it asks for their states, and does not put them back where there was no answer: it
    would wait for them for ever, without a word. Of an interrupt in these seconds it would tell none of them. What
    waits to be submitted, where sbatch is slow, it would submit after the interrupt, and leave; what sbatch is just
    taking it would leave, too.
    """
    check, cancel = executor.check_active_jobs, executor.cancel_jobs

    @functools.wraps(check)
    async def check_active_jobs(self: Any, active_jobs: list[Any]) -> AsyncIterator[Any]:
        self.looked_at, left = list(active_jobs), []
        last.came = True
        async for job in check(self, active_jobs):
            left.append(job)
            yield job
        if not last.came:
            self.logger.warning("Slurm does not tell the states of jobs; they are asked for again.")
            left = self.looked_at
            for job in left:
                yield job
        self.looked_at = left  # until the caller has put them back on its list

    @functools.wraps(cancel)
    def cancel_jobs(self: Any, active_jobs: list[Any]) -> None:
        self._job_submission_executor.shutdown(wait=False, cancel_futures=True)
        known = {job.external_jobid: job for job in [*active_jobs, *getattr(self, "looked_at", [])]}
        cancel(self, list(known.values()))
        self._job_submission_executor.shutdown(wait=True)
        try:
            ask("scancel", f"--name={self.run_uuid}")  # of every job of this run, and of no other
        except SlurmError as error:
            self.logger.warning(f"A job that was just being submitted may be left; see `squeue --me`. {error}")

    executor.check_active_jobs, executor.cancel_jobs = check_active_jobs, cancel_jobs
