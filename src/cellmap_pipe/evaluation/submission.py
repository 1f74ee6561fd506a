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

from cellmap_pipe.classes import CLASSES, missing_atoms, parts_of
from cellmap_pipe.errors import ConfigError, ContractError, DataError, GeometryError
from cellmap_pipe.evaluation.alignment import align, is_instance
from cellmap_pipe.evaluation.components import Components
from cellmap_pipe.evaluation.container import ChunkedArray, Container, Segmentations, open_container, segmented
from cellmap_pipe.evaluation.flight import check
from cellmap_pipe.evaluation.flight_content import LARGEST_ID, check_wrapped, scan
from cellmap_pipe.evaluation.forecast import read_validation
from cellmap_pipe.evaluation.manifest import ManifestRow, crop_name, crops_without_geometry, read_manifest
from cellmap_pipe.evaluation.problem import Problem, lines_of
from cellmap_pipe.evaluation.rules import PORTAL_NOTE, get_rules
from cellmap_pipe.files import file_digest, read_json, replacing, write_json
from cellmap_pipe.geometry import TOLERANCE_NM, Lattice, shape3, vec3

logger = logging.getLogger(__name__)

CHUNK = 128
# Plain zstd: of several threads, blosc lets the first to finish write first, so its bytes differ from run to run
CODEC = numcodecs.Zstd(level=3)
# Groups that are not formed without some of their parts: what is lacking (cytosol, nucleoplasm) is most of them
WHOLE = ("cell", "nuc")
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
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the submission and the report of its flight check.

    predictions: the JSON of segmentations, or a zarr folder or zip with crop{N}/{label}: plain arrays, or groups of
    resolution levels (OME-NGFF), of which the one nearest the manifest's voxels is taken. An array without voxel size
    must have the row's shape. volumes_csv: the rows to answer; an empty class_label stands for `classes` and whatever
    else was predicted. Rows without a prediction are zeros; a row without geometry takes that of its segmented volume,
    and is left out, as a problem, if there is none. Groups that were not predicted are formed from the parts that
    were, instance groups as the components of the union; those of segmentations, and `WHOLE` ones, only where no part
    is lacking.
    Every array is brought to the manifest's voxels once, aligned by its edges (`align` by the rules `clean`). Ids take
    the nearest voxel. Masks and probabilities are resampled linearly with anti-aliasing and compared with 0.5 after
    that, so that a boundary stays where the probabilities put it. Arrays that need no resampling are streamed.
    scores: validation scores (results/scores/{source}/fold*.json), for the forecast. progress: called with (arrays
    packed, arrays in all).
    The report: problems and warnings (lines), rows, zero_rows (no voxel set), not_predicted, approximate (rows of
    groups that lack some of their parts: these), segmentations (fingerprint by volume; None for predictions in a
    folder or zip), forecast (`Validation.forecast`; None without scores), sha256, size, rules, note.
    Raises ContractError if a segmentation is not what its JSON says, DataError for predictions that cannot be packed,
    ConfigError if what is written would replace or lie in what is read.
    """
    _check_places(Path(out_zip), Path(report_json), Path(predictions), [Path(p) for p in (volumes_csv, *scores)])
    volumes = _volumes(Path(predictions))
    labels = sorted({*classes, *(label for volume in volumes.values() for label in volume.classes)})
    boxes, fingerprints = _targets(Path(predictions)), _fingerprints(Path(predictions))
    rows = read_manifest(volumes_csv, labels, boxes)
    problems = [
        Problem(crop, "no geometry", "neither the table nor a volume has it", "give it in the table; left out")
        for crop in sorted(crops_without_geometry(volumes_csv) - set(boxes))
    ]
    problems += _unused(volumes, rows)
    problems += _overlooked(Path(predictions), volumes, rows)
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
        for done, row in enumerate(rows, start=1):
            name = f"{row.crop}/{row.label}"
            volume = volumes.get(row.crop)
            try:
                array = _source(volume, row)
                any_set = _write_array(archive, pool, row, array)
            except DataError as error:
                place = "" if name in str(error) else f"{name}: "
                raise DataError(f"{place}{error}") from error
            if progress:
                progress(done, len(rows))
            if not any_set:
                zero_rows.append(name)
            if array is None or volume is None:
                not_predicted.append(name)
                continue
            problems += array.problems
            if lacking := array.lacking or volume.approximate.get(row.label):
                approximate[name] = list(lacking)
        logger.info("%s: %d arrays, %d of them empty", out_zip, len(rows), len(zero_rows))
    known = validation.presence() if validation else {}
    # Rows that are empty are listed; a warning is due where one was predicted and the class is known to be usual
    problems += [
        problem
        for problem in check(str(out_zip), rows, workers=workers, presence=known)
        if problem.fault != "all empty"
        or (problem.array.rpartition("/")[2] in known and problem.array not in not_predicted)
    ]
    wanted = {row.label for row in rows}
    answered = {row.label for row in rows if f"{row.crop}/{row.label}" not in zero_rows}
    write_json(
        report_json,
        {
            "problems": lines_of(problems, "error"),
            "warnings": lines_of(problems, "warning"),
            "rows": len(rows),
            "zero_rows": zero_rows,
            "not_predicted": not_predicted,
            "approximate": approximate,
            "segmentations": fingerprints,
            "forecast": validation.forecast(wanted, wanted - answered) if validation else None,
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
            if isinstance(self.container, Segmentations):
                raise ContractError(f"{where}/{label}: missing; run again with -R segment")
            raise DataError(f"{where}/{label}: is not there any more; write it again")
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
            which = _zarr_v3(container)
            raise DataError(f"{path}: holds no arrays crop{{N}}/{{label}} of zarr v2{which}; write them so")
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


def _zarr_v3(container: Container) -> str:
    """Return what is zarr v3 in a container without arrays of zarr v2, to follow a message."""
    for crop in container.crops():
        for name in (crop, *(f"{crop}/{label}" for label in container.children(crop))):
            if container.read(f"{name}/zarr.json") is not None:
                return f" ({name} is zarr v3: zarr_format=2 is needed)"
    return ""


def _check_places(out_zip: Path, report: Path, predictions: Path, others: Sequence[Path]) -> None:
    """Raise ConfigError if a file to write is one that is read, or the zip lies in the folder of the predictions.

    A folder that holds a zip stands for the zip: packed again, it would give the old one.
    """
    read = {path.resolve() for path in (predictions, *others)}
    if out_zip.resolve() in read:
        raise ConfigError(f"{out_zip}: would replace what is read; give another name for the zip file")
    if report.resolve() in {*read, out_zip.resolve()}:
        raise ConfigError(f"{report}: the report would replace another file of this command; give another --report")
    if predictions.is_dir() and predictions.resolve() in out_zip.resolve().parents:
        raise ConfigError(f"{out_zip}: lies in the folder of the predictions, {predictions}; write it outside of it")


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


def _fingerprints(path: Path) -> dict[str, str | None] | None:
    """Return the fingerprint of every segmented volume, by which one notices that the submission is older than it."""
    if path.suffix != ".json":
        return None
    records = read_json(path, "run again with -R segment")["records"]
    return {record["name"]: record.get("fingerprint") for record in records}


def _unused(volumes: Mapping[str, _Volume], rows: Sequence[ManifestRow]) -> list[Problem]:
    """Return predicted crops that no row asks for: a misspelt name, most likely."""
    crops = {row.crop for row in rows}
    detail, remedy = "predicted, but not in the manifest", "rename it, if it is one of the manifest's; left out"
    return [
        Problem(volumes[crop].crop or crop, "extra crop", detail, remedy, "warning")
        for crop in sorted(volumes)
        if crop not in crops and not isinstance(volumes[crop].container, Segmentations)
    ]


def _overlooked(path: Path, volumes: Mapping[str, _Volume], rows: Sequence[ManifestRow]) -> list[Problem]:
    """Return crops without a prediction, and what lies where a row's prediction is looked for without being one.

    Raises DataError if no crop of the rows is among the predictions: nothing but zeros would be packed.
    """
    if path.suffix == ".json":
        return []
    container = open_container(path)
    folders = {crop_name(folder): folder for folder in container.crops()}
    crops = sorted({row.crop for row in rows})
    if rows and not any(crop in folders for crop in crops):
        names = ", ".join(sorted(folders.values())[:6])
        raise DataError(f"{path}: none of its folders ({names}) is a crop of the manifest; name them crop{{N}}")
    detail, remedy = "there is no folder of it: all its rows are zeros", "predict it, if it is to score"
    problems = [Problem(crop, "crop not predicted", detail, remedy, "warning") for crop in crops if crop not in folders]
    for crop in sorted(set(crops) & set(volumes)):
        unknown = "no class of the challenge; left out"
        problems += [
            Problem(f"{volumes[crop].crop}/{name}", "extra label", unknown, "rename it, if it is one", "warning")
            for name in volumes[crop].classes
            if name not in CLASSES and name not in {row.label for row in rows}
        ]
    for row in rows:
        if row.crop not in folders or (row.crop in volumes and row.label in volumes[row.crop].classes):
            continue
        name = f"{folders[row.crop]}/{row.label}"
        inner = container.children(name)
        if "zarr.json" in inner:
            detail = f"{name}/zarr.json is zarr v3, and is not packed"
            problems.append(Problem(name, "not zarr v2", detail, "write it with zarr_format=2"))
        elif inner:
            detail = f"it holds {', '.join(inner[:4])}, but no array of zarr v2, and is not packed"
            problems.append(Problem(name, "unreadable array", detail, "write a plain array"))
    return problems


@dataclass(frozen=True)
class _Source:
    """An array on the manifest's voxels. layers: yields CHUNK planes at a time, in order; dtype: what to store.

    lacking: classes that a group formed from its parts is without.
    """

    layers: Layers
    dtype: np.dtype[Any]
    problems: Sequence[Problem] = ()
    lacking: Sequence[str] = ()


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
    predicted = [name for name in volume.classes if name in CLASSES]
    names = parts_of(row.label, predicted) if row.label in CLASSES else []
    lacking = missing_atoms(row.label, names) if names else []
    # Of our own segmentations the configuration says which groups are formed without some of their parts
    if not names or (lacking and (row.label in WHOLE or isinstance(volume.container, Segmentations))):
        return None
    parts = [_on_target(volume.image(part, row), row) for part in names]
    problems = [problem for _, of_part in parts for problem in of_part]

    def union() -> Iterator[np.ndarray]:
        for layers in zip(*(_layers(array) for array, _ in parts), strict=True):
            yield np.logical_or.reduce([layer > 0 for layer in layers])

    if not instance:
        return _Source(union, np.dtype(np.uint8), problems, lacking)
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

    return _Source(objects, numbers.dtype, problems, lacking)


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
    return _id_dtype(int(content.largest)), check_wrapped(name, array, content)


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
