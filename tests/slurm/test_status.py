"""What the queue of a real Slurm says of a run, as `cellmap-pipe status` shows it."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cellmap_pipe.cluster.queue import Job, jobs
from cellmap_pipe.cluster.status import as_text, status

from .cluster import ACCOUNT, QOS, Cluster

Submit = Callable[..., str]


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Submit]:
    """Submit a sleeping job as the executor would, return its number; what is left of them is cancelled."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    submitted: list[str] = []

    def one(comment: str, *options: str) -> str:
        command = ["sbatch", "--parsable", f"--account={ACCOUNT}", f"--comment={comment}", f"--chdir={tmp_path}"]
        command += ["--mem=100", "--time=5", "--output=/dev/null", *options, "--wrap=sleep 120"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        submitted.append(done.stdout.strip())
        return submitted[-1]

    yield one
    subprocess.run(["scancel", *submitted], timeout=60, check=True)


def in_queue(folder: Path, wanted: Callable[[dict[str, Job]], bool]) -> dict[str, Job]:
    """Return the jobs of the folder by number, as soon as they are as wanted."""
    end = time.monotonic() + 60
    while True:
        found = {job.id: job for job in jobs(folder=folder)}
        if wanted(found) or time.monotonic() > end:
            return found
        time.sleep(0.5)


def test_jobs_of_a_run_are_shown_with_why_they_wait(submit: Submit, tmp_path: Path) -> None:
    gpus = ("--partition=l40-gpu", f"--qos={QOS}", "--gpus=l40s:1")
    held = submit("rule_train_wildcards_unet_3d_1", *gpus, "--hold")
    later = submit("rule_predict_wildcards_segresnet_ds_0_validation_3", *gpus, "--begin=now+1hour")
    runs = submit("rule_train_wildcards_unet_3d_0", *gpus)
    submit("someone's own", "--partition=general")
    found = in_queue(tmp_path, lambda queue: queue[runs].state == "RUNNING" and queue[later].reason == "BeginTime")

    assert (found[held].rule, found[held].wildcards) == ("train", {"model": "unet_3d", "fold": "1"})
    assert (found[held].state, found[held].reason, found[held].node) == ("PENDING", "JobHeldUser", "")
    assert found[later].wildcards == {"model": "segresnet_ds", "fold": "0", "subset": "validation", "shard": "3"}
    assert found[later].starts is not None
    running = found[runs]
    assert (running.state, running.reason, running.partition, running.limit_s) == ("RUNNING", "", "l40-gpu", 300)
    assert running.node.startswith("g1801")
    assert 0 <= running.elapsed_s < 120

    shown = status(tmp_path)
    states = {(run.model, run.fold): (run.state, run.job) for run in shown.runs}
    assert states == {("unet_3d", "0"): ("starting", runs), ("unet_3d", "1"): ("queued", held)}
    assert shown.others == {"predict": {"queued": 1}}
    text = as_text(shown)
    assert "held; `scontrol release JOBID` lets it go" in text
    assert f"its job runs on {running.node}" in text
    assert "predict: 1 queued" in text


def test_jobs_of_other_folders_are_not_shown(submit: Submit, tmp_path: Path) -> None:
    number = submit("rule_train_wildcards_unet_3d_0", "--partition=general", "--hold")
    assert number in {job.id for job in jobs()}
    (tmp_path / "other").mkdir()
    assert status(tmp_path / "other").runs == []
