"""The hand-over from a workflow job to the training processes. Imports no torch: this process is replaced by them."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from cellmap_pipe.files import write_json
from cellmap_pipe.training.lease import LAUNCHER, assign_gpus

MODULE = "cellmap_pipe.training.main"

# torchrun kills its processes this long after it passed on a signal, by default 30 s: too soon for a last checkpoint.
SHUTDOWN_SECONDS = 600


def command(request_path: Path, processes: int) -> list[str]:
    """Return the command line that trains: the module itself, or `processes` copies of it under torchrun."""
    if processes == 1:
        return [sys.executable, "-m", MODULE, str(request_path)]
    return [
        *[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)],
        *["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"],
        *["-m", MODULE, str(request_path)],
    ]


def launch(request: Mapping[str, Any], log: str, processes: int, threads: int) -> NoReturn:
    """Replace this process by the training that `request` describes.

    exec, so that the scheduler's signals reach the training itself, and so that what this process holds is held until
    the training ends: the lease of its GPUs, which are waited for here unless the request's `device` is cpu.
    log: the rule's log file. processes: one per GPU, at least 1. threads: CPU cores of the job, shared by the
    processes. Raises TrainingError if there are fewer GPUs than processes (on a machine without any, the CPU trains).
    """
    processes = max(processes, 1)
    holder = {"model": request["model"], "fold": request["fold"]}
    if request["device"] != "cpu" and assign_gpus(processes, holder):
        # where torch cannot use them (a broken driver), `auto` would train on the CPU until the walltime ends
        request = {**request, "device": "cuda"}
    each = max(threads // processes, 1)
    path = Path(request["run_dir"]) / "request.json"
    write_json(path, {**request, "log": log, "threads": each})
    # OpenMP and MKL read it when torch is imported
    os.environ["OMP_NUM_THREADS"] = str(each)
    # not the option of that name: versions of torchrun that do not know the variable pass over it
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    if processes > 1:
        os.environ[LAUNCHER] = str(os.getpid())
    else:
        os.environ.pop(LAUNCHER, None)
    sys.stdout.flush()
    sys.stderr.flush()
    arguments = command(path, processes)
    os.execv(arguments[0], arguments)
