"""The training store as its readers see it: one uint8 image and one label map per crop, memory-mapped from raw `.npy`.

Every process that maps a file shares one copy of it in the page cache, so any number of ranks and workers costs the
memory of one. The index, `results/chunks/{grid}/index.json`, holds all that is needed to open the store; opening it
looks at the sizes of the bulk files, never into them.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import check_file, read_json
from cellmap_pipe.prepare.state_table import decode_table

FORMAT_VERSION = 1
REMEDY = "make it again with `snakemake -R chunk`"

Record = dict[str, Any]


def pack_index(index: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON of an index file: `index` (format_version, grid, ...) with the crops' records packed into it.

    State tables that several crops share are stored once, and counts as lists in the order of the classes: 289 crops
    with 48 classes stay below 1 MB. `unpack_index` is the inverse.
    """
    classes = index["classes"]
    tables: list[dict[str, str]] = []
    crops = []
    for record in records:
        table = record["table"]
        if table not in tables:
            tables.append(table)
        packed = {key: value for key, value in record.items() if key not in ("classes", "has_positive")}
        packed["table"] = tables.index(table)
        packed["counts"] = {
            state: [record["counts"][name][state] for name in classes] for state in ("present", "absent")
        }
        crops.append(packed)
    return {**index, "tables": tables, "crops": crops}


def unpack_index(packed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Record]]:
    """Return an index file's own entries and its crops' records by name, as the `chunk` jobs wrote them."""
    index = {key: value for key, value in packed.items() if key not in ("tables", "crops")}
    classes = index["classes"]
    records = {}
    for entry in packed["crops"]:
        voxels = int(np.prod(entry["label_shape"]))
        columns = zip(classes, entry["counts"]["present"], entry["counts"]["absent"], strict=True)
        counts = {
            name: {"present": present, "absent": absent, "unknown": voxels - present - absent}
            for name, present, absent in columns
        }
        records[entry["crop"]] = {
            **entry,
            "table": packed["tables"][entry["table"]],
            "classes": classes,
            "counts": counts,
            "has_positive": [name for name in classes if counts[name]["present"]],
        }
    return index, records


class Store:
    """A training store opened for reading.

    index_path: the store's `index.json`. classes, grid: what the reader expects, if it minds.
    Attributes: `grid`, `classes` (columns of the state tables), `voxel_nm` (z, y, x; `"native"` for the grid of the
    crops' own voxels), `crops` (records by crop name, see prepare.chunks), `normalisation` ((lo, hi) by dataset).
    Raises ContractError naming file and difference if the index is missing, of another format, made for other classes
    or another grid, or if a bulk file is missing or has another size.
    """

    def __init__(
        self, index_path: str | os.PathLike[str], *, classes: Sequence[str] | None = None, grid: str | None = None
    ) -> None:
        self.path = Path(index_path)
        packed = _read_index(self.path)
        index, self.crops = unpack_index(packed)
        self.grid: str = index["grid"]
        self.classes: list[str] = list(index["classes"])
        self.voxel_nm: Any = index["voxel_nm"] if isinstance(index["voxel_nm"], str) else tuple(index["voxel_nm"])
        self.normalisation: dict[str, tuple[float, float]] = {
            dataset: (float(lo), float(hi)) for dataset, (lo, hi) in index["normalisation"].items()
        }
        self.folder = self.path.parent / index["store_dir"]
        if grid is not None and grid != self.grid:
            raise ContractError(f"{self.path}: the store is on grid '{self.grid}', '{grid}' is asked for; {REMEDY}")
        if classes is not None:
            _compare_classes(self.path, self.classes, list(classes))
        self._paths = {
            crop: {kind: check_file(record["files"][kind], self.folder, REMEDY) for kind in record["files"]}
            for crop, record in self.crops.items()
        }
        self._arrays: dict[tuple[str, str], npt.NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # a memory map is pickled as the bytes it maps: a worker process maps the files itself instead
        return {**self.__dict__, "_arrays": {}}

    def image(self, crop: str) -> npt.NDArray[np.uint8]:
        """Return the crop's EM, uint8 (z, y, x) with its context, read-only and memory-mapped. Missing EM is 0."""
        return self._open(crop, "image", mmap=True)

    def label(self, crop: str) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
        """Return the crop's label map (z, y, x), rows of its state table, as large as the image, memory-mapped."""
        return self._open(crop, "label", mmap=True)

    def positions(self, crop: str) -> npt.NDArray[np.int32]:
        """Return sampled voxels, int32 (n, 4): class column (-1: any known voxel), z, y, x in the stored arrays."""
        return self._open(crop, "positions", mmap=False)

    def table(self, crop: str) -> npt.NDArray[np.uint8]:
        """Return the crop's state table, uint8 (rows >= 256, classes): absent 0, present 1, unknown 2."""
        return decode_table(self._record(crop)["table"], len(self.classes))

    def _record(self, crop: str) -> Record:
        try:
            return self.crops[crop]
        except KeyError:
            raise ContractError(f"{self.path}: crop '{crop}' is not in the store; {REMEDY}") from None

    def _open(self, crop: str, kind: str, *, mmap: bool) -> npt.NDArray[Any]:
        key = (crop, kind)
        if key not in self._arrays:
            self._record(crop)
            path = self._paths[crop][kind]
            try:
                self._arrays[key] = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise ContractError(f"{path}: cannot be read ({error}); {REMEDY}") from error
        return self._arrays[key]


def verify_store(index_path: str | os.PathLike[str]) -> list[str]:
    """Return one line for each bulk file of the store that is missing or damaged, after reading every byte of it.

    Raises ContractError if the index itself cannot be used.
    """
    index, records = unpack_index(_read_index(Path(index_path)))
    folder = Path(index_path).parent / index["store_dir"]
    problems = []
    for record in records.values():
        for contract in record["files"].values():
            try:
                check_file(contract, folder, REMEDY, full=True)
            except ContractError as error:
                problems.append(str(error))
    return problems


def _read_index(path: Path) -> dict[str, Any]:
    packed = read_json(path, REMEDY)
    version = packed.get("format_version") if isinstance(packed, dict) else None
    if version != FORMAT_VERSION:
        raise ContractError(f"{path}: store format {version}, this version reads {FORMAT_VERSION}; {REMEDY}")
    return packed


def _compare_classes(path: Path, stored: list[str], asked: list[str]) -> None:
    if stored == asked:
        return
    extra = [name for name in stored if name not in asked]
    missing = [name for name in asked if name not in stored]
    differences = [f"without {', '.join(missing)}"] * bool(missing) + [f"with {', '.join(extra)}"] * bool(extra)
    what = " and ".join(differences) or f"in the order {', '.join(stored)}"
    raise ContractError(f"{path}: the store was made for another class list ({what}); {REMEDY}")
