"""When Slurm ends the job, as a training learns it."""

import stat
import time
from pathlib import Path

import pytest

from cellmap_pipe.training.main import _deadline, slurm_end


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `squeue` first on the path, in job 7 of a Slurm that does not tell the end by itself."""
    program = tmp_path / "squeue"
    program.write_text("#!/bin/sh\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    return program


def test_slurm_is_asked_where_the_environment_does_not_tell(squeue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = int(time.time()) + 6000
    squeue.write_text(f'#!/bin/sh\ntest "$3" = 7 && date -d @{end} +%Y-%m-%dT%H:%M:%S\n')
    assert slurm_end() == end
    request = {"settings": {"stop_minutes": 5}, "runtime_min": 10_000}
    # what Slurm leaves is counted from now, however long ago the process began
    assert _deadline(request, 7.0) == pytest.approx(time.monotonic() + end - time.time() - 300, abs=1)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end + 60))
    assert slurm_end() == end + 60


@pytest.mark.parametrize("script", ["exit 1", "echo NONE", "echo N/A", "true"])
def test_the_rule_s_walltime_counts_where_slurm_cannot_tell(squeue: Path, script: str) -> None:
    squeue.write_text(f"#!/bin/sh\n{script}\n")
    assert slurm_end() is None
    assert _deadline({"settings": {"stop_minutes": 0}, "runtime_min": 10}, 7.0) == 607.0


def test_outside_of_slurm_it_is_not_asked(squeue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue.write_text("#!/bin/sh\necho 2030-01-01T00:00:00\n")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert slurm_end() is None
