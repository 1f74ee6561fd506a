import tracemalloc
from itertools import product

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellmap_pipe.classes import CLASSES, TESTED, contains, disjoint
from cellmap_pipe.errors import DataError, GeometryError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare import labels as labels_module
from cellmap_pipe.prepare.labels import (
    ABSENT,
    PRESENT,
    TIED,
    UNKNOWN,
    UNKNOWN_ROW,
    LabelReader,
    build_label_map,
    combine,
    count_ids,
    count_states,
    decode_table,
    empty_means,
    encode_table,
    infer_states,
    is_empty,
    label_states,
    read_label,
    resample_ids,
    settle_ties,
    standard_rows,
)

FOURTEEN = (
    "ecs pm mito_mem mito_lum mito_ribo golgi_mem golgi_lum ves_mem ves_lum endo_mem endo_lum er_mem er_lum nuc".split()
)
few = settings(max_examples=30, deadline=None, derandomize=True)


def annotation(kind=None, name="pm", **counts):
    content = {"class_name": name}
    if kind:
        encoding = {"absent": 0, "unknown": 255} | ({"present": 1} if kind == "semantic" else {})
        content["annotation_type"] = {"type": f"{kind}_segmentation", "encoding": encoding}
    if counts:
        content["complement_counts"] = counts
    return {"cellmap": {"annotation": content}}


# --- states of stored values


def test_semantic_values_are_absent_present_or_unknown():
    states, counts = label_states(np.array([0, 1, 255, 7], np.uint8), annotation("semantic"))
    assert states.tolist() == [ABSENT, PRESENT, UNKNOWN, PRESENT]
    assert counts == {"present": 2, "absent": 1, "unknown": 1}


@pytest.mark.parametrize("unknown,state", [(0, PRESENT), (3, UNKNOWN)])
def test_255_is_an_ordinary_id_unless_some_voxels_are_said_to_be_unknown(unknown, state):
    values = np.array([0, 1, 255, 256], np.uint16)
    states, _ = label_states(values, annotation("instance", "mito", absent=1, unknown=unknown))
    assert states.tolist() == [ABSENT, PRESENT, state, PRESENT]


def test_missing_metadata_leave_the_kind_to_the_class():
    values = np.array([0, 255], np.uint8)
    assert label_states(values, annotation(name="pm"))[0].tolist() == [ABSENT, UNKNOWN]
    assert label_states(values, annotation(name="mito"))[0].tolist() == [ABSENT, PRESENT]
    assert label_states(values, {})[0].tolist() == [ABSENT, UNKNOWN]


def test_a_semantic_array_of_an_instance_class_keeps_255_for_unknown():
    assert label_states(np.array([2, 255], np.uint8), annotation("semantic", "mito"))[0].tolist() == [PRESENT, UNKNOWN]
    assert label_states(np.array([2, 255], np.uint8), annotation("instance", "pm"))[0].tolist() == [PRESENT, PRESENT]


def test_counts_and_encoding_may_stand_at_the_array_or_at_its_group(tmp_path, ngff):
    values = np.array([0, 1, 255, 256], np.uint16).reshape(1, 1, 4)
    stated = annotation("instance", "vim", absent=1, unknown=1)["cellmap"]["annotation"]
    ngff(tmp_path / "vim", values, (4, 4, 4), (0, 0, 0), annotation=stated)
    assert label_states(values, read_label(tmp_path / "vim").attributes)[0].ravel().tolist() == [0, 1, 2, 1]
    (tmp_path / "vim" / "s0" / ".zattrs").unlink()  # as in crop247
    assert label_states(values, read_label(tmp_path / "vim").attributes)[0].ravel().tolist() == [0, 1, 2, 1]
    array = read_label(ngff(tmp_path / "array" / "vim", values, (4, 4, 4), (0, 0, 0), annotation=stated))
    (tmp_path / "array/vim/.zattrs").write_text((tmp_path / "vim/.zattrs").read_text().replace("cellmap", "other"))
    assert read_label(tmp_path / "array/vim").attributes == array.attributes
    del stated["complement_counts"]
    ngff(tmp_path / "without" / "vim", values, (4, 4, 4), (0, 0, 0), annotation=stated)
    assert label_states(values, read_label(tmp_path / "without/vim").attributes)[0].ravel().tolist() == [0, 1, 1, 1]


def test_another_unknown_value_is_taken_from_the_encoding():
    attributes = annotation("semantic")
    attributes["cellmap"]["annotation"]["annotation_type"]["encoding"]["unknown"] = 2
    assert label_states(np.array([2, 255, 1], np.uint8), attributes)[0].tolist() == [UNKNOWN, PRESENT, PRESENT]


