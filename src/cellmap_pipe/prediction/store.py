"""Class probabilities on disk: one OME-Zarr per volume, and the record of each block that is finished.

`{volume}-{fingerprint}.zarr` is a zarr v2 group with OME-NGFF 0.4 metadata; its array `s0` holds probabilities
(c, z, y, x), see `plan.OUTPUTS`. `{volume}-{fingerprint}.blocks/` beside it holds one small JSON file per finished
block, which counts as finished only while its chunks are on disk: zarr reads a chunk that is gone as zeros. Several
jobs may write one store: each its own planes.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import numcodecs
import numpy as np
import zarr

from cellmap_pipe.colours import colour_of
from cellmap_pipe.errors import CellmapError, ContractError
from cellmap_pipe.files import read_json, write_json
from cellmap_pipe.geometry import Lattice, Shape3, shape3
from cellmap_pipe.prediction.plan import OUTPUTS, Box

logger = logging.getLogger(__name__)

ARRAY = "s0"
# To look whether a chunk is empty takes longer than to write it
WRITING: Any = {"write_empty_chunks": True}
CHUNK: Shape3 = (64, 128, 128)

_STORE = re.compile(r"(.+)-([0-9a-f]{12})")


def file_stem(volume: str) -> str:
    """Return the name of a volume's files: `jrc_x/crop12` is kept in `jrc_x_crop12.zarr`."""
    return volume.replace("/", "_")


def remove_unlisted(folder: Path, volumes: Iterable[str]) -> None:
    """Delete the stores in `folder`, with what lies beside them, of volumes that are not among `volumes`."""
    listed = {file_stem(volume) for volume in volumes}
    for store in folder.glob("*.zarr"):
        if not store.name.startswith(".") and store.stem not in listed:
            _remove(store)


def remove_outdated(folder: Path, volume: str, fingerprint: str) -> None:
    """Delete the stores of one volume that are not of this fingerprint."""
    for store in folder.glob(f"{file_stem(volume)}-*.zarr"):
        match = _STORE.fullmatch(store.stem)
        if match and match[1] == file_stem(volume) and match[2] != fingerprint[:12]:
            _remove(store)


def remove_other_volumes(folder: Path, volumes: Iterable[str]) -> None:
    """Delete the stores and surveys in `folder` of volumes that are not among `volumes`, of whatever fingerprint."""
    listed = {file_stem(volume) for volume in volumes}
    for store in folder.glob("*.zarr"):
        match = _STORE.fullmatch(store.stem)
        if not store.name.startswith(".") and (match is None or match[1] not in listed):
            _remove(store)
    for survey in folder.glob("*.survey.json"):
        if not survey.name.startswith(".") and survey.name.removesuffix(".survey.json") not in listed:
            survey.unlink(missing_ok=True)


def _remove(store: Path) -> None:
    logger.info("%s: not listed any more, deleted", store)
    store.with_suffix(".json").unlink(missing_ok=True)
    shutil.rmtree(store.with_suffix(".blocks"), ignore_errors=True)
    shutil.rmtree(store, ignore_errors=True)


def ngff_attributes(name: str, lattice: Lattice, classes: Sequence[str], output: str = "uint8") -> dict[str, Any]:
    """Return the OME-NGFF 0.4 metadata of probabilities on `lattice`: axes, scale, translation, names, colours."""
    highest = 1 if OUTPUTS[output].kind == "f" else 255
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    transformations = [
        {"type": "scale", "scale": [1.0, *lattice.voxel_nm]},
        {"type": "translation", "translation": [0.0, *lattice.translation_nm]},
    ]
    return {
        "multiscales": [
            {
                "version": "0.4",
                "name": name,
                "axes": axes,
                "datasets": [{"path": ARRAY, "coordinateTransformations": transformations}],
            }
        ],
        "omero": {
            "version": "0.4",
            "name": name,
            "channels": [
                {
                    "label": label,
                    "color": colour_of(label).removeprefix("#"),
                    "active": True,
                    "window": {"min": 0, "max": highest, "start": 0, "end": highest},
                }
                for label in classes
            ],
        },
    }


def chunk_of(shape: Shape3) -> Shape3:
    """Return the chunks (z, y, x) in which probabilities of a volume of `shape` are kept."""
    return shape3([min(n, c) for n, c in zip(shape, CHUNK, strict=True)])


