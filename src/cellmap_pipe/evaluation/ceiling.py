"""The best score that a grid allows: the labels themselves, taken to the grid and back, scored like a prediction.

The label map of a converted crop becomes a perfect prediction, certain where a class is present and nothing elsewhere,
and goes to the crop's own voxels as predictions do (prediction.postprocess). What is lost on the way no network that
works on this grid can be blamed for. Where the label map knows nothing (outside the EM, say) nothing is predicted.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.errors import CellmapError, ContractError
from cellmap_pipe.evaluation.alignment import align, held_bytes, is_instance
from cellmap_pipe.evaluation.challenge import Record
from cellmap_pipe.evaluation.crops import KnownLabels, Planes
from cellmap_pipe.evaluation.inputs import read_slabs, slabs
from cellmap_pipe.evaluation.instance import instance_bytes, score_instance, unanswered
from cellmap_pipe.evaluation.rules import get_rules
from cellmap_pipe.evaluation.semantic import score_semantic
from cellmap_pipe.evaluation.tasks import LARGER, budget_bytes, run_tasks
from cellmap_pipe.files import canonical_json, digest, file_digest, read_json, remove_partials, write_json, write_text
from cellmap_pipe.geometry import Lattice, Shape3
from cellmap_pipe.prediction.ensemble import ClassVolumes
from cellmap_pipe.prediction.instances import find_objects
from cellmap_pipe.prediction.postprocess import Masks, outputs_of
from cellmap_pipe.prediction.processing import Processing
from cellmap_pipe.prediction.store import file_stem
from cellmap_pipe.prepare.crops import read_crops
from cellmap_pipe.prepare.em import valid_voxels
from cellmap_pipe.prepare.label_map import build_label_map
from cellmap_pipe.prepare.labels import PRESENT, LabelArray, LabelReader, empty_means, read_label
from cellmap_pipe.prepare.ngff import chunk_files, read_image
from cellmap_pipe.prepare.nifti import nifti_slabs
from cellmap_pipe.prepare.state_table import decode_table

logger = logging.getLogger(__name__)

REMEDY = "run again with -R convert"

# Planes of a label that are read at a time, at most: the chunks of the challenge's arrays are no thicker.
_LAYER_PLANES = 128

# Bytes per voxel of such a layer: values, states and the answer, and what is made of them.
_SLAB_BYTES = 12

# What else it takes to score a label: slabs of the label map, and one slab that is resampled.
_WORKING_BYTES = 300_000_000

Rows = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class CeilingTask:
    """One (crop, label): the crop's conversion record, the classes that make the label up, and where things lie.

    truth: group of the label's array. em: group of the crop's EM. label_map: NIfTI of the crop on the grid.
    memory: bytes that it may take.
    """

    crop: Record
    label: str
    parts: tuple[str, ...]
    truth: Path
    em: Path
    label_map: Path
    thresholds: Mapping[str, float]
    rules: str
    memory: int

    @property
    def target(self) -> Lattice:
        """The crop's own voxels."""
        return Lattice.from_dict(self.crop["label_lattice"])

    @property
    def grid(self) -> Lattice:
        """The voxels of the label map."""
        return Lattice.from_dict(self.crop["lattice"])

    @property
    def from_own_array(self) -> bool:
        """Whether the label map lacks parts of this group in this crop, so that only the group's own array tells."""
        return not set(self.parts) <= set(self.crop["annotated"])

    @property
    def bytes(self) -> int:
        """An estimate of the memory that it takes."""
        shape, layer = self.target.shape, math.prod(self.target.shape[1:]) * _LAYER_PLANES
        grid = self.grid.voxels * 5 if self.from_own_array else 0
        scoring = min(self.target.voxels, layer) * _SLAB_BYTES
        if is_instance(self.label):  # of a class array the dtype is not known before it is read
            scoring += instance_bytes(shape, 4, 4)
        return _WORKING_BYTES + grid + scoring


