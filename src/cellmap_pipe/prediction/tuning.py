"""Thresholds, filters and the repair chosen on validation crops, and kept only where crops not looked at gain by them.

The crops are dealt into groups. What is chosen for one group is chosen on the others alone, and so is the decision to
keep it: among the others, every group is scored by what the remaining ones lead to (nested cross-validation). A crop is
therefore never processed by what it taught.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cellmap_pipe.classes import CLASSES, get_class, parts_of
from cellmap_pipe.errors import CellmapError, ContractError, DataError
from cellmap_pipe.evaluation.alignment import is_instance
from cellmap_pipe.evaluation.inputs import check_truth
from cellmap_pipe.evaluation.instance import SKIPPED
from cellmap_pipe.evaluation.rules import get_rules
from cellmap_pipe.evaluation.tasks import run_tasks
from cellmap_pipe.files import write_json
from cellmap_pipe.geometry import Lattice, shape3
from cellmap_pipe.machine import usable_gb
from cellmap_pipe.prediction.ensemble import Probabilities, Record, pieces, read_records
from cellmap_pipe.prediction.hierarchy import repair
from cellmap_pipe.prediction.instance_search import (
    BYTES_PER_VOXEL,
    Table,
    candidates,
    full_records,
    rank,
    search_table,
)
from cellmap_pipe.prediction.instances import find_objects, smallest_object
from cellmap_pipe.prediction.plan import Box
from cellmap_pipe.prediction.postprocess import above
from cellmap_pipe.prediction.processing import FORMAT, Choice, Processing, choice_to_dict, configured
from cellmap_pipe.prediction.store import CHUNK
from cellmap_pipe.prepare.crops import read_crops
from cellmap_pipe.prepare.labels import UNKNOWN, LabelReader, empty_means, is_empty, read_label
from cellmap_pipe.prepare.ngff import chunk_shape

logger = logging.getLogger(__name__)

Groups = frozenset[int]
Task = TypeVar("Task")
Result = TypeVar("Result")

# Thresholds of a semantic class that are told apart: between any two neighbouring values of uint8.
LEVELS = (np.arange(255) + 0.5) / 255
# Those that may be chosen, 0.02 apart: finer steps gain little, and each that is chosen costs a look at the crops.
CHOICES = np.arange(2, 255, 5)
# Voxels along the sides of the middle of a crop, which stands for it where objects are looked for or all classes are
# compared voxel by voxel: in all of a large crop either would take hours, a search tens of gigabytes as well.
# Thresholds alone are judged by all of it.
MIDDLE = 256
# Instance settings whose distances are measured, the best of all by F1.
BEST = 20
# Filters tried of a semantic class, as multiples of its configured ones, or in voxels where none are configured.
SIZES, SIZE_VOXELS = (0.0, 1 / 16, 1 / 4, 1.0, 4.0, 16.0), (0.0, *(4.0**k for k in range(1, 9)))
HOLES, HOLE_VOXELS = (0.0, 1.0, 8.0), (0.0, 1000.0)
# What may be chosen: the threshold alone, or all at once. Fewer choices follow the accidents of few crops less.
FAMILIES = ("threshold", "all")
# Bytes of working memory per voxel of a crop while filters are measured (measured, with a margin).
FILTER_BYTES = 28
# Groups whose scores decide whether something is kept, at least: what fewer gain by may be an accident.
DECIDING = 3
# Objects that decide likewise, all together.
LEAST_OBJECTS = 8
# A score that is higher by no more is the same.
ROUNDING = 1e-9
# Values of all classes together that the repair is judged on at a time; those of one chunk if they are more.
SLAB_VALUES = 1 << 24
# Voxels whose probabilities are counted at a time: rows of chunks of at most ROW x ROW voxels; one row if it has more.
PIECE_VOXELS, ROW = 1 << 25, 64


@dataclass(frozen=True)
class _Label:
    """One class of one crop. parts: the predicted classes whose largest probability is the class's own.

    empty_is_unknown: whether an all-zero array says nothing.
    """

    crop: str
    name: str
    parts: tuple[str, ...]
    record: Record
    truth: str
    empty_is_unknown: bool

    @property
    def lattice(self) -> Lattice:
        return Lattice.from_dict(self.record["target"])


def tune(
    predict_jsons: Sequence[str | Path],
    crops_csv: str | Path,
    out_json: str | Path,
    *,
    data_root: str | Path,
    settings: Mapping[str, Any],
    classes: Sequence[str],
    rules: str,
    labels: Mapping[str, Any],
    folds_csv: str | Path | None = None,
    groups_wanted: int = 5,
    revision: int = 0,
    workers: int = 1,
    memory_gb: float | None = None,
) -> None:
    """Write how the classes are processed where that raises the challenge's score of crops that were not looked at.

    predict_jsons: predictions of validation crops by one model or ensemble. settings: of the segmentation. classes:
    those that are tuned, beside the groups of settings["derive"]. labels: what all-zero arrays mean. folds_csv:
    what `splits.write_folds` wrote: crops that it keeps together, as neighbours show the same cell, are in one group.
    revision: of no effect, it makes the result another one. workers: processes, together within `memory_gb` (see
    machine.usable_gb).
    A class with a threshold in settings["thresholds"] keeps it; so does a derived group of which a part has one. Of a
    semantic class the pooled IoU counts, of an instance class the combined score by `rules`, a crop that the evaluator
    would skip counting as all missed. The repair is judged by the mean over classes of the pooled IoU of their masks,
    before filters. The middle of a crop, of MIDDLE voxels a side, stands for it; thresholds of semantic classes are
    looked for in all of it. A class that is annotated in fewer than DECIDING groups, present in none, or of which there
    are fewer than LEAST_OBJECTS objects, stays as configured.
    Result: what `processing.read_tuned` reads, and report {class: kind, n_crops, score_default, score_tuned
    (each group as the others led to), kept, overall, cause}, repair {score_default, score_tuned, kept},
    failed ["crop/class: cause"].
    A crop that cannot be read is named and left out, the others count.
    Raises ContractError for a prediction that is not what its JSON says, or of crops that crops.csv does not list.
    """
    get_rules(rules)
    tasks = _labels(predict_jsons, crops_csv, Path(data_root), settings, classes, labels)
    groups = deal(
        {task.crop: {t.name for t in tasks if t.crop == task.crop} for task in tasks},
        {task.crop: task.lattice.voxels for task in tasks},
        groups_wanted,
        {row["crop"]: row["group"] for row in read_crops(folds_csv)} if folds_csv else None,
    )
    runner = _Runner(workers, usable_gb(memory_gb))
    evidence = _survey_all(tasks, groups, settings, rules, runner)
    _measure_all(evidence, rules, runner)
    every = frozenset(groups.values())
    kept_apart = [every - {group} for group in sorted(every)]
    found = {
        among: _processing(evidence, [(name, item.final(among)) for name, item in evidence.items()])
        for among in kept_apart
    }
    found[every] = _processing(evidence, [(name, item.overall(every)) for name, item in evidence.items()])
    repairs = _judge_repair(evidence, groups, settings, runner)
    before, after, repaired = repairs[every]
    report = {name: evidence[name].report(every) for name in CLASSES if name in evidence}
    for name, entry in report.items():
        if entry["kept"]:
            logger.info("%s: %.4f tuned, %.4f as configured", name, entry["score_tuned"], entry["score_default"])
    write_json(
        out_json,
        {
            "format": FORMAT,
            "groups": groups,
            "by_group": [choice_to_dict(Choice(found[others], repairs[others][2])) for others in kept_apart],
            "overall": choice_to_dict(Choice(found[every], repaired)),
            "report": report,
            "repair": {"score_default": before, "score_tuned": after, "kept": repaired},
            "failed": sorted(runner.failed),
            "rules": rules,
            "provisional": get_rules(rules).provisional,
            "note": get_rules(rules).note,
        },
    )


def _labels(
    predict_jsons: Sequence[str | Path],
    crops_csv: str | Path,
    data_root: Path,
    settings: Mapping[str, Any],
    classes: Sequence[str],
    labels: Mapping[str, Any],
) -> list[_Label]:
    """Return what is both predicted and annotated, by crop."""
    for name in (*classes, *settings["derive"]):
        get_class(name)
    crops = {row["crop"]: row for row in read_crops(crops_csv)}
    tasks = []
    for crop, records in sorted(read_records(predict_jsons).items()):
        predicted = [record for record in records if record["status"] == "ok"]
        if len(predicted) > 1:
            raise ContractError(f"{crop}: predicted {len(predicted)} times in {[str(path) for path in predict_jsons]}")
        if not predicted:
            logger.warning("%s: not tuned on: %s (%s)", crop, records[0]["status"], records[0]["cause"])
            continue
        if crop not in crops:
            raise ContractError(f"{crop}: predicted, but not in {crops_csv}; run again with -R predict")
        (record,) = predicted
        annotated = crops[crop]["annotated"].split(";")
        for name in CLASSES:
            direct = name in record["classes"] and name in classes
            parts = [name] if direct else parts_of(name, record["classes"]) if name in settings["derive"] else []
            own = name in settings["thresholds"]
            if not own and len({configured(part, settings).threshold for part in parts}) > 1:
                logger.info("%s/%s: not tuned: its parts have different thresholds", crop, name)
            # a group of which another grid answers a part is not whole here
            elif parts and name in annotated and (direct or not parts_of(name, record["elsewhere"])):
                path = data_root / crops[crop]["labels"] / name
                unknown = empty_means(labels, crop, name) == "unknown"
                tasks.append(_Label(crop, name, tuple(parts), record, str(path), unknown))
    return tasks


def deal(
    classes: Mapping[str, set[str]], voxels: Mapping[str, int], wanted: int, together: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Return the group, 0, 1, ... (at most `wanted`), of each crop: of each class every group has about as many voxels.

    classes: annotated in each crop. together: crops of one value are dealt to one group, those without are alone. The
    largest are dealt first, each to the group that has least of their classes.
    """
    units: dict[str, list[str]] = {}
    for crop in sorted(classes):
        units.setdefault((together or {}).get(crop, crop), []).append(crop)
    order = sorted(units.values(), key=lambda crops: (-sum(voxels[crop] for crop in crops), crops))
    n = min(wanted, len(order))
    # in the order of their names: sums over them round alike in every process
    total = {
        name: sum(voxels[crop] for crop in classes if name in classes[crop])
        for name in sorted(set().union(*classes.values()))
    }
    load: list[dict[str, float]] = [dict.fromkeys(total, 0.0) for _ in range(n)]
    groups = {}
    for crops in order:
        names = sorted(set().union(*(classes[crop] for crop in crops)))
        group = min(range(n), key=lambda i: (sum(load[i][name] for name in names), sum(load[i].values()), i))
        for crop in crops:
            groups[crop] = group
            for name in sorted(classes[crop]):
                load[group][name] += voxels[crop] / total[name]
    used = sorted(set(groups.values()))
    return {crop: used.index(group) for crop, group in sorted(groups.items())}


