"""What the machine, and the job on it, has."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")

# Share of its memory that a job takes at most: the page cache of what it writes counts as its memory too
MEMORY_SHARE = 0.8


def physical_memory() -> int:
    """Return the machine's main memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_limit(membership: Path = Path("/proc/self/cgroup"), cgroups: Path = CGROUPS) -> int:
    """Return the main memory in bytes that this process may use: the machine's, or less where its job is limited.

    membership: lists the control groups of the process, under `cgroups`; a limit of any of their parents counts. The
    page cache of a job's files counts as the job's memory.
    """
    limits = [physical_memory()]
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (cgroups / "memory", "memory.limit_in_bytes") if controllers else (cgroups, "memory.max")
        folder = base / group.lstrip("/")
        while folder.is_relative_to(base):
            path = folder / name
            text = path.read_text().strip() if path.is_file() else ""
            limits += [int(text)] if text.isdigit() else []
            folder = folder.parent
    return min(limits)


def usable_gb(asked_gb: float | None = None) -> float:
    """Return the memory in 10^9 bytes that a job may plan with: what was asked for, at most a share of its limit."""
    return min(math.inf if asked_gb is None else asked_gb, MEMORY_SHARE * memory_limit() / 1e9)