@pytest.mark.parametrize(
    "content",
    [
        {"annotation_type": "semantic_segmentation"},
        {"annotation_type": {"encoding": ["absent"]}},
        {"annotation_type": {"type": "instance_segmentation"}, "complement_counts": [1, 2]},
    ],
)
def test_metadata_of_the_wrong_kind_are_passed_over(content):
    states, _ = label_states(np.array([0, 1], np.uint8), {"cellmap": {"annotation": content}})
    assert states.tolist() == [ABSENT, PRESENT]


def test_an_unknown_value_that_is_no_number_is_named():
    attributes = annotation("semantic")
    attributes["cellmap"]["annotation"]["annotation_type"]["encoding"]["unknown"] = "none"
    with pytest.raises(DataError, match=r"encoding\.unknown 'none' is not a number"):
        label_states(np.zeros(1, np.uint8), attributes)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int64, np.uint64])
def test_every_integer_dtype_and_bool_is_read(dtype):
    assert label_states(np.array([0, 1], dtype), {})[0].tolist() == [ABSENT, PRESENT]


def test_other_dtypes_and_negative_values_are_refused():
    with pytest.raises(DataError, match="dtype float32"):
        label_states(np.zeros(3, np.float32), {})
    with pytest.raises(DataError, match="negative value -4"):
        label_states(np.array([0, -4], np.int16), {})


# --- what states of some classes say of others


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


ATOMS = {name: entry.atoms for name, entry in CLASSES.items()}
EVERY_ATOM = frozenset().union(*ATOMS.values())


def plain_states(own, classes):
    """The rules of one voxel, class by class: its own array, then what lies inside it, then which atoms can be."""
    can_be = set(EVERY_ATOM)
    for name, state in own.items():
        can_be &= ATOMS[name] if state == PRESENT else EVERY_ATOM - ATOMS[name] if state == ABSENT else EVERY_ATOM
    result = []
    for name in classes:
        if own.get(name, UNKNOWN) != UNKNOWN:
            result.append(own[name])
        elif any(state == PRESENT and ATOMS[part] < ATOMS[name] for part, state in own.items()):
            result.append(PRESENT)
        else:
            result.append(UNKNOWN if can_be & ATOMS[name] else ABSENT)
    return result


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


def test_a_crop_that_says_nothing_of_the_classes_is_unknown_not_background(tmp_path, ngff):
    crop = write_crop(ngff, tmp_path, {"vim": blob((4, 4, 4), (0, 0, 0), (4, 4, 2))}, kinds={"vim": "instance"})
    result = build_label_map(crop, crop[0].level.lattice, ["pm", "ecs"], valid=None, max_upsample=1)
    assert (result.table[result.rows[:, :, :2]] == ABSENT).all()
    assert (result.rows[:, :, 2:] == UNKNOWN_ROW).all()


# --- the state table


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


def test_combinations_are_found_without_sorting():
    rng = np.random.default_rng(0)
    volumes = [rng.integers(0, 3, (4, 5, 6)).astype(np.uint8) for _ in range(5)]
    volumes.insert(2, np.full((4, 5, 6), 2, np.uint8))
    codes, rows, counts = combine(iter(volumes), (4, 5, 6), base=3)
    assert np.array_equal(rows[codes], np.stack(volumes, axis=-1))
    assert len(np.unique(rows, axis=0)) == len(rows) and counts.tolist() == np.bincount(codes.ravel()).tolist()


def test_of_two_classes_that_tie_the_rarer_one_gets_the_voxel():
    own = np.array(
        [[TIED, TIED, ABSENT], [TIED, ABSENT, ABSENT], [TIED, PRESENT, ABSENT], [TIED, TIED, TIED]], np.uint8
    )
    settled = settle_ties(own, ["mito_lum", "mito_mem", "mito"], {"mito_lum": 900, "mito_mem": 100, "mito": 1000})
    assert settled.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1]]


# --- crops


def write_crop(ngff, folder, volumes, voxel=(4, 4, 4), translation=(0, 0, 0), kinds=None):
    """Write class arrays and return them as `read_label` finds them."""
    for name, volume in volumes.items():
        kind = (kinds or {}).get(name, "semantic")
        content = annotation(kind, name, unknown=int((volume == 255).sum()))["cellmap"]["annotation"]
        ngff(folder / name, volume, voxel, translation, annotation=content)
    return [read_label(folder / name) for name in volumes]


