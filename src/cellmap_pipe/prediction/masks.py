"""Segmentations on disk: one OME-Zarr labels group per volume, an image of labels for each class in it.

`{volume}.zarr` is a zarr v2 group whose attribute `labels` names the classes. The group `{class}` in it is an OME-NGFF
0.4 image with `image-label`; its array `s0` holds 0 and 1, or the ids of objects, (z, y, x).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numcodecs
import zarr

from cellmap_pipe.colours import colour_of
from cellmap_pipe.evaluation.container import MASK_ARRAY
from cellmap_pipe.geometry import Lattice, Shape3, shape3

CHUNK: Shape3 = (64, 64, 64)

# Metadata stay small: beyond this many objects viewers choose the colours, as they do where none are given.
COLOURED_OBJECTS = 2000

# Shares of the class's colour that objects take in turn, so that neighbours differ.
SHADES = (1.0, 0.62, 0.85, 0.5, 0.73)


def create_labels(path: Path, names: Sequence[str], notes: Mapping[str, Any]) -> zarr.Group:
    """Write an empty group for the classes `names` to the folder `path` and return it.

    notes: what is kept under `cellmap_pipe` in its attributes.
    """
    return zarr.create_group(str(path), zarr_format=2, attributes={"labels": list(names), "cellmap_pipe": dict(notes)})


def create_mask(
    group: zarr.Group,
    name: str,
    lattice: Lattice,
    *,
    dtype: str = "uint8",
    objects: int | None = None,
    notes: Mapping[str, Any] | None = None,
) -> "zarr.Array[Any]":
    """Return the new array (z, y, x) of class `name` in a labels group, on `lattice`.

    objects: how many there are, None for a mask of 0 and 1. The array's attributes are voxel_size and translation
    (centre of voxel 0), in nm, and shape, all (z, y, x), as in the challenge's own arrays (CHALLENGE 1c), and `notes`.
    """
    image = group.create_group(name, attributes=ngff_attributes(name, lattice, objects))
    return image.create_array(
        MASK_ARRAY,
        shape=lattice.shape,
        chunks=shape3([min(n, c) for n, c in zip(lattice.shape, CHUNK, strict=True)]),
        dtype=dtype,
        compressors=numcodecs.Blosc("zstd", 3, numcodecs.Blosc.BITSHUFFLE),
        chunk_key_encoding={"name": "v2", "separator": "/"},
        fill_value=0,
        attributes={
            "voxel_size": list(lattice.voxel_nm),
            "translation": list(lattice.translation_nm),
            "shape": list(lattice.shape),
            **(notes or {}),
        },
    )


def ngff_attributes(name: str, lattice: Lattice, objects: int | None) -> dict[str, Any]:
    """Return the OME-NGFF 0.4 metadata of a class's labels on `lattice`: axes, scale, translation, colours.

    A mask has the class's colour, objects have shades of it; see https://ngff.openmicroscopy.org/0.4/#label-md.
    """
    transformations = [
        {"type": "scale", "scale": list(lattice.voxel_nm)},
        {"type": "translation", "translation": list(lattice.translation_nm)},
    ]
    label: dict[str, Any] = {"version": "0.4"}
    count = 1 if objects is None else objects
    if 0 < count <= COLOURED_OBJECTS:
        label["colors"] = [{"label-value": i + 1, "rgba": _rgba(name, SHADES[i % len(SHADES)])} for i in range(count)]
    return {
        "multiscales": [
            {
                "version": "0.4",
                "name": name,
                "axes": [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"],
                "datasets": [{"path": MASK_ARRAY, "coordinateTransformations": transformations}],
            }
        ],
        "image-label": label,
    }


def _rgba(name: str, share: float) -> list[int]:
    colour = colour_of(name)
    return [*(round(int(colour[i : i + 2], 16) * share) for i in (1, 3, 5)), 255]
