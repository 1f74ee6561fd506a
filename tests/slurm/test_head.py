"""Snakemake itself as a job, by profiles/longleaf/head.sh, comes back after its walltime and after a kill."""

import os
import re
import subprocess
from typing import Any

import pytest

from .cluster import ROOT
from .head_runs import HEAD

PATIENCE = 600.0


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