def blob(shape, lower, upper, value=1):
    volume = np.zeros(shape, np.uint8)
    volume[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))] = value
    return volume


def test_a_crop_on_its_own_grid_becomes_a_label_map(tmp_path, ngff):
    shape = (9, 10, 11)
    mito, mem = blob(shape, (2, 2, 2), (6, 6, 6)), blob(shape, (2, 2, 2), (6, 6, 3))
    mem[8, 8, 8] = 255
    pm = blob(shape, (0, 0, 0), (9, 10, 1))
    pm[3, 3, 3] = 1  # overlaps mito
    crop = write_crop(ngff, tmp_path, {"pm": pm, "mito_mem": mem, "mito": mito})
    classes = ["pm", "mito_mem", "mito_lum", "mito"]
    target = crop[0].level.lattice
    result = build_label_map(crop, target, classes, valid=None, max_upsample=1)
    state = result.table[result.rows]
    assert result.rows.dtype == np.uint8
    assert state[0, 0, 0].tolist() == [1, 0, 0, 0] and result.rows[0, 0, 0] == 1
    assert state[2, 2, 2].tolist() == [0, 1, 0, 1] and result.rows[2, 2, 2] == 2
    assert state[2, 2, 5].tolist() == [0, 0, 2, 1] and result.rows[2, 2, 5] == 4
    assert state[8, 0, 8].tolist() == [0, 0, 0, 0] and result.rows[8, 0, 8] == 0
    assert state[8, 8, 8].tolist() == [0, 0, 0, 0]  # mito is absent there, so its membrane is
    assert state[3, 3, 3].tolist() == [1, 0, 0, 1] and result.rows[3, 3, 3] == 5
    assert result.overlaps == {"pm+mito": 1} and result.contradictions == []
    assert result.source_counts["mito_mem"] == {"present": 16, "absent": 990 - 17, "unknown": 1}
    counts = count_states(result.rows, result.table, classes)
    assert counts["mito_lum"] == {"present": 0, "absent": 990 - 47, "unknown": 47}


def test_contradictions_between_group_and_parts_are_counted(tmp_path, ngff):
    shape = (4, 4, 4)
    parts = {name: blob(shape, (0, 0, 0), (1, 1, 2)) for name in ("golgi_mem", "golgi_lum")}
    crop = write_crop(ngff, tmp_path, {**parts, "golgi": blob(shape, (0, 0, 1), (1, 1, 4))})
    result = build_label_map(crop, crop[0].level.lattice, ["golgi"], valid=None, max_upsample=1)
    assert result.contradictions == [
        "golgi_mem is marked in 1 voxels where golgi is absent",
        "golgi_lum is marked in 1 voxels where golgi is absent",
        "golgi is marked in 2 voxels where all of its parts are absent",
    ]


def test_classes_on_different_lattices_are_compared_on_the_grid(tmp_path, ngff):
    """Of a 16 nm cube ecs is the lower half (at 8 nm), pm and golgi_mem the lower three quarters (at 4 nm)."""
    fine = {name: blob((4, 4, 4), (0, 0, 0), (3, 4, 4)) for name in ("pm", "golgi_mem")}
    crop = write_crop(ngff, tmp_path, fine, (4, 4, 4), (-2, -2, -2))
    coarse = {"ecs": blob((2, 2, 2), (0, 0, 0), (1, 2, 2)), "golgi": blob((2, 2, 2), (1, 0, 0), (2, 2, 2))}
    crop += write_crop(ngff, tmp_path, coarse, (8, 8, 8), (0, 0, 0))
    result = build_label_map(crop, crop[0].level.lattice, list(coarse), valid=None, max_upsample=2)
    assert result.overlaps == {
        "pm+golgi_mem": 48,
        "pm+ecs": 32,
        "pm+golgi": 16,
        "golgi_mem+ecs": 32,
    }
    assert result.contradictions == ["golgi_mem is marked in 32 voxels of the grid where golgi is absent"]


