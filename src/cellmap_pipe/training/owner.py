"""Who is training in a run directory: a file that keeps a second copy out and that a dead one does not leave locked.

No flock: it is unreliable on shared filesystems and says nothing about who holds it.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from cellmap_pipe.cluster import slurm
from cellmap_pipe.errors import TrainingError
from cellmap_pipe.files import write_json

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0
# A heartbeat older than this is old. Clocks of a cluster's nodes differ by seconds, its filesystem may stall a minute.
OLD_SECONDS = 180.0
# Where neither process nor job can be asked, silence of this length counts as death.
GONE_SECONDS = 900.0
# A heartbeat that is seen not to change for so long is silent by any clock: several beats, and the minute for which a
# network's filesystem may show a file as it was.
WATCH_SECONDS = 100.0
# A holder that is ending has this time to save and leave.
PATIENCE_SECONDS = 600.0
LOOK_SECONDS = 1.0
IN_USE = "is in use by"  # of the error of a second copy
RARE_ENDS = ("OUT_OF_MEMORY", "PREEMPTED", "DEADLINE", "BOOT_FAIL", "REVOKED")


class Holder(Enum):
    """What is known of a holder: it lives, is gone, or its heartbeat tells, after its job has ended or without one."""

    LIVES = "lives"
    GONE = "gone"
    ENDING = "ending"
    UNKNOWN = "unknown"


class Owner:
    """Holds the run directory `folder` for this process during a `with` block.

    lost: called with one line if another process took the directory over meanwhile (this one was silent, or its file
    was deleted by hand); who trains on would spoil the other's work. stopped: whether to give up waiting for a holder
    that is ending. Raises TrainingError, naming the holder, if a living one has it.
    """

    def __init__(
        self,
        folder: Path,
        lost: Callable[[str], None] = logger.error,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.path = folder / "owner.json"
        self.token = uuid4().hex
        self._lost = lost
        self._asked_to_stop = stopped
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
            if self._outlived(holder):
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
            **_machine(),
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
            return self._is_ours()  # NFS asked a second time whose first answer was lost
        finally:
            draft.unlink()
        return True

    def _outlived(self, holder: dict[str, Any]) -> bool:
        """Return whether the holder is gone; False if it left the file meanwhile. May watch its heartbeat for that.

        Raises TrainingError if it lives.
        """
        began = seen = time.monotonic()
        state = look_at(holder, time.time())
        if state in (Holder.ENDING, Holder.UNKNOWN):
            logger.info("%s: waiting to see whether %s is gone", self.path, _name(holder))
        while state in (Holder.ENDING, Holder.UNKNOWN):
            if self._asked_to_stop():
                raise TrainingError(
                    f"{self.path.parent}: asked to stop while waiting for {_name(holder)} to end; start it again"
                )
            time.sleep(LOOK_SECONDS)
            now = _read(self.path)
            if now is None or now.get("token") != holder.get("token"):
                return False
            if now.get("heartbeat") != holder.get("heartbeat"):
                holder, seen = now, time.monotonic()
                if state is Holder.UNKNOWN:
                    state = Holder.LIVES
            if time.monotonic() - seen > WATCH_SECONDS:
                state = Holder.GONE
            elif time.monotonic() - began > PATIENCE_SECONDS:
                state = Holder.LIVES
        if state is Holder.LIVES:
            raise TrainingError(
                f"{self.path.parent} {IN_USE} {_name(holder)}; wait for it or end it (a dead one is recognised by "
                "itself)"
            )
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
            logger.warning("took over %s from %s, gone", self.path, _name(holder))
        moved.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        holder = _read(self.path)
        return holder is not None and holder.get("token") == self.token

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            try:
                holder = _read(self.path)
                if holder is None:  # deleted by hand, or just looked at by a process that will put it back
                    self._create()
                elif not holder or holder.get("token") == self.token:
                    write_json(self.path, self._content())
                else:
                    self._lost(f"{self.path.parent} was taken over by {_name(holder)}; this process leaves it to that")
                    return
            except OSError as error:  # a full disk must not end the training; the process itself can still be asked
                logger.warning("%s: the heartbeat could not be written (%s)", self.path, error)


def look_at(holder: dict[str, Any], now: float) -> Holder:
    """Return what is known of the holder that an owner file describes. now: by this machine's clock.

    Where its process can be seen it is looked for (number and start time: numbers repeat). Elsewhere, as on another
    node of a cluster or in another container, its heartbeat must be old and its Slurm job gone; where there is no job
    to ask for, a quarter of an hour of silence decides.
    """
    heartbeat, pid = holder.get("heartbeat"), holder.get("pid")
    if not isinstance(heartbeat, int | float) or not isinstance(pid, int):
        return Holder.GONE  # nobody writes such a file: a crash tore it
    here = _machine()
    if all(holder.get(name) == value for name, value in here.items()):
        return Holder.LIVES if start_ticks(pid) == holder.get("started") else Holder.GONE
    silence = now - heartbeat
    ended = _job_ended(holder.get("job"))
    if ended:
        return Holder.GONE if silence > OLD_SECONDS else Holder.ENDING
    if ended is None:
        if silence > GONE_SECONDS:
            return Holder.GONE
        # the machine started anew, most likely, or this is another container of it
        return Holder.UNKNOWN if holder.get("host") == here["host"] else Holder.LIVES
    return Holder.LIVES


def is_stale(holder: dict[str, Any], now: float) -> bool:
    """Return whether the holder that an owner file describes is gone, without waiting for more to be known."""
    return look_at(holder, now) is Holder.GONE


def _machine() -> dict[str, str]:
    """Return what tells where a process number means the same process: host, its start, and the PID namespace."""
    return {
        "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "namespace": str(Path("/proc/self/ns/pid").readlink()),
    }


def _name(holder: dict[str, Any]) -> str:
    job = f", Slurm job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}"


def _job_ended(job: str | None) -> bool | None:
    """Return whether the Slurm job has left the queue or is leaving it; None if that cannot be said.

    Our own job has, too, as far as another node is concerned: Slurm started it again here when that node failed.
    """
    if not job:
        return None
    if job == os.environ.get("SLURM_JOB_ID"):
        return True
    try:
        state = slurm.ask("squeue", "--noheader", "--format=%T", "--jobs", str(job)).strip()
    except slurm.SlurmError as error:
        return True if "Invalid job id" in str(error) else None
    # listed for a while after its end, and while its processes are still ending
    return state in ("", "COMPLETING", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", *RARE_ENDS)


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
