"""The flight check: what the evaluator would reject or silently score as nothing, found before a submission is sent.

Chunks without a file are never made, so that a sparse submission of many large arrays is checked in minutes.
"""

import logging
import math
import stat
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path, PurePosixPath

import cc3d
import numpy as np

from cellmap_pipe.classes import CLASSES, contains
from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation.alignment import is_instance
from cellmap_pipe.evaluation.container import ChunkedArray, Container, ZipContainer, open_container, shared_container
from cellmap_pipe.evaluation.instance import too_many_instances
from cellmap_pipe.evaluation.manifest import ManifestRow, read_manifest
from cellmap_pipe.evaluation.tasks import run_tasks
from cellmap_pipe.geometry import TOLERANCE_NM

logger = logging.getLogger(__name__)

MAX_UNCOMPRESSED = 50 * 2**30
# Components of larger arrays are not counted: it would take more memory than the check should
COUNTED_VOXELS = 250_000_000
# A predicted object of fewer voxels is dust when the number of true objects is guessed
DUST_VOXELS = 8
# Share of a leaf's voxels that may lie outside its group before it is reported
LEAF_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Problem:
    """One fault of a submission. severity: "error" costs score or the whole submission, "warning" asks for a look."""

    array: str
    fault: str
    detail: str
    remedy: str
    severity: str = "error"

    def __str__(self) -> str:
        return f"{self.array}: {self.fault}: {self.detail}; {self.remedy}"


def validate(
    submission: str | Path, volumes_csv: str | Path, all_labels: Sequence[str] = (), *, workers: int = 1
) -> list[Problem]:
    """Return every problem of the submission, errors first, then by array.

    submission: zip file or zarr folder. volumes_csv: the challenge's test manifest, or a table like it, whose rows with
    an empty class_label stand for `all_labels`. Nothing is unpacked.
    """
    return check(submission, read_manifest(volumes_csv, all_labels), workers=workers)


def check(submission: str | Path, rows: Sequence[ManifestRow], *, workers: int = 1) -> list[Problem]:
    """Return what `validate` does, for manifest rows that are read already."""
    try:
        container = open_container(submission)
    except DataError as error:
        unreadable = Problem(str(submission), "unreadable submission", str(error), "pack it as one zip of one zarr")
        return [*_check_zip(Path(submission)), unreadable]
    problems = _check_zip(Path(container.path)) if isinstance(container, ZipContainer) else []
    problems += _check_format(container, "")
    wanted: dict[str, list[ManifestRow]] = {}
    for row in rows:
        wanted.setdefault(row.crop, []).append(row)
    folders, found = _crop_folders(container, list(wanted))
    problems += found
    tasks = [
        _CropTask(str(submission), folders[crop], tuple(of_crop)) for crop, of_crop in wanted.items() if crop in folders
    ]
    costs = [max(_counting_bytes(row) for row in task.rows) for task in tasks]
    for _, found in run_tasks(_check_crop, tasks, costs, workers):
        problems += found
    return sorted(problems, key=lambda problem: (problem.severity, problem.array, problem.fault))