def test_only_the_result_is_as_large_as_the_crop(tmp_path, ngff):
    volume = np.zeros((128, 64, 64), np.uint8)
    volume[:, :, :20] = 1
    crop = [read_label(ngff(tmp_path / "pm", volume, (4, 4, 4), (0, 0, 0), chunks=(4, 64, 64)))]
    made = []

    def scratch(shape, dtype):
        made.append(np.memmap(tmp_path / f"{len(made)}", dtype, "w+", shape=tuple(shape)))
        return made[-1]

    valid = np.memmap(tmp_path / "valid", bool, "w+", shape=volume.shape)
    valid[1:] = True
    for voxel in (4, 8):
        source = crop[0].level.lattice
        target = Lattice.covering(source.lower_nm, source.upper_nm, (voxel,) * 3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(labels_module, "SLAB_VOXELS", 4 * 64 * 64)
            tracemalloc.start()
            result = build_label_map(
                crop,
                target,
                ["pm"],
                valid=valid[: len(valid) * 4 // voxel, : 256 // voxel, : 256 // voxel],
                max_upsample=1,
                scratch=scratch,
            )
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < volume.size * 0.6
        assert result.rows is made[-1] and [array.dtype for array in made] == [np.uint16, np.uint8]
        assert (result.rows[0] == UNKNOWN_ROW).all() and result.rows[1:].mean() == pytest.approx(20 / 64)
        made.clear()


def test_voxels_without_em_are_unknown_for_every_class(tmp_path, ngff):
    crop = write_crop(ngff, tmp_path, {"pm": blob((4, 4, 4), (0, 0, 0), (4, 4, 2))})
    valid = np.ones((4, 4, 4), bool)
    valid[:, 0] = False
    result = build_label_map(crop, crop[0].level.lattice, ["pm", "ecs"], valid=valid, max_upsample=1)
    assert (result.rows[:, 0] == UNKNOWN_ROW).all() and (result.table[UNKNOWN_ROW] == UNKNOWN).all()
    assert count_states(result.rows, result.table, ["pm", "ecs"])["pm"] == {"present": 24, "absent": 24, "unknown": 16}
    assert result.source_counts["pm"] == {"present": 32, "absent": 32, "unknown": 0}


def test_voxels_outside_the_box_of_the_crop_are_unknown_whatever_other_arrays_say(tmp_path, ngff):
    crop = write_crop(ngff, tmp_path, dict.fromkeys(["pm", "er"], np.zeros((4, 4, 4), np.uint8)))
    crop += write_crop(ngff, tmp_path, {"ecs": np.ones((8, 8, 8), np.uint8)}, translation=(-8, -8, -8))
    target = crop[0].level.lattice.padded((1, 0, 0), (0, 0, 2))
    result = build_label_map(crop, target, ["pm", "ecs", "mito"], valid=None, max_upsample=1)
    assert (result.rows[0] == UNKNOWN_ROW).all() and (result.rows[:, :, 4:] == UNKNOWN_ROW).all()
    assert (result.table[result.rows[1:, :, :4]] == [0, 1, 0]).all()


def test_a_class_without_an_array_is_unknown_where_no_other_class_excludes_it(tmp_path, ngff):
    crop = write_crop(ngff, tmp_path, {"pm": blob((4, 4, 4), (0, 0, 0), (4, 4, 1)), "golgi": np.zeros((4, 4, 4), "u1")})
    result = build_label_map(crop, crop[0].level.lattice, ["pm", "ecs", "golgi_mem"], valid=None, max_upsample=1)
    counts = count_states(result.rows, result.table, ["pm", "ecs", "golgi_mem"])
    assert counts["ecs"] == {"present": 0, "absent": 16, "unknown": 48}
    assert counts["golgi_mem"] == {"present": 0, "absent": 64, "unknown": 0}  # an empty array: a true negative


def test_more_combinations_than_a_byte_holds_need_two(tmp_path, ngff):
    names = FOURTEEN[:9]
    bits = np.arange(512).reshape(8, 8, 8)
    crop = write_crop(ngff, tmp_path, {name: ((bits >> k) & 1).astype(np.uint8) for k, name in enumerate(names)})
    result = build_label_map(crop, crop[0].level.lattice, names, valid=None, max_upsample=1)
    assert result.rows.dtype == np.uint16 and not (result.rows == UNKNOWN_ROW).any()
    expected = (bits[..., None] >> np.arange(9)) & 1
    assert np.array_equal(result.table[result.rows], expected)
    assert result.rows.base is None  # the array of codes, used again
    again = decode_table(encode_table(result.table, np.unique(result.rows)), 9)
    assert np.array_equal(again[result.rows], expected)


def dense_majority(states, source, target):
    """The definition: the state with the most volume of the target voxel inside the label box, present if they tie."""
    result = np.full(target.shape, UNKNOWN, np.uint8)
    for index in product(*map(range, target.shape)):
        shares, half = np.zeros(3), True
        spans = []
        for axis, i in enumerate(index):
            size = source.voxel_nm[axis]
            lo = (target.lower_nm[axis] + i * target.voxel_nm[axis] - source.lower_nm[axis]) / size
            hi = lo + target.voxel_nm[axis] / size
            spans.append([max(0.0, min(hi, j + 1) - max(lo, j)) for j in range(source.shape[axis])])
            half &= sum(spans[-1]) >= 0.5 * (hi - lo) - 1e-6
        if not half:
            continue
        for j in product(*(np.flatnonzero(s) for s in spans)):
            shares[states[j]] += spans[0][j[0]] * spans[1][j[1]] * spans[2][j[2]]
        shares /= shares.sum()
        rank = [PRESENT, UNKNOWN, ABSENT]
        result[index] = max(rank, key=lambda s: (round(shares[s], 3), -rank.index(s)))
    return result


GRIDS = st.sampled_from([2.0, 3.0, 4.0, 5.5, 8.0, 12.0])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.tuples(GRIDS, GRIDS, GRIDS), st.integers(0, 2**31), st.sampled_from([40, 8 * 1024**2]))
def test_the_state_that_covers_most_of_a_voxel_wins(tmp_path_factory, ngff, voxel, seed, budget):
    rng = np.random.default_rng(seed)
    volume = rng.choice(np.array([0, 1, 255], np.uint8), (6, 7, 5), p=[0.5, 0.35, 0.15])
    crop = write_crop(ngff, tmp_path_factory.mktemp("crop"), {"pm": volume}, (4, 4, 4), (3, 1, 0))
    source = crop[0].level.lattice
    target = Lattice.covering(source.lower_nm, source.upper_nm, voxel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels_module, "SLAB_VOXELS", budget)
        result = build_label_map(crop, target, ["pm"], valid=None, max_upsample=2)
    states, counts = label_states(volume, crop[0].attributes)
    assert np.array_equal(result.table[result.rows][..., 0], dense_majority(states, source, target))
    assert result.source_counts == {"pm": counts}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(list(CLASSES)), min_size=2, max_size=8, unique=True),
    st.tuples(GRIDS, GRIDS, GRIDS),
    st.integers(0, 2**31),
)
def test_resampling_invents_no_overlap_and_takes_no_part_out_of_its_group(tmp_path_factory, ngff, names, voxel, seed):
    rng = np.random.default_rng(seed)
    atoms = rng.choice(sorted(frozenset().union(*(ATOMS[name] for name in names))), (6, 7, 5))
    unknown = rng.random(atoms.shape) < 0.1
    volumes = {name: np.where(unknown, 255, np.isin(atoms, sorted(ATOMS[name]))).astype(np.uint8) for name in names}
    crop = write_crop(ngff, tmp_path_factory.mktemp("crop"), volumes, (4, 4, 4), (3, 1, 0))
    source = crop[0].level.lattice
    target = Lattice.covering(source.lower_nm, source.upper_nm, voxel)
    result = build_label_map(crop, target, names, valid=None, max_upsample=2)
    states = {name: result.table[result.rows][..., column] for column, name in enumerate(names)}
    assert result.overlaps == {} and result.contradictions == []
    for a, b in product(names, names):
        if disjoint(a, b):
            assert not ((states[a] == PRESENT) & (states[b] == PRESENT)).any()
        if contains(a, b):
            assert not ((states[a] == ABSENT) & (states[b] == PRESENT)).any()


