"""Scores of a fold's validation crops: segmentations against the original label arrays at their own voxels."""

import csv
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_pipe.classes import CLASSES, get_class, parts_of, score_ceiling
from cellmap_pipe.errors import CellmapError, ContractError
from cellmap_pipe.evaluation.alignment import align_by, held_bytes, is_instance, resampling_bytes
from cellmap_pipe.evaluation.bootstrap import bootstrap
from cellmap_pipe.evaluation.challenge import Record, aggregate, missing_label
from cellmap_pipe.evaluation.container import Segmentations
from cellmap_pipe.evaluation.inputs import LAYER_BYTES, check_truth, read_slabs
from cellmap_pipe.evaluation.instance import instance_bytes, score_instance_by, unanswered
from cellmap_pipe.evaluation.rules import CLEAN, Rules, get_rules
from cellmap_pipe.evaluation.semantic import score_semantic
from cellmap_pipe.evaluation.tasks import LARGER, budget_bytes, run_tasks, semantic_bytes
from cellmap_pipe.files import read_json, write_json
from cellmap_pipe.geometry import Shape3
from cellmap_pipe.prepare.labels import UNKNOWN, LabelReader, empty_means, is_empty, read_label
from cellmap_pipe.prepare.ngff import chunk_shape

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CropTask:
    """One (crop, label): the group of its label array, and the folder of the segmentation (None: it failed).

    memory: bytes that it may take. empty_is_unknown: whether an all-zero array says nothing, so that it is not scored.
    """

    crop: str
    label: str
    truth: str
    segmentation: str | None
    rules: str
    memory: int
    empty_is_unknown: bool = False


@dataclass(frozen=True)
class CropScore:
    """Records of one (crop, label) by the configured rules, by `clean`, and of an answer that is all background."""

    record: Record
    clean: Record
    background: Record


def evaluate_fold(
    segment_json: str | os.PathLike[str],
    crops_csv: str | os.PathLike[str],
    data_root: str | os.PathLike[str],
    out_json: str | os.PathLike[str],
    *,
    rules: str = "csc-2026.06",
    classes: Sequence[str],
    derive: Sequence[str],
    labels: Mapping[str, Any] | None = None,
    workers: int = 1,
    memory_gb: float | None = None,
) -> None:
    """Write the scores of all volumes in `segment_json` over those of `classes` and their groups that are annotated.

    derive: groups that are formed of parts; those of which any part is in `classes` are scored, whichever parts the
    model has. The labels are thus the same for all sources, and so is what means that compare them are over: a label
    that a model lacks is missed, and one that it segmented beyond them, as with weights of another configuration, is
    not scored at all.
    labels: what all-zero arrays mean, as configured (`empty`, `empty_by_class`, `empty_by_crop`; default: absent). One
    that means "unknown" is listed under `withdrawn` and not scored, as it is not trained on.
    Unknown voxels count nowhere. A volume that failed misses its labels. One that the model was not to predict, and a
    label that it was to leave to another grid (`elsewhere` of the volume's record), are left out and listed under
    `not_served`, as volume and volume/label. A label that cannot be read or compared is recorded with status "failed"
    and its cause; the others count. Result keys: records (official keys; crop, label, kind, dice, known_voxels, and
    voxels: tp, fp, fn of the foreground), aggregate, clean, background, interval (bootstrap over crops), dice,
    mean_dice, differs and clean_records (where `clean` differs), failed, withdrawn, not_served, ceiling, rules,
    provisional, note, model, fold and segmentations (fingerprint by volume).
    Raises ContractError if a volume is not in crops.csv.
    """
    chosen, labels = get_rules(rules), labels or {"empty": "absent"}
    for name in (*classes, *derive):
        get_class(name)
    content = read_json(segment_json, "run again with -R segment")
    with open(crops_csv, newline="") as stream:
        crops = {row["crop"]: row for row in csv.DictReader(stream)}
    volumes = content["records"]
    budget = budget_bytes(memory_gb)
    answerable = [name for name in CLASSES if name in classes or (name in derive and parts_of(name, classes))]
    tasks, costs, not_served = [], [], []
    for volume in volumes:
        if volume["status"] == "not served":
            not_served.append(volume["name"])
            continue
        if volume["name"] not in crops:
            raise ContractError(f"{volume['name']}: in {segment_json}, not in {crops_csv}; run again with -R segment")
        row = crops[volume["name"]]
        folder = Path(segment_json).parent / volume["path"] if volume["status"] == "ok" else None
        elsewhere = volume.get("elsewhere", [])  # records of earlier versions do not say
        for label in (name for name in answerable if name in row["annotated"].split(";")):
            if label in elsewhere:
                not_served.append(f"{volume['name']}/{label}")
                continue
            path = Path(data_root) / row["labels"] / label
            unknown = empty_means(labels, volume["name"], label) == "unknown"
            task = CropTask(volume["name"], label, str(path), folder and str(folder), chosen.name, budget, unknown)
            tasks.append(task)
            costs.append(min(budget, _task_bytes(task)))
    scored = dict(run_tasks(score_crop_label, tasks, costs, workers, budget / 1e9, lost=_lost))
    tasks = sorted(tasks, key=lambda task: (task.crop, task.label))
    results = [result for task in tasks if (result := scored[task]) is not None]
    withdrawn = [f"{task.crop}/{task.label}" for task in tasks if scored[task] is None]
    write_json(
        out_json,
        {
            **_summary(results, chosen, answerable),
            "withdrawn": withdrawn,
            "not_served": sorted(not_served),
            "model": content["model"],
            "fold": content["fold"],
            "segmentations": {volume["name"]: volume.get("fingerprint") for volume in volumes},
        },
    )


