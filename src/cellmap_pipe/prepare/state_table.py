"""The state table of a crop: what every class is in a voxel, by the one-byte index that a label map holds.

What is known of some classes says something of others: a voxel belongs to one atom, so where a class is present all
that share no atom with it are absent. A class's own array always wins; inference only fills unknowns.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count

import numpy as np

from cellmap_pipe.classes import CLASSES, contains, get_class
from cellmap_pipe.prepare.labels import ABSENT, PRESENT, STATES, UNKNOWN

# The row of the state table in which every class is unknown.
UNKNOWN_ROW = 255


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


def number_rows(standard: np.ndarray, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def _atom_matrix(names: Sequence[str]) -> np.ndarray:
    """Return which atoms each class is made of, bool (classes, atoms)."""
    atoms = [entry.id for entry in CLASSES.values() if entry.is_atom]
    return np.array([[atom in get_class(name).atoms for atom in atoms] for name in names], bool)
