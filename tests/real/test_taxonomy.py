"""The classes as data against the challenge's own tables: ids, atoms, what is tested, and what its crops annotate."""

import csv
from pathlib import Path

import pytest

from cellmap_pipe.classes import CLASSES, TESTED, contains, disjoint

MANIFESTS = Path(__file__).parents[2] / ".." / "shared" / "data" / "manifests"

pytestmark = pytest.mark.skipif(not MANIFESTS.is_dir(), reason=f"{MANIFESTS} is not there")


@pytest.fixture(scope="module")
def table():
    """Name -> (id, ids of the atoms) as published; the third column of an atom is empty."""
    with open(MANIFESTS / "classes.csv", newline="") as stream:
        rows = list(csv.reader(stream))
    return {name: (int(number), {int(atom) for atom in atoms.split(",") if atom}) for name, number, atoms in rows}


def labels_of(manifest):
    with open(MANIFESTS / manifest, newline="") as stream:
        return {row["class_label"] for row in csv.DictReader(stream)}


def test_names_and_ids_are_the_challenges(table):
    assert {name: entry.id for name, entry in CLASSES.items()} == {name: entry[0] for name, entry in table.items()}
    assert len(CLASSES) == 74 and list(CLASSES) == sorted(table, key=lambda name: table[name][0])


def test_atoms_and_groups_are_the_challenges(table):
    assert {name for name, entry in CLASSES.items() if entry.is_atom} == {
        n for n, (_, atoms) in table.items() if not atoms
    }
    assert {name: entry.atoms for name, entry in CLASSES.items()} == {n: a or {i} for n, (i, a) in table.items()}


def test_relations_follow_from_the_published_atoms(table):
    atoms = {name: members or {number} for name, (number, members) in table.items()}
    for a in table:
        assert [disjoint(a, b) for b in table] == [not atoms[a] & atoms[b] for b in table]
        assert [contains(a, b) for b in table] == [atoms[b] < atoms[a] for b in table]


def test_the_tested_classes_are_the_challenges():
    assert set(TESTED) == set((MANIFESTS / "tested_classes.csv").read_text().split()) and len(TESTED) == 48


def test_exactly_the_tested_classes_are_annotated():
    assert labels_of("train_crop_manifest.csv") == set(TESTED) == labels_of("test_crop_manifest.csv")


def test_ten_tested_classes_are_instances():
    instances = {name for name, entry in CLASSES.items() if entry.instance}
    assert instances == set("nuc vim ves endo lyso ld perox mito np mt cell".split())
    assert instances - set(TESTED) == {"vim"}