def test_a_membrane_one_voxel_thick_survives_halving(tmp_path, ngff):
    shape = (8, 8, 8)
    lumen, membrane = blob(shape, (0, 0, 0), (8, 8, 3)), blob(shape, (0, 0, 3), (8, 8, 4))
    crop = write_crop(ngff, tmp_path, {"mito_lum": lumen, "mito_mem": membrane})
    source = crop[0].level.lattice
    target = Lattice.covering(source.lower_nm, source.upper_nm, (8, 8, 8))
    result = build_label_map(crop, target, ["mito_mem", "mito_lum"], valid=None, max_upsample=1)
    assert result.rows[0, 0].tolist() == [2, 1, 0, 0]


def test_a_coarse_label_is_copied_to_every_voxel_inside_it(tmp_path, ngff):
    volume = np.random.default_rng(1).integers(0, 2, (3, 4, 5)).astype(np.uint8)
    crop = write_crop(ngff, tmp_path, {"nuc": volume}, (32, 32, 32), (12, 12, 12), {"nuc": "instance"})
    source = crop[0].level.lattice
    target = Lattice.covering(source.lower_nm, source.upper_nm, (8, 8, 8))
    result = build_label_map(crop, target, ["nuc"], valid=None, max_upsample=4)
    assert np.array_equal(result.rows, np.kron(volume, np.ones((4, 4, 4), np.uint8)))
    with pytest.raises(GeometryError, match=r"labels of 32x32x32 nm would be upsampled 4\.00 times"):
        build_label_map(crop, target, ["nuc"], valid=None, max_upsample=2)


