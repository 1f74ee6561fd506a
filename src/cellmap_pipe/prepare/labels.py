"""Labels as three states per voxel and class, and their one-byte form: a label map with a state table.

A class without an array in a crop is unknown there, not absent. What is known of some classes says something of others:
a voxel belongs to one atom, so where a class is present all that share no atom with it are absent. A class's own array
always wins; inference only fills unknowns. Arrays are (z, y, x).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, count
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_pipe.classes import CLASSES, contains, derivable, disjoint, get_class
from cellmap_pipe.errors import DataError, GeometryError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.ngff import Level, array_attributes, chunk_shape, open_level, read_box, read_image
from cellmap_pipe.prepare.resample import TIE, AxisWeights, apply_weights, inside, lattice_weights, z_slabs

ABSENT, PRESENT, UNKNOWN = 0, 1, 2
STATES = {"absent": ABSENT, "present": PRESENT, "unknown": UNKNOWN}

# Present after resampling, but only because exactly half of the voxel is: a disjoint class may have the other half.
TIED = 3

# The row of the state table in which every class is unknown.
UNKNOWN_ROW = 255

# The value that means "unknown" unless the array's encoding names another one.
DEFAULT_UNKNOWN_VALUE = 255

# Source voxels combined at once; about 16 bytes each are needed.
SLAB_VOXELS = 8 * 1024**2


@dataclass(frozen=True)
class LabelArray:
    """One class's array in a crop: class name, its finest level, and the attributes of group and array, merged."""

    name: str
    level: Level
    attributes: dict[str, Any]


@dataclass(frozen=True)
class LabelMap:
    """The labels of a crop on a grid.

    rows: uint8 or uint16 (z, y, x), indices into `table`. table: states, uint8 (>= 256 rows, classes), unused rows all
    unknown. source_counts: voxels by class and state as stored, on the label grid. overlaps: voxels of the label grid
    by pair "a+b" of disjoint classes that are both marked present. contradictions: sentences on groups and parts.
    """

    rows: np.ndarray
    table: np.ndarray
    source_counts: dict[str, dict[str, int]]
    overlaps: dict[str, int]
    contradictions: list[str]


