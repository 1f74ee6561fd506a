"""Conversion of crops to NIfTI pairs on a grid: EM as uint8, labels as label map, and a record of what was found.

One shard converts the crops that hash to it. Per crop three files are written under the folder of the grid:
`images/{dataset}_crop{N}_0000.nii.gz`, `labels/{dataset}_crop{N}.nii.gz`, and last its
record, `records/{dataset}_crop{N}.json`, which the shard's JSON collects. A crop whose inputs and settings are those of
its record is not converted again.

NIfTI: first axis x, then y, z (arrays in this library are z, y, x); voxel size and position of voxel 0's centre in the
affine are numbers in nm. NIfTI knows no nanometre, so xyzt_units is "unknown" and `descrip` says it.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from isal import igzip
from nibabel import Nifti1Header

from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.errors import CellmapError, ConfigError, ContractError, DataError, GeometryError
from cellmap_pipe.files import (
    canonical_json,
    check_file,
    describe_file,
    digest,
    file_digest,
    read_json,
    replacing,
    write_json,
    write_text,
)
from cellmap_pipe.geometry import Lattice, Vec3, vec3
from cellmap_pipe.prepare.crops import annotated_classes, read_crops
from cellmap_pipe.prepare.em import EMBlock, choose_level, read_em
from cellmap_pipe.prepare.labels import (
    LabelArray,
    as_mapping,
    build_label_map,
    count_states,
    count_values,
    empty_means,
    encode_table,
    is_empty,
)
from cellmap_pipe.prepare.labels import read_label as _read_label
from cellmap_pipe.prepare.ngff import Image, Level, chunk_files, read_image
from cellmap_pipe.prepare.registration import register
from cellmap_pipe.prepare.resample import lattice_weights

logger = logging.getLogger(__name__)

DESCRIPTION = b"units nm; voxel axes x,y,z; offset = centre of voxel 0"
_HEADER_BYTES = 352  # NIfTI-1 header and its empty extension flag
_WRITE_BYTES = 8 * 1024**2


@dataclass(frozen=True)
class Settings:
    """What determines a conversion besides its input: grid, voxel size in nm (None: the labels' own), classes, bounds.

    labels: `empty`, `empty_by_class`, `empty_by_crop`: whether an all-zero array means "absent" or "unknown".
    """

    grid: str
    voxel_nm: Vec3 | None
    classes: tuple[str, ...]
    labels: dict[str, Any]
    max_upsample: float
    revision: int = 0

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
) -> None:
    """Convert the crops of one shard and write their records to `out_json`: {grid, voxel_nm, classes, records}.

    voxel_nm: (z, y, x) in nm, or "native" for each crop's own label voxel. workers: processes, one crop each.
    A crop that cannot be used is recorded as failed, with its cause. Any other fault (disk full, memory, a bug) lets
    the other crops finish and is raised then, naming the crop; `out_json` is not written.
    """
    folder, root = Path(nifti_dir), Path(data_root)
    if isinstance(voxel_nm, str) and voxel_nm != "native":
        raise ConfigError(f"grids.{grid_name}.voxel_nm: '{voxel_nm}' is neither three numbers (z, y, x) nor 'native'")
    voxel = None if isinstance(voxel_nm, str) else vec3(voxel_nm)
    settings = Settings(grid_name, voxel, tuple(classes), dict(labels), float(max_upsample), revision)
    rows = [row for row in read_crops(crops_csv) if shard_of(row["crop"], shards) == shard]
    _remove_unlisted(folder, {row["crop"] for row in rows}, shard, shards)
    records = map_isolated(_convert_recorded, [(row, root, folder, settings) for row in rows], workers)
    for record in records:
        log = logger.info if record["status"] == "ok" else logger.warning
        log("%s: %s %s", record["crop"], record["status"], record["cause"])
    contract = {
        "grid": grid_name,
        "voxel_nm": "native" if voxel is None else list(voxel),
        "classes": list(classes),
        "records": sorted(records, key=lambda record: str(record["crop"])),
    }
    # without indentation: the records of 48 classes would else outgrow the megabyte that a declared output may have
    write_text(out_json, canonical_json(contract) + "\n")


def bulk_paths(folder: Path, crop: str) -> dict[str, Path]:
    """Return the files of a crop under the folder of its grid: image, label, record."""
    stem = crop.replace("/", "_")
    return {
        "image": folder / "images" / f"{stem}_0000.nii.gz",
        "label": folder / "labels" / f"{stem}.nii.gz",
        "record": folder / "records" / f"{stem}.json",
    }


def write_nifti(path: str | Path, volume: np.ndarray, lattice: Lattice) -> None:
    """Write `volume` (uint8 or uint16, z, y, x) on `lattice` atomically as .nii.gz; equal input gives equal bytes.

    Raises DataError if an axis is longer than NIfTI-1 can say (32767).
    """
    if max(volume.shape) > np.iinfo(np.int16).max:
        raise DataError(f"{path}: shape {volume.shape} does not fit into NIfTI-1 (32767 per axis); use a coarser grid")
    header = Nifti1Header(endianness="<")
    header.set_data_dtype(volume.dtype)
    header.set_data_shape(volume.shape[::-1])
    affine = np.diag([*lattice.voxel_nm[::-1], 1.0])
    affine[:3, 3] = lattice.translation_nm[::-1]
    header.set_qform(affine, code="aligned")
    header.set_sform(affine, code="aligned")
    header.set_xyzt_units("unknown", "unknown")
    header["descrip"] = DESCRIPTION
    header["vox_offset"] = _HEADER_BYTES
    header.set_slope_inter(1, 0)
    planes = max(1, _WRITE_BYTES // max(1, volume[:1].nbytes))
    with (
        replacing(path) as partial,
        open(partial, "wb") as raw,
        # name and time stay out of the gzip header; x runs fastest in our arrays as in NIfTI's, so the order is right
        closing(igzip.IGzipFile(filename="", mode="wb", compresslevel=2, fileobj=raw, mtime=0)) as stream,
    ):
        stream.write(header.binaryblock + b"\0\0\0\0")
        for z in range(0, len(volume), planes):
            stream.write(np.ascontiguousarray(volume[z : z + planes], volume.dtype.newbyteorder("<")).data)


def read_nifti(path: str | Path) -> np.ndarray:
    """Return the volume that `write_nifti` wrote, uint8 or uint16 (z, y, x), checked against gzip's own checksum.

    Raises ContractError, naming the file and the remedy, if it is missing, truncated or damaged.
    """
    try:
        with igzip.open(path, "rb") as stream:
            header = Nifti1Header.from_fileobj(BytesIO(stream.read(_HEADER_BYTES)))
            volume = np.empty(header.get_data_shape()[::-1], header.get_data_dtype())
            view = volume.reshape(-1).view(np.uint8).data
            filled = 0
            while filled < len(view) and (n := stream.readinto(view[filled:])):
                filled += n
            if filled < len(view) or stream.read(1):
                raise ValueError(f"{filled} bytes of voxels, {len(view)} expected")
    except MemoryError:
        raise
    except Exception as error:  # gzip, header and sizes each fail in their own way; all mean a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ContractError(f"{path}: not a readable NIfTI file ({reason}); make it anew with -R convert") from error
    if volume.dtype not in (np.uint8, np.uint16):
        raise ContractError(
            f"{path}: voxels of dtype {volume.dtype}, uint8 or uint16 expected; run again with -R convert"
        )
    return volume


def _convert_recorded(row: dict[str, str], root: Path, folder: Path, settings: Settings) -> dict[str, Any]:
    """Return the record of one crop, converted if it is not there yet; a data fault becomes its cause."""
    paths = bulk_paths(folder, row["crop"])
    record: dict[str, Any] = {
        "crop": row["crop"],
        "dataset": row["dataset"],
        "grid": settings.grid,
        "status": "failed",
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
        "em_valid_fraction": 0.0,
        "em_inside_fraction": 0.0,
        "em_stats": None,
        "registration": None,
        "files": {},
        "warnings": [],
        "input_digest": "",
    }
    try:
        earlier = _convert(row, root, folder, settings, record)
        if earlier is not None:
            return earlier
    except (DataError, GeometryError) as error:
        record["cause"] = str(error)
        record["files"] = {}
        for kind in ("image", "label"):
            paths[kind].unlink(missing_ok=True)
    write_json(paths["record"], record)
    return record


def _convert(
    row: dict[str, str], root: Path, folder: Path, settings: Settings, record: dict[str, Any]
) -> dict[str, Any] | None:
    """Fill in `record` and write the crop's NIfTI pair; return the earlier record instead if nothing has changed."""
    labels = _open_labels(root / row["labels"], row["crop"], settings, record)
    label_lattice = labels[0].level.lattice
    record["label_lattice"] = label_lattice.to_dict()
    voxel_nm = settings.voxel_nm or label_lattice.voxel_nm
    target = Lattice.covering(label_lattice.lower_nm, label_lattice.upper_nm, voxel_nm)
    record["lattice"] = target.to_dict()
    image = read_image(root / row["em"])
    record["em_inside_fraction"] = round(label_lattice.overlap_fraction(image.levels[0].lattice), 6)
    record["input_digest"] = _input_digest(labels, image, target, settings, row["crop"], record["annotated"])
    paths = bulk_paths(folder, row["crop"])
    earlier = _unchanged(paths["record"], folder, record["input_digest"])
    if earlier is not None:
        return earlier

    em = read_em(image, target, max_upsample=settings.max_upsample)
    level = next(level for level in image.levels if Path(level.path).name == em.level)
    record["em_level"] = {"path": em.level, "voxel_nm": list(level.lattice.voxel_nm), "factors": list(em.factors)}
    record["em_valid_fraction"] = 1.0 if em.valid is None else round(float(em.valid.mean()), 6)
    record["em_stats"] = _em_stats(em)
    label_map = build_label_map(labels, target, settings.classes, valid=em.valid, max_upsample=settings.max_upsample)
    record["source_counts"] |= label_map.source_counts
    record["overlaps"] = label_map.overlaps
    used = np.flatnonzero(count_values(label_map.rows, len(label_map.table)))
    record["table"] = encode_table(label_map.table, used)
    record["label_dtype"] = label_map.rows.dtype.name
    record["counts"] = count_states(label_map.rows, label_map.table, settings.classes)
    registration = register(em.image, label_map.rows, label_map.table, settings.classes, em.valid)
    record["registration"] = registration.to_dict()
    record["warnings"] += _warnings(labels, label_map.source_counts, label_map.overlaps, label_map.contradictions)

    write_nifti(paths["image"], em.image, target)
    write_nifti(paths["label"], label_map.rows, target)
    record["files"] = {kind: describe_file(paths[kind], folder) for kind in ("image", "label")}
    record["status"] = "ok"
    return None


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
    labels: Sequence[LabelArray], image: Image, target: Lattice, settings: Settings, crop: str, annotated: Sequence[str]
) -> str:
    """Return a digest of all that determines the conversion: settings, metadata, and the bytes of the chunks read."""
    level = choose_level(image, target, settings.max_upsample)
    weights = lattice_weights(level.lattice, target)
    chunks: dict[str, tuple[Level, Sequence[int], Sequence[int]]]
    chunks = {"em": (level, [w.start for w in weights], [w.stop for w in weights])}
    chunks |= {label.name: (label.level, [0, 0, 0], label.level.lattice.shape) for label in labels}
    return digest(
        {
            "version": [RESULT_VERSIONS["convert"], settings.revision],
            "grid": settings.grid,
            "lattice": target.to_dict(),
            "classes": settings.classes,
            "annotated": annotated,
            "empty": {label.name: settings.empty_means(crop, label.name) for label in labels},
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
    contradictions: Sequence[str],
) -> list[str]:
    found = [f"{pair.replace('+', ' and ')} are both marked in {n} voxels" for pair, n in overlaps.items()]
    found += contradictions
    for label in labels:
        stated = as_mapping(label.attributes["cellmap"]["annotation"].get("complement_counts"))
        for word in ("absent", "unknown"):
            if word in stated and stated[word] != counts[label.name][word]:
                found.append(f"{label.name}: {counts[label.name][word]} voxels {word}, its metadata say {stated[word]}")
    return found


def _remove_unlisted(folder: Path, listed: set[str], shard: int, shards: int) -> None:
    """Delete this shard's files of crops that are no longer listed, and what killed runs of it left half-written."""
    for kind, suffix in (("images", "_0000.nii.gz"), ("labels", ".nii.gz"), ("records", ".json")):
        for path in sorted((folder / kind).glob(f"*{suffix}")):
            partial = path.name.startswith(".partial-")
            name = path.name.split("-", 2)[2] if partial else path.name
            crop = "/".join(name.removesuffix(suffix).rsplit("_", 1))
            if shard_of(crop, shards) == shard and (partial or crop not in listed):
                logger.info("%s: removed, %s", path, "abandoned" if partial else "its crop is no longer listed")
                path.unlink(missing_ok=True)


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
            futures: dict[Future[dict[str, Any]], str] = {
                pool.submit(function, *entry): label for label, entry in zip(labels, arguments, strict=True)
            }
            for future in as_completed(futures):
                collect(futures[future], future.result)
    if faults:
        label, error = faults[0]
        reason = " ".join(str(error).split()) or type(error).__name__
        others = f" (and {len(faults) - 1} more, see the log)" if len(faults) > 1 else ""
        raise CellmapError(
            f"{label}: {type(error).__name__}: {reason}{others}; remedy the cause and run again"
        ) from error
    return results
