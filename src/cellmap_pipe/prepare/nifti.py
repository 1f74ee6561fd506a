"""NIfTI files of volumes on a lattice: written by isal and read back, then read whole or slab by slab.

Arrays are (z, y, x). NIfTI's first axis is x, then y, z, and it stores x fastest: its bytes are those of our arrays in
C order. Voxel size and position of voxel 0's centre are numbers in nm in the affine. NIfTI knows no nanometre, so
xyzt_units is "unknown" and `descrip` says it.

A file is a row of gzip members of a few megabytes each, as bgzip writes them; every gzip reader takes them for one
stream. Members can be compressed by several threads, and each one as suits it: in label maps most is said by runs of
one value, which deflate codes best with a window of a voxel or two.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from isal import igzip, igzip_lib, isal_zlib
from nibabel import Nifti1Header

from cellmap_pipe.errors import ContractError, DataError
from cellmap_pipe.files import replacing
from cellmap_pipe.geometry import Lattice

DESCRIPTION = b"units nm; voxel axes x,y,z; offset = centre of voxel 0"
CONVERT_REMEDY = "make it again with `snakemake -R convert`"
DTYPES = (np.uint8, np.uint16, np.uint32)

# Voxels that `nifti_slabs` yields at once.
SLAB_VOXELS = 2**25

_HEADER_BYTES = 352  # NIfTI-1 header and its empty extension flag
_MEMBER_BYTES = 4 * 1024**2
_READ_BYTES = 4 * 1024**2

_LEVEL = 2
# Windows of 2^15 and 2^2 bytes: matches anywhere, or runs of voxels of up to four bytes.
_WINDOWS = (15, 2)
# What a member is tried on to choose its window: so many pieces of so many bytes.
_SAMPLE_PIECES, _SAMPLE_BYTES = 4, 16 * 1024


def write_nifti(path: str | os.PathLike[str], volume: np.ndarray, lattice: Lattice, *, threads: int = 1) -> None:
    """Write `volume` (uint8, uint16 or uint32; z, y, x) on `lattice` atomically as .nii.gz, and read it back.

    Equal input gives equal bytes, by any number of `threads`. Raises DataError if an axis is longer than NIfTI-1 can
    say (32767), ContractError, leaving nothing under `path` that was not there, if other voxels are read than written.
    """
    write_nifti_slabs(path, [volume], Lattice(lattice.voxel_nm, lattice.translation_nm, volume.shape), threads=threads)


def write_nifti_slabs(
    path: str | os.PathLike[str], slabs: Iterable[np.ndarray], lattice: Lattice, *, threads: int = 1
) -> None:
    """Write a volume as `write_nifti` does, of slabs along z, (z, y, x) each, that add up to the shape of `lattice`."""
    with replacing(path) as partial:
        header, checksum = encode_nifti(partial, slabs, lattice, threads=threads)
        try:
            _check_written(partial, header, checksum)
        except MemoryError:
            raise
        except Exception as error:  # what a damaged file makes gzip, header and sizes raise is of many kinds
            raise ContractError(
                f"{path}: was not read back as it was written ({_one_line(error)}); check disk and memory of this "
                "machine and run again"
            ) from error


def encode_nifti(
    path: str | os.PathLike[str], slabs: Iterable[np.ndarray], lattice: Lattice, *, threads: int = 1
) -> tuple[Nifti1Header, int]:
    """Write slabs as `write_nifti_slabs` does, neither atomically nor read back; return header and checksum.

    checksum: CRC-32 of all bytes before compression. Raises DataError as `write_nifti` does.
    """
    if max(lattice.shape) > np.iinfo(np.int16).max:
        raise DataError(f"{path}: shape {lattice.shape} does not fit into NIfTI-1 (32767 per axis); use a coarser grid")
    remaining = iter(slabs)
    lead = next(remaining)
    header = _header(lead.dtype, lattice)
    checksum = 0
    with open(path, "wb") as stream:
        for block, member in _members(_blocks(header, chain([lead], remaining), lattice.shape), threads):
            checksum = isal_zlib.crc32(block, checksum)
            stream.write(member)
    return header, checksum


def read_nifti(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the volume that `write_nifti` wrote, (z, y, x), checked against gzip's own checksum.

    Raises ContractError, naming the file and the remedy, if it is missing, truncated, damaged or of another dtype.
    """
    try:
        with igzip.open(path, "rb") as stream:
            header = _read_header(stream)
            volume = np.empty(header.get_data_shape()[::-1], header.get_data_dtype())
            _fill(stream, volume)
            _expect_end(stream)
    except MemoryError:
        raise
    except Exception as error:  # gzip, header and sizes each fail in their own way; all mean a damaged file
        raise ContractError(f"{path}: not a readable NIfTI file ({_one_line(error)}); {CONVERT_REMEDY}") from error
    if volume.dtype not in DTYPES:
        raise ContractError(f"{path}: voxels of dtype {volume.dtype}, unsigned integers expected; {CONVERT_REMEDY}")
    return volume


