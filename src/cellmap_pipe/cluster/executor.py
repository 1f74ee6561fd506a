"""Two faults of Snakemake's executor for Slurm (version 2.8.0), mended. Imports nothing slow before it is used."""

import functools
from collections.abc import AsyncIterator
from typing import Any


def mend_executor() -> None:
    """Have the executor see that a job was cancelled, and cancel all its jobs when Snakemake is interrupted."""
    import snakemake_executor_plugin_slurm as plugin  # type: ignore[import-untyped]

    if not getattr(plugin, "mended", False):
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
    """Have the executor cancel the jobs, too, whose states it is asking for.

    It takes them off its list meanwhile: of an interrupt in these seconds it would tell none of them.
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
        known = {job.external_jobid: job for job in [*active_jobs, *getattr(self, "looked_at", [])]}
        cancel(self, list(known.values()))

    executor.check_active_jobs, executor.cancel_jobs = check_active_jobs, cancel_jobs
