"""The store as readers see it: opened without reading it, and refused if it is not what they expect."""

import json
import logging
import pickle
import re

import numpy as np
import pytest

from cellmap_pipe.classes import TESTED
from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import canonical_json, describe_file
from cellmap_pipe.prepare.layout import BLOCKED, MAPPED, write_array, write_volume
from cellmap_pipe.prepare.store import FORMAT_VERSION, Store, pack_index, unpack_index, verify_store
from cellmap_pipe.training.fingerprint import fingerprint

CLASSES = ["pm", "mito", "nuc"]
TABLE = {"0": "002", "1": "102", "2": "012", "255": "222"}


def record(crop, files, classes=CLASSES, shape=(6, 5, 4), table=TABLE, layout=MAPPED, content=None):
    voxels = int(np.prod(shape))
    counts = {name: {"present": 7 if i == 0 else 0, "absent": 50, "unknown": 0} for i, name in enumerate(classes)}
    for count in counts.values():
        count["unknown"] = voxels - count["present"] - count["absent"]
    return {
        "crop": crop,
        "dataset": crop.split("/")[0],
        "lattice": {"voxel_nm": [8.0, 8.0, 8.0], "translation_nm": [0.0, 4.0, 0.0], "shape": list(shape)},
        "label_offset": [0, 0, 0],
        "label_shape": list(shape),
        "table": table,
        "classes": list(classes),
        "counts": counts,
        "annotated": list(classes[:2]),
        "has_positive": [classes[0]],
        "layout": layout,
        "files": files,
        "content": content or dict.fromkeys(("image", "label", "positions"), "c" * 64),
        "input_digest": "0" * 64,
    }


def header(classes=CLASSES, grid="8nm"):
    return {
        "format_version": FORMAT_VERSION,
        "grid": grid,
        "voxel_nm": [8.0, 8.0, 8.0],
        "classes": list(classes),
        "store_dir": "store",
        "ranges": {"a": {"percentile": [10.5, 200.0], "range": [3.0, 250.0]}},
    }


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (6, 5, 4)).astype(np.uint8),
        "label": rng.choice(np.array([0, 1, 2, 255], np.uint8), (6, 5, 4)),
        "positions": rng.integers(0, 4, (9, 4)).astype(np.int32),
    }


def write_store(root, layout):
    """Write a store of two small crops under `root` and return its index."""
    folder = root / "store"
    folder.mkdir(parents=True)
    records = []
    for seed, crop in enumerate(["a/crop1", "a/crop2"]):
        paths = {kind: folder / f"{crop.replace('/', '_')}_{kind}.npy" for kind in arrays(seed)}
        voxels = arrays(seed)
        write_array(paths["positions"], voxels.pop("positions"))
        content = {
            kind: write_volume(layout, paths[kind], array.dtype, array.shape, [array], block=4)
            for kind, array in voxels.items()
        }
        files = {kind: describe_file(path, folder) for kind, path in paths.items()}
        content["positions"] = files["positions"]["sha256"]
        records.append(record(crop, files, layout=layout, content=content))
    path = root / "index.json"
    path.write_text(canonical_json(pack_index(header(), records)))
    return path


@pytest.fixture(params=[MAPPED, BLOCKED])
def index(request, tmp_path):
    """The index of a store with two small crops, in each layout."""
    return write_store(tmp_path, request.param)


def whole(volume):
    out = np.empty(volume.shape, volume.dtype)
    volume.copy((0, 0, 0), out)
    return out


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def test_store_gives_voxels_table_and_constants(index):
    store = Store(index, classes=CLASSES, grid="8nm")
    assert store.classes == CLASSES
    assert store.voxel_nm == (8.0, 8.0, 8.0)
    assert store.intensity_range("a", "percentile") == (10.5, 200.0)
    assert store.intensity_range("a", "range") == (3.0, 250.0)
    assert store.intensity_range("a", "uint8/255") == (0.0, 255.0)
    assert store.intensity_range("a", [90, 210]) == (90.0, 210.0)
    assert list(store.crops) == ["a/crop1", "a/crop2"]
    for seed, crop in enumerate(store.crops):
        expected = arrays(seed)
        assert store.shape(crop) == (6, 5, 4)
        for kind in ("image", "label"):
            np.testing.assert_array_equal(whole(store.volume(crop, kind)), expected[kind])
            assert store.volume(crop, kind) is store.volume(crop, kind)
        np.testing.assert_array_equal(store.positions(crop), expected["positions"])
        assert store.positions(crop).dtype == np.int32
        table = store.table(crop)
        assert table.dtype == np.uint8
        assert len(table) >= 256
        assert table[1].tolist() == [1, 0, 2]
        assert table[77].tolist() == [2, 2, 2]


