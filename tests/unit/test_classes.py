import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.classes import CLASSES, TESTED, contains, derivable, disjoint, get_class, parts_of, score_ceiling
from cellmap_pipe.errors import ConfigError

FOURTEEN = (
    "ecs pm mito_mem mito_lum mito_ribo golgi_mem golgi_lum ves_mem ves_lum endo_mem endo_lum er_mem er_lum nuc".split()
)


def test_48_classes_are_tested_ten_of_them_by_instance():
    assert len(TESTED) == 48
    assert sorted(n for n in TESTED if CLASSES[n].instance) == sorted(
        "nuc ves endo lyso ld perox mito np mt cell".split()
    )


def test_ids_are_unique_and_atoms_are_ids():
    ids = [entry.id for entry in CLASSES.values()]
    assert len(set(ids)) == len(ids)
    assert all(entry.atoms <= set(ids) for entry in CLASSES.values())


def test_atoms_are_disjoint_from_each_other():
    atoms = [name for name, entry in CLASSES.items() if entry.is_atom]
    assert all(disjoint(a, b) for a in atoms for b in atoms if a != b)
    assert not any(disjoint(name, name) for name in CLASSES)


def test_groups_contain_their_parts_and_nothing_contains_itself():
    assert contains("mito", "mito_mem") and not contains("mito_mem", "mito")
    assert contains("nuc", "ne") and contains("ne", "np") and contains("cell", "nuc")
    assert not contains("mito", "mito")
    assert disjoint("ecs", "cell") and disjoint("mito", "er") and not disjoint("er", "nuc")
    assert parts_of("mito", ["pm", "mito_lum", "mito_mem"]) == ["mito_lum", "mito_mem"]


def test_a_group_is_derivable_from_exactly_its_atoms():
    assert derivable("mito", FOURTEEN) and derivable("golgi", FOURTEEN)
    assert not derivable("er", FOURTEEN)  # it holds the nuclear envelope too
    assert not derivable("mito", ["mito_mem", "mito_lum"])
    assert derivable("mito", ["mito_mem", "mito_lum", "mito_ribo"])
    assert not derivable("pm", ["pm"])


def test_the_ceiling_of_fourteen_classes_is_the_published_one():
    assert score_ceiling(FOURTEEN) == pytest.approx(0.185, abs=5e-4)
    assert score_ceiling([*FOURTEEN, "mito", "ves", "endo", "golgi"]) == pytest.approx(0.384, abs=5e-4)
    assert score_ceiling(TESTED) == 1


def test_an_unknown_class_is_answered_with_the_nearest_name():
    with pytest.raises(ConfigError, match="unknown class 'mito_men'; did you mean 'mito_mem'"):
        get_class("mito_men")
    with pytest.raises(ConfigError, match="known: ecs, pm"):
        get_class("zzzzzz")


NAMES = st.sampled_from(list(CLASSES))
many = settings(max_examples=150, deadline=None, derandomize=True)


@many
@given(NAMES, NAMES, NAMES)
def test_relations_are_those_of_sets_of_atoms(a, b, c):
    assert disjoint(a, b) == disjoint(b, a)
    assert not (disjoint(a, b) and (contains(a, b) or contains(b, a)))
    assert not (contains(a, b) and contains(b, a))
    if contains(a, b):
        assert not get_class(a).is_atom
        assert contains(a, c) or not contains(b, c)
        assert disjoint(b, c) or not disjoint(a, c)


@many
@given(NAMES, st.sets(NAMES))
def test_a_derivable_group_is_the_union_of_its_parts(group, names):
    ordered = [name for name in CLASSES if name in names]
    parts = parts_of(group, ordered)
    assert parts == [name for name in ordered if contains(group, name)]
    union = frozenset().union(*(CLASSES[name].atoms for name in parts))
    assert derivable(group, ordered) == (union == CLASSES[group].atoms)
    assert 0 <= score_ceiling(names) <= 1


def test_every_group_is_the_union_of_the_atoms_in_it():
    atoms = [name for name, entry in CLASSES.items() if entry.is_atom]
    groups = [name for name in CLASSES if name not in atoms]
    assert len(atoms) == 53 and len(groups) == 21
    assert all(derivable(group, atoms) and len(parts_of(group, atoms)) == len(CLASSES[group].atoms) for group in groups)