def _check_zip(path: Path) -> list[Problem]:
    """Return members that the evaluator refuses or that would be written outside its folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError):
        return []  # no zip, or a broken one: opening the container names it
    problems = []
    again = "pack it again"
    names = sorted(str(PurePosixPath(member.filename)) for member in members)
    for member in members:
        name = member.filename.replace("\\", "/")
        where = f"{path.name}:{member.filename}"
        if name.startswith("/") or name[1:2] == ":":
            problems.append(Problem(where, "absolute path in the zip", "the evaluator refuses it", again))
        if ".." in name.split("/"):
            problems.append(Problem(where, "path with '..' in the zip", "the evaluator refuses it", again))
        if str(PurePosixPath(name)) == ".":
            problems.append(Problem(where, "member that is the root", "the evaluator refuses it", again))
        if stat.S_ISLNK(member.external_attr >> 16):
            problems.append(Problem(where, "symbolic link in the zip", "the evaluator refuses it", again))
    total = sum(member.file_size for member in members)
    if total > MAX_UNCOMPRESSED:
        detail = f"{total / 2**30:.1f} GiB uncompressed, {MAX_UNCOMPRESSED / 2**30:.0f} GiB are allowed"
        problems.append(Problem(path.name, "zip too large", detail, "store compressed chunks and leave empty ones out"))
    twice = sorted({a for a, b in pairwise(names) if a == b})
    problems += [
        Problem(f"{path.name}:{name}", "duplicated member", "listed twice in the zip", again) for name in twice
    ]
    return problems


def _check_format(container: Container, folder: str) -> list[Problem]:
    """Return a problem if the folder is of zarr v3, which the evaluator cannot open."""
    name = f"{folder}/zarr.json" if folder else "zarr.json"
    if container.read(name) is None:
        return []
    return [Problem(folder or "root", "not zarr v2", f"{name} is zarr v3", "write it with zarr_format=2")]


def _crop_folders(container: Container, wanted: Sequence[str]) -> tuple[dict[str, str], list[Problem]]:
    """Return the folder of every wanted crop that is there, and problems with crops as a whole."""
    by_crop: dict[str, list[str]] = {}
    for folder in container.crops():
        number = folder.removeprefix("crop")
        by_crop.setdefault(f"crop{int(number)}" if number.isdigit() else folder, []).append(folder)
    problems: list[Problem] = []
    for crop, names in by_crop.items():
        if crop not in wanted:
            detail = "not in the manifest, ignored by the evaluator"
            problems.append(Problem(names[0], "extra crop", detail, "leave it out", "warning"))
        elif len(names) > 1:
            problems.append(Problem(crop, "duplicated crop", f"folders {', '.join(names)}", "keep one of them"))
        elif names[0] != crop:
            detail = f"its folder is named {names[0]}"
            problems.append(Problem(crop, "crop under another name", detail, f"name the folder {crop}"))
    detail = "in the manifest, not in the submission: every label in it scores 0"
    remedy = "predict it, or pack zeros"
    problems += [Problem(crop, "missing crop", detail, remedy) for crop in wanted if crop not in by_crop]
    folders = {crop: crop if crop in by_crop[crop] else by_crop[crop][0] for crop in wanted if crop in by_crop}
    return folders, problems


def _counting_bytes(row: ManifestRow) -> int:
    voxels = row.lattice.voxels
    return 12 * voxels if is_instance(row.label) and voxels <= COUNTED_VOXELS else 50_000_000


@dataclass(frozen=True)
class _CropTask:
    submission: str
    folder: str
    rows: tuple[ManifestRow, ...]


def _check_crop(task: _CropTask) -> list[Problem]:
    container = shared_container(task.submission)
    problems = _check_format(container, task.folder)
    wanted = {row.label for row in task.rows}
    for name in container.children(task.folder):
        if not name.startswith(".") and name not in wanted and name != "zarr.json":
            detail = "not in the manifest, ignored by the evaluator"
            problems.append(Problem(f"{task.folder}/{name}", "extra label", detail, "leave it out", "warning"))
    arrays: dict[str, ChunkedArray] = {}
    for row in task.rows:
        name = f"{task.folder}/{row.label}"
        try:
            found, array = _check_row(container, name, task.folder, row)
        except MemoryError:
            raise
        except DataError as error:
            found, array = [Problem(name, "unreadable array", str(error), "write it again")], None
        except Exception as error:  # metadata may hold anything; one array must not cost the others their check
            logger.exception("%s", name)
            detail = f"{type(error).__name__}: {' '.join(str(error).split())}"
            found, array = [Problem(name, "unreadable array", detail, "write it again")], None
        problems += found
        if array is not None:
            arrays[row.label] = array
    return problems + _check_groups(arrays)


def _check_row(
    container: Container, name: str, folder: str, row: ManifestRow
) -> tuple[list[Problem], ChunkedArray | None]:
    """Return the problems of the row's array, and the array itself if it can be compared with others."""
    array = container.array(folder, row.label)
    if array is None:
        return _absent(container, name), None
    found = _check_geometry(array, row)
    content = _check_content(array, row) if array.ndim == 3 else []
    sound = array.ndim == 3 and not found and not any(problem.severity == "error" for problem in content)
    return found + content, array if sound else None


