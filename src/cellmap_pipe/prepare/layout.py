"""How the voxels of a stored volume lie on disk: whole, to be memory-mapped, or cut into blocks, to be read in pieces.

"mapped" is one raw `.npy` array (z, y, x). All processes that map it share the one copy in the page cache, which is the
fastest way to read while the store fits into memory. "blocked" is one raw `.npy` array of cubic blocks, (nz, ny, nx, n,
n, n), those at the edges padded: a box then touches few and long pieces of the file, and little besides it is read from
disk. Both are written from slabs along z, and hold the same voxels.
"""

import ctypes
import errno
import hashlib
import mmap
import os
import shutil
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cellmap_pipe.errors import CellmapError, ContractError
from cellmap_pipe.files import replacing
from cellmap_pipe.geometry import Shape3, shape3

MAPPED, BLOCKED = "mapped", "blocked"

# Edge of a block in voxels.
BLOCK = 64

REMEDY = "make it again with `snakemake -R chunk`"
_INPUT_REMEDY = "make its input again with `snakemake -R convert`"

# Bytes of one hint to read ahead: the kernel cuts off what is longer than the largest request to the disk.
_HINT_BYTES = 2**20

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Array = npt.NDArray[Any]

# Where a block and a box overlap along an axis: in the block, in the box.
_Span = tuple[slice, slice]


class Volume(Protocol):
    """A stored volume (z, y, x), opened for reading by any number of threads."""

    shape: Shape3
    dtype: np.dtype[Any]

    def copy(self, origin: Sequence[int], out: Array) -> None:
        """Copy the box that begins at voxel `origin` and is as large as `out`, all (z, y, x), into `out`.

        Raises ValueError if the box does not lie inside, ContractError if the file cannot be read.
        """

    def prefetch(self, origin: Sequence[int], shape: Sequence[int]) -> None:
        """Have the box read from disk in the background, where that saves waiting. A hint: nothing depends on it."""

    def at(self, points: npt.NDArray[np.integer]) -> Array:
        """Return the voxels at `points` (n, 3), each (z, y, x) and inside, as an array (n,)."""


