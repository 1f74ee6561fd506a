"""Checkpoints that are complete or ignored: the file name carries the digest of the bytes.

A run directory keeps the last two. `latest` returns the newest one whose bytes match its name, so a torn file, which an
atomic rename on a healthy disk cannot leave but a crashed one can, costs the way back to the previous checkpoint only.
"""

import hashlib
import io
import logging
import re
from pathlib import Path
from typing import Any

import torch

from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import remove_partials, replacing

logger = logging.getLogger(__name__)

KEPT = 2
_NAME = re.compile(r"step(\d{9})-([0-9a-f]{16})\.pt")


def to_bytes(state: dict[str, Any]) -> bytes:
    """Return `state` (tensors, numbers, strings, lists, dicts) as torch saves it; equal states give equal bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint atomically and return its path. Raises OSError (disk full).

    Deletes all but it and the last one of an earlier step, so that no step has two.
    """
    data = to_bytes(state)
    path = folder / f"step{step:09d}-{hashlib.sha256(data).hexdigest()[:16]}.pt"
    with replacing(path) as partial:
        partial.write_bytes(data)
    others = [old for old in _candidates(folder) if old != path]
    before = [old for old in others if old.name[:13] != path.name[:13]]
    for old in set(others) - set(before[: KEPT - 1]):
        old.unlink(missing_ok=True)
    return path


def latest(folder: Path, *, clean: bool = False) -> dict[str, Any] | None:
    """Return the newest undamaged checkpoint, tensors on the CPU, or None. Damaged ones are reported and skipped.

    clean: delete what killed writers left (only one process may, while nobody writes).
    """
    if clean:
        remove_partials(folder)
    for path in _candidates(folder):
        data = path.read_bytes()
        match = _NAME.fullmatch(path.name)
        if match is None or hashlib.sha256(data).hexdigest()[:16] != match.group(2):
            logger.warning("%s is damaged (its digest is not that of its name); the checkpoint before it is used", path)
            continue
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return state
    return None


def write_model(path: Path, model: dict[str, Any]) -> None:
    """Write `model` atomically; equal contents give equal bytes."""
    data = to_bytes(model)
    with replacing(path) as partial:
        partial.write_bytes(data)


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
    return sorted(paths, key=lambda path: (path.name[:13], path.stat().st_mtime_ns), reverse=True)