def test_positions_are_a_map_that_cannot_be_written(index):
    store = Store(index)
    assert store.positions("a/crop1") is store.positions("a/crop1")
    with pytest.raises(ValueError, match="read-only"):
        store.positions("a/crop1")[0, 0] = 1


def test_store_is_opened_without_opening_a_bulk_file(index):
    for path in (index.parent / "store").iterdir():
        path.write_bytes(b"\0" * path.stat().st_size)
    store = Store(index)
    assert store.shape("a/crop2") == (6, 5, 4)
    with pytest.raises(ContractError, match=r"a_crop2_image\.npy: cannot be read"):
        store.volume("a/crop2", "image")
    with pytest.raises(ContractError, match=r"a_crop2_positions\.npy: cannot be read"):
        store.positions("a/crop2")


def test_pickled_store_carries_no_voxels(index):
    store = Store(index)
    before = len(pickle.dumps(store))
    store.volume("a/crop1", "image"), store.positions("a/crop1")
    sent = pickle.dumps(store)
    assert len(sent) == before
    np.testing.assert_array_equal(whole(pickle.loads(sent).volume("a/crop1", "image")), arrays(0)["image"])


def test_bytes_of_maps_are_those_of_the_files_that_are_mapped(tmp_path):
    mapped, blocked = (Store(write_store(tmp_path / layout, layout)) for layout in (MAPPED, BLOCKED))
    sizes = [path.stat().st_size for path in (tmp_path / "mapped/store").glob("a_crop1*")]
    assert mapped.mapped_bytes(["a/crop1"]) == sum(sizes)
    assert blocked.mapped_bytes(["a/crop1", "a/crop2"]) == 0


def test_layout_does_not_alter_what_a_training_is_made_from(tmp_path):
    settings = {"normalisation": "percentile", "init_from": None, "on_damage": "stop"}

    def of(store, crops=("a/crop1",)):
        return fingerprint(settings, store, list(crops), [])

    mapped, blocked = (Store(write_store(tmp_path / layout, layout)) for layout in (MAPPED, BLOCKED))
    for crop in mapped.crops:
        assert mapped.crops[crop]["files"]["image"]["sha256"] != blocked.crops[crop]["files"]["image"]["sha256"]
    assert of(mapped) == of(blocked)
    assert of(mapped) != of(mapped, ["a/crop2"])
    for kind in ("image", "label", "positions"):
        other = Store(mapped.path)
        other.crops["a/crop1"]["content"][kind] = "0" * 64
        assert of(other) != of(mapped)


def test_records_come_back_as_they_were_packed():
    records = [record("a/crop1", {}), record("b/crop2", {}, table={**TABLE, "7": "110"}), record("b/crop3", {})]
    packed = json.loads(canonical_json(pack_index(header(), records)))
    index, unpacked = unpack_index(packed)
    assert index == header()
    assert list(unpacked.values()) == records
    assert len(packed["tables"]) == 2


def test_index_of_the_whole_challenge_stays_below_a_megabyte(tmp_path):
    rows = {str(i): "".join("012"[(i + j) % 3] for j in range(48)) for i in range(50)}
    files = {
        kind: {"path": f"jrc_mus-liver-zon-1_crop{100}_{kind}.npy", "size": 10**8, "sha256": "f" * 64}
        for kind in ("image", "label", "positions")
    }
    records = [record(f"jrc_mus-liver-zon-1/crop{i}", files, TESTED, (400, 400, 400), rows) for i in range(289)]
    for entry in records:
        entry["annotated"] = list(TESTED)
        entry["counts"] = {name: {"present": 12345678, "absent": 51654322, "unknown": 0} for name in TESTED}
    path = tmp_path / "index.json"
    path.write_text(canonical_json(pack_index(header(TESTED), records)))
    assert path.stat().st_size < 2**20
    assert len(unpack_index(json.loads(path.read_text()))[1]) == 289


