"""From probabilities to what is asked for: masks, groups and instances on the target voxels of each volume."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import zarr

from cellmap_pipe.classes import derivable, get_class, parts_of
from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import digest, read_json, remove_partials, replacing, write_json
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prediction.ensemble import ClassVolumes, Probabilities, Record, read_records
from cellmap_pipe.prediction.store import create_mask, file_stem, remove_unlisted

logger = logging.getLogger(__name__)

# Planes of the target that are resampled and written at a time: one layer of chunks.
SLAB = 64


def segment(
    predict_jsons: Sequence[str | Path],
    out_json: str | Path,
    *,
    store_dir: str | Path,
    thresholds: Mapping[str, float],
    min_size_nm3: Mapping[str, float],
    derive: Sequence[str],
    subset: str,
    revision: int = 0,
) -> None:
    """Write the masks and instances of every predicted volume, then the JSON that lists them.

    thresholds: by class, "default" for the others; a voxel belongs to a class where its probability is higher.
    min_size_nm3: by class; connected objects that are smaller are removed. derive: groups that are formed as the union
    of the classes inside them; one that these do not make up is left out and named in the record.
    Arrays `{class}` of each volume lie on its target lattice: 0/1 for semantic classes, ids 1, 2, ... of 26-connected
    components for instance classes. Memory: slabs, and for one instance class at a time the whole volume (9 bytes per
    voxel). A volume that is done already is not done again, unless by another `revision`.
    Raises ContractError naming a prediction that is not what its JSON says.
    """
    out_json, folder = Path(out_json), Path(store_dir)
    folder.mkdir(parents=True, exist_ok=True)
    predictions = read_records(predict_jsons)
    remove_partials(folder)
    remove_unlisted(folder, predictions)
    settings = {
        "version": RESULT_VERSIONS["segment"],
        "thresholds": dict(thresholds),
        "min_size_nm3": dict(min_size_nm3),
        "derive": list(derive),
        "revision": revision,
    }
    records = []
    for name, members in sorted(predictions.items()):
        predicted = [member for member in members if member["status"] == "ok"]
        if len(predicted) > 1:
            raise ContractError(f"{name}: predicted {len(predicted)} times in {[str(p) for p in predict_jsons]}")
        if predicted:
            record = _segment_volume(predicted[0], folder, settings)
            record["path"] = os.path.relpath(folder / record["path"], out_json.parent)
        else:
            record = {key: members[0][key] for key in ("name", "dataset", "target", "status", "cause", "path")}
            record |= {"classes": [], "objects": {}, "not_derived": {}, "fingerprint": None}
        records.append(record)
    sources = [read_json(path) for path in predict_jsons]
    write_json(
        out_json,
        {
            "model": sources[0]["model"] if sources else None,
            "fold": sources[0]["fold"] if sources else None,
            "subset": subset,
            "records": records,
        },
    )


def _segment_volume(prediction: Record, folder: Path, settings: Mapping[str, Any]) -> Record:
    """Write the arrays of one volume unless they are there already; return its record, with the path in `folder`."""
    store = folder / f"{file_stem(prediction['name'])}.zarr"
    sidecar = store.with_suffix(".json")
    target = Lattice.from_dict(prediction["target"])
    parts, not_derived = outputs_of(prediction["classes"], settings["derive"])
    fingerprint = digest({"prediction": prediction["fingerprint"], "target": prediction["target"], **settings})
    if store.is_dir() and sidecar.is_file() and read_json(sidecar)["fingerprint"] == fingerprint:
        return dict(read_json(sidecar))
    for name, cause in not_derived.items():
        logger.warning("%s: group %s is left out: %s", prediction["name"], name, cause)
    masks = Masks(Probabilities(prediction, target), settings["thresholds"])
    smallest = {
        name: math.ceil(settings["min_size_nm3"].get(name, 0) / math.prod(target.voxel_nm) - 1e-6) for name in parts
    }
    plain = [name for name in parts if not get_class(name).instance and smallest[name] <= 1]
    objects = {}
    with replacing(store) as temporary:
        group = zarr.create_group(str(temporary), zarr_format=2)
        arrays = {name: create_mask(group, name, "uint8", target) for name in plain}
        for first, last in _slabs(target.shape[0]):
            made: dict[str, np.ndarray] = {}
            for name in plain:
                arrays[name][first:last] = masks.union(parts[name], first, last, made)
        for name in parts:
            if name not in plain:
                labels, count = objects_of(partial(masks.union, parts[name]), target, smallest[name])
                instance = get_class(name).instance
                if instance:
                    objects[name] = count
                array = create_mask(group, name, str(labels.dtype) if instance else "uint8", target)
                for first, last in _slabs(target.shape[0]):
                    array[first:last] = labels[first:last] if instance else labels[first:last] > 0
    record = {
        "name": prediction["name"],
        "dataset": prediction["dataset"],
        "path": store.name,
        "target": prediction["target"],
        "classes": list(parts),
        "objects": objects,
        "not_derived": not_derived,
        "fingerprint": fingerprint,
        "status": "ok",
        "cause": "",
    }
    write_json(sidecar, record)
    logger.info("%s: %d classes on %s voxels", prediction["name"], len(parts), target.shape)
    return record


def outputs_of(classes: Sequence[str], derive: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the classes that make up each array to be written, and why some groups of `derive` cannot be.

    A group that was predicted itself is taken as it is.
    """
    parts = {name: [name] for name in classes}
    impossible = {}
    for group in derive:
        if group in parts:
            continue
        if derivable(group, classes):
            parts[group] = parts_of(group, classes)
        else:
            impossible[group] = (
                f"the predicted classes inside it ({', '.join(parts_of(group, classes)) or 'none'}) are not all of it"
            )
    return parts, impossible


