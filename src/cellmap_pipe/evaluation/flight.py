"""The flight check: what the evaluator would reject or silently score as nothing, found before a submission is sent.

Chunks without a file are never made, so that a sparse submission of many large arrays is checked in minutes.
"""

import logging
import math
import stat
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path, PurePosixPath

import numpy as np

from cellmap_pipe.classes import CLASSES, contains
from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation.alignment import is_instance
from cellmap_pipe.evaluation.components import join_nodes, label, links
from cellmap_pipe.evaluation.container import (
    TRANSLATION_NAMES,
    VOXEL_SIZE_NAMES,
    ChunkedArray,
    Container,
    SubmissionError,
    ZipContainer,
    open_container,
    shared_container,
)
from cellmap_pipe.evaluation.instance import too_many_instances
from cellmap_pipe.evaluation.manifest import ManifestRow, crop_name, read_manifest
from cellmap_pipe.evaluation.tasks import run_tasks
from cellmap_pipe.geometry import TOLERANCE_NM

logger = logging.getLogger(__name__)

MAX_UNCOMPRESSED = 50 * 2**30
LABEL_DTYPES = "write uint8 for semantic classes, uint16 or uint32 ids"
SMALLER = "store compressed chunks and leave empty ones out"
LARGEST_ID = 2**32 - 1
# Voxels counted at once: numpy takes 8 bytes for each of them
COUNTED_AT_ONCE = 2**24
# Half of the 26 neighbours of a chunk: each pair of chunks is met once
HALF_NEIGHBOURS = [(z, y, x) for z, y, x in product((-1, 0, 1), repeat=3) if (z, y, x) > (0, 0, 0)]
# An answer that is empty is reported if the truth of that share of the validation crops, or more, has the class
EXPECTED_PRESENCE = 0.5
# An instance class is one blob if its largest component has that share of the voxels and reaches all faces
BLOB_SHARE = 0.99
# A predicted object of fewer voxels is dust when the number of true objects is guessed
DUST_VOXELS = 8
# Share of a leaf's voxels that may lie outside its group before it is reported
LEAF_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Problem:
    """One fault of a submission.

    severity: "error" costs score or the whole submission, "warning" asks for a look, "note" is as it may be.
    """

    array: str
    fault: str
    detail: str
    remedy: str
    severity: str = "error"

    def __str__(self) -> str:
        return f"{self.array}: {self.fault}: {self.detail}; {self.remedy}"


# In how many validation crops the truth has a class, and of how many: {label: (n, of)}
Presence = Mapping[str, tuple[int, int]]
_SEVERITIES = ("error", "warning", "note")
# Faults of an array without which the evaluator finds no voxel of it
NO_ANSWER = frozenset(
    {
        "missing label",
        "group instead of array",
        "not zarr v2",
        "unreadable array",
        "all empty",
        "chunks of another separator",
    }
)


def validate(
    submission: str | Path,
    volumes_csv: str | Path,
    all_labels: Sequence[str] = (),
    *,
    workers: int = 1,
    presence: Presence | None = None,
) -> list[Problem]:
    """Return every problem of the submission, errors first, then by array.

    submission: zip file or zarr folder. volumes_csv: the challenge's test manifest, or a table like it, whose rows with
    an empty class_label stand for `all_labels`. Nothing is unpacked. presence: by class, in how many validation crops
    the truth has it, and of how many; an empty answer of a class that fewer than half of them have is only a note.
    """
    return check(submission, read_manifest(volumes_csv, all_labels), workers=workers, presence=presence)


