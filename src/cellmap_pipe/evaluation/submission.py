"""Packing: every row of the manifest as a plain zarr v2 array in one zip file, the same bytes for the same input."""

import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np

from cellmap_pipe.classes import CLASSES, derivable, parts_of
from cellmap_pipe.errors import ContractError, DataError, GeometryError
from cellmap_pipe.evaluation.alignment import align, is_instance
from cellmap_pipe.evaluation.components import Components
from cellmap_pipe.evaluation.container import ChunkedArray, Container, Segmentations, open_container, segmented
from cellmap_pipe.evaluation.flight import LARGEST_ID, Problem, as_json, check, scan, validate
from cellmap_pipe.evaluation.forecast import Forecast, forecast, presence, read_validation
from cellmap_pipe.evaluation.manifest import ManifestRow, crop_name, crops_without_geometry, read_manifest
from cellmap_pipe.evaluation.rules import PORTAL_NOTE, get_rules
from cellmap_pipe.files import file_digest, read_json, replacing, write_json
from cellmap_pipe.geometry import TOLERANCE_NM, Lattice, shape3, vec3

__all__ = ["Problem", "pack", "validate"]

logger = logging.getLogger(__name__)

CHUNK = 128
# Plain zstd: of several threads, blosc lets the first to finish write first, so its bytes differ from run to run
CODEC = numcodecs.Zstd(level=3)
EPOCH = (1980, 1, 1, 0, 0, 0)
# An answer further off the manifest's voxels than that, in voxels, is reported: it is placed at the nearest
OFF_VOXELS = 0.05

Layers = Callable[[], Iterator[np.ndarray]]


def pack(
    predictions: str | os.PathLike[str],
    volumes_csv: str | os.PathLike[str],
    out_zip: str | os.PathLike[str],
    report_json: str | os.PathLike[str],
    *,
    rules: str = "csc-2026.06",
    classes: Sequence[str] = (),
    scores: Sequence[str | os.PathLike[str]] = (),
    workers: int = 1,
) -> None:
    """Write the submission and the report of its flight check.

    predictions: the JSON of segmentations, or a zarr folder or zip with crop{N}/{label}: plain arrays, or groups of
    resolution levels (OME-NGFF), of which the one nearest the manifest's voxels is taken. An array without voxel size
    must have the row's shape. volumes_csv: the rows to answer; an empty class_label stands for `classes` and whatever
    else was predicted. Rows without a prediction are zeros; a row without geometry takes that of its segmented volume,
    and is left out, as a problem, if there is none. Groups that were not predicted are formed from their parts where
    these make them up, instance groups as the components of the union.
    Every array is brought to the manifest's voxels once, aligned by its edges (`align` by the rules `clean`). Ids take
    the nearest voxel. Masks and probabilities are resampled linearly with anti-aliasing and compared with 0.5 after
    that, so that a boundary stays where the probabilities put it. Arrays that need no resampling are streamed.
    scores: validation scores (results/scores/{source}/fold*.json), for the forecast.
    The report: problems and warnings (lines), rows, zero_rows (no voxel set), not_predicted, approximate (rows of
    groups that lack some of their parts: these), forecast (of `forecast`, with source, rules, provisional and note of
    the scores; None without them), sha256, size, rules, note.
    Raises ContractError if a segmentation is not what its JSON says, DataError for predictions that cannot be packed.
    """
    volumes = _volumes(Path(predictions))
    labels = sorted({*classes, *(label for volume in volumes.values() for label in volume.classes)})
    boxes = _targets(Path(predictions))
    rows = read_manifest(volumes_csv, labels, boxes)
    problems = [
        Problem(crop, "no geometry", "neither the table nor a volume has it", "give it in the table; left out")
        for crop in sorted(crops_without_geometry(volumes_csv) - set(boxes))
    ]
    problems += _unused(volumes, rows)
    validation = read_validation(scores) if scores else None
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
            volume = volumes.get(row.crop)
            try:
                array = _source(volume, row)
                any_set = _write_array(archive, pool, row, array)
            except DataError as error:
                place = "" if name in str(error) else f"{name}: "
                raise DataError(f"{place}{error}") from error
            if not any_set:
                zero_rows.append(name)
            if array is None or volume is None:
                not_predicted.append(name)
                continue
            problems += array.problems
            if lacking := volume.approximate.get(row.label):
                approximate[name] = lacking
        logger.info("%s: %d arrays, %d of them empty", out_zip, len(rows), len(zero_rows))
    known = presence(validation[0]) if validation else {}
    # Rows that are empty are listed; a warning is due where one was predicted and the class is known to be usual
    problems += [
        problem
        for problem in check(str(out_zip), rows, workers=workers, presence=known)
        if problem.fault != "all empty"
        or (problem.array.rpartition("/")[2] in known and problem.array not in not_predicted)
    ]
    predicted: Forecast | None = None
    if validation:
        records, source, by_rules = validation
        wanted = {row.label for row in rows}
        answered = {row.label for row in rows if f"{row.crop}/{row.label}" not in zero_rows}
        version = get_rules(by_rules)
        predicted = {
            **forecast(records, wanted, wanted - answered),
            "source": source,
            "rules": by_rules,
            "provisional": version.provisional,
            "note": version.note,
        }
    write_json(
        report_json,
        {
            "problems": as_json(problems, "error"),
            "warnings": as_json(problems, "warning"),
            "rows": len(rows),
            "zero_rows": zero_rows,
            "not_predicted": not_predicted,
            "approximate": approximate,
            "forecast": predicted,
            "sha256": file_digest(out_zip),
            "size": Path(out_zip).stat().st_size,
            "rules": rules,
            "note": get_rules(rules).note if rules else PORTAL_NOTE,
        },
    )