def nifti_slabs(path: str | os.PathLike[str], shape: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the voxels of a `.nii.gz` file slab by slab along z, each (z, y, x), without holding the whole volume.

    shape: what it must hold, (z, y, x). Raises ContractError if the file is damaged or of another shape.
    """
    try:
        with igzip.open(path, "rb") as stream:
            header = _read_header(stream)
            found = tuple(header.get_data_shape()[::-1])
            if found != tuple(shape):
                raise ContractError(f"{path}: shape {found}, expected {tuple(shape)}; {CONVERT_REMEDY}")
            for first, last in slab_ranges(shape, SLAB_VOXELS):
                slab = np.empty((last - first, *shape[1:]), header.get_data_dtype())
                _fill(stream, slab)
                yield slab
            _expect_end(stream)
    except (ContractError, MemoryError):
        raise
    except Exception as error:
        raise ContractError(f"{path}: damaged ({_one_line(error)}); {CONVERT_REMEDY}") from error


def slab_ranges(shape: Sequence[int], max_voxels: int) -> Iterator[tuple[int, int]]:
    """Yield ranges [first, last) of planes along z with at most `max_voxels` voxels, one plane at least."""
    depth = max(1, max_voxels // (shape[1] * shape[2]))
    for first in range(0, shape[0], depth):
        yield first, min(first + depth, shape[0])


def _header(dtype: np.dtype[Any], lattice: Lattice) -> Nifti1Header:
    header = Nifti1Header(endianness="<")
    header.set_data_dtype(dtype)
    header.set_data_shape(lattice.shape[::-1])
    header.set_qform(_affine(lattice), code="aligned")
    header.set_sform(_affine(lattice), code="aligned")
    header.set_xyzt_units("unknown", "unknown")
    header["descrip"] = DESCRIPTION
    header["vox_offset"] = _HEADER_BYTES
    header.set_slope_inter(1, 0)
    return header


def _affine(lattice: Lattice) -> np.ndarray:
    affine = np.diag([*lattice.voxel_nm[::-1], 1.0])
    affine[:3, 3] = lattice.translation_nm[::-1]
    return affine


def _blocks(header: Nifti1Header, slabs: Iterable[np.ndarray], shape: Sequence[int]) -> Iterator[memoryview]:
    """Yield the bytes of a NIfTI file in blocks of whole planes, the first one with the header before them."""
    before, planes = header.binaryblock + b"\0\0\0\0", 0
    dtype = header.get_data_dtype()
    for slab in slabs:
        if slab.dtype != dtype or slab.shape[1:] != tuple(shape[1:]):
            raise ValueError(f"slab of {slab.dtype} {slab.shape} for a volume of {dtype} {tuple(shape)}")
        planes += len(slab)
        for first, last in slab_ranges(slab.shape, _MEMBER_BYTES // dtype.itemsize):
            block = np.ascontiguousarray(slab[first:last], dtype).reshape(-1).view(np.uint8).data
            yield memoryview(before + block) if before else block
            before = b""
    if planes != shape[0]:
        raise ValueError(f"{planes} planes for a volume of {tuple(shape)}")


def _members(blocks: Iterator[memoryview], threads: int) -> Iterator[tuple[memoryview, bytes]]:
    """Yield each block with its gzip member, in order; a few of them are held at a time."""
    if threads <= 1:
        yield from ((block, _member(block)) for block in blocks)
        return
    with ThreadPoolExecutor(threads) as pool:  # isal releases the interpreter's lock
        pending: deque[tuple[memoryview, Future[bytes]]] = deque()
        for block in blocks:
            pending.append((block, pool.submit(_member, block)))
            if len(pending) > threads:
                done, member = pending.popleft()
                yield done, member.result()
        yield from ((done, member.result()) for done, member in pending)


def _member(block: memoryview) -> bytes:
    """Return `block` as one gzip member, without name and time, by the window that suits a sample of it better."""
    sample: bytes | memoryview = block
    if len(block) > _SAMPLE_PIECES * _SAMPLE_BYTES:
        starts = np.linspace(0, len(block) - _SAMPLE_BYTES, _SAMPLE_PIECES).astype(int)
        sample = b"".join(block[start : start + _SAMPLE_BYTES] for start in starts)
    sizes = [len(_deflated(sample, igzip_lib.COMP_DEFLATE, window)) for window in _WINDOWS]
    return _deflated(block, igzip_lib.COMP_GZIP, _WINDOWS[sizes.index(min(sizes))])


def _deflated(data: bytes | memoryview, flag: int, window: int) -> bytes:
    return igzip_lib.compress(data, _LEVEL, flag, igzip_lib.MEM_LEVEL_DEFAULT, window)


def _check_written(path: Path, header: Nifti1Header, checksum: int) -> None:
    """Raise if header or voxels of the file at `path` are not those that were written."""
    with igzip.open(path, "rb") as stream:
        start = stream.read(_HEADER_BYTES)
        if Nifti1Header(start[: _HEADER_BYTES - 4]) != header:
            raise ValueError("another header")
        found, size = isal_zlib.crc32(start), len(start)
        while data := stream.read(_READ_BYTES):
            found, size = isal_zlib.crc32(data, found), size + len(data)
    expected = _HEADER_BYTES + int(np.prod(header.get_data_shape(), dtype=np.int64)) * header.get_data_dtype().itemsize
    if size != expected:
        raise ValueError(f"{size} bytes, {expected} expected")
    if found != checksum:
        raise ValueError("another checksum")


def _read_header(stream: IO[bytes]) -> Nifti1Header:
    """Return the header and leave the stream at the first voxel."""
    header = Nifti1Header.from_fileobj(stream, check=False)
    skip = int(header["vox_offset"]) - stream.tell()
    if skip < 0 or len(stream.read(skip)) < skip:
        raise ValueError(f"voxels from byte {int(header['vox_offset'])}")
    return header


def _fill(stream: Any, volume: np.ndarray) -> None:
    """Read the voxels of `volume`, which is C-contiguous, from the stream."""
    view = volume.reshape(-1).view(np.uint8).data
    filled = 0
    while filled < len(view) and (n := stream.readinto(view[filled:])):
        filled += n
    if filled < len(view):
        raise ValueError(f"{filled} bytes of voxels, {len(view)} expected")


def _expect_end(stream: IO[bytes]) -> None:
    """Read the end, at which gzip compares its checksum."""
    if stream.read(1):
        raise ValueError("more voxels than its shape says")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
