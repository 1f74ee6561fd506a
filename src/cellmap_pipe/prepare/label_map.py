"""The label map of a crop on a grid: its label arrays resampled, combined and indexed into a state table.

Source voxels are read, counted and resampled a few chunks at a time; nothing but the result is as large as the crop.
Arrays are (z, y, x).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from cellmap_pipe.classes import contains, derivable, disjoint
from cellmap_pipe.errors import DataError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.labels import ABSENT, PRESENT, STATES, UNKNOWN, LabelArray, LabelReader
from cellmap_pipe.prepare.ngff import chunk_shape, chunk_tiles
from cellmap_pipe.prepare.plan import check_label_voxel
from cellmap_pipe.prepare.resample import TIE, AxisWeights, apply_weights, inside, lattice_weights, tiles
from cellmap_pipe.prepare.state_table import UNKNOWN_ROW, count_values, infer_states, number_rows, standard_rows

# Present after resampling, but only because exactly half of the voxel is: a disjoint class may have the other half.
TIED = 3

# Source voxels combined at once, unless one row of chunks along x is larger; about 10 bytes each are needed.
SLAB_VOXELS = 4 * 1024**2

Span = tuple[int, int]  # first, and the one after the last


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
    unknown for every class. Works tile by tile; reads every voxel of every array, most of them once. `scratch` (shape,
    dtype) allocates the arrays as large as the target: two of two bytes and one byte, or one where the table needs two.
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
    for planes, rows in tiles(lead.weights, chunk_shape(lead.level), SLAB_VOXELS):
        if in_place:
            tile, states = lead.stored(planes, rows)
            numbers = _numbers(states, known)
        else:
            columns = (column for group in groups for column in group.tile(planes, rows))
            tile, states, counts = combine(columns, (planes[1] - planes[0], rows[1] - rows[0], shape[2]), base=4)
            numbers = _numbers(states, known)
            voxels.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
        codes[slice(*planes), slice(*rows)] = numbers[tile]
    for group in groups:
        group.count_margins()
    counted = {name: group.source_counts(i) for group in groups for i, name in enumerate(group.names)}
    own = np.array([np.frombuffer(key, np.uint8) for key in known]).reshape(len(known), len(names))
    own = settle_ties(own, names, {name: count["present"] for name, count in counted.items()})
    table, index = number_rows(standard_rows(names, classes), infer_states(own, names, classes))
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


class _Group:
    """Label arrays of one crop that share a lattice: reads them, counts them as stored, and resamples their states."""

    def __init__(self, labels: Sequence[LabelArray], target: Lattice, max_upsample: float) -> None:
        self.labels = labels
        self.names = [label.name for label in labels]
        self.level = labels[0].level
        check_label_voxel(self.level.lattice, target, max_upsample)
        self.weights = lattice_weights(self.level.lattice, target, interpolate=False)
        self._readers = [LabelReader(label) for label in labels]
        self._voxels: Counter[bytes] = Counter()  # by combination of states, on the label grid

    def stored(self, planes: Span, rows: Span) -> tuple[np.ndarray, np.ndarray]:
        """Return codes and their states (codes, labels) in a tile of the target, on the label lattice."""
        codes, states, _ = self._read(planes, rows)
        return codes, states

    def tile(self, planes: Span, rows: Span) -> Iterator[np.ndarray]:
        """Yield each label's states (TIED possible) in a tile of the target, uint8 (z, y, x)."""
        codes, states, weights = self._read(planes, rows)
        outside = ~inside(weights)
        for column in range(len(self.labels)):
            resampled = _majority(codes, states[:, column], weights)
            resampled[outside] = UNKNOWN
            yield resampled

    def count_margins(self) -> None:
        """Count the label voxels beyond those that the target draws on."""
        depth, height, width = self.level.lattice.shape
        z, y, _ = self.weights
        planes = (z.start, z.stop)
        margins = [((0, z.start), (0, height)), ((z.stop, depth), (0, height))]
        margins += [(planes, (0, y.start)), (planes, (y.stop, height))]
        for (first, last), (top, bottom) in margins:
            for lower, upper in chunk_tiles(self.level, (first, top, 0), (last, bottom, width), SLAB_VOXELS):
                _, states, voxels = self._combined(lower, upper)
                self._count(states, voxels)

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

    def _read(self, planes: Span, rows: Span) -> tuple[np.ndarray, np.ndarray, list[AxisWeights]]:
        """Return codes of the label voxels under a tile of the target, states (codes, labels), and the tile's weights.

        Counts those that no earlier tile drew on, in the whole width of the array: tiles come in order.
        """
        z, y, x = self.weights[0].rows(*planes), self.weights[1].rows(*rows), self.weights[2]
        width = self.level.lattice.shape[2]
        codes, states, voxels = self._combined((z.start, y.start, 0), (z.stop, y.stop, width))
        below, above = _drawn(self.weights[0], planes[0]) - z.start, _drawn(self.weights[1], rows[0]) - y.start
        if below or above:
            voxels = count_values(codes[below:, above:], len(states))
        self._count(states, voxels)
        return codes[:, :, x.start : x.stop], states, [z, y, x]

    def _combined(self, lower: Sequence[int], upper: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return `combine` of the states in the label voxels [lower, upper)."""
        shape = [hi - lo for lo, hi in zip(lower, upper, strict=True)]
        return combine((reader.read(lower, upper)[1] for reader in self._readers), shape, base=3)

    def _count(self, states: np.ndarray, voxels: np.ndarray) -> None:
        self._voxels.update({row.tobytes(): int(n) for row, n in zip(states, voxels, strict=True) if n})


def _drawn(weights: AxisWeights, first: int) -> int:
    """Return the source voxel after those that the target voxels below `first` draw on."""
    return weights.rows(first - 1, first).stop if first else weights.start


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
