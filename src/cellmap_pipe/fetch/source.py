"""Files at a URL of any kind that fsspec reads: what there is, how large it is, and copies of it that are whole.

Every request is tried again when it fails for a while; a file that is not there is told from a server that fails.
"""

import errno
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

from cellmap_pipe.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Pause before the first further attempt; it doubles with each, up to the longest.
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0

# Larger files are streamed to disk; smaller ones are held in memory, so that the workers write them at the same time.
STREAMED_BYTES = 64 * 1024**2

# Answers of an HTTP server that say "not now" although they blame the request.
_TEMPORARY_STATUS = (408, 425, 429)

# Protocols whose file systems know the option `anon`.
_KNOWS_ANON = ("s3", "s3a", "abfs", "abfss", "az")

# What is wrong on this side; no other file would fare better.
_LOCAL_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# Web servers: to connect, and between two packets. S3 has limits like these of its own.
_CONNECT_S, _READ_S = 15, 30

_PARTIAL = ".partial-"
_ABANDONED_S = 3600.0  # a partial file that grows no more; another fetch may write the younger ones


class TransferError(DataError):
    """Something could not be read from the source, however often it was tried."""


class RemoteFile(NamedTuple):
    """A file at the source: its size in bytes, and the MD5 (hex) of its bytes where the source tells it."""

    size: int
    md5: str | None


class Source:
    """The files below a URL. Names are relative to it, with `/` between folders; safe to use from several threads."""

    def __init__(self, url: str, options: Mapping[str, Any], *, workers: int, retries: int) -> None:
        """url: folder, or URL of any protocol of fsspec. options: of its file system. workers: threads that will ask.

        retries: further attempts after one that failed. Raises ConfigError for a URL or options that cannot be used.
        """
        from fsspec.core import url_to_fs

        protocol = url.split("://", 1)[0] if "://" in url else "file"
        try:
            # not fsspec's cached instance and listings: what is asked here must be what the source says now
            self._fs, root = url_to_fs(
                url, skip_instance_cache=True, use_listings_cache=False, **_options(protocol, options, workers)
            )
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise ConfigError(
                f"fetch.source {url}: cannot be opened with fetch.options ({_one_line(error)})"
            ) from error
        if protocol in ("s3", "s3a"):
            self._fs.retries = 1  # attempts; this class makes the further ones
        self.url = url.rstrip("/")
        self._root = root.rstrip("/")
        self._retries = retries
        self._stopped = threading.Event()
        # web servers rarely list their folders, and never with sizes
        self.lists = protocol not in ("http", "https")

    def stop(self) -> None:
        """Let no request be tried again: what waits for its next attempt fails at once."""
        self._stopped.set()

    def read(self, name: str, size: int | None = None) -> bytes | None:
        """Return the bytes of a file, None if there is none. size: what it must have. Raises TransferError."""

        def whole() -> bytes:
            content = bytes(self._fs.cat_file(self._path(name)))
            _check_size(len(content), size)
            return content

        return self._attempt(name, whole)

    def folders(self, folder: str) -> set[str]:
        """Return the names of the folders in `folder`. Raises TransferError. Only where the source `lists`."""
        entries = self._attempt(folder, lambda: list(self._entries(self._path(folder)))) or []
        return {_leaf(entry["name"]) for entry in entries if entry["type"] == "directory"}

    def files(self, folder: str, *, below: bool = True) -> dict[str, RemoteFile]:
        """Return the files in `folder`, and with `below` in all folders under it, by name relative to `folder`.

        Raises TransferError. Only where the source `lists`.
        """
        path = self._path(folder)

        def listed() -> list[Mapping[str, Any]]:
            if not below:
                return list(self._entries(path))
            return list(self._fs.find(path, detail=True).values()) if self._is_flat else list(self._walked(path))

        entries = self._attempt(folder, listed) or []
        prefix = len(path) + 1
        return {entry["name"][prefix:]: _remote_file(entry) for entry in entries if entry["type"] == "file"}

    def file(self, name: str) -> RemoteFile | None:
        """Return what the source says of one file, None if there is none. Raises TransferError."""
        entry = self._attempt(name, lambda: self._fs.info(self._path(name)))
        if entry is None or entry["type"] != "file":
            return None
        if entry["size"] is None:
            raise TransferError(f"{self.url}/{name}: the server does not tell its size, so a copy cannot be checked")
        return _remote_file(entry)

    def copy(self, name: str, target: Path, size: int) -> None:
        """Copy a file of `size` bytes to `target`, atomically.

        Raises TransferError if it cannot be had whole, OSError if it cannot be written here.
        """
        partial = target.with_name(f"{_PARTIAL}{uuid4().hex}-{target.name}")

        def streamed() -> bool:
            self._fs.get_file(self._path(name), str(partial))
            _check_size(partial.stat().st_size, size)
            return True

        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if size > STREAMED_BYTES:
                is_there = self._attempt(name, streamed) is not None
            else:
                content = self.read(name, size)
                is_there = content is not None
                if content is not None:
                    partial.write_bytes(content)
            if not is_there:
                raise TransferError(f"{self.url}/{name}: was listed, but is not there any more")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @property
    def _is_flat(self) -> bool:
        """Whether the file system lists all files below a folder by a way of its own, as object stores do."""
        from fsspec import AbstractFileSystem
        from fsspec.asyn import AsyncFileSystem

        kind = type(self._fs)
        if issubclass(kind, AsyncFileSystem):
            return bool(kind._find is not AsyncFileSystem._find)
        return bool(kind.find is not AbstractFileSystem.find)

    def _walked(self, path: str) -> Iterator[Mapping[str, Any]]:
        """Yield what lies below a folder; fsspec's own walk leaves out, silently, what it may not or cannot read."""
        pending = [path]
        while pending:
            folder = pending.pop()
            try:
                entries = list(self._entries(folder))
            except FileNotFoundError as error:
                if folder == path:
                    raise
                raise OSError(f"{folder} vanished while it was listed") from error
            pending += [entry["name"] for entry in entries if entry["type"] == "directory"]
            yield from entries

    def _entries(self, path: str) -> Iterator[Mapping[str, Any]]:
        """Yield what lies in a folder, links as what they lead to."""
        for entry in self._fs.ls(path, detail=True):
            if entry["type"] in ("file", "directory"):
                yield entry
                continue
            try:
                yield self._fs.info(entry["name"])
            except FileNotFoundError as error:
                raise ValueError(f"{entry['name']} is a link to nothing") from error

    def _attempt(self, name: str, action: Callable[[], T]) -> T | None:
        """Return what `action` does, None if the source has no such file; try again while that may help."""
        for attempt in range(self._retries + 1):
            try:
                return action()
            except Exception as error:
                if _says_absent(error):
                    return None
                if isinstance(error, OSError) and error.errno in _LOCAL_FAULTS:
                    raise
                if attempt == self._retries or not _temporary(error) or self._stopped.is_set():
                    raise TransferError(f"{self.url}/{name}: {_one_line(error)} ({attempt + 1} attempts)") from error
                pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1)
                logger.debug("%s/%s: %s; again in %.1f s", self.url, name, _one_line(error), pause)
                self._stopped.wait(pause)
        raise AssertionError("unreachable")