def create_probabilities(
    path: Path,
    name: str,
    lattice: Lattice,
    classes: Sequence[str],
    notes: Mapping[str, Any],
    output: str = "uint8",
) -> "zarr.Array[Any]":
    """Write an empty store for `classes` on `lattice` to the folder `path` and return its array (c, z, y, x).

    notes: what is kept under `cellmap_pipe` in its attributes. output: see `plan.OUTPUTS`.
    """
    dtype = OUTPUTS[output]
    attributes = {**ngff_attributes(name, lattice, classes, output), "cellmap_pipe": dict(notes)}
    group = zarr.create_group(str(path), zarr_format=2, attributes=attributes)
    return group.create_array(
        ARRAY,
        shape=(len(classes), *lattice.shape),
        chunks=(1, *chunk_of(lattice.shape)),
        dtype=dtype,
        # fast: probabilities hardly shrink further
        compressors=numcodecs.Blosc(
            "lz4", 1, numcodecs.Blosc.NOSHUFFLE if dtype.itemsize == 1 else numcodecs.Blosc.SHUFFLE
        ),
        chunk_key_encoding={"name": "v2", "separator": "/"},
        fill_value=0,
        config=WRITING,
    )


def open_probabilities(path: Path, remedy: str) -> "zarr.Array[Any]":
    """Return the array (c, z, y, x) of a store, read-only. Raises ContractError, with `remedy`, if that fails."""
    try:
        return zarr.open_array(str(path / ARRAY), mode="r")
    except Exception as error:  # zarr raises many kinds; all mean that the store is not what its record says
        raise ContractError(f"{path}: cannot be opened ({' '.join(str(error).split())}); {remedy}") from error


