"""Labels as three states per voxel and class, and their one-byte form: a label map with a state table.

A class without an array in a crop is unknown there, not absent. What is known of some classes says something of others:
a voxel belongs to one atom, so where a class is present all that share no atom with it are absent. A class's own array
always wins; inference only fills unknowns. Arrays are (z, y, x).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, count, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_pipe.classes import CLASSES, contains, derivable, disjoint, get_class
from cellmap_pipe.errors import DataError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.ngff import (
    Level,
    array_attributes,
    chunk_shape,
    is_array,
    open_level,
    plain_level,
    read_box,
    read_image,
)
from cellmap_pipe.prepare.plan import check_label_voxel
from cellmap_pipe.prepare.resample import (
    TIE,
    AxisWeights,
    apply_weights,
    inside,
    lattice_weights,
    nearest_voxels,
    z_slabs,
)

ABSENT, PRESENT, UNKNOWN = 0, 1, 2
STATES = {"absent": ABSENT, "present": PRESENT, "unknown": UNKNOWN}

# Present after resampling, but only because exactly half of the voxel is: a disjoint class may have the other half.
TIED = 3

# The row of the state table in which every class is unknown.
UNKNOWN_ROW = 255

# The value that means "unknown" unless the array's encoding names another one.
DEFAULT_UNKNOWN_VALUE = 255

# Source voxels combined at once, unless one layer of chunks is larger; about 10 bytes each are needed.
SLAB_VOXELS = 8 * 1024**2

# Ids of one array that are told apart; more are no objects but values of something else.
MAX_IDS = 16 * 1024**2


@dataclass(frozen=True)
class LabelArray:
    """One class's array in a crop: class name, its finest level, and the attributes of group and array, merged.

    mask: level of the sibling array `{class}_mask`, on the same voxels; the class is unknown where it is 0.
    """

    name: str
    level: Level
    attributes: dict[str, Any]
    mask: Level | None = None

    @property
    def levels(self) -> dict[str, Level]:
        """The arrays whose voxels determine the class's states: `{class}`, and `{class}_mask` if there is one."""
        return {self.name: self.level} | ({f"{self.name}_mask": self.mask} if self.mask else {})