def _absent(container: Container, name: str) -> list[Problem]:
    """Return why the evaluator will not find the array `name`."""
    if container.read(f"{name}/zarr.json") is not None:
        return _check_format(container, name)
    if container.children(name):
        detail = "it holds " + ", ".join(container.children(name)[:4])
        return [
            Problem(
                name, "group instead of array", f"{detail}; the evaluator scores it as missing", "write a plain array"
            )
        ]
    detail = "in the manifest, not in the submission: it scores 0 over all voxels"
    return [Problem(name, "missing label", detail, "predict it, or pack zeros")]


def _check_geometry(array: ChunkedArray, row: ManifestRow) -> list[Problem]:
    """Return how the array's voxels differ from the manifest's."""
    name, target = array.name, row.lattice
    if array.ndim != 3:
        detail = f"{array.ndim} axes, shape {list(array.shape)}; it stops the whole evaluation"
        return [Problem(name, "not three-dimensional", detail, "write (z, y, x)")]
    problems = []
    write = "write it on the manifest's voxels"
    try:
        voxel, translation = array.voxel_size, array.translation
    except DataError as error:
        return [Problem(name, "unreadable attributes", str(error), "write three numbers (z, y, x) in nm")]
    wrong_voxel = voxel is None or len(voxel) != 3 or not np.allclose(voxel, target.voxel_nm)
    if voxel is None:
        detail = f"attribute voxel_size is missing, {list(target.voxel_nm)} nm expected"
        problems.append(Problem(name, "no voxel size", detail, "write it in nm, (z, y, x)"))
    elif wrong_voxel:
        detail = f"{list(voxel)} nm, {list(target.voxel_nm)} nm expected"
        fault = "wrong voxel size"
        if len(voxel) == 3 and all(math.isfinite(v) and v > 0 for v in voxel):
            ratio = np.asarray(voxel) / np.asarray(target.voxel_nm)
            powers = np.log2(ratio)
            if np.allclose(ratio, ratio[0], rtol=1e-3) and np.isclose(powers[0], round(powers[0]), atol=1e-3):
                fault = "wrong resolution level"
            elif np.allclose(voxel[::-1], target.voxel_nm):
                fault = "voxel size in the order (x, y, z)"
        problems.append(Problem(name, fault, detail, write))
    if array.shape != target.shape:
        swapped = array.shape[::-1] == target.shape
        detail = f"{list(array.shape)}, {list(target.shape)} expected"
        problems.append(Problem(name, "shape in the order (x, y, z)" if swapped else "wrong shape", detail, write))
    if translation is None:
        detail = f"attribute translation is missing, {list(target.translation_nm)} nm expected"
        problems.append(Problem(name, "no translation", detail, "write it in nm, (z, y, x): centre of voxel 0"))
    elif len(translation) != 3 or not np.allclose(translation, target.translation_nm, rtol=0, atol=TOLERANCE_NM):
        problems.append(_translation_problem(name, translation, row, write))
    stated = array.attributes.get("shape")
    if stated is not None and (not isinstance(stated, list) or stated != list(array.shape)):
        detail = f"{stated}, the array has {list(array.shape)}"
        problems.append(Problem(name, "attribute shape differs", detail, "write the array's own shape", "warning"))
    return problems


def _translation_problem(name: str, translation: Sequence[float], row: ManifestRow, remedy: str) -> Problem:
    target = row.lattice
    detail = f"{list(translation)} nm, {list(target.translation_nm)} nm expected"
    fault = "wrong translation"
    if len(translation) == 3 and all(map(math.isfinite, translation)):
        shift = (np.asarray(translation) - np.asarray(target.translation_nm)) / np.asarray(target.voxel_nm)
        if np.allclose(translation[::-1], target.translation_nm, rtol=0, atol=TOLERANCE_NM):
            fault = "translation in the order (x, y, z)"
        elif np.allclose(np.abs(shift[np.abs(shift) > 1e-3]), 0.5, atol=1e-3):
            fault = "translation off by half a voxel"
            detail += " (the centre of voxel 0, not its edge)"
    return Problem(name, fault, detail, remedy)