def pooled_score(counts: np.ndarray, instance: bool) -> np.ndarray:
    """Return the challenge's score of pooled counts, (...) from (..., 5), as `evaluation.challenge.aggregate` does.

    counts: tp, fp, fn, and of instances the sum of the normalised distances and their number (CHALLENGE section 4.7).
    """
    tp, fp, fn, total, n = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    objects = tp + fp + fn
    with np.errstate(divide="ignore", invalid="ignore"):
        if not instance:
            return np.where(objects > 0, tp / objects, 1.0)
        f1 = np.where(objects > 0, 2 * tp / (2 * tp + fp + fn), np.where(n > 0, 0.0, 1.0))
        distance = np.where(n > 0, total / n, np.where(objects > 0, 0.0, 1.0))
    return np.asarray(np.sqrt(f1 * distance))


class _Runner:
    """Labels in parallel processes; one that fails is named and left out."""

    def __init__(self, workers: int, memory_gb: float) -> None:
        self._limits = workers, memory_gb
        self.failed: set[str] = set()

    def __call__(
        self, function: Callable[[Task], Result], tasks: Mapping[str, Task], costs: Mapping[str, int]
    ) -> dict[str, Result]:
        """Return function(task) by name. costs: bytes; a task of more than the memory runs alone.

        Leaving it out would make what is tuned depend on the memory of the job.
        """
        results = {}
        for (name, _), (result, cause) in run_tasks(
            partial(_attempt, function), list(tasks.items()), [costs[name] for name in tasks], *self._limits
        ):
            if cause:
                self._fail(name, cause)
            else:
                results[name] = result
        return {name: results[name] for name in tasks if name in results}

    def _fail(self, name: str, cause: str) -> None:
        logger.error("%s: left out: %s", name, cause)
        self.failed.add(f"{name}: {cause}")


