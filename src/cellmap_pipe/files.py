"""Atomic writes, canonical JSON and digests: what exists under its final name is complete."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from cellmap_pipe.errors import ContractError


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling that takes the name `path` only if the block succeeds.

    The suffixes of `path` stay at the end of the temporary name, because some writers choose the format by them.
    Parent folders are made. A file or a folder may be written; a folder replaces an older folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{uuid4().hex}-{path.name}")  # pids repeat across nodes
    try:
        yield partial
        if partial.is_dir():
            if path.exists():
                discarded = path.with_name(f".partial-{uuid4().hex}-{path.name}")
                os.replace(path, discarded)
                os.replace(partial, path)
                shutil.rmtree(discarded, ignore_errors=True)
            else:
                os.replace(partial, path)
        else:
            _fsync(partial)
            os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def remove_partials(folder: str | os.PathLike[str]) -> list[Path]:
    """Delete what killed writers left in `folder` (not below it) and return the paths."""
    abandoned = sorted(Path(folder).glob(".partial-*"))
    for path in abandoned:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return abandoned


def canonical_json(value: Any) -> str:
    """Return `value` as JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` atomically as readable JSON with sorted keys. NaN is refused: it is not JSON."""
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False)
    with replacing(path) as partial:
        partial.write_text(text + "\n")


def read_json(path: str | os.PathLike[str], remedy: str = "") -> Any:
    """Return the JSON value in `path`. Raises ContractError, with `remedy`, if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ContractError(f"{path}: cannot be read as JSON ({error})" + (f"; {remedy}" if remedy else "")) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` atomically."""
    with replacing(path) as partial:
        partial.write_text(text)


def digest(value: Any) -> str:
    """Return the SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 (hex) of the bytes of a file, read in blocks."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_file(path: str | os.PathLike[str], relative_to: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the contract of one bulk file: `path` relative to the contract's folder, `size` in bytes, `sha256`."""
    return {
        "path": os.path.relpath(path, relative_to),
        "size": os.path.getsize(path),
        "sha256": file_digest(path),
    }


def check_file(contract: dict[str, Any], folder: str | os.PathLike[str], remedy: str, *, full: bool = False) -> Path:
    """Return the path of the bulk file that `contract` describes, after checking it.

    The size is always compared; the digest only with `full` (it reads the file).
    Raises ContractError naming the file, what differs and the `remedy`.
    """
    path = Path(folder) / contract["path"]
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ContractError(f"{path}: missing; {remedy}") from None
    if size != contract["size"]:
        raise ContractError(f"{path}: {size} bytes on disk, {contract['size']} expected; {remedy}")
    if full and file_digest(path) != contract["sha256"]:
        raise ContractError(f"{path}: damaged (its SHA-256 differs from the contract); {remedy}")
    return path