class LabelReader:
    """The one way to the voxels of a class array: values as stored, and what they mean."""

    def __init__(self, label: LabelArray) -> None:
        self.label = label
        self._array = open_level(label.level)
        self._mask = open_level(label.mask) if label.mask else None

    def read(self, lower: Sequence[int], upper: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return values and states of the voxels [lower, upper), (z, y, x); masked ones are 0 and unknown.

        Raises DataError, naming the array, for a damaged chunk or values that are no labels.
        """
        values = read_box(self._array, self.label.level, lower, upper)
        try:
            states = label_states(values, self.label.attributes)[0]
        except DataError as error:
            raise DataError(f"{self.label.level.path}: {error}") from None
        if self._mask is not None and self.label.mask is not None:
            masked = read_box(self._mask, self.label.mask, lower, upper) == 0
            values[masked] = 0
            states[masked] = UNKNOWN
        return values, states

    def slabs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield values and states of the whole array, a layer of chunks along z at a time."""
        shape, step = self.label.level.lattice.shape, chunk_shape(self.label.level)[0]
        for z in range(0, shape[0], step):
            yield self.read((z, 0, 0), (min(z + step, shape[0]), *shape[1:]))


@dataclass(frozen=True)
class LabelMap:
    """The labels of a crop on a grid.

    rows: uint8 or uint16 (z, y, x), indices into `table`. table: states, uint8 (>= 256 rows, classes), unused rows all
    unknown. source_counts: voxels by class and state as stored, on the label grid. overlaps: voxels of the label grid
    by pair "a+b" of disjoint classes that are both marked present. contradictions: sentences on groups and parts.
    Classes whose arrays lie on different lattices meet only on the grid: there, voxels of the grid are counted.
    """

    rows: np.ndarray
    table: np.ndarray
    source_counts: dict[str, dict[str, int]]
    overlaps: dict[str, int]
    contradictions: list[str]


def read_label(path: str | Path) -> LabelArray:
    """Return the class array in the group `path` (its name is the class), with its mask, the sibling `{class}_mask`.

    Raises DataError naming what is wrong.
    """
    path = Path(path)
    image = read_image(path)
    level = image.levels[0]
    annotation = {**_annotation(image.attributes), **_annotation(array_attributes(level.path))}
    attributes = {"cellmap": {"annotation": {"class_name": path.name, **annotation}}}
    return LabelArray(path.name, level, attributes, _mask_of(path, level))


def _mask_of(path: Path, level: Level) -> Level | None:
    """Return the mask of the class array `level` in the group `path`, None if there is none.

    It is an OME-NGFF group, or an array without multiscales that is taken to lie on the class's voxels.
    """
    mask = path.with_name(f"{path.name}_mask")
    if not mask.is_dir():
        return None
    try:
        candidates = (plain_level(mask, level.lattice),) if is_array(mask) else read_image(mask).levels
    except DataError as error:
        raise DataError(f"mask of {level.path}: {error}") from None
    for candidate in candidates:
        if candidate.lattice.same_as(level.lattice):
            if np.dtype(candidate.dtype).kind not in "iub":
                raise DataError(f"{candidate.path}: a mask of dtype {candidate.dtype}; integers or bool are expected")
            return candidate
    raise DataError(
        f"{candidates[0].path}: the mask has {_described(candidates[0].lattice)}, "
        f"its class array {level.path} {_described(level.lattice)}; correct the mask or remove it"
    )


def _described(lattice: Lattice) -> str:
    voxel, at = (" x ".join(f"{v:g}" for v in values) for values in (lattice.voxel_nm, lattice.translation_nm))
    return f"{' x '.join(map(str, lattice.shape))} voxels of {voxel} nm from {at} nm"


def label_states(values: np.ndarray, attributes: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, int]]:
    """Return the states of stored label values, uint8 of the same shape, and the voxels per state.

    attributes: of the array (`LabelArray.attributes`), with `cellmap.annotation` if there is one: `annotation_type`
    says semantic or instance (else the class does) and how unknown is encoded (255 unless named). In an instance array
    255 is an ordinary id unless `complement_counts.unknown` is positive (CHALLENGE section 1a).
    Raises DataError for a dtype that is neither integer nor bool, and for negative values.
    """
    if values.dtype == bool:
        values = values.view(np.uint8)
    if values.dtype.kind not in "iu":
        raise DataError(f"labels of dtype {values.dtype}; integers or bool are expected")
    if values.dtype.kind == "i" and values.size and int(values.min()) < 0:
        raise DataError(f"labels hold the negative value {int(values.min())}")
    states = (values != 0).view(np.uint8)
    unknown = unknown_value(attributes)
    n_unknown = 0
    if unknown is not None and unknown <= np.iinfo(values.dtype).max:
        mask = values == unknown
        n_unknown = int(np.count_nonzero(mask))
        states[mask] = UNKNOWN
    absent = int(values.size - np.count_nonzero(states))
    present = int(values.size - absent - n_unknown)
    return states, {"present": present, "absent": absent, "unknown": n_unknown}


