"""Running the demo's workflow, shared by the tests of its results and of its report."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODELS = ("segresnet_ds", "unet_3d")


def child_seconds() -> float:
    """Return the CPU seconds of all processes that were waited for."""
    times = os.times()
    return times.children_user + times.children_system


def snakemake(folder: Path, *arguments: str, extra: Path | None = None) -> str:
    """Run the demo's workflow with everything under `folder`; return what Snakemake says."""
    configuration = ["config/demo.yaml", *([str(extra)] if extra else [])]
    command = [sys.executable, "-m", "snakemake", *arguments, "--cores", "2", "--directory", str(folder)]
    command += ["--snakefile", "workflow/Snakefile", "--configfile", *configuration]
    command += ["--rerun-triggers", "mtime", "params", "input"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=3600)
    logs = "".join(path.read_text()[-1500:] for path in folder.glob("logs/**/*.log")) if done.returncode else ""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:] + logs[-8000:]
    return done.stdout + done.stderr
