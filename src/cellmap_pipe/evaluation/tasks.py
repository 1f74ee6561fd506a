"""Labels and crops in parallel processes within a memory budget."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TypeVar

# Bytes of working memory per voxel while a label is scored (measured, with a margin), the two volumes included
INSTANCE_BYTES = 28
SEMANTIC_BYTES = 12
# And per voxel of a prediction that is resampled
RESAMPLE_BYTES = 16

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    costs: Sequence[int],
    workers: int,
    memory_gb: float | None = None,
) -> Iterator[tuple[Task, Result]]:
    """Yield (task, result) as they are done, the costliest first, in at most `workers` processes.

    costs: bytes that each task needs. A task begins only when it fits into the memory budget beside the running ones;
    one that is larger than the budget runs alone.
    """
    order = sorted(range(len(tasks)), key=lambda i: -costs[i])
    if workers <= 1 or len(tasks) < 2:
        for i in order:
            yield tasks[i], function(tasks[i])
        return
    budget = memory_gb * 1e9 if memory_gb is not None else 0.8 * _available_bytes()
    # Forked, not spawned: a spawned worker would run the calling script again
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context) as pool:
        running: dict[Future[Result], int] = {}
        while order or running:
            free = budget - sum(costs[i] for i in running.values())
            fitting = [i for i in order if costs[i] <= free][: workers - len(running)]
            if not fitting and not running:
                fitting = order[:1]
            for i in fitting:
                if running and costs[i] > free:
                    continue
                free -= costs[i]
                order.remove(i)
                running[pool.submit(function, tasks[i])] = i
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                i = running.pop(future)
                yield tasks[i], future.result()


def _available_bytes() -> int:
    """Return the memory that new processes may use: the machine's, or less where a control group sets a limit."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo") as stream:
            fields = dict(line.split(":", 1) for line in stream)
        available = int(fields["MemAvailable"].split()[0]) * 1024
        with open("/sys/fs/cgroup/memory.max") as stream:
            available = min(available, int(stream.read()))
    except (OSError, KeyError, ValueError):
        pass  # no such files, or no limit
    return available
