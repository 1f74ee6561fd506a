"""Images on disk: OME-NGFF 0.4 (zarr v2) and 0.5 (zarr v3) groups, their resolution levels in the world, their chunks.

Metadata are read as the JSON they are, so that every fault can be named by file; voxels are read through zarr. Folders
on a local or shared file system only. Axis order is (z, y, x) throughout.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import zarr

from cellmap_pipe.errors import DataError, GeometryError, MissingError
from cellmap_pipe.geometry import Lattice, Shape3, shape3, vec3

logger = logging.getLogger(__name__)

AXES = ["z", "y", "x"]
_PREFIXES = {"femto": -15, "pico": -12, "nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "": 0, "kilo": 3}
NM_PER_UNIT = {
    **{f"{prefix}meter": 10.0 ** (power + 9) for prefix, power in _PREFIXES.items()},
    "angstrom": 0.1,
    "nm": 1.0,
    "um": 1e3,
    "µm": 1e3,
    "mm": 1e6,
}


@dataclass(frozen=True)
class Level:
    """One resolution level: the folder of its array, its voxels in the world (nm), and its numpy dtype's name."""

    path: str
    lattice: Lattice
    dtype: str


@dataclass(frozen=True)
class Image:
    """A multiscale image: its group's folder, levels from the finest voxel to the coarsest, and group attributes."""

    path: str
    levels: tuple[Level, ...]
    attributes: dict[str, Any]


def read_image(path: str | Path) -> Image:
    """Return the levels of the OME-NGFF group at `path`, from the finest to the coarsest.

    A level that the metadata list but that has no array on disk is left out: partial downloads are usual.
    Raises DataError, naming the file and what is wrong in it; MissingError if there is no level at all.
    """
    path = Path(path)
    if not path.is_dir():
        raise MissingError(f"{path}: there is no such image group")
    attributes = _group_attributes(path)
    namespace = attributes.get("ome", attributes)
    try:
        multiscale = namespace["multiscales"][0]
        datasets = list(multiscale["datasets"])
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(f"{path}: its attributes have no OME-NGFF multiscales ({error!r})") from None
    nm = unit_nm(multiscale.get("axes"), path)
    levels = []
    for entry in datasets:
        try:
            array_path = path / entry["path"]
            stages = [part.get("coordinateTransformations") or [] for part in (entry, multiscale)]
            scale, translation = compose(stages)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path}: a level's coordinateTransformations are not understood ({error!r})") from None
        if not (array_path / ".zarray").is_file() and not (array_path / "zarr.json").is_file():
            logger.debug("%s: listed in the metadata, not on disk", array_path)
            continue
        layout = array_layout(array_path)
        try:
            lattice = Lattice(vec3(scale * nm), vec3(translation * nm), shape3(layout.shape))
        except GeometryError as error:
            raise DataError(f"{array_path}: {error}") from None
        levels.append(Level(str(array_path), lattice, layout.dtype))
    if not levels:
        raise MissingError(f"{path}: none of its levels ({', '.join(str(e['path']) for e in datasets)}) is on disk")
    levels.sort(key=lambda level: prod(level.lattice.voxel_nm))
    return Image(str(path), tuple(levels), attributes)


def is_array(path: str | Path) -> bool:
    """Return whether `path` is a zarr array itself, not a group of resolution levels. Raises DataError."""
    path = Path(path)
    if (path / ".zarray").is_file():
        return True
    return (path / "zarr.json").is_file() and _read_json(path / "zarr.json").get("node_type") == "array"


def plain_level(path: str | Path, lattice: Lattice) -> Level:
    """Return the zarr array at `path`, which has no multiscales, as a level on the voxels of `lattice`.

    Raises DataError if its shape is not the lattice's.
    """
    layout = array_layout(Path(path))
    if layout.shape != lattice.shape:
        raise DataError(f"{path}: shape {list(layout.shape)}; {list(lattice.shape)} is expected here")
    return Level(str(path), lattice, layout.dtype)


def open_level(level: Level) -> "zarr.Array[Any]":
    """Return the level's array, opened read-only. Raises DataError if zarr cannot open it."""
    import zarr  # slow, and Snakemake itself lists crops without it

    try:
        return zarr.open_array(level.path, mode="r")
    except MemoryError:
        raise
    except Exception as error:  # zarr raises many kinds; all mean that this array cannot be used
        raise DataError(f"{level.path}: cannot be opened as a zarr array ({_one_line(error)})") from error