def sizes_here(folder: Path, keys: list[str]) -> dict[str, int]:
    """Return the sizes of those files `keys` in `folder` that exist; what killed fetches left long ago is removed.

    Folders are listed once each: a look at every file takes much longer on a shared file system.
    """
    found: dict[str, int] = {}
    for inner in dict.fromkeys(key.rpartition("/")[0] for key in keys):
        try:
            with os.scandir(folder / inner) as entries:
                for entry in entries:
                    if entry.name.startswith(_PARTIAL):
                        _remove_abandoned(Path(entry.path))
                    elif entry.is_file():
                        found[f"{inner}/{entry.name}" if inner else entry.name] = entry.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            continue
    return {key: found[key] for key in keys if key in found}


def _remove_abandoned(partial: Path) -> None:
    try:
        if time.time() - partial.stat().st_mtime > _ABANDONED_S:
            partial.unlink()
    except FileNotFoundError:
        pass  # the fetch that wrote it has finished it


def _options(protocol: str, options: Mapping[str, Any], workers: int) -> dict[str, Any]:
    """Return the options of the file system: as given, and for S3 as many connections as workers ask for."""
    given = dict(options)
    if protocol not in _KNOWS_ANON:
        given.pop("anon", None)  # stands in the default configuration, for S3; web requests would fail over it
    if protocol in ("s3", "s3a"):
        client = {"retries": {"max_attempts": 0}, "max_pool_connections": workers}
        given["config_kwargs"] = {**client, **given.get("config_kwargs", {})}
        given.setdefault("max_concurrency", 1)  # whole files, one request each: the workers are the concurrency
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        limits = ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S)
        given["client_kwargs"] = {"timeout": limits, **given.get("client_kwargs", {})}
    return given


def _check_size(received: int, announced: int | None) -> None:
    if announced is not None and received != announced:
        raise OSError(f"{received} bytes came, {announced} were announced")


def _says_absent(error: Exception) -> bool:
    """Return whether the source says that there is no such file; fsspec says so of failing web servers, too."""
    if not isinstance(error, FileNotFoundError):
        return False
    status = getattr(error.__cause__, "status", None)
    if isinstance(status, int):
        return status in (404, 410)
    return not (isinstance(error.__cause__, TimeoutError) or type(error.__cause__).__module__.startswith("aiohttp"))


def _temporary(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _TEMPORARY_STATUS
    return not isinstance(error, (PermissionError, ValueError))


def _remote_file(entry: Mapping[str, Any]) -> RemoteFile:
    tag = str(entry.get("ETag") or "").strip('"').lower()
    is_md5 = len(tag) == 32 and all(c in "0123456789abcdef" for c in tag)
    return RemoteFile(int(entry["size"]), tag if is_md5 else None)


def _leaf(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _one_line(error: BaseException) -> str:
    return ": ".join(filter(None, [type(error).__name__, " ".join(str(error).split())]))
