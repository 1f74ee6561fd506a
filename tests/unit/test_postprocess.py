"""From probabilities to masks and instances on the target voxels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from scipy import ndimage

from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import read_json, write_json
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prediction.postprocess import outputs_of, segment
from cellmap_pipe.prediction.store import create_probabilities

GRID = Lattice((8, 8, 8), (104, 204, 304), (40, 20, 20))


def predicted(folder: Path, arrays: dict[str, np.ndarray], target: Lattice = GRID, lattice: Lattice = GRID) -> Path:
    """A prediction of one volume with an array (z, y, x) by class."""
    create_probabilities(folder / "p/x_crop1.zarr", "x/crop1", lattice, list(arrays), {})[:] = np.stack(
        list(arrays.values())
    )
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


def run(folder: Path, index: Path, **more: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"thresholds": {"default": 0.5}, "min_size_nm3": {}, "derive": [], "subset": "test"}
    segment([index], folder / "out/test.json", store_dir=folder / "out/test", **{**arguments, **more})
    return dict(read_json(folder / "out/test.json"))


def array_of(folder: Path, record: dict[str, Any], name: str) -> "zarr.Array[Any]":
    return zarr.open_array(str(folder / "out" / record["path"] / name), mode="r")


def noise(seed: int, shape: tuple[int, ...] = GRID.shape) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_masks_are_probabilities_above_the_threshold(tmp_path: Path) -> None:
    p = noise(1)
    p[0, 0, :4] = [127, 128, 76, 77]
    result = run(tmp_path, predicted(tmp_path, {"pm": p, "er_mem": p}), thresholds={"default": 0.5, "er_mem": 0.3})
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
    (record,) = run(tmp_path, predicted(tmp_path, arrays), derive=["mito", "er"])["records"]
    assert record["classes"] == [*arrays, "mito"]
    union = np.any([arrays[name] >= 128 for name in ("mito_mem", "mito_lum", "mito_ribo")], axis=0)
    np.testing.assert_array_equal(array_of(tmp_path, record, "mito")[:] > 0, union)
    assert record["objects"].keys() == {"mito"}
    assert "er_mem, er_lum" in record["not_derived"]["er"]


def test_a_predicted_group_is_not_derived() -> None:
    parts, impossible = outputs_of(["mito", "mito_mem", "mito_lum", "mito_ribo"], ["mito", "golgi"])
    assert parts["mito"] == ["mito"]
    assert "(none)" in impossible["golgi"]


def test_a_volume_that_was_not_predicted_keeps_its_cause(tmp_path: Path) -> None:
    index = predicted(tmp_path, {"pm": noise(1)})
    listing = read_json(index)
    listing["records"][0] |= {"status": "not served", "cause": "served by grid 32nm", "path": None}
    write_json(index, listing)
    (record,) = run(tmp_path, index)["records"]
    assert (record["status"], record["cause"], record["path"]) == ("not served", "served by grid 32nm", None)
    assert record["classes"] == [] and record["target"] == GRID.to_dict()


def test_what_is_done_is_not_done_again_unless_settings_change(tmp_path: Path) -> None:
    index = predicted(tmp_path, {"pm": noise(1)})
    (first,) = run(tmp_path, index)["records"]
    store = tmp_path / "out/test/x_crop1.zarr"
    made = store.stat().st_ino
    assert run(tmp_path, index)["records"] == [first]
    assert store.stat().st_ino == made
    (second,) = run(tmp_path, index, thresholds={"default": 0.4})["records"]
    assert store.stat().st_ino != made and second["fingerprint"] != first["fingerprint"]
    np.testing.assert_array_equal(array_of(tmp_path, second, "pm")[:], noise(1) > 102)


def test_a_volume_predicted_twice_is_refused(tmp_path: Path) -> None:
    index = predicted(tmp_path, {"pm": noise(1)})
    with pytest.raises(ContractError, match="x/crop1: predicted 2 times"):
        segment(
            [index, index],
            tmp_path / "out.json",
            store_dir=tmp_path / "out",
            thresholds={"default": 0.5},
            min_size_nm3={},
            derive=[],
            subset="test",
        )
