"""Packing: every row of the manifest as a plain zarr v2 array in one zip file, the same bytes for the same input."""

import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import cc3d
import numcodecs
import numpy as np

from cellmap_pipe.classes import CLASSES, derivable, parts_of
from cellmap_pipe.errors import ContractError, DataError
from cellmap_pipe.evaluation.alignment import is_instance, match_geometry
from cellmap_pipe.evaluation.container import ChunkedArray, Segmentations
from cellmap_pipe.evaluation.flight import Problem, as_json, check, validate
from cellmap_pipe.evaluation.manifest import ManifestRow, crops_without_geometry, read_manifest
from cellmap_pipe.evaluation.rules import PORTAL_NOTE, get_rules
from cellmap_pipe.files import file_digest, read_json, replacing, write_json
from cellmap_pipe.geometry import Lattice

__all__ = ["Problem", "pack", "validate"]

logger = logging.getLogger(__name__)

CHUNK = 128
# Plain zstd: of several threads, blosc lets the first to finish write first, so its bytes differ from run to run
CODEC = numcodecs.Zstd(level=3)
EPOCH = (1980, 1, 1, 0, 0, 0)

Read = Callable[[Sequence[int], Sequence[int]], np.ndarray]


def pack(
    segment_json: str | os.PathLike[str],
    volumes_csv: str | os.PathLike[str],
    out_zip: str | os.PathLike[str],
    report_json: str | os.PathLike[str],
    *,
    rules: str = "csc-2026.06",
    classes: Sequence[str] = (),
    workers: int = 1,
) -> None:
    """Write the submission and the report of its flight check.

    segment_json: segmentations of the volumes. volumes_csv: the rows to answer; an empty class_label stands for
    `classes` and whatever else was segmented. Rows without a segmentation are zeros; a row without geometry takes that
    of its volume, and is left out, as a problem, if no volume has one. Groups that were not segmented are
    formed from their parts where these make them up.
    The report: problems and warnings (lines), rows, zero_rows (no voxel set), not_predicted, approximate (rows of
    groups that lack some of their parts: these), sha256, size, rules, note.
    Raises ContractError if a segmentation is not what its JSON says.
    """
    segmentations = _segmentations(Path(segment_json))
    labels = sorted({*classes, *(label for record in segmentations.values() for label in record["classes"])})
    boxes = _targets(Path(segment_json)) | {
        crop: Lattice.from_dict(record["target"]) for crop, record in segmentations.items()
    }
    rows = read_manifest(volumes_csv, labels, boxes)
    left_out = [
        Problem(crop, "no geometry", "neither the table nor a volume has it", "give it in the table; left out")
        for crop in sorted(crops_without_geometry(volumes_csv) - set(boxes))
    ]
    zero_rows, not_predicted = [], []
    approximate: dict[str, list[str]] = {}
    with (
        replacing(out_zip) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
        ThreadPoolExecutor(max(1, workers)) as pool,
    ):
        group = json.dumps({"zarr_format": 2}).encode()
        _add(archive, ".zgroup", group)
        for crop in sorted({row.crop for row in rows}):
            _add(archive, f"{crop}/.zgroup", group)
        for row in rows:
            name = f"{row.crop}/{row.label}"
            read, dtype = _source(segmentations.get(row.crop), row)
            if read is None:
                not_predicted.append(name)
            elif lacking := segmentations[row.crop].get("approximate", {}).get(row.label):
                approximate[name] = lacking
            if not _write_array(archive, pool, row, read, dtype):
                zero_rows.append(name)
        logger.info("%s: %d arrays, %d of them empty", out_zip, len(rows), len(zero_rows))
    checked = check(str(out_zip), rows, workers=workers)
    problems = left_out + [problem for problem in checked if problem.fault != "all empty"]
    write_json(
        report_json,
        {
            "problems": as_json(problems, "error"),
            "warnings": as_json(problems, "warning"),
            "rows": len(rows),
            "zero_rows": zero_rows,
            "not_predicted": not_predicted,
            "approximate": approximate,
            "sha256": file_digest(out_zip),
            "size": Path(out_zip).stat().st_size,
            "rules": rules,
            "note": get_rules(rules).note if rules else PORTAL_NOTE,
        },
    )


def _segmentations(path: Path) -> dict[str, dict[str, Any]]:
    """Return the records of volumes that were segmented by crop name, with `folder`: where their arrays lie."""
    result: dict[str, dict[str, Any]] = {}
    for record in read_json(path, "run again with -R segment")["records"]:
        if record["status"] != "ok":
            logger.warning("%s: %s (%s); its rows will be zeros", record["name"], record["status"], record["cause"])
            continue
        crop = record["name"].rpartition("/")[2]
        if crop in result:
            raise ContractError(f"{path}: {crop} is in it twice, as {result[crop]['name']} and {record['name']}")
        result[crop] = {**record, "folder": path.parent / record["path"]}
    return result


def _targets(path: Path) -> dict[str, Lattice]:
    """Return the box of every volume that has one, by crop name, whatever became of the volume."""
    records = read_json(path, "run again with -R segment")["records"]
    return {
        record["name"].rpartition("/")[2]: Lattice.from_dict(record["target"])
        for record in records
        if record.get("target")
    }


