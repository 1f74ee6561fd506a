"""Samples are functions of (seed, step, index); patches hold what the store holds."""

import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from training_case import CLASSES, write_store

from cellmap_pipe.errors import TrainingError
from cellmap_pipe.prepare.chunks import ANY_KNOWN
from cellmap_pipe.prepare.labels import PRESENT, UNKNOWN
from cellmap_pipe.prepare.layout import BLOCKED, MAPPED, write_volume
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.training import sampling
from cellmap_pipe.training.sampling import (
    PARTNER,
    Patch,
    Patches,
    Sampler,
    generator,
    known_fraction,
    tiles,
    uniforms,
)

CROPS = ["set-0/crop0", "set-1/crop1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(write_store(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(write_store(tmp_path_factory.mktemp("blocked"), layout=BLOCKED))


def sampler(
    store: Store, patch: tuple[int, int, int] = (8, 8, 8), classes: list[str] = CLASSES, **options: float | str
) -> Sampler:
    patches = Patches(store, CROPS, classes, patch)
    return Sampler(patches, **{"seed": 0, "centred_fraction": 0.5, "class_power": -0.5, **options})  # type: ignore[arg-type]


def voxels(store: Store, crop: str, kind: str = "label") -> np.ndarray:
    """Return a whole volume of a crop."""
    volume = store.volume(crop, kind)
    array = np.empty(volume.shape, volume.dtype)
    volume.copy((0, 0, 0), array)
    return array


def test_a_sample_depends_on_seed_step_index_and_purpose_alone(store: Store) -> None:
    first, second = sampler(store), sampler(store)
    keys = list(product(range(4), range(6)))
    drawn = [first.draw(*key) for key in keys]
    assert [second.draw(*key) for key in reversed(keys)] == drawn[::-1]
    assert len(set(drawn)) > len(drawn) // 2  # patches at the edge of a small crop may coincide
    assert sampler(store, seed=1).draw(0, 0) != drawn[0]
    assert first.draw(0, 0, PARTNER) != drawn[0]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda key: second.draw(*key), keys * 20)) == drawn * 20


def test_uniform_numbers_are_those_of_the_samples_stream() -> None:
    for key in product((0, 2**63), (0, 5), (0, 7), range(3)):
        for count in (1, 6, 30):
            assert uniforms(*key, count) == generator(*key).random(count).tolist()


def test_streams_of_neighbouring_samples_share_no_numbers() -> None:
    streams = [uniforms(0, 0, index, purpose, 64) for index in range(8) for purpose in range(4)]
    assert len(np.unique(np.concatenate(streams))) == 8 * 4 * 64


@pytest.mark.parametrize("patch", [(16, 16, 16), (8, 24, 16), (48, 48, 48), (1, 8, 64)])
def test_the_anchor_lies_in_its_patch_and_is_known(store: Store, patch: tuple[int, int, int]) -> None:
    drawing = sampler(store, patch)
    image, label = np.empty(patch, np.uint8), np.empty(patch, np.uint8)
    for index in range(60):
        drawn = drawing.draw(0, index)
        assert all(0 <= place < length for place, length in zip(drawn.anchor, patch, strict=True))
        drawing.patches.copy(drawn, image, label)
        assert (drawing.patches.tables[drawn.crop][:, label[drawn.anchor]] != UNKNOWN).any()


@pytest.mark.parametrize("patch", [(8, 8, 8), (48, 48, 48)])
def test_patches_stay_in_the_stored_array_or_hold_all_of_it(store: Store, patch: tuple[int, int, int]) -> None:
    drawing = sampler(store, patch)
    starts = []
    for index in range(60):
        drawn = drawing.draw(0, index)
        for start, length, size in zip(drawn.origin, patch, drawing.patches.shapes[drawn.crop], strict=True):
            assert min(0, size - length) <= start <= max(0, size - length)
        starts.append(drawn.origin[0])
    # the label box begins at plane 4: EM context is shown as well
    assert patch[0] > 8 or min(starts) < 4


def test_centred_patches_are_anchored_in_their_class(store: Store) -> None:
    drawing = sampler(store, classes=["nuc"], centred_fraction=1.0)
    label = np.empty((8, 8, 8), np.uint8)
    for index in range(20):
        drawn = drawing.draw(0, index)
        assert drawn.crop == 0  # the other crop does not annotate it
        drawing.patches.copy(drawn, np.empty((8, 8, 8), np.uint8), label)
        assert drawing.patches.tables[0][0][label[drawn.anchor]] == PRESENT