@dataclass(frozen=True)
class _Volume:
    """What was predicted of one crop: classes, and the folder `crop` of the container in which their images lie.

    dataset: "" where it is not known. approximate: parts that a group lacks, by group.
    """

    container: Container
    crop: str
    classes: tuple[str, ...]
    dataset: str = ""
    approximate: Mapping[str, list[str]] = field(default_factory=dict)

    def image(self, label: str, row: ManifestRow) -> ChunkedArray:
        image = self.container.image(self.crop, label, row.lattice.voxel_nm)
        if image is None:
            where = f"{self.container.path}/{self.crop}".rstrip("/")
            raise ContractError(f"{where}/{label}: missing; run again with -R segment")
        return image


def _volumes(path: Path) -> dict[str, _Volume]:
    """Return what was predicted by crop name. Raises DataError if a crop is there twice, or nothing is."""
    volumes: dict[str, _Volume] = {}
    if path.suffix != ".json":
        container = open_container(path)
        for folder in container.crops():
            if classes := container.images(folder):
                crop = crop_name(folder)
                if crop in volumes:
                    raise DataError(f"{path}: {crop} is in it twice, as {volumes[crop].crop} and {folder}; keep one")
                volumes[crop] = _Volume(container, folder, tuple(classes))
        if not volumes:
            raise DataError(f"{path}: holds no arrays crop{{N}}/{{label}} of zarr v2; write them so")
        return volumes
    names: dict[str, str] = {}
    for record in segmented(path):
        crop = record["name"].rpartition("/")[2]
        if crop in names:
            raise ContractError(f"{path}: {crop} is in it twice, as {names[crop]} and {record['name']}")
        names[crop] = record["name"]
        container = Segmentations(str(record["folder"]), record["folder"])
        approximate = record.get("approximate", {})
        volumes[crop] = _Volume(container, "", tuple(record["classes"]), record["dataset"], approximate)
    return volumes


def _targets(path: Path) -> dict[str, Lattice]:
    """Return the box of every segmented volume that has one, by crop name, whatever became of the volume."""
    if path.suffix != ".json":
        return {}
    result = {}
    for record in read_json(path, "run again with -R segment")["records"]:
        if record["status"] != "ok":
            logger.warning("%s: %s (%s); its rows will be zeros", record["name"], record["status"], record["cause"])
        if record.get("target"):
            result[record["name"].rpartition("/")[2]] = Lattice.from_dict(record["target"])
    return result


def _unused(volumes: Mapping[str, _Volume], rows: Sequence[ManifestRow]) -> list[Problem]:
    """Return predicted crops that no row asks for: a misspelt name, most likely."""
    crops = {row.crop for row in rows}
    detail, remedy = "predicted, but not in the manifest", "rename it, if it is one of the manifest's; left out"
    return [
        Problem(volumes[crop].crop or crop, "extra crop", detail, remedy, "warning")
        for crop in sorted(volumes)
        if crop not in crops and not isinstance(volumes[crop].container, Segmentations)
    ]