def read_box(array: "zarr.Array[Any]", level: Level, lower: Sequence[int], upper: Sequence[int]) -> np.ndarray:
    """Return the voxels [lower, upper) of an opened level, (z, y, x); chunks that are not on disk read as fill value.

    Raises DataError naming the first chunk that is damaged.
    """
    try:
        return np.asarray(array[tuple(slice(lo, hi) for lo, hi in zip(lower, upper, strict=True))])
    except MemoryError:
        raise
    except Exception as error:  # codecs raise many kinds; all mean that a chunk is damaged
        where = _first_damaged_chunk(array, level, lower, upper)
        raise DataError(f"{where}: damaged chunk ({_one_line(error)}); fetch it again") from error


def array_attributes(path: str | Path) -> dict[str, Any]:
    """Return the attributes of the zarr array or group at `path`, {} if it has none.

    Raises DataError if the file that holds them is not JSON.
    """
    path = Path(path)
    if (path / "zarr.json").is_file():
        attributes = _read_json(path / "zarr.json").get("attributes", {})
    elif (path / ".zattrs").is_file():
        attributes = _read_json(path / ".zattrs")
    else:
        return {}
    return attributes if isinstance(attributes, dict) else {}


def chunks_on_disk(level: Level, lower_index: Sequence[int], upper_index: Sequence[int]) -> np.ndarray:
    """Return for every chunk that meets the voxels [lower_index, upper_index) whether its file exists, bool (z, y, x).

    The first entry belongs to chunk `lower_index // chunk_shape(level)`. Of a sharded v3 array the shards count: they
    are its files.
    """
    first, last, layout = _chunk_range(level, lower_index, upper_index)
    present = np.zeros([max(0, b - a) for a, b in zip(first, last, strict=True)], bool)
    for offset in np.ndindex(present.shape):
        present[offset] = (Path(level.path) / layout.key([f + o for f, o in zip(first, offset, strict=True)])).is_file()
    return present


def chunk_files(level: Level, lower_index: Sequence[int], upper_index: Sequence[int]) -> list[Path]:
    """Return the files of the chunks that meet the voxels [lower_index, upper_index), those that exist, in order."""
    first, last, layout = _chunk_range(level, lower_index, upper_index)
    indices = product(*(range(a, b) for a, b in zip(first, last, strict=True)))
    return [path for index in indices if (path := Path(level.path) / layout.key(index)).is_file()]


def chunk_shape(level: Level) -> Shape3:
    """Return the shape of the level's chunk files in voxels (z, y, x)."""
    return shape3(array_layout(Path(level.path)).chunks)