def ceiling_shard(
    convert_json: str | Path,
    crops_csv: str | Path,
    out_json: str | Path,
    *,
    data_root: str | Path,
    nifti_dir: str | Path,
    workers: int,
    thresholds: Mapping[str, float],
    derive: Sequence[str],
    labels: Mapping[str, Any],
    rules: str = "csc-2026.06",
    memory_gb: float | None = None,
) -> None:
    """Write the scores of one shard's labels after their way to the grid and back: {grid, voxel_nm, rules, records}.

    thresholds, derive: of the segmentation, see `postprocess.segment`; labels: what all-zero arrays mean, see
    `evaluate_fold`. Scored are the configured classes and the groups derived from them, where a crop annotates them.
    Record keys: crop, label, kind, status, voxel_size (the crop's own, nm), voxels (tp, fp, fn over the known ones),
    known_voxels, truth_nm3 and kept_nm3 (volume of the class before and after), grid_nm3 (on the grid), and the
    official keys tp, fp, fn, ..., which `challenge.aggregate` pools. A label that cannot be read is recorded with
    status "failed" and its cause. Crops that have not changed are not scored again: their records lie beside
    `out_json`, in a folder of its name.
    Raises ContractError if a converted crop is not in crops.csv.
    """
    out_json, budget = Path(out_json), budget_bytes(memory_gb)
    converted = read_json(convert_json, REMEDY)
    listed = {row["crop"]: row for row in read_crops(crops_csv)}
    parts, _ = outputs_of(converted["classes"], derive)
    crops = {record["crop"]: record for record in converted["records"] if record["status"] == "ok"}
    for name in crops:
        if name not in listed:
            raise ContractError(f"{name}: in {convert_json}, not in {crops_csv}; {REMEDY}")
    sidecars = {name: out_json.with_suffix("") / f"{file_stem(name)}.json" for name in crops}
    _remove_others(out_json.with_suffix(""), list(sidecars.values()))
    tasks = {
        name: [
            CeilingTask(
                crop=crop,
                label=label,
                parts=tuple(parts[label]),
                truth=Path(data_root) / listed[name]["labels"] / label,
                em=Path(data_root) / crop["em"],
                label_map=Path(nifti_dir) / crop["files"]["label"]["path"],
                thresholds=thresholds,
                rules=get_rules(rules).name,
                memory=budget,
            )
            for label in listed[name]["annotated"].split(";")
            if label in parts and not _withdrawn(crop, label, labels)
        ]
        for name, crop in crops.items()
    }
    fingerprints = {name: _fingerprint(crop, tasks[name]) for name, crop in crops.items()}
    records = {name: _earlier(sidecars[name], fingerprints[name]) for name in crops}
    todo = [task for name, scored in tasks.items() if not records[name] for task in scored]
    costs = [min(budget, task.bytes) for task in todo]
    order = list(CLASSES)
    for task, record in run_tasks(score_ceiling_label, todo, costs, workers, budget / 1e9, lost=_lost):
        name = task.crop["crop"]
        records[name].append(record)
        if len(records[name]) == len(tasks[name]) and all(entry["status"] != "failed" for entry in records[name]):
            records[name].sort(key=lambda entry: order.index(entry["label"]))  # they come as they are done
            write_json(sidecars[name], {"fingerprint": fingerprints[name], "records": records[name]})
            logger.info("%s: %d classes", name, len(records[name]))
    found = [entry for entries in records.values() for entry in entries]
    contract = {
        "grid": converted["grid"],
        "voxel_nm": converted["voxel_nm"],
        "rules": get_rules(rules).name,
        "provisional": get_rules(rules).provisional,
        "note": get_rules(rules).note,
        "records": sorted(found, key=lambda entry: (entry["crop"], order.index(entry["label"]))),
    }
    # without indentation: the records of 48 classes would else outgrow the megabyte that a declared output may have
    write_text(out_json, canonical_json(contract) + "\n")


def _withdrawn(crop: Record, label: str, labels: Mapping[str, Any]) -> bool:
    """Return whether the label's array is all zeros and is taken to say nothing."""
    return label not in crop["annotated"] and empty_means(labels, crop["crop"], label) == "unknown"


def _remove_others(folder: Path, listed: Sequence[Path]) -> None:
    remove_partials(folder)
    for path in set(folder.glob("*.json")) - set(listed):
        path.unlink(missing_ok=True)


def _fingerprint(crop: Record, tasks: Sequence[CeilingTask]) -> str:
    """Return the digest of what determines a crop's records."""
    return digest(
        {
            "version": RESULT_VERSIONS["ceiling"],
            "input": crop["input_digest"],
            "label_map": crop["files"]["label"]["sha256"],
            "tasks": {task.label: [task.parts, task.rules, dict(task.thresholds)] for task in tasks},
            # the conversion reads no groups, and so digests none, where all the configured classes have arrays
            "groups": {task.label: _array_digest(task.truth) for task in tasks if task.label not in crop["classes"]},
        }
    )


