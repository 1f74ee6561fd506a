"""Writes the training store: per crop a raw uint8 image with context, its label map, and voxel positions to draw from.

Arrays are (z, y, x). The image holds `context_nm` of EM round the label box, as far as the EM reaches; the label map is
as large as the image and unknown (row 255) outside the label box. Everything is written slab by slab along z, so memory
does not grow with the crop's depth. `prepare.store` reads what this module writes.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.errors import ContractError, DataError
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
from cellmap_pipe.geometry import Lattice, Shape3, shape3
from cellmap_pipe.machine import physical_memory
from cellmap_pipe.prepare.convert import map_isolated
from cellmap_pipe.prepare.crops import read_crops
from cellmap_pipe.prepare.em import context_on_disk, read_em
from cellmap_pipe.prepare.labels import PRESENT, UNKNOWN
from cellmap_pipe.prepare.layout import (
    BLOCK,
    BLOCKED,
    MAPPED,
    Volume,
    full_disk_named,
    open_volume,
    write_array,
    write_volume,
)
from cellmap_pipe.prepare.layout import REMEDY as CHUNK_REMEDY
from cellmap_pipe.prepare.ngff import Image, Level, chunk_files, read_image
from cellmap_pipe.prepare.nifti import CONVERT_REMEDY, nifti_slabs, slab_ranges
from cellmap_pipe.prepare.plan import grown_box
from cellmap_pipe.prepare.quality import KEEP
from cellmap_pipe.prepare.resample import lattice_weights
from cellmap_pipe.prepare.state_table import UNKNOWN_ROW, decode_table
from cellmap_pipe.prepare.store import FORMAT_VERSION, pack_index

logger = logging.getLogger(__name__)

# Sampled voxels kept per crop: of each class, and of those with any class known.
POSITIONS_PER_CLASS = 2000
POSITIONS_KNOWN = 4000
ANY_KNOWN = -1

# Voxels handled at once: 32 MiB of EM, and 32 MiB of 8-byte indices where positions are sorted.
EM_SLAB_VOXELS = 2**25
LABEL_SLAB_VOXELS = 2**22

# The share of a machine's memory that a store may fill where nothing else is said.
MEMORY_SHARE = 0.6

Record = dict[str, Any]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ChunkSettings:
    """Where one grid's bulk files lie, how much EM goes round each label box, and how voxels lie in the files."""

    data_root: Path
    nifti_dir: Path
    store_dir: Path
    context_nm: float
    max_upsample: float
    revision: int = 0
    layout: str = MAPPED


def chunk_shard(
    quality_csv: str | os.PathLike[str],
    convert_json: str | os.PathLike[str],
    out_json: str | os.PathLike[str],
    *,
    data_root: str | os.PathLike[str],
    nifti_dir: str | os.PathLike[str],
    store_dir: str | os.PathLike[str],
    context_nm: float,
    max_upsample: float,
    workers: int,
    memory_gb: float | None = None,
    revision: int = 0,
) -> None:
    """Write the store's files of the kept crops of one shard, then `out_json` with their records.

    quality_csv: verdicts of the grid's crops and their size. convert_json: the shard's converted crops. memory_gb: see
    `choose_layout`. Files that were made of the same input and `revision` in the same layout are left as they are;
    those of crops that are no longer kept are deleted. A crop that fails, be it for want of disk space, does not stop
    the others, and what is finished stays, but the job then ends with an error and without `out_json`: a crop that
    passed the quality check must not get lost on the way.
    Raises CellmapError naming the crop that failed, the reason and the remedy.
    """
    converted = read_json(convert_json, CONVERT_REMEDY)
    rows = read_crops(str(quality_csv))
    verdicts = {row["crop"]: row["verdict"] for row in rows}
    megabytes = sum(float(row["train_mb"] or 0) for row in rows if row["verdict"] == KEEP)
    layout = choose_layout(converted["grid"], megabytes / 1e3, memory_gb)
    settings = ChunkSettings(
        Path(data_root), Path(nifti_dir), Path(store_dir), float(context_nm), float(max_upsample), revision, layout
    )
    kept = [record for record in converted["records"] if verdicts.get(record["crop"]) == KEEP]
    for record in converted["records"]:
        stem = store_stem(record["crop"])
        _remove(settings.store_dir.glob(f".partial-*-{escape(stem)}[_.]*"))
        if verdicts.get(record["crop"]) != KEEP:
            _remove(settings.store_dir / name for name in _file_names(stem))
    records = map_isolated(chunk_crop, [(record, settings) for record in kept], workers)
    write_json(
        out_json,
        {
            "format_version": FORMAT_VERSION,
            "grid": converted["grid"],
            "voxel_nm": converted["voxel_nm"],
            "classes": converted["classes"],
            "store_dir": os.path.relpath(settings.store_dir, Path(out_json).parent),
            "records": sorted(records, key=lambda record: record["crop"]),
        },
    )


