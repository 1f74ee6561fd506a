"""Class probabilities on disk: one OME-Zarr per volume, and the record of each block that is finished.

`{volume}.zarr` is a zarr v2 group with OME-NGFF 0.4 metadata; its array `s0` holds uint8 probabilities (c, z, y, x),
255 p. `{volume}.blocks/` beside it holds one small JSON file per finished block; a block counts only if the fingerprint
in it is the one that the store was made with.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numcodecs
import zarr

from cellmap_pipe.colours import colour_of
from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import read_json, remove_partials, replacing, write_json
from cellmap_pipe.geometry import Lattice, Shape3, shape3

logger = logging.getLogger(__name__)

ARRAY = "s0"
CHUNK: Shape3 = (64, 128, 128)

Box = tuple[Shape3, Shape3]


def file_stem(volume: str) -> str:
    """Return the name of a volume's files: `jrc_x/crop12` is kept in `jrc_x_crop12.zarr`."""
    return volume.replace("/", "_")


def remove_unlisted(folder: Path, volumes: Iterable[str], owned: Callable[[str], bool] = lambda stem: True) -> None:
    """Delete the stores in `folder`, with what lies beside them, of volumes that are not among `volumes`.

    owned: of a store's name without suffix, whether it may be deleted by the caller.
    """
    listed = {file_stem(volume) for volume in volumes}
    for store in folder.glob("*.zarr"):
        if store.name.startswith(".") or store.stem in listed or not owned(store.stem):
            continue
        logger.info("%s: not listed any more, deleted", store)
        store.with_suffix(".json").unlink(missing_ok=True)
        shutil.rmtree(store.with_suffix(".blocks"), ignore_errors=True)
        shutil.rmtree(store, ignore_errors=True)


def ngff_attributes(name: str, lattice: Lattice, classes: Sequence[str]) -> dict[str, Any]:
    """Return the OME-NGFF 0.4 metadata of probabilities on `lattice`: axes, scale, translation, names, colours."""
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
                    "window": {"min": 0, "max": 255, "start": 0, "end": 255},
                }
                for label in classes
            ],
        },
    }


def create_probabilities(
    path: Path, name: str, lattice: Lattice, classes: Sequence[str], notes: Mapping[str, Any]
) -> "zarr.Array[Any]":
    """Write an empty store for `classes` on `lattice` to the folder `path` and return its array (c, z, y, x).

    notes: what is kept under `cellmap_pipe` in its attributes.
    """
    group = zarr.create_group(
        str(path), zarr_format=2, attributes={**ngff_attributes(name, lattice, classes), "cellmap_pipe": dict(notes)}
    )
    return group.create_array(
        ARRAY,
        shape=(len(classes), *lattice.shape),
        chunks=(1, *(min(n, c) for n, c in zip(lattice.shape, CHUNK, strict=True))),
        dtype="uint8",
        compressors=numcodecs.Blosc("lz4", 1, numcodecs.Blosc.NOSHUFFLE),  # fast: probabilities hardly shrink further
        chunk_key_encoding={"name": "v2", "separator": "/"},
        fill_value=0,
    )


def open_probabilities(path: Path, remedy: str) -> "zarr.Array[Any]":
    """Return the array (c, z, y, x) of a store, read-only. Raises ContractError, with `remedy`, if that fails."""
    try:
        return zarr.open_array(str(path / ARRAY), mode="r")
    except Exception as error:  # zarr raises many kinds; all mean that the store is not what its record says
        raise ContractError(f"{path}: cannot be opened ({' '.join(str(error).split())}); {remedy}") from error


class BlockStore:
    """The store of one volume while blocks of it are being predicted.

    An existing store of the same fingerprint is taken up where it was left; another one is made anew. The new one is
    written under a temporary name, so that no job ever opens a store without its metadata.
    """

    def __init__(
        self,
        folder: Path,
        volume: str,
        lattice: Lattice,
        classes: Sequence[str],
        fingerprint: str,
        notes: Mapping[str, Any],
    ) -> None:
        self.path = folder / f"{file_stem(volume)}.zarr"
        self._records = folder / f"{file_stem(volume)}.blocks"
        self._fingerprint = fingerprint
        for abandoned in folder.glob(f".partial-*-{self.path.name}"):
            shutil.rmtree(abandoned, ignore_errors=True)
        if self._fingerprint_on_disk() != fingerprint:
            shutil.rmtree(self._records, ignore_errors=True)
            with replacing(self.path) as partial:
                create_probabilities(partial, volume, lattice, classes, {**notes, "fingerprint": fingerprint})
        remove_partials(self._records)
        for abandoned in (self.path / ARRAY).rglob("*.partial"):  # chunks that a killed job was writing
            abandoned.unlink(missing_ok=True)
        self.array: zarr.Array[Any] = zarr.open_array(str(self.path / ARRAY), mode="r+")

    def _fingerprint_on_disk(self) -> str | None:
        try:
            notes = read_json(self.path / ".zattrs")["cellmap_pipe"]
            zarr.open_array(str(self.path / ARRAY), mode="r")
        except (ContractError, KeyError, TypeError, ValueError, OSError):
            return None
        return str(notes.get("fingerprint"))

    def _record(self, box: Box) -> Path:
        return self._records / ("_".join(map(str, box[0])) + ".json")

    def finished(self, box: Box) -> bool:
        """Return whether the block has been written with this fingerprint."""
        try:
            return bool(read_json(self._record(box)) == self._entry(box))
        except ContractError:
            return False

    def finish(self, box: Box) -> None:
        """Record that all chunks of the block are on disk."""
        write_json(self._record(box), self._entry(box))

    def _entry(self, box: Box) -> dict[str, Any]:
        return {"fingerprint": self._fingerprint, "lower": list(box[0]), "upper": list(box[1])}


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


def create_mask(group: "zarr.Group", name: str, dtype: str, lattice: Lattice) -> "zarr.Array[Any]":
    """Return a new label array of `group` on `lattice`: a plain array, as the challenge's scorer takes it.

    Its attributes are voxel_size and translation (centre of voxel 0), in nm, and shape, all (z, y, x) (CHALLENGE 1c).
    """
    return group.create_array(
        name,
        shape=lattice.shape,
        chunks=shape3([min(64, n) for n in lattice.shape]),
        dtype=dtype,
        compressors=numcodecs.Blosc("zstd", 3, numcodecs.Blosc.BITSHUFFLE),
        chunk_key_encoding={"name": "v2", "separator": "/"},
        fill_value=0,
        attributes={
            "voxel_size": list(lattice.voxel_nm),
            "translation": list(lattice.translation_nm),
            "shape": list(lattice.shape),
        },
    )
