import sys
import tracemalloc
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from label_case import ATOMS, EVERY_ATOM, FOURTEEN, GRIDS, blob, plain_states, write_crop

from cellmap_pipe.classes import CLASSES, TESTED, contains, disjoint
from cellmap_pipe.errors import GeometryError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare import label_map as label_map_module
from cellmap_pipe.prepare.label_map import TIED, build_label_map, combine, settle_ties
from cellmap_pipe.prepare.labels import ABSENT, PRESENT, UNKNOWN, label_states, read_label
from cellmap_pipe.prepare.state_table import UNKNOWN_ROW, count_states, decode_table, encode_table


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


def test_a_crop_that_says_nothing_of_the_classes_is_unknown_not_background(tmp_path, ngff):
    crop = write_crop(ngff, tmp_path, {"vim": blob((4, 4, 4), (0, 0, 0), (4, 4, 2))}, kinds={"vim": "instance"})
    result = build_label_map(crop, crop[0].level.lattice, ["pm", "ecs"], valid=None, max_upsample=1)
    assert (result.table[result.rows[:, :, :2]] == ABSENT).all()
    assert (result.rows[:, :, 2:] == UNKNOWN_ROW).all()


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


@pytest.mark.parametrize("shape,chunks", [((128, 64, 64), (4, 64, 64)), ((16, 512, 64), (16, 16, 64))])
def test_only_the_result_is_as_large_as_the_crop(tmp_path, ngff, shape, chunks):
    volume = np.zeros(shape, np.uint8)
    volume[:, :, :20] = 1
    crop = [read_label(ngff(tmp_path / "pm", volume, (4, 4, 4), (0, 0, 0), chunks=chunks))]
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
            patch.setattr(label_map_module, "SLAB_VOXELS", 4 * 64 * 64)
            tracemalloc.start()
            result = build_label_map(
                crop,
                target,
                ["pm"],
                valid=valid[tuple(slice(n) for n in target.shape)],
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


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.tuples(GRIDS, GRIDS, GRIDS), st.integers(0, 2**31), st.sampled_from([40, 8 * 1024**2]))
def test_the_state_that_covers_most_of_a_voxel_wins(tmp_path_factory, ngff, voxel, seed, budget):
    rng = np.random.default_rng(seed)
    volume = rng.choice(np.array([0, 1, 255], np.uint8), (6, 7, 5), p=[0.5, 0.35, 0.15])
    crop = write_crop(ngff, tmp_path_factory.mktemp("crop"), {"pm": volume}, (4, 4, 4), (3, 1, 0))
    source = crop[0].level.lattice
    target = Lattice.covering(source.lower_nm, source.upper_nm, voxel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_map_module, "SLAB_VOXELS", budget)
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


@pytest.mark.parametrize("budget", [1, 8 * 1024**2])
@pytest.mark.parametrize("offset", [(62, -2, -2), (-34, 14, -2), (500, 500, 500)])
def test_voxels_beyond_the_crop_are_counted_too(tmp_path, ngff, monkeypatch, offset, budget):
    monkeypatch.setattr(label_map_module, "SLAB_VOXELS", budget)
    volume = np.random.default_rng(0).integers(0, 2, (48, 32, 8)).astype(np.uint8)
    lead = write_crop(ngff, tmp_path, {"pm": np.zeros((8, 8, 8), np.uint8)}, (4, 4, 4), offset)
    other = write_crop(ngff, tmp_path, {"ecs": volume}, (2, 2, 4), (-1, -1, -2))
    result = build_label_map([*lead, *other], lead[0].level.lattice, ["pm", "ecs"], valid=None, max_upsample=2)
    marked = int(volume.sum())
    assert result.source_counts["ecs"] == {"present": marked, "absent": volume.size - marked, "unknown": 0}


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
        patch.setattr(label_map_module, "SLAB_VOXELS", budget)
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
