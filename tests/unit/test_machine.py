"""Memory that a process may use: the machine's, or what the control groups of its job leave."""

from pathlib import Path

import pytest

from cellmap_pipe.machine import MEMORY_SHARE, memory_limit, physical_memory, usable_gb


def test_without_a_limit_it_is_the_machines_memory(tmp_path: Path) -> None:
    pages = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert physical_memory() == pytest.approx(pages, rel=0.01)
    assert memory_limit(tmp_path / "missing", tmp_path) == physical_memory()
    assert 0 < memory_limit() <= physical_memory()


@pytest.mark.parametrize(
    ("line", "folder", "name"),
    [
        ("0::/slurm/job_7/step_0", "slurm/job_7", "memory.max"),
        ("4:cpu,memory:/slurm/job_7/step_0", "memory/slurm/job_7", "memory.limit_in_bytes"),
    ],
)
def test_the_limit_of_a_parent_group_counts(tmp_path: Path, line: str, folder: str, name: str) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text(f"3:cpuset:/other\n{line}\n")
    unrelated = tmp_path / "groups/memory/other"  # of another controller
    unrelated.mkdir(parents=True)
    (unrelated / "memory.limit_in_bytes").write_text("1000\n")
    limited = tmp_path / "groups" / folder
    (limited / "step_0").mkdir(parents=True)
    (limited / name).write_text("96000000\n")
    (limited / "step_0" / name).write_text("max\n" if name == "memory.max" else f"{2**62}\n")
    assert memory_limit(membership, tmp_path / "groups") == 96_000_000
    (limited / name).unlink()
    assert memory_limit(membership, tmp_path / "groups") == physical_memory()


def test_a_job_plans_with_what_it_asked_for_but_not_with_all_that_there_is():
    assert usable_gb(0.001) == 0.001
    assert usable_gb(1e9) == usable_gb() == MEMORY_SHARE * memory_limit() / 1e9
