"""Who is training in a run directory: a file that keeps a second copy out and that a dead one does not leave locked.

No flock: it is unreliable on shared filesystems and says nothing about who holds it.
"""

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from cellmap_pipe.errors import TrainingError
from cellmap_pipe.files import write_json

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0
# A heartbeat older than this is old. Clocks of a cluster's nodes differ by seconds, its filesystem may stall a minute.
OLD_SECONDS = 180.0
# Where neither process nor job can be asked, silence of this length counts as death.
GONE_SECONDS = 900.0


class Owner:
    """Holds the run directory `folder` for this process during a `with` block.

    Raises TrainingError, naming the holder, if a living one has it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "owner.json"
        self.token = uuid4().hex
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Owner":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            holder = _read(self.path)
            if holder == {}:  # torn by a crash of the machine, or not yet seen whole on a network's filesystem
                time.sleep(0.5)
                holder = _read(self.path)
            if holder is None:  # released between the attempt and the look at it
                continue
            if not is_stale(holder, time.time()):
                raise TrainingError(
                    f"{self.path.parent} is in use by process {holder.get('pid')} on {holder.get('host')}"
                    + (f", Slurm job {holder['job']}" if holder.get("job") else "")
                    + "; wait for it or end it (a dead one is recognised by itself)"
                )
            self._remove_stale(holder)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        if self._is_ours():
            self.path.unlink(missing_ok=True)

    def _content(self) -> dict[str, Any]:
        return {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": start_ticks(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "heartbeat": time.time(),
        }

    def _create(self) -> bool:
        """Create the file complete with its content, unless it exists (a hard link is made or not, on NFS too)."""
        draft = self.path.with_name(f".partial-{self.token}-owner.json")
        draft.write_text(json.dumps(self._content()))
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _remove_stale(self, holder: dict[str, Any]) -> None:
        """Move the stale file away; if another process replaced it meanwhile, give that one its file back."""
        moved = self.path.with_name(f".partial-{uuid4().hex}-owner.json")
        try:
            self.path.rename(moved)
        except FileNotFoundError:
            return
        found = _read(moved)
        if found is not None and found.get("token") != holder.get("token"):
            with contextlib.suppress(FileExistsError):
                os.link(moved, self.path)
        else:
            logger.warning("took over %s from process %s on %s, gone", self.path, holder.get("pid"), holder.get("host"))
        moved.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        holder = _read(self.path)
        return holder is not None and holder.get("token") == self.token

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            try:
                if self._is_ours():
                    write_json(self.path, self._content())
            except OSError as error:  # a full disk must not end the training; the process itself can still be asked
                logger.warning("%s: the heartbeat could not be written (%s)", self.path, error)


def is_stale(holder: dict[str, Any], now: float) -> bool:
    """Return whether the holder described by an owner file is gone.

    On this host its process is looked for (number and start time: numbers repeat). Elsewhere its heartbeat must be old
    and its Slurm job gone; where there is no job to ask for, a quarter of an hour of silence decides.
    """
    heartbeat = holder.get("heartbeat")
    silence = now - (heartbeat if isinstance(heartbeat, int | float) else 0.0)
    if holder.get("host") == socket.gethostname():
        pid = holder.get("pid")
        return not isinstance(pid, int) or start_ticks(pid) != holder.get("started")
    if silence < OLD_SECONDS:
        return False
    ended = _job_ended(holder.get("job"))
    return silence > GONE_SECONDS if ended is None else ended


def _job_ended(job: str | None) -> bool | None:
    """Return whether the Slurm job has left the queue; None if that cannot be said."""
    if not job or shutil.which("squeue") is None:
        return None
    try:
        found = subprocess.run(
            ["squeue", "--noheader", "--format=%T", "--jobs", str(job)], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if found.returncode:
        return True if "Invalid job id" in found.stderr else None
    return not found.stdout.strip()


def start_ticks(pid: int) -> int | None:
    """Return when the process began, in clock ticks since the machine's start; None if there is none (or a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _read(path: Path) -> dict[str, Any] | None:
    """Return the file's content: None if there is no file, {} for one torn by a crash of the machine."""
    try:
        holder = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}