def chunk_tiles(
    level: Level, lower: Sequence[int], upper: Sequence[int], max_voxels: int
) -> Iterator[tuple[Shape3, Shape3]]:
    """Yield boxes (lower, upper) that make up the voxels [lower, upper), for reading a few chunks at a time.

    Each box is whole chunks along z and y and all of x, and has about `max_voxels`, or a row of chunks if that is more.
    """
    depth, height, _ = chunk_shape(level)
    row = depth * height * (upper[2] - lower[2])
    rows = max(1, max_voxels // max(1, row)) * height
    layers = max(1, rows // max(1, upper[1] - lower[1])) * depth
    for first, last in _cut(lower[0], upper[0], layers):
        for top, bottom in _cut(lower[1], upper[1], rows):
            yield (first, top, lower[2]), (last, bottom, upper[2])


@dataclass(frozen=True)
class ArrayLayout:
    """Shape and chunk files of an array: shapes in voxels (z, y, x), numpy dtype's name, how files are named."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    prefix: str
    separator: str

    def key(self, index: Sequence[int]) -> str:
        """Return the path of a chunk's file below the array's folder."""
        return self.prefix + self.separator.join(map(str, index))


def array_layout(path: Path) -> ArrayLayout:
    """Return shape, chunks and file naming of the array at `path`. Raises DataError."""
    try:
        if (path / ".zarray").is_file():
            meta = _read_json(path / ".zarray")
            layout = ArrayLayout(
                tuple(map(int, meta["shape"])),
                tuple(map(int, meta["chunks"])),
                np.dtype(meta["dtype"]).name,
                "",
                meta.get("dimension_separator", "."),
            )
        elif (path / "zarr.json").is_file():
            meta = _read_json(path / "zarr.json")
            encoding = meta.get("chunk_key_encoding", {"name": "default"})
            default = encoding["name"] == "default"
            separator = encoding.get("configuration", {}).get("separator", "/" if default else ".")
            layout = ArrayLayout(
                tuple(map(int, meta["shape"])),
                tuple(map(int, meta["chunk_grid"]["configuration"]["chunk_shape"])),
                np.dtype(meta["data_type"]).name,
                f"c{separator}" if default else "",
                separator,
            )
        else:
            raise DataError(f"{path}: neither .zarray nor zarr.json is there")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: its array metadata are not understood ({error!r})") from None
    if len(layout.shape) != 3 or len(layout.chunks) != 3:
        raise DataError(f"{path}: shape {list(layout.shape)} is not three-dimensional (z, y, x)")
    return layout


def _group_attributes(path: Path) -> dict[str, Any]:
    attributes = array_attributes(path)
    if not attributes:
        raise DataError(f"{path}: no .zattrs (zarr v2) nor attributes in zarr.json (v3), so its voxel size is unknown")
    return attributes


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({_one_line(error)})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: is not a JSON object")
    return value


def unit_nm(axes: Any, path: Path) -> np.ndarray:
    """Return nanometres per unit for the three axes; an axis without a unit is in nm, as the challenge's are."""
    try:
        names = [axis["name"] for axis in axes]
        units = [axis.get("unit") or "nanometer" for axis in axes]
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: its multiscales have no axes") from None
    if names != AXES:
        raise DataError(f"{path}: axes {names} are not supported; they must be {AXES}")
    unknown = sorted({unit for unit in units if unit not in NM_PER_UNIT})
    if unknown:
        raise DataError(f"{path}: unknown unit {unknown}; known: {', '.join(NM_PER_UNIT)}")
    return np.array([NM_PER_UNIT[unit] for unit in units])


def compose(stages: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[np.ndarray, np.ndarray]:
    """Return (scale, translation) of axis-aligned transformations applied one after the other, stage by stage.

    Within a stage OME-NGFF fixes the order scale, translation; writers do not always keep it, and mean it.
    Raises ValueError if there is no scale: a voxel size is never assumed.
    """
    if not any(transform["type"] == "scale" for stage in stages for transform in stage):
        raise ValueError("no scale, so the voxel size is unknown")
    scale, translation = np.ones(3), np.zeros(3)
    for stage in stages:
        for kind in ("scale", "translation"):
            for transform in stage:
                if transform["type"] not in ("scale", "translation", "identity"):
                    raise ValueError(f"transformation type {transform['type']!r}")
                if transform["type"] != kind:
                    continue
                values = np.asarray(transform[kind], float)
                if values.shape != (3,):
                    raise ValueError(f"{kind} {transform[kind]}")
                if kind == "scale":
                    scale, translation = scale * values, translation * values
                else:
                    translation = translation + values
    return scale, translation


def _first_damaged_chunk(array: "zarr.Array[Any]", level: Level, lower: Sequence[int], upper: Sequence[int]) -> str:
    first, last, layout = _chunk_range(level, lower, upper)
    for index in product(*(range(a, b) for a, b in zip(first, last, strict=True))):
        try:
            array[tuple(slice(i * c, i * c + 1) for i, c in zip(index, layout.chunks, strict=True))]
        except Exception:
            return str(Path(level.path) / layout.key(index))
    return level.path


def _chunk_range(level: Level, lower: Sequence[int], upper: Sequence[int]) -> tuple[list[int], list[int], ArrayLayout]:
    """Return first and last+1 index of the chunks that meet the voxels [lower, upper), and the array's layout."""
    layout = array_layout(Path(level.path))
    first = [lo // c for lo, c in zip(lower, layout.chunks, strict=True)]
    last = [-(-hi // c) for hi, c in zip(upper, layout.chunks, strict=True)]
    return first, last, layout


def _cut(first: int, last: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges into which the multiples of `step` cut the indices [first, last)."""
    yield from pairwise([first, *range((first // step + 1) * step, last, step), last] if first < last else [])


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
