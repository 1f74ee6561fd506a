"""One array's chunks, at the source and here: which are wanted, which exist, which are still to be copied.

Nothing is taken for empty: a chunk that the source does not have (it reads as the fill value) is recorded as absent,
and so told from one that is missing here.
"""

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import Any

from cellmap_pipe.errors import DataError
from cellmap_pipe.fetch.source import RemoteFile, Source, sizes_here
from cellmap_pipe.prepare.ngff import array_layout

ABSENT = -1  # in place of a size: the source has no such chunk

# An array of at most so many chunks is listed at once, whatever part of it is wanted: two pages of a listing.
_SMALL = 2000
_PAGE = 1000

# What decides how an array's chunks are cut, named and packed; the rest of its metadata may change.
_PACKING = (
    "shape",
    "chunks",
    "dtype",
    "compressor",
    "filters",
    "order",
    "chunk_grid",
    "data_type",
    "codecs",
    "chunk_key_encoding",
)


@dataclass(frozen=True)
class Region:
    """Chunks of an array: indices from `first` up to, not including, `last` (z, y, x); of v3 shards, the shards.

    path: the array's folder, relative to the root. grid: chunks of the whole array. prefix, separator: of their names.
    """

    path: str
    first: tuple[int, ...]
    last: tuple[int, ...]
    grid: tuple[int, ...]
    prefix: str
    separator: str

    @property
    def count(self) -> int:
        return prod(b - a for a, b in zip(self.first, self.last, strict=True))

    def keys(self) -> list[str]:
        """Return the names of the chunks' files, relative to the array's folder, x running fastest."""
        return [self._key(index) for index in self._indices(3)]

    def rows(self) -> list[str] | None:
        """Return the folders that hold the chunks along x, None if one folder holds all chunks of the array."""
        return [self._key(index) for index in self._indices(2)] if self.separator == "/" else None

    def to_dict(self) -> dict[str, Any]:
        """Return the region as JSON, without `path`."""
        return {
            "first": list(self.first),
            "last": list(self.last),
            "grid": list(self.grid),
            "prefix": self.prefix,
            "separator": self.separator,
        }

    @classmethod
    def from_dict(cls, path: str, value: Mapping[str, Any]) -> "Region":
        """Return the region that `to_dict` described."""
        first, last, grid = (tuple(value[key]) for key in ("first", "last", "grid"))
        return cls(path, first, last, grid, value["prefix"], value["separator"])

    def _indices(self, axes: int) -> Iterator[tuple[int, ...]]:
        return product(*(range(a, b) for a, b in zip(self.first[:axes], self.last[:axes], strict=True)))

    def _key(self, index: Sequence[int]) -> str:
        return self.prefix + self.separator.join(map(str, index))


@dataclass
class Chunks:
    """What the source has of a region. sizes: bytes of every chunk in the order of `Region.keys`, ABSENT for none."""

    region: Region
    sizes: array = field(default_factory=lambda: array("q"))

    @property
    def bytes(self) -> int:
        return sum(size for size in self.sizes if size != ABSENT)

    @property
    def files(self) -> int:
        return len(self.sizes) - self.absent

    @property
    def absent(self) -> int:
        return self.sizes.count(ABSENT)

    def compare(self, root: Path) -> tuple[list[str], list[str]]:
        """Return two lists of chunks by name: missing here, or not of their size; here, though the source has none."""
        keys = self.region.keys()
        here = sizes_here(root / self.region.path, keys)
        missing = [
            key for key, size in zip(keys, self.sizes, strict=True) if size != ABSENT and here.get(key, ABSENT) != size
        ]
        return missing, [key for key, size in zip(keys, self.sizes, strict=True) if size == ABSENT and key in here]


def region_of(
    metadata: Path, path: str, lower: Sequence[int] | None = None, upper: Sequence[int] | None = None
) -> Region:
    """Return the chunks of an array that meet the voxels [lower, upper), all if these are not given.

    metadata: a local folder with the array's metadata. path: the array's folder, relative to the root.
    Raises DataError if the metadata are not understood.
    """
    layout = array_layout(metadata)
    grid = tuple(ceil(n / c) for n, c in zip(layout.shape, layout.chunks, strict=True))
    first = tuple(lo // c for lo, c in zip(lower or (0, 0, 0), layout.chunks, strict=True))
    last = tuple(ceil(hi / c) for hi, c in zip(upper or layout.shape, layout.chunks, strict=True))
    return Region(path, first, last, grid, layout.prefix, layout.separator)


def chunks_at_source(
    source: Source, region: Region, pool: Executor, listing: Mapping[str, RemoteFile] | None = None
) -> tuple[Chunks, dict[str, str]]:
    """Return what the source has of a region, and the MD5 of those chunks of which it tells one.

    listing: the files below the array's folder, if they are known. Else they are listed, or asked for one by one where
    that takes fewer requests, by the threads of `pool`. Raises TransferError.
    """
    keys = region.keys()
    if listing is None:
        listing = _listed(source, region, keys, pool)
    found = {key: listing[key] for key in keys if key in listing}
    sizes = array("q", (found[key].size if key in found else ABSENT for key in keys))
    return Chunks(region, sizes), {key: entry.md5 for key, entry in found.items() if entry.md5}


def check_packing(here: Path, there: bytes, name: str) -> None:
    """Raise DataError if the array metadata `here` pack chunks in another way than those at the source, `there`.

    Chunks of both would else be mixed in one array.
    """
    if not here.is_file():
        return
    try:
        old, new = json.loads(here.read_text()), json.loads(there)
        differing = [key for key in _PACKING if old.get(key) != new.get(key)]
        if (old.get("dimension_separator") or ".") != (new.get("dimension_separator") or "."):
            differing.append("dimension_separator")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{name}: array metadata here or at the source are not JSON ({error})") from None
    if differing:
        raise DataError(
            f"{name}: {', '.join(differing)} at the source differ from the array here, which is another version; "
            "delete its folder and fetch again"
        )


def _listed(source: Source, region: Region, keys: Sequence[str], pool: Executor) -> dict[str, RemoteFile]:
    """Return the files of a region by the way that takes the fewest requests."""
    if source.lists:
        rows = region.rows()
        if prod(region.grid) <= _SMALL or 2 * region.count >= prod(region.grid):
            return source.files(region.path)
        if rows and len(rows) * ceil(region.grid[2] / _PAGE) <= region.count:
            listings = pool.map(lambda row: source.files(f"{region.path}/{row}", below=False), rows)
            return {
                f"{row}/{name}": entry
                for row, listing in zip(rows, listings, strict=True)
                for name, entry in listing.items()
            }
    entries = pool.map(lambda key: source.file(f"{region.path}/{key}"), keys)
    return {key: entry for key, entry in zip(keys, entries, strict=True) if entry}