def test_other_patches_are_anchored_anywhere_known(store: Store) -> None:
    drawing = sampler(store, centred_fraction=0.0)
    rows = [voxels(store, crop) for crop in CROPS]
    corners = [drawing.draw(0, index) for index in range(1500)]
    anchors = [np.add(drawn.origin, drawn.anchor) for drawn in corners]
    shown = [rows[drawn.crop][tuple(anchor)] for drawn, anchor in zip(corners, anchors, strict=True)]
    expected = np.mean([(row == 0).sum() / (row != 255).sum() for row in rows])
    assert np.mean(np.equal(shown, 0)) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.0, 1.0])
def test_classes_weigh_by_a_power_of_the_crops_that_annotate_them(store: Store, power: float) -> None:
    drawing = sampler(store, class_power=power, centred_fraction=1.0)
    weights = np.diff(drawing.cumulative, prepend=0)
    np.testing.assert_allclose(weights, [2**power, 2**power, 1])
    label = np.empty((8, 8, 8), np.uint8)
    drawn = []
    for index in range(400):
        patch = drawing.draw(0, index)
        drawing.patches.copy(patch, np.empty_like(label), label)
        drawn.append(label[patch.anchor])
    assert np.mean(np.equal(drawn, 3)) == pytest.approx(weights[2] / weights.sum(), abs=0.08)


def test_classes_come_from_crops_that_show_them_and_not_from_those_that_know_them_absent(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {("set-0/crop0", "mito_mem"), ("set-1/crop1", "ecs")}
    counts = {crop: {name: {"present": 9, "absent": 9} for name in CLASSES} for crop in CROPS}
    for crop, name in product(CROPS, CLASSES):
        if (crop, name) not in shown:
            counts[crop][name]["present"] = 0
    monkeypatch.setattr(store, "crops", {crop: {**store.crops[crop], "counts": counts[crop]} for crop in CROPS})
    drawn = sampler(store)
    # nuc is shown nowhere: whatever knows where it is absent will do
    assert drawn.classes == [(0, [1]), (1, [0]), (2, [0, 1])]


def test_sampled_voxels_stay_in_the_memory_map(store: Store) -> None:
    drawing = sampler(store)
    drawing.draw(0, 0)
    for crop, held in drawing._voxels.items():
        listed = store.positions(CROPS[crop])
        assert np.shares_memory(held.of_classes, listed)
        assert np.shares_memory(held.known, listed)


def test_nothing_but_the_index_is_read_before_the_first_sample(tmp_path: Path) -> None:
    opened = Store(write_store(tmp_path))
    for path in (tmp_path / "store").iterdir():
        path.unlink()
    assert sampler(opened).patches.shapes == [(30, 32, 28), (32, 32, 28)]


def test_voxel_sizes_are_those_of_the_crops(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lattice = {**store.crops[CROPS[1]]["lattice"], "voxel_nm": [40, 8, 8]}
    monkeypatch.setitem(store.crops[CROPS[1]], "lattice", lattice)
    assert sampler(store).patches.voxels == [(8.0, 8.0, 8.0), (40.0, 8.0, 8.0)]


@given(data=st.data(), layout=st.sampled_from([MAPPED, BLOCKED]), axis=st.integers(0, 2))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_outside_the_arrays_em_is_mirrored_as_numpy_does_and_nothing_known(
    store: Store, blocked: Store, data: st.DataObject, layout: str, axis: int
) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 60)] * 3))
    patch = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    patches = Patches(blocked if layout == BLOCKED else store, ["set-0/crop0"], CLASSES, patch)
    sizes = patches.shapes[0]
    origin = [data.draw(st.integers(min(0, size - n), max(0, size - n))) for size, n in zip(sizes, shape, strict=True)]
    image, label = np.empty(patch, np.uint8), np.empty(patch, np.uint8)
    patches.copy(Patch(0, tuple(origin), (0, 0, 0), axis), image, label)
    sides = [(max(-a, 0), max(a + n - size, 0)) for a, n, size in zip(origin, shape, sizes, strict=True)]
    box = tuple(slice(max(a, 0), max(a, 0) + n) for a, n in zip(origin, shape, strict=True))
    stored = voxels(store, "set-0/crop0", "image"), voxels(store, "set-0/crop0")
    np.testing.assert_array_equal(np.moveaxis(image, 0, axis), np.pad(stored[0], sides, mode="reflect")[box])
    np.testing.assert_array_equal(np.moveaxis(label, 0, axis), np.pad(stored[1], sides, constant_values=255)[box])


