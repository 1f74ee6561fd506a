"""Tiny crops and a plain statement of what classes say of each other, shared by the tests of labels and label maps."""

import numpy as np
import zarr
from hypothesis import settings
from hypothesis import strategies as st

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.prepare.labels import ABSENT, PRESENT, UNKNOWN, read_label

FOURTEEN = (
    "ecs pm mito_mem mito_lum mito_ribo golgi_mem golgi_lum ves_mem ves_lum endo_mem endo_lum er_mem er_lum nuc".split()
)


few = settings(max_examples=30, deadline=None, derandomize=True)


def annotation(kind=None, name="pm", **counts):
    content = {"class_name": name}
    if kind:
        encoding = {"absent": 0, "unknown": 255} | ({"present": 1} if kind == "semantic" else {})
        content["annotation_type"] = {"type": f"{kind}_segmentation", "encoding": encoding}
    if counts:
        content["complement_counts"] = counts
    return {"cellmap": {"annotation": content}}


ATOMS = {name: entry.atoms for name, entry in CLASSES.items()}
EVERY_ATOM = frozenset().union(*ATOMS.values())


def plain_states(own, classes):
    """The rules of one voxel, class by class: its own array, then what lies inside it, then which atoms can be."""
    can_be = set(EVERY_ATOM)
    for name, state in own.items():
        can_be &= ATOMS[name] if state == PRESENT else EVERY_ATOM - ATOMS[name] if state == ABSENT else EVERY_ATOM
    result = []
    for name in classes:
        if own.get(name, UNKNOWN) != UNKNOWN:
            result.append(own[name])
        elif any(state == PRESENT and ATOMS[part] < ATOMS[name] for part, state in own.items()):
            result.append(PRESENT)
        else:
            result.append(UNKNOWN if can_be & ATOMS[name] else ABSENT)
    return result


def write_crop(ngff, folder, volumes, voxel=(4, 4, 4), translation=(0, 0, 0), kinds=None):
    """Write class arrays in chunks of 3x2x4 voxels and return them as `read_label` finds them."""
    for name, volume in volumes.items():
        kind = (kinds or {}).get(name, "semantic")
        content = annotation(kind, name, unknown=int((volume == 255).sum()))["cellmap"]["annotation"]
        ngff(folder / name, volume, voxel, translation, annotation=content, chunks=(3, 2, 4))
    return [read_label(folder / name) for name in volumes]


def blob(shape, lower, upper, value=1):
    volume = np.zeros(shape, np.uint8)
    volume[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))] = value
    return volume


def plain_array(path, volume, zarr_format=2):
    array = zarr.create_array(
        str(path), shape=volume.shape, chunks=(8, 8, 8), dtype=volume.dtype, zarr_format=zarr_format
    )
    array[...] = volume


GRIDS = st.sampled_from([2.0, 3.0, 4.0, 5.5, 8.0, 12.0])