def write_volume(
    layout: str,
    path: Path,
    dtype: np.dtype[Any],
    shape: Sequence[int],
    slabs: Iterable[Array],
    *,
    fill: int = 0,
    block: int = BLOCK,
) -> str:
    """Write slabs along z, of any thickness, atomically as a volume; return the SHA-256 (hex) of its voxels in C order.

    fill: value of the padding of blocks. block: their edge in voxels. What is held of the volume is one slab, and if it
    is blocked a layer of blocks. Raises ContractError if the slabs are not of `dtype` and do not add up to `shape`,
    CellmapError if the disk is full.
    """
    content = hashlib.sha256()
    pieces = _checked(path, dtype, shape, slabs, content)
    if layout == BLOCKED:
        grid = [-(-n // block) for n in shape]
        _write_npy(path, dtype, (*grid, *[block] * 3), _block_rows(pieces, dtype, shape, fill, block))
    else:
        _write_npy(path, dtype, shape, pieces)
    return content.hexdigest()


def write_array(path: Path, array: Array) -> None:
    """Write an array of any shape atomically as one raw `.npy`. Raises CellmapError if the disk is full."""
    _write_npy(path, array.dtype, array.shape, [array])


def open_volume(layout: str, path: Path, shape: Sequence[int]) -> Volume:
    """Return the volume of `shape` that `write_volume` wrote.

    Raises ContractError if the file cannot be read or holds another shape, and for a layout that does not exist.
    """
    if layout not in (MAPPED, BLOCKED):
        raise ContractError(f"{path}: layout '{layout}', this version reads {MAPPED} and {BLOCKED}; {REMEDY}")
    return (BlockedVolume if layout == BLOCKED else MappedVolume)(path, shape)


def map_array(path: Path) -> Array:
    """Return a raw `.npy` array, memory-mapped and read-only.

    No file descriptor stays open, as Python's own maps keep one: a store has more files than a process may have open.
    Raises ContractError if it cannot be read.
    """
    try:
        shape, dtype, offset = _read_header(path)
        return np.asarray(_Map(path))[offset:].view(dtype).reshape(shape)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


@contextmanager
def full_disk_named(path: Path, size: int) -> Iterator[None]:
    """Turn the error of a full disk into CellmapError naming the file that was being written, of `size` bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(path.parent).free
        raise CellmapError(
            f"{path}: cannot be written ({error.strerror}): it takes {size / 1e9:.3g} GB, {free / 1e9:.3g} GB are "
            "free; free space or raise the quota, what is finished is kept"
        ) from error


class MappedVolume:
    """A volume in one piece, memory-mapped: see `Volume`."""

    def __init__(self, path: Path, shape: Sequence[int]) -> None:
        self.path, self.shape = path, shape3(shape)
        self._voxels = map_array(path)
        self.dtype = self._voxels.dtype
        if self._voxels.shape != self.shape:
            raise ContractError(f"{path}: array of {self._voxels.shape}, {self.shape} expected; {REMEDY}")

    def copy(self, origin: Sequence[int], out: Array) -> None:
        _check_box(self.path, self.shape, origin, out.shape)
        (z, y, x), (depth, height, width) = origin, out.shape
        out[...] = self._voxels[z : z + depth, y : y + height, x : x + width]

    def prefetch(self, origin: Sequence[int], shape: Sequence[int]) -> None:
        pass  # the files are read through before a training begins

    def at(self, points: npt.NDArray[np.integer]) -> Array:
        return self._voxels[tuple(points.T)]


class BlockedVolume:
    """A volume in blocks, of which those that a box touches are read into a buffer that each thread keeps.

    The file is opened for every box, which costs little beside reading, so any number of crops can be in use. One that
    was written anew in the meantime is refused: other voxels may lie where the box is looked for.
    """

    def __init__(self, path: Path, shape: Sequence[int]) -> None:
        self.path, self.shape = path, shape3(shape)
        try:
            stored, self.dtype, self._offset = _read_header(path)
            self._identity = _identity(path.stat())
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        self._block = stored[-1]
        self._grid = tuple(-(-n // self._block) for n in self.shape)
        if stored != (*self._grid, *[self._block] * 3):
            raise ContractError(f"{path}: blocks {stored} for a volume of {self.shape}; {REMEDY}")

    def copy(self, origin: Sequence[int], out: Array) -> None:
        _check_box(self.path, self.shape, origin, out.shape)
        with self._opened() as descriptor:
            for begin, planes, (_, z_out), (y, y_out), columns in self._pieces(origin, out.shape):
                blocks = self._read(descriptor, begin, len(columns), planes)
                for block, (x, x_out) in zip(blocks, columns, strict=True):
                    out[z_out, y_out, x_out] = block[:, y, x]

    def prefetch(self, origin: Sequence[int], shape: Sequence[int]) -> None:
        _check_box(self.path, self.shape, origin, shape)
        with self._opened() as descriptor:
            for begin, planes, _, _, columns in self._pieces(origin, shape):
                end = begin + len(columns) * planes * self._plane_bytes
                for start in range(begin, end, _HINT_BYTES):
                    length = min(_HINT_BYTES, end - start)
                    os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def at(self, points: npt.NDArray[np.integer]) -> Array:
        values = np.empty(len(points), self.dtype)
        if not len(points):
            return values
        cells, inside = np.divmod(points, self._block)
        numbers = np.ravel_multi_index(tuple(cells.T), self._grid)
        order = np.argsort(numbers, kind="stable")
        wanted, begins = np.unique(numbers[order], return_index=True)
        with self._opened() as descriptor:
            for number, chosen in zip(wanted, np.split(order, begins[1:]), strict=True):
                begin = self._offset + int(number) * self._block * self._plane_bytes
                (block,) = self._read(descriptor, begin, 1, self._block)
                values[chosen] = block[tuple(inside[chosen].T)]
        return values

    @property
    def _plane_bytes(self) -> int:
        return self._block**2 * self.dtype.itemsize

    def _spans(self, start: int, length: int) -> list[_Span]:
        """Return, for every block that [start, start + length) of an axis touches, the part in it and in the box."""
        edges = range(start // self._block * self._block, start + length, self._block)
        return [
            (
                slice(max(start - edge, 0), min(start + length - edge, self._block)),
                slice(max(edge - start, 0), min(edge + self._block - start, length)),
            )
            for edge in edges
        ]

    def _pieces(
        self, origin: Sequence[int], shape: Sequence[int]
    ) -> Iterator[tuple[int, int, _Span, _Span, list[_Span]]]:
        """Yield the pieces of the file that hold a box: first byte, planes per block, spans along z, y, and of each
        block along x.

        Neighbours along x that are needed from first to last plane are one piece; of others only the planes are read.
        """
        first = [start // self._block for start in origin]
        z_spans, y_spans, x_spans = (self._spans(start, n) for start, n in zip(origin, shape, strict=True))
        for i, z in enumerate(z_spans):
            planes = z[0].stop - z[0].start
            together = len(x_spans) if planes == self._block else 1
            for j, y in enumerate(y_spans):
                row = ((first[0] + i) * self._grid[1] + first[1] + j) * self._grid[2] + first[2]
                for k in range(0, len(x_spans), together):
                    plane = (row + k) * self._block + z[0].start
                    yield self._offset + plane * self._plane_bytes, planes, z, y, x_spans[k : k + together]

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                if _identity(os.fstat(descriptor)) != self._identity:
                    raise ContractError(f"{self.path}: was written anew while it was being read; start again")
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _read(self, descriptor: int, begin: int, count: int, planes: int) -> Array:
        """Return what lies from byte `begin` on, (blocks, planes, n, n), in the buffer of the calling thread."""
        wanted = count * planes * self._plane_bytes
        buffer = _buffer(wanted)
        done = 0
        while done < wanted:
            read = os.preadv(descriptor, [buffer.data[done:]], begin + done)
            if not read:
                raise ContractError(f"{self.path}: ends after {begin + done} bytes; {REMEDY}")
            done += read
        return buffer.view(self.dtype).reshape(count, planes, self._block, self._block)


class _Map:
    """A file in memory, read-only, until no array refers to it any more."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            address = _mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, stream.fileno(), 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.__array_interface__ = {"version": 3, "data": (address, True), "shape": (size,), "typestr": "|u1"}
        weakref.finalize(self, _munmap, address, size).atexit = False


_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap = _libc.mmap, _libc.munmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_of_thread = threading.local()


def _buffer(size: int) -> npt.NDArray[np.uint8]:
    """Return `size` bytes that belong to the calling thread; fresh ones would cost more than the reading."""
    if getattr(_of_thread, "buffer", np.empty(0)).size < size:
        _of_thread.buffer = np.empty(size, np.uint8)
    return _of_thread.buffer[:size]


def _check_box(path: Path, shape: Shape3, origin: Sequence[int], lengths: Sequence[int]) -> None:
    (z, y, x), (depth, height, width), (planes, rows, columns) = origin, lengths, shape
    # written out: it is part of every copy of a patch
    if not (0 <= z <= planes - depth and 0 <= y <= rows - height and 0 <= x <= columns - width):
        raise ValueError(f"{path}: box of {tuple(lengths)} at {tuple(origin)} is not inside {shape}")


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _unreadable(path: Path, error: Exception) -> ContractError:
    return ContractError(f"{path}: cannot be read ({' '.join(str(error).split())}); {REMEDY}")


def _read_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape, dtype and first byte of the array in a raw `.npy` file of the size that these say."""
    with open(path, "rb") as stream:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("not a .npy file of version 1.0")
        try:
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        except Exception as error:  # the parser fails on a damaged header in many ways
            raise ValueError(f"header: {error}") from error
        offset, size = stream.tell(), os.fstat(stream.fileno()).st_size
    if fortran_order or size != offset + prod(shape) * dtype.itemsize:
        raise ValueError(f"{size} bytes for {dtype} {shape}")
    return shape, dtype, offset


def _checked(
    path: Path, dtype: np.dtype[Any], shape: Sequence[int], slabs: Iterable[Array], content: "hashlib._Hash"
) -> Iterator[Array]:
    """Yield the slabs as contiguous arrays, and add them to `content`; raise ContractError where they do not fit."""
    planes = 0
    for slab in slabs:
        if slab.dtype != dtype or slab.shape[1:] != tuple(shape[1:]):
            raise ContractError(f"{path}: {slab.dtype} {slab.shape} for {dtype} {tuple(shape)}; {_INPUT_REMEDY}")
        planes += len(slab)
        slab = np.ascontiguousarray(slab)
        content.update(slab.data)
        yield slab
    if planes != shape[0]:
        raise ContractError(f"{path}: {planes} planes for {tuple(shape)}; {_INPUT_REMEDY}")


def _block_rows(
    slabs: Iterable[Array], dtype: np.dtype[Any], shape: Sequence[int], fill: int, block: int
) -> Iterator[Array]:
    """Yield the blocks of a volume in their order, those of one row along x (nx, n, n, n) at a time."""
    layer = np.full((block, *(-(-n // block) * block for n in shape[1:])), fill, dtype)
    filled = 0
    for slab in slabs:
        while len(slab):
            taken, slab = slab[: block - filled], slab[block - filled :]
            layer[filled : filled + len(taken), : shape[1], : shape[2]] = taken
            filled += len(taken)
            if filled == block:
                yield from _rows_of_layer(layer)
                filled = 0
    if filled:
        layer[filled:] = fill
        yield from _rows_of_layer(layer)


def _rows_of_layer(layer: Array) -> Iterator[Array]:
    block = len(layer)
    for first in range(0, layer.shape[1], block):
        row = layer[:, first : first + block].reshape(block, block, -1, block)
        yield row.transpose(2, 0, 1, 3)


def _write_npy(path: Path, dtype: np.dtype[Any], shape: Sequence[int], pieces: Iterable[Array]) -> None:
    """Write an array, piece by piece in C order, as raw `.npy`, atomically.

    Written, not memory-mapped: a full disk is then an error to report, where a map would kill the process.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    size = prod(shape) * dtype.itemsize
    with full_disk_named(path, size), replacing(path) as unfinished, open(unfinished, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for piece in pieces:
            stream.write(np.ascontiguousarray(piece).data)
