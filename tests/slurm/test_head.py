"""Snakemake itself as a job, by profiles/longleaf/head.sh, comes back after its walltime and after a kill."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .cluster import ROOT
from .head_runs import HEAD

PATIENCE = 1800.0


@pytest.fixture
def told(heads) -> dict[str, Any]:
    return heads.result(PATIENCE)


@pytest.mark.parametrize("name", ["normal", "limited", "killed"])
def test_every_run_ends_well_with_its_result(told, name):
    head = told[name]
    assert told["outcomes"][head] == "COMPLETED", head.said()
    assert (head.folder / "done.txt").read_text() == "worked\n"


def test_a_run_that_nothing_stops_does_its_work_once(told):
    assert told["normal"].starts() == 1


def test_before_its_walltime_a_run_cancels_its_jobs_and_is_queued_again(told):
    assert told["left by the walltime"] == []
    assert "start 2 of job" in told["limited"].said()


def test_a_killed_run_waits_for_the_job_that_it_left_and_starts_no_second_one(told):
    assert told["beside the orphan"] == [told["orphan"]]
    assert "start 2 of job" in told["killed"].said()


def test_a_run_that_is_told_to_end_cancels_its_jobs_and_leaves_the_folder_as_the_next_one_needs_it(told):
    head = told["ended"]
    assert told["left by the end"] == []
    assert told["outcomes"][head] == "FAILED"
    assert "SIGTERM: stopping Snakemake" in head.said() and "Snakemake ended with status 1" in head.said()
    for kind in ("locks", "incomplete"):
        assert not list((head.folder / ".snakemake" / kind).glob("*")), kind


def test_slurm_mails_the_end_of_a_run(told, cluster):
    sent = (cluster.folder / "log/mail.txt").read_text()
    assert re.search(rf"Job_id={told['killed'].job} .*Ended.* me@unc.edu", sent), sent


def here(folder: Path, script: str, **programs: str) -> tuple[int, str]:
    """Return how a run of head.sh ends and what it says, in a folder whose environment has these programs alone."""
    profile = folder / "profiles/longleaf"
    (profile / "bin").mkdir(parents=True)
    (profile / "head.sh").write_text(script)
    for name, content in programs.items():
        path = folder / ".venv/bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{content}\n")
        path.chmod(0o755)
    # no pipe: what head.sh has started to watch over Snakemake's end sleeps on, and would hold it open
    with (folder / "said.txt").open("w") as said:
        done = subprocess.run(
            # a shell that runs tests in the background has SIGINT ignored
            ["env", "--default-signal=INT", "bash", "profiles/longleaf/head.sh", "all"],
            cwd=folder,
            stdout=said,
            stderr=subprocess.STDOUT,
            timeout=60,
            env={"PATH": "/usr/bin:/bin", "CELLMAP_STOP_SECONDS": "30"},
        )
    return done.returncode, (folder / "said.txt").read_text()


@pytest.mark.parametrize("number", ["TERM", "INT", "USR1"])
def test_a_signal_while_the_environment_is_activated_ends_the_run_before_snakemake(tmp_path, number):
    script = (ROOT / HEAD).read_text()
    environment = f"kill -{number} $$; PATH=$PWD/.venv/bin:$PATH"
    status, said = here(tmp_path, script, activate=environment, snakemake="touch begun", scontrol="touch asked; exit 1")
    assert status == 1, said
    assert not (tmp_path / "begun").exists()
    assert (tmp_path / "asked").exists() == (number == "USR1")  # to be queued again


def test_a_signal_in_the_moment_in_which_snakemake_begins_stops_it(tmp_path):
    script, begins = (ROOT / HEAD).read_text(), "\nchild=$!\n"
    assert script.count(begins) == 1
    waits = "trap 'exit 3' INT; touch begun; for i in {1..200}; do sleep 0.1; done; touch done"
    script = script.replace(begins, f"\nuntil test -e begun; do sleep 0.1; done; kill -TERM $${begins}")
    status, said = here(tmp_path, script, activate="PATH=$PWD/.venv/bin:$PATH", snakemake=waits)
    assert status == 3, said
    assert "SIGTERM: stopping Snakemake" in said
    assert not (tmp_path / "done").exists()


def test_the_head_script_says_what_it_lacks(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / HEAD), "all"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        env=dict(os.environ),
    )
    assert done.returncode == 1
    assert re.search(r"ERROR profiles/longleaf is not in .*; submit from the project's folder", done.stderr)
