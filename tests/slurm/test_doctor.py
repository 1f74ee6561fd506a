"""`cellmap-pipe doctor` on a real Slurm whose GPUs are pretended."""

import getpass
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from .cluster import ACCOUNT, ROOT


@pytest.fixture
def doctor(cluster, tmp_path):
    """Run the doctor with the project's profile, changed by a mapping, and return its status and its lines."""

    def run(*options, default=None, rules=None):
        profile = tmp_path / "profile"
        shutil.copytree(ROOT / "profiles/longleaf", profile)
        values = yaml.safe_load((profile / "config.v9+.yaml").read_text())
        values["default-resources"].update(default or {})
        for rule, changes in (rules or {}).items():
            values["set-resources"][rule] = values["set-resources"].get(rule, {}) | changes
        (profile / "config.v9+.yaml").write_text(yaml.safe_dump(values))
        config = tmp_path / "mine.yaml"
        config.write_text("data: {phantom: {seed: 0}}\nmodels: [segresnet_ds]\nshards: 1\n")
        done = subprocess.run(
            [
                *[str(Path(sys.executable).parent / "cellmap-pipe"), "doctor", "--profile", str(profile)],
                *["--configfile", str(config), "--directory", str(tmp_path), *options],
            ],
            cwd=ROOT,
            env={**os.environ, "SLURM_CONF": str(cluster.folder / "slurm.conf")},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout.splitlines()

    return run


def failed(lines):
    return [line for line in lines if line.startswith("FAILED")]


def test_everything_is_in_order_but_the_pretended_gpus(doctor, tmp_path):
    status, lines = doctor()
    assert status == 1
    (gpu,) = failed(lines)
    assert "1 given (CUDA_VISIBLE_DEVICES=" in gpu and "none works: driver none found" in gpu
    assert any(line.startswith("ok") and "node of l40-gpu: g1801l400" in line for line in lines)
    assert any(line.startswith("ok") and "node of general: c1801" in line for line in lines)
    assert any("rule train: l40-gpu, QOS gpu_access, 2 GPUs l40s, 16 cores, 96 GB, 5760 min" in line for line in lines)
    assert not list(tmp_path.glob("doctor-*"))  # nothing stays behind


def test_faults_of_the_profile_are_named_with_what_to_edit(doctor):
    general = {"slurm_partition": "general"}
    status, lines = doctor(
        "--no-submit",
        default={"slurm_partition": "genral"},
        rules={
            "train": {"gpu_model": "a100", "runtime": 20000},
            "predict": {"qos": "gold"},
            "evaluate": {**general, "mem_mb": 2000000},
            "segment": {**general, "slurm_account": "nope"},
            "tune": {**general, "slurm_extra": "'--reservation=mine'"},
            "ensemble": {**general, "mem_mb": 600000},
        },
    )
    assert status == 1
    for rule, said in (
        ("convert", "no partition 'genral'; .*general.*; edit .*config.v9.*: default-resources.slurm_partition"),
        ("train", "GPUs of type 'a100', but partition l40-gpu has l40s; edit .*: set-resources.train.gpu_model"),
        (
            "train",
            "walltime of 20000 min, but partition l40-gpu ends jobs after 8640; lower .*set-resources.train.runtime",
        ),
        ("predict", "QOS 'gold' is not open to account .*gpu_access.*; edit .*set-resources.predict.qos"),
        ("predict", "QOS 'gold', but partition l40-gpu takes only gpu_access"),
        ("evaluate", "2000000 MB of memory, but no node of partition general has more than 1000000; lower .*mem_mb"),
        ("segment", f"account is 'nope'; yours: .*{ACCOUNT}.*; edit .*set-resources.segment.slurm_account"),
        ("tune", "sbatch refuses .*[Rr]eservation.*; edit .*set-resources.tune.slurm_extra"),
    ):
        assert any(re.search(f"rule {rule}: .*{said}", line) for line in failed(lines)), (said, lines)
    assert any(re.match("warning +rule ensemble: attempt 2 would ask for 1200000 MB", line) for line in lines), lines


def test_a_queue_that_takes_fewer_jobs_than_snakemake_would_send_is_told_before(doctor, cluster):
    for words in (
        ["qos", "scarce", "MaxSubmitJobsPerUser=1"],
        ["qos", "crowded", "GrpSubmitJobs=1"],
        ["account", "small_lab", "Description=lab", "Organization=lab"],
        ["user", getpass.getuser(), "Account=small_lab", "QOS=normal,scarce", "MaxSubmitJobs=3"],
    ):
        cluster.add(*words)
    cluster.run("scontrol", "create", "PartitionName=narrow", "Nodes=c1802", "QOS=crowded")
    gpus = {"qos": "scarce", "slurm_partition": "narrow"}
    try:
        _, lines = doctor("--no-submit", default={"slurm_account": "small_lab"}, rules={"train": gpus, "predict": gpus})
    finally:
        cluster.run("scontrol", "delete", "PartitionName=narrow")
    for whose in ("account small_lab takes 3", "QOS scarce takes 1", "QOS crowded takes 1"):
        told = rf"warning +jobs: up to \d+ at once \(jobs: 200\), but {whose} of yours in the queue; lower .*: jobs"
        assert any(re.match(told, line) for line in lines), lines


def test_sbatch_waits_until_the_controller_is_back_and_submits_once(cluster, tmp_path):
    conf = (cluster.folder / "slurm.conf").read_text()
    port = next(line for line in conf.splitlines() if line.startswith("SlurmctldPort="))
    mine = tmp_path / "slurm.conf"
    mine.write_text(conf.replace(port, "SlurmctldPort=27999"))
    process = subprocess.Popen(
        [
            *[
                str(ROOT / "profiles/longleaf/bin/sbatch"),
                "--parsable",
                "--job-name",
                "hiccup",
                "--comment",
                "rule_x y",
            ],
            *["-A", ACCOUNT, "--output=/dev/null", "--time=1", "--mem=50", "--wrap=true"],
        ],
        env={**os.environ, "SLURM_CONF": str(mine), "CELLMAP_SBATCH_PAUSES": "1 " * 40},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        time.sleep(3)
        assert process.poll() is None  # it waits
        whole = tmp_path / "whole.conf"
        whole.write_text(conf)
        whole.replace(mine)  # at once, for sbatch may be reading it
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    job = out.strip()
    assert job.isdigit()
    assert cluster.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%j %k").stdout.strip() == "hiccup rule_x y"


def test_sbatch_says_at_once_what_waiting_does_not_mend(cluster):
    began = time.monotonic()
    done = subprocess.run(
        [str(ROOT / "profiles/longleaf/bin/sbatch"), "-A", "nope", "--wrap=true"],
        env={**os.environ, "SLURM_CONF": str(cluster.folder / "slurm.conf")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Invalid account" in done.stderr
    assert time.monotonic() - began < 12