def paint(index: Path) -> Store:
    """Write the places of its voxels into the first crop of a store: z and the end of y as EM, the rest as label."""
    store = Store(index)
    record = store.crops[CROPS[0]]
    z, y, x = np.indices(store.shape(CROPS[0]))
    for kind, volume in (("image", z + 32 * (y % 8)), ("label", y // 8 + 4 * x)):
        path = index.parent / "store" / record["files"][kind]["path"]
        write_volume(record["layout"], path, np.dtype(np.uint8), volume.shape, [volume.astype(np.uint8)], block=16)
    return Store(index)


@pytest.mark.parametrize("layout", [MAPPED, BLOCKED])
@pytest.mark.parametrize("patch", [(1, 8, 8), (1, 24, 40), (1, 31, 29), (1, 64, 64)])
def test_slices_across_every_axis_show_what_lies_there(
    tmp_path: Path, layout: str, patch: tuple[int, int, int]
) -> None:
    store = paint(write_store(tmp_path, layout=layout))
    drawing = Sampler(
        Patches(store, CROPS[:1], CLASSES, patch), seed=0, centred_fraction=0.5, class_power=0.0, planes="all"
    )
    sizes = store.shape(CROPS[0])
    listed = {tuple(place) for place in store.positions(CROPS[0])[:, 1:].tolist()}
    image, label = np.empty(patch, np.uint8), np.empty(patch, np.uint8)
    axes = set()
    for index in range(40):
        drawn = drawing.draw(0, index)
        axes.add(drawn.axis)
        drawing.patches.copy(drawn, image, label)
        across, row, column = np.indices(patch)
        offset = {0: (across, row, column), 1: (row, across, column), 2: (row, column, across)}[drawn.axis]
        place = [first + steps for first, steps in zip(drawn.origin, offset, strict=True)]
        inside = np.logical_and.reduce([(at >= 0) & (at < n) for at, n in zip(place, sizes, strict=True)])
        z, y, x = place
        np.testing.assert_array_equal(label, np.where(inside, y // 8 + 4 * x, 255))
        np.testing.assert_array_equal(image[inside], (z + 32 * (y % 8))[inside])
        z, y, _ = (n - 1 - abs((n - 1) - abs(at) % (2 * n - 2)) for at, n in zip(place, sizes, strict=True))
        np.testing.assert_array_equal(image, z + 32 * (y % 8))
        assert tuple(int(at[drawn.anchor]) for at in place) in listed
        assert inside[drawn.anchor]
    assert axes == {0, 1, 2}


def test_slices_lie_across_each_axis_equally_often_where_voxels_are_isotropic(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lattice = {**store.crops[CROPS[1]]["lattice"], "voxel_nm": [8.2, 8, 8]}
    monkeypatch.setitem(store.crops[CROPS[1]], "lattice", lattice)
    drawing = sampler(store, (1, 16, 16), planes="all")
    drawn = [drawing.draw(0, index) for index in range(900)]
    shares = np.bincount([patch.axis for patch in drawn if patch.crop == 0], minlength=3)
    np.testing.assert_allclose(shares / shares.sum(), 1 / 3, atol=0.06)
    assert {patch.axis for patch in drawn if patch.crop == 1} == {0}
    assert 0 < known_fraction(drawing) <= 1


def test_planes_decide_nothing_else(store: Store) -> None:
    def places(drawing: Sampler, axis: int) -> list[tuple[int, tuple[int, ...]]]:
        drawn = [drawing.draw(0, index) for index in range(100)]
        return [
            (patch.crop, tuple(np.add(patch.origin, np.insert(patch.anchor[1:], patch.axis, patch.anchor[0])).tolist()))
            for patch in drawn
            if axis in (patch.axis, -1)
        ]

    slices, across_z = (sampler(store, (1, 16, 16), planes=planes) for planes in ("all", "z"))
    assert places(slices, -1) == places(across_z, -1) == places(across_z, 0)
    assert len(places(slices, 0)) < 60
    volumes = [sampler(store, (8, 16, 16), planes=planes) for planes in ("all", "z")]
    first, second = ([drawing.draw(0, index) for index in range(50)] for drawing in volumes)
    assert first == second
    assert {patch.axis for patch in first} == {0}


@given(size=st.integers(1, 9), before=st.integers(0, 20), after=st.integers(0, 20))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_mirroring_is_numpys(size: int, before: int, after: int) -> None:
    planes = np.arange(size, dtype=np.uint8)
    filled = np.pad(planes, (before, after))
    sampling._mirror(filled, before, before + size)
    np.testing.assert_array_equal(filled, np.pad(planes, (before, after), mode="reflect"))


@pytest.mark.parametrize("origin", [(-1, 0, 0), (0, 25, 0), (0, 0, 40)])
def test_patch_that_cuts_a_crop_off_is_refused(store: Store, origin: tuple[int, int, int]) -> None:
    patches = Patches(store, ["set-0/crop0"], CLASSES, (8, 8, 8))
    with pytest.raises(ValueError, match="crop set-0/crop0 is cut off"):
        patches.copy(Patch(0, origin, (0, 0, 0)), np.empty((8, 8, 8), np.uint8), np.empty((8, 8, 8), np.uint8))


@pytest.mark.parametrize("patch", [(16, 16, 16), (40, 12, 8), (64, 64, 64)])
def test_tiles_cover_every_labelled_voxel_once(store: Store, patch: tuple[int, int, int]) -> None:
    patches = Patches(store, ["set-0/crop0", "set-0/crop2"], CLASSES, patch)
    for crop, name in enumerate(patches.crops):
        seen = np.zeros(np.array(store.shape(name)) + 128, int)
        for tile in (tile for tile in tiles(patches) if tile.patch.crop == crop):
            assert all(0 <= part.start < part.stop <= size for part, size in zip(tile.owned, patch, strict=True))
            box = tuple(
                slice(64 + start + part.start, 64 + start + part.stop)
                for start, part in zip(tile.patch.origin, tile.owned, strict=True)
            )
            seen[box] += 1
        record = store.crops[name]
        expected = np.zeros_like(seen)
        expected[
            tuple(
                slice(64 + offset, 64 + offset + length)
                for offset, length in zip(record["label_offset"], record["label_shape"], strict=True)
            )
        ] = 1
        np.testing.assert_array_equal(seen, expected)


def test_model_of_some_classes_samples_what_is_known_of_them(store: Store) -> None:
    drawing = sampler(store, classes=["nuc"])
    assert drawing.patches.tables.shape == (2, 1, 256)
    assert {drawing.draw(0, index).crop for index in range(20)} == {0}
    assert 0 < known_fraction(drawing) <= 1


@pytest.mark.parametrize("layout", [MAPPED, BLOCKED])
@pytest.mark.parametrize("sampled", [True, False])
def test_voxels_that_the_model_knows_are_looked_up(
    store: Store, blocked: Store, monkeypatch: pytest.MonkeyPatch, sampled: bool, layout: str
) -> None:
    store = blocked if layout == BLOCKED else store
    listed = store.positions("set-0/crop0")
    if not sampled:  # of the known voxels the store lists those of one class alone, where nothing else is known
        ecs = listed[listed[:, 0] == CLASSES.index("ecs")]
        listed = np.concatenate([np.column_stack([np.full(len(ecs), ANY_KNOWN), ecs[:, 1:]]), ecs])
        monkeypatch.setattr(store, "positions", lambda crop: listed.astype(np.int32))
    monkeypatch.setattr(sampling, "SLAB_VOXELS", 2000)
    patches = Patches(store, ["set-0/crop0"], ["nuc"], (8, 8, 8))
    patches.tables[:, :, :3] = UNKNOWN  # of the rows that occur, the model knows the last
    drawing = Sampler(patches, seed=0, centred_fraction=0.0, class_power=-0.5)
    assert 0 < known_fraction(drawing) <= 1
    label = voxels(store, "set-0/crop0")
    known = drawing._voxels[0].known
    assert (label[tuple(known.T)] == 3).all()
    assert len(known) < (label == 3).sum() if sampled else len(known) == (label == 3).sum()


def test_nothing_known_is_an_error(store: Store) -> None:
    with pytest.raises(TrainingError, match="none of the 1 training crops has a known voxel of nuc"):
        Sampler(Patches(store, ["set-1/crop1"], ["nuc"], (8, 8, 8)), seed=0, centred_fraction=0.5, class_power=-0.5)
    with pytest.raises(TrainingError, match="lacks the model's class 'er_mem'"):
        Patches(store, ["set-1/crop1"], ["er_mem"], (8, 8, 8))
