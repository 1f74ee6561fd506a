"""Labels and crops in parallel processes within a memory budget."""

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np

from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation.inputs import LAYER_BYTES, SLAB_VOXELS

# What a process takes besides (measured: decoders, numpy's temporaries)
WORKING_BYTES = 60_000_000

# What to do where a task ran out of memory
LARGER = (
    "give it more memory or let fewer run at once (--memory-gb and --workers; in the workflow the rule's mem_mb and "
    "threads)"
)

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    costs: Sequence[int],
    workers: int,
    memory_gb: float | None = None,
    lost: Callable[[Task], Result] | None = None,
) -> Iterator[tuple[Task, Result]]:
    """Yield (task, result) as they are done, the costliest first, in at most `workers` processes.

    costs: bytes that each task needs. A task begins only when it fits into the memory budget beside the running ones;
    one that is larger than the budget runs alone. Tasks whose process was killed, or that ran out of memory, run again,
    each alone. lost: gives the result of one that fails again; without it DataError is raised.
    """
    order = sorted(range(len(tasks)), key=lambda i: -costs[i])
    if workers <= 1 or len(tasks) < 2:
        for i in order:
            try:
                result = function(tasks[i])
            except MemoryError as error:
                result = _lost(tasks[i], lost, error)
            yield tasks[i], result
        return
    budget = budget_bytes(memory_gb)
    again: list[int] = []
    while order:
        # A pool whose process was killed is of no more use: those left go on in another
        with _pool(min(workers, len(order))) as pool:
            running: dict[Future[Result], int] = {}
            broken = False
            while running or (order and not broken):
                free = budget - sum(costs[i] for i in running.values())
                fitting = [i for i in order if costs[i] <= free][: workers - len(running)]
                if not fitting and not running:
                    fitting = order[:1]
                for i in () if broken else fitting:
                    if running and costs[i] > free:
                        continue
                    try:
                        future = pool.submit(function, tasks[i])
                    except BrokenProcessPool:
                        broken = True
                        break
                    free -= costs[i]
                    order.remove(i)
                    running[future] = i
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    i = running.pop(future)
                    try:
                        result = future.result()
                    except (MemoryError, BrokenProcessPool) as error:
                        broken |= isinstance(error, BrokenProcessPool)
                        again.append(i)
                        continue
                    yield tasks[i], result
    for i in again:
        with _pool(1) as pool:
            try:
                result = pool.submit(function, tasks[i]).result()
            except (MemoryError, BrokenProcessPool) as error:
                result = _lost(tasks[i], lost, error)
        yield tasks[i], result


def semantic_bytes(*arrays: Any) -> int:
    """Return the memory that counting the voxels of arrays of one shape takes: a slab and a layer of chunks of each."""
    shape = arrays[0].shape
    slab = min(math.prod(shape), max(SLAB_VOXELS, math.prod(shape[1:])))
    total = WORKING_BYTES
    for array in arrays:
        chunks = getattr(array, "chunks", None)
        itemsize = np.dtype(array.dtype).itemsize
        layer = min(chunks[0], shape[0]) * math.prod(shape[1:]) * itemsize if chunks else 0
        total += slab * (2 * itemsize + 2) + 2 * (layer if layer <= LAYER_BYTES else 0)
    return total


def budget_bytes(memory_gb: float | None) -> int:
    """Return the memory that all tasks may take together: 80 % of what is available unless it is given (in GB)."""
    return int(memory_gb * 1e9 if memory_gb is not None else 0.8 * available_bytes())


def _pool(workers: int) -> ProcessPoolExecutor:
    # Forked, not spawned: a spawned worker would run the calling script again
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"))


def _lost(task: Task, lost: Callable[[Task], Result] | None, error: Exception) -> Result:
    if lost is None:
        raise DataError(f"a process was killed or ran out of memory; {LARGER}") from error
    return lost(task)


def available_bytes() -> int:
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
