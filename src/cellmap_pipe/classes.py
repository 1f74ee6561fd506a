"""The challenge's classes as data: ids, atoms, groups, and the relations that follow from them.

An atom is a class made of no other; a group is a union of atoms. Two classes are disjoint if they share no atom; a
class contains another if it has all of its atoms and more.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from cellmap_pipe.errors import ConfigError

_ATOMS = """
ecs 1, pm 2, mito_mem 3, mito_lum 4, mito_ribo 5, golgi_mem 6, golgi_lum 7, ves_mem 8, ves_lum 9, endo_mem 10,
endo_lum 11, lyso_mem 12, lyso_lum 13, ld_mem 14, ld_lum 15, er_mem 16, er_lum 17, eres_mem 18, eres_lum 19, ne_mem 20,
ne_lum 21, np_out 22, np_in 23, hchrom 24, nhchrom 25, echrom 26, nechrom 27, nucpl 28, nucleo 29, mt_out 30, cent 31,
cent_dapp 32, cent_sdapp 33, ribo 34, cyto 35, mt_in 36, vim 38, glyco 39, rbc 45, perox_mem 47, perox_lum 48,
isg_mem 56, isg_lum 57, isg_ins 58, actin 61, tbar 62, bm 63, chloroplast_mem 67, chloroplast_lum 68, chloroplast_sg 69,
vacuole_mem 71, vacuole_lum 72, plasmodesmata 74
"""

_GROUPS: dict[str, tuple[int, tuple[int, ...]]] = {
    "nuc": (37, tuple(range(20, 30))),
    "golgi": (40, (6, 7)),
    "ves": (41, (8, 9)),
    "endo": (42, (10, 11)),
    "lyso": (43, (12, 13)),
    "ld": (44, (14, 15)),
    "eres": (46, (18, 19)),
    "perox": (49, (47, 48)),
    "mito": (50, (3, 4, 5)),
    "er": (51, tuple(range(16, 24))),
    "ne": (52, (20, 21, 22, 23)),
    "np": (53, (22, 23)),
    "chrom": (54, (24, 25, 26, 27)),
    "mt": (55, (30, 36)),
    "isg": (59, (56, 57, 58)),
    "cell": (60, (*range(2, 37), 38, 39, 47, 48, 56, 57, 58, 61, 62)),
    "er_mem_all": (64, (16, 18, 20)),
    "ne_mem_all": (65, (20, 22, 23)),
    "cent_all": (66, (31, 32, 33)),
    "chloroplast": (70, (67, 68, 69)),
    "vacuole": (73, (71, 72)),
}

_INSTANCE = frozenset("nuc vim ves endo lyso ld perox mito np mt cell".split())
_UNTESTED = frozenset(
    "nhchrom nechrom nucleo cent cent_dapp cent_sdapp ribo vim glyco rbc isg_mem isg_lum isg_ins isg actin tbar bm "
    "cent_all chloroplast_mem chloroplast_lum chloroplast_sg chloroplast vacuole_mem vacuole_lum vacuole "
    "plasmodesmata".split()
)


@dataclass(frozen=True)
class OrganelleClass:
    """One class: its `id` in the challenge's table, the ids of its `atoms`, whether it is scored and by instance."""

    name: str
    id: int
    atoms: frozenset[int]
    instance: bool
    tested: bool

    @property
    def is_atom(self) -> bool:
        return self.atoms == {self.id}


def _table() -> dict[str, OrganelleClass]:
    atoms = {name: int(number) for name, number in (entry.split() for entry in _ATOMS.replace("\n", " ").split(","))}
    ids_and_atoms = {name: (number, (number,)) for name, number in atoms.items()} | _GROUPS
    return {
        name: OrganelleClass(name, number, frozenset(members), name in _INSTANCE, name not in _UNTESTED)
        for name, (number, members) in sorted(ids_and_atoms.items(), key=lambda item: item[1][0])
    }


CLASSES: dict[str, OrganelleClass] = _table()
TESTED: tuple[str, ...] = tuple(name for name, entry in CLASSES.items() if entry.tested)


def get_class(name: str) -> OrganelleClass:
    """Return the class called `name`. Raises ConfigError with the nearest known name."""
    try:
        return CLASSES[name]
    except KeyError:
        near = difflib.get_close_matches(str(name), CLASSES, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(CLASSES)}"
        raise ConfigError(f"classes: unknown class '{name}'; {hint}") from None


@cache
def disjoint(first: str, second: str) -> bool:
    """Return whether the two classes share no atom, so that a voxel of one cannot be of the other."""
    return not get_class(first).atoms & get_class(second).atoms


@cache
def contains(group: str, part: str) -> bool:
    """Return whether every voxel of `part` is one of `group` (a class does not contain itself)."""
    return get_class(part).atoms < get_class(group).atoms


def derivable(group: str, classes: Iterable[str]) -> bool:
    """Return whether `group` is exactly the union of those of `classes` that lie inside it."""
    return bool(parts_of(group, classes)) and get_class(group).atoms == frozenset().union(
        *(get_class(name).atoms for name in parts_of(group, classes))
    )


def parts_of(group: str, classes: Iterable[str]) -> list[str]:
    """Return those of `classes` that lie inside `group`, in the given order."""
    return [name for name in classes if contains(group, name)]


def missing_atoms(group: str, parts: Iterable[str]) -> list[str]:
    """Return the atoms of `group` that are in none of `parts`."""
    lacking = get_class(group).atoms.difference(*(get_class(name).atoms for name in parts))
    return [name for name, entry in CLASSES.items() if entry.is_atom and entry.id in lacking]


def score_ceiling(classes: Iterable[str]) -> float:
    """Return the highest overall challenge score that answers in `classes` alone can reach.

    The score is the geometric mean of the mean over the tested instance classes and that over the semantic ones, a
    missing class counting 0.
    """
    answered = {name for name in classes if get_class(name).tested}
    instance = [name for name in TESTED if CLASSES[name].instance]
    semantic = [name for name in TESTED if not CLASSES[name].instance]
    return math.sqrt(
        sum(name in answered for name in instance)
        / len(instance)
        * (sum(name in answered for name in semantic) / len(semantic))
    )
