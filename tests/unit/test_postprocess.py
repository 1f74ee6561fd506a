"""From probabilities to masks and instances on the target voxels."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from cellmap_pipe.colours import colour_of
from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import read_json, write_json
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prediction import postprocess
from cellmap_pipe.prediction.hierarchy import repair
from cellmap_pipe.prediction.postprocess import outputs_of, segment
from cellmap_pipe.prediction.processing import FORMAT, Choice, Processing, choice_to_dict
from cellmap_pipe.prediction.store import create_probabilities
from cellmap_pipe.prepare.resample import resample_mean

GRID = Lattice((8, 8, 8), (104, 204, 304), (40, 20, 20))
SETTINGS: dict[str, Any] = {
    "threshold": 0.5,
    "thresholds": {},
    "hole_nm3": {},
    "split_nm": {},
    "min_size_nm3": {},
    "derive": [],
    "repair": "auto",
    "revision": 0,
}


def predicted(
    folder: Path,
    arrays: dict[str, np.ndarray],
    target: Lattice = GRID,
    lattice: Lattice = GRID,
    output: str = "uint8",
) -> Path:
    """A prediction of one volume with an array (z, y, x) of 255 p by class."""
    values = np.stack(list(arrays.values()))
    store = create_probabilities(folder / "p/x_crop1.zarr", "x/crop1", lattice, list(arrays), {}, output=output)
    store[:] = values if output == "uint8" else (values / 255).astype(np.float16)
    record = {
        "name": "x/crop1",
        "dataset": "x",
        "path": "p/x_crop1.zarr",
        "lattice": lattice.to_dict(),
        "target": target.to_dict(),
        "classes": list(arrays),
        "fingerprint": str(sum(int(array.sum()) for array in arrays.values())),
        "status": "ok",
        "cause": "",
    }
    write_json(folder / "shard0.json", {"model": "m", "fold": "0", "subset": "test", "records": [record]})
    return folder / "shard0.json"


def run(
    folder: Path, index: Path, tuned: Path | None = None, memory_gb: float | None = None, **settings: Any
) -> dict[str, Any]:
    segment(
        [index],
        folder / "out/test.json",
        store_dir=folder / "out/test",
        settings={**SETTINGS, **settings},
        tuned=tuned,
        subset="test",
        memory_gb=memory_gb,
    )
    return dict(read_json(folder / "out/test.json"))


def array_of(folder: Path, record: dict[str, Any], name: str) -> "zarr.Array[Any]":
    return zarr.open_array(str(folder / "out" / record["path"] / name / "s0"), mode="r")


def noise(seed: int, shape: tuple[int, ...] = GRID.shape) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_masks_are_probabilities_above_the_threshold(tmp_path: Path) -> None:
    p = noise(1)
    p[0, 0, :4] = [127, 128, 76, 77]
    result = run(tmp_path, predicted(tmp_path, {"pm": p, "er_mem": p}), thresholds={"er_mem": 0.3})
    assert (result["model"], result["fold"], result["subset"]) == ("m", "0", "test")
    (record,) = result["records"]
    assert (record["status"], record["classes"], record["objects"]) == ("ok", ["pm", "er_mem"], {})
    pm = array_of(tmp_path, record, "pm")
    np.testing.assert_array_equal(pm[:], p >= 128)
    np.testing.assert_array_equal(array_of(tmp_path, record, "er_mem")[:], p >= 77)
    assert pm.dtype == np.uint8 and pm.metadata.zarr_format == 2
    assert dict(pm.attrs) == {
        "voxel_size": [8.0, 8.0, 8.0],
        "translation": [104.0, 204.0, 304.0],
        "shape": [40, 20, 20],
    }
    assert pm.metadata.to_dict()["dimension_separator"] == "/"


@pytest.mark.parametrize(
    "target",
    [
        Lattice((4, 4, 4), (102, 202, 302), (80, 40, 40)),
        Lattice((2.62, 2, 2), (100.3, 200.9, 301.5), (120, 79, 81)),
        Lattice((16, 16, 16), (108, 208, 308), (20, 10, 10)),
    ],
)
def test_probabilities_are_carried_to_the_target_by_world_position(tmp_path: Path, target: Lattice) -> None:
    """A plane through painted coordinates stays where it is in the world, whatever the voxels."""
    z, y, x = np.meshgrid(
        *[t + v * np.arange(n) for t, v, n in zip(GRID.translation_nm, GRID.voxel_nm, GRID.shape, strict=True)],
        indexing="ij",
    )
    field = 0.5 * (z - 104) + 0.25 * (y - 204) + 0.1 * (x - 304)
    (record,) = run(tmp_path, predicted(tmp_path, {"pm": np.rint(field).astype(np.uint8)}, target))["records"]
    mask = array_of(tmp_path, record, "pm")
    assert mask.shape == target.shape
    axes = [
        np.clip(t + v * np.arange(n), first, first + 8 * (size - 1))  # edges repeat the nearest voxel
        for t, v, n, first, size in zip(
            target.translation_nm, target.voxel_nm, target.shape, GRID.translation_nm, GRID.shape, strict=True
        )
    ]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    expected = 0.5 * (z - 104) + 0.25 * (y - 204) + 0.1 * (x - 304)
    clear = np.abs(expected - 127.5) > 0.6
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(mask[:].astype(bool)[clear], (expected > 127.5)[clear])


def test_instances_are_26_connected_components(tmp_path: Path) -> None:
    p = np.where(noise(2) > 225, 255, 0).astype(np.uint8)
    (record,) = run(tmp_path, predicted(tmp_path, {"nuc": p}))["records"]
    labels = array_of(tmp_path, record, "nuc")
    reference, count = ndimage.label(p > 0, structure=np.ones((3, 3, 3)))
    assert record["objects"] == {"nuc": count} and labels.dtype == np.uint16
    pairs = np.unique(np.stack([labels[:].ravel(), reference.ravel()]), axis=1)
    assert pairs.shape[1] == count + 1
    assert labels[:].max() == count


def test_small_objects_are_removed(tmp_path: Path) -> None:
    p = np.zeros(GRID.shape, np.uint8)
    p[2:4, 2:4, 2:4] = 255  # 8 voxels of 512 nm^3
    p[10:12, 10:12, 10] = 255  # 4 voxels
    p[30, 5, 5:10] = 255  # 5 voxels
    arrays = {"nuc": p, "pm": p.copy(), "ecs": p.copy()}
    size = {"nuc": 5 * 512.0, "pm": 5 * 512.0 + 1}
    (record,) = run(tmp_path, predicted(tmp_path, arrays), min_size_nm3=size)["records"]
    assert record["objects"] == {"nuc": 2}
    nuc, pm = array_of(tmp_path, record, "nuc")[:], array_of(tmp_path, record, "pm")[:]
    assert np.bincount(nuc.ravel())[1:].tolist() == [8, 5]
    assert pm.dtype == np.uint8 and pm.sum() == 8
    assert array_of(tmp_path, record, "ecs")[:].sum() == 17


def test_groups_are_unions_of_what_makes_them_up(tmp_path: Path) -> None:
    arrays = {name: noise(i) for i, name in enumerate(["mito_mem", "mito_lum", "mito_ribo", "er_mem", "er_lum"])}
    more = {"thresholds": {"mito_ribo": 0.8, "mito_mem": 0.96}, "min_size_nm3": {"mito_mem": 3 * 512.0}}
    (record,) = run(tmp_path, predicted(tmp_path, arrays), derive=["mito", "golgi"], **more)["records"]
    assert record["classes"] == [*arrays, "mito"]
    # the parts at their own thresholds, before small pieces of them are removed
    union = (arrays["mito_mem"] >= 245) | (arrays["mito_lum"] >= 128) | (arrays["mito_ribo"] > 204)
    np.testing.assert_array_equal(array_of(tmp_path, record, "mito")[:] > 0, union)
    assert not np.array_equal(array_of(tmp_path, record, "mito_mem")[:] > 0, arrays["mito_mem"] >= 245)
    assert record["objects"].keys() == {"mito"} and record["processing"]["mito"]["threshold"] is None
    assert record["not_derived"] == {"golgi": "none of the predicted classes lies inside it"}


def test_groups_without_all_their_parts_are_marked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays = {"er_mem": noise(1), "er_lum": noise(2), "mito_mem": noise(3), "mito_lum": noise(4)}
    (record,) = run(tmp_path, predicted(tmp_path, arrays), derive=["er", "mito"])["records"]
    missing = ["eres_mem", "eres_lum", "ne_mem", "ne_lum", "np_out", "np_in"]
    assert record["approximate"] == {"er": missing, "mito": ["mito_ribo"]}
    er = array_of(tmp_path, record, "er")
    np.testing.assert_array_equal(er[:] > 0, (arrays["er_mem"] >= 128) | (arrays["er_lum"] >= 128))
    assert er.attrs["approximate"] == missing
    assert array_of(tmp_path, record, "mito").attrs["approximate"] == ["mito_ribo"]
    assert "approximate" not in array_of(tmp_path, record, "er_mem").attrs
    assert "group mito is approximate, without mito_ribo" in caplog.text


def test_a_group_with_a_threshold_of_its_own_is_cut_at_that(tmp_path: Path) -> None:
    arrays = {name: noise(i) for i, name in enumerate(["ves_mem", "ves_lum"])}
    index = predicted(tmp_path, arrays)
    (record,) = run(tmp_path, index, derive=["ves"], thresholds={"ves": 0.8}, repair=True)["records"]
    largest = np.maximum(arrays["ves_mem"], arrays["ves_lum"])
    np.testing.assert_array_equal(array_of(tmp_path, record, "ves")[:] > 0, largest > 204)
    assert record["processing"]["ves"]["threshold"] == 0.8


def test_a_predicted_group_is_not_derived() -> None:
    parts, impossible = outputs_of(["mito", "mito_mem", "mito_lum", "mito_ribo"], ["mito", "golgi"])
    assert parts["mito"] == ["mito"]
    assert impossible.keys() == {"golgi"}


def test_masks_are_repaired_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {name: noise(i) for i, name in enumerate(["ecs", "pm", "mito_mem", "mito_lum", "nuc"])}
    index = predicted(tmp_path, arrays)
    monkeypatch.setattr("cellmap_pipe.prediction.postprocess.PIECE_BYTES", 1)  # as many pieces as there are chunks
    monkeypatch.setattr("cellmap_pipe.prediction.postprocess.CHUNK", (16, 16, 16))
    (record,) = run(tmp_path, index, repair=True, derive=["mito"])["records"]
    masks = repair({name: array.astype(np.float32) for name, array in arrays.items()}, dict.fromkeys(arrays, 0.5))
    masks["mito"] = masks["mito_mem"] | masks["mito_lum"]
    for name, mask in masks.items():
        np.testing.assert_array_equal(array_of(tmp_path, record, name)[:] > 0, mask)
    assert record["repair"] is True
    # classes that exclude each other never meet
    assert sum(array_of(tmp_path, record, name)[:] > 0 for name in ("ecs", "pm", "mito", "nuc")).max() == 1


def test_each_volume_is_processed_as_tuning_chose_for_it(tmp_path: Path) -> None:
    arrays = {"pm": noise(1), "ecs": noise(2), "ves_mem": noise(3), "ves_lum": noise(4)}
    index = predicted(tmp_path, arrays)
    listing = read_json(index)
    listing["records"].append({**listing["records"][0], "name": "x/crop2"})
    write_json(index, listing)
    by_crop1 = Choice({"pm": Processing(0.3), "ves": Processing(0.7, min_size_nm3=2 * 512.0)})
    by_all = Choice({"pm": Processing(0.2)}, repair=True)
    tuned = tmp_path / "tuned.json"
    contents = {"format": FORMAT, "groups": {"x/crop1": 0}, "overall": choice_to_dict(by_all)}
    write_json(tuned, {**contents, "by_group": [choice_to_dict(by_crop1)]})
    chosen: dict[str, Any] = {"derive": ["ves"], "threshold": 0.6}
    first, second = run(tmp_path, index, tuned=tuned, **chosen)["records"]
    assert (first["repair"], second["repair"]) == (False, True)
    np.testing.assert_array_equal(array_of(tmp_path, first, "pm")[:] > 0, arrays["pm"] > 0.3 * 255)
    np.testing.assert_array_equal(array_of(tmp_path, first, "ecs")[:] > 0, arrays["ecs"] > 0.6 * 255)
    labels, _ = ndimage.label(np.maximum(arrays["ves_mem"], arrays["ves_lum"]) > 0.7 * 255, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())
    assert first["objects"]["ves"] == np.count_nonzero(sizes[1:] >= 2)
    thresholds = {"pm": 0.2, "ecs": 0.6, "ves_mem": 0.6, "ves_lum": 0.6}
    masks = repair({name: array.astype(np.float32) for name, array in arrays.items()}, thresholds)
    np.testing.assert_array_equal(array_of(tmp_path, second, "pm")[:] > 0, masks["pm"])
    (first, second) = run(tmp_path, index, tuned=tuned, repair=False, **chosen)["records"]
    assert (first["repair"], second["repair"]) == (False, False)


def test_holes_are_filled_and_touching_objects_parted(tmp_path: Path) -> None:
    z, y, x = np.indices(GRID.shape)
    balls = [(z - at) ** 2 + (y - 10) ** 2 + (x - 10) ** 2 < 64 for at in (12, 25)]
    p = np.where(balls[0] | balls[1], 255, 0).astype(np.uint8)
    p[12, 10, 10] = 0
    chosen = {"hole_nm3": {"nuc": 1000.0, "pm": 1000.0}, "split_nm": {"nuc": 44.0, "pm": 44.0}}
    (record,) = run(tmp_path, predicted(tmp_path, {"nuc": p, "pm": p}), **chosen)["records"]
    nuc, pm = array_of(tmp_path, record, "nuc")[:], array_of(tmp_path, record, "pm")[:]
    assert record["objects"] == {"nuc": 2} and nuc[12, 10, 10] == 1 and nuc[25, 10, 10] == 2
    np.testing.assert_array_equal(nuc > 0, balls[0] | balls[1])
    np.testing.assert_array_equal(pm > 0, balls[0] | balls[1])
    assert pm.dtype == np.uint8


def test_an_object_too_large_for_the_job_is_an_error_with_volume_and_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = predicted(tmp_path, {"nuc": np.full(GRID.shape, 255, np.uint8)})
    monkeypatch.setattr(postprocess, "_left_for_objects", lambda memory_gb: 1e-5)
    with pytest.raises(ContractError, match=r"crop\d+: nuc: the object of .* more memory \(--set-res"):
        run(tmp_path, index, split_nm={"nuc": 10.0})


def test_classes_open_as_an_ome_zarr_labels_group(tmp_path: Path) -> None:
    (record,) = run(tmp_path, predicted(tmp_path, {"pm": noise(1), "nuc": noise(2)}), min_size_nm3={"nuc": 1e5})[
        "records"
    ]
    store = zarr.open_group(str(tmp_path / "out" / record["path"]), mode="r")
    assert store.attrs["labels"] == ["pm", "nuc"] and sorted(store.group_keys()) == ["nuc", "pm"]
    image = dict(store["nuc"].attrs)
    (scales,) = image["multiscales"]
    assert [axis["name"] for axis in scales["axes"]] == ["z", "y", "x"]
    assert {axis["unit"] for axis in scales["axes"]} == {"nanometer"}
    (level,) = scales["datasets"]
    assert level["path"] == "s0"
    assert level["coordinateTransformations"] == [
        {"type": "scale", "scale": [8.0, 8.0, 8.0]},
        {"type": "translation", "translation": [104.0, 204.0, 304.0]},
    ]
    assert [entry["label-value"] for entry in image["image-label"]["colors"]] == list(
        range(1, record["objects"]["nuc"] + 1)
    )
    red, green, blue = (int(colour_of("pm")[i : i + 2], 16) for i in (1, 3, 5))
    assert store["pm"].attrs["image-label"]["colors"] == [{"label-value": 1, "rgba": [red, green, blue, 255]}]


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    output=st.sampled_from(["uint8", "float16"]),
    scale=st.sampled_from([0.5, 1.0, 2.2]),
    piece=st.sampled_from([1, 40_000, 1 << 28]),
    memory_gb=st.sampled_from([None, 0.00001]),
)
def test_pieces_and_memory_do_not_change_the_result(
    seed: int, output: str, scale: float, piece: int, memory_gb: float | None
) -> None:
    """Against the whole volume at once: resampled, thresholded, united, components of at least three voxels."""
    target = Lattice.covering(GRID.lower_nm, GRID.upper_nm, [8 * scale, 8 * scale, 8])
    rng = np.random.default_rng(seed)
    fields = {name: ndimage.gaussian_filter(rng.random(GRID.shape), 1.2) for name in ("pm", "ves_mem", "ves_lum")}
    arrays = {name: np.rint(255 * np.clip((field - 0.4) * 5, 0, 1)).astype(np.uint8) for name, field in fields.items()}
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("cellmap_pipe.prediction.postprocess.PIECE_BYTES", piece)
        patch.setattr("cellmap_pipe.prediction.postprocess.CHUNK", (16, 16, 16))
        patch.setattr("cellmap_pipe.prediction.masks.CHUNK", (16, 16, 16))
        index = predicted(Path(folder), arrays, target, output=output)
        size = 3 * math.prod(target.voxel_nm)
        (record,) = run(Path(folder), index, derive=["ves"], min_size_nm3={"ves": size}, memory_gb=memory_gb)["records"]
        pm, ves = (array_of(Path(folder), record, name)[:] for name in ("pm", "ves"))
    stored = {name: array / 255 for name, array in arrays.items()}
    if output == "float16":
        stored = {name: array.astype(np.float16).astype(np.float32) for name, array in stored.items()}
    on_target = {name: resample_mean(array.astype(np.float32) * 255, GRID, target) for name, array in stored.items()}
    np.testing.assert_array_equal(pm > 0, on_target["pm"] > 127.5)
    united = np.maximum(on_target["ves_mem"], on_target["ves_lum"]) > 127.5
    labels, _ = ndimage.label(united, np.ones((3, 3, 3)))
    kept = np.bincount(labels.ravel()) >= 3
    kept[0] = False
    np.testing.assert_array_equal(ves, np.where(kept, np.cumsum(kept), 0)[labels])


def test_a_volume_that_was_not_predicted_keeps_its_cause(tmp_path: Path) -> None:
    index = predicted(tmp_path, {"pm": noise(1)})
    listing = read_json(index)
    listing["records"][0] |= {"status": "not served", "cause": "served by grid 32nm", "path": None}
    write_json(index, listing)
    (record,) = run(tmp_path, index)["records"]
    assert (record["status"], record["cause"], record["path"]) == ("not served", "served by grid 32nm", None)
    assert record["classes"] == [] and record["target"] == GRID.to_dict()


def test_what_was_left_to_another_grid_is_carried_with_the_groups_that_lack_it(tmp_path: Path) -> None:
    index = predicted(tmp_path, {"pm": noise(1), "er_lum": noise(2), "ves": noise(3)})
    derive = ["er", "mito", "golgi", "ves"]
    (record,) = run(tmp_path, index, derive=derive)["records"]
    assert record["elsewhere"] == []  # a prediction of an earlier version does not say
    listing = read_json(index)
    listing["records"][0]["elsewhere"] = ["er_mem", "mito_mem", "ves_mem"]
    write_json(index, listing)
    (after,) = run(tmp_path, index, derive=derive)["records"]
    # er is formed without its membranes, mito not at all, and ves was predicted itself
    assert after == {**record, "elsewhere": ["er_mem", "mito_mem", "ves_mem", "er", "mito"]}


def test_what_is_done_is_not_done_again_unless_settings_change(tmp_path: Path) -> None:
    index = predicted(tmp_path, {"pm": noise(1)})
    (first,) = run(tmp_path, index)["records"]
    store = tmp_path / "out/test/x_crop1.zarr"
    made = store.stat().st_ino
    assert run(tmp_path, index)["records"] == [first]
    assert store.stat().st_ino == made
    (second,) = run(tmp_path, index, threshold=0.4)["records"]
    assert store.stat().st_ino != made and second["fingerprint"] != first["fingerprint"]
    np.testing.assert_array_equal(array_of(tmp_path, second, "pm")[:], noise(1) > 102)


def test_a_store_that_was_left_without_its_record_is_not_taken_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = predicted(tmp_path, {"pm": noise(1)})
    run(tmp_path, index)
    with monkeypatch.context() as killed:
        killed.setattr("cellmap_pipe.prediction.postprocess.write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, index, threshold=0.4)
    (record,) = run(tmp_path, index)["records"]
    np.testing.assert_array_equal(array_of(tmp_path, record, "pm")[:], noise(1) > 127)


def test_a_volume_predicted_by_two_models_is_refused(tmp_path: Path) -> None:
    first = predicted(tmp_path, {"pm": noise(1)})
    second = tmp_path / "shard1.json"
    write_json(second, {**read_json(first), "model": "other"})
    with pytest.raises(ContractError, match="x/crop1: predicted 2 times"):
        segment([first, second], tmp_path / "out.json", store_dir=tmp_path / "out", settings=SETTINGS, subset="test")


def test_a_damaged_volume_is_named_and_the_others_are_done(tmp_path: Path) -> None:
    index = predicted(tmp_path, {"pm": noise(1)})
    listing = read_json(index)
    listing["records"].insert(0, {**listing["records"][0], "name": "x/crop0", "path": "p/lost.zarr"})
    write_json(index, listing)
    with pytest.raises(ContractError, match=r"1 of 2 volumes failed: .*lost.zarr: cannot be opened .*-R predict"):
        run(tmp_path, index)
    assert sorted(path.name for path in (tmp_path / "out/test").iterdir()) == ["x_crop1.json", "x_crop1.zarr"]
    assert not (tmp_path / "out/test.json").exists()
