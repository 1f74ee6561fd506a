"""Checkpoints that are complete or ignored: the file name carries the digest of the bytes.

A run directory keeps the last two, and those of chosen steps for good. `latest` returns the newest one whose bytes
match its name, so a torn file, which an atomic rename on a healthy disk cannot leave but a crashed one can, costs the
way back to the previous checkpoint only.
"""

import hashlib
import logging
import os
import re
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import file_digest, remove_partials, replacing

logger = logging.getLogger(__name__)

KEPT = 2

# The disk writes so much while what follows is hashed: a state of 2.4 GB has to be safe soon after a signal to stop.
SYNC_BYTES = 2**27

_NAME = re.compile(r"step\d{9}-[0-9a-f]{16}\.pt")


class _Digested:
    """A file that is hashed as it is written: a state of gigabytes takes neither a second copy nor a second reading.

    thread: has the disk write meanwhile. torch turns what a file raises into errors of its own, so the first OSError is
    kept, for `finish` to raise.
    """

    def __init__(self, stream: BinaryIO, thread: Executor) -> None:
        self.stream = stream
        self.thread = thread
        self.hash = hashlib.sha256()
        self.error: OSError | None = None
        self.waiting = 0  # bytes that the disk was not yet asked to write
        self.syncing: list[Future[None]] = []

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.stream.write(data)
            except OSError as error:
                self.error = error
        if self.error is None:
            self.hash.update(data)
            self.waiting += len(data)
            if self.waiting >= SYNC_BYTES:
                self.stream.flush()
                self.syncing.append(self.thread.submit(os.fdatasync, self.stream.fileno()))
                self.waiting = 0
        return len(data)

    def flush(self) -> None:
        """Do nothing: `finish` flushes."""

    def finish(self) -> str:
        """Return the SHA-256 (hex) of the bytes, once they are on the disk. Raises OSError."""
        if self.error is not None:
            raise self.error
        for each in self.syncing:
            each.result()
        self.stream.flush()
        os.fsync(self.stream.fileno())
        return self.hash.hexdigest()


def _write(state: dict[str, Any], path: Path, *, checksums: bool) -> str:
    """Write `state` (tensors, numbers, strings, lists, dicts) as torch saves it and return the bytes' SHA-256 (hex).

    The file is on the disk when this returns. checksums: those within the file, which
    take as long as the SHA-256. Raises OSError (disk full).
    """
    before = get_crc32_options()
    set_crc32_options(checksums)
    try:
        with path.open("wb") as stream, ThreadPoolExecutor(1) as thread:
            digested = _Digested(stream, thread)
            torch.save(state, digested)  # type: ignore[arg-type]  # of a stream it uses write and flush alone
            return digested.finish()
    finally:
        set_crc32_options(before)


def save(folder: Path, step: int, state: dict[str, Any], *, keep_every: int | None = None) -> Path:
    """Write a checkpoint atomically and return its path. Raises OSError (disk full).

    Deletes all but it, the last one of an earlier step, and those of earlier steps that are multiples of `keep_every`;
    so no step has two, and damaged ones of a future that is trained anew go.
    """
    partial = folder / f".partial-{uuid4().hex}-step{step:09d}.pt"
    try:
        path = folder / f"step{step:09d}-{_write(state, partial, checksums=False)[:16]}.pt"
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    others = [old for old in _candidates(folder) if old != path]
    before = [old for old in others if _step(old) < step]
    kept = before[: KEPT - 1] + [old for old in before if keep_every and _step(old) and _step(old) % keep_every == 0]
    for old in set(others) - set(kept):
        old.unlink(missing_ok=True)
    return path


def latest(folder: Path, *, clean: bool = False) -> dict[str, Any] | None:
    """Return the newest undamaged checkpoint, tensors on the CPU, or None. Damaged ones are reported and skipped.

    clean: delete what killed writers left (only one process may, while nobody writes).
    """
    if clean:
        remove_partials(folder)
    for path in _candidates(folder):
        if not path.stem.endswith(f"-{file_digest(path)[:16]}"):
            logger.warning("%s is damaged (its digest is not that of its name); the checkpoint before it is used", path)
            continue
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    return None


def write_model(path: Path, model: dict[str, Any]) -> None:
    """Write `model` atomically; equal contents give equal bytes. Raises OSError (disk full)."""
    with replacing(path) as partial:
        _write(model, partial, checksums=True)


def read_model(path: str | Path, remedy: str) -> dict[str, Any]:
    """Return the contents of a model file, tensors on the CPU, unpickling nothing but tensors and plain containers.

    Raises ContractError naming the file and the `remedy` if it is missing, damaged or of another format.
    """
    try:
        model = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, ImportError) as error:
        message = " ".join(str(error).split())[:200]
        raise ContractError(f"{path}: cannot be read as a model ({message}); {remedy}") from error
    except Exception as error:  # pickle.UnpicklingError; its class is not imported for the sake of one name
        raise ContractError(f"{path}: is not a model file ({type(error).__name__}); {remedy}") from error
    if not isinstance(model, dict) or "state_dict" not in model:
        raise ContractError(f"{path}: holds no weights; {remedy}")
    return model


def _candidates(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, newest first."""
    paths = [path for path in folder.glob("step*.pt") if _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)


def _step(path: Path) -> int:
    return int(path.name[4:13])