def test_arrays_on_different_lattices_meet_on_the_grid(tmp_path, ngff):
    fine = write_crop(ngff, tmp_path, {"pm": blob((8, 8, 8), (0, 0, 0), (8, 8, 2))}, (4, 4, 4), (-2, -2, -2))
    coarse = write_crop(ngff, tmp_path, {"ecs": blob((4, 4, 2), (0, 0, 1), (4, 4, 2))}, (8, 8, 8), (0, 0, 0))
    target = fine[0].level.lattice
    result = build_label_map([*fine, *coarse], target, ["pm", "ecs"], valid=None, max_upsample=2)
    assert result.table[result.rows][0, 0].tolist() == [[1, 0]] * 2 + [[0, 1]] * 2 + [[0, 2]] * 4


def test_planes_below_the_crop_are_counted_too(tmp_path, ngff):
    lead = write_crop(ngff, tmp_path, {"pm": np.zeros((8, 8, 8), np.uint8)}, (4, 4, 4), (62, -2, -2))
    other = write_crop(ngff, tmp_path, {"ecs": np.ones((48, 16, 8), np.uint8)}, (2, 2, 4), (-1, -1, -2))
    result = build_label_map([*lead, *other], lead[0].level.lattice, ["pm", "ecs"], valid=None, max_upsample=2)
    assert sum(result.source_counts["ecs"].values()) == 48 * 16 * 8


SOME_CLASSES = st.one_of(
    st.lists(st.sampled_from(list(CLASSES)), min_size=1, max_size=48, unique=True), st.just(list(TESTED))
)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(list(CLASSES)), min_size=1, max_size=12, unique=True),
    SOME_CLASSES,
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.02, 0.5]),
    st.sampled_from([8, 8 * 1024**2]),
)
def test_label_maps_hold_what_the_rules_say_of_each_voxel(
    tmp_path_factory, ngff, annotated, classes, seed, noise, budget
):
    rng = np.random.default_rng(seed)
    folder, shape = tmp_path_factory.mktemp("crop"), (7, 6, 9)
    atoms = rng.choice(sorted(EVERY_ATOM), shape)
    own, volumes = {}, {}
    for name in annotated:
        marked = np.isin(atoms, sorted(ATOMS[name])) ^ (rng.random(shape) < noise)  # noise: contradictions
        states = np.where(rng.random(shape) < 0.1, UNKNOWN, marked).astype(np.uint8)
        volumes[name] = np.where(states == UNKNOWN, 255, states).astype(np.uint8)
        if rng.random() < 0.3:
            mask = rng.random(shape) < 0.8
            ngff(folder / f"{name}_mask", mask.astype(np.uint8), (4, 4, 4), (0, 0, 0))
            states[~mask] = UNKNOWN
        own[name] = states
    valid = rng.random(shape) < 0.9
    crop = write_crop(ngff, folder, volumes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels_module, "SLAB_VOXELS", budget)
        result = build_label_map(crop, crop[0].level.lattice, classes, valid=valid, max_upsample=1)
    got = result.table[result.rows]
    for at in np.ndindex(shape):
        expected = plain_states({name: int(states[at]) for name, states in own.items()}, classes)
        assert got[at].tolist() == (expected if valid[at] else [UNKNOWN] * len(classes))
    assert ((result.rows == UNKNOWN_ROW) == (got == UNKNOWN).all(axis=-1)).all()
    both = [(a, b) for i, a in enumerate(annotated) for b in annotated[i + 1 :] if disjoint(a, b)]
    overlaps = {f"{a}+{b}": int(((own[a] == PRESENT) & (own[b] == PRESENT)).sum()) for a, b in both}
    assert result.overlaps == {pair: n for pair, n in overlaps.items() if n}
    assert noise or not (result.overlaps or result.contradictions)
    for name, counts in result.source_counts.items():
        assert [counts["absent"], counts["present"], counts["unknown"]] == np.bincount(
            own[name].ravel(), minlength=3
        ).tolist()