def unknown_value(attributes: Mapping[str, Any]) -> int | None:
    """Return the stored value that means unknown, or None if none does. Raises DataError if it is not a number."""
    annotation = _annotation(attributes)
    kind = as_mapping(annotation.get("annotation_type"))
    name = str(annotation.get("class_name"))
    instance = kind["type"] == "instance_segmentation" if "type" in kind else name in CLASSES and CLASSES[name].instance
    value = as_mapping(kind.get("encoding")).get("unknown", DEFAULT_UNKNOWN_VALUE)
    if value is None or (instance and not as_mapping(annotation.get("complement_counts")).get("unknown")):
        return None
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"annotation_type.encoding.unknown {value!r} is not a number; correct its metadata") from None


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return `value` if it is a mapping, else an empty one: metadata written by others may hold anything."""
    return value if isinstance(value, Mapping) else {}


def empty_means(labels: Mapping[str, Any], crop: str, name: str) -> str:
    """Return what an all-zero array means, "absent" or "unknown": as set for the crop, else the class, else all.

    labels: `empty`, `empty_by_class`, `empty_by_crop` as configured. crop: `dataset/cropN`.
    """
    by_crop, by_class = labels.get("empty_by_crop") or {}, labels.get("empty_by_class") or {}
    return str(by_crop.get(crop) or by_crop.get(crop.split("/")[-1]) or by_class.get(name) or labels["empty"])


def is_empty(label: LabelArray) -> bool:
    """Return whether the array holds nothing but zeros where it is not masked."""
    return not any(values.any() for values, _ in LabelReader(label).slabs())


def count_ids(label: LabelArray) -> int:
    """Return how many ids an instance array holds: distinct values that are neither 0, nor unknown, nor masked.

    Raises DataError for a damaged chunk, values that are no labels, and more than MAX_IDS ids.
    """
    return len(_ids(label))


def resample_ids(label: LabelArray, target: Lattice) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (first, last, ids) of slabs of the target: the instance ids of its planes [first, last), (z, y, x).

    The id of a target voxel is that of the label voxel around its centre, 0 where that is unknown or masked, and where
    the target voxel lies less than half inside the label box. uint16 if the largest id fits, else uint32; ids that do
    not fit into uint32 are numbered 1.. in their order.
    Raises DataError as `count_ids` does.
    """
    numbers, dtype = _numbering(label)
    reader, (z, y, x) = LabelReader(label), nearest_voxels(label.level.lattice, target)
    covered = lattice_weights(label.level.lattice, target, interpolate=False)
    at = tuple(slice(int(index[0]), int(index[-1]) + 1) for index in (y, x))
    for first, last in z_slabs(covered, chunk_shape(label.level)[0], SLAB_VOXELS):
        planes = slice(int(z[first]), int(z[last - 1]) + 1)
        values, states = reader.read(*zip(*((s.start, s.stop) for s in (planes, *at)), strict=True))
        values[states != PRESENT] = 0
        if numbers is not None:
            values = np.where(values > 0, np.searchsorted(numbers, values) + 1, 0)
        ids = values.astype(dtype)[np.ix_(z[first:last] - planes.start, y - at[0].start, x - at[1].start)]
        ids[~inside([covered[0].rows(first, last), *covered[1:]])] = 0
        yield first, last, ids


def _numbering(label: LabelArray) -> tuple[np.ndarray | None, type[np.unsignedinteger[Any]]]:
    """Return (ids to be numbered in their order, or None if they stay, dtype that holds them)."""
    if np.dtype(label.level.dtype).itemsize <= 2:
        return None, np.uint16
    ids = _ids(label)
    largest = int(ids[-1]) if len(ids) else 0
    if largest > np.iinfo(np.uint32).max:
        return ids, np.uint16 if len(ids) <= np.iinfo(np.uint16).max else np.uint32
    return None, np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32


def _ids(label: LabelArray) -> np.ndarray:
    """Return the distinct ids of an instance array in their order, without 0, unknown and masked ones."""
    found = np.empty(0, np.dtype(label.level.dtype))
    for values, states in LabelReader(label).slabs():
        values[states != PRESENT] = 0
        flat = values.ravel()
        # one value of each run along x: sorting all voxels would take seconds per slab
        runs = flat[np.flatnonzero(np.diff(flat, prepend=~flat[:1]))]
        found = np.union1d(found, runs)
        if len(found) > MAX_IDS:
            raise DataError(f"{label.level.path}: more than {MAX_IDS} ids; is it an array of instances?")
    return found[found != 0]


