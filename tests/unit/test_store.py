"""The store as readers see it: opened without reading it, and refused if it is not what they expect."""

import json
import pickle
import time

import numpy as np
import pytest

from cellmap_pipe.classes import TESTED
from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import canonical_json, describe_file
from cellmap_pipe.prepare.store import FORMAT_VERSION, Store, pack_index, unpack_index, verify_store

CLASSES = ["pm", "mito", "nuc"]
TABLE = {"0": "002", "1": "102", "2": "012", "255": "222"}


def record(crop, files, classes=CLASSES, shape=(6, 5, 4), table=TABLE):
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
        "files": files,
        "input_digest": "0" * 64,
    }


def header(classes=CLASSES, grid="8nm"):
    return {
        "format_version": FORMAT_VERSION,
        "grid": grid,
        "voxel_nm": [8.0, 8.0, 8.0],
        "classes": list(classes),
        "store_dir": "store",
        "normalisation": {"a": [10.5, 200.0]},
    }


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (6, 5, 4)).astype(np.uint8),
        "label": rng.choice(np.array([0, 1, 2, 255], np.uint8), (6, 5, 4)),
        "positions": rng.integers(0, 4, (9, 4)).astype(np.int32),
    }


@pytest.fixture
def index(tmp_path):
    """The index of a store with two small crops."""
    folder = tmp_path / "store"
    folder.mkdir()
    records = []
    for seed, crop in enumerate(["a/crop1", "a/crop2"]):
        files = {}
        for kind, array in arrays(seed).items():
            path = folder / f"{crop.replace('/', '_')}_{kind}.npy"
            np.save(path, array)
            files[kind] = describe_file(path, folder)
        records.append(record(crop, files))
    path = tmp_path / "index.json"
    path.write_text(canonical_json(pack_index(header(), records)))
    return path


def test_store_gives_arrays_table_and_constants(index):
    store = Store(index, classes=CLASSES, grid="8nm")
    assert store.classes == CLASSES
    assert store.voxel_nm == (8.0, 8.0, 8.0)
    assert store.normalisation == {"a": (10.5, 200.0)}
    assert list(store.crops) == ["a/crop1", "a/crop2"]
    for seed, crop in enumerate(store.crops):
        expected = arrays(seed)
        np.testing.assert_array_equal(store.image(crop), expected["image"])
        np.testing.assert_array_equal(store.label(crop), expected["label"])
        np.testing.assert_array_equal(store.positions(crop), expected["positions"])
        table = store.table(crop)
        assert table.dtype == np.uint8
        assert len(table) >= 256
        assert table[1].tolist() == [1, 0, 2]
        assert table[77].tolist() == [2, 2, 2]


def test_arrays_are_maps_that_cannot_be_written(index):
    store = Store(index)
    assert isinstance(store.image("a/crop1"), np.memmap)
    assert store.image("a/crop1") is store.image("a/crop1")
    with pytest.raises(ValueError, match="read-only"):
        store.label("a/crop1")[0, 0, 0] = 1


def test_pickled_store_carries_no_voxels(index):
    store = Store(index)
    before = len(pickle.dumps(store))
    store.image("a/crop1"), store.label("a/crop1")
    sent = pickle.dumps(store)
    assert len(sent) == before
    np.testing.assert_array_equal(pickle.loads(sent).image("a/crop1"), arrays(0)["image"])


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
    begun = time.process_time()
    assert len(unpack_index(json.loads(path.read_text()))[1]) == 289
    assert time.process_time() - begun < 0.5


@pytest.mark.parametrize("kind", ["image", "label", "positions"])
def test_missing_or_truncated_file_is_named_when_the_store_is_opened(index, kind):
    path = index.parent / f"store/a_crop2_{kind}.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ContractError, match=rf"a_crop2_{kind}\.npy: \d+ bytes on disk.*-R chunk"):
        Store(index)
    path.unlink()
    with pytest.raises(ContractError, match=rf"a_crop2_{kind}\.npy: missing.*-R chunk"):
        Store(index)


def test_flipped_byte_is_found_by_verify(index):
    assert verify_store(index) == []
    path = index.parent / "store/a_crop1_label.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    Store(index)  # sizes agree
    (problem,) = verify_store(index)
    assert "a_crop1_label.npy: damaged" in problem
    assert "-R chunk" in problem


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
    index.write_text(json.dumps({**content, "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ContractError, match=f"store format {FORMAT_VERSION + 1}, this version reads {FORMAT_VERSION}"):
        Store(index)


@pytest.mark.parametrize("content", ["", "[]", '{"format_version": null}', "{"])
def test_index_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "index.json"
    path.write_text(content)
    with pytest.raises(ContractError, match=r"index\.json.*-R chunk"):
        Store(path)


def test_crop_that_is_not_in_the_store_is_named(index):
    with pytest.raises(ContractError, match="crop 'a/crop9' is not in the store"):
        Store(index).image("a/crop9")


def test_file_of_the_right_size_that_is_no_array_is_named(index):
    path = index.parent / "store/a_crop1_image.npy"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(ContractError, match=r"a_crop1_image\.npy: cannot be read"):
        Store(index).image("a/crop1")
