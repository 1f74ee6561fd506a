"""Scores of a fold's validation crops: segmentations against the original label arrays at their own voxels."""

import csv
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_pipe.classes import CLASSES, get_class, score_ceiling
from cellmap_pipe.errors import CellmapError, ContractError
from cellmap_pipe.evaluation.alignment import is_instance, match_geometry, offset_voxels, same_voxel
from cellmap_pipe.evaluation.bootstrap import bootstrap
from cellmap_pipe.evaluation.challenge import Record, aggregate, missing_label
from cellmap_pipe.evaluation.container import ChunkedArray, Segmentations
from cellmap_pipe.evaluation.inputs import check_truth, slabs
from cellmap_pipe.evaluation.instance import score_instance
from cellmap_pipe.evaluation.rules import PORTAL_NOTE, Rules, get_rules
from cellmap_pipe.evaluation.semantic import score_semantic
from cellmap_pipe.evaluation.tasks import INSTANCE_BYTES, SEMANTIC_BYTES, run_tasks
from cellmap_pipe.files import read_json, write_json
from cellmap_pipe.prepare.labels import UNKNOWN, LabelReader, empty_means, is_empty, read_label
from cellmap_pipe.prepare.ngff import chunk_shape

logger = logging.getLogger(__name__)

CLEAN = "clean"


@dataclass(frozen=True)
class CropTask:
    """One (crop, label): the group of its label array, and the folder of the segmentation (None: it failed).

    empty_is_unknown: whether an all-zero array says nothing, so that it is not scored.
    """

    crop: str
    label: str
    truth: str
    segmentation: str | None
    rules: str
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
    labels: Mapping[str, Any] | None = None,
    workers: int = 1,
    memory_gb: float | None = None,
) -> None:
    """Write the scores of all volumes in `segment_json` over their annotated labels (`classes` and segmented groups).

    labels: what all-zero arrays mean, as configured (`empty`, `empty_by_class`, `empty_by_crop`; default: absent). One
    that means "unknown" is listed under `withdrawn` and not scored, as it is not trained on.
    Unknown voxels count nowhere. A volume that failed misses its labels; one that another model's grid serves is listed
    under `not_served` and left out. A label that cannot be read or compared is recorded with status "failed" and its
    cause; the others count. Result keys: records (official keys; crop, label, kind, dice, known_voxels, and voxels:
    tp, fp, fn of the foreground), aggregate, clean, background, interval (bootstrap over crops), dice, mean_dice,
    differs and clean_records (where `clean` differs), failed, withdrawn, not_served, ceiling, rules, provisional, note,
    model and fold.
    Raises ContractError if a volume is not in crops.csv.
    """
    chosen, labels = get_rules(rules), labels or {"empty": "absent"}
    for name in classes:
        get_class(name)
    content = read_json(segment_json, "run again with -R segment")
    with open(crops_csv, newline="") as stream:
        crops = {row["crop"]: row for row in csv.DictReader(stream)}
    volumes = content["records"]
    segmented = {label for volume in volumes if volume["status"] == "ok" for label in volume["classes"]}
    answerable = [name for name in CLASSES if name in segmented or name in classes]
    tasks, costs = [], []
    for volume in volumes:
        if volume["status"] == "not served":
            continue
        if volume["name"] not in crops:
            raise ContractError(f"{volume['name']}: in {segment_json}, not in {crops_csv}; run again with -R segment")
        row = crops[volume["name"]]
        folder = Path(segment_json).parent / volume["path"] if volume["status"] == "ok" else None
        for label in (name for name in answerable if name in row["annotated"].split(";")):
            path = Path(data_root) / row["labels"] / label
            unknown = empty_means(labels, volume["name"], label) == "unknown"
            tasks.append(CropTask(volume["name"], label, str(path), folder and str(folder), chosen.name, unknown))
            voxels = math.prod(int(n) for n in row["shape"].split(";")) if row["shape"] else 0
            costs.append(voxels * (INSTANCE_BYTES if is_instance(label) else SEMANTIC_BYTES))
    scored = dict(run_tasks(score_crop_label, tasks, costs, workers, memory_gb))
    tasks = sorted(tasks, key=lambda task: (task.crop, task.label))
    results = [result for task in tasks if (result := scored[task]) is not None]
    withdrawn = [f"{task.crop}/{task.label}" for task in tasks if scored[task] is None]
    write_json(out_json, {**_summary(results, chosen, answerable), "withdrawn": withdrawn, **_origin(content, volumes)})


def _origin(content: Mapping[str, Any], volumes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "model": content["model"],
        "fold": content["fold"],
        "not_served": sorted(volume["name"] for volume in volumes if volume["status"] == "not served"),
    }


