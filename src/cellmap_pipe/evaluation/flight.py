"""The flight check: what the evaluator would reject or silently score as nothing, found before a submission is sent."""

import logging
import math
import stat
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation.alignment import is_instance
from cellmap_pipe.evaluation.container import (
    Container,
    SubmissionError,
    ZipContainer,
    open_container,
    shared_container,
)
from cellmap_pipe.evaluation.flight_content import Presence, Scanned, check_content, check_groups, scan
from cellmap_pipe.evaluation.flight_geometry import check_geometry
from cellmap_pipe.evaluation.manifest import ManifestRow, crop_name, read_manifest
from cellmap_pipe.evaluation.problem import LABEL_DTYPES, NO_ANSWER, SEVERITIES, Problem, more
from cellmap_pipe.evaluation.tasks import run_tasks

logger = logging.getLogger(__name__)

MAX_UNCOMPRESSED = 50 * 2**30
SMALLER = "store compressed chunks and leave empty ones out"


def validate(
    submission: str | Path,
    volumes_csv: str | Path,
    all_labels: Sequence[str] = (),
    *,
    workers: int = 1,
    presence: Presence | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Problem]:
    """Return every problem of the submission, errors first, then by array.

    submission: zip file or zarr folder. volumes_csv: the challenge's test manifest, or a table like it, whose rows with
    an empty class_label stand for `all_labels`. Nothing is unpacked. presence: by class, in how many validation crops
    the truth has it, and of how many; an empty answer of a class that fewer than half of them have is only a note.
    progress: called with (crops done, crops in all).
    """
    rows = read_manifest(volumes_csv, all_labels)
    return check(submission, rows, workers=workers, presence=presence, progress=progress)


def check(
    submission: str | Path,
    rows: Sequence[ManifestRow],
    *,
    workers: int = 1,
    presence: Presence | None = None,
    progress: Callable[[int, int], None] | None = None,
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
    for done, (_, found) in enumerate(run_tasks(_check_crop, tasks, costs, workers), start=1):
        problems += found
        if progress:
            progress(done, len(tasks))
    return sorted(problems, key=lambda problem: (SEVERITIES.index(problem.severity), problem.array, problem.fault))


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
        Problem(f"{path.name}:{names[0]}", fault, refused + more(names), again) for fault, names in found.items()
    ]
    total = sum(member.file_size for member in members)
    if total > MAX_UNCOMPRESSED:
        detail = f"{total / 2**30:.1f} GiB uncompressed, {MAX_UNCOMPRESSED / 2**30:.0f} GiB are allowed"
        problems.append(Problem(path.name, "zip too large", detail, SMALLER))
    written = sorted(str(PurePosixPath(member.filename)) for member in members)
    if twice := sorted({a for a, b in pairwise(written) if a == b}):
        detail = "listed twice in the zip" + more(twice)
        problems.append(Problem(f"{path.name}:{twice[0]}", "duplicated member", detail, again))
    if backslash := [member.orig_filename for member in members if "\\" in member.orig_filename]:
        detail = "the name of a file, not a file in folders" + more(backslash)
        remedy = "pack it with / between folders"
        problems.append(Problem(f"{path.name}:{backslash[0]}", "backslashes in the zip", detail, remedy))
    return problems


def _check_folder(container: Container) -> list[Problem]:
    """Return a problem if the folder, zipped, would be larger than the evaluator unpacks."""
    try:
        total = sum(size for _, size in container.files(""))
    except DataError as error:
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
    arrays: dict[str, Scanned] = {}
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
    return problems + check_groups(arrays)


def _check_row(
    container: Container, name: str, task: _CropTask, row: ManifestRow
) -> tuple[list[Problem], Scanned | None]:
    """Return the problems of the row's array, and the array with its content if it can be compared with others."""
    array = container.array(task.folder, row.label)
    if array is None:
        return _absent(container, name), None
    found = check_geometry(array, row)
    if array.ndim != 3:
        return found, None
    if array.dtype.kind not in "buif":
        detail = f"dtype {array.dtype}"
        return [*found, Problem(name, "unusable dtype", detail, LABEL_DTYPES)], None
    scanned = Scanned(array, scan(array))
    problems = found + check_content(scanned, row, task.presence)
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
