"""Conversion of crops to NIfTI pairs on a grid: EM as uint8, labels as label map, and a record of what was found.

One shard converts the crops that hash to it. Per crop these files are written under the folder of the grid:
`images/{dataset}_crop{N}_0000.nii.gz`, `labels/{dataset}_crop{N}.nii.gz`, `instances/{dataset}_crop{N}_{class}.nii.gz`
where the source holds instance ids, and last its record, `records/{dataset}_crop{N}.json`, which the shard's JSON
collects. A crop whose inputs and settings are those of its record is not converted again.

Crops may be larger than memory: voxels are read, resampled, counted and written slab by slab. The few arrays as large
as a crop lie in temporary files where they are large, without a name, so that nothing is left of a killed run.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from glob import escape
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.errors import (
    BudgetError,
    CellmapError,
    ConfigError,
    ContractError,
    DataError,
    GeometryError,
    MissingError,
)
from cellmap_pipe.files import (
    canonical_json,
    check_file,
    describe_file,
    digest,
    file_digest,
    read_json,
    write_json,
    write_text,
)
from cellmap_pipe.geometry import Lattice, Vec3, vec3
from cellmap_pipe.prepare.crops import annotated_classes, read_crops
from cellmap_pipe.prepare.em import EMBlock, choose_level, read_em
from cellmap_pipe.prepare.instances import count_ids, has_instances, resample_ids
from cellmap_pipe.prepare.label_map import build_label_map
from cellmap_pipe.prepare.labels import LabelArray, as_mapping, empty_means, is_empty
from cellmap_pipe.prepare.labels import read_label as _read_label
from cellmap_pipe.prepare.ngff import Image, Level, chunk_files, read_image
from cellmap_pipe.prepare.nifti import read_nifti, write_nifti, write_nifti_slabs
from cellmap_pipe.prepare.plan import check_budget, target_lattice
from cellmap_pipe.prepare.registration import register
from cellmap_pipe.prepare.resample import lattice_weights
from cellmap_pipe.prepare.state_table import count_states, count_values, encode_table

logger = logging.getLogger(__name__)

# Whole-crop arrays of more bytes lie in a file: the system can write its pages out when memory is short.
SCRATCH_BYTES = 256 * 1024**2

_SUFFIXES = {"images": "_0000.nii.gz", "labels": ".nii.gz", "instances": ".nii.gz", "records": ".json"}

# Name of an instance file: dataset, crop, class. Neither a crop's name nor the word "crop" has an underscore.
_INSTANCE_NAME = re.compile(r"(?P<dataset>.+)_(?P<crop>crop[^_]+)_(?P<name>.+)\.nii\.gz")

__all__ = ["Settings", "bulk_paths", "convert_shard", "map_isolated", "read_nifti", "shard_of", "write_nifti"]


@dataclass(frozen=True)
class Settings:
    """What determines a conversion besides its input: grid, voxel size in nm (None: the labels' own), classes, bounds.

    labels: `empty`, `empty_by_class`, `empty_by_crop`: whether an all-zero array means "absent" or "unknown".
    context_nm, max_train_gb: see `plan.check_budget`; they decide whether a crop is converted, not how.
    """

    grid: str
    voxel_nm: Vec3 | None
    classes: tuple[str, ...]
    labels: dict[str, Any]
    max_upsample: float
    revision: int = 0
    context_nm: float = 0
    max_train_gb: float | None = None

    def empty_means(self, crop: str, name: str) -> str:
        """Return what an all-zero array means, "absent" or "unknown"; see `labels.empty_means`."""
        return empty_means(self.labels, crop, name)


def shard_of(crop: str, shards: int) -> int:
    """Return the shard, 0..shards-1, that owns the files of a crop (`dataset/cropN`)."""
    return int(hashlib.sha256(crop.encode()).hexdigest()[:16], 16) % shards


def convert_shard(
    crops_csv: str | Path,
    out_json: str | Path,
    *,
    data_root: str | Path,
    shard: int,
    shards: int,
    grid_name: str,
    voxel_nm: Sequence[float] | str,
    classes: Sequence[str],
    labels: Mapping[str, Any],
    max_upsample: float,
    nifti_dir: str | Path,
    workers: int,
    revision: int = 0,
    context_nm: float = 0,
    max_train_gb: float | None = None,
) -> None:
    """Convert the crops of one shard and write `out_json`: {grid, voxel_nm, classes, shard, shards, records}.

    voxel_nm: (z, y, x) in nm, or "native" for each crop's own label voxel. workers: processes, one crop each; where
    there are fewer crops, threads that compress. context_nm, max_train_gb: a crop that would take more in the training
    store is not converted.
    A crop that cannot be used is recorded as failed, with its cause. Any other fault (disk full, memory, a bug) lets
    the other crops finish and is raised then, naming the crop; `out_json` is not written.
    """
    folder, root = Path(nifti_dir), Path(data_root)
    if isinstance(voxel_nm, str) and voxel_nm != "native":
        raise ConfigError(f"grids.{grid_name}.voxel_nm: '{voxel_nm}' is neither three numbers (z, y, x) nor 'native'")
    voxel = None if isinstance(voxel_nm, str) else vec3(voxel_nm)
    settings = Settings(
        grid_name, voxel, tuple(classes), dict(labels), float(max_upsample), revision, context_nm, max_train_gb
    )
    rows = [row for row in read_crops(crops_csv) if shard_of(row["crop"], shards) == shard]
    _remove_unlisted(folder, {row["crop"] for row in rows}, shard, shards)
    threads = max(1, workers // max(1, len(rows)))
    records = map_isolated(_convert_recorded, [(row, root, folder, settings, threads) for row in rows], workers)
    for record in records:
        log = logger.info if record["status"] == "ok" else logger.warning
        log("%s: %s %s", record["crop"], record["status"], record["cause"])
    contract = {
        "grid": grid_name,
        "voxel_nm": "native" if voxel is None else list(voxel),
        "classes": list(classes),
        "shard": shard,
        "shards": shards,
        "records": sorted(records, key=lambda record: str(record["crop"])),
    }
    # without indentation: the records of 48 classes would else outgrow the megabyte that a declared output may have
    write_text(out_json, canonical_json(contract) + "\n")


def bulk_paths(folder: Path, crop: str) -> dict[str, Path]:
    """Return the files of a crop under the folder of its grid: image, label, record."""
    kinds = {"image": "images", "label": "labels", "record": "records"}
    return {kind: folder / sub / f"{_stem(crop)}{_SUFFIXES[sub]}" for kind, sub in kinds.items()}


def instance_path(folder: Path, crop: str, name: str) -> Path:
    """Return the file of a crop's instance ids of the class `name` under the folder of its grid."""
    return folder / "instances" / f"{_stem(crop)}_{name}{_SUFFIXES['instances']}"


def scratch_arrays(folder: Path, name: str) -> Callable[[Sequence[int], type[np.generic]], np.ndarray]:
    """Return a function of shape and dtype that allocates as np.empty does, large arrays in a file in `folder`.

    Those of more than SCRATCH_BYTES. The file loses its name (`.partial-*` and `name`) at once and goes with the array.
    """

    def allocate(shape: Sequence[int], dtype: type[np.generic]) -> np.ndarray:
        size = prod(shape) * np.dtype(dtype).itemsize
        if size <= SCRATCH_BYTES:
            return np.empty(shape, dtype)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".partial-{uuid4().hex}-{name}"
        with open(path, "w+b") as stream:
            path.unlink()
            # a full disk is an error here; met while writing to the map it would kill the process
            os.posix_fallocate(stream.fileno(), 0, size)
            return np.memmap(stream, dtype, "r+", shape=tuple(shape))

    return allocate


def _convert_recorded(
    row: dict[str, str], root: Path, folder: Path, settings: Settings, threads: int
) -> dict[str, Any]:
    """Return the record of one crop, converted if it is not there yet; a data fault becomes its cause."""
    paths = bulk_paths(folder, row["crop"])
    record: dict[str, Any] = {
        "crop": row["crop"],
        "dataset": row["dataset"],
        "grid": settings.grid,
        "status": "failed",
        "kind": "",
        "cause": "",
        "em": row["em"],
        "lattice": None,
        "label_lattice": None,
        "em_level": None,
        "classes": list(settings.classes),
        "annotated": [],
        "table": {},
        "label_dtype": "",
        "source_counts": {},
        "counts": {},
        "overlaps": {},
        "contradictions": [],
        "instances": {},
        "em_valid_fraction": 0.0,
        "em_inside_fraction": 0.0,
        "em_stats": None,
        "registration": None,
        "files": {},
        "warnings": [],
        "input_digest": "",
    }
    try:
        earlier = _convert(row, root, folder, settings, record, threads)
        if earlier is not None:
            return earlier
    except (DataError, GeometryError) as error:
        record["kind"] = record["kind"] or _kind(error)
        record["cause"] = str(error)
        record["files"] = {}
        record["instances"] = {}
        for path in (paths["image"], paths["label"], *_instance_files(folder, row["crop"])):
            path.unlink(missing_ok=True)
    write_json(paths["record"], record)
    return record


def _kind(error: Exception) -> str:
    """Return the word for why a crop could not be converted."""
    if isinstance(error, BudgetError):
        return "too large for the memory budget"
    return "resolution mismatch" if isinstance(error, GeometryError) else "unreadable"


def _convert(
    row: dict[str, str], root: Path, folder: Path, settings: Settings, record: dict[str, Any], threads: int
) -> dict[str, Any] | None:
    """Fill in `record` and write the crop's NIfTI files; return the earlier record instead if nothing has changed."""
    labels = _open_labels(root / row["labels"], row["crop"], settings, record)
    label_lattice = labels[0].level.lattice
    record["label_lattice"] = label_lattice.to_dict()
    target = target_lattice(label_lattice, settings.voxel_nm)
    record["lattice"] = target.to_dict()
    check_budget(target, settings.context_nm, settings.max_train_gb)
    try:
        image = read_image(root / row["em"])
    except MissingError:
        record["kind"] = "EM not downloaded"
        raise
    record["em_inside_fraction"] = round(label_lattice.overlap_fraction(image.levels[0].lattice), 6)
    record["input_digest"] = _input_digest(labels, image, target, settings, record)
    paths = bulk_paths(folder, row["crop"])
    earlier = _unchanged(paths["record"], folder, record["input_digest"])
    if earlier is not None:
        return earlier
    paths["record"].unlink(missing_ok=True)  # from here on it may not describe the files any more

    scratch = scratch_arrays(paths["image"].parent, paths["image"].name)
    em = read_em(image, target, max_upsample=settings.max_upsample, scratch=scratch)
    level = next(level for level in image.levels if Path(level.path).name == em.level)
    record["em_level"] = {"path": em.level, "voxel_nm": list(level.lattice.voxel_nm), "factors": list(em.factors)}
    record["em_valid_fraction"] = 1.0 if em.valid is None else round(np.count_nonzero(em.valid) / em.valid.size, 6)
    record["em_stats"] = _em_stats(em)
    label_map = build_label_map(
        labels, target, settings.classes, valid=em.valid, max_upsample=settings.max_upsample, scratch=scratch
    )
    record["source_counts"] |= label_map.source_counts
    record["overlaps"] = label_map.overlaps
    record["contradictions"] = label_map.contradictions
    used = np.flatnonzero(count_values(label_map.rows, len(label_map.table)))
    record["table"] = encode_table(label_map.table, used)
    record["label_dtype"] = label_map.rows.dtype.name
    record["counts"] = count_states(label_map.rows, label_map.table, settings.classes)
    registration = register(
        em.image, label_map.rows, label_map.table, settings.classes, em.valid, voxel_nm=target.voxel_nm
    )
    record["registration"] = registration.to_dict()
    record["warnings"] += _warnings(labels, label_map.source_counts, label_map.overlaps)

    write_nifti(paths["image"], em.image, target, threads=threads)
    write_nifti(paths["label"], label_map.rows, target, threads=threads)
    record["files"] = {kind: describe_file(paths[kind], folder) for kind in ("image", "label")}
    _write_instances(labels, row["crop"], target, folder, settings, record, threads)
    record["status"] = "ok"
    return None


def _write_instances(
    labels: Iterable[LabelArray],
    crop: str,
    target: Lattice,
    folder: Path,
    settings: Settings,
    record: dict[str, Any],
    threads: int,
) -> None:
    """Write the ids of the configured classes whose arrays hold any, and delete those of an earlier conversion."""
    earlier = set(_instance_files(folder, crop))
    for label in labels:
        marked = record["source_counts"][label.name]["present"]
        if label.name not in settings.classes or not has_instances(label) or not marked:
            continue
        path = instance_path(folder, crop, label.name)
        slabs = (slab for _, _, slab in resample_ids(label, target))
        write_nifti_slabs(path, slabs, target, threads=threads)
        record["instances"][label.name] = count_ids(label)
        record["files"][f"instances/{label.name}"] = describe_file(path, folder)
        earlier.discard(path)
    for path in earlier:
        path.unlink(missing_ok=True)


def _instance_files(folder: Path, crop: str) -> list[Path]:
    return sorted((folder / "instances").glob(f"{escape(_stem(crop))}_*{_SUFFIXES['instances']}"))


def _open_labels(path: Path, crop: str, settings: Settings, record: dict[str, Any]) -> list[LabelArray]:
    """Return the class arrays to use, those on the lattice of most of them first.

    Classes outside the configured ones are read only if they can say something of a configured one that has no array.
    """
    if not path.is_dir():
        raise DataError(f"{path}: there is no such crop folder")
    names = annotated_classes(path)
    labels = []
    for name in names:
        label = _read_label(path / name)
        if settings.empty_means(crop, name) == "unknown" and is_empty(label):
            voxels = label.level.lattice.voxels
            record["source_counts"][name] = {"present": 0, "absent": 0, "unknown": voxels}
            record["warnings"].append(f"{name}: its all-zero array is taken as unknown (labels.empty)")
        else:
            labels.append(label)
    record["annotated"] = [label.name for label in labels]
    if not labels:
        record["kind"] = "unannotated"
        raise DataError("nothing annotated")
    if set(settings.classes) <= set(record["annotated"]):
        labels = [label for label in labels if label.name in settings.classes]
    shapes = [label.level.lattice for label in labels]
    votes = [sum(a.same_as(b) for b in shapes) for a in shapes]
    if min(votes) < len(labels):
        record["warnings"].append("its class arrays do not all lie on one lattice; the crop is the box of most of them")
    order = sorted(range(len(labels)), key=lambda i: (-votes[i], np.prod(shapes[i].voxel_nm), i))
    return [labels[i] for i in order]


def _input_digest(
    labels: Sequence[LabelArray], image: Image, target: Lattice, settings: Settings, record: Mapping[str, Any]
) -> str:
    """Return a digest of all that determines the conversion: settings, metadata, and the bytes of the chunks read.

    record: as far as `_open_labels` filled it in; its source_counts are those of the arrays that say nothing.
    """
    level = choose_level(image, target, settings.max_upsample)
    weights = lattice_weights(level.lattice, target)
    chunks: dict[str, tuple[Level, Sequence[int], Sequence[int]]]
    chunks = {"em": (level, [w.start for w in weights], [w.stop for w in weights])}
    for label in labels:
        chunks |= {name: (part, [0, 0, 0], part.lattice.shape) for name, part in label.levels.items()}
    return digest(
        {
            "version": [RESULT_VERSIONS["convert"], settings.revision],
            "grid": settings.grid,
            "lattice": target.to_dict(),
            "classes": settings.classes,
            "em": record["em"],
            "annotated": record["annotated"],
            "withdrawn": record["source_counts"],
            "empty": {label.name: settings.empty_means(record["crop"], label.name) for label in labels},
            "max_upsample": settings.max_upsample,
            "attributes": {label.name: label.attributes for label in labels},
            "levels": [[Path(entry.path).name, entry.lattice.to_dict(), entry.dtype] for entry in image.levels],
            "chunks": {name: _chunk_digests(*entry) for name, entry in chunks.items()},
        }
    )


def _chunk_digests(level: Level, lower: Sequence[int], upper: Sequence[int]) -> list[Any]:
    files = chunk_files(level, lower, upper)
    return [level.lattice.to_dict(), level.dtype, [[os.path.relpath(p, level.path), file_digest(p)] for p in files]]


def _unchanged(path: Path, folder: Path, input_digest: str) -> dict[str, Any] | None:
    """Return the record in `path` if it was made from the same input and its files are there, else None."""
    try:
        record = read_json(path)
        if record["status"] != "ok" or record["input_digest"] != input_digest:
            return None
        for contract in record["files"].values():
            check_file(contract, folder, "")
    except (ContractError, KeyError, TypeError):
        return None
    return dict(record)


def _em_stats(em: EMBlock) -> dict[str, Any]:
    """Return min, max, mean, std and histogram (256 voxel counts) of the valid EM voxels; zeros if there are none."""
    histogram = count_values(em.image, 256, em.valid)
    total = int(histogram.sum())
    if not total:
        return {"min": 0, "max": 0, "mean": 0.0, "std": 0.0, "histogram": histogram.tolist()}
    values, found = np.arange(256), np.flatnonzero(histogram)
    mean = float((values * histogram).sum() / total)
    variance = float(((values - mean) ** 2 * histogram).sum() / total)
    return {
        "min": int(found[0]),
        "max": int(found[-1]),
        "mean": round(mean, 4),
        "std": round(variance**0.5, 4),
        "histogram": histogram.tolist(),
    }


def _warnings(
    labels: Sequence[LabelArray],
    counts: Mapping[str, Mapping[str, int]],
    overlaps: Mapping[str, int],
) -> list[str]:
    found = [f"{pair.replace('+', ' and ')} are both marked in {n} voxels" for pair, n in overlaps.items()]
    for label in labels:
        if label.mask is not None:
            continue  # what a mask leaves out is unknown, and its metadata do not count it
        stated = as_mapping(label.attributes["cellmap"]["annotation"].get("complement_counts"))
        found += [
            f"{label.name}: {counts[label.name][word]} voxels {word}, its metadata say {stated[word]}"
            for word in ("absent", "unknown")
            if word in stated and stated[word] != counts[label.name][word]
        ]
    return found


def _remove_unlisted(folder: Path, listed: set[str], shard: int, shards: int) -> None:
    """Delete this shard's files of crops that are no longer listed, and what killed runs of it left half-written."""
    for kind, suffix in _SUFFIXES.items():
        for path in sorted((folder / kind).glob(f"*{suffix}")):
            partial = path.name.startswith(".partial-")
            name = path.name.split("-", 2)[2] if partial else path.name
            crop = _crop_of(kind, name)
            if shard_of(crop, shards) == shard and (partial or crop not in listed):
                logger.info("%s: removed, %s", path, "abandoned" if partial else "its crop is no longer listed")
                path.unlink(missing_ok=True)


def _stem(crop: str) -> str:
    return crop.replace("/", "_")


def _crop_of(kind: str, name: str) -> str:
    """Return the crop, `dataset/cropN`, that a file in one of the grid's folders belongs to."""
    if kind == "instances" and (match := _INSTANCE_NAME.fullmatch(name)):
        return f"{match['dataset']}/{match['crop']}"
    return "/".join(name.removesuffix(_SUFFIXES[kind]).rsplit("_", 1))


def map_isolated(
    function: Callable[..., dict[str, Any]], arguments: Sequence[tuple[Any, ...]], workers: int
) -> list[dict[str, Any]]:
    """Return function(*a) for every `a`, by `workers` processes; all are tried before the first fault is raised."""
    results, faults = [], []

    def collect(label: str, call: Callable[[], dict[str, Any]]) -> None:
        try:
            results.append(call())
        except Exception as error:
            logger.exception("%s", label)
            faults.append((label, error))

    labels = [str(entry[0]["crop"]) for entry in arguments]
    if min(workers, len(arguments)) <= 1:
        for label, entry in zip(labels, arguments, strict=True):
            collect(label, lambda entry=entry: function(*entry))  # type: ignore[misc]
    else:
        # forked, because spawned workers would run the workflow's script once more
        with ProcessPoolExecutor(min(workers, len(arguments)), mp_context=get_context("fork")) as pool:
            futures = [pool.submit(function, *entry) for entry in arguments]
            for label, future in zip(labels, futures, strict=True):
                collect(label, future.result)
    if faults:
        label, error = faults[0]
        reason = " ".join(str(error).split()) or type(error).__name__
        others = f" (and {len(faults) - 1} more, see the log)" if len(faults) > 1 else ""
        raise CellmapError(
            f"{label}: {type(error).__name__}: {reason}{others}; remedy the cause and run again"
        ) from error
    return results
