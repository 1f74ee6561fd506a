"""From probabilities to what is asked for: masks, groups and instances on the target voxels of each volume."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numcodecs
import numpy as np
import zarr

from cellmap_pipe.classes import get_class, missing_atoms, parts_of
from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.errors import CellmapError, ContractError, DataError
from cellmap_pipe.evaluation.container import MASK_ARRAY
from cellmap_pipe.files import digest, read_json, remove_partials, replacing, write_json
from cellmap_pipe.geometry import Lattice, Shape3, shape3
from cellmap_pipe.machine import usable_gb
from cellmap_pipe.prediction.ensemble import ClassVolumes, Probabilities, Record, pieces, read_records
from cellmap_pipe.prediction.hierarchy import repair
from cellmap_pipe.prediction.instances import find_objects, smallest_object
from cellmap_pipe.prediction.masks import CHUNK, create_labels, create_mask
from cellmap_pipe.prediction.plan import Box
from cellmap_pipe.prediction.processing import Choice, Processing, configured, read_tuned
from cellmap_pipe.prediction.store import file_stem, remove_unlisted

logger = logging.getLogger(__name__)

# What is held of a piece of the volume while its masks are made: values of classes, masks
PIECE_BYTES = 1 << 28

# What the interpreter and a slab to be written take beside the search for objects (measured: 0.3)
RESERVED_GB = 0.5

SCRATCH_CHUNK: Shape3 = (16, 256, 256)


def segment(
    predict_jsons: Sequence[str | Path],
    out_json: str | Path,
    *,
    store_dir: str | Path,
    settings: Mapping[str, Any],
    subset: str,
    tuned: str | Path | None = None,
    memory_gb: float | None = None,
) -> None:
    """Write the masks and instances of every predicted volume, then the JSON that lists them.

    settings: `Config.segmentation_settings()`: threshold, thresholds, hole_nm3, split_nm and min_size_nm3 (see
    processing.Processing; those of classes that tuning chose are replaced), derive, repair and revision.
    tuned: what `tuning.tune` wrote; each volume is processed as it says, and repaired if `repair` is "auto" and it says
    so. derive: groups that are formed as the union of the predicted classes inside them, at the thresholds of these or,
    where it has one, at its own; one that lacks atoms is listed under `approximate` of the record with their names, one
    without any predicted class under `not_derived`. `elsewhere` of the record lists what the model was to leave to
    another grid, also the groups that lack a part for it.
    Array `{class}/s0` of each volume lies on its target lattice: 0/1 for semantic classes, ids 1, 2, ... for instance
    classes; see masks.py. memory_gb: all that the process may take, at most what `machine.usable_gb` says (None: that);
    a volume whose objects take more is searched in slabs, to the same result.
    A volume that is done already is not done again, unless by another `revision`. One whose prediction is not what its
    JSON says is named by ContractError after all others are done.
    """
    out_json, folder = Path(out_json), Path(store_dir)
    folder.mkdir(parents=True, exist_ok=True)
    predictions = read_records(predict_jsons)
    remove_partials(folder)
    remove_unlisted(folder, predictions)
    found = None if tuned is None else read_tuned(tuned)
    records, faults = [], []
    for name, members in sorted(predictions.items()):
        predicted = [member for member in members if member["status"] == "ok"]
        if len(predicted) > 1:
            raise ContractError(f"{name}: predicted {len(predicted)} times in {[str(p) for p in predict_jsons]}")
        if not predicted:
            record = {key: members[0][key] for key in ("name", "dataset", "target", "status", "cause", "path")}
            record |= {"classes": [], "objects": {}, "not_derived": {}, "approximate": {}, "fingerprint": None}
            records.append({**record, "elsewhere": _elsewhere(members[0], settings["derive"])})
            continue
        try:
            plan = _plan(predicted[0]["classes"], settings, found.choice(name) if found else Choice())
            record = _segment_volume(predicted[0], folder, plan, settings["revision"], memory_gb)
        except CellmapError as error:
            logger.exception("%s failed", name)
            faults.append(str(error))
            continue
        path = os.path.relpath(folder / record["path"], out_json.parent)
        records.append({**record, "path": path, "elsewhere": _elsewhere(predicted[0], settings["derive"])})
    if faults:
        raise ContractError(f"{len(faults)} of {len(predictions)} volumes failed: {'; '.join(faults)}")
    _warn_of_groups(records)
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


def _elsewhere(prediction: Record, derive: Sequence[str]) -> list[str]:
    """Return what the model left to another grid, and the groups that are not formed, or not wholly, because of it."""
    left = prediction["elsewhere"]
    known = {*left, *prediction["classes"]}
    return [*left, *(group for group in derive if group not in known and parts_of(group, left))]


def _warn_of_groups(records: Sequence[Record]) -> None:
    """Log each group that is not all there, or not at all, with the number of volumes."""
    causes = Counter(
        [
            (name, f"is approximate, without {', '.join(lacking)}")
            for r in records
            for name, lacking in r["approximate"].items()
        ]
        + [(name, f"is left out: {cause}") for r in records for name, cause in r["not_derived"].items()]
    )
    for (name, cause), volumes in sorted(causes.items()):
        logger.warning("group %s %s (%d of %d volumes)", name, cause, volumes, len(records))


@dataclass(frozen=True)
class _Plan:
    """What is made of a volume. parts: the predicted classes that make up each output.

    thresholds: of the predicted classes. own: groups that are thresholded at their own processing's threshold.
    """

    classes: Sequence[str]
    parts: Mapping[str, Sequence[str]]
    thresholds: Mapping[str, float]
    processing: Mapping[str, Processing]
    own: frozenset[str]
    repaired: bool
    approximate: Mapping[str, list[str]]
    not_derived: Mapping[str, str]

    def described(self) -> dict[str, dict[str, Any]]:
        """Return how each output is made, as its record tells it; a union of parts at theirs has no threshold."""
        return {
            name: {
                **self.processing[name].to_dict(),
                "threshold": self.processing[name].threshold if name in {*self.classes, *self.own} else None,
                "parts": list(parts),
            }
            for name, parts in self.parts.items()
        }

    def masks(self, values: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        """Return the masks (bool) of all outputs in one piece. values: gives 255 p of a class there."""
        made: dict[str, np.ndarray] = {}
        kept: dict[str, np.ndarray] = {}
        for name in self.classes:
            value = values(name)
            for group in self.own:
                if name in self.parts[group]:
                    mask = above(value, self.processing[group].threshold)
                    made[group] = mask | made[group] if group in made else mask
            if self.repaired:
                kept[name] = value
            else:
                made[name] = above(value, self.thresholds[name])
        if self.repaired:
            made |= repair(kept, self.thresholds)
        for group, names in self.parts.items():
            if group not in made:
                made[group] = np.logical_or.reduce([made[name] for name in names])
        return made


def _plan(classes: Sequence[str], settings: Mapping[str, Any], choice: Choice) -> _Plan:
    parts, not_derived = outputs_of(classes, settings["derive"])
    processing = {name: choice.processing.get(name) or configured(name, settings) for name in parts}
    return _Plan(
        classes=list(classes),
        parts=parts,
        thresholds={name: processing[name].threshold for name in classes},
        processing=processing,
        own=frozenset(
            name
            for name in parts
            if name not in classes and (name in choice.processing or name in settings["thresholds"])
        ),
        repaired=choice.repair if settings["repair"] == "auto" else bool(settings["repair"]),
        approximate={name: lacking for name, names in parts.items() if (lacking := missing_atoms(name, names))},
        not_derived=not_derived,
    )


def _segment_volume(prediction: Record, folder: Path, plan: _Plan, revision: int, memory_gb: float | None) -> Record:
    """Write the arrays of one volume unless they are there already; return its record, with the path in `folder`."""
    store = folder / f"{file_stem(prediction['name'])}.zarr"
    sidecar = store.with_suffix(".json")
    target = Lattice.from_dict(prediction["target"])
    fingerprint = digest(
        {
            "version": RESULT_VERSIONS["segment"],
            "revision": revision,
            "prediction": prediction["fingerprint"],
            "target": prediction["target"],
            "processing": plan.described(),
            "repair": plan.repaired,
            "not_derived": plan.not_derived,
        }
    )
    there = all((store / name / MASK_ARRAY / ".zarray").is_file() for name in plan.parts)
    if there and sidecar.is_file() and read_json(sidecar)["fingerprint"] == fingerprint:
        return dict(read_json(sidecar))
    whole = [name for name in plan.parts if _needs_objects(name, plan.processing[name], target)]
    marks = {name: {"approximate": lacking} for name, lacking in plan.approximate.items()}
    objects = {}
    with (
        replacing(store) as temporary,
        # by its name `remove_partials` knows that of a killed job
        TemporaryDirectory(prefix=".partial-", dir=folder) as scratch,
    ):
        group = create_labels(temporary, list(plan.parts), {"fingerprint": fingerprint})
        arrays = {
            name: _scratch(Path(scratch) / name, target)
            if name in whole
            else create_mask(group, name, target, notes=marks.get(name))
            for name in plan.parts
        }
        _write_masks(Probabilities(prediction, target), target, plan, arrays)
        for name in whole:
            instance = get_class(name).instance
            try:
                objects_of_class = find_objects(
                    partial(_planes, arrays[name]),
                    target,
                    plan.processing[name],
                    instance=instance,
                    memory_gb=_left_for_objects(memory_gb),
                    scratch=scratch,
                )
            except DataError as error:
                raise DataError(f"{prediction['name']}: {name}: {error}") from error
            with objects_of_class as found:
                count = found.count if instance else None
                dtype = str(np.dtype(found.dtype)) if instance else "uint8"
                array = create_mask(group, name, target, dtype=dtype, objects=count, notes=marks.get(name))
                for first, last in _slabs(target.shape[0]):
                    array[first:last] = found.ids(first, last) if instance else found.mask(first, last)
                if count is not None:
                    objects[name] = count
        sidecar.unlink(missing_ok=True)  # it tells of the store that is replaced now
    record = {
        "name": prediction["name"],
        "dataset": prediction["dataset"],
        "path": store.name,
        "target": prediction["target"],
        "classes": list(plan.parts),
        "objects": objects,
        "processing": plan.described(),
        "repair": plan.repaired,
        "approximate": dict(plan.approximate),
        "not_derived": dict(plan.not_derived),
        "fingerprint": fingerprint,
        "status": "ok",
        "cause": "",
    }
    write_json(sidecar, record)
    logger.info("%s: %d classes on %s voxels", prediction["name"], len(plan.parts), target.shape)
    return record


def _left_for_objects(memory_gb: float | None) -> float:
    total = usable_gb(memory_gb)
    return max(total - RESERVED_GB, total / 2)


def _needs_objects(name: str, how: Processing, target: Lattice) -> bool:
    """Return whether one piece of the volume does not tell what becomes of the class there."""
    pockets, smallest = (smallest_object(size, target.voxel_nm) for size in (how.hole_nm3, how.min_size_nm3))
    return get_class(name).instance or pockets > 1 or smallest > 1


def _write_masks(
    probabilities: ClassVolumes, target: Lattice, plan: _Plan, arrays: Mapping[str, "zarr.Array[Any]"]
) -> None:
    """Write the masks of all outputs piece by piece; every class is resampled once."""
    values = 4 * (len(plan.classes) if plan.repaired else 3)  # float32; without repair two more while one is resampled
    voxels = PIECE_BYTES // (values + len(plan.parts))
    for box in pieces(target.shape, CHUNK, voxels):
        z, y, x = (slice(lo, hi) for lo, hi in zip(*box, strict=True))
        masks = plan.masks(partial(_piece, probabilities, box))
        for name, array in arrays.items():
            array[z, y, x] = masks[name]


def _piece(probabilities: ClassVolumes, box: Box, name: str) -> np.ndarray:
    return probabilities.piece(name, box)


def _scratch(path: Path, lattice: Lattice) -> "zarr.Array[Any]":
    """Return a new array for a mask that is needed only until its objects are found."""
    return zarr.create_array(
        str(path),
        shape=lattice.shape,
        chunks=shape3([min(n, c) for n, c in zip(lattice.shape, SCRATCH_CHUNK, strict=True)]),
        dtype="bool",
        compressors=numcodecs.Blosc("lz4", 1, numcodecs.Blosc.NOSHUFFLE),
        zarr_format=2,
    )


def _planes(array: "zarr.Array[Any]", first: int, last: int) -> np.ndarray:
    return np.asarray(array[first:last])


def _slabs(planes: int) -> Iterator[tuple[int, int]]:
    for first in range(0, planes, CHUNK[0]):
        yield first, min(first + CHUNK[0], planes)


def above(values: np.ndarray, threshold: float) -> np.ndarray:
    """Return where 255 p is above 255 times the threshold, bool."""
    return np.asarray(values > np.float32(255 * threshold))


def outputs_of(classes: Sequence[str], derive: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the classes that make up each array to be written, and why some groups of `derive` cannot be.

    A group that was predicted itself is taken as it is. Others are the union of the classes inside them, also of some
    that are not all of it: `missing_atoms` tells.
    """
    parts = {name: [name] for name in classes}
    impossible = {}
    for group in derive:
        if group in parts:
            continue
        inside = parts_of(group, classes)
        if inside:
            parts[group] = inside
        else:
            impossible[group] = "none of the predicted classes lies inside it"
    return parts, impossible


class Masks:
    """Thresholded probabilities on the target lattice."""

    def __init__(self, probabilities: ClassVolumes, thresholds: Mapping[str, float]) -> None:
        """thresholds: by class, "default" for the others."""
        self._probabilities, self._thresholds = probabilities, thresholds

    def union(self, names: Sequence[str], first: int, last: int) -> np.ndarray:
        """Return where any of the classes is on the planes [first, last), bool (z, y, x)."""
        union = np.asarray(False)
        for name in names:
            threshold = self._thresholds.get(name, self._thresholds["default"])
            union = union | above(self._probabilities.slab(name, first, last), threshold)
        return union
