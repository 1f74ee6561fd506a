"""The ensemble: a weighted mean over what each model predicted, on one lattice, done once."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.errors import ConfigError, ContractError
from cellmap_pipe.files import read_json, write_json
from cellmap_pipe.geometry import Lattice, Shape3
from cellmap_pipe.prediction.ensemble import pieces, read_records, write_ensemble
from cellmap_pipe.prediction.store import create_probabilities, file_stem
from cellmap_pipe.prepare.resample import resample_mean

LATTICE = Lattice((8, 8, 8), (4, 4, 4), (70, 10, 12))


def predicted(
    folder: Path,
    model: str,
    arrays: dict[str, np.ndarray | None],
    classes: list[str],
    lattice: Lattice = LATTICE,
    *,
    target: Lattice | None = None,
    output: str = "uint8",
    shard: int = 0,
) -> Path:
    """A prediction of `model`: an array (c, z, y, x) of 255 p by volume, None for one that it does not serve."""
    records: list[dict[str, Any]] = []
    for name, array in arrays.items():
        record = {
            "name": name,
            "dataset": name.split("/")[0],
            "path": None,
            "lattice": lattice.to_dict(),
            "target": (target or lattice).to_dict(),
            "classes": classes,
            "shape": None,
            "fingerprint": None,
            "status": "not served",
            "cause": "served by grid 32nm",
        }
        if array is not None:
            path = folder / model / "volumes" / f"{file_stem(name)}.zarr"
            values = array if output == "uint8" else (array / 255).astype(np.float16)
            create_probabilities(path, name, lattice, classes, {}, output=output)[:] = values
            fingerprint = f"{model}{int(array.sum())}"
            record |= {"path": f"volumes/{path.name}", "status": "ok", "cause": "", "fingerprint": fingerprint}
        records.append(record)
    index = folder / model / f"shard{shard}.json"
    write_json(
        index, {"model": model, "fold": "0", "subset": "validation", "records": records, "weights_sha256": model}
    )
    return index


def noise(channels: int, seed: int, lattice: Lattice = LATTICE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (channels, *lattice.shape), dtype=np.uint8)


def run(tmp_path: Path, indices: list[Path], workers: int = 1, **policy: Any) -> dict[str, Any]:
    out = tmp_path / "ensemble/fold0.json"
    write_ensemble(indices, out, store_dir=tmp_path / "ensemble/volumes", workers=workers, **policy)
    return dict(read_json(out))


def scored(folder: Path, model: str, iou: dict[tuple[str, str], float], fold: int = 0) -> Path:
    """Scores of `model` by crop and class, of 100 voxels each."""
    records = [
        {"crop": crop, "label": label, "status": "scored", "tp": round(100 * v), "fp": 0, "fn": round(100 * (1 - v))}
        for (crop, label), v in iou.items()
    ]
    path = folder / f"scores/{model}/fold{fold}.json"
    write_json(path, {"model": model, "fold": str(fold), "records": records})
    return path


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


def test_what_models_leave_to_another_grid_is_not_left_by_their_ensemble(tmp_path: Path) -> None:
    index = predicted(tmp_path, "a", {"x/crop1": noise(1, 1), "x/crop2": None}, ["pm"])
    listing = dict(read_json(index))
    listing["records"] = [{**record, "elsewhere": ["nuc"]} for record in listing["records"]]
    write_json(index, listing)
    assert all("elsewhere" not in record for record in run(tmp_path, [index])["records"])


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


def test_a_store_that_was_left_without_its_record_is_not_taken_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (predicted(tmp_path, model, {"x/crop1": noise(1, seed)}, ["pm"]) for seed, model in enumerate("ab"))
    run(tmp_path, [a])
    with monkeypatch.context() as killed:
        killed.setattr("cellmap_pipe.prediction.ensemble.write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, [b])
    (record,) = run(tmp_path, [a])["records"]
    np.testing.assert_array_equal(array_of(tmp_path, record), noise(1, 0))


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


def test_shards_of_one_prediction_name_a_volume_once(tmp_path: Path) -> None:
    index = predicted(tmp_path, "a", {"x/crop1": noise(1, 1), "x/crop2": None}, ["pm"])
    listing = {**read_json(index), "shards": 2}
    write_json(index, {**listing, "shard": 0})
    listing["shard"] = 1
    second = tmp_path / "a/shard1.json"
    # of another version, which says what is left to other grids: nothing
    write_json(second, {**listing, "records": [{**listing["records"][0], "elsewhere": []}]})
    records = read_records([index, second])
    assert {name: [record["status"] for record in found] for name, found in records.items()} == {
        "x/crop1": ["ok"],
        "x/crop2": ["not served"],
    }
    (record,) = records["x/crop1"]
    assert Path(record["path"]) == tmp_path / "a/volumes/x_crop1.zarr"
    other = [{**listing["records"][0], "fingerprint": "of other weights"}]
    write_json(second, {**listing, "records": other})
    with pytest.raises(ContractError, match=r"shard1.json: says another fingerprint of x/crop1 .*model a.*-R predict"):
        read_records([index, second])
    write_json(second, {**listing, "model": "b", "shard": 0, "shards": 1, "records": other})
    with pytest.raises(ContractError, match=r"model a, fold 0: its shards are 0 of 2: not one prediction.*-R predict"):
        read_records([index, second])
    write_json(index, {**listing, "shard": 0, "shards": 1})
    assert [record["model"] for record in read_records([index, second])["x/crop1"]] == ["a", "b"]


def test_models_are_weighted_by_their_validation_scores_of_the_class(tmp_path: Path) -> None:
    a, b = noise(2, 1), noise(2, 2)
    indices = [
        predicted(tmp_path, "a", {"x/crop9": a}, ["pm", "nuc"]),
        predicted(tmp_path, "b", {"x/crop9": b}, ["pm", "nuc"]),
    ]
    scores = [
        scored(tmp_path, "a", {("x/crop1", "pm"): 0.2, ("x/crop2", "nuc"): 0.5}),
        scored(tmp_path, "a", {("x/crop3", "pm"): 0.4}, fold=1),
        scored(tmp_path, "b", {("x/crop1", "pm"): 0.8, ("x/crop2", "nuc"): 0.0, ("x/crop4", "nuc"): 1.0}),
        scored(tmp_path, "b", {("x/crop3", "pm"): 1.0}, fold=1),
    ]
    (record,) = run(tmp_path, indices, policy="weighted", scores=scores)["records"]
    # nuc: crop4 tells nothing, a was not scored on it
    assert record["weights"] == {"pm": {"a/fold0": 0.3, "b/fold0": 0.9}, "nuc": {"a/fold0": 0.5}}
    mean = array_of(tmp_path, record).astype(float)
    assert np.abs(mean[0] - (0.3 * a[0].astype(float) + 0.9 * b[0]) / 1.2).max() <= 0.5001
    np.testing.assert_array_equal(mean[1], a[1])
    (other,) = run(tmp_path, indices, policy="best", scores=scores)["records"]
    assert other["weights"] == {"pm": {"b/fold0": 1.0}, "nuc": {"a/fold0": 1.0}}
    assert other["fingerprint"] != record["fingerprint"]
    np.testing.assert_array_equal(array_of(tmp_path, other), [b[0], a[1]])


def test_the_best_models_count_with_all_their_folds(tmp_path: Path) -> None:
    indices = []
    for model, value in (("a", 10), ("b", 60), ("c", 90)):
        for fold in ("0", "1"):
            array = np.full((1, *LATTICE.shape), value + int(fold), np.uint8)
            index = predicted(tmp_path, f"{model}{fold}", {"x/crop9": array}, ["pm"])
            write_json(index, {**read_json(index), "model": model, "fold": fold})
            indices.append(index)
    iou = {"a": 0.5, "b": 0.1, "c": 0.7}
    scores = [scored(tmp_path, model, {("x/crop1", "pm"): value}) for model, value in iou.items()]
    (record,) = run(tmp_path, indices, policy="best_n", n=2, scores=scores)["records"]
    assert list(record["weights"]["pm"]) == ["a/fold0", "a/fold1", "c/fold0", "c/fold1"]
    assert np.unique(array_of(tmp_path, record)).tolist() in ([50], [51])  # 50.5
    with pytest.raises(ConfigError, match=r"ensemble.policy 'best_two' is unknown; use one of mean, weighted"):
        run(tmp_path, indices, policy="best_two", scores=scores)


def test_a_validation_crop_does_not_weigh_the_models_that_predict_it(tmp_path: Path) -> None:
    """Whatever a crop's own scores are, its weights are the same."""
    a, b = noise(1, 1), noise(1, 2)
    indices = [predicted(tmp_path, "a", {"x/crop1": a}, ["pm"]), predicted(tmp_path, "b", {"x/crop1": b}, ["pm"])]
    weights = []
    for own in (0.0, 1.0):
        scores = [
            scored(tmp_path, "a", {("x/crop1", "pm"): own, ("x/crop2", "pm"): 0.6}),
            scored(tmp_path, "b", {("x/crop1", "pm"): 1 - own, ("x/crop2", "pm"): 0.3}),
        ]
        (record,) = run(tmp_path, indices, policy="weighted", scores=scores)["records"]
        weights.append(record["weights"])
    assert weights[0] == weights[1] == {"pm": {"a/fold0": 0.6, "b/fold0": 0.3}}