def _array_digest(path: Path) -> list[Any]:
    """Return what the bytes of a label array and its mask depend on, the cause if it cannot be read."""
    try:
        label = read_label(path)
        chunks = {
            name: [level.lattice.to_dict(), *map(file_digest, chunk_files(level, (0, 0, 0), level.lattice.shape))]
            for name, level in label.levels.items()
        }
        return [label.attributes, chunks]
    except (CellmapError, OSError) as error:
        return [str(error)]


def _earlier(path: Path, fingerprint: str) -> list[Record]:
    """Return the records that an earlier run left in `path`, if nothing has changed since; none otherwise."""
    try:
        content = read_json(path)
        return list(content["records"]) if content["fingerprint"] == fingerprint else []
    except (ContractError, KeyError, TypeError):
        return []


def score_ceiling_label(task: CeilingTask) -> Record:
    """Return the record of one label of one crop; status "failed" with its cause if it cannot be scored."""
    try:
        return {**_name(task), **(_nowhere(task) or _score(task))}
    except MemoryError:
        raise
    except (CellmapError, OSError, ValueError, TypeError) as error:
        logger.exception("%s/%s: %s", task.crop["crop"], task.label, error)
        return _failed(task, str(error))


def _name(task: CeilingTask) -> Record:
    kind = "instance" if is_instance(task.label) else "semantic"
    return {"crop": task.crop["crop"], "label": task.label, "kind": kind, "voxel_size": list(task.target.voxel_nm)}


def _failed(task: CeilingTask, cause: str) -> Record:
    return {**_name(task), "status": "failed", "is_missing": False, "cause": " ".join(cause.split())}


def _lost(task: CeilingTask) -> Record:
    return _failed(task, f"its process was killed or ran out of memory; {LARGER}")


def _nowhere(task: CeilingTask) -> Record | None:
    """Return the record of a label that is in no voxel of the crop and of the grid, None if it is in some."""
    source, grid = task.crop["source_counts"].get(task.label), task.crop["counts"]
    if source is None or source["present"] or any(grid[part]["present"] for part in task.parts):
        return None
    counts = {"tp": 0, "fp": 0, "fn": 0, "status": "scored"}
    if is_instance(task.label):
        counts = unanswered(0, task.target.shape, task.target.voxel_nm, task.rules)
    return _record(counts, {"tp": 0, "fp": 0, "fn": 0}, source["absent"], task.target.voxel_nm, 0.0)


def _record(
    counts: Record, voxels: Mapping[str, int], known: int, voxel_nm: Sequence[float], grid_nm3: float
) -> Record:
    size = math.prod(voxel_nm)
    return {
        **counts,
        "is_missing": False,
        "voxels": dict(voxels),
        "known_voxels": known,
        "truth_nm3": round((voxels["tp"] + voxels["fn"]) * size, 3),
        "kept_nm3": round((voxels["tp"] + voxels["fp"]) * size, 3),
        "grid_nm3": round(grid_nm3, 3),
    }


def _score(task: CeilingTask) -> Record:
    label = read_label(task.truth)
    truth = KnownLabels(LabelReader(label), task.memory)
    lattice, perfect = truth.lattice, _perfect(task, label)
    voxels, known_voxels = {"tp": 0, "fp": 0, "fn": 0}, 0
    with _answer(task, perfect, lattice) as answer:
        for planes, values, known in read_slabs((answer, truth, truth.known)):
            assert known is not None
            counts = score_semantic(planes, values, known)
            voxels = {key: voxels[key] + counts[key] for key in voxels}
            known_voxels += int(np.count_nonzero(known))
        counts = {**voxels, "status": "scored"}
        if is_instance(task.label):
            memory_gb = max(0, task.memory - held_bytes(answer)) / 1e9
            counts = score_instance(answer, truth, lattice.voxel_nm, truth.known, task.rules, memory_gb=memory_gb)
    on_grid = task.crop["counts"].get(task.label, {}).get("present")
    grid_voxels = perfect.voxels(task.parts) if on_grid is None else on_grid
    return _record(counts, voxels, known_voxels, lattice.voxel_nm, grid_voxels * math.prod(task.grid.voxel_nm))