def choose_layout(grid: str, store_gb: float, memory_gb: float | None) -> str:
    """Return the layout of a grid's store of `store_gb` (10^9 bytes): in blocks if it exceeds `memory_gb`.

    memory_gb: None for MEMORY_SHARE of this machine's memory.
    """
    source = "chunks.memory_gb"
    if memory_gb is None:
        memory_gb = MEMORY_SHARE * physical_memory() / 1e9
        source = f"{MEMORY_SHARE:.0%} of this machine's memory"
    layout = BLOCKED if store_gb > memory_gb else MAPPED
    logger.info("grid %s: %.3g GB of crops, %.3g GB may be filled (%s): %s", grid, store_gb, memory_gb, source, layout)
    return layout


def write_index(
    shard_jsons: Sequence[str | os.PathLike[str]],
    statistics_json: str | os.PathLike[str],
    out_json: str | os.PathLike[str],
) -> None:
    """Write the index that opens a grid's store, and delete from the store what no shard lists any more.

    statistics_json: of the same grid (prepare.statistics); the intensity ranges of its datasets go into the index.
    Raises DataError if no crop is left, ContractError if shards and statistics do not belong together.
    """
    shards = [read_json(path, CHUNK_REMEDY) for path in shard_jsons]
    first, out_json = shards[0], Path(out_json)
    for path, shard in zip(shard_jsons, shards, strict=True):
        if shard.get("format_version") != FORMAT_VERSION:
            raise ContractError(f"{path}: not of store format {FORMAT_VERSION}; {CHUNK_REMEDY}")
        for key in ("grid", "voxel_nm", "classes"):
            if shard[key] != first[key]:
                raise ContractError(f"{path}: {key} {shard[key]} differs from {shard_jsons[0]}; {CHUNK_REMEDY}")
    records = sorted((record for shard in shards for record in shard["records"]), key=lambda record: record["crop"])
    if not records:
        raise DataError(
            f"grid {first['grid']}: no crop passed the quality check, so there is nothing to train on; "
            "see the causes in the grid's quality/crops.csv"
        )
    statistics = read_json(statistics_json, "make it again with `snakemake -R quality`")["datasets"]
    missing = sorted({record["dataset"] for record in records} - set(statistics))
    if missing:
        raise ContractError(f"{statistics_json}: has no statistics of {missing[0]}; make it again with -R quality")
    store_dir = Path(shard_jsons[0]).parent / first["store_dir"]
    listed = {name for record in records for name in _file_names(store_stem(record["crop"]))}
    _remove(path for path in store_dir.iterdir() if path.name not in listed)
    index = {
        "format_version": FORMAT_VERSION,
        "grid": first["grid"],
        "voxel_nm": first["voxel_nm"],
        "classes": first["classes"],
        "store_dir": os.path.relpath(store_dir, out_json.parent),
        "ranges": {dataset: entry["ranges"] for dataset, entry in statistics.items()},
    }
    write_text(out_json, canonical_json(pack_index(index, records)) + "\n")


def store_stem(crop: str) -> str:
    """Return how the store's files of crop `{dataset}/crop{N}` begin."""
    return crop.replace("/", "_")