@pytest.mark.parametrize("policy", ["weighted", "best_n", "best"])
def test_a_class_that_no_score_tells_of_is_the_plain_mean(
    tmp_path: Path, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = noise(3, 1), noise(3, 2)
    classes = ["pm", "nuc", "ecs"]
    indices = [predicted(tmp_path, "a", {"x/crop1": a}, classes), predicted(tmp_path, "b", {"x/crop1": b}, classes)]
    failed = {"crop": "x/crop2", "label": "ecs", "status": "failed", "cause": "lost"}
    scores = [
        scored(tmp_path, "a", {("x/crop2", "nuc"): 0.0, ("x/crop1", "pm"): 0.9, ("x/crop2", "ecs"): 0.7}),
        scored(tmp_path, "b", {("x/crop2", "nuc"): 0.0, ("x/crop1", "pm"): 0.1}),
    ]
    write_json(scores[1], {**(content := read_json(scores[1])), "records": [*content["records"], failed]})
    (record,) = run(tmp_path, indices, policy=policy, n=1, scores=scores)["records"]
    assert record["unweighted"] == classes
    assert np.abs(array_of(tmp_path, record) - (a.astype(float) + b) / 2).max() <= 0.5
    assert "pm: the plain mean in 1 of 1 volumes" in caplog.text


def test_the_result_lies_on_the_lattice_nearest_the_target(tmp_path: Path) -> None:
    grids = {voxel: Lattice.covering(LATTICE.lower_nm, LATTICE.upper_nm, (voxel,) * 3) for voxel in (4, 8, 16)}
    flat = {voxel: np.full((1, *lattice.shape), voxel, np.uint8) for voxel, lattice in grids.items()}
    indices = [
        predicted(tmp_path, f"m{voxel}", {"x/crop1": flat[voxel]}, ["pm"], lattice, target=grids[16])
        for voxel, lattice in grids.items()
    ]
    (record,) = run(tmp_path, indices)["records"]
    assert Lattice.from_dict(record["lattice"]) == grids[16]
    assert np.unique(array_of(tmp_path, record)).tolist() == [9]  # 28 / 3
    (record,) = run(tmp_path, indices[:2])["records"]
    assert Lattice.from_dict(record["lattice"]) == grids[8] and record["members"] == 2


@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3), chunk=st.tuples(*[st.integers(1, 16)] * 3), voxels=st.integers(1, 20000)
)
def test_pieces_cover_each_voxel_once_at_chunk_borders(shape: Shape3, chunk: Shape3, voxels: int) -> None:
    seen = np.zeros(shape, int)
    for lower, upper in pieces(shape, chunk, voxels):
        seen[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))] += 1
        assert all(a % c == 0 for a, c in zip(lower, chunk, strict=True))
        assert all(b % c == 0 or b == n for b, c, n in zip(upper, chunk, shape, strict=True))
        assert math.prod(b - a for a, b in zip(lower, upper, strict=True)) <= max(voxels, math.prod(chunk))
    assert (seen == 1).all()


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    outputs=st.lists(st.sampled_from(["uint8", "float16"]), min_size=1, max_size=3),
    voxels=st.sampled_from([1, 5000, 1 << 24]),
)
def test_pieces_of_members_add_up_to_the_mean_of_the_whole(seed: int, outputs: list[str], voxels: int) -> None:
    """Against a float64 mean of whole members, each on a lattice of its own."""
    rng = np.random.default_rng(seed)
    target = Lattice((8, 8, 8), (4, 4, 4), (33, 20, 40))
    indices, expected = [], np.zeros(target.shape)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("cellmap_pipe.prediction.ensemble.PIECE_VOXELS", voxels)
        patch.setattr("cellmap_pipe.prediction.store.CHUNK", (16, 16, 16))
        for i, output in enumerate(outputs):
            size = (8.0, 8.0 if i == 0 else rng.choice([4.0, 8.0, 17.0]), 8.0)
            lattice = Lattice.covering(target.lower_nm, target.upper_nm, size)
            array = noise(1, seed + i, lattice)
            indices.append(
                predicted(Path(folder), f"m{i}", {"x/crop1": array}, ["pm"], lattice, target=target, output=output)
            )
            expected += resample_mean(array[0], lattice, target)
        (record,) = run(Path(folder), indices)["records"]
        found = array_of(Path(folder), record)[0].astype(float)
    assert record["output"] == ("float16" if "float16" in outputs else "uint8")
    tolerance = 0.501
    if record["output"] == "float16":
        found, tolerance = found * 255, 255 * 2**-10
    assert np.abs(found - expected / len(outputs)).max() <= tolerance