def _summary(results: Sequence[CropScore], rules: Rules, answerable: Sequence[str]) -> dict[str, Any]:
    records = [result.record for result in results]
    scored = [result for result in results if result.record["status"] != "failed"]
    dice = {name: pooled_dice(records, name) for name in answerable if any(r["label"] == name for r in records)}
    values = [value for value in dice.values() if value is not None]
    differing = [result for result in scored if _counts(result.record) != _counts(result.clean)]
    failed = [f"{r['crop']}/{r['label']}: {r['cause']}" for r in records if r["status"] == "failed"]
    for line in failed:
        logger.error("%s", line)
    return {
        "rules": rules.name,
        "provisional": rules.provisional,
        "note": rules.note,
        "records": records,
        "aggregate": aggregate(records),
        "interval": bootstrap(records),
        "background": aggregate([result.background for result in scored]),
        "clean": aggregate([result.clean for result in scored]),
        "differs": [f"{result.record['crop']}/{result.record['label']}" for result in differing],
        "clean_records": [result.clean for result in differing],
        "dice": dice,
        "mean_dice": sum(values) / len(values) if values else None,
        "ceiling": score_ceiling(answerable),
        "failed": failed,
    }


def _counts(record: Record) -> list[Any]:
    return [record.get(key) for key in ("tp", "fp", "fn", "hausdorff_norm_sum", "n_hausdorff", "status")]


def pooled_dice(records: Sequence[Record], label: str) -> float | None:
    """Return 2 tp / (2 tp + fp + fn) over the known voxels of the crops in which the class is present, None if none."""
    present = [
        record["voxels"]
        for record in records
        if record["label"] == label and record["status"] != "failed" and record["voxels"]["tp"] + record["voxels"]["fn"]
    ]
    if not present:
        return None
    tp, fp, fn = (sum(voxels[key] for voxels in present) for key in ("tp", "fp", "fn"))
    return 2 * tp / (2 * tp + fp + fn)


def score_crop_label(task: CropTask) -> CropScore | None:
    """Return the scores of one label of one crop, None if its array says nothing.

    Status "failed" with its cause if it cannot be scored.
    """
    name = _name(task)
    try:
        if task.empty_is_unknown and is_empty(read_label(task.truth)):
            return None
        scores = _score(task)
    except MemoryError:
        raise
    except (CellmapError, OSError, ValueError, TypeError) as error:
        logger.exception("%s/%s", task.crop, task.label)
        return _failed(task, str(error))
    return CropScore({**name, **scores.record}, {**name, **scores.clean}, {**name, **scores.background})


def _name(task: CropTask) -> dict[str, str]:
    return {"crop": task.crop, "label": task.label, "kind": "instance" if is_instance(task.label) else "semantic"}


def _failed(task: CropTask, cause: str) -> CropScore:
    failed = {**_name(task), "status": "failed", "is_missing": False, "cause": " ".join(cause.split()), "dice": None}
    return CropScore(failed, failed, failed)


def _lost(task: CropTask) -> CropScore:
    return _failed(task, f"its process was killed or ran out of memory; {LARGER}")


def _task_bytes(task: CropTask) -> int:
    """Return an estimate of the memory that scoring the label takes; 0 where its arrays cannot be read."""
    try:
        truth = KnownLabels(LabelReader(read_label(task.truth)), task.memory)
        pred = None
        if task.segmentation is not None:
            pred = Segmentations(task.segmentation, Path(task.segmentation)).array("", task.label)
        if pred is None or pred.ndim != 3:
            return semantic_bytes(truth, truth.known)
        instance, itemsize = is_instance(task.label), pred.dtype.itemsize
        extra = resampling_bytes(pred.shape, pred.voxel_size, truth.lattice.voxel_nm, itemsize, instance)
    except (CellmapError, OSError, ValueError, TypeError):
        return 0
    if instance:
        return extra + instance_bytes(truth.shape, itemsize, truth.dtype.itemsize)
    return extra + semantic_bytes(truth, truth.known, pred)