@dataclass
class _Content:
    """What a scan over the stored chunks of one array found. lower, upper: box of the voxels that are set."""

    smallest: float = 0.0
    largest: float = 0.0
    n_set: int = 0
    not_finite: bool = False
    fractions: bool = False
    values: set[int] = field(default_factory=set)
    damaged: list[str] = field(default_factory=list)
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None


def _scan(array: ChunkedArray) -> _Content:
    """Return what the stored chunks hold, one chunk in memory at a time."""
    content = _Content()
    for index in array.stored_chunks():
        try:
            voxels = array.chunk(index)
        except DataError as error:
            content.damaged.append(str(error))
            continue
        if voxels is None or 0 in voxels.shape:
            continue
        if voxels.dtype.kind == "f":
            content.not_finite |= not np.isfinite(voxels).all()
            voxels = np.nan_to_num(voxels, copy=True, posinf=0.0, neginf=0.0)
            content.fractions |= bool((voxels != np.trunc(voxels)).any())
        content.smallest = min(content.smallest, float(voxels.min()))
        content.largest = max(content.largest, float(voxels.max()))
        n_set = int(np.count_nonzero(voxels))
        content.n_set += n_set
        if not n_set:
            continue
        if voxels.max() == 1 and voxels.min() == 0:
            content.values |= {0, 1}
        elif len(content.values) <= 3:
            content.values |= set(np.unique(voxels)[:5].astype(np.int64).tolist())
        start = np.array([i * c for i, c in zip(index, array.chunks, strict=True)])
        axes = [np.flatnonzero(voxels.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
        lower, upper = start + [axis[0] for axis in axes], start + [axis[-1] + 1 for axis in axes]
        content.lower = lower if content.lower is None else np.minimum(content.lower, lower)
        content.upper = upper if content.upper is None else np.maximum(content.upper, upper)
    return content


def _check_content(array: ChunkedArray, row: ManifestRow) -> list[Problem]:
    """Return faults of the array's values."""
    name, instance, kind = array.name, is_instance(row.label), array.dtype.kind
    if kind not in "buif":
        detail = f"dtype {array.dtype}"
        return [Problem(name, "unusable dtype", detail, "write uint8 for semantic classes, uint16 or uint32 ids")]
    content = _scan(array)
    problems = [Problem(name, "damaged chunk", text, "write the array again") for text in content.damaged[:3]]
    fill = array.meta.get("fill_value")
    if fill not in (0, 0.0, None, False):
        problems.append(Problem(name, "fill value is not 0", f"{fill!r}", "absent chunks must read as background"))
    if content.not_finite:
        problems.append(Problem(name, "NaN or infinity", "values that are not finite", "write labels, not scores"))
    if kind == "f" and content.fractions:
        detail = "every value above 0 counts as foreground, or as an object of its own"
        problems.append(Problem(name, "float probabilities", detail, "threshold before packing"))
    elif kind == "f":
        detail = f"dtype {array.dtype}"
        problems.append(Problem(name, "float labels", detail, "write uint8 for semantic classes, uint16 or uint32 ids"))
    if content.smallest < 0:
        detail = f"smallest {content.smallest:g}" + (
            ", ids above the largest that fits have wrapped" if instance else ""
        )
        problems.append(Problem(name, "negative values", detail, "write unsigned labels"))
    if not content.n_set:
        if not content.damaged:
            detail = "no voxel is set: it scores 0 wherever the truth is not empty"
            problems.append(Problem(name, "all empty", detail, "predict it, if the class can be there", "warning"))
        return problems
    if instance:
        if array.dtype.itemsize == 1 and content.largest >= np.iinfo(np.int8 if kind == "i" else np.uint8).max:
            detail = f"ids reach {content.largest:g} in {array.dtype}: larger ones have wrapped, lost or merged"
            problems.append(Problem(name, "dtype that wraps ids", detail, "write uint16 or uint32"))
        if not content.damaged and not content.not_finite and not content.fractions:
            problems += _check_objects(array, content)
    elif kind in "ui" and content.values - {0} == {255}:
        detail = "resampled, it would grow by a voxel"
        problems.append(Problem(name, "mask of 0 and 255", detail, "write 0 and 1", "warning"))
    elif kind in "ui" and content.values - {0, 1}:
        detail = f"values up to {content.largest:g}; every value above 0 counts as the class"
        problems.append(Problem(name, "ids in a semantic class", detail, "write 0 and 1", "warning"))
    return problems


def _check_objects(array: ChunkedArray, content: _Content) -> list[Problem]:
    """Return faults of the components that the evaluator would find, if the array is small enough to count them."""
    assert content.lower is not None and content.upper is not None
    lower, upper = content.lower.tolist(), content.upper.tolist()
    if int(np.prod(content.upper - content.lower)) > COUNTED_VOXELS:
        return []
    components, n = cc3d.connected_components(np.ascontiguousarray(array.read(lower, upper)), return_N=True)
    sizes = np.zeros(n + 1, np.int64)
    for index in array.stored_chunks():
        start = [i * c for i, c in zip(index, array.chunks, strict=True)]
        stop = [max(0, s + c - lo) for s, c, lo in zip(start, array.chunks, lower, strict=True)]
        part = tuple(slice(max(0, s - lo), end) for s, lo, end in zip(start, lower, stop, strict=True))
        sizes += np.bincount(components[part].reshape(-1), minlength=n + 1)
    sizes = sizes[1:]
    if n == 1 and all(lo == 0 and hi == size for lo, hi, size in zip(lower, upper, array.shape, strict=True)):
        detail = f"one component of {content.n_set} voxels reaches all faces of the crop"
        return [Problem(array.name, "one blob", detail, "separate the objects of an instance class", "warning")]
    solid = int(np.count_nonzero(sizes >= DUST_VOXELS))
    if too_many_instances(n, max(1, solid)):
        detail = (
            f"{n} components, only {solid} of them of {DUST_VOXELS} voxels or more; with that many objects in the "
            "truth the evaluator would skip the crop"
        )
        return [Problem(array.name, "too many instances", detail, "remove small components before packing")]
    return []


def _check_groups(arrays: dict[str, ChunkedArray]) -> list[Problem]:
    """Return the classes of one crop whose voxels lie outside a group that contains them."""
    problems = []

    @lru_cache(maxsize=16)
    def set_voxels(label: str, index: tuple[int, ...]) -> np.ndarray | None:
        voxels = arrays[label].chunk(index)
        return None if voxels is None else voxels > 0

    known = [label for label in arrays if label in CLASSES]
    for leaf in known:
        groups = [group for group in known if contains(group, leaf) and arrays[group].chunks == arrays[leaf].chunks]
        outside = dict.fromkeys(groups, 0)
        n_set = 0
        for index in arrays[leaf].stored_chunks() if groups else ():
            inner = set_voxels(leaf, index)
            if inner is None or not inner.any():
                continue
            n_set += int(np.count_nonzero(inner))
            for group in groups:
                outer = set_voxels(group, index)
                outside[group] += int(np.count_nonzero(inner if outer is None else inner & ~outer))
        for group, n in outside.items():
            if n > LEAF_TOLERANCE * n_set:
                detail = f"{n} of {n_set} voxels are not in {group}"
                remedy = f"form {group} as the union of its parts"
                problems.append(Problem(arrays[leaf].name, "leaf outside its group", detail, remedy, "warning"))
    return problems


def as_json(problems: Sequence[Problem], severity: str) -> list[str]:
    """Return the problems of one severity as lines."""
    return [str(problem) for problem in problems if problem.severity == severity]
