import sys
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from label_case import ATOMS, EVERY_ATOM, FOURTEEN, few, plain_states

from cellmap_pipe.classes import CLASSES, contains, disjoint
from cellmap_pipe.prepare.labels import ABSENT, PRESENT, UNKNOWN
from cellmap_pipe.prepare.state_table import decode_table, encode_table, infer_states, standard_rows


def states_of(own, classes):
    return dict(
        zip(classes, infer_states(np.array([list(own.values())], np.uint8), list(own), classes)[0], strict=True)
    )


def test_a_present_class_makes_disjoint_ones_absent_and_groups_around_it_present():
    got = states_of({"mito_mem": PRESENT}, ["pm", "mito_mem", "mito_lum", "mito", "cell", "er", "nuc"])
    assert got == {"pm": 0, "mito_mem": 1, "mito_lum": 0, "mito": 1, "cell": 1, "er": 0, "nuc": 0}


def test_an_absent_group_makes_its_parts_absent_and_says_nothing_else():
    got = states_of({"mito": ABSENT}, ["pm", "mito", "mito_mem", "cell"])
    assert got == {"pm": UNKNOWN, "mito": 0, "mito_mem": 0, "cell": UNKNOWN}


def test_a_present_group_leaves_its_parts_unknown():
    got = states_of({"mito": PRESENT}, ["pm", "mito", "mito_mem", "mito_lum"])
    assert got == {"pm": 0, "mito": 1, "mito_mem": UNKNOWN, "mito_lum": UNKNOWN}


def test_a_group_whose_parts_are_all_absent_is_absent():
    own = {"mito_mem": ABSENT, "mito_lum": ABSENT}
    assert states_of(own, ["mito"]) == {"mito": UNKNOWN}
    assert states_of(own | {"mito_ribo": ABSENT}, ["mito"]) == {"mito": ABSENT}


def test_a_class_of_its_own_always_wins_and_overlaps_stay():
    assert states_of({"pm": PRESENT, "ecs": PRESENT}, ["pm", "ecs"]) == {"pm": 1, "ecs": 1}
    assert states_of({"mito": ABSENT, "mito_mem": PRESENT}, ["mito", "mito_mem"]) == {"mito": 0, "mito_mem": 1}


def test_only_unknown_voxels_of_an_annotated_class_are_filled():
    assert states_of({"pm": PRESENT, "ecs": UNKNOWN}, ["pm", "ecs"]) == {"pm": 1, "ecs": 0}
    assert states_of({"pm": ABSENT, "ecs": UNKNOWN}, ["pm", "ecs"]) == {"pm": 0, "ecs": UNKNOWN}


OWN = st.dictionaries(st.sampled_from(list(CLASSES)), st.sampled_from([ABSENT, PRESENT, UNKNOWN]), min_size=1)


@few
@given(OWN)
def test_inference_follows_the_rules_class_by_class(own):
    assert list(states_of(own, list(CLASSES)).values()) == plain_states(own, list(CLASSES))


@few
@given(st.sampled_from(sorted(EVERY_ATOM)), st.sets(st.sampled_from(list(CLASSES)), min_size=1), st.randoms())
def test_what_is_inferred_is_true_of_every_voxel_that_is_of_one_atom(atom, annotated, random):
    own = {name: UNKNOWN if random.random() < 0.2 else int(atom in ATOMS[name]) for name in sorted(annotated)}
    inferred = states_of(own, list(CLASSES))
    assert all(state in (UNKNOWN, int(atom in ATOMS[name])) for name, state in inferred.items())
    present, absent = ({name for name, state in own.items() if state == wanted} for wanted in (PRESENT, ABSENT))
    for name, state in inferred.items():
        if any(disjoint(name, other) for other in present) or any(contains(other, name) for other in absent):
            assert state == ABSENT
        if any(name == other or contains(name, other) for other in present):
            assert state == PRESENT


def test_fourteen_annotated_classes_give_the_usual_labels():
    rows = standard_rows(FOURTEEN, FOURTEEN)
    assert np.array_equal(rows, np.concatenate([np.zeros((1, 14)), np.eye(14)]))


def test_standard_rows_of_a_partly_annotated_crop():
    classes = ["pm", "mito", "mito_mem", "mito_lum", "nuc", "cell"]
    rows = standard_rows(["mito", "mito_lum", "nuc"], classes)
    golden = {
        #       pm mito mem lum nuc cell
        0: [2, 0, 0, 0, 0, 2],
        1: [1, 0, 0, 0, 0, 1],  # pm is present: all that is disjoint from it is absent
        2: [0, 1, 2, 0, 0, 1],  # mito: its annotated part is absent here, the other one unknown
        3: [0, 1, 1, 0, 0, 1],  # mito_mem
        4: [0, 1, 0, 1, 0, 1],  # mito_lum
        5: [0, 0, 0, 0, 1, 1],  # nuc
        6: [2, 0, 0, 0, 0, 1],  # cell: contains everything here
    }
    assert {i: row.tolist() for i, row in enumerate(rows)} == golden


def test_tables_survive_json_and_unused_rows_are_unknown():
    table = np.full((300, 3), UNKNOWN, np.uint8)
    table[:4] = [[0, 0, 2], [1, 0, 2], [0, 1, 2], [0, 0, 1]]
    table[299] = [1, 1, 0]
    encoded = encode_table(table, [0, 1, 299])
    assert encoded == {"0": "002", "1": "102", "2": "012", "3": "001", "255": "222", "299": "110"}
    assert np.array_equal(decode_table(encoded, 3), table)
    assert decode_table({}, 3).shape == (256, 3) and (decode_table({}, 3) == UNKNOWN).all()


def test_every_pair_of_the_fourteen_classes_is_disjoint():
    assert all(disjoint(a, b) and not contains(a, b) for a in FOURTEEN for b in FOURTEEN if a != b)