def _attempt(function: Callable[[Any], Any], task: tuple[str, Any]) -> tuple[Any, str]:
    try:
        return function(task[1]), ""
    except MemoryError:
        raise
    except (CellmapError, OSError, ValueError, TypeError) as error:
        return None, " ".join(str(error).split())


class _Crop:
    """Probabilities and truth of one class in one crop."""

    def __init__(self, task: _Label) -> None:
        label = read_label(task.truth)
        self.lattice = task.lattice
        if not label.level.lattice.same_as(self.lattice):
            raise DataError(f"{label.level.path}: its voxels are not those that were predicted; run with `-R predict`")
        self._parts = task.parts
        self._probabilities = Probabilities(task.record, self.lattice)
        self._truth = LabelReader(label)
        self._chunk = chunk_shape(label.level)

    def pieces(self) -> Iterator[Box]:
        """Yield boxes (lower, upper) that make up the crop, of rows of chunks, or of parts of large chunks."""
        (depth, height), (Z, Y, X) = (min(n, ROW) for n in self._chunk[:2]), self.lattice.shape
        height *= max(1, PIECE_VOXELS // (depth * height * X))
        for z, y in itertools.product(range(0, Z, depth), range(0, Y, height)):
            yield (z, y, 0), (min(z + depth, Z), min(y + height, Y), X)

    def probabilities(self, box: Box) -> np.ndarray:
        """Return 255 p in a box (lower, upper), float32 (z, y, x)."""
        largest = self._probabilities.piece(self._parts[0], box)
        for part in self._parts[1:]:
            largest = np.maximum(largest, self._probabilities.piece(part, box))
        return largest

    def truth(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """Return ids (0 where unknown) and the mask of known voxels in a box (lower, upper), (z, y, x)."""
        values, states = self._truth.read(*box)
        check_truth(values)
        known = states != UNKNOWN
        return values * known, known

    def middle(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return 255 p, ids and the mask of known voxels of the middle of the crop, of at most MIDDLE voxels a side."""
        box = _middle(self.lattice)
        return self.probabilities(box), *self.truth(box)


def _middle(lattice: Lattice) -> Box:
    """Return the box (lower, upper) of the part of a crop that stands for it, of at most MIDDLE voxels a side."""
    lower = shape3([max(n - MIDDLE, 0) // 2 for n in lattice.shape])
    return lower, shape3([a + min(n, MIDDLE) for a, n in zip(lower, lattice.shape, strict=True)])


@dataclass(frozen=True)
class _Task:
    label: _Label
    settings: tuple[Processing, ...]
    rules: str


def _survey(task: _Task) -> np.ndarray | Table | None:
    """Return what tells the promising settings: histograms, or counts of all settings of an instance class.

    Histograms (2, 256): of known voxels outside and inside the truth, at the number of LEVELS that they are above.
    None if the truth's array says nothing.
    """
    if task.label.empty_is_unknown and is_empty(read_label(task.label.truth)):
        return None
    crop = _Crop(task.label)
    if is_instance(task.label.name):
        return search_table(*crop.middle(), crop.lattice.voxel_nm, task.settings, task.rules)
    histogram = np.zeros((2, 256), np.int64)
    for piece in crop.pieces():
        truth, known = crop.truth(piece)
        histogram += level_histograms(crop.probabilities(piece), truth > 0, known)
    return histogram


def level_histograms(values: np.ndarray, truth: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return known voxels outside and inside the truth by the number of LEVELS that they are above, int64 (2, 256).

    values: 255 p, float32. truth, known: bool.
    """
    level = np.ceil(values - np.float32(0.5)).astype(np.int16)  # exact, also for values that lie on a level
    return np.bincount((level + 256 * truth)[known], minlength=512).reshape(2, 256)


def counts_above(histograms: np.ndarray) -> np.ndarray:
    """Return tp, fp, fn, 0, 0 of the masks above each of LEVELS, int64 (255, 5), from (2, 256) histograms."""
    fp, tp = np.cumsum(histograms[:, ::-1], axis=1)[:, -2::-1]
    zero = np.zeros_like(tp)
    return np.stack([tp, fp, histograms[1].sum() - tp, zero, zero], axis=1)


def _measure(task: _Task) -> np.ndarray:
    """Return tp, fp, fn, sum of normalised distances and their number of every setting, float64 (n, 5)."""
    crop = _Crop(task.label)
    p, truth, known = crop.middle()
    if is_instance(task.label.name):
        records = full_records(p, truth, known, crop.lattice.voxel_nm, task.settings, task.rules)
        n_truth = len(np.unique(truth[truth > 0]))
        missed = [0, 0, n_truth, 0, n_truth]
        keys = ("tp", "fp", "fn", "hausdorff_norm_sum", "n_hausdorff")
        return np.array(
            [missed if record["status"] == SKIPPED else [record[key] for key in keys] for record in records], np.float64
        ).reshape(-1, 5)
    return measure_filters(p, truth > 0, known, replace(crop.lattice, shape=p.shape), task.settings)


def measure_filters(
    values: np.ndarray, truth: np.ndarray, known: np.ndarray, lattice: Lattice, settings: Sequence[Processing]
) -> np.ndarray:
    """Return tp, fp, fn, 0, 0 over the known voxels of a semantic class by setting, float64 (n, 5).

    values: 255 p, float32 (z, y, x). truth, known: bool. Settings that differ in min_size_nm3 alone share objects.
    """
    shared: dict[Processing, list[int]] = {}
    for i, how in enumerate(settings):
        shared.setdefault(replace(how, min_size_nm3=0.0), []).append(i)
    counts = np.zeros((len(settings), 5))
    n_truth = int(np.count_nonzero(truth & known))
    for how, members in shared.items():
        with find_objects(partial(_mask, values, how.threshold), lattice, how, instance=False) as objects:
            ids = objects.ids(0, lattice.shape[0])
            n = objects.count + 1
        voxels, inside = np.bincount(ids.reshape(-1), minlength=n), np.bincount(ids[known], minlength=n)
        correct = np.bincount(ids[known & truth], minlength=n)
        for i in members:
            kept = voxels >= smallest_object(settings[i].min_size_nm3, lattice.voxel_nm)
            kept[0] = False
            tp = int(correct[kept].sum())
            counts[i, :3] = tp, int(inside[kept].sum()) - tp, n_truth - tp
    return counts


def _mask(values: np.ndarray, threshold: float, first: int, last: int) -> np.ndarray:
    return above(values[first:last], threshold)


class _Evidence:
    """What is known of one class: counts of settings by group, and what follows from them for any set of groups.

    labels: the crops that annotate it; those without `surveys`, what `_survey` found, are left out. groups: by crop.
    default: the configured processing. fixed: whether its threshold must stay. `cause` says why nothing is tuned.
    """

    def __init__(
        self,
        labels: Sequence[_Label],
        surveys: Mapping[str, Any],
        groups: Mapping[str, int],
        default: Processing,
        fixed: bool,
    ) -> None:
        self.labels = [label for label in labels if label.crop in surveys]
        self.name, self.default = labels[0].name, default
        self.instance = is_instance(self.name)
        self._surveys, self._groups, self._fixed = surveys, groups, fixed
        self.cause = self._too_few()
        self.settings: list[Processing] = [default]
        self._index: dict[Processing, int] = {}
        self._counts: dict[int, np.ndarray] = {}
        self._memory: dict[tuple[Groups, str], list[Processing]] = {}

    def _too_few(self) -> str:
        """Return why the class cannot be tuned, "" if it is annotated in enough groups."""
        groups = len({self._groups[label.crop] for label in self.labels})
        return "" if groups >= DECIDING else f"annotated in {groups} of the groups, fewer than {DECIDING}"

    def groups(self, among: Groups) -> Groups:
        """Return those groups of `among` that annotate the class."""
        return frozenset(self._groups[label.crop] for label in self.labels) & among

    def subsets(self) -> list[Groups]:
        """Return the sets of groups that something is chosen on: all, and all but one or two."""
        every = self.groups(frozenset(self._groups.values()))
        without = {every - {a, b} for a in every for b in every} | {every}
        return [among for among in without if among]

    def shortlist(self, among: Groups, family: str) -> list[Processing]:
        """Return the settings of a family, the default first, that are promising on some groups."""
        if (among, family) not in self._memory:
            crops = [label.crop for label in self.labels if self._groups[label.crop] in among]
            found = self._instance_list(crops, family) if self.instance else self._semantic_list(crops, family)
            self._memory[among, family] = list(dict.fromkeys([self.default, *found]))
        return self._memory[among, family]

    def _instance_list(self, crops: Sequence[str], family: str) -> list[Processing]:
        settings = self._surveys[crops[0]].settings
        ranked = [settings[i] for i in rank(self._surveys, crops)]
        if family == "threshold":
            ranked = [how for how in ranked if replace(how, threshold=self.default.threshold) == self.default]
        return ranked[:BEST]

    def _semantic_list(self, crops: Sequence[str], family: str) -> list[Processing]:
        thresholds = [self.default.threshold]
        if not self._fixed:
            counts = np.sum([counts_above(self._surveys[crop]) for crop in crops], axis=0)
            scores = pooled_score(counts, instance=False)
            best = LEVELS[CHOICES[scores[CHOICES] == scores[CHOICES].max()]]
            thresholds.append(float(best[np.argmin(np.abs(best - self.default.threshold))]))
        if family == "threshold":
            return [replace(self.default, threshold=threshold) for threshold in thresholds]
        return [replace(how, threshold=threshold) for threshold in thresholds for how in self._filters()]

    def _filters(self) -> list[Processing]:
        voxel = math.prod(_usual_voxel(self.labels))
        sizes = [x * self.default.min_size_nm3 for x in SIZES] if self.default.min_size_nm3 else []
        holes = [x * self.default.hole_nm3 for x in HOLES] if self.default.hole_nm3 else []
        return [
            replace(self.default, hole_nm3=hole, min_size_nm3=size)
            for hole in holes or [n * voxel for n in HOLE_VOXELS]
            for size in sizes or [n * voxel for n in SIZE_VOXELS]
        ]

    def plan(self) -> None:
        """Settle `settings`: all that may be chosen on any of the subsets."""
        lists = [self.shortlist(among, family) for among in self.subsets() for family in FAMILIES]
        self.settings = list(dict.fromkeys(how for found in lists for how in found)) or [self.default]

    def measured(self, counts: Mapping[str, np.ndarray]) -> None:
        """Take the counts of `settings` by crop, (n, 5); crops that have none are left out."""
        self.labels = [label for label in self.labels if label.crop in counts]
        self._index = {how: i for i, how in enumerate(self.settings)}
        for label in self.labels:
            group = self._groups[label.crop]
            self._counts[group] = self._counts.get(group, 0) + counts[label.crop]
        self.cause = self._too_few()
        present = self._present(frozenset(self._counts))
        if not self.cause and not present:
            self.cause = f"absent from all {len(self.labels)} crops"
        elif not self.cause and self.instance and present < LEAST_OBJECTS:
            self.cause = f"{present} objects, fewer than {LEAST_OBJECTS}"

    def _present(self, among: Groups) -> int:
        """Return how much of the class is in the crops of some groups: voxels, or objects."""
        return int(sum(self._counts[group][self._index[self.default]][[0, 2]].sum() for group in self.groups(among)))

    def _score(self, counts: np.ndarray) -> float:
        return float(pooled_score(counts, self.instance))

    def _default_score(self, among: Groups) -> float:
        return self._score(sum(self._counts[group][self._index[self.default]] for group in self.groups(among)))

    def choose(self, among: Groups, family: str) -> Processing:
        """Return the setting of a family that scores best on some groups, of equal ones the first in the shortlist.

        The default where none of them has the class: there the best setting is the one that finds nothing.
        """
        among = self.groups(among)
        if not self._present(among):
            return self.default
        found = [how for how in self.shortlist(among, family) if how in self._index]  # all, unless a crop failed since
        pooled = np.sum([self._counts[group] for group in among], axis=0)
        return found[int(np.argmax(pooled_score(pooled[[self._index[how] for how in found]], self.instance)))]

    def _others_choices(self, among: Groups, family: str) -> dict[int, Processing]:
        """Return by group of `among` the setting that the others of them lead to."""
        among = self.groups(among)
        return {group: self.choose(among - {group}, family) for group in among}

    def _pooled(self, chosen: Mapping[int, Processing]) -> float:
        """Return the score of groups, each by its setting."""
        return self._score(sum(self._counts[group][self._index[how]] for group, how in chosen.items()))

    def _gains(self, chosen: Mapping[int, Processing]) -> int:
        """Return how many more groups gain by their settings, over the default, than lose."""
        changes = [
            self._pooled({group: how}) - self._default_score(frozenset({group})) for group, how in chosen.items()
        ]
        return sum((change > ROUNDING) - (change < -ROUNDING) for change in changes)

    def kept(self, among: Groups) -> str:
        """Return the family whose choice is kept by the groups `among` alone, "" if the default is.

        The better one of those that raise the score of groups that were not looked at, all together and of more groups
        than lose: with few crops, one may outweigh the others by its size.
        """
        if self.cause or len(self.groups(among)) < DECIDING:
            return ""
        chosen = {family: self._others_choices(among, family) for family in FAMILIES}
        scores = {family: self._pooled(of) for family, of in chosen.items() if self._gains(of) > 0}
        best = max(scores, key=lambda family: scores[family], default="")
        return best if best and scores[best] > self._default_score(among) + ROUNDING else ""

    def final(self, among: Groups) -> Processing:
        """Return what the groups `among` lead to."""
        family = self.kept(among)
        return self.choose(among, family) if family else self.default

    def fitted(self, among: Groups, group: int) -> Processing:
        """Return what `group`, one of `among`, is processed by when the others of them are looked at."""
        family = self.kept(among)
        return self.choose(among - {group}, family) if family else self.default

    def held_out(self, every: Groups) -> float | None:
        """Return the score of crops none of which had a part in how it is processed; None without any crop.

        Where the others of a group are too few to decide, it is processed as they led to all the same.
        """
        if not self.labels:
            return None
        groups = self.groups(every)
        if self.cause or len(groups) < 2:
            return self._default_score(every)
        if len(groups) <= DECIDING:
            return max(self._pooled(self._others_choices(every, family)) for family in FAMILIES)
        return self._pooled({group: self.final(every - {group}) for group in groups})

    def overall(self, every: Groups) -> Processing:
        """Return what all groups lead to; the default unless it raises their score held out as well."""
        before, after = (self._default_score(every), self.held_out(every)) if self.labels else (0.0, None)
        return self.final(every) if after is not None and after > before + ROUNDING else self.default

    def report(self, every: Groups) -> dict[str, Any]:
        """Return the class's entry in the result."""
        how = self.overall(every)
        return {
            "kind": "instance" if self.instance else "semantic",
            "n_crops": len(self.labels),
            "score_default": self._default_score(every) if self.labels else None,
            "score_tuned": self.held_out(every),
            "kept": how != self.default,
            "overall": how.to_dict(),
            "cause": self.cause,
        }


def _usual_voxel(labels: Sequence[_Label]) -> tuple[float, float, float]:
    """Return the voxel size (z, y, x; nm) of the median crop by voxel volume."""
    sizes = sorted((label.lattice.voxel_nm for label in labels), key=math.prod)
    return sizes[len(sizes) // 2]


def _survey_all(
    tasks: Sequence[_Label], groups: Mapping[str, int], settings: Mapping[str, Any], rules: str, runner: _Runner
) -> dict[str, _Evidence]:
    """Return the evidence of all classes, with the settings that are to be measured."""
    by_class = {name: [task for task in tasks if task.name == name] for name in CLASSES}
    by_class = {name: labels for name, labels in by_class.items() if labels}
    defaults = {name: _default(labels, settings) for name, labels in by_class.items()}
    surveys: dict[str, _Task] = {}
    costs = {}
    for name, labels in by_class.items():
        default, fixed = defaults[name]
        tried: list[Processing] = []
        if is_instance(name):
            tried = candidates(default, _usual_voxel(labels))
            tried = [how for how in tried if not fixed or how.threshold == default.threshold]
        for label in labels:
            surveys[f"{label.crop}/{name}"] = _Task(label, tuple(tried), rules)
            costs[f"{label.crop}/{name}"] = _middle_bytes(label) if tried else _piece_bytes(label)
    found = runner(_survey, surveys, costs)
    evidence = {}
    for name, labels in by_class.items():
        of_class = {
            label.crop: found[f"{label.crop}/{name}"]
            for label in labels
            if found.get(f"{label.crop}/{name}") is not None
        }
        evidence[name] = _Evidence(labels, of_class, groups, *defaults[name])
        if not evidence[name].cause:
            evidence[name].plan()
    return evidence


def _default(labels: Sequence[_Label], settings: Mapping[str, Any]) -> tuple[Processing, bool]:
    """Return the configured processing of a class, and whether its threshold stays.

    A derived group without a threshold has that of its parts.
    """
    name, given = labels[0].name, set(settings["thresholds"])
    how = configured(name, settings)
    if name not in given:
        how = replace(how, threshold=configured(labels[0].parts[0], settings).threshold)
    return how, not given.isdisjoint([name, *(part for label in labels for part in label.parts)])


def _piece_bytes(label: _Label) -> int:
    """Return about how much memory histograms take."""
    _, Y, X = label.lattice.shape
    return 40 * min(ROW * Y * X, max(PIECE_VOXELS, ROW**2 * X))


def _middle_bytes(label: _Label) -> int:
    return _voxels(_middle(label.lattice)) * (BYTES_PER_VOXEL if is_instance(label.name) else FILTER_BYTES)


def _voxels(box: Box) -> int:
    return math.prod(upper - lower for lower, upper in zip(*box, strict=True))


def _measure_all(evidence: Mapping[str, _Evidence], rules: str, runner: _Runner) -> None:
    tasks, costs = {}, {}
    for name, item in evidence.items():
        for label in item.labels:
            tasks[f"{label.crop}/{name}"] = _Task(label, tuple(item.settings), rules)
            costs[f"{label.crop}/{name}"] = _middle_bytes(label)
    found = runner(_measure, tasks, costs)
    for name, item in evidence.items():
        names = {label.crop: f"{label.crop}/{name}" for label in item.labels}
        item.measured({crop: found[key] for crop, key in names.items() if key in found})


def _processing(evidence: Mapping[str, _Evidence], chosen: Iterable[tuple[str, Processing]]) -> dict[str, Processing]:
    """Return what of the chosen processing of the classes differs from the configured one.

    A derived group of which a part has another threshold is listed with its own, or it would follow the part.
    """
    found = dict(chosen)
    changed = {name: how for name, how in found.items() if how != evidence[name].default}
    for name, item in evidence.items():
        if any(part in changed for label in item.labels for part in label.parts):
            changed.setdefault(name, found[name])
    return changed


@dataclass(frozen=True)
class _RepairTask:
    """The classes of one crop, and by the groups that decide the thresholds of predicted classes and of groups."""

    labels: tuple[_Label, ...]
    thresholds: Mapping[Groups, Mapping[str, float]]


def _judge_repair(
    evidence: Mapping[str, _Evidence], groups: Mapping[str, int], settings: Mapping[str, Any], runner: _Runner
) -> dict[Groups, tuple[float | None, float | None, bool]]:
    """Return scores without and with the repair, and whether it is made, by the groups that decide.

    Each crop has the thresholds that the others of these groups led to.
    """
    every = frozenset(groups.values())
    deciding = [every, *(every - {group} for group in sorted(every))]
    if settings["repair"] != "auto":
        return dict.fromkeys(deciding, (None, None, bool(settings["repair"])))
    thresholds = {}
    for among in deciding:
        for group in among:
            fitted = [(name, item.fitted(among, group)) for name, item in evidence.items()]
            thresholds[among, group] = {n: how.threshold for n, how in _processing(evidence, fitted).items()}
    jobs, costs = {}, {}
    for crop, group in groups.items():
        labels = tuple(label for item in evidence.values() for label in item.labels if label.crop == crop)
        if labels:
            classes = labels[0].record["classes"]
            given = {name: configured(name, settings).threshold for name in (*classes, *settings["thresholds"])}
            tried = {among: given | thresholds[among, group] for among in deciding if group in among}
            jobs[crop] = _RepairTask(labels, tried)
            costs[crop] = 12 * len(classes) * max(map(_voxels, _repair_pieces(labels[0].lattice, len(classes))))
    found = runner(_repair_counts, jobs, costs)
    names = list(evidence)
    result: dict[Groups, tuple[float | None, float | None, bool]] = {}
    for among in deciding:
        counts = np.zeros((2, len(names), 5))
        crops = [crop for crop in found if groups[crop] in among]
        for crop in crops:
            for name, pair in found[crop][among].items():
                counts[:, names.index(name), :3] += pair
        if len(crops) < 2:
            result[among] = (None, None, False)
        else:
            seen = sorted({names.index(name) for crop in crops for name in found[crop][among]})
            before, after = pooled_score(counts[:, seen], instance=False).mean(axis=1).tolist()
            result[among] = (before, after, after > before + ROUNDING)
    return result


def _repair_pieces(lattice: Lattice, classes: int) -> Iterator[Box]:
    """Yield the boxes (lower, upper) that make up the middle of a crop, cut where chunks of probabilities end.

    So each chunk is decompressed once where the probabilities lie on the lattice itself. classes: whose values are held
    together, SLAB_VALUES at most but for a chunk.
    """
    lower, upper = _middle(lattice)
    for low, high in pieces(lattice.shape, CHUNK, SLAB_VALUES // classes):
        box = shape3([*map(max, low, lower)]), shape3([*map(min, high, upper)])
        if all(a < b for a, b in zip(*box, strict=True)):
            yield box


def _repair_counts(task: _RepairTask) -> dict[Groups, dict[str, np.ndarray]]:
    """Return tp, fp, fn without and with the repair, int64 (2, 3), by what decides and class.

    Over the known voxels of the crop's middle.
    """
    lattice, classes = task.labels[0].lattice, list(task.labels[0].record["classes"])
    probabilities = Probabilities(task.labels[0].record, lattice)
    crops = {label.name: _Crop(label) for label in task.labels}
    zero = np.zeros((2, 3), np.int64)
    different: list[tuple[Mapping[str, float], dict[str, np.ndarray]]] = []
    result = {}
    for among, thresholds in task.thresholds.items():
        counts = next((found for known, found in different if known == thresholds), None)
        if counts is None:
            counts = {label.name: zero.copy() for label in task.labels}
            different.append((thresholds, counts))
        result[among] = counts
    for box in _repair_pieces(lattice, len(classes)):
        values = {name: probabilities.piece(name, box) for name in classes}
        truths = {name: crop.truth(box) for name, crop in crops.items()}
        for thresholds, counts in different:
            plain = {name: above(values[name], thresholds[name]) for name in classes}
            repaired = repair(values, thresholds)
            for label in task.labels:
                own = label.name not in classes and label.name in thresholds  # a derived group apart from its parts
                for row, masks in zip(counts[label.name], (plain, repaired), strict=True):
                    united = np.logical_or.reduce(
                        [above(values[part], thresholds[label.name]) if own else masks[part] for part in label.parts]
                    )
                    row += _counted(united, *truths[label.name])
    return result


def _counted(mask: np.ndarray, truth: np.ndarray, known: np.ndarray) -> tuple[int, int, int]:
    """Return tp, fp, fn of a mask over the known voxels. truth: 0 where unknown."""
    tp = int(np.count_nonzero(mask & (truth > 0)))
    return tp, int(np.count_nonzero(mask & known)) - tp, int(np.count_nonzero(truth)) - tp