def check(
    submission: str | Path, rows: Sequence[ManifestRow], *, workers: int = 1, presence: Presence | None = None
) -> list[Problem]:
    """Return what `validate` does, for manifest rows that are read already."""
    try:
        container = open_container(submission)
    except DataError as error:
        fault = error.fault if isinstance(error, SubmissionError) else "unreadable submission"
        unreadable = Problem(str(submission), fault, str(error), "pack it as one zip of one zarr")
        return [*_check_zip(Path(submission)), unreadable]
    if isinstance(container, ZipContainer):
        problems = _check_zip(Path(container.path))
    else:
        problems = _check_folder(container)
    problems += _check_format(container, "")
    wanted: dict[str, list[ManifestRow]] = {}
    for row in rows:
        wanted.setdefault(row.crop, []).append(row)
    folders, found = _crop_folders(container, list(wanted))
    problems += found
    known = dict(presence or {})
    tasks = [
        _CropTask(str(submission), folders[crop], tuple(of_crop), known)
        for crop, of_crop in wanted.items()
        if crop in folders
    ]
    costs = [max(_check_bytes(container, task.folder, row) for row in task.rows) for task in tasks]
    for _, found in run_tasks(_check_crop, tasks, costs, workers):
        problems += found
    return sorted(problems, key=lambda problem: (_SEVERITIES.index(problem.severity), problem.array, problem.fault))


def unanswered(problems: Sequence[Problem], rows: Sequence[ManifestRow]) -> list[str]:
    """Return the classes of the manifest in whose rows the checked submission has no voxel anywhere, sorted."""
    absent = {problem.array for problem in problems if problem.fault == "missing crop"}
    named = (problem.array.partition("/") for problem in problems if problem.fault in NO_ANSWER)
    empty = {f"{crop_name(folder)}/{label}" for folder, _, label in named}
    answered = {row.label for row in rows if row.crop not in absent and f"{row.crop}/{row.label}" not in empty}
    return sorted({row.label for row in rows} - answered)


