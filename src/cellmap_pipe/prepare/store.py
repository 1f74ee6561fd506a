"""The training store as its readers see it: per crop one uint8 image, one label map, and voxel positions to draw from.

The files are read through the page cache, of which there is one, so any number of ranks and workers costs the memory of
one; `prepare.layout` says how voxels lie in them. The index, `results/chunks/{grid}/index.json`, holds all that is
needed to open the store; opening it looks at the sizes of the bulk files, never into them.
"""

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import check_file, read_json
from cellmap_pipe.geometry import Shape3, shape3
from cellmap_pipe.intensity import Normalisation, intensity_range
from cellmap_pipe.prepare.layout import MAPPED, REMEDY, Volume, map_array, open_volume
from cellmap_pipe.prepare.state_table import decode_table

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2

# Files that `verify_store` reads at a time.
VERIFY_THREADS = 4

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

    index_path: the store's `index.json`. classes, grid: what the reader expects, if it minds. damaged: receives the
    crops of which a bulk file is missing or has another size, with what is wrong: they are not to be read then.
    Attributes: `grid`, `classes` (columns of the state tables), `voxel_nm` (z, y, x; `"native"` for the grid of the
    crops' own voxels), `crops` (records by crop name, see prepare.chunks), `ranges` (measured intensity ranges by
    dataset). Threads may share it; a pickled store carries no voxels.
    Raises ContractError naming file and difference if the index is missing, of another format, made for other classes
    or another grid, or, without `damaged`, if a bulk file is missing or has another size.
    """

    def __init__(
        self,
        index_path: str | os.PathLike[str],
        *,
        classes: Sequence[str] | None = None,
        grid: str | None = None,
        damaged: dict[str, str] | None = None,
    ) -> None:
        self.path = Path(index_path)
        packed = _read_index(self.path)
        index, self.crops = unpack_index(packed)
        self.grid: str = index["grid"]
        self.classes: list[str] = list(index["classes"])
        self.voxel_nm: Any = index["voxel_nm"] if isinstance(index["voxel_nm"], str) else tuple(index["voxel_nm"])
        self.ranges: dict[str, dict[str, list[float]]] = index["ranges"]
        self.folder = self.path.parent / index["store_dir"]
        if grid is not None and grid != self.grid:
            raise ContractError(f"{self.path}: the store is on grid '{self.grid}', '{grid}' is asked for; {REMEDY}")
        if classes is not None:
            _compare_classes(self.path, self.classes, list(classes))
        for crop, record in self.crops.items():
            faults = [fault for file in record["files"].values() if (fault := fault_of_file(file, self.folder))]
            if faults:
                if damaged is None:
                    raise ContractError(faults[0])
                damaged[crop] = "; ".join(faults)
        self._volumes: dict[tuple[str, str], Volume] = {}
        self._positions: dict[str, npt.NDArray[np.int32]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # a memory map is pickled as the bytes it maps: another process maps the files itself instead
        return {**self.__dict__, "_volumes": {}, "_positions": {}}

    def shape(self, crop: str) -> Shape3:
        """Return the shape (z, y, x) of the crop's image and label map, with the EM context; opens no file."""
        return shape3(self._record(crop)["lattice"]["shape"])

    def volume(self, crop: str, kind: str) -> Volume:
        """Return the crop's EM (kind "image": uint8, missing EM is 0) or its label map ("label": uint8 or uint16).

        The label map holds rows of the crop's state table and is as large as the image, 255 round the label box.
        Raises ContractError if the crop is not in the store, or the file is no such volume.
        """
        key = (crop, kind)
        if key not in self._volumes:
            record = self._record(crop)
            path = self.folder / record["files"][kind]["path"]
            self._volumes[key] = open_volume(record["layout"], path, self.shape(crop))
        return self._volumes[key]

    def positions(self, crop: str) -> npt.NDArray[np.int32]:
        """Return sampled voxels, int32 (n, 4): class column (-1: any known voxel), z, y, x in the stored arrays.

        Sorted by class column, memory-mapped. Raises ContractError as `volume` does.
        """
        if crop not in self._positions:
            self._positions[crop] = map_array(self.folder / self._record(crop)["files"]["positions"]["path"])
        return self._positions[crop]

    def mapped_bytes(self, crops: Iterable[str]) -> int:
        """Return the size of those files of the crops that are memory-mapped: read best while all fit into memory."""
        records = [self._record(crop) for crop in crops]
        return sum(
            file["size"] for record in records if record["layout"] == MAPPED for file in record["files"].values()
        )

    def read_through(self, crops: Iterable[str], threads: int) -> dict[str, str]:
        """Read every bulk file of the crops once, from end to end; return what is wrong, by crop that is damaged.

        Files that fit into memory lie in the page cache then. threads: how many are read at a time.
        """
        damaged: dict[str, str] = {}
        for crop, fault in _read_through(self.folder, [self._record(crop) for crop in crops], threads):
            damaged[crop] = f"{damaged[crop]}; {fault}" if crop in damaged else fault
        return damaged

    def table(self, crop: str) -> npt.NDArray[np.uint8]:
        """Return the crop's state table, uint8 (rows >= 256, classes): absent 0, present 1, unknown 2."""
        return decode_table(self._record(crop)["table"], len(self.classes))

    def intensity_range(self, dataset: str, normalisation: Normalisation) -> tuple[float, float]:
        """Return the stored intensities of a dataset that become 0 and 1, see intensity.intensity_range."""
        measured = self.ranges[dataset].get(normalisation) if isinstance(normalisation, str) else None
        return (measured[0], measured[1]) if measured else intensity_range([], normalisation)

    def _record(self, crop: str) -> Record:
        try:
            return self.crops[crop]
        except KeyError:
            raise ContractError(f"{self.path}: crop '{crop}' is not in the store; {REMEDY}") from None


def verify_store(index_path: str | os.PathLike[str]) -> list[str]:
    """Return one line for each bulk file of the store that is missing or damaged, after reading every byte of it.

    Raises ContractError if the index itself cannot be used.
    """
    index, records = unpack_index(_read_index(Path(index_path)))
    folder = Path(index_path).parent / index["store_dir"]
    return [fault for _, fault in _read_through(folder, list(records.values()), VERIFY_THREADS)]


def fault_of_file(contract: dict[str, Any], folder: Path, remedy: str = REMEDY, *, full: bool = False) -> str:
    """Return what is wrong with a bulk file, "" if nothing; its bytes are read only with `full`."""
    try:
        check_file(contract, folder, remedy, full=full)
    except ContractError as error:
        return str(error)
    except OSError as error:
        return f"{folder / contract['path']}: cannot be read ({error.strerror}); {remedy}"
    return ""


def _read_through(folder: Path, records: Sequence[Record], threads: int) -> Iterator[tuple[str, str]]:
    """Read the bulk files of `records`, `threads` at a time; yield crop and fault of each that is damaged, in order."""
    files = [(record["crop"], contract) for record in records for contract in record["files"].values()]
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        faults = pool.map(lambda file: fault_of_file(file[1], folder, full=True), files)
        yield from ((crop, fault) for (crop, _), fault in zip(files, faults, strict=True) if fault)
    seconds = time.perf_counter() - begin
    size = sum(contract["size"] for _, contract in files) / 1e9
    logger.info(
        "%s: %.3g GB of %d crops read in %.1f s, %.2f GB/s", folder, size, len(records), seconds, size / seconds
    )


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