@contextmanager
def _answer(task: CeilingTask, perfect: "PerfectPrediction", lattice: Lattice) -> Iterator[Any]:
    """Yield the perfect prediction on the truth's `lattice`, read plane by plane: masks, ids for an instance class."""
    mask = partial(Masks(perfect, task.thresholds).union, task.parts)
    with ExitStack() as stack:
        if is_instance(task.label):
            objects = stack.enter_context(find_objects(mask, task.target, Processing(), memory_gb=task.memory / 2e9))
            answer = Planes(task.target.shape, np.dtype(objects.dtype), objects.ids)
        else:
            answer = Planes(task.target.shape, np.dtype(np.uint8), partial(_planes, mask, task.target.shape))
        if lattice.same_as(task.target):
            yield answer
        else:  # a label on other voxels than the crop's: the scorer aligns the segmentation
            place = (task.target.voxel_nm, task.target.translation_nm, lattice.voxel_nm, lattice.shape)
            yield align(answer, task.label, *place, lattice.translation_nm, task.rules)


def _planes(mask: Callable[[int, int], np.ndarray], shape: Shape3, first: int, last: int) -> np.ndarray:
    """Return planes of a mask, uint8 (z, y, x), resampled a few at a time: a layer of chunks may be thick."""
    result = np.empty((last - first, *shape[1:]), bool)
    for piece in slabs(result.shape):
        result[piece] = mask(first + piece.start, first + piece.stop)
    return result.view(np.uint8)


def _perfect(task: CeilingTask, label: LabelArray) -> "PerfectPrediction":
    """Return the perfect prediction of the task's parts.

    Of a group whose parts are not all annotated in the crop, the label map does not tell where they are: its own array
    is taken to the grid by itself, and a network is taken to answer with any of the parts there.
    """
    if task.from_own_array:
        whole = task.crop["em_valid_fraction"] == 1
        valid = None if whole else valid_voxels(read_image(task.em), task.grid, task.crop["em_level"]["path"])
        own = build_label_map([label], task.grid, [task.label], valid=valid, max_upsample=math.inf)
        present = dict.fromkeys(task.parts, own.table[:, 0] == PRESENT)
        return PerfectPrediction(lambda first, last: own.rows[first:last], present, task.grid, task.target)
    classes = task.crop["classes"]
    table = decode_table(task.crop["table"], len(classes))
    present = {part: table[:, classes.index(part)] == PRESENT for part in task.parts}
    label_map = LabelMapFile(task.label_map, task.grid.shape)
    return PerfectPrediction(label_map.planes, present, task.grid, task.target)


class PerfectPrediction(ClassVolumes):
    """What a network without fault would answer on the grid: 255 where a class is present, else 0."""

    def __init__(self, rows: Rows, present: Mapping[str, np.ndarray], grid: Lattice, target: Lattice) -> None:
        """rows: gives the planes [first, last) of the label map. present: by class, whether a row holds it (bool)."""
        super().__init__(grid, target)
        self._rows, self._grid = rows, grid
        self._value = {name: np.where(holds, 255, 0).astype(np.uint8) for name, holds in present.items()}

    def block(self, name: str, box: tuple[slice, slice, slice]) -> np.ndarray:
        """Return 255 p of a class in a box of the grid, uint8 (z, y, x)."""
        z, y, x = box
        return self._value[name][self._rows(z.start, z.stop)[:, y, x]]

    def voxels(self, names: Sequence[str]) -> int:
        """Return the number of voxels of the grid in which any of the classes is present."""
        value = np.maximum.reduce([self._value[name] for name in names])
        return sum(int(np.count_nonzero(value[self._rows(z.start, z.stop)])) for z in slabs(self._grid.shape))


class LabelMapFile:
    """The label map in a NIfTI file, read slab by slab; those before the planes asked for last are not held.

    A request that begins before the last one's planes reads the file anew.
    """

    def __init__(self, path: Path, shape: Shape3) -> None:
        self._path, self._shape = path, shape
        self._open()

    def _open(self) -> None:
        self._slabs = nifti_slabs(self._path, self._shape)
        self._first, self._held = 0, np.empty((0, *self._shape[1:]), np.uint8)

    def planes(self, first: int, last: int) -> np.ndarray:
        """Return the planes [first, last), unsigned (z, y, x). Raises ContractError if the file is damaged."""
        if first < self._first:
            self._open()
        while (end := self._first + len(self._held)) < last:
            done = min(first, end) - self._first
            self._held = np.concatenate([self._held[done:], next(self._slabs)])
            self._first += done
        return self._held[first - self._first : last - self._first]