def _check_zip(path: Path) -> list[Problem]:
    """Return members that the evaluator refuses or that would be written outside its folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError):
        return []  # no zip, or a broken one: opening the container names it
    refused, again = "the evaluator refuses it", "pack it again"
    found: dict[str, list[str]] = {}
    for member in members:
        name = member.filename.replace("\\", "/")
        if name.startswith("/") or name[1:2] == ":":
            found.setdefault("absolute path in the zip", []).append(member.filename)
        if ".." in name.split("/"):
            found.setdefault("path with '..' in the zip", []).append(member.filename)
        if str(PurePosixPath(name)) == ".":
            found.setdefault("member that is the root", []).append(member.filename)
        if stat.S_ISLNK(member.external_attr >> 16):
            found.setdefault("symbolic link in the zip", []).append(member.filename)
    problems = [
        Problem(f"{path.name}:{names[0]}", fault, refused + _more(names), again) for fault, names in found.items()
    ]
    total = sum(member.file_size for member in members)
    if total > MAX_UNCOMPRESSED:
        detail = f"{total / 2**30:.1f} GiB uncompressed, {MAX_UNCOMPRESSED / 2**30:.0f} GiB are allowed"
        problems.append(Problem(path.name, "zip too large", detail, SMALLER))
    written = sorted(str(PurePosixPath(member.filename)) for member in members)
    if twice := sorted({a for a, b in pairwise(written) if a == b}):
        detail = "listed twice in the zip" + _more(twice)
        problems.append(Problem(f"{path.name}:{twice[0]}", "duplicated member", detail, again))
    if backslash := [member.orig_filename for member in members if "\\" in member.orig_filename]:
        detail = "the name of a file, not a file in folders" + _more(backslash)
        remedy = "pack it with / between folders"
        problems.append(Problem(f"{path.name}:{backslash[0]}", "backslashes in the zip", detail, remedy))
    return problems


def _more(names: Sequence[str]) -> str:
    return f" ({len(names)} such)" if len(names) > 1 else ""


def _check_folder(container: Container) -> list[Problem]:
    """Return a problem if the folder, zipped, would be larger than the evaluator unpacks."""
    try:
        total = sum(size for _, size in container.files(""))
    except OSError as error:
        return [Problem(container.path, "unreadable file", str(error), "write it again, or leave it out")]
    if total <= MAX_UNCOMPRESSED:
        return []
    detail = f"{total / 2**30:.1f} GiB, of which the evaluator unpacks {MAX_UNCOMPRESSED / 2**30:.0f} GiB from a zip"
    return [Problem(container.path, "folder too large", detail, SMALLER)]


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
        by_crop.setdefault(crop_name(folder), []).append(folder)
    problems: list[Problem] = []
    for crop, names in by_crop.items():
        inner = [folder for folder in container.children(names[0]) if crop_name(folder) in wanted]
        if crop not in wanted and inner:
            detail = f"{inner[0]} and others are in the folder {names[0]}, where the evaluator does not look"
            problems.append(Problem(names[0], "crops inside a folder", detail, "put them into the root"))
        elif crop not in wanted:
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


def _check_bytes(container: Container, folder: str, row: ManifestRow) -> int:
    """Return an estimate of the memory that checking one array takes."""
    try:
        array = container.array(folder, row.label)
    except DataError:
        return 0
    if array is None:
        return 0
    # Labels, and what decoders, cc3d and numpy need besides (measured, with a margin)
    return 150_000_000 + math.prod(array.chunks) * (3 * array.dtype.itemsize + (8 if is_instance(row.label) else 2))


@dataclass(frozen=True)
class _CropTask:
    submission: str
    folder: str
    rows: tuple[ManifestRow, ...]
    presence: Presence


def _check_crop(task: _CropTask) -> list[Problem]:
    container = shared_container(task.submission)
    problems = _check_format(container, task.folder)
    wanted = {row.label for row in task.rows}
    for name in container.children(task.folder):
        if not name.startswith(".") and name not in wanted and name != "zarr.json":
            detail = "not in the manifest, ignored by the evaluator"
            problems.append(Problem(f"{task.folder}/{name}", "extra label", detail, "leave it out", "warning"))
    arrays: dict[str, _Scanned] = {}
    for row in task.rows:
        name = f"{task.folder}/{row.label}"
        try:
            found, array = _check_row(container, name, task, row)
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
    container: Container, name: str, task: _CropTask, row: ManifestRow
) -> tuple[list[Problem], "_Scanned | None"]:
    """Return the problems of the row's array, and the array with its content if it can be compared with others."""
    array = container.array(task.folder, row.label)
    if array is None:
        return _absent(container, name), None
    found = _check_geometry(array, row)
    if array.ndim != 3:
        return found, None
    if array.dtype.kind not in "buif":
        detail = f"dtype {array.dtype}"
        return [*found, Problem(name, "unusable dtype", detail, LABEL_DTYPES)], None
    scanned = _Scanned(array, scan(array))
    problems = found + _check_content(scanned, row, task.presence)
    sound = not found and not any(problem.severity == "error" for problem in problems)
    return problems, scanned if sound else None


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
    problems += _check_aliases(array)
    stated = array.attributes.get("shape")
    if stated is not None and (not isinstance(stated, list) or stated != list(array.shape)):
        detail = f"{stated}, the array has {list(array.shape)}"
        problems.append(Problem(name, "attribute shape differs", detail, "write the array's own shape", "warning"))
    return problems


def _check_aliases(array: ChunkedArray) -> list[Problem]:
    """Return names of one attribute, as the evaluator knows several, that say different things."""
    problems = []
    for names in (VOXEL_SIZE_NAMES, TRANSLATION_NAMES):
        given = {name: array.attributes[name] for name in names if array.attributes.get(name) is not None}
        if any(first != second for first, second in pairwise(given.values())):
            detail = ", ".join(f"{name} {value}" for name, value in given.items())
            remedy = f"write {names[0]} alone"
            problems.append(Problem(array.name, "attributes that disagree", detail, remedy, "warning"))
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
class Content:
    """What a scan over the stored chunks of one array found.

    lower, upper: box of the voxels that are set; chunks: indices of the chunks that hold them, in order. strays: files
    that are no chunks.
    """

    smallest: int | float = 0
    largest: int | float = 0
    n_set: int = 0
    not_finite: bool = False
    fractions: bool = False
    values: set[int] = field(default_factory=set)
    damaged: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    chunks: list[tuple[int, ...]] = field(default_factory=list)
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None


