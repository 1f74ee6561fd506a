"""The flight check of what an array holds: values, objects, and classes inside their groups.

Chunks without a file are never made, so that a sparse submission of many large arrays is checked in minutes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from cellmap_pipe.classes import CLASSES, contains
from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation.alignment import is_instance
from cellmap_pipe.evaluation.chunk_components import component_sizes
from cellmap_pipe.evaluation.container import ChunkedArray
from cellmap_pipe.evaluation.instance import too_many_instances
from cellmap_pipe.evaluation.manifest import ManifestRow
from cellmap_pipe.evaluation.problem import LABEL_DTYPES, NO_ANSWER, Problem, more

LARGEST_ID = 2**32 - 1
# An answer that is empty is reported if the truth of that share of the validation crops, or more, has the class
EXPECTED_PRESENCE = 0.5
# An instance class is one blob if its largest component has that share of the voxels and reaches all faces
BLOB_SHARE = 0.99
# A predicted object of fewer voxels is dust when the number of true objects is guessed
DUST_VOXELS = 8
# Share of a leaf's voxels that may lie outside its group before it is reported
LEAF_TOLERANCE = 1e-3
# In how many validation crops the truth has a class, and of how many: {label: (n, of)}
Presence = Mapping[str, tuple[int, int]]


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
class Scanned:
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


def check_content(scanned: Scanned, row: ManifestRow, presence: Presence) -> list[Problem]:
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
        problems += check_wrapped(name, array, content)
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


def check_wrapped(name: str, array: ChunkedArray, content: Content) -> list[Problem]:
    """Return a problem if ids of 8 bits reach the largest that there is: an error if there are more objects than ids.

    With fewer, that many objects may be all there were.
    """
    # A mask of 0 and 255 has no ids that could have wrapped: its objects are its components
    if array.dtype.kind not in "ui" or array.dtype.itemsize > 1 or len(content.values - {0}) < 2:
        return []
    most = np.iinfo(array.dtype).max
    if content.largest < most:
        return []
    n = None if content.damaged else len(component_sizes(array, content.chunks))
    if n is None or n <= most:
        detail = (
            f"ids reach {content.largest} in {array.dtype}: had there been larger ones, they would be lost or merged"
        )
        return [Problem(name, "dtype that wraps ids", detail, "write uint16 or uint32", "warning")]
    detail = f"ids reach {content.largest} in {array.dtype}, for {n} objects: larger ones have wrapped, lost or merged"
    return [Problem(name, "dtype that wraps ids", detail, "write uint16 or uint32")]


def _empty_problem(name: str, label: str, presence: Presence) -> Problem:
    """Return what is said of an array without a voxel: a note if few validation crops have the class."""
    n, of = presence.get(label, (0, 0))
    detail = "no voxel is set: it scores 0 wherever the truth is not empty"
    if of:
        detail += f"; {n} of {of} validation crops have it"
    expected = not of or n / of >= EXPECTED_PRESENCE
    remedy = "predict it, if the class can be there"
    return Problem(name, "all empty", detail, remedy, "warning" if expected else "note")


def _check_strays(scanned: Scanned) -> list[Problem]:
    """Return files among the chunks that are none, and so are not read."""
    array, strays = scanned.array, scanned.content.strays
    if not strays:
        return []
    first = strays[0][len(array.name) + 1 :]
    other = "/" if array.separator == "." else "."
    if not scanned.content.chunks and all(part.isdigit() for part in first.split(other)):
        detail = f"named as {first}, but dimension_separator is {array.separator!r}: all of it reads as background"
        return [Problem(array.name, "chunks of another separator", detail, f"state {other!r} in .zarray")]
    detail = f"{first} is no chunk of the array{more(strays)}, and is not read"
    return [Problem(array.name, "files that are no chunks", detail, "leave them out", "warning")]


def _check_objects(scanned: Scanned) -> list[Problem]:
    """Return faults of the components that the evaluator would find."""
    array, content = scanned.array, scanned.content
    assert content.lower is not None and content.upper is not None
    sizes = component_sizes(array, content.chunks)
    whole = not content.lower.any() and content.upper.tolist() == list(array.shape)
    if whole and sizes.max() >= BLOB_SHARE * content.n_set:
        detail = f"one component of {sizes.max()} voxels, and the class reaches all faces of the crop"
        remedy = "separate the objects of an instance class, unless the crop lies inside one"
        return [Problem(array.name, "one blob", detail, remedy, "warning")]
    solid = int(np.count_nonzero(sizes >= DUST_VOXELS))
    if too_many_instances(len(sizes), max(1, solid)):
        detail = (
            f"{len(sizes)} components, only {solid} of them of {DUST_VOXELS} voxels or more; with that many objects in "
            "the truth the evaluator would skip the crop"
        )
        # Where all are small, the objects themselves may be
        severity = "error" if solid else "warning"
        return [Problem(array.name, "too many instances", detail, "remove small components before packing", severity)]
    return []


def check_groups(arrays: dict[str, Scanned]) -> list[Problem]:
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
                remedy = f"form {group} as the union of its parts, unless small objects were removed from it on purpose"
                problems.append(Problem(array.name, "leaf outside its group", detail, remedy, "warning"))
    return problems