def _summary(results: Sequence[CropScore], rules: Rules, answerable: Sequence[str]) -> dict[str, Any]:
    records = [result.record for result in results]
    scored = [result for result in results if result.record["status"] != "failed"]
    dice = {name: _pooled_dice(records, name) for name in answerable if any(r["label"] == name for r in records)}
    values = [value for value in dice.values() if value is not None]
    differing = [result for result in scored if _counts(result.record) != _counts(result.clean)]
    failed = [f"{r['crop']}/{r['label']}: {r['cause']}" for r in records if r["status"] == "failed"]
    for line in failed:
        logger.error("%s", line)
    return {
        "rules": rules.name,
        "provisional": rules.provisional,
        "note": rules.note if rules.provisional else PORTAL_NOTE,
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


def _pooled_dice(records: Sequence[Record], label: str) -> float | None:
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
    name = {"crop": task.crop, "label": task.label, "kind": "instance" if is_instance(task.label) else "semantic"}
    try:
        if task.empty_is_unknown and is_empty(read_label(task.truth)):
            return None
        scores = _score(task)
    except MemoryError:
        raise
    except (CellmapError, OSError, ValueError, TypeError) as error:
        logger.exception("%s/%s", task.crop, task.label)
        failed = {**name, "status": "failed", "is_missing": False, "cause": str(error), "dice": None}
        return CropScore(failed, failed, failed)
    return CropScore({**name, **scores.record}, {**name, **scores.clean}, {**name, **scores.background})


def _score(task: CropTask) -> CropScore:
    label = read_label(task.truth)
    lattice, reader, step = label.level.lattice, LabelReader(label), chunk_shape(label.level)[0]

    def planes(part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return truth (0 where unknown) and the mask of known voxels in planes of the crop."""
        values, states = reader.read((part.start, 0, 0), (part.stop, *lattice.shape[1:]))
        check_truth(values)
        known = states != UNKNOWN
        return values * known, known

    pred = None
    if task.segmentation is not None:
        pred = Segmentations(task.segmentation, Path(task.segmentation)).array("", task.label)
    by_rules = {
        name: _aligned(pred, task.label, lattice, get_rules(name)) for name in dict.fromkeys((task.rules, CLEAN))
    }
    parts = list(slabs(lattice.shape, step))
    shared = {"num_voxels": lattice.voxels, "voxel_size": list(lattice.voxel_nm)}
    voxels = {name: {"tp": 0, "fp": 0, "fn": 0} for name in by_rules}
    n_known = 0
    truths, masks = [], []
    for part in parts:
        truth, known = planes(part)
        n_known += int(np.count_nonzero(known))
        for name, aligned in by_rules.items():
            answer = np.zeros(truth.shape, np.uint8) if aligned is None else aligned[part]
            counts = score_semantic(answer, truth, known)
            for key in voxels[name]:
                voxels[name][key] += counts[key]
        if is_instance(task.label):
            truths.append(truth)
            masks.append(known)
    n_truth = voxels[task.rules]["tp"] + voxels[task.rules]["fn"]
    shared["known_voxels"] = n_known

    if is_instance(task.label):
        truth, known = np.concatenate(truths), np.concatenate(masks)
        truths.clear()
        masks.clear()
    records: dict[str, Record] = {}
    for name, aligned in by_rules.items():
        if pred is None:
            source = truth if is_instance(task.label) else np.broadcast_to(np.uint8(0), lattice.shape)
            counts = missing_label(source, task.label)
            if not is_instance(task.label):
                counts["fn"] = n_known
        elif is_instance(task.label):
            assert aligned is not None
            counts = score_instance(aligned[:], truth, lattice.voxel_nm, known, name)
        else:
            counts = {**voxels[name], "status": "scored"}
        v = voxels[name]
        dice = 2 * v["tp"] / (2 * v["tp"] + v["fp"] + v["fn"]) if n_truth else None
        records[name] = {"is_missing": False, **counts, **shared, "voxels": v, "dice": dice}
    if is_instance(task.label):
        empty = score_instance(np.zeros(lattice.shape, np.uint8), truth, lattice.voxel_nm, known, task.rules)
    else:
        empty = {"tp": 0, "fp": 0, "fn": n_truth, "status": "scored"}
    return CropScore(records[task.rules], records[CLEAN], {**empty, **shared, "is_missing": False})


def _aligned(pred: ChunkedArray | None, label: str, lattice: Any, rules: Rules) -> ChunkedArray | np.ndarray | None:
    """Return the segmentation on the truth's voxels: itself where it is there already, so that it can be streamed."""
    if pred is None:
        return None
    place = (lattice.voxel_nm, lattice.translation_nm)
    if (
        pred.voxel_size is not None
        and same_voxel(pred.voxel_size, lattice.voxel_nm)
        and pred.shape == lattice.shape
        and not any(offset_voxels(pred.voxel_size, pred.translation, *place, rules))
    ):
        return pred
    return match_geometry(pred[:], label, pred.voxel_size, pred.translation, place[0], lattice.shape, place[1], rules)