def test_all_74_classes_at_once_need_a_table_of_two_bytes(tmp_path, ngff):
    rng = np.random.default_rng(3)
    names, shape = list(CLASSES), (8, 8, 8)
    own = {name: rng.choice(np.array([0, 1, 255], np.uint8), shape, p=[0.9, 0.05, 0.05]) for name in names}
    crop = write_crop(ngff, tmp_path, own)
    result = build_label_map(crop, crop[0].level.lattice, names, valid=None, max_upsample=1)
    assert result.rows.dtype == np.uint16 and len(np.unique(result.rows)) > 255
    got, decoded = result.table[result.rows], decode_table(encode_table(result.table, np.unique(result.rows)), 74)
    assert np.array_equal(decoded[result.rows], got)
    states = {name: np.where(volume == 255, UNKNOWN, volume) for name, volume in own.items()}
    for at in list(np.ndindex(shape))[::5]:
        assert got[at].tolist() == plain_states({name: int(volume[at]) for name, volume in states.items()}, names)


# --- masks


def plain_array(path, volume, zarr_format=2):
    array = zarr.create_array(
        str(path), shape=volume.shape, chunks=(8, 8, 8), dtype=volume.dtype, zarr_format=zarr_format
    )
    array[...] = volume


@pytest.mark.parametrize("form", ["group", 2, 3])
def test_a_class_is_unknown_where_its_mask_is_0(tmp_path, ngff, form):
    volume, mask = blob((9, 10, 11), (0, 0, 0), (9, 10, 5)), blob((9, 10, 11), (0, 0, 3), (9, 10, 8))
    if form == "group":
        ngff(tmp_path / "pm_mask", mask, (4, 4, 4), (0, 0, 0), levels=2)
    else:
        plain_array(tmp_path / "pm_mask", mask.astype(bool), form)
    pm, ecs = write_crop(ngff, tmp_path, {"pm": volume, "ecs": np.zeros_like(volume)})
    assert sorted(pm.levels) == ["pm", "pm_mask"] and list(ecs.levels) == ["ecs"] and ecs.mask is None
    values, states = LabelReader(pm).read((0, 0, 0), (9, 10, 11))
    assert states[4, 4].tolist() == [UNKNOWN] * 3 + [PRESENT] * 2 + [ABSENT] * 3 + [UNKNOWN] * 3
    assert values[4, 4].tolist() == [0] * 3 + [1] * 2 + [0] * 6
    result = build_label_map([pm, ecs], pm.level.lattice, ["pm", "ecs"], valid=None, max_upsample=1)
    assert np.array_equal(result.table[result.rows][..., 0], states)
    assert result.source_counts["pm"] == {"present": 180, "absent": 270, "unknown": 540}


def test_an_array_with_nothing_outside_its_mask_is_empty(tmp_path, ngff):
    volume = blob((9, 9, 9), (8, 8, 8), (9, 9, 9))
    assert not is_empty(*write_crop(ngff, tmp_path, {"pm": volume}))
    plain_array(tmp_path / "pm_mask", 1 - volume)
    assert is_empty(read_label(tmp_path / "pm"))


def test_a_mask_on_other_voxels_or_of_another_kind_is_refused_by_name(tmp_path, ngff):
    write_crop(ngff, tmp_path, dict.fromkeys(["pm", "ecs", "nuc", "er"], np.ones((4, 4, 4), np.uint8)))
    plain_array(tmp_path / "pm_mask", np.ones((4, 4, 5), np.uint8))
    with pytest.raises(DataError, match=r"pm_mask: shape \[4, 4, 5\]; \[4, 4, 4\] is expected") as error:
        read_label(tmp_path / "pm")
    assert str(tmp_path / "pm" / "s0") in str(error.value)
    ngff(tmp_path / "ecs_mask", np.ones((4, 4, 4), np.uint8), (8, 8, 8), (0, 0, 0))
    with pytest.raises(DataError, match=r"ecs_mask/s0: the mask has .* of 8 x 8 x 8 nm .*ecs/s0 .* of 4 x 4 x 4 nm"):
        read_label(tmp_path / "ecs")
    ngff(tmp_path / "nuc_mask", np.ones((4, 4, 4), np.uint8), (4, 4, 4), (0, 0, 4))
    with pytest.raises(DataError, match="from 0 x 0 x 4 nm"):
        read_label(tmp_path / "nuc")
    plain_array(tmp_path / "er_mask", np.ones((4, 4, 4), np.float32))
    with pytest.raises(DataError, match="a mask of dtype float32"):
        read_label(tmp_path / "er")


# --- instance ids


