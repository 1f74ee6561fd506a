"""Label arrays `crop{N}/{label}` of zarr v2 in a folder or a zip file, read chunk by chunk.

Nothing is unpacked, absent chunks are not made, and a damaged chunk is named: a submission and its truth can be far
larger than memory.
"""

import json
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np

from cellmap_pipe.errors import ContractError, DataError
from cellmap_pipe.files import digest, file_digest, read_json
from cellmap_pipe.prepare.ngff import compose, unit_nm

# The array of an OME-NGFF image of one resolution, in our segmentations
MASK_ARRAY = "s0"
# The names of attributes that the evaluator knows, in the order in which they are looked up
VOXEL_SIZE_NAMES = ("voxel_size", "resolution", "scale")
TRANSLATION_NAMES = ("translation", "offset")
ONE_ZARR = "exactly one must be submitted"


class SubmissionError(DataError):
    """A submission that cannot be opened as a whole. fault: its name in the flight check."""

    def __init__(self, message: str, fault: str = "unreadable submission") -> None:
        super().__init__(message)
        self.fault = fault


class Container(ABC):
    """The files of a submission by name, `/` between folders; see `open_container`."""

    path: str

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file, None if there is none."""

    @abstractmethod
    def children(self, folder: str) -> list[str]:
        """Return the sorted names of files and folders directly in `folder` ("" is the root)."""

    @abstractmethod
    def files(self, folder: str) -> Iterator[tuple[str, int]]:
        """Yield name and stored size of every file below `folder`, in sorted order."""

    def digest(self) -> str:
        """Return a SHA-256: of the zip file, or of the names and sizes of the files of a folder that can be read."""
        return digest([list(entry) for entry in self._readable_files("")])

    def _readable_files(self, folder: str) -> Iterator[tuple[str, int]]:
        try:
            yield from list(self.files(folder))
        except DataError:
            try:
                names = self.children(folder)
            except DataError:
                return
            for name in names:
                yield from self._readable_files(f"{folder}/{name}" if folder else name)

    def crops(self) -> list[str]:
        """Return the sorted names of the folders in the root."""
        return [name for name in self.children("") if self.children(name)]

    def labels(self, crop: str) -> list[str]:
        """Return the sorted names of the crop's arrays; groups (multiscale images) are not among them."""
        return [name for name in self.children(crop) if self._has(f"{crop}/{name}/.zarray")]

    def _has(self, name: str) -> bool:
        """Return whether there is a file of that name; one that cannot be read is there too."""
        try:
            return self.read(name) is not None
        except DataError:
            return True

    def array(self, crop: str, label: str) -> "ChunkedArray | None":
        """Return an array of the crop ("": of the root), None if there is none. Raises DataError for bad metadata."""
        name = f"{crop}/{label}" if crop else label
        meta = self.read(f"{name}/.zarray")
        return None if meta is None else ChunkedArray(self, name, meta)

    def images(self, crop: str) -> list[str]:
        """Return the sorted names of the crop's arrays and of its groups that hold arrays (multiscale images)."""
        return [name for name in self.children(crop) if self._levels(f"{crop}/{name}" if crop else name)]

    def image(self, crop: str, label: str, voxel_nm: Sequence[float]) -> "ChunkedArray | None":
        """Return an array of the crop; of a group of resolution levels, the one that the evaluator takes.

        voxel_nm: (z, y, x) in nm, what the level is chosen for (CHALLENGE section 4.2, step 1): by the OME-NGFF
        metadata the level of least relative difference, without such metadata the nearest that is not coarser. A level
        has the voxel size and translation of the metadata. None if there is nothing. Raises DataError for metadata that
        is not understood.
        """
        array = self.array(crop, label)
        if array is not None:
            return array
        name = f"{crop}/{label}" if crop else label
        target = np.asarray(voxel_nm, float)
        listed = self._multiscale(name)
        if listed is None:
            found = [level for path in self._levels(name) if (level := self.array("", path)) is not None]
            return min(found, key=lambda level: _coarseness(level, target), default=None)
        levels = []
        for path, scale, translation in listed:
            level = self.array("", f"{name}/{path}")
            if level is not None:
                level.attributes |= {"voxel_size": scale.tolist(), "translation": translation.tolist()}
                levels.append((float(np.sum(np.abs(scale - target) / target)), level))
        return min(levels, key=lambda entry: entry[0])[1] if levels else None

    def _levels(self, name: str) -> list[str]:
        """Return the array `name`, or the arrays directly in the group `name`."""
        if self._has(f"{name}/.zarray"):
            return [name]
        inner = (f"{name}/{child}" for child in self.children(name))
        return [path for path in inner if self._has(f"{path}/.zarray")]

    def _multiscale(self, name: str) -> list[tuple[str, np.ndarray, np.ndarray]] | None:
        """Return path, voxel size and translation (nm) of the levels in a group's OME-NGFF metadata, None without."""
        text = self.read(f"{name}/.zattrs")
        where = f"{name}/.zattrs"
        try:
            attributes = json.loads(text) if text else {}
            if not isinstance(attributes, dict) or "multiscales" not in attributes:
                return None
            multiscale = attributes["multiscales"][0]
            nm = unit_nm(multiscale.get("axes"), Path(where))
            levels = []
            for entry in multiscale["datasets"]:
                stages = [part.get("coordinateTransformations") or [] for part in (entry, multiscale)]
                scale, translation = compose(stages)
                levels.append((str(entry["path"]), scale * nm, translation * nm))
            return levels
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{where}: its multiscales are not understood ({type(error).__name__}: {error})") from error


