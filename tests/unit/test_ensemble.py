"""The ensemble: a mean over what each model predicted, on one lattice, done once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import read_json, write_json
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prediction.ensemble import write_ensemble
from cellmap_pipe.prediction.store import create_probabilities, file_stem

LATTICE = Lattice((8, 8, 8), (4, 4, 4), (70, 10, 12))


def predicted(
    folder: Path, model: str, arrays: dict[str, np.ndarray | None], classes: list[str], lattice: Lattice = LATTICE
) -> Path:
    """A prediction of `model`: an array (c, z, y, x) by volume, None for one that it does not serve."""
    records: list[dict[str, Any]] = []
    for name, array in arrays.items():
        record = {
            "name": name,
            "dataset": name.split("/")[0],
            "path": None,
            "lattice": lattice.to_dict(),
            "target": lattice.to_dict(),
            "classes": classes,
            "shape": None,
            "fingerprint": None,
            "status": "not served",
            "cause": "served by grid 32nm",
        }
        if array is not None:
            path = folder / model / "volumes" / f"{file_stem(name)}.zarr"
            create_probabilities(path, name, lattice, classes, {})[:] = array
            fingerprint = f"{model}{int(array.sum())}"
            record |= {"path": f"volumes/{path.name}", "status": "ok", "cause": "", "fingerprint": fingerprint}
        records.append(record)
    index = folder / model / "shard0.json"
    write_json(
        index, {"model": model, "fold": "0", "subset": "validation", "records": records, "weights_sha256": model}
    )
    return index


def noise(channels: int, seed: int, lattice: Lattice = LATTICE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (channels, *lattice.shape), dtype=np.uint8)


def run(tmp_path: Path, indices: list[Path], workers: int = 1) -> dict[str, Any]:
    out = tmp_path / "ensemble/fold0.json"
    write_ensemble(indices, out, store_dir=tmp_path / "ensemble/volumes", workers=workers)
    return dict(read_json(out))


def array_of(tmp_path: Path, record: dict[str, Any]) -> np.ndarray:
    return np.asarray(zarr.open_array(str(tmp_path / "ensemble" / record["path"] / "s0"), mode="r")[:])


def test_mean_of_the_models_that_predicted_a_class(tmp_path: Path) -> None:
    a, b, c = noise(2, 1), noise(2, 2), noise(1, 3)
    indices = [
        predicted(tmp_path, "a", {"x/crop1": a, "x/crop2": a}, ["pm", "nuc"]),
        predicted(tmp_path, "b", {"x/crop1": b, "x/crop2": None}, ["pm", "nuc"]),
        predicted(tmp_path, "c", {"x/crop1": c, "x/crop2": None}, ["nuc"]),
    ]
    result = run(tmp_path, indices, workers=2)
    assert (result["model"], result["fold"], result["subset"]) == ("ensemble", "0", "validation")
    assert result["members"] == ["a/fold0", "b/fold0", "c/fold0"]
    first, second = result["records"]
    assert first["classes"] == ["pm", "nuc"] and first["members"] == 3
    mean = array_of(tmp_path, first).astype(float)
    assert np.abs(mean[0] - (a[0].astype(float) + b[0]) / 2).max() <= 0.5
    assert np.abs(mean[1] - (a[1].astype(float) + b[1] + c[0]) / 3).max() <= 0.5001
    np.testing.assert_array_equal(array_of(tmp_path, second), a)


def test_members_on_another_lattice_are_resampled(tmp_path: Path) -> None:
    coarse = Lattice((16, 16, 16), (8, 8, 8), (35, 5, 6))
    ramp = np.indices(coarse.shape)[0].astype(np.uint8)[None] * 4
    flat = np.zeros((1, *LATTICE.shape), np.uint8)
    indices = [
        predicted(tmp_path, "a", {"x/crop1": flat}, ["pm"]),
        predicted(tmp_path, "b", {"x/crop1": ramp}, ["pm"], coarse),
    ]
    (record,) = run(tmp_path, indices)["records"]
    assert Lattice.from_dict(record["lattice"]) == LATTICE
    found = array_of(tmp_path, record)[0, :, 0, 0].astype(float)
    world = LATTICE.translation_nm[0] + 8 * np.arange(70)
    expected = np.clip((world - 8) / 16, 0, 34) * 4 / 2
    assert np.abs(found - expected).max() <= 0.5001


def test_a_volume_that_no_model_predicted_keeps_its_cause(tmp_path: Path) -> None:
    (record,) = run(tmp_path, [predicted(tmp_path, "a", {"x/crop1": None}, ["pm"])])["records"]
    assert (record["status"], record["cause"], record["path"]) == ("not served", "served by grid 32nm", None)


def test_what_is_done_is_not_done_again_and_what_is_unlisted_goes(tmp_path: Path) -> None:
    index = predicted(tmp_path, "a", {"x/crop1": noise(1, 1), "x/crop2": noise(1, 2)}, ["pm"])
    run(tmp_path, [index])
    store = tmp_path / "ensemble/volumes/x_crop1.zarr"
    before = store.stat().st_ino
    (tmp_path / "ensemble/volumes/.partial-abandoned").mkdir()
    run(tmp_path, [index])
    assert store.stat().st_ino == before
    assert not (tmp_path / "ensemble/volumes/.partial-abandoned").exists()
    (tmp_path / "a/volumes/x_crop1.zarr").rename(tmp_path / "kept")
    index = predicted(tmp_path, "a", {"x/crop1": noise(1, 3)}, ["pm"])
    (record,) = run(tmp_path, [index])["records"]
    assert store.stat().st_ino != before
    np.testing.assert_array_equal(array_of(tmp_path, record), noise(1, 3))
    assert sorted(path.name for path in store.parent.iterdir()) == ["x_crop1.json", "x_crop1.zarr"]


def test_damaged_predictions_are_named(tmp_path: Path) -> None:
    index = predicted(tmp_path, "a", {"x/crop1": noise(1, 1)}, ["pm"])
    chunk = next(path for path in (tmp_path / "a/volumes/x_crop1.zarr/s0/0").rglob("*") if path.is_file())
    chunk.write_bytes(b"damaged")
    with pytest.raises(ContractError, match=r"x_crop1.zarr: damaged .*-R predict"):
        run(tmp_path, [index])
    assert not (tmp_path / "ensemble/volumes/x_crop1.zarr").exists()
    (tmp_path / "a/volumes/x_crop1.zarr/s0/.zarray").unlink()
    with pytest.raises(ContractError, match=r"x_crop1.zarr: cannot be opened .*-R predict"):
        run(tmp_path, [index])
    index.write_text("{")
    with pytest.raises(ContractError, match=r"shard0.json: cannot be read .*-R predict"):
        run(tmp_path, [index])