def read_label(path: str | Path) -> LabelArray:
    """Return the class array in the group `path` (its name is the class). Raises DataError naming what is wrong."""
    path = Path(path)
    image = read_image(path)
    level = image.levels[0]
    annotation = {**_annotation(image.attributes), **_annotation(array_attributes(level.path))}
    return LabelArray(path.name, level, {"cellmap": {"annotation": {"class_name": path.name, **annotation}}})


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
    """Return whether the array holds nothing but zeros."""
    array, shape = open_level(label.level), label.level.lattice.shape
    step = chunk_shape(label.level)[0]
    return not any(
        read_box(array, label.level, (z, 0, 0), (min(z + step, shape[0]), *shape[1:])).any()
        for z in range(0, shape[0], step)
    )


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
) -> LabelMap:
    """Return the label map of a crop on the lattice `target`, with its state table and what the source says.

    A class's state in a target voxel is the one that covers most of it, present before unknown before absent where they
    tie (`settle_ties`); voxels less than half inside the label box, or not `valid` (bool, z, y, x; the EM's), are
    unknown for every class. Works slab by slab along z; reads every voxel of every array once.
    Raises DataError (damaged chunk, dtype, values), GeometryError if the labels would be upsampled too much.
    """
    groups = [_Group(part, target, max_upsample) for part in _by_lattice(labels)]
    names = [label.name for group in groups for label in group.labels]
    shape = target.shape
    codes = np.empty(shape, np.uint16)
    known: dict[bytes, int] = {}  # number of every combination of own states met so far
    lead = groups[0]
    for first, last in z_slabs(lead.weights, chunk_shape(lead.labels[0].level)[0], SLAB_VOXELS // 2):
        if len(groups) == 1 and all(w.identity for w in lead.weights):
            slab, rows = lead.stored(first, last)
        else:
            columns = (column for group in groups for column in group.slab(first, last))
            slab, rows, _ = combine(columns, (last - first, *shape[1:]), base=4)
        codes[first:last] = _numbers(rows, known)[slab]
    for group in groups:
        group.finish()
    counts = {name: group.source_counts(i) for group in groups for i, name in enumerate(group.names)}
    own = np.array([np.frombuffer(key, np.uint8) for key in known]).reshape(len(known), len(names))
    present = {name: count["present"] for name, count in counts.items()}
    states = infer_states(settle_ties(own, names, present), names, classes)
    table, index = _table(standard_rows(names, classes), states)
    label_map = index[codes]
    outside = ~inside(lead.weights)
    if valid is not None:
        outside |= ~valid
    label_map[outside] = UNKNOWN_ROW
    return LabelMap(
        label_map,
        table,
        counts,
        {key: n for group in groups for key, n in group.overlaps().items()},
        [text for group in groups for text in group.contradictions()],
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
    counts = np.bincount(codes.ravel(), minlength=span)
    used = np.flatnonzero(counts)
    dense = np.zeros(span, np.uint16 if len(used) <= 1 << 16 else np.uint32)
    dense[used] = np.arange(len(used))
    rest = used
    by_code: dict[int, np.ndarray | int] = {}
    for i in reversed(digits):
        rest, digit = np.divmod(rest, base)
        by_code[i] = digit.astype(np.uint8)
    for i, value in states.items():
        by_code[i] = value if isinstance(value, int) else value[rest]
    return dense[codes], by_code, counts[used]


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
        factor = max(v / t for v, t in zip(self.lattice.voxel_nm, target.voxel_nm, strict=True))
        if factor > max_upsample * (1 + 1e-6):
            raise GeometryError(
                f"labels of {'x'.join(f'{v:g}' for v in self.lattice.voxel_nm)} nm would be upsampled {factor:.2f} "
                f"times; raise max_upsample (now {max_upsample:g}) or use a coarser grid"
            )
        self.weights = lattice_weights(self.lattice, target, interpolate=False)
        self._arrays = [open_level(label.level) for label in labels]
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

    def overlaps(self) -> dict[str, int]:
        """Return the voxels in which two disjoint classes are both marked, by pair "a+b", where there are any."""
        states, voxels = self._combinations()
        marked = states == PRESENT
        pairs = [(i, j) for i, j in combinations(range(len(self.names)), 2) if disjoint(self.names[i], self.names[j])]
        both = {(i, j): int(voxels[marked[:, i] & marked[:, j]].sum()) for i, j in pairs}
        return {f"{self.names[i]}+{self.names[j]}": n for (i, j), n in both.items() if n}

    def contradictions(self) -> list[str]:
        """Return sentences on voxels where a group and the classes inside it do not agree."""
        states, voxels = self._combinations()
        found = []
        for j, group in enumerate(self.names):
            parts = [i for i, name in enumerate(self.names) if contains(group, name)]
            for i in parts:
                n = int(voxels[(states[:, i] == PRESENT) & (states[:, j] == ABSENT)].sum())
                found.append((n, f"{self.names[i]} is marked in {n} voxels where {group} is absent"))
            if derivable(group, self.names):
                n = int(voxels[(states[:, j] == PRESENT) & (states[:, parts] == ABSENT).all(axis=1)].sum())
                found.append((n, f"{group} is marked in {n} voxels where all of its parts are absent"))
        return [text for n, text in found if n]

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
        label = self.labels[i]
        values = read_box(self._arrays[i], label.level, (first, 0, 0), (last, *self.lattice.shape[1:]))
        try:
            return label_states(values, label.attributes)[0]
        except DataError as error:
            raise DataError(f"{label.level.path}: {error}") from None


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
    row_of = {np.full(n_classes, UNKNOWN, np.uint8).tobytes(): UNKNOWN_ROW}
    row_of |= {row.tobytes(): number for number, row in enumerate(standard)}
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