def chunk_crop(record: Record, settings: ChunkSettings) -> Record:
    """Write the files of one converted crop, unless they are there already, and return the crop's record in the store.

    Raises ContractError if its NIfTI is damaged, DataError or GeometryError if its EM cannot be read any more,
    CellmapError if the disk is full.
    """
    crop = record["crop"]
    sidecar = settings.store_dir / f"{store_stem(crop)}.json"
    box = Lattice.from_dict(record["lattice"])
    image = _pinned_image(record, settings) if settings.context_nm > 0 else None
    lattice, offset = _with_context(crop, box, image.levels[0], settings.context_nm) if image else (box, (0, 0, 0))
    input_digest = digest(
        {
            "version": [FORMAT_VERSION, RESULT_VERSIONS["chunk"], settings.revision],
            "nifti": [record["files"][kind]["sha256"] for kind in ("image", "label")],
            "record": [record[key] for key in ("classes", "table", "lattice", "input_digest")],
            "lattice": lattice.to_dict(),
            "em": _em_identity(image, lattice) if image else None,
            "layout": settings.layout,
        }
    )
    known = _sidecar(sidecar, settings.store_dir, input_digest)
    if known:
        logger.info("%s: the store holds it already", crop)
        return known
    nifti = {
        kind: check_file(record["files"][kind], settings.nifti_dir, CONVERT_REMEDY, full=True)
        for kind in ("image", "label")
    }
    table = decode_table(record["table"], len(record["classes"]))
    paths = {kind: settings.store_dir / f"{store_stem(crop)}_{kind}.npy" for kind in ("image", "label", "positions")}
    slabs = {
        "image": _em_slabs(image, lattice, settings.max_upsample) if image else nifti_slabs(nifti["image"], box.shape),
        "label": _padded_slabs(nifti_slabs(nifti["label"], box.shape), lattice.shape, offset, box.shape),
    }
    dtypes: dict[str, np.dtype[Any]] = {"image": np.dtype(np.uint8), "label": np.dtype(record["label_dtype"])}
    content = {
        kind: write_volume(settings.layout, paths[kind], dtypes[kind], lattice.shape, slabs[kind], fill=fill)
        for kind, fill in (("image", 0), ("label", UNKNOWN_ROW))
    }
    label = open_volume(settings.layout, paths["label"], lattice.shape)
    write_array(paths["positions"], sample_positions(label, table, seed=int(digest(crop)[:16], 16)))
    files = {kind: describe_file(path, settings.store_dir) for kind, path in paths.items()}
    result = {
        "crop": crop,
        "dataset": record["dataset"],
        "lattice": lattice.to_dict(),
        "label_offset": list(offset),
        "label_shape": list(box.shape),
        "table": record["table"],
        "classes": record["classes"],
        "counts": record["counts"],
        "annotated": record["annotated"],
        "has_positive": [name for name in record["classes"] if record["counts"][name]["present"]],
        "layout": settings.layout,
        "files": files,
        "content": {**content, "positions": files["positions"]["sha256"]},
        "input_digest": input_digest,
    }
    with full_disk_named(sidecar, 0):
        write_json(sidecar, result)
    logger.info("%s: written, %s voxels", crop, "x".join(map(str, lattice.shape)))
    return result


def sample_positions(
    label: Array | Volume,
    table: npt.NDArray[np.uint8],
    *,
    seed: int,
    per_class: int = POSITIONS_PER_CLASS,
    known: int = POSITIONS_KNOWN,
) -> npt.NDArray[np.int32]:
    """Return voxels drawn at random, without repetition, from each class and from the voxels with any class known.

    label: label map (z, y, x). table: its state table, uint8 (rows, classes). Result: int32
    (n, 4), sorted: class column (-1: any known), z, y, x; all voxels of a class that has no more than `per_class`.
    """
    rng = np.random.default_rng(seed)
    shape = label.shape
    in_row = np.sum([np.bincount(slab, minlength=len(table)) for _, slab in _flat_slabs(label)], axis=0)
    members = [(ANY_KNOWN, (table != UNKNOWN).any(axis=1), known)]
    members += [(column, table[:, column] == PRESENT, per_class) for column in range(table.shape[1])]
    # a class's voxels are numbered row by row of the table, in each row by position: a draw is (class, row, number)
    draws = [np.empty((0, 3), np.int64)]
    for column, is_member, limit in members:
        rows = np.flatnonzero(is_member & (in_row > 0))
        ends = np.cumsum(in_row[rows])
        if not len(rows):
            continue
        ranks = np.sort(rng.choice(int(ends[-1]), min(limit, int(ends[-1])), replace=False, shuffle=False))
        which = np.searchsorted(ends, ranks, side="right")
        numbers = ranks - (ends - in_row[rows])[which]
        draws.append(np.column_stack([np.full(len(ranks), column), rows[which], numbers]))
    column, row, number = np.concatenate(draws).T
    flat = np.zeros(len(column), np.int64)
    seen = np.zeros(len(table), np.int64)
    for before, slab in _flat_slabs(label):
        by_row = np.argsort(slab, kind="stable")
        counts = np.bincount(slab, minlength=len(table))
        begins = np.cumsum(counts) - counts
        here = (number >= seen[row]) & (number < (seen + counts)[row])
        flat[here] = by_row[(begins - seen)[row[here]] + number[here]] + before
        seen += counts
    order = np.lexsort((flat, column))
    return np.column_stack([column, *np.unravel_index(flat, shape)])[order].astype(np.int32)


