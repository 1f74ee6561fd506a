"""What a job on a node has, for `cellmap-pipe doctor`: `python -m cellmap_pipe.training.probe OUT.json TOKEN`.

Every part is tried by itself: what fails is told in words, so that one broken thing does not hide the others.
"""

import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cellmap_pipe.files import write_json
from cellmap_pipe.machine import memory_limit


def probe(token: Path) -> dict[str, Any]:
    """Return what this process has: its host and clock, the token's text, cores, memory, and what torch does here."""
    found: dict[str, Any] = {
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "time": time.time(),
        "python": sys.executable,
        "python_version": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": memory_limit() / 1e9,
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "driver": _driver(),
    }
    try:
        found["token"] = token.read_text()
    except OSError as error:
        found["token_fault"] = str(error)
    try:
        found.update(_torch())
    except Exception as error:  # whatever a broken installation raises is the answer
        found["fault"] = " ".join(f"{type(error).__name__}: {error}".split())
    return found


def _torch() -> dict[str, Any]:
    """Return the GPUs that torch sees and whether they multiply matrices, in float32 and bfloat16."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
    if not torch.cuda.is_available():
        return found
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpu: dict[str, Any] = {"name": properties.name, "memory_gb": properties.total_memory / 1e9}
        for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            try:
                ones = torch.ones(64, 64, dtype=kind, device=f"cuda:{index}")
                gpu[name] = bool(((ones @ ones) == 64).all())
            except RuntimeError as error:
                gpu[name] = False
                gpu["fault"] = " ".join(str(error).split())[:300]
        found["gpus"].append(gpu)
    return found


def compiling() -> dict[str, Any]:
    """Return whether torch.compile works on the first GPU, `compiled`: true or what is wrong; and its seconds."""
    import torch

    from cellmap_pipe.training.compiling import compile_fault

    began = time.monotonic()
    # what another node compiled into the home directory would hide that this one cannot
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ |= {
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TRITON_CACHE_DIR": folder,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        fault = compile_fault(torch.device("cuda", 0))
    return {"compiled": fault or True, "compile_seconds": round(time.monotonic() - began, 1)}


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, None without one."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.split("\n")[0].strip() or None


if __name__ == "__main__":
    answer = probe(Path(sys.argv[2]))
    write_json(sys.argv[1], answer)
    if any(gpu["float32"] for gpu in answer.get("gpus", ())):
        # written once more: a compiler that crashes or hangs takes this process along, but not what is known already
        write_json(sys.argv[1], {**answer, **compiling()})
