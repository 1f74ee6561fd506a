"""Writing in the challenge's on-disk layout: zarr v2 groups, OME-NGFF 0.4 multiscales, annotation metadata.

The layout is that of the challenge: `{dataset}.zarr/recon-1/em/fibsem-uint8/s0..` and
`{dataset}.zarr/recon-1/labels/groundtruth/crop{N}/{class}/s0`. Every folder of the tree is a zarr group or array.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs.blosc import Blosc
from numpy.typing import NDArray

from cellmap_pipe.classes import get_class
from cellmap_pipe.geometry import Lattice, vec3
from cellmap_pipe.phantom.cell import Truth

EM_PATH = "recon-1/em/fibsem-uint8"
LABELS_PATH = "recon-1/labels/groundtruth"
CHUNK = 64
UNKNOWN = 255


def _write_array(group: zarr.Group, name: str, values: NDArray[Any], attributes: Mapping[str, Any]) -> None:
    # blocks of zeros get no file, as with `write_empty_chunks=False` of the challenge's own data
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=tuple(min(CHUNK, n) for n in values.shape),
        compressors=Blosc(cname="zstd", clevel=5, shuffle=Blosc.BITSHUFFLE),
        fill_value=0,
        chunk_key_encoding={"name": "v2", "separator": "/"},
        attributes=dict(attributes),
        config={"write_empty_chunks": False},
    )
    array[...] = values


def _multiscales(name: str, levels: Sequence[Lattice]) -> dict[str, Any]:
    """Return the OME-NGFF 0.4 attributes of an image with levels s0, s1, .. on the given lattices."""
    return {
        "multiscales": [
            {
                "version": "0.4",
                "name": name,
                "axes": [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"],
                "coordinateTransformations": [{"type": "scale", "scale": [1.0, 1.0, 1.0]}],
                "datasets": [
                    {
                        "path": f"s{k}",
                        "coordinateTransformations": [
                            {"type": "scale", "scale": list(level.voxel_nm)},
                            {"type": "translation", "translation": list(level.translation_nm)},
                        ],
                    }
                    for k, level in enumerate(levels)
                ],
            }
        ]
    }


def halved(image: NDArray[np.uint8], lattice: Lattice) -> tuple[NDArray[np.uint8], Lattice]:
    """Return the next pyramid level: means of 2x2x2 voxels, of which every axis needs an even number.

    Its voxel 0 is centred at t + (2 v - v) / 2, half an old voxel further.
    """
    z, y, x = image.shape
    mean = image.reshape(z // 2, 2, y // 2, 2, x // 2, 2).mean(axis=(1, 3, 5), dtype=np.float32)
    voxel = vec3([2 * v for v in lattice.voxel_nm])
    start = vec3([t + v / 2 for t, v in zip(lattice.translation_nm, lattice.voxel_nm, strict=True)])
    return np.rint(mean).astype(np.uint8), Lattice(voxel, start, (z // 2, y // 2, x // 2))


def write_em(
    root: zarr.Group, image: NDArray[np.uint8], lattice: Lattice, *, levels: int, missing: Lattice | None
) -> None:
    """Write the EM pyramid of a dataset, without the chunks that lie wholly inside the box `missing`."""
    group = root.require_group(EM_PATH)
    lattices = []
    for k in range(levels):
        if k:
            image, lattice = halved(image, lattice)
        stored = image if missing is None else _without(image, lattice, missing)
        _write_array(group, f"s{k}", stored, {})
        lattices.append(lattice)
    group.attrs.update(_multiscales(EM_PATH.rsplit("/", 1)[1], lattices))


def _without(image: NDArray[np.uint8], lattice: Lattice, box: Lattice) -> NDArray[np.uint8]:
    """Return the image with 0 in every chunk that lies in the box: such a chunk is not written."""
    kept = image.copy()
    for first in np.ndindex(*(-(-n // CHUNK) for n in image.shape)):
        start = [CHUNK * i for i in first]
        chunk = lattice.window(start, [min(CHUNK, n - s) for n, s in zip(image.shape, start, strict=True)])
        if chunk.overlap_fraction(box) > 1 - 1e-6:
            kept[tuple(slice(s, s + n) for s, n in zip(start, chunk.shape, strict=True))] = 0
    return kept


def label_array(truth: Truth, name: str, unknown: NDArray[np.bool_] | None) -> NDArray[np.unsignedinteger[Any]]:
    """Return the array that annotates class `name`: 0/1 with 255 = unknown, or instance ids (uint16) from 1."""
    if get_class(name).instance:
        return truth.instances(name)
    values = truth.mask(name).astype(np.uint8)
    if unknown is not None:
        values[unknown] = UNKNOWN
    return values


def write_crop(
    root: zarr.Group,
    crop: str,
    truth: Truth,
    lattice: Lattice,
    names: Sequence[str],
    *,
    unknown: Mapping[str, NDArray[np.bool_]],
    masked: Mapping[str, NDArray[np.bool_]],
    dense: bool,
) -> None:
    """Write the crop's annotated classes `names`, with their metadata.

    unknown: where a semantic class is unknown, by class. masked: what an array `{class}_mask` leaves out, by class.
    dense: write the array `all` of class ids beside the classes.
    """
    group = root.require_group(f"{LABELS_PATH}/{crop}")
    described = {
        "version": "0.1.1",
        "name": crop,
        "description": "synthetic cell with known truth",
        "created_by": ["cellmap_pipe"],
        "created_with": ["cellmap_pipe.phantom"],
        "class_names": list(names),
    }
    group.attrs.update({"cellmap": {"annotation": described}})
    for name in names:
        values = label_array(truth, name, unknown.get(name))
        semantic = not get_class(name).instance
        counted = int((values == UNKNOWN).sum()) if semantic else 0
        annotation = {
            "class_name": name,
            "annotation_type": {
                "type": "semantic_segmentation" if semantic else "instance_segmentation",
                "encoding": {"absent": 0, "unknown": UNKNOWN} | ({"present": 1} if semantic else {}),
            },
        }
        counts = {"complement_counts": {"absent": int((values == 0).sum()), "unknown": counted}}
        attributes = {"cellmap": {"annotation": annotation}} | _multiscales(name, [lattice])
        image = group.create_group(name, attributes=attributes)
        _write_array(image, "s0", values, {"cellmap": {"annotation": annotation | counts}})
    for name, left_out in masked.items():
        image = group.create_group(f"{name}_mask", attributes=_multiscales(f"{name}_mask", [lattice]))
        _write_array(image, "s0", (~left_out).astype(np.uint8), {})
    if dense:
        image = group.create_group("all", attributes=_multiscales("all", [lattice]))
        _write_array(image, "s0", truth.classes, {})


def write_truth(root: zarr.Group, crop: str, truth: Truth, lattice: Lattice, names: Sequence[str]) -> None:
    """Write what the scorer compares a submission with: one plain array per class, placed by its attributes."""
    group = root.require_group(crop)
    place = {
        "voxel_size": list(lattice.voxel_nm),
        "translation": list(lattice.translation_nm),
        "shape": list(lattice.shape),
    }
    for name in names:
        _write_array(group, name, label_array(truth, name, None), place)


def open_root(path: Path) -> zarr.Group:
    """Return a new zarr v2 group at `path`."""
    return zarr.create_group(str(path), zarr_format=2)