def _score(task: CropTask) -> CropScore:
    truth = KnownLabels(LabelReader(read_label(task.truth)), task.memory)
    lattice, instance, all_rules = truth.lattice, is_instance(task.label), _rules_of(task)
    pred = None
    if task.segmentation is not None:
        pred = Segmentations(task.segmentation, Path(task.segmentation)).array("", task.label)
    place = (lattice.voxel_nm, lattice.shape, lattice.translation_nm)
    if pred is None:
        answers: list[tuple[Any, list[Rules]]] = [(background(lattice.shape), all_rules)]
    else:
        answers = align_by(pred, task.label, pred.voxel_size, pred.translation, *place, rules=all_rules)
    n_known, counted = 0, [dict.fromkeys(("tp", "fp", "fn"), 0) for _ in answers]
    for values, known, *planes in read_slabs((truth, truth.known, *(answer for answer, _ in answers))):
        assert known is not None
        n_known += int(np.count_nonzero(known))
        for voxels, answered in zip(counted, planes, strict=True):
            found = score_semantic(answered, values, known)
            voxels.update({key: voxels[key] + found[key] for key in voxels})
    shared = {"num_voxels": lattice.voxels, "voxel_size": list(lattice.voxel_nm), "known_voxels": n_known}
    records: dict[str, Record] = {}
    for voxels, (answer, of_rules) in zip(counted, answers, strict=True):
        counts: dict[str, Record] = {rules.name: {**voxels, "status": "scored"} for rules in of_rules}
        if pred is None:
            missed = missing_label(truth, task.label)
            counts = dict.fromkeys(counts, missed if instance else {**missed, "fn": n_known})
        elif instance:
            memory_gb = max(0, task.memory - held_bytes(answer)) / 1e9
            counts = score_instance_by(answer, truth, lattice.voxel_nm, truth.known, of_rules, memory_gb)
        n_truth = voxels["tp"] + voxels["fn"]
        dice = 2 * voxels["tp"] / (n_truth + voxels["tp"] + voxels["fp"]) if n_truth else None
        for name, of_rule in counts.items():
            records[name] = {"is_missing": False, **of_rule, **shared, "voxels": voxels, "dice": dice}
    clean = records[CLEAN]
    empty: Record = {"tp": 0, "fp": 0, "fn": n_truth, "status": "scored"}
    if instance:  # all objects are counted by `clean`, also of a crop that the evaluator skips
        empty = unanswered(clean["tp"] + clean["fn"], lattice.shape, lattice.voxel_nm, task.rules)
    return CropScore(records[task.rules], clean, {**empty, **shared, "is_missing": False})


def _rules_of(task: CropTask) -> list[Rules]:
    return [get_rules(name) for name in dict.fromkeys((task.rules, CLEAN))]


@dataclass(frozen=True)
class Planes:
    """An array of the shape (z, y, x) whose planes [first, last) a function gives."""

    shape: Shape3
    dtype: np.dtype[Any]
    planes: Callable[[int, int], np.ndarray]

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return whole planes along the first axis."""
        start, stop, _ = part.indices(self.shape[0])
        return self.planes(start, stop)


def background(shape: Shape3) -> Planes:
    """Return an answer without any voxel."""
    return Planes(shape, np.dtype(np.uint8), lambda first, last: np.zeros((last - first, *shape[1:]), np.uint8))


class KnownLabels:
    """A class array of a crop, read plane by plane: its values, 0 where they are unknown; see `known`.

    shape (z, y, x), dtype and chunks as zarr arrays have them, but that chunks are one plane thick where a layer of
    whole ones is large beside `memory` (bytes). The planes read last are kept: values and mask are asked for in turns.
    """

    def __init__(self, reader: LabelReader, memory: int) -> None:
        self._reader, level = reader, reader.label.level
        self.lattice = level.lattice
        self.shape, self.dtype = level.lattice.shape, np.dtype(level.dtype)
        chunks = chunk_shape(level)
        layer = chunks[0] * math.prod(self.shape[1:]) * self.dtype.itemsize
        self.chunks = (chunks[0] if layer <= min(LAYER_BYTES, memory / 8) else 1, *chunks[1:])
        self._held: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None

    @property
    def known(self) -> "KnownVoxels":
        """The mask of known voxels."""
        return KnownVoxels(self)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return whole planes along the first axis. Raises DataError for values that are no labels."""
        return self.planes(part)[0]

    def planes(self, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return values and the mask of known voxels, bool, in whole planes."""
        start, stop, _ = part.indices(self.shape[0])
        if self._held is None or self._held[0] != (start, stop):
            self._held = None
            values, states = self._reader.read((start, 0, 0), (stop, *self.shape[1:]))
            check_truth(values)
            known = states != UNKNOWN
            values[~known] = 0
            self._held = (start, stop), values, known
        return self._held[1:]


class KnownVoxels:
    """Where a label is known, bool (z, y, x), read plane by plane."""

    def __init__(self, labels: KnownLabels) -> None:
        self._labels = labels
        self.shape, self.chunks, self.dtype = labels.shape, labels.chunks, np.dtype(bool)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return whole planes along the first axis."""
        return self._labels.planes(part)[1]