@dataclass(frozen=True)
class _Source:
    """An array on the manifest's voxels. layers: yields CHUNK planes at a time, in order; dtype: what to store."""

    layers: Layers
    dtype: np.dtype[Any]
    problems: Sequence[Problem] = ()


def _source(volume: _Volume | None, row: ManifestRow) -> _Source | None:
    """Return the row's array, None if the class was not predicted and cannot be formed from classes that were."""
    if volume is None or (row.dataset and volume.dataset and volume.dataset != row.dataset):
        return None
    instance = is_instance(row.label)
    if row.label in volume.classes:
        image = volume.image(row.label, row)
        array, problems = _on_target(image, row)
        dtype = np.dtype(np.uint16 if instance else np.uint8)
        # Our own masks are 0 and 1, and uint16 is what is written: to read them twice would tell nothing
        if not (isinstance(volume.container, Segmentations) and image.dtype == dtype):
            dtype, found = _checked(image, row)
            problems += found
        if instance:
            return _Source(lambda: _layers(array), dtype, problems)
        return _Source(lambda: (layer > 0 for layer in _layers(array)), dtype, problems)
    if row.label not in CLASSES or not derivable(row.label, volume.classes):
        return None
    parts = [_on_target(volume.image(part, row), row) for part in parts_of(row.label, volume.classes)]
    problems = [problem for _, of_part in parts for problem in of_part]

    def union() -> Iterator[np.ndarray]:
        for layers in zip(*(_layers(array) for array, _ in parts), strict=True):
            yield np.logical_or.reduce([layer > 0 for layer in layers])

    if not instance:
        return _Source(union, np.dtype(np.uint8), problems)
    # Labelled twice, once to learn which labels belong together: so no label of the volume is kept
    components = Components()
    for layer in union():
        components.add_counted(layer)
    joined, n = components.join()
    numbers = joined.astype(_id_dtype(n))

    def objects() -> Iterator[np.ndarray]:
        again = Components()
        for layer in union():
            yield numbers[again.add(layer)]

    return _Source(objects, numbers.dtype, problems)


def _layers(array: Any) -> Iterator[np.ndarray]:
    for start in range(0, array.shape[0], CHUNK):
        yield array[start : start + CHUNK]


def _id_dtype(largest: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32)


def _checked(array: ChunkedArray, row: ManifestRow) -> tuple[np.dtype[Any], list[Problem]]:
    """Return the dtype that holds the ids or the mask, and what the check of the result could not see any more.

    Raises DataError for values that are no ids, or are not finite.
    """
    name, instance = f"{row.crop}/{row.label}", is_instance(row.label)
    if instance and array.dtype.kind not in "bui":
        raise DataError(f"{array.name}: ids of dtype {array.dtype}; integers are needed")
    content = scan(array)
    if content.damaged:
        raise DataError(content.damaged[0])
    if content.not_finite:
        raise DataError(f"{array.name}: NaN or infinity in it; write labels or probabilities")
    if not instance:
        if array.dtype.kind in "ui" and len(content.values - {0}) > 1:
            detail = f"values up to {content.largest}; every value above 0 is taken as the class"
            warning = Problem(
                name, "ids in a semantic class", detail, "give a mask, or probabilities as float", "warning"
            )
            return np.dtype(np.uint8), [warning]
        return np.dtype(np.uint8), []
    if content.smallest < 0:
        raise DataError(f"{array.name}: negative ids (smallest {content.smallest}); 0 is background, ids are positive")
    if content.largest > LARGEST_ID:
        raise DataError(f"{array.name}: ids above 2^32 (largest {content.largest}); number the objects from 1")
    problems = []
    if array.dtype.itemsize == 1 and array.dtype != bool and content.largest == np.iinfo(array.dtype).max:
        detail = f"ids reach {content.largest} in {array.dtype}: larger ones have wrapped, lost or merged"
        problems.append(Problem(name, "dtype that wraps ids", detail, "write uint16 or uint32"))
    return _id_dtype(int(content.largest)), problems


