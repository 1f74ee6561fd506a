"""The scripts of profiles/longleaf where no Slurm is: what they do with answers that a real one gives rarely."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

LONGLEAF = Path(__file__).parents[2] / "profiles/longleaf"


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder}/bin:{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("refusal", "calls", "status"),
    [
        ("Batch job submission failed: Socket timed out on send/recv operation", 3, 0),
        ("QOSMaxSubmitJobPerUserLimit", 3, 0),
        ("AssocGrpSubmitJobsLimit", 3, 0),
        ("Batch job submission failed: Invalid qos specification", 1, 1),
    ],
)
def test_a_submission_is_repeated_where_waiting_helps_and_only_there(
    tmp_path: Path, refusal: str, calls: int, status: int
) -> None:
    program(
        tmp_path / "bin/sbatch",
        f"echo >> calls; [[ $(wc -l < calls) -lt 3 ]] || {{ echo 77; exit; }}; echo 'error: {refusal}' >&2; exit 1",
    )
    program(tmp_path / "bin/squeue", "true")
    words = ["--job-name", "cellmap_1", "--comment", "rule_train_wildcards_a_0", "--wrap=true"]
    done = run([str(LONGLEAF / "bin/sbatch"), *words], tmp_path, CELLMAP_SBATCH_PAUSES="0.1 0.1 0.1")
    assert done.returncode == status
    assert done.stdout == ("" if status else "77\n")
    assert (refusal in done.stderr) == bool(status)
    assert len((tmp_path / "calls").read_text().splitlines()) == calls


def test_a_submission_whose_answer_was_lost_is_not_made_twice(tmp_path: Path) -> None:
    program(tmp_path / "bin/sbatch", "echo >> calls; echo 'Socket timed out on send/recv operation' >&2; exit 1")
    program(tmp_path / "bin/squeue", "echo '76 rule_train_wildcards_a_1'; echo '77 rule_train_wildcards_a_0'")
    words = ["--job-name", "cellmap_1", "--comment", "rule_train_wildcards_a_0", "--wrap=true"]
    done = run([str(LONGLEAF / "bin/sbatch"), *words], tmp_path, CELLMAP_SBATCH_PAUSES="0.1 0.1")
    assert (done.returncode, done.stdout) == (0, "77\n")
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_an_environment_whose_scripts_use_what_is_not_set_is_activated(tmp_path: Path) -> None:
    """As those of conda do, of compilers above all."""
    profile = tmp_path / "profiles/my site"
    shutil.copytree(LONGLEAF, profile)
    head = profile / "head.sh"
    ours = "    source .venv/bin/activate\n"
    assert head.read_text().count(ours) == 1
    head.write_text(head.read_text().replace(ours, "    PATH=$PWD/env$NOT_SET_BEFORE:$PATH\n"))
    program(tmp_path / "env/snakemake", 'echo "$@"; echo "$SQUEUE_STATES,$SNAKEMAKE_PROFILE,$(type -P sbatch)"')
    where = shutil.which("bash")
    assert where
    tools = {name: shutil.which(name) for name in ("grep", "sleep", "date")}
    for name, path in tools.items():
        assert path
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(path)
    done = run(
        [where, str(head), "all", "--configfile", "mine of today.yaml"],
        tmp_path,
        PATH=f"{tmp_path}/bin",
        SNAKEMAKE_PROFILE="profiles/my site",
        SQUEUE_STATES="RUNNING",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "all --configfile mine of today.yaml --slurm-jobname-prefix cellmap"
    assert said[1] == f",profiles/my site,{profile}/bin/sbatch"
    assert said[2].endswith("Snakemake ended with status 0")