class BlockStore:
    """The store of one volume and fingerprint while blocks of it are being predicted, by this job and others.

    An existing one is taken up where it was left. A new one is written under a temporary name, so that no job opens a
    store without its metadata; of several jobs that make it at once, one gives it its name and all use it.
    """

    def __init__(
        self,
        folder: Path,
        volume: str,
        lattice: Lattice,
        classes: Sequence[str],
        fingerprint: str,
        notes: Mapping[str, Any],
        output: str = "uint8",
    ) -> None:
        self.path = folder / f"{file_stem(volume)}-{fingerprint[:12]}.zarr"
        self._records = self.path.with_suffix(".blocks")
        self._fingerprint = fingerprint
        if self.path.exists() and not self._is_sound():
            discarded = self._temporary()
            self.path.rename(discarded)
            shutil.rmtree(self._records, ignore_errors=True)
            shutil.rmtree(discarded, ignore_errors=True)
        if not self.path.exists():
            partial = self._temporary()
            try:
                create_probabilities(
                    partial, volume, lattice, classes, {**notes, "fingerprint": fingerprint}, output=output
                )
                partial.rename(self.path)  # fails if another job's store has the name by now
            except OSError:
                if not self.path.exists():
                    raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        for abandoned in folder.glob(
            f".partial-*-{self.path.name}"
        ):  # whoever is still at it uses the one that is there
            shutil.rmtree(abandoned, ignore_errors=True)
        self.array: zarr.Array[Any] = zarr.open_array(str(self.path / ARRAY), mode="r+").with_config(WRITING)

    def _temporary(self) -> Path:
        return self.path.with_name(f".partial-{uuid4().hex}-{self.path.name}")

    def _is_sound(self) -> bool:
        """Return whether the store's metadata are there and its own.

        Raises OSError where the disk cannot tell: what cannot be read just now must not be thrown away.
        """
        try:
            notes = json.loads((self.path / ".zattrs").read_text())["cellmap_pipe"]
            zarr.open_array(str(self.path / ARRAY), mode="r")
        except (KeyError, TypeError, ValueError, FileNotFoundError, NotADirectoryError):
            return False
        return bool(notes.get("fingerprint") == self._fingerprint)

    def remove_partials(self, first: int, last: int) -> None:
        """Delete what a killed job left half-written of the planes [first, last), which begin and end with chunks."""
        depth = self.array.chunks[1]
        for channel in range(self.array.shape[0]):
            for number in range(first // depth, -(-last // depth)):
                for abandoned in (self.path / ARRAY / str(channel) / str(number)).rglob("*.partial"):
                    abandoned.unlink(missing_ok=True)
        for abandoned in self._records.glob(".partial-*.json"):
            plane = abandoned.stem.rsplit("-", 1)[-1].split("_")[0]
            if plane.isdigit() and first <= int(plane) < last:
                abandoned.unlink(missing_ok=True)

    def _record(self, box: Box) -> Path:
        return self._records / ("_".join(map(str, box[0])) + ".json")

    def finished(self, box: Box) -> bool:
        """Return whether the block has been written with this fingerprint and its chunks are still there."""
        try:
            return bool(read_json(self._record(box)) == self._entry(box))
        except ContractError:
            return False

    def finish(self, box: Box) -> None:
        """Record that all chunks of the block are on disk."""
        write_json(self._record(box), self._entry(box))

    def _entry(self, box: Box) -> dict[str, Any]:
        return _block_entry(self.array, self.path, self._fingerprint, box)


def _block_entry(array: "zarr.Array[Any]", store: Path, fingerprint: str, box: Box) -> dict[str, Any]:
    """Return what the record of a finished block says: which it is, number and bytes of its chunks on disk.

    There are none for chunks of zeros.
    """
    (z0, y0, x0), (z1, y1, x1) = box
    channels, (_, depth, height, width) = array.shape[0], array.chunks
    sizes = []
    for channel in range(channels):
        for z in range(z0 // depth, -(-z1 // depth)):
            for y in range(y0 // height, -(-y1 // height)):
                row = store / ARRAY / str(channel) / str(z) / str(y)
                try:
                    with os.scandir(row) as entries:
                        sizes += [
                            entry.stat().st_size
                            for entry in entries
                            if entry.name.isdigit() and x0 <= int(entry.name) * width < x1
                        ]
                except FileNotFoundError:
                    continue
    return {
        "fingerprint": fingerprint,
        "lower": list(box[0]),
        "upper": list(box[1]),
        "chunks": len(sizes),
        "bytes": sum(sizes),
    }


def fault_of_probabilities(store: Path, fingerprint: str) -> str:
    """Return in words what a store lacks of the finished prediction of this fingerprint, "" if nothing."""
    try:
        notes = json.loads((store / ".zattrs").read_text())["cellmap_pipe"]
        array: zarr.Array[Any] = zarr.open_array(str(store / ARRAY), mode="r")
    except (KeyError, TypeError, ValueError, OSError) as error:
        return f"missing or damaged ({' '.join(str(error).split())})"
    if notes.get("fingerprint") != fingerprint:
        return "is of other weights, EM or settings than its record says"
    chunk = array.chunks[1:]
    done = np.zeros([-(-n // c) for n, c in zip(array.shape[1:], chunk, strict=True)], bool)
    for path in store.with_suffix(".blocks").glob("[0-9]*.json"):
        try:
            found = read_json(path)
            box = shape3(found["lower"]), shape3(found["upper"])
            if found != _block_entry(array, store, fingerprint, box):
                continue
        except (CellmapError, KeyError, TypeError, ValueError):
            continue
        done[tuple(slice(lo // c, -(-hi // c)) for lo, hi, c in zip(*box, chunk, strict=True))] = True
    lost = np.count_nonzero(~done)
    return f"chunks, or the records of them, are gone in {lost} of {done.size} places" if lost else ""


def shares(shapes: Sequence[Shape3], shard: int, shards: int) -> list[tuple[int, int]]:
    """Return the planes [first, last) of each volume that one of `shards` jobs predicts; first == last means none.

    shapes: (z, y, x) of the volumes, in order. Together the jobs' shares are contiguous and of nearly equal numbers of
    voxels. They follow from the shapes alone, whatever EM, memory and columns are: jobs that run at different times,
    after a setting was changed perhaps, leave no block between them. The grain is one layer of chunks.
    """
    total = sum(shape[0] * shape[1] * shape[2] for shape in shapes)
    result, before = [], 0
    for depth, height, width in shapes:
        step = chunk_of((depth, height, width))[0]
        mine = []
        for first in range(0, depth, step):
            last = min(first + step, depth)
            middle = 2 * before + (first + last) * height * width  # twice the voxels up to the middle of the layer
            if middle * shards // (2 * total) == shard:
                mine.append((first, last))
        result.append((mine[0][0], mine[-1][1]) if mine else (0, 0))
        before += depth * height * width
    return result


def blocks_of(column: Box, depth: int) -> list[Box]:
    """Return the blocks of a column from its lowest plane up: `depth` planes each, beginning at multiples of it."""
    (z0, y0, x0), (z1, y1, x1) = column
    edges = [z0, *range((z0 // depth + 1) * depth, z1, depth), z1]
    return [((lo, y0, x0), (hi, y1, x1)) for lo, hi in pairwise(edges)]


def runs_of(blocks: Iterable[Box]) -> list[Box]:
    """Return boxes that join blocks of one column which follow each other without a gap."""
    runs: list[Box] = []
    for lower, upper in blocks:
        if runs and runs[-1][1][0] == lower[0]:
            runs[-1] = (runs[-1][0], upper)
        else:
            runs.append((lower, upper))
    return runs
