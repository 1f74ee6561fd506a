"""Faults of Snakemake's executor for Slurm (version 2.8.0), mended. Imports nothing slow before it is used."""

import functools
import inspect
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

from cellmap_pipe.errors import ConfigError

PLUGIN, MENDED_VERSION = "snakemake-executor-plugin-slurm", "2.8.0"


def mend_executor() -> None:
    """Have the executor see that a job was cancelled, and cancel all its jobs when Snakemake is interrupted.

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
        plugin.query_job_status = _first_words(plugin.query_job_status)
        _cancel_all(plugin.Executor)
        plugin.mended = True


def _first_words(ask: Any) -> Any:
    """Return the function that asks for the states of jobs, with the first word of each.

    Of a job ended by scancel sacct says "CANCELLED by 1000", which the executor knows no more than a state that is not
    over: Snakemake would wait for that job for ever.
    """

    @functools.wraps(ask)
    async def first_words(command: str, logger: Any) -> tuple[dict[str, str] | None, float | None]:
        states, seconds = await ask(command, logger)
        return states and {job: (state.split() or [state])[0] for job, state in states.items()}, seconds

    return first_words


def _cancel_all(executor: Any) -> None:
    """Have the executor cancel the jobs, too, whose states it is asking for, and submit none any more.

    It takes them off its list meanwhile: of an interrupt in these seconds it would tell none of them. What waits to be
    submitted, where sbatch is slow, it would submit after the interrupt, and leave.
    """
    check, cancel = executor.check_active_jobs, executor.cancel_jobs

    @functools.wraps(check)
    async def check_active_jobs(self: Any, active_jobs: list[Any]) -> AsyncIterator[Any]:
        self.looked_at, left = list(active_jobs), []
        async for job in check(self, active_jobs):
            left.append(job)
            yield job
        self.looked_at = left  # until the caller has put them back on its list

    @functools.wraps(cancel)
    def cancel_jobs(self: Any, active_jobs: list[Any]) -> None:
        if submitting := getattr(self, "_job_submission_executor", None):
            submitting.shutdown(wait=False, cancel_futures=True)
        known = {job.external_jobid: job for job in [*active_jobs, *getattr(self, "looked_at", [])]}
        cancel(self, list(known.values()))

    executor.check_active_jobs, executor.cancel_jobs = check_active_jobs, cancel_jobs