@pytest.mark.parametrize("kind", ["image", "label", "positions"])
def test_missing_or_truncated_file_is_named_when_the_store_is_opened(index, kind):
    path = index.parent / f"store/a_crop2_{kind}.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ContractError, match=rf"a_crop2_{kind}\.npy: \d+ bytes on disk.*-R chunk"):
        Store(index)
    path.unlink()
    with pytest.raises(ContractError, match=rf"a_crop2_{kind}\.npy: missing.*-R chunk"):
        Store(index)
    damaged = {}
    store = Store(index, damaged=damaged)
    assert list(damaged) == ["a/crop2"]
    assert re.search(rf"a_crop2_{kind}\.npy: missing.*-R chunk", damaged["a/crop2"])
    store.volume("a/crop1", "image")


def test_file_that_cannot_be_read_is_named(index):
    store, path = Store(index), index.parent / "store/a_crop2_label.npy"
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(ContractError, match=r"a_crop2_label\.npy: cannot be read.*-R chunk"):
        Store(index)
    assert list(store.read_through(store.crops, 2)) == ["a/crop2"]


def test_nothing_is_left_out_of_a_store_that_is_whole(index):
    damaged = {}
    assert len(Store(index, damaged=damaged).crops) == 2
    assert damaged == {}


@pytest.mark.parametrize("threads", [1, 3])
def test_flipped_bit_is_found_by_reading_through(index, threads, caplog):
    caplog.set_level(logging.INFO)
    store = Store(index)
    assert store.read_through(store.crops, threads) == {}
    assert re.search(r"GB of 2 crops read in .* GB/s", caplog.messages[-1])
    flip_a_bit(index.parent / "store/a_crop1_label.npy")
    store = Store(index)  # sizes agree
    ((crop, problem),) = store.read_through(store.crops, threads).items()
    assert crop == "a/crop1"
    assert re.search(r"a_crop1_label\.npy: damaged.*-R chunk", problem)
    assert store.read_through(["a/crop2"], threads) == {}
    flip_a_bit(index.parent / "store/a_crop1_positions.npy")
    assert re.search(r"a_crop1_label\.npy.*a_crop1_positions\.npy", store.read_through(store.crops, threads)["a/crop1"])


def test_every_damaged_file_is_named_by_verify(index):
    assert verify_store(index) == []
    folder = index.parent / "store"
    flip_a_bit(folder / "a_crop1_label.npy")
    flip_a_bit(folder / "a_crop1_image.npy")
    (folder / "a_crop2_positions.npy").unlink()
    problems = verify_store(index)
    assert [re.search(r"(\w+)\.npy: (\w+)", problem).groups() for problem in problems] == [
        ("a_crop1_image", "damaged"),
        ("a_crop1_label", "damaged"),
        ("a_crop2_positions", "missing"),
    ]
    assert all("-R chunk" in problem for problem in problems)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"classes": ["pm", "mito", "nuc", "er_mem"]}, "another class list (without er_mem)"),
        ({"classes": ["pm", "er_mem"]}, "another class list (without er_mem and with mito, nuc)"),
        ({"classes": ["mito", "pm", "nuc"]}, "another class list (in the order pm, mito, nuc)"),
        ({"grid": "4nm"}, "the store is on grid '8nm', '4nm' is asked for"),
    ],
)
def test_store_for_other_classes_or_another_grid_is_refused(index, asked, message):
    with pytest.raises(ContractError) as error:
        Store(index, **asked)
    assert message in str(error.value)
    assert "-R chunk" in str(error.value)


def test_store_of_another_format_is_refused(index):
    content = json.loads(index.read_text())
    for version in (FORMAT_VERSION - 1, FORMAT_VERSION + 1):
        index.write_text(json.dumps({**content, "format_version": version}))
        for read in (Store, verify_store):
            with pytest.raises(
                ContractError, match=f"store format {version}, this version reads {FORMAT_VERSION}; .*-R chunk"
            ):
                read(index)


@pytest.mark.parametrize("content", ["", "[]", '{"format_version": null}', "{"])
def test_index_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "index.json"
    path.write_text(content)
    with pytest.raises(ContractError, match=r"index\.json.*-R chunk"):
        Store(path)


def test_crop_that_is_not_in_the_store_is_named(index):
    store = Store(index)
    for read in (store.shape, store.positions, lambda crop: store.volume(crop, "image")):
        with pytest.raises(ContractError, match="crop 'a/crop9' is not in the store"):
            read("a/crop9")