@dataclass(frozen=True)
class _Scanned:
    """An array and what it holds."""

    array: ChunkedArray
    content: Content


def scan(array: ChunkedArray) -> Content:
    """Return what the stored chunks hold, one chunk in memory at a time."""
    content = Content()
    for name, index in array.files():
        if index is None:
            content.strays.append(name)
            continue
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
        smallest, largest = voxels.min().item(), voxels.max().item()
        content.smallest, content.largest = min(content.smallest, smallest), max(content.largest, largest)
        n_set = int(np.count_nonzero(voxels))
        if not n_set:
            continue
        content.n_set += n_set
        content.chunks.append(index)
        if largest == 1 and smallest == 0:
            content.values |= {0, 1}
        elif len(content.values) <= 3:
            content.values |= {int(value) for value in np.unique(voxels)[:5]}
        start = np.array([i * c for i, c in zip(index, array.chunks, strict=True)])
        axes = [np.flatnonzero(voxels.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
        lower, upper = start + [axis[0] for axis in axes], start + [axis[-1] + 1 for axis in axes]
        content.lower = lower if content.lower is None else np.minimum(content.lower, lower)
        content.upper = upper if content.upper is None else np.maximum(content.upper, upper)
    content.chunks.sort()
    return content


def _check_content(scanned: _Scanned, row: ManifestRow, presence: Presence) -> list[Problem]:
    """Return faults of the array's values."""
    array, content = scanned.array, scanned.content
    name, instance, kind = array.name, is_instance(row.label), array.dtype.kind
    problems = [Problem(name, "damaged chunk", text, "write the array again") for text in content.damaged[:3]]
    problems += _check_strays(scanned)
    fill = array.meta.get("fill_value")
    if fill not in (0, 0.0, None, False):
        problems.append(Problem(name, "fill value is not 0", f"{fill!r}", "absent chunks must read as background"))
    if content.not_finite:
        problems.append(Problem(name, "NaN or infinity", "values that are not finite", "write labels, not scores"))
    if kind == "f" and content.fractions:
        detail = "every value above 0 counts as foreground, or as an object of its own"
        problems.append(Problem(name, "float probabilities", detail, "threshold before packing"))
    elif kind == "f":
        problems.append(Problem(name, "float labels", f"dtype {array.dtype}", LABEL_DTYPES))
    if content.smallest < 0:
        detail = f"smallest {content.smallest}" + (", ids above the largest that fits have wrapped" if instance else "")
        problems.append(Problem(name, "negative values", detail, "write unsigned labels"))
    if not content.n_set:
        if not content.damaged and not any(problem.fault in NO_ANSWER for problem in problems):
            problems.append(_empty_problem(name, row.label, presence))
        return problems
    if instance:
        if array.dtype.itemsize == 1 and content.largest >= np.iinfo(np.int8 if kind == "i" else np.uint8).max:
            detail = f"ids reach {content.largest} in {array.dtype}: larger ones have wrapped, lost or merged"
            problems.append(Problem(name, "dtype that wraps ids", detail, "write uint16 or uint32"))
        if content.largest > LARGEST_ID:
            detail = f"largest {content.largest}; tools that read ids of 32 bits lose or merge objects"
            problems.append(Problem(name, "ids above 2^32", detail, "number the objects from 1, in uint16 or uint32"))
        if not content.damaged and not content.not_finite and not content.fractions:
            problems += _check_objects(scanned)
    elif kind in "ui" and content.values - {0} == {255}:
        detail = "resampled, it would grow by a voxel"
        problems.append(Problem(name, "mask of 0 and 255", detail, "write 0 and 1", "warning"))
    elif kind in "ui" and content.values - {0, 1}:
        detail = f"values up to {content.largest}; every value above 0 counts as the class"
        problems.append(Problem(name, "ids in a semantic class", detail, "write 0 and 1", "warning"))
    return problems


def _empty_problem(name: str, label: str, presence: Presence) -> Problem:
    """Return what is said of an array without a voxel: a note if few validation crops have the class."""
    n, of = presence.get(label, (0, 0))
    detail = "no voxel is set: it scores 0 wherever the truth is not empty"
    if of:
        detail += f"; {n} of {of} validation crops have it"
    expected = not of or n / of >= EXPECTED_PRESENCE
    remedy = "predict it, if the class can be there"
    return Problem(name, "all empty", detail, remedy, "warning" if expected else "note")


def _check_strays(scanned: _Scanned) -> list[Problem]:
    """Return files among the chunks that are none, and so are not read."""
    array, strays = scanned.array, scanned.content.strays
    if not strays:
        return []
    first = strays[0][len(array.name) + 1 :]
    other = "/" if array.separator == "." else "."
    if not scanned.content.chunks and all(part.isdigit() for part in first.split(other)):
        detail = f"named as {first}, but dimension_separator is {array.separator!r}: all of it reads as background"
        return [Problem(array.name, "chunks of another separator", detail, f"state {other!r} in .zarray")]
    detail = f"{first} is no chunk of the array{_more(strays)}, and is not read"
    return [Problem(array.name, "files that are no chunks", detail, "leave them out", "warning")]


def _check_objects(scanned: _Scanned) -> list[Problem]:
    """Return faults of the components that the evaluator would find."""
    array, content = scanned.array, scanned.content
    assert content.lower is not None and content.upper is not None
    sizes = _component_sizes(array, content.chunks)
    whole = not content.lower.any() and content.upper.tolist() == list(array.shape)
    if whole and sizes.max() >= BLOB_SHARE * content.n_set:
        detail = f"one component of {sizes.max()} voxels, and the class reaches all faces of the crop"
        return [Problem(array.name, "one blob", detail, "separate the objects of an instance class", "warning")]
    solid = int(np.count_nonzero(sizes >= DUST_VOXELS))
    if too_many_instances(len(sizes), max(1, solid)):
        detail = (
            f"{len(sizes)} components, only {solid} of them of {DUST_VOXELS} voxels or more; with that many objects in "
            "the truth the evaluator would skip the crop"
        )
        return [Problem(array.name, "too many instances", detail, "remove small components before packing")]
    return []


def _component_sizes(array: ChunkedArray, chunks: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return the number of voxels of every component, int64, as the evaluator would find them.

    chunks: sorted indices of those that hold any voxel. Each is labelled by itself and joined to its neighbours, of
    which no more than their faces are kept, those of two layers of chunks.
    """
    sizes, pairs, count = [np.zeros(1, np.int64)], [], 0
    faces: dict[tuple[int, ...], dict[tuple[int, int], _Face]] = {}
    for index in chunks:
        voxels = array.chunk(index)
        if voxels is None:
            continue
        labels = label(voxels, 26)
        of_label = np.zeros(int(labels.max()) + 1, np.int64)
        flat = labels.reshape(-1)
        for start in range(0, len(flat), COUNTED_AT_ONCE):
            of_label += np.bincount(flat[start : start + COUNTED_AT_ONCE], minlength=len(of_label))
        own = {(axis, side): _Face.of(voxels, labels, count, axis, side) for axis in range(3) for side in (-1, 1)}
        faces = {near: kept for near, kept in faces.items() if near[0] >= index[0] - 1}
        for step in HALF_NEIGHBOURS:
            near = (index[0] - step[0], index[1] - step[1], index[2] - step[2])
            if near in faces:
                pairs += _links(faces[near], own, step)
        faces[index] = own
        sizes.append(of_label[1:])
        count += len(of_label) - 1
    numbers = join_nodes(count + 1, pairs)
    joined = np.bincount(numbers, np.concatenate(sizes))
    return joined[1:].astype(np.int64)


@dataclass(frozen=True)
class _Face:
    """The voxels on one side of a chunk (z, y, x; the axis it is across has length 1), and their nodes, int64."""

    values: np.ndarray
    nodes: np.ndarray

    @classmethod
    def of(cls, voxels: np.ndarray, labels: np.ndarray, before: int, axis: int, side: int) -> "_Face":
        """Return the lower (-1) or upper (1) face of a labelled chunk; before: number of nodes of the chunks before."""
        part = _at(side, axis)
        of_face = labels[part].astype(np.int64)
        return cls(voxels[part].copy(), np.where(of_face > 0, of_face + before, 0))


def _at(side: int, axis: int) -> tuple[slice, ...]:
    return tuple(
        slice(0, 1) if a == axis and side < 0 else slice(-1, None) if a == axis else slice(None) for a in range(3)
    )


def _links(
    lower: Mapping[tuple[int, int], _Face], upper: Mapping[tuple[int, int], _Face], step: tuple[int, int, int]
) -> list[np.ndarray]:
    """Return pairs of nodes of two neighbouring chunks that are one component.

    lower, upper: their faces by axis and side. step: from the lower chunk to the upper one, in chunks. They touch in a
    face, an edge or a corner: the axes with a step have length 1 there, and the first of them is that of the faces.
    """
    first, *others = [axis for axis in range(3) if step[axis]]
    below, above = lower[first, step[first]], upper[first, -step[first]]
    parts = []
    for face, sign in ((below, 1), (above, -1)):
        values, nodes = face.values, face.nodes
        for axis in others:
            part = _at(sign * step[axis], axis)
            values, nodes = values[part], nodes[part]
        if not nodes.any():
            return []
        parts.append((values, nodes))
    values, nodes = (np.concatenate(both, axis=first) for both in zip(*parts, strict=True))
    return [links(nodes, label(values, 26))]


def _check_groups(arrays: dict[str, _Scanned]) -> list[Problem]:
    """Return the groups of one crop that are empty while a class inside them is not, and classes outside their group.

    arrays: the arrays of the crop without an error, on the same voxels.
    """
    problems = []

    @lru_cache(maxsize=16)
    def set_voxels(label: str, lower: tuple[int, ...], upper: tuple[int, ...]) -> np.ndarray:
        return arrays[label].array.read(lower, upper) > 0

    known = [label for label in arrays if label in CLASSES]
    for group in known:
        inside = [leaf for leaf in known if contains(group, leaf) and arrays[leaf].content.n_set]
        if inside and not arrays[group].content.n_set:
            detail = f"no voxel is set, but {', '.join(inside)} inside it {'are' if len(inside) > 1 else 'is'}"
            remedy = f"form {group} from its parts, or predict it"
            problems.append(Problem(arrays[group].array.name, "empty group of classes", detail, remedy, "warning"))
    for leaf in known:
        array, content = arrays[leaf].array, arrays[leaf].content
        groups = [group for group in known if contains(group, leaf) and arrays[group].content.n_set]
        outside = dict.fromkeys(groups, 0)
        for index in content.chunks if groups else ():
            lower = tuple(i * c for i, c in zip(index, array.chunks, strict=True))
            upper = tuple(min(lo + c, n) for lo, c, n in zip(lower, array.chunks, array.shape, strict=True))
            inner = set_voxels(leaf, lower, upper)
            for group in groups:
                outside[group] += int(np.count_nonzero(inner & ~set_voxels(group, lower, upper)))
        for group, n in outside.items():
            if n > LEAF_TOLERANCE * content.n_set:
                detail = f"{n} of {content.n_set} voxels are not in {group}"
                remedy = f"form {group} as the union of its parts"
                problems.append(Problem(array.name, "leaf outside its group", detail, remedy, "warning"))
    return problems


def as_json(problems: Sequence[Problem], severity: str) -> list[str]:
    """Return the problems of one severity as lines."""
    return [str(problem) for problem in problems if problem.severity == severity]