class Masks:
    """Thresholded probabilities on the target lattice."""

    def __init__(self, probabilities: ClassVolumes, thresholds: Mapping[str, float]) -> None:
        self._probabilities, self._thresholds = probabilities, thresholds

    def union(
        self, names: Sequence[str], first: int, last: int, made: dict[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """Return where any of the classes is on the planes [first, last), bool (z, y, x).

        made: masks of single classes on these planes, used and added to.
        """
        made = {} if made is None else made
        for name in names:
            if name not in made:
                threshold = self._thresholds.get(name, self._thresholds["default"])
                made[name] = self._probabilities.slab(name, first, last) > 255 * threshold
        union = made[names[0]].copy()
        for name in names[1:]:
            union |= made[name]
        return union


def _slabs(planes: int) -> Iterator[tuple[int, int]]:
    for first in range(0, planes, SLAB):
        yield first, min(first + SLAB, planes)


def objects_of(mask: Callable[[int, int], np.ndarray], target: Lattice, smallest: int) -> tuple[np.ndarray, int]:
    """Return the 26-connected components of at least `smallest` voxels, numbered 1, 2, ..., and how many there are.

    mask: gives the planes [first, last) as bool. The ids are uint16 if they fit, else uint32. Connectivity is that of
    the challenge's scorer (CHALLENGE section 4.3).
    """
    whole = np.empty(target.shape, bool)
    for first, last in _slabs(target.shape[0]):
        whole[first:last] = mask(first, last)
    labels, found = cc3d.connected_components(whole, connectivity=26, return_N=True, out_dtype=np.uint32)
    del whole
    sizes = np.zeros(found + 1, np.int64)
    for first, last in _slabs(target.shape[0]):
        sizes += np.bincount(labels[first:last].ravel(), minlength=found + 1)
    kept = sizes >= max(1, smallest)
    kept[0] = False
    count = int(kept.sum())
    dtype = np.uint16 if count <= np.iinfo(np.uint16).max else np.uint32
    ids = np.where(kept, np.cumsum(kept), 0).astype(dtype)
    result = np.empty(target.shape, dtype)
    for first, last in _slabs(target.shape[0]):
        result[first:last] = ids[labels[first:last]]
    return result, count