def _coarseness(level: "ChunkedArray", target: np.ndarray) -> float:
    """Return the evaluator's rank of a level without metadata: its distance from the target, coarser ones last."""
    voxel = level.voxel_size
    if voxel is None or len(voxel) != 3:
        return 1e18
    return float(np.linalg.norm(voxel - target)) + (0.0 if np.all(voxel <= target) else 1e6)


class FolderContainer(Container):
    """A folder on disk. roots: folders that stand for names in the root, where they lie elsewhere."""

    def __init__(self, path: str, folder: Path, roots: dict[str, Path] | None = None) -> None:
        self.path, self._folder, self._roots = path, folder, roots

    def locate(self, name: str) -> Path:
        """Return where a file or folder of that name is on disk."""
        if self._roots is None:
            return self._folder / name
        first, _, rest = name.partition("/")
        return self._roots[first] / rest if first in self._roots else self._folder / ".absent" / name

    def read(self, name: str) -> bytes | None:
        try:
            return self.locate(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise self._unreadable(name, error) from error

    def children(self, folder: str) -> list[str]:
        if folder == "" and self._roots is not None:
            return sorted(self._roots)
        try:
            return sorted(path.name for path in self.locate(folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._unreadable(folder, error) from error

    def _unreadable(self, name: str, error: OSError) -> DataError:
        cause = error.strerror or error
        return DataError(f"{self.locate(name)}: cannot be read ({cause}); see to its permissions and its disk")

    def files(self, folder: str) -> Iterator[tuple[str, int]]:
        for name in self.children(folder):
            inner = f"{folder}/{name}" if folder else name
            path = self.locate(inner)
            if path.is_dir():
                yield from self.files(inner)
            else:
                try:
                    size = path.stat().st_size
                except OSError as error:
                    raise self._unreadable(inner, error) from error
                yield inner, size


class Segmentations(FolderContainer):
    """Our own segmentations: a class is an OME-NGFF image, whose one array lies in the group of its name."""

    def labels(self, crop: str) -> list[str]:
        return [name for name in self.children(crop) if self._has(f"{crop}/{name}/{MASK_ARRAY}/.zarray")]

    def array(self, crop: str, label: str) -> "ChunkedArray | None":
        return super().array(crop, f"{label}/{MASK_ARRAY}")

    def images(self, crop: str) -> list[str]:
        return self.labels(crop)


class ZipContainer(Container):
    """A zip file. prefix: the folder in it that is the root, "" or with a trailing slash."""

    def __init__(self, path: str, archive: zipfile.ZipFile, prefix: str) -> None:
        self.path, self._archive = path, archive
        self._sizes: dict[str, int] = {}
        self._children: dict[str, set[str]] = {"": set()}
        self._prefix = prefix
        for info in archive.infolist():
            if info.is_dir() or not info.filename.startswith(prefix):
                continue
            name = info.filename[len(prefix) :]
            self._sizes[name] = info.file_size
            while name:
                folder, _, leaf = name.rpartition("/")
                siblings = self._children.setdefault(folder, set())
                if leaf in siblings:
                    break
                siblings.add(leaf)
                name = folder

    def read(self, name: str) -> bytes | None:
        if name not in self._sizes:
            return None
        try:
            return self._archive.read(self._prefix + name)
        except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
            raise DataError(f"{self.path}: member {name} cannot be read ({error}); pack it again") from error

    def children(self, folder: str) -> list[str]:
        return sorted(self._children.get(folder, ()))

    def files(self, folder: str) -> Iterator[tuple[str, int]]:
        for name in self.children(folder):
            inner = f"{folder}/{name}" if folder else name
            if inner in self._sizes:
                yield inner, self._sizes[inner]
            else:
                yield from self.files(inner)

    def digest(self) -> str:
        return file_digest(self.path)


class ChunkedArray:
    """A zarr v2 array of a container: `shape`, `chunks`, `dtype`, `attributes`; read by planes or boxes.

    Reading raises DataError naming the damaged chunk.
    """

    def __init__(self, container: Container, name: str, meta: bytes) -> None:
        self._container, self.name = container, name
        try:
            self.meta: dict[str, Any] = json.loads(meta)
            if self.meta.get("zarr_format") != 2:
                raise ValueError(f"zarr_format {self.meta.get('zarr_format')!r}")
            self.shape = tuple(int(n) for n in self.meta["shape"])
            self.chunks = tuple(int(n) for n in self.meta["chunks"])
            if len(self.chunks) != len(self.shape) or min((*self.shape, 0)) < 0 or min((*self.chunks, 1)) < 1:
                raise ValueError(f"chunks {list(self.chunks)} of shape {list(self.shape)}")
            self.dtype = np.dtype(self.meta["dtype"])
            self._order = self.meta.get("order", "C")
            self.separator = self.meta.get("dimension_separator") or "."
            if self._order not in ("C", "F") or self.separator not in (".", "/"):
                raise ValueError(f"order {self._order!r}, dimension_separator {self.separator!r}")
            codecs = [*(self.meta.get("filters") or []), *filter(None, [self.meta.get("compressor")])]
            self._codecs = [numcodecs.get_codec(dict(codec)) for codec in codecs]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{name}/.zarray is not understood ({type(error).__name__}: {error})") from error
        attributes = container.read(f"{name}/.zattrs")
        try:
            self.attributes: dict[str, Any] = json.loads(attributes) if attributes else {}
        except ValueError as error:
            raise DataError(f"{name}/.zattrs is not JSON ({error})") from error
        if not isinstance(self.attributes, dict):
            raise DataError(f"{name}/.zattrs is not a JSON object but {str(self.attributes)[:60]}")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def _vector(self, keys: Sequence[str]) -> tuple[float, ...] | None:
        # The evaluator takes the first name that is there, and null as unknown
        for key in keys:
            if key in self.attributes:
                value = self.attributes[key]
                try:
                    return None if value is None else tuple(float(v) for v in value)
                except (TypeError, ValueError, OverflowError):
                    raise DataError(f"{self.name}/.zattrs: {key} {value!r} is not a list") from None
        return None

    @cached_property
    def voxel_size(self) -> tuple[float, ...] | None:
        """Voxel size (z, y, x) in nm by any of the names that the evaluator knows, None if there is none."""
        return self._vector(VOXEL_SIZE_NAMES)

    @cached_property
    def translation(self) -> tuple[float, ...] | None:
        """World position of voxel 0 (z, y, x) in nm by any of the names that the evaluator knows, or None."""
        return self._vector(TRANSLATION_NAMES)

    def key(self, index: Sequence[int]) -> str:
        """Return the name of a chunk's file in the container."""
        return f"{self.name}/{self.separator.join(map(str, index))}"

    def files(self) -> Iterator[tuple[str, tuple[int, ...] | None]]:
        """Yield the files of the array but for its metadata, each with the index of the chunk in it, None if none."""
        skip = len(self.name) + 1
        counts = [-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True)]
        for name, _ in self._container.files(self.name):
            if name.rpartition("/")[2].startswith("."):
                continue
            parts = name[skip:].split(self.separator)
            index = None
            if len(parts) == self.ndim and all(part.isascii() and part.isdigit() for part in parts):
                index = tuple(map(int, parts))
                if self.key(index) != name or any(i >= n for i, n in zip(index, counts, strict=True)):
                    index = None
            yield name, index

    def chunk(self, index: Sequence[int]) -> np.ndarray | None:
        """Return the voxels of a chunk that lie inside the array, None if it has no file."""
        name = self.key(index)
        data: Any = self._container.read(name)
        if data is None:
            return None
        try:
            for codec in reversed(self._codecs):
                data = codec.decode(data)
            voxels = np.frombuffer(data, self.dtype).reshape(self.chunks, order=self._order)
        except MemoryError:
            raise
        except Exception as error:  # codecs raise many kinds; all mean that the chunk is damaged
            raise DataError(f"{name}: damaged chunk ({type(error).__name__}: {error}); write it again") from error
        return voxels[tuple(slice(0, n - i * c) for n, i, c in zip(self.shape, index, self.chunks, strict=True))]

    def read(self, lower: Sequence[int], upper: Sequence[int]) -> np.ndarray:
        """Return the voxels of the box [lower, upper)."""
        fill = self.meta.get("fill_value")
        box = np.full([hi - lo for lo, hi in zip(lower, upper, strict=True)], 0 if fill is None else fill, self.dtype)
        ranges = [range(lo // c, -(-hi // c)) for lo, hi, c in zip(lower, upper, self.chunks, strict=True)]
        for index in product(*ranges):
            voxels = self.chunk(index)
            if voxels is None:
                continue
            start = [i * c for i, c in zip(index, self.chunks, strict=True)]
            begin = [max(lo, s) for lo, s in zip(lower, start, strict=True)]
            end = [min(hi, s + n) for hi, s, n in zip(upper, start, voxels.shape, strict=True)]
            source = tuple(slice(b - s, e - s) for b, e, s in zip(begin, end, start, strict=True))
            box[tuple(slice(b - lo, e - lo) for b, e, lo in zip(begin, end, lower, strict=True))] = voxels[source]
        return box

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return whole planes along the first axis."""
        start, stop, _ = part.indices(self.shape[0])
        return self.read([start, *[0] * (self.ndim - 1)], [stop, *self.shape[1:]])


def open_container(path: str | os.PathLike[str]) -> Container:
    """Return the container of a submission or of a truth: zip file, zarr folder, or the JSON of our segmentations.

    A folder that holds one zip, or one folder `*.zarr`, stands for that one, as in the evaluator.
    Raises DataError, naming what is there instead.
    """
    path = Path(path)
    if not path.exists():
        kinds = "the JSON of segmentations, a zip file or a zarr folder"
        raise SubmissionError(f"{path}: there is no such submission; give {kinds}")
    if path.suffix == ".json" and path.is_file():
        return _segmentations(path)
    if path.is_file():
        return _zip(path)
    zips = sorted(path.glob("*.zip"))
    if len(zips) > 1:
        raise SubmissionError(f"{path}: holds {len(zips)} zip files; give one of them", "several zip files")
    if zips:
        if array := next(path.glob("*/*/.zarray"), None):
            both = f"{zips[0].name}, which the evaluator takes, and the arrays of {array.parent.parent.name}"
            raise SubmissionError(f"{path}: holds {both}; move one of them elsewhere", "zip file beside arrays")
        return _zip(zips[0])
    inner = sorted(folder for folder in (*path.glob("*.zarr"), *path.glob("*/*.zarr")) if folder.is_dir())
    if len(inner) > 1:
        names = _named([str(folder.relative_to(path)) for folder in inner])
        raise SubmissionError(f"{path}: holds {len(inner)} zarr folders{names}; {ONE_ZARR}", "several zarr folders")
    return FolderContainer(str(path), inner[0] if inner else path)


def shared_container(path: str) -> Container:
    """Return `open_container(path)`, kept open by this process for as long as the file or folder stays as it is."""
    status = Path(path).stat()
    return _kept_open(path, status.st_mtime_ns, status.st_size, os.getpid())


@lru_cache(maxsize=4)
def _kept_open(path: str, changed_ns: int, size: int, process: int) -> Container:
    # The process is part of the key because forked workers would share the position in an open zip file
    return open_container(path)


def _zip(path: Path) -> ZipContainer:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise SubmissionError(f"{path}: is not a readable zip file ({error})") from error
    prefixes = set()
    for name in archive.namelist():
        parts = name.split("/")
        for depth, part in enumerate(parts[:-1]):
            if part.endswith(".zarr"):
                prefixes.add("/".join(parts[: depth + 1]) + "/")
                break
    if len(prefixes) > 1:
        names = _named([prefix.rstrip("/") for prefix in sorted(prefixes)])
        raise SubmissionError(f"{path}: holds {len(prefixes)} zarr folders{names}; {ONE_ZARR}", "several zarr folders")
    return ZipContainer(str(path), archive, prefixes.pop() if prefixes else "")


def _named(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def segmented(path: Path) -> list[dict[str, Any]]:
    """Return the records of the volumes that were segmented, each with `folder`, where its labels group lies.

    path: JSON of segmentations. Raises ContractError, naming what is missing and the remedy.
    """
    again = "run again with -R segment"
    content = read_json(path, again)
    result = []
    try:
        for record in content["records"]:
            if record["status"] != "ok":
                continue
            folder = path.parent / record["path"]
            if not folder.is_dir():
                raise ContractError(f"{folder}: the segmentation of {record['name']} is missing; {again}")
            result.append({**record, "folder": folder})
    except (KeyError, TypeError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise ContractError(f"{path}: is not the JSON of segmentations ({cause}); {again}") from error
    return result


def _segmentations(path: Path) -> Segmentations:
    roots = {record["name"].rpartition("/")[2]: record["folder"] for record in segmented(path)}
    return Segmentations(str(path), path.parent, roots)