def _source(record: Mapping[str, Any] | None, row: ManifestRow) -> tuple[Read | None, np.dtype[Any]]:
    """Return how to read boxes of the row's array on the manifest's voxels, and the dtype to store.

    None if the class was not segmented and cannot be formed from classes that were.
    """
    instance = is_instance(row.label)
    dtype = np.dtype(np.uint16 if instance else np.uint8)
    if record is None or (row.dataset and record["dataset"] != row.dataset):
        return None, dtype
    container = Segmentations(str(record["folder"]), record["folder"])
    array = container.array("", row.label) if row.label in record["classes"] else None
    if row.label in record["classes"] and array is None:
        raise ContractError(f"{record['folder']}/{row.label}: missing; run again with -R segment")
    if array is not None:
        read = _on_target([array], row, union=False)
    elif row.label in CLASSES and derivable(row.label, record["classes"]):
        parts = [container.array("", part) for part in parts_of(row.label, record["classes"])]
        if any(part is None for part in parts):
            raise ContractError(f"{record['folder']}: a part of {row.label} is missing; run again with -R segment")
        read = _on_target([part for part in parts if part is not None], row, union=True)
    else:
        return None, dtype
    if not instance:
        return lambda lower, upper: (read(lower, upper) > 0).astype(np.uint8), dtype
    if array is None:
        united = read((0, 0, 0), row.lattice.shape) > 0
        ids = cc3d.connected_components(united, out_dtype=np.uint32)
        return _of_array(ids), _id_dtype(int(ids.max()))
    if array.dtype.kind not in "bui":
        raise DataError(f"{array.name}: ids of dtype {array.dtype}; integers are needed")
    largest = 0
    if array.dtype.itemsize > 2:
        largest = max((int(array.read(*box).max()) for box in _boxes(array.shape)), default=0)
    return read, _id_dtype(largest)


def _id_dtype(largest: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32)


def _on_target(arrays: Sequence[ChunkedArray], row: ManifestRow, *, union: bool) -> Read:
    """Return how to read boxes of the arrays, or of their union, on the manifest's voxels.

    Arrays on these very voxels are read box by box; others are resampled whole, once, aligned by their edges.
    """
    readers: list[Read] = []
    for array in arrays:
        if array.voxel_size is None or array.translation is None:
            raise ContractError(f"{array.name}: voxel_size or translation is missing; run again with -R segment")
        source = Lattice(array.voxel_size, array.translation, array.shape)  # type: ignore[arg-type]
        if source.same_as(row.lattice):
            readers.append(array.read)
        else:
            matched = match_geometry(
                array[:],
                row.label,
                source.voxel_nm,
                source.translation_nm,
                row.lattice.voxel_nm,
                row.lattice.shape,
                row.lattice.translation_nm,
                rules="clean",
            )
            readers.append(_of_array(matched))
    if not union:
        return readers[0]
    return lambda lower, upper: np.logical_or.reduce([read(lower, upper) > 0 for read in readers])


def _of_array(array: np.ndarray) -> Read:
    return lambda lower, upper: array[tuple(slice(lo, hi) for lo, hi in zip(lower, upper, strict=True))]


def _boxes(shape: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (lower, upper) of the boxes that become chunks."""
    for start in product(*(range(0, n, CHUNK) for n in shape)):
        yield list(start), [min(s + CHUNK, n) for s, n in zip(start, shape, strict=True)]


def _write_array(
    archive: zipfile.ZipFile, pool: ThreadPoolExecutor, row: ManifestRow, read: Read | None, dtype: np.dtype[Any]
) -> bool:
    """Add the row's array to the zip; chunks without any voxel set are left out. Returns whether any is set."""
    name, shape = f"{row.crop}/{row.label}", row.lattice.shape
    chunk = [min(CHUNK, n) for n in shape]
    meta = {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": chunk,
        "dtype": dtype.newbyteorder("<").str,
        "compressor": CODEC.get_config(),
        "fill_value": 0,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
    }
    attributes = {
        "voxel_size": list(row.lattice.voxel_nm),
        "translation": list(row.lattice.translation_nm),
        "shape": list(shape),
    }
    _add(archive, f"{name}/.zarray", json.dumps(meta).encode())
    _add(archive, f"{name}/.zattrs", json.dumps(attributes).encode())
    if read is None:
        return False

    def encode(box: tuple[list[int], list[int]]) -> tuple[str, bytes | None]:
        lower, upper = box
        voxels = read(lower, upper)
        if not voxels.any():
            return "", None
        whole = np.zeros(chunk, dtype.newbyteorder("<"))
        whole[tuple(slice(0, n) for n in voxels.shape)] = voxels
        index = [lo // c for lo, c in zip(lower, chunk, strict=True)]
        return ".".join(map(str, index)), bytes(CODEC.encode(whole))

    any_set = False
    for key, data in pool.map(encode, _boxes(shape)):
        if data is not None:
            any_set = True
            _add(archive, f"{name}/{key}", data)
    return any_set


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Add a member without a time, so that the same content gives the same file."""
    info = zipfile.ZipInfo(name, EPOCH)
    info.external_attr = 0o644 << 16
    info.create_system = 3
    archive.writestr(info, data)