def _with_context(crop: str, box: Lattice, level: Level, context_nm: float) -> tuple[Lattice, Shape3]:
    """Return the box grown by the context of it that is on disk, and the voxel of it where the box begins.

    Zeros would stand for EM that was not copied. Beyond what is stored a patch is mirrored, as in prediction.
    """
    wanted, offset = grown_box(box, level.lattice, context_nm)
    grown, before, after = box, [0, 0, 0], [0, 0, 0]
    for axis in range(3):  # one after the other, so that the corners are on disk, too
        most = wanted.shape[axis] - offset[axis] - box.shape[axis]
        before[axis], after[axis] = context_on_disk(level, grown, axis, offset[axis], most)
        grown = box.padded(before, after)
    if grown != wanted:
        logger.warning(
            "%s: of the EM context of %g nm round it not all is on disk; beyond %s voxels before and %s after it "
            "(z, y, x) patches are mirrored; `snakemake fetch` copies what is missing",
            *(crop, context_nm, before, after),
        )
    return grown, shape3(before)


def _pinned_image(record: Record, settings: ChunkSettings) -> Image:
    """Return the crop's EM with the one level that convert took: the context must not come from another."""
    image = read_image(settings.data_root / record["em"])
    name = Path(record["em_level"]["path"]).name
    levels = tuple(level for level in image.levels if Path(level.path).name == name)
    if not levels:
        raise DataError(f"{image.path}: level {name}, which convert used, is gone; {CONVERT_REMEDY}")
    return replace(image, levels=levels)


def _em_identity(image: Image, lattice: Lattice) -> dict[str, Any]:
    """Return what tells that other EM would be read for `lattice`: the level, and name and bytes of its chunk files."""
    (level,) = image.levels
    weights = lattice_weights(level.lattice, lattice)
    files = chunk_files(level, [w.start for w in weights], [w.stop for w in weights])
    chunks = [[os.path.relpath(path, level.path), file_digest(path)] for path in files]
    return {"level": Path(level.path).name, "lattice": level.lattice.to_dict(), "chunks": chunks}


def _em_slabs(image: Image, lattice: Lattice, max_upsample: float) -> Iterator[Array]:
    for first, last in slab_ranges(lattice.shape, EM_SLAB_VOXELS):
        window = lattice.window((first, 0, 0), (last - first, *lattice.shape[1:]))
        yield read_em(image, window, max_upsample=max_upsample).image


def _padded_slabs(
    slabs: Iterator[Array], shape: Sequence[int], offset: Sequence[int], box_shape: Sequence[int]
) -> Iterator[Array]:
    """Yield label slabs of the full cross-section: those of the label box with row 255 all round."""
    after = [n - o - b for n, o, b in zip(shape, offset, box_shape, strict=True)]
    sides = [(offset[1], after[1]), (offset[2], after[2])]
    dtype = None
    for i, slab in enumerate(slabs):
        if i == 0:
            dtype = slab.dtype
            yield from _unknown_planes(offset[0], shape, dtype)
        yield np.pad(slab, [(0, 0), *sides], constant_values=UNKNOWN_ROW)
    assert dtype is not None
    yield from _unknown_planes(after[0], shape, dtype)


def _unknown_planes(count: int, shape: Sequence[int], dtype: np.dtype[Any]) -> Iterator[Array]:
    for first, last in slab_ranges((count, *shape[1:]), EM_SLAB_VOXELS):
        yield np.full((last - first, *shape[1:]), UNKNOWN_ROW, dtype)


def _flat_slabs(volume: Array | Volume) -> Iterator[tuple[int, Array]]:
    """Yield the voxels of a volume in C order, LABEL_SLAB_VOXELS at once: (number of the first one, voxels (n,)).

    Each is valid until the next: one layer of blocks is held.
    """
    shape = volume.shape
    layer = np.empty((min(BLOCK, shape[0]), *shape[1:]), volume.dtype)
    for top in range(0, shape[0], BLOCK):  # a layer of blocks: thinner ones would read each block several times
        planes = layer[: shape[0] - top]
        if isinstance(volume, np.ndarray):
            planes[...] = volume[top : top + BLOCK]
        else:
            volume.copy((top, 0, 0), planes)
        for first, last in slab_ranges(planes.shape, LABEL_SLAB_VOXELS):
            yield (top + first) * shape[1] * shape[2], planes[first:last].ravel()


def _sidecar(path: Path, store_dir: Path, input_digest: str) -> Record | None:
    """Return the record of a crop that is in the store already, None if it is not: not completely, or other input."""
    try:
        record: Record = json.loads(path.read_text())
        if record["input_digest"] != input_digest:
            return None
        for contract in record["files"].values():
            check_file(contract, store_dir, CHUNK_REMEDY, full=True)  # `-R chunk` is the remedy for damaged files
    except (OSError, ValueError, KeyError, TypeError, ContractError):
        return None
    return record


def _file_names(stem: str) -> list[str]:
    return [f"{stem}.json", *(f"{stem}_{kind}.npy" for kind in ("image", "label", "positions"))]


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_file():
            logger.info("%s: deleted, it is not used any more", path)
            path.unlink(missing_ok=True)