def infer_states(own: np.ndarray, annotated: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Return the states of `classes` that follow from the `own` states of the annotated ones, row by row.

    own: uint8 (rows, annotated classes). Result: uint8 (rows, classes). A class's own known state stands. Else it is
    present if a class inside it is present, absent if none of its atoms is possible any more (an atom is possible if it
    is in every present class and in no absent one), and unknown otherwise.
    """
    result = np.full((len(own), len(classes)), UNKNOWN, np.uint8)
    if not annotated:
        return result
    known_atoms, class_atoms = _atom_matrix(annotated), _atom_matrix(classes)
    present, absent = own == PRESENT, own == ABSENT
    impossible = (present @ ~known_atoms) | (absent @ known_atoms)
    result[~(~impossible @ class_atoms.T)] = ABSENT
    holds = np.array([[part == group or contains(group, part) for group in classes] for part in annotated])
    result[present @ holds] = PRESENT
    for column, name in enumerate(classes):
        if name in annotated:
            states = own[:, list(annotated).index(name)]
            result[states != UNKNOWN, column] = states[states != UNKNOWN]
    return result


def standard_rows(annotated: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Return rows 0..C of a crop's state table, uint8 (C + 1, C).

    Row 0: every annotated class absent, and all that follows from that; the others unknown. Row v: class v and the
    groups that contain it present, the classes disjoint from it absent, those inside it unknown unless annotated.
    """
    names = list(annotated)
    rows = [infer_states(np.full((1, len(names)), ABSENT, np.uint8), names, classes)]
    for name in classes:
        known = names if name in names else [*names, name]
        own = [PRESENT if other == name or contains(other, name) else ABSENT for other in known]
        rows.append(infer_states(np.array([own], np.uint8), known, classes))
    return np.concatenate(rows)


def settle_ties(own: np.ndarray, annotated: Sequence[str], voxels: Mapping[str, int]) -> np.ndarray:
    """Return the own states with every TIED one settled, uint8 (rows, annotated classes).

    A tie is settled as present, unless a disjoint class is present in the same voxel: of disjoint classes that share it
    half and half the one with the fewest voxels in the crop gets it, so that thin membranes survive.
    voxels: present voxels in the crop by class.
    """
    settled = own.copy()
    order = sorted(range(len(annotated)), key=lambda column: (voxels[annotated[column]], column))
    apart = np.array([[disjoint(a, b) for b in annotated] for a in annotated], bool)
    for row in np.flatnonzero((own == TIED).any(axis=1)):
        taken = own[row] == PRESENT
        for column in order:
            if own[row, column] == TIED:
                taken[column] = not (taken & apart[column]).any()
                settled[row, column] = PRESENT if taken[column] else ABSENT
    return settled


def build_label_map(
    labels: Sequence[LabelArray],
    target: Lattice,
    classes: Sequence[str],
    *,
    valid: np.ndarray | None,
    max_upsample: float,
    scratch: Callable[[Sequence[int], type[np.generic]], np.ndarray] = np.empty,
) -> LabelMap:
    """Return the label map of a crop on the lattice `target`, with its state table and what the source says.

    A class's state in a target voxel is the one that covers most of it, present before unknown before absent where they
    tie (`settle_ties`); voxels less than half inside the label box, or not `valid` (bool, z, y, x; the EM's), are
    unknown for every class. Works slab by slab along z; reads every voxel of every array once. `scratch` (shape, dtype)
    allocates the arrays as large as the target: two of two bytes and one byte, or one where the table needs two bytes.
    Raises DataError (damaged chunk, dtype, values), GeometryError if the labels would be upsampled too much.
    """
    groups = [_Group(part, target, max_upsample) for part in _by_lattice(labels)]
    names = [label.name for group in groups for label in group.labels]
    shape = target.shape
    codes = scratch(shape, np.uint16)
    known: dict[bytes, int] = {}  # number of every combination of own states met so far
    voxels: Counter[int] = Counter()  # of the target, by that number
    lead = groups[0]
    in_place = len(groups) == 1 and all(w.identity for w in lead.weights)
    for first, last in z_slabs(lead.weights, chunk_shape(lead.labels[0].level)[0], SLAB_VOXELS // 2):
        if in_place:
            slab, rows = lead.stored(first, last)
            numbers = _numbers(rows, known)
        else:
            columns = (column for group in groups for column in group.slab(first, last))
            slab, rows, counts = combine(columns, (last - first, *shape[1:]), base=4)
            numbers = _numbers(rows, known)
            voxels.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
        codes[first:last] = numbers[slab]
    for group in groups:
        group.finish()
    counted = {name: group.source_counts(i) for group in groups for i, name in enumerate(group.names)}
    own = np.array([np.frombuffer(key, np.uint8) for key in known]).reshape(len(known), len(names))
    own = settle_ties(own, names, {name: count["present"] for name, count in counted.items()})
    table, index = _table(standard_rows(names, classes), infer_states(own, names, classes))
    label_map = codes if index.dtype == codes.dtype else scratch(shape, np.uint8)
    for first, last in pairwise(range(shape[0] + 1)):
        part = index[codes[first:last]]
        part[~inside([lead.weights[0].rows(first, last), *lead.weights[1:]])] = UNKNOWN_ROW
        if valid is not None:
            part[~valid[first:last]] = UNKNOWN_ROW
        label_map[first:last] = part
    relations = [group.relations() for group in groups]
    if len(groups) > 1:
        apart = [frozenset(group.names) for group in groups]
        met = np.array([voxels[number] for number in range(len(known))], np.int64)
        relations.append(_relations(names, own, met, apart=apart))
    return LabelMap(
        label_map,
        table,
        counted,
        {pair: n for overlaps, _ in relations for pair, n in overlaps.items()},
        [text for _, contradictions in relations for text in contradictions],
    )


def combine(
    columns: Iterable[np.ndarray], shape: Sequence[int], *, base: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct combinations of several small-valued volumes.

    columns: uint8 volumes of `shape` with values below `base`, taken one at a time. Returns codes (unsigned, `shape`),
    the combination of each code (uint8, (codes, columns)), and its voxels. No sorting: codes are numbers with one digit
    per column, renumbered densely whenever the next digit could exceed 16 bits.
    """
    codes = np.zeros(shape, np.uint16)
    span = 1  # codes are below it
    digits: list[int] = []  # columns whose digits the codes hold, the last one lowest
    states: dict[int, np.ndarray | int] = {}  # of the other columns: by code without those digits, or constant
    n_columns = 0
    for i, column in enumerate(columns):
        n_columns += 1
        low, high = int(column.min()), int(column.max())
        if low == high:
            states[i] = low
            continue
        if span * base > np.iinfo(np.uint16).max:
            codes, states, counts = _renumbered(codes, span, base, digits, states)
            span, digits = len(counts), []
            if span * base > np.iinfo(codes.dtype).max:
                codes = codes.astype(np.uint32)
        codes *= base
        codes += column
        span *= base
        digits.append(i)
    codes, states, counts = _renumbered(codes, span, base, digits, states)
    rows = np.zeros((len(counts), n_columns), np.uint8)
    for i, values in states.items():
        rows[:, i] = values
    return codes, rows, counts


def _renumbered(
    codes: np.ndarray, span: int, base: int, digits: Sequence[int], states: Mapping[int, np.ndarray | int]
) -> tuple[np.ndarray, dict[int, np.ndarray | int], np.ndarray]:
    """Return `codes` numbered densely, the state of every column by new code (or constant), and the voxels per code."""
    counts = count_values(codes, span)
    used = np.flatnonzero(counts)
    dense = np.zeros(span, codes.dtype)
    dense[used] = np.arange(len(used))
    rest = used
    by_code: dict[int, np.ndarray | int] = {}
    for i in reversed(digits):
        rest, digit = np.divmod(rest, base)
        by_code[i] = digit.astype(np.uint8)
    for i, value in states.items():
        by_code[i] = value if isinstance(value, int) else value[rest]
    for plane in codes:
        plane[...] = dense[plane]
    return codes, by_code, counts[used]


def count_states(label_map: np.ndarray, table: np.ndarray, classes: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the voxels per class and state of a label map, {class: {present, absent, unknown}}."""
    voxels = count_values(label_map, len(table))
    return {
        name: {word: int(voxels[table[:, column] == state].sum()) for word, state in STATES.items()}
        for column, name in enumerate(classes)
    }


def count_values(volume: np.ndarray, length: int, where: np.ndarray | None = None) -> np.ndarray:
    """Return how often each value 0..length-1 occurs in `volume` (where the mask is set), int64 (length,).

    Plane by plane, because np.bincount turns its input into int64.
    """
    counts = np.zeros(length, np.int64)
    for z, plane in enumerate(volume):
        counts += np.bincount(plane.ravel() if where is None else plane[where[z]], minlength=length)
    return counts


def encode_table(table: np.ndarray, used: Iterable[int]) -> dict[str, str]:
    """Return a state table as JSON: one digit per class for rows 0..C and the `used` ones."""
    wanted = sorted({*range(table.shape[1] + 1), UNKNOWN_ROW, *map(int, used)})
    return {str(row): "".join(map(str, table[row])) for row in wanted}


def decode_table(rows: Mapping[str, str], n_classes: int) -> np.ndarray:
    """Return the state table that `encode_table` wrote, uint8 (at least 256 rows, classes); unused rows are unknown."""
    table = np.full((max(256, 1 + max(map(int, rows), default=0)), n_classes), UNKNOWN, np.uint8)
    for row, digits in rows.items():
        table[int(row)] = [int(digit) for digit in digits]
    return table


class _Group:
    """Label arrays of one crop that share a lattice: reads them, counts them as stored, and resamples their states."""

    def __init__(self, labels: Sequence[LabelArray], target: Lattice, max_upsample: float) -> None:
        self.labels = labels
        self.names = [label.name for label in labels]
        self.lattice = labels[0].level.lattice
        check_label_voxel(self.lattice, target, max_upsample)
        self.weights = lattice_weights(self.lattice, target, interpolate=False)
        self._readers = [LabelReader(label) for label in labels]
        self._voxels: Counter[bytes] = Counter()  # by combination of states, on the label grid
        self._counted = 0  # planes that _voxels holds

    def stored(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return codes and their states (codes, labels) in the target planes [first, last), on the label lattice."""
        z, y, x = self.weights
        codes, rows = self._read(z.start + first, z.start + last)
        return codes[:, y.start : y.stop, x.start : x.stop], rows

    def slab(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Yield each label's states (TIED possible) in the target planes [first, last), uint8 (z, y, x)."""
        z, y, x = self.weights[0].rows(first, last), *self.weights[1:]
        codes, rows = self._read(z.start, z.stop)
        codes = codes[:, y.start : y.stop, x.start : x.stop]
        outside = ~inside([z, y, x])
        for column in range(len(self.labels)):
            states = _majority(codes, rows[:, column], (z, y, x))
            states[outside] = UNKNOWN
            yield states

    def finish(self) -> None:
        """Count the planes that no target voxel has asked for."""
        self._count_below(self.lattice.shape[0])

    def source_counts(self, column: int) -> dict[str, int]:
        """Return the voxels per state of one label, as stored."""
        states, voxels = self._combinations()
        return {word: int(voxels[states[:, column] == state].sum()) for word, state in STATES.items()}

    def relations(self) -> tuple[dict[str, int], list[str]]:
        """Return the overlaps and contradictions of `_relations` on the label grid."""
        return _relations(self.names, *self._combinations())

    def _combinations(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the states (combinations, labels) met on the label grid and the voxels of each combination."""
        keys = list(self._voxels)
        states = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), len(self.labels))
        return states, np.array([self._voxels[key] for key in keys], np.int64)

    def _count_below(self, stop: int) -> None:
        """Count the label planes below `stop` that are not counted yet."""
        step = max(1, SLAB_VOXELS // int(np.prod(self.lattice.shape[1:])))
        while self._counted < stop:
            self._read(self._counted, min(self._counted + step, stop))

    def _read(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return codes and states (codes, labels) of the label planes [first, last), counting all below `last`."""
        self._count_below(first)
        shape = (last - first, *self.lattice.shape[1:])
        columns = (self._states(i, first, last) for i in range(len(self.labels)))
        codes, rows, voxels = combine(columns, shape, base=3)
        if last > self._counted:
            if first < self._counted:
                voxels = np.bincount(codes[self._counted - first :].ravel(), minlength=len(rows))
            self._voxels.update({row.tobytes(): int(n) for row, n in zip(rows, voxels, strict=True) if n})
            self._counted = last
        return codes, rows

    def _states(self, i: int, first: int, last: int) -> np.ndarray:
        return self._readers[i].read((first, 0, 0), (last, *self.lattice.shape[1:]))[1]


def _relations(
    names: Sequence[str], states: np.ndarray, voxels: np.ndarray, *, apart: Sequence[frozenset[str]] = ()
) -> tuple[dict[str, int], list[str]]:
    """Return (voxels in which two disjoint classes are both marked, by pair "a+b"; sentences on groups and parts).

    states: (combinations, names), voxels: of each combination. Only what occurs is listed. apart: sets of classes that
    have been compared among themselves; what lies inside one of them is left out.
    """

    def compared(*members: str) -> bool:
        return any(part.issuperset(members) for part in apart)

    grid = " of the grid" if apart else ""
    marked, absent = states == PRESENT, states == ABSENT
    overlaps = {}
    for (i, a), (j, b) in combinations(enumerate(names), 2):
        if disjoint(a, b) and not compared(a, b):
            overlaps[f"{a}+{b}"] = int(voxels[marked[:, i] & marked[:, j]].sum())
    found = []
    for j, group in enumerate(names):
        parts = [i for i, name in enumerate(names) if contains(group, name)]
        for i in parts:
            if not compared(group, names[i]):
                n = int(voxels[marked[:, i] & absent[:, j]].sum())
                found.append((n, f"{names[i]} is marked in {n} voxels{grid} where {group} is absent"))
        if derivable(group, names) and not compared(group, *(names[i] for i in parts)):
            n = int(voxels[marked[:, j] & absent[:, parts].all(axis=1)].sum())
            found.append((n, f"{group} is marked in {n} voxels{grid} where all of its parts are absent"))
    return {pair: n for pair, n in overlaps.items() if n}, [text for n, text in found if n]


def _majority(codes: np.ndarray, states: np.ndarray, weights: Sequence[AxisWeights]) -> np.ndarray:
    """Return the state that covers most of each target voxel, uint8 (z, y, x); a tie for present is TIED.

    codes: source voxels under `weights`; states: the state of each code.
    """
    if all(w.identity for w in weights):
        return states[codes]
    if (states == states[0]).all():
        return np.full([w.matrix.shape[0] for w in weights], states[0], np.uint8)
    present = apply_weights((states == PRESENT).astype(np.float32)[codes], weights)
    if (states == UNKNOWN).any():
        unknown = apply_weights((states == UNKNOWN).astype(np.float32)[codes], weights)
        absent = 1 - present - unknown
        rival = np.maximum(absent, unknown)
        result = np.where(unknown >= absent - TIE, np.uint8(UNKNOWN), np.uint8(ABSENT))
    else:
        rival = 1 - present
        result = np.full(present.shape, ABSENT, np.uint8)
    result[present >= rival - TIE] = TIED
    result[present > rival + TIE] = PRESENT
    return result


def _by_lattice(labels: Sequence[LabelArray]) -> list[list[LabelArray]]:
    """Return the labels in groups of one lattice each, the largest group first, and of equal ones the finest."""
    groups: list[list[LabelArray]] = []
    for label in labels:
        for group in groups:
            if group[0].level.lattice.same_as(label.level.lattice):
                group.append(label)
                break
        else:
            groups.append([label])
    return sorted(groups, key=lambda group: (-len(group), np.prod(group[0].level.lattice.voxel_nm)))


def _numbers(rows: np.ndarray, known: dict[bytes, int]) -> np.ndarray:
    """Return the number of each row in `known`, which is extended by the new ones, uint16 (rows,)."""
    numbers = [known.setdefault(row.tobytes(), len(known)) for row in rows]
    if len(known) > np.iinfo(np.uint16).max:
        raise DataError(f"labels form more than {np.iinfo(np.uint16).max} combinations of states; are they ids?")
    return np.array(numbers, np.uint16)


def _table(standard: np.ndarray, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (state table, row of each of `states`): standard rows first, 255 unknown, further ones in sorted order."""
    n_classes = standard.shape[1]
    row_of = {row.tobytes(): number for number, row in enumerate(standard)}
    # last: where the annotated classes say nothing of the configured ones, row 0 is all unknown as well
    row_of[np.full(n_classes, UNKNOWN, np.uint8).tobytes()] = UNKNOWN_ROW
    numbers = (n for n in count(len(standard)) if n != UNKNOWN_ROW)
    further = sorted({row.tobytes() for row in states} - row_of.keys())
    row_of |= dict(zip(further, numbers, strict=False))
    table = np.full((max(256, 1 + max(row_of.values())), n_classes), UNKNOWN, np.uint8)
    for key, number in row_of.items():
        table[number] = np.frombuffer(key, np.uint8)
    dtype = np.uint8 if len(table) <= 256 else np.uint16
    return table, np.array([row_of[row.tobytes()] for row in states], dtype)


def _atom_matrix(names: Sequence[str]) -> np.ndarray:
    """Return which atoms each class is made of, bool (classes, atoms)."""
    atoms = [entry.id for entry in CLASSES.values() if entry.is_atom]
    return np.array([[atom in get_class(name).atoms for atom in atoms] for name in names], bool)


def _annotation(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return dict(as_mapping(as_mapping(attributes.get("cellmap")).get("annotation")))
