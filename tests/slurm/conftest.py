"""One Slurm cluster for all tests of this folder; skipped, with the reason, where there can be none."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from . import head_runs
from .cluster import ROOT, Cluster, why_not

HERE = Path(__file__).parent
DEMO_SECONDS = 3600
CROPS = [f"phantom-{number // 100}/crop{number}" for number in (101, 102, 202, 204, 302, 303)]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster: that in the folder SLURM_TEST_CLUSTER, for who works on these tests, or one of their own."""
    if reason := why_not():
        pytest.skip(reason)
    running = os.environ.get("SLURM_TEST_CLUSTER")
    if running:
        yield Cluster(Path(running))
        return
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="session")
def heads(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[dict[str, Any]]]:
    """What runs of head.sh meet, to be waited for: they mostly wait themselves, so they run beside what computes."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(head_runs.story, cluster, tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="session")
def slurm_demo(cluster: Cluster, heads: Future[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a demo that ran on the cluster by profiles/longleaf; copy what is to be changed.

    What Snakemake said is in snakemake.txt. SLURM_TEST_DEMO names one that is finished, for who works on these tests.
    """
    if finished := os.environ.get("SLURM_TEST_DEMO"):
        return Path(finished)
    folder = tmp_path_factory.mktemp("slurm-demo")
    (folder / "crops.csv").write_text("\n".join(["crop", *CROPS]) + "\n")
    command = [sys.executable, str(HERE / "impatient.py"), "all", "--directory", str(folder)]
    command += ["--profile", "profiles/longleaf", "--workflow-profile", str(HERE / "quick")]
    command += ["--snakefile", "workflow/Snakefile", "--configfile", "config/demo.yaml", str(HERE / "demo.yaml")]
    command += ["--report", "report.html", "--report-after-run"]
    command += ["--slurm-efficiency-report", "--slurm-efficiency-report-path", str(folder)]
    begun = time.monotonic()
    with open(folder / "snakemake.txt", "w") as said:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**cluster.environment, "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=subprocess.STDOUT,
            timeout=DEMO_SECONDS,
            check=False,
        )
    print(f"the demo took {time.monotonic() - begun:.0f} s on the cluster")
    logs = "".join(path.read_text()[-1500:] for path in folder.glob("logs/**/*.log")) if done.returncode else ""
    assert done.returncode == 0, (folder / "snakemake.txt").read_text()[-6000:] + logs[-8000:]
    return folder