@pytest.mark.parametrize("dtype,largest,kept", [("u1", 254, "u2"), ("u2", 60000, "u2"), ("i4", 70000, "u4")])
def test_ids_keep_their_numbers_in_the_smallest_dtype(tmp_path, ngff, dtype, largest, kept):
    volume = np.random.default_rng(0).integers(0, largest, (9, 8, 7)).astype(dtype)
    volume[0, 0, 0] = largest
    (mito,) = write_crop(ngff, tmp_path, {"mito": volume}, kinds={"mito": "instance"})
    ids = np.concatenate([part for _, _, part in resample_ids(mito, mito.level.lattice)])
    assert ids.dtype == kept and np.array_equal(ids, volume)
    assert count_ids(mito) == len(np.unique(volume[volume > 0]))


def test_ids_beyond_32_bits_are_numbered_in_their_order(tmp_path, ngff):
    volume = np.array([0, 7, 2**40, 2**40, 2**33], np.uint64).reshape(1, 1, 5)
    (mito,) = write_crop(ngff, tmp_path, {"mito": volume}, kinds={"mito": "instance"})
    ((first, last, ids),) = resample_ids(mito, mito.level.lattice)
    assert (first, last, ids.dtype, ids.ravel().tolist()) == (0, 1, np.uint16, [0, 1, 3, 3, 2])


def test_unknown_and_masked_ids_do_not_count(tmp_path, ngff):
    volume = np.arange(250, 258, dtype=np.uint16).reshape(1, 1, 8)
    mask = np.ones(volume.shape, np.uint8)
    mask[0, 0, :2] = 0
    plain_array(tmp_path / "mito_mask", mask)
    stated = annotation("instance", "mito", absent=0, unknown=1)["cellmap"]["annotation"]
    mito = read_label(ngff(tmp_path / "mito", volume, (4, 4, 4), (0, 0, 0), annotation=stated))
    assert count_ids(mito) == 5
    ((_, _, ids),) = resample_ids(mito, mito.level.lattice)
    assert ids.ravel().tolist() == [0, 0, 252, 253, 254, 0, 256, 257]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.tuples(GRIDS, GRIDS, GRIDS), st.tuples(*[st.integers(-2, 2)] * 3), st.sampled_from([40, 8 * 1024**2]))
def test_each_voxel_has_the_id_at_its_centre(tmp_path_factory, ngff, voxel, offset, budget):
    volume = np.random.default_rng(1).integers(0, 9, (6, 7, 5)).astype(np.uint8)
    folder = tmp_path_factory.mktemp("ids")
    (mito,) = write_crop(ngff, folder, {"mito": volume}, (4, 3, 4), (3, 1, 0), {"mito": "instance"})
    source = mito.level.lattice
    target = Lattice.covering(source.lower_nm, source.upper_nm, voxel).window(offset, (4, 5, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels_module, "SLAB_VOXELS", budget)
        slabs = list(resample_ids(mito, target))
    assert [slab[0] for slab in slabs[1:]] == [slab[1] for slab in slabs[:-1]] and slabs[-1][1] == 4
    ids = np.concatenate([slab[2] for slab in slabs])
    for at in np.ndindex(target.shape):
        index = np.array(source.index_of(target.world_of(at)))
        if ((index < -0.5 - 1e-6) | (index > np.array(source.shape) - 0.5 + 1e-6)).any():
            assert ids[at] == 0
        else:
            near = np.argwhere(
                np.abs(np.indices(source.shape).transpose(1, 2, 3, 0) - index).max(axis=-1) <= 0.5 + 1e-6
            )
            assert ids[at] in {volume[tuple(i)] for i in near}


def test_what_an_empty_array_means_is_set_for_the_crop_before_the_class_before_all():
    labels = {"empty": "absent", "empty_by_class": {"nuc": "unknown"}, "empty_by_crop": {"a/crop1": "absent"}}
    assert empty_means(labels, "a/crop2", "pm") == "absent"
    assert empty_means(labels, "a/crop2", "nuc") == "unknown"
    assert empty_means(labels, "a/crop1", "nuc") == "absent"
    assert empty_means({"empty": "unknown", "empty_by_crop": {"crop1": "absent"}}, "a/crop1", "pm") == "absent"


def test_empty_arrays_are_recognised(tmp_path, ngff):
    crop = write_crop(
        ngff, tmp_path, {"pm": blob((9, 9, 9), (8, 8, 8), (9, 9, 9)), "ecs": np.zeros((9, 9, 9), np.uint8)}
    )
    assert [is_empty(label) for label in crop] == [False, True]


def test_every_pair_of_the_fourteen_classes_is_disjoint():
    assert all(disjoint(a, b) and not contains(a, b) for a in FOURTEEN for b in FOURTEEN if a != b)
