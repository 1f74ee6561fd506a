"""Which GPUs of this machine a job uses: those its scheduler gave it, or free ones, leased while it runs.

A lease is a lock of the kernel's on a folder of the machine's own disk. The process that launches a training keeps it
when it becomes that training, and however it ends the lock ends with it. Imports no torch: it is taken before.
"""

import ctypes
import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from cellmap_pipe.errors import TrainingError

logger = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Process that launched the ranks, which they must not outlive.
LAUNCHER = "CELLMAP_PIPE_LAUNCHER"

POLL_SECONDS = 2.0
REMIND_SECONDS = 600.0

PR_SET_PDEATHSIG = 1

# Not XDG_RUNTIME_DIR, which is emptied when the user logs out, nor TMPDIR, which is another one in each job.
TEMPORARY = Path("/tmp")


def assign_gpus(
    count: int,
    holder: Mapping[str, Any],
    environment: MutableMapping[str, str] = os.environ,
    present: Sequence[str] | None = None,
) -> bool:
    """See to it that `environment` shows exactly `count` GPUs, waiting until so many are free.

    They are leased for as long as this process lives, also as another program (exec); under Slurm too, where an
    interactive job may run several trainings. Returns whether there are any: a machine without trains on its CPU.
    holder: what to tell those who wait, JSON. present: the machine's GPUs by UUID, found out by default.
    Raises TrainingError if fewer are visible than `count`, or if no lease can be had and more are visible.
    """
    if not count:
        environment[VISIBLE] = ""
        return False
    present = machine_gpus() if present is None else present
    listed = environment.get(VISIBLE)
    scheduled = "SLURM_JOB_ID" in environment
    if not scheduled and not present:
        logger.warning("%d GPUs were asked for and this machine has none: working on the CPU", count)
        return False
    visible = visible_gpus(present, listed)
    if scheduled:
        given = [entry for entry in (listed or "").split(",") if entry.strip()]
        if len(visible) != len(given):
            # the driver cannot be asked, or counts in another way: what Slurm lists is what it gave
            if len(given) == count:
                return True
            visible = given
    if len(visible) < count:
        remedy = "ask the scheduler for more (gres in the profile), or " if scheduled else ""
        raise TrainingError(
            f"{count} GPUs were asked for, the machine has {len(present)} and this job may use {len(visible)} "
            f"({VISIBLE}={'unset' if listed is None else listed}); {remedy}lower {_key(holder)} (0 = the CPU)"
        )
    try:
        visible = lease(visible, count, holder)
    except OSError as error:
        if len(visible) > count:
            raise TrainingError(
                f"GPUs cannot be leased ({error}); list the {count} that this job is to use in {VISIBLE}"
            ) from error
        logger.warning("GPUs are not leased (%s): no other job must use %s", error, ", ".join(visible))
    environment[VISIBLE] = ",".join(visible)
    return True


def _key(holder: Mapping[str, Any]) -> str:
    """Return the key of the configuration that says how many GPUs a job asks for."""
    return f"resources.{'predict' if holder.get('rule') == 'predict' else 'train'}.gpus"


def machine_gpus() -> list[str]:
    """Return the UUIDs of the machine's GPUs, or of their parts where they are divided, in the order of the driver."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        return [uuid for file in files for uuid in re.findall(r"GPU UUID:\s*(GPU-\S+)", file.read_text())]
    return parse_listing(listed)


def parse_listing(listed: str) -> list[str]:
    """Return the UUIDs in the output of `nvidia-smi -L`: a GPU divided into MIG devices is those."""
    found: list[list[str]] = []
    for kind, uuid in re.findall(r"^\s*(GPU|MIG) .*\(UUID: (\S+)\)", listed, re.MULTILINE):
        if kind == "GPU":
            found.append([uuid])
        elif found:
            found[-1].append(uuid)
    return [uuid for gpu in found for uuid in (gpu[1:] or gpu)]


def visible_gpus(present: Sequence[str], listed: str | None) -> list[str]:
    """Return those of the GPUs `present` that CUDA_VISIBLE_DEVICES lists, by number or by (the beginning of) UUID.

    As CUDA does, what follows an entry that names no GPU is not seen.
    """
    if listed is None:
        return list(present)
    found: list[str] = []
    for entry in (part.strip() for part in listed.split(",")):
        named = [uuid for uuid in present if entry and uuid.startswith(entry)]
        if entry.isdigit() and int(entry) < len(present):
            named = [present[int(entry)]]
        if len(named) != 1 or named[0] in found:
            break
        found += named
    return found


def lease(
    gpus: Sequence[str],
    count: int,
    holder: Mapping[str, Any],
    folder: Path | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> list[str]:
    """Return `count` of `gpus` that no other process has leased, waiting until so many are free at once.

    They are this process's until it ends; a child does not inherit them unless it is told to keep open files. Nobody
    waits with some of its GPUs in hand, so trainings that wait cannot block each other. folder: where the locks are.
    Raises OSError if there can be no locks.
    """
    folder = _lock_folder() if folder is None else folder
    reminded = 0.0
    while True:
        with _locked(folder):  # one at a time, so that each sees what the others got, all of it
            held: dict[str, int] = {}
            busy: list[str] = []
            for gpu in gpus:
                place = _place(folder, gpu)
                place.mkdir(exist_ok=True)
                # a folder and not a file: what cleans /tmp of old files leaves locked folders alone
                descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(descriptor)
                    busy.append(f"{gpu} by {_holder(place)}")
                else:
                    held[gpu] = descriptor
                    if len(held) == count:
                        break
            if len(held) == count:
                for gpu, descriptor in held.items():
                    _sign(_place(folder, gpu), holder)
                    os.set_inheritable(descriptor, True)  # through the exec that makes this process the training
                logger.info("leased %s", ", ".join(held))
                return list(held)
            for descriptor in held.values():
                os.close(descriptor)
        if not reminded or time.monotonic() - reminded >= REMIND_SECONDS:
            reminded = time.monotonic()
            logger.info("waiting for %d GPUs, %d are free; held are %s", count, len(held), "; ".join(busy))
        time.sleep(poll_seconds)


def die_with_parent() -> None:
    """Have the kernel kill this process, a rank, when its launcher is gone: it would keep the GPU of the next.

    Does nothing in a process that `launch` did not start as one of several.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(launcher):  # it went before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


def _lock_folder() -> Path:
    """Return the user's folder for locks on this machine. Raises PermissionError if someone else took its name."""
    folder = TEMPORARY / f"cellmap_pipe-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or status.st_uid != os.getuid():
        raise PermissionError(f"{folder} is no folder of this user's")
    return folder


def _place(folder: Path, gpu: str) -> Path:
    return folder / re.sub(r"[^\w.-]", "_", gpu)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sign(place: Path, holder: Mapping[str, Any]) -> None:
    record = {**holder, "pid": os.getpid(), "since": datetime.now().astimezone().isoformat(timespec="seconds")}
    with suppress(OSError):  # a full disk; the lock holds without
        (place / "holder.json").write_text(json.dumps(record))


def _holder(place: Path) -> str:
    """Return who holds a GPU, as its record has it; who reads it holds the folder's lock, so none is half written."""
    try:
        record = json.loads((place / "holder.json").read_text())
    except (OSError, ValueError):  # the disk was full, or /tmp was cleaned
        return "a process that left no name"
    rest = ", ".join(f"{key} {value}" for key, value in record.items() if key not in ("pid", "since"))
    return f"process {record['pid']} ({rest}) since {record['since']}"