def _on_target(array: ChunkedArray, row: ManifestRow) -> tuple[Any, list[Problem]]:
    """Return the array on the manifest's voxels, read by planes, and what may be wrong with where it lies.

    Arrays that need no resampling are read as they are asked for; others are resampled whole, once.
    """
    if array.dtype.kind not in "buif":
        raise DataError(f"{array.name}: dtype {array.dtype}; bool, integers or floats are needed")
    name, target = f"{row.crop}/{row.label}", row.lattice
    if array.voxel_size is None or array.translation is None:
        lacking = "voxel_size" if array.voxel_size is None else "translation"
        if array.shape != target.shape:
            raise DataError(
                f"{array.name}: attribute {lacking} is missing and shape {list(array.shape)} is not the manifest's "
                f"{list(target.shape)}; write voxel_size and translation in nm, (z, y, x)"
            )
        detail = f"{array.name} has no {lacking}; its shape is the manifest's, and so it is taken as on its voxels"
        problems = [Problem(name, "no geometry", detail, "write voxel_size and translation", "warning")]
        source = target
    else:
        try:
            source = Lattice(vec3(array.voxel_size), vec3(array.translation), shape3(array.shape))
        except GeometryError as error:
            raise DataError(f"{array.name}: {error}") from error
        problems = _check_place(name, source, target)
    aligned = align(
        array,
        row.label,
        source.voxel_nm,
        source.translation_nm,
        target.voxel_nm,
        target.shape,
        target.translation_nm,
        rules="clean",
    )
    return aligned, problems


def _check_place(name: str, source: Lattice, target: Lattice) -> list[Problem]:
    """Return that a prediction does not cover its crop, or that its voxels lie between those of the manifest."""
    covered = target.overlap_fraction(source)
    where = f"voxel size {list(source.voxel_nm)}, translation {list(source.translation_nm)} nm, shape "
    where += f"{list(source.shape)}"
    remedy = "compare its voxel_size, translation and shape, (z, y, x) in nm, with the manifest"
    if covered == 0:
        return [Problem(name, "outside the crop", f"{where}: no voxel of the crop is predicted", remedy)]
    problems = []
    if covered < 1 - 1e-6:
        detail = f"{where}: {covered:.1%} of the crop is predicted, the rest is background"
        problems.append(Problem(name, "part of the crop", detail, remedy, "warning"))
    edges = zip(source.lower_nm, target.lower_nm, target.voxel_nm, strict=True)
    off = [(a - b) / v - round((a - b) / v) for a, b, v in edges]
    if any(abs(o) > max(OFF_VOXELS, TOLERANCE_NM / v) for o, v in zip(off, target.voxel_nm, strict=True)):
        detail = f"{where}: {[round(o, 3) for o in off]} voxels off those of the manifest; placed at the nearest"
        problems.append(Problem(name, "between the voxels", detail, remedy, "warning"))
    return problems


def _write_array(archive: zipfile.ZipFile, pool: ThreadPoolExecutor, row: ManifestRow, source: _Source | None) -> bool:
    """Add the row's array to the zip; chunks without any voxel set are left out. Returns whether any is set."""
    name, shape = f"{row.crop}/{row.label}", row.lattice.shape
    chunk = [min(CHUNK, n) for n in shape]
    default = np.dtype(np.uint16 if is_instance(row.label) else np.uint8)
    dtype = (default if source is None else source.dtype).newbyteorder("<")
    meta = {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": chunk,
        "dtype": dtype.str,
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

    def encode(voxels: np.ndarray) -> bytes | None:
        if not voxels.any():
            return None
        whole = np.zeros(chunk, dtype)
        whole[tuple(slice(0, n) for n in voxels.shape)] = voxels
        return bytes(CODEC.encode(whole))

    any_set = False

    def add(encoded: Mapping[str, Future[bytes | None]]) -> None:
        nonlocal any_set
        for key, future in encoded.items():
            data = future.result()
            if data is not None:
                any_set = True
                _add(archive, f"{name}/{key}", data)

    # A layer is compressed while the next one is read
    before: dict[str, Future[bytes | None]] = {}
    for z, layer in enumerate(source.layers() if source is not None else ()):
        encoded = {}
        for y, x in product(range(0, shape[1], chunk[1]), range(0, shape[2], chunk[2])):
            part = layer[:, y : y + chunk[1], x : x + chunk[2]]
            encoded[f"{z}.{y // chunk[1]}.{x // chunk[2]}"] = pool.submit(encode, part)
        add(before)
        before = encoded
    add(before)
    return any_set


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Add a member without a time, so that the same content gives the same file."""
    info = zipfile.ZipInfo(name, EPOCH)
    info.external_attr = 0o644 << 16
    info.create_system = 3
    archive.writestr(info, data)
