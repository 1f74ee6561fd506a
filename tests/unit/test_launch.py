"""The hand-over to the training processes, with the real torchrun."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from training_case import PATIENCE, write_request, write_store

from cellmap_pipe.errors import TrainingError
from cellmap_pipe.files import read_json
from cellmap_pipe.training import launch as launch_module
from cellmap_pipe.training.launch import command, launch
from cellmap_pipe.training.lease import LAUNCHER

CODE = (
    "import json, sys; from cellmap_pipe.training.launch import launch;"
    "launch(json.loads(sys.argv[1]), sys.argv[2], processes=int(sys.argv[3]), threads=2)"
)


def launched(request: dict[str, Any], processes: int) -> subprocess.Popen[bytes]:
    """Start the job that becomes the training of the request."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [json.dumps(request), request["log"], str(processes)]
    return subprocess.Popen([sys.executable, "-c", CODE, *arguments], env=environment)


def test_two_trainings_of_two_processes_run_at_once(tmp_path):
    write_store(tmp_path)
    requests = [
        write_request(tmp_path, name, max_steps=2, steps_per_epoch=2, batch=1, checkpoint_minutes=60)
        for name in ("one", "other")
    ]
    jobs = [launched(request, 2) for request in requests]
    for job, request in zip(jobs, requests, strict=True):
        log = Path(request["log"])
        assert job.wait(PATIENCE) == 0, log.read_text()
        assert "on 2 x cpu (1 threads)" in log.read_text()
        assert read_json(request["outputs"]["metrics"])["steps"] == 2


def test_the_ranks_of_a_killed_torchrun_are_gone(tmp_path):
    request = write_request(tmp_path, max_steps=100_000, steps_per_epoch=100_000, batch=1, checkpoint_minutes=60)
    job = launched(request, 2)
    log, deadline = Path(request["log"]), time.monotonic() + PATIENCE
    while not (log.exists() and "patches per step" in log.read_text()):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    assert len(ranks) == 2
    job.kill()
    job.wait()
    while any(Path(f"/proc/{rank}/cmdline").exists() and Path(f"/proc/{rank}/cmdline").read_text() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Where `launch` leaves what it would become, and the environment of that."""
    become: dict[str, Any] = {}

    def execv(path, arguments):
        become.update(path=path, arguments=arguments, environment=dict(os.environ))

    monkeypatch.setattr(launch_module.os, "execv", execv)
    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", LAUNCHER):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    become["request"] = {
        "model": "net",
        "fold": "0",
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "runtime_min": 30,
    }
    return become


def test_the_processes_share_the_job_s_cores_and_read_one_request(program, tmp_path):
    launch(program["request"], "train.log", processes=2, threads=5)
    path = tmp_path / "run" / "request.json"
    assert program["arguments"] == command(path, 2)
    assert "--standalone" in program["arguments"]
    assert read_json(path) == {**program["request"], "log": "train.log", "threads": 2}
    assert program["environment"]["OMP_NUM_THREADS"] == "2"
    assert program["environment"][LAUNCHER] == str(os.getpid())


def test_a_single_process_becomes_the_training_and_belongs_to_no_launcher(program, tmp_path):
    launch(program["request"], "train.log", processes=0, threads=4)
    assert program["arguments"] == command(tmp_path / "run" / "request.json", 1)
    assert "torch.distributed.run" not in program["arguments"]
    assert LAUNCHER not in program["environment"]


def test_the_lease_names_the_training_and_is_taken_before_anything_is_written(program, monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr("cellmap_pipe.training.lease.machine_gpus", lambda: ["GPU-a", "GPU-b", "GPU-c"])
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def lease(gpus, count, holder):
        assert not (tmp_path / "run").exists()
        taken.append((list(gpus), count, holder))
        return list(gpus)[:count]

    monkeypatch.setattr("cellmap_pipe.training.lease.lease", lease)
    launch({**program["request"], "device": "auto"}, "train.log", processes=2, threads=2)
    assert taken == [(["GPU-a", "GPU-b"], 2, {"model": "net", "fold": "0"})]
    assert program["environment"]["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    # a driver that torch cannot use then is an error, not a training on the CPU
    assert read_json(tmp_path / "run" / "request.json")["device"] == "cuda"


def test_without_a_gpu_the_training_may_use_the_cpu(program, monkeypatch, tmp_path):
    monkeypatch.setattr("cellmap_pipe.training.lease.machine_gpus", list)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    launch({**program["request"], "device": "auto"}, "train.log", processes=2, threads=2)
    assert read_json(tmp_path / "run" / "request.json")["device"] == "auto"


def test_too_few_gpus_are_an_error_before_torchrun_starts(program, monkeypatch, tmp_path):
    monkeypatch.setattr("cellmap_pipe.training.lease.machine_gpus", lambda: ["GPU-a"])
    with pytest.raises(TrainingError, match=r"lower resources\.train\.gpus"):
        launch({**program["request"], "device": "auto"}, "train.log", processes=2, threads=2)
    assert "arguments" not in program
    assert not (tmp_path / "run").exists()
