"""The predict job: geometry of what it writes, records, resuming, and volumes that fail."""

import errno
import json
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellmap_pipe.colours import colour_of
from cellmap_pipe.errors import CellmapError, ConfigError, ContractError
from cellmap_pipe.files import read_json
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.intensity import intensity_range, lookup_table
from cellmap_pipe.prediction import predict, store
from cellmap_pipe.prediction.sliding_window import PredictionError
from cellmap_pipe.prediction.volumes import EMVolume, grid_lattice
from cellmap_pipe.training.inference import FORMAT
from cellmap_pipe.training.networks import build_network

CLASSES = ["ecs", "mito_mem", "mito_lum"]
SETTINGS = {
    "overlap": 0.5,
    "blending": "gaussian",
    "batch": 2,
    "memory_gb": None,
    "max_oversampling": 8,
    "allow_oversampling": False,
    "max_upsample": 4,
    "tta": 1,
    "planes": "all",
    "output": "uint8",
}
VOXEL = (8.0, 8.0, 8.0)
SERVED = {"8nm": {"voxel_nm": VOXEL, "classes": CLASSES}}


class Net(torch.nn.Module):
    """Per voxel: intensity, its complement, a half; raises or gives NaN from a given window on."""

    def __init__(self, nan_at: int | None = None, stop_at: int | None = None) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.windows, self.nan_at, self.stop_at = 0, nan_at, stop_at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.windows += len(x)
        if self.stop_at is not None and self.windows >= self.stop_at:
            raise KeyboardInterrupt
        p = x.clamp(1e-4, 1 - 1e-4)
        logits = torch.logit(torch.cat([p, 1 - p, torch.full_like(p, 0.5)], 1)) * self.scale
        return logits if self.nan_at is None or self.windows < self.nan_at else logits * math.nan


Writer = Callable[..., Path]
CHUNKS = (32, 32, 32)


def ramp(shape: tuple[int, ...]) -> np.ndarray:
    """Painted coordinates: the intensity tells where a voxel lies."""
    z, y, x = np.indices(shape)
    return ((z * 2 + y * 3 + x) % 251 + 2).astype(np.uint8)


@pytest.fixture
def root(tmp_path: Path, ngff: Writer) -> Path:
    ngff(tmp_path / "data/jrc_a/jrc_a.zarr/em", ramp((150, 40, 40)), VOXEL, (4, 4, 4), chunks=CHUNKS)
    return tmp_path


def volume(name: str = "jrc_a/crop1", shape: tuple[int, ...] = (130, 24, 24), **more: Any) -> dict[str, Any]:
    dataset = name.split("/")[0]
    target = Lattice(VOXEL, (4 + 80, 4 + 64, 4 + 64), (shape[0], shape[1], shape[2]))
    return {
        "name": name,
        "dataset": dataset,
        "em": f"{dataset}/{dataset}.zarr/em",
        "lattice": target.to_dict(),
        "target": target.to_dict(),
        "classes": None,
        **more,
    }


def run(root: Path, network: Net, volumes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    trained = SimpleNamespace(
        network=network,
        classes=CLASSES,
        grid="8nm",
        voxel_nm=VOXEL,
        patch=more.pop("patch", (32, 16, 16)),
        normalisation={"jrc_a": [0.0, 255.0]},
        digest=more.pop("weights", "w1"),
        contents={"settings": {"normalisation": more.pop("normalisation", "percentile")}},
    )
    monkeypatch.setattr(predict, "load_model", lambda path, device: trained)
    arguments: dict[str, Any] = {
        "data_root": root / "data",
        "shard": 0,
        "shards": 1,
        "store_dir": root / "out/volumes",
        "settings": SETTINGS,
        "served": SERVED,
        "model": "m",
        "fold": 0,
        "subset": "test",
        "device": "cpu",
    } | more
    out_json = root / "out" / f"shard{arguments['shard']}.json"
    predict.predict_shard(root / "model.pt", volumes, out_json, **arguments)
    return read_json(out_json)


def array_of(root: Path, record: dict[str, Any]) -> np.ndarray:
    return np.asarray(zarr.open_array(str(root / "out" / record["path"] / "s0"), mode="r")[:])


def store_of(root: Path, record: dict[str, Any]) -> Path:
    return Path(root / "out" / record["path"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_probabilities_lie_where_the_em_does(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(root, Net(), [volume()], monkeypatch)
    (record,) = result["records"]
    assert (record["status"], record["cause"], record["shape"]) == ("ok", "", [3, 130, 24, 24])
    expected = ramp((150, 40, 40))[10:140, 8:32, 8:32].astype(int)
    found = array_of(root, record).astype(int)
    assert np.abs(found[0] - expected).max() <= 1
    assert np.abs(found[1] - (255 - expected)).max() <= 1
    assert np.abs(found[2] - 128).max() <= 1
    assert {key: result[key] for key in ("model", "fold", "subset", "weights_sha256")} == {
        "model": "m",
        "fold": "0",
        "subset": "test",
        "weights_sha256": "w1",
    }


def test_store_is_ome_zarr_with_true_scale_translation_names_and_colours(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = run(root, Net(), [volume()], monkeypatch)["records"]
    path = store_of(root, record)
    attributes = json.loads((path / ".zattrs").read_text())
    (multiscale,) = attributes["multiscales"]
    assert multiscale["version"] == "0.4"
    assert [axis["name"] for axis in multiscale["axes"]] == ["c", "z", "y", "x"]
    assert [axis["type"] for axis in multiscale["axes"]] == ["channel", "space", "space", "space"]
    assert all(axis["unit"] == "nanometer" for axis in multiscale["axes"][1:])
    (dataset,) = multiscale["datasets"]
    assert dataset == {
        "path": "s0",
        "coordinateTransformations": [
            {"type": "scale", "scale": [1, 8, 8, 8]},
            {"type": "translation", "translation": [0, 84, 68, 68]},
        ],
    }
    channels = attributes["omero"]["channels"]
    assert [channel["label"] for channel in channels] == CLASSES
    assert ["#" + channel["color"] for channel in channels] == [colour_of(name) for name in CLASSES]
    layout = json.loads((path / "s0/.zarray").read_text())
    assert (layout["zarr_format"], layout["dimension_separator"], layout["dtype"]) == (2, "/", "|u1")


def test_a_killed_job_goes_on_and_gives_the_same_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes = [volume(), volume("jrc_a/crop2", (140, 24, 24))]
    whole = Net()
    reference = run(root, whole, volumes, monkeypatch, store_dir=root / "ref/volumes")
    (root / "out/shard0.json").unlink()
    windows = 0
    for stop in (3, 40, 70, 1000):
        network = Net(stop_at=stop)
        try:
            result = run(root, network, volumes, monkeypatch)
        except KeyboardInterrupt:
            assert not (root / "out/shard0.json").exists()
        windows += network.windows
    assert contents(root / "out/volumes") == contents(root / "ref/volumes")
    assert [r["fingerprint"] for r in result["records"]] == [r["fingerprint"] for r in reference["records"]]
    # each interruption repeats at most the rows of windows that reach into the unfinished block
    assert windows <= whole.windows + 3 * 3 * 4 * 9
    again = Net()
    run(root, again, volumes, monkeypatch)
    assert again.windows == 0


def test_what_a_killed_writer_leaves_is_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = run(root, Net(), [volume()], monkeypatch)["records"]
    before = contents(root / "out/volumes")
    path = store_of(root, record)
    (path / "s0/0/0/0/0.1234.partial").write_bytes(b"half a chunk")
    (path.with_suffix(".blocks") / ".partial-1234-0_0_0.json").write_text("{")
    (path.parent / f".partial-1234-{path.name}").mkdir()
    run(root, Net(), [volume()], monkeypatch)
    assert contents(root / "out/volumes") == before
    assert not (path.parent / f".partial-1234-{path.name}").exists()


def test_what_another_job_is_writing_is_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = run(root, Net(), [volume()], monkeypatch)["records"]
    path = store_of(root, record)
    partials = [path / "s0/0/2/0/0.1234.partial", path.with_suffix(".blocks") / ".partial-1234-128_0_0.json"]
    survey = path.parent / ".partial-1234-jrc_a_crop2.survey.json"
    survey.write_text("half")
    for partial in partials:
        partial.write_bytes(b"half")
    run(root, Net(), [volume()], monkeypatch, shard=0, shards=3)
    assert all(partial.exists() for partial in [*partials, survey])
    run(root, Net(), [volume()], monkeypatch, shard=2, shards=3)
    assert not any(partial.exists() for partial in partials)


def test_a_damaged_record_or_another_fingerprint_is_redone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = run(root, Net(), [volume()], monkeypatch)["records"]
    first = contents(root / "out/volumes")
    blocks = sorted(store_of(root, record).with_suffix(".blocks").iterdir())
    assert [path.name for path in blocks] == ["0_0_0.json", "128_0_0.json", "64_0_0.json"]
    blocks[0].write_text("{")
    network = Net()
    run(root, network, [volume()], monkeypatch)
    assert network.windows > 0
    assert contents(root / "out/volumes") == first
    neutral = Net()
    run(root, neutral, [volume()], monkeypatch, settings={**SETTINGS, "max_oversampling": 3, "planes": "z"})
    assert neutral.windows == 0
    for change in (
        {"weights": "w2"},
        {"settings": {**SETTINGS, "overlap": 0.25}},
        {"settings": {**SETTINGS, "revision": 1}},
        {"settings": {**SETTINGS, "tta": 4}},
        {"settings": {**SETTINGS, "output": "float16"}},
        {"settings": {**SETTINGS, "output": "mask", "thresholds": {"default": 0.5}}},
        {"settings": {**SETTINGS, "output": "mask", "thresholds": {"default": 0.5, "ecs": 0.25}}},
    ):
        network = Net()
        (other,) = run(root, network, [volume()], monkeypatch, **change)["records"]
        assert network.windows > 0 and other["fingerprint"] != record["fingerprint"]
        # the stores of earlier weights and settings are gone
        assert [path.name for path in (root / "out/volumes").glob("*.zarr")] == [store_of(root, other).name]
        assert len(list((root / "out/volumes").glob("*.blocks"))) == 1


def test_a_store_that_was_damaged_is_made_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = run(root, Net(), [volume()], monkeypatch)["records"]
    before = contents(root / "out/volumes")
    (store_of(root, record) / "s0/.zarray").write_text("{")
    network = Net()
    run(root, network, [volume()], monkeypatch)
    assert network.windows > 0 and contents(root / "out/volumes") == before


@pytest.mark.parametrize("lost", [".", "s0/0", "s0/1/1/0/0"])
def test_blocks_whose_chunks_are_gone_are_redone(root: Path, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    (record,) = run(root, Net(), [volume()], monkeypatch)["records"]
    before = contents(root / "out/volumes")
    path = store_of(root, record) / lost
    shutil.rmtree(path) if path.is_dir() else path.write_bytes(b"")
    network = Net()
    run(root, network, [volume()], monkeypatch)
    assert network.windows > 0 and contents(root / "out/volumes") == before


def test_a_store_that_cannot_be_read_just_now_is_not_thrown_away(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(root, Net(), [volume()], monkeypatch)
    before = contents(root / "out/volumes")

    def stale(path: Path, *arguments: Any, **more: Any) -> str:
        if path.name == ".zattrs" and "out" in path.parts:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path, *arguments, **more)

    with monkeypatch.context() as patch:
        read = Path.read_text
        patch.setattr(Path, "read_text", stale)
        with pytest.raises(PredictionError, match=r"Stale file handle.*\.zattrs"):
            run(root, Net(), [volume()], patch)
    assert contents(root / "out/volumes") == before


def test_outputs_are_what_the_settings_say(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine, masks = (
        run(
            root, Net(), [volume()], monkeypatch, settings={**SETTINGS, **more}, store_dir=root / "out" / more["output"]
        )
        for more in (
            {"output": "float16"},
            {"output": "mask", "thresholds": {"default": 0.6, "mito_mem": 0.3}},
        )
    )
    (fine,), (masks,) = fine["records"], masks["records"]
    expected = ramp((150, 40, 40))[10:140, 8:32, 8:32] / 255
    assert (fine["output"], masks["output"]) == ("float16", "mask")
    found = array_of(root, fine)
    assert found.dtype == np.float16 and np.abs(found[0] - expected).max() < 1e-3
    shown = json.loads((store_of(root, fine) / ".zattrs").read_text())["omero"]["channels"][0]["window"]
    assert shown["end"] == 1
    found = array_of(root, masks)
    assert found.dtype == np.uint8
    clear = np.abs(np.stack([expected - 0.6, 1 - expected - 0.3])) > 1e-3
    np.testing.assert_array_equal(found[0][clear[0]], np.where(expected > 0.6, 255, 0)[clear[0]])
    np.testing.assert_array_equal(found[1][clear[1]], np.where(1 - expected > 0.3, 255, 0)[clear[1]])


def test_blocks_of_another_arithmetic_are_redone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = run(root, Net(), [volume()], monkeypatch)["records"]
    monkeypatch.setattr(predict, "arithmetic", lambda trained, device: "bf16")
    monkeypatch.setattr(predict, "mixed_precision", lambda trained, device: trained.network)
    network = Net()
    (other,) = run(root, network, [volume()], monkeypatch)["records"]
    assert network.windows > 0 and other["fingerprint"] != first["fingerprint"]


def test_arithmetic_is_bf16_only_on_a_gpu_for_a_network_trained_so() -> None:
    def arithmetic(amp: str, device: str) -> str:
        trained: Any = SimpleNamespace(contents={"settings": {"amp": amp}})
        return predict.arithmetic(trained, torch.device(device))

    assert arithmetic("bf16", "cuda") == "bf16"
    assert arithmetic("bf16", "cpu") == arithmetic("none", "cpu") == "float32"
    assert arithmetic("none", "cuda") == "float32 on a GPU"


def test_changed_em_is_predicted_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(root, Net(), [volume()], monkeypatch)
    zarr.open_array(str(root / "data/jrc_a/jrc_a.zarr/em/s0"), mode="r+")[20, 20, 20] = 0
    network = Net()
    run(root, network, [volume()], monkeypatch)
    assert network.windows > 0


def test_memory_limit_changes_nothing_but_the_cut(root: Path, ngff: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = volume(shape=(40, 24, 24))
    ngff(root / "data/jrc_b/jrc_b.zarr/em", ramp((40, 32, 300)), VOXEL, (4, 4, 4), chunks=CHUNKS)
    lattice = Lattice(VOXEL, (4, 4, 4), (40, 32, 300)).to_dict()
    wide |= {"name": "jrc_b/crop1", "em": "jrc_b/jrc_b.zarr/em", "lattice": lattice, "target": lattice}
    (whole,) = run(root, Net(), [wide], monkeypatch)["records"]
    expected = array_of(root, whole)
    used = {**SETTINGS, "memory_gb": 0.006}
    (cut,) = run(root, Net(), [wide], monkeypatch, settings=used, store_dir=root / "out/cut")["records"]
    assert len(list((root / "out" / cut["path"]).with_suffix(".blocks").iterdir())) > 1
    np.testing.assert_array_equal(array_of(root, cut), expected)
    with pytest.raises(CellmapError, match=r"predict.memory_gb 1e-05 is too little"):
        run(root, Net(), [wide], monkeypatch, settings={**SETTINGS, "memory_gb": 1e-5}, store_dir=root / "out/none")


@pytest.fixture
def unseen(root: Path, ngff: Writer) -> tuple[dict[str, Any], np.ndarray]:
    """A volume of a dataset that was not trained on, and its EM: 100 to 150, and two voxels beyond."""
    em = Lattice(VOXEL, (4, 4, 4), (40, 40, 40))
    image = (100 + np.arange(40**3) % 51).astype(np.uint8).reshape(em.shape)
    image[20, 20, 20:22] = 30, 240
    ngff(root / "data/jrc_new/jrc_new.zarr/em", image, VOXEL, (4, 4, 4), chunks=CHUNKS)
    return volume("jrc_new/crop1", lattice=em.to_dict(), target=em.to_dict()), image


@pytest.mark.parametrize(
    ("normalisation", "limits", "source"),
    [
        ("percentile", [100.0, 150.0], "this volume"),
        ("range", [30.0, 240.0], "this volume"),
        ("uint8/255", [0.0, 255.0], "training"),
        ([90, 210], [90.0, 210.0], "training"),
    ],
    ids=str,
)
def test_unseen_dataset_is_normalised_as_the_model_was_trained(
    root: Path,
    unseen: tuple[dict[str, Any], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    normalisation: Any,
    limits: list[float],
    source: str,
) -> None:
    asked, image = unseen
    (record,) = run(root, Net(), [asked], monkeypatch, normalisation=normalisation)["records"]
    assert record["normalisation"] == {"range": limits, "from": source}
    expected = lookup_table(*limits)[image] * 255
    assert np.abs(array_of(root, record)[0] - expected).max() <= 1


def test_unseen_dataset_is_measured_once_and_a_trained_one_never(
    root: Path, unseen: tuple[dict[str, Any], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[Any, ...]] = []

    def counting(*arguments: Any) -> tuple[float, float]:
        measured.append(arguments)
        return intensity_range(*arguments)

    monkeypatch.setattr(predict, "intensity_range", counting)
    seen = volume(shape=(70, 24, 24))
    first, second = run(root, Net(), [seen, unseen[0]], monkeypatch, normalisation="range")["records"]
    assert first["normalisation"] == {"range": [0.0, 255.0], "from": "training"}
    assert second["normalisation"] == {"range": [30.0, 240.0], "from": "this volume"}
    ((histogram, kind),) = measured
    assert (histogram.sum(), kind) == (40**3, "range")


def test_an_unseen_dataset_is_predicted_anew_by_another_normalisation(
    root: Path, unseen: tuple[dict[str, Any], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = run(root, Net(), [unseen[0]], monkeypatch)["records"]
    network = Net()
    (other,) = run(root, network, [unseen[0]], monkeypatch, normalisation="range")["records"]
    assert network.windows > 0 and other["fingerprint"] != first["fingerprint"]


def test_only_classes_that_are_asked_for_are_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes = [volume(classes=["mito", "pm"]), volume("jrc_a/crop2", classes=["pm"])]
    first, second = run(root, Net(), volumes, monkeypatch)["records"]
    assert first["classes"] == ["mito_mem", "mito_lum"] and first["shape"][0] == 2
    assert (second["status"], second["path"]) == ("not served", None)
    assert "none of its classes" in second["cause"]


def test_a_volume_of_another_grid_is_listed_with_the_grid_that_serves_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Lattice((32, 32, 32), (16, 16, 16), (10, 10, 10))
    coarse = volume(target=target.to_dict(), lattice=grid_lattice(target, VOXEL).to_dict())
    network = Net()
    other = {"32nm": {"voxel_nm": (32, 32, 32), "classes": CLASSES}}
    (record,) = run(root, network, [coarse], monkeypatch, served=other)["records"]
    assert (record["status"], network.windows) == ("not served", 0)
    assert "grid 32nm" in record["cause"]
    (record,) = run(root, network, [coarse], monkeypatch)["records"]
    assert "64 times the voxels" in record["cause"]


def test_each_class_is_predicted_on_the_grid_nearest_to_what_is_asked(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine, coarse = Lattice(VOXEL, (84, 68, 68), (24, 24, 24)), Lattice((32, 32, 32), (96, 80, 80), (6, 6, 6))
    asked = {"ecs": fine.to_dict(), "mito": coarse.to_dict()}
    both = volume(lattice=fine.to_dict(), target=fine.to_dict(), classes=["ecs", "mito"], asked=asked)
    served: dict[str, Any] = {**SERVED, "32nm": {"voxel_nm": (32, 32, 32), "classes": ["mito", "ecs"]}}
    (record,) = run(root, Net(), [both], monkeypatch, served=served)["records"]
    assert (record["classes"], record["elsewhere"]) == (["ecs"], ["mito"])
    served["32nm"]["classes"] = ["nuc"]
    (record,) = run(root, Net(), [both], monkeypatch, served=served, settings={**SETTINGS, "max_oversampling": 64})[
        "records"
    ]
    assert (record["classes"], record["elsewhere"]) == (CLASSES, [])


def test_shards_share_the_volumes_and_delete_what_is_not_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes = [volume(f"jrc_a/crop{i}", (8, 8, 8)) for i in range(6)]
    volumes.append(volume("jrc_a/crop9", classes=["pm"]))
    for shard in range(3):
        run(root, Net(), volumes, monkeypatch, shard=shard, shards=3)
    results = [read_json(root / f"out/shard{shard}.json") for shard in range(3)]
    names = [[record["name"] for record in result["records"]] for result in results]
    assert names == [["jrc_a/crop0", "jrc_a/crop1", "jrc_a/crop9"]] + [
        [f"jrc_a/crop{i}" for i in (k, k + 1)] for k in (2, 4)
    ]
    assert [(result["shard"], result["shards"]) for result in results] == [(0, 3), (1, 3), (2, 3)]
    for shard in range(3):
        run(root, Net(), volumes[:2], monkeypatch, shard=shard, shards=3)
    kept = sorted(path.name.split("-")[0] for path in (root / "out/volumes").iterdir())
    assert kept == [f"jrc_a_crop{i}{end}" for i in (0, 1) for end in ("", "", ".survey.json")]


@settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    depths=st.lists(st.integers(1, 135), min_size=1, max_size=2),
    shards=st.integers(2, 5),
    columns=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_any_number_of_jobs_writes_the_same_bytes(
    root: Path,
    ngff: Writer,
    monkeypatch: pytest.MonkeyPatch,
    depths: list[int],
    shards: int,
    columns: bool,
    order: Random,
) -> None:
    wide = Lattice(VOXEL, (4, 4, 4), (70, 8, 260))
    if not (root / "data/jrc_b").exists():
        ngff(root / "data/jrc_b/jrc_b.zarr/em", ramp(wide.shape), VOXEL, (4, 4, 4), chunks=CHUNKS)
    volumes = [volume(f"jrc_a/crop{i}", (depth, 8, 8)) for i, depth in enumerate(depths)]
    if columns:
        volumes.append(volume("jrc_b/crop1", lattice=wide.to_dict(), target=wide.to_dict()))
    used = {**SETTINGS, "memory_gb": 0.0033 if columns else None}
    for folder in ("one", "many"):
        shutil.rmtree(root / "out" / folder, ignore_errors=True)
    (alone,) = (run(root, Net(), volumes, monkeypatch, store_dir=root / "out/one", settings=used)["records"],)
    assert len(list((root / "out/one").glob("jrc_b*.blocks/*"))) == (4 if columns else 0)
    together: dict[str, Any] = {}
    for shard in order.sample(range(shards), shards):
        job = run(
            root, Net(), volumes, monkeypatch, store_dir=root / "out/many", settings=used, shard=shard, shards=shards
        )
        for record in job["records"]:
            assert together.setdefault(record["name"], record) == record
    assert contents(root / "out/many") == contents(root / "out/one")
    assert [(r["name"], r["fingerprint"]) for r in alone] == sorted((n, r["fingerprint"]) for n, r in together.items())


def test_jobs_that_make_a_store_at_once_use_the_same(tmp_path: Path) -> None:
    lattice = Lattice(VOXEL, (4, 4, 4), (256, 8, 8))

    def write(number: int) -> Path:
        made = store.BlockStore(tmp_path, "jrc_a/crop1", lattice, CLASSES, "f" * 64, {"em_level": "s0"})
        made.array[:, number * 64 : number * 64 + 64] = number + 1
        made.finish(((number * 64, 0, 0), (number * 64 + 64, 8, 8)))
        return made.path

    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            (path,) = set(pool.map(write, range(4)))
            array = zarr.open_array(str(path / "s0"), mode="r")
            assert array[0, ::64, 0, 0].tolist() == [1, 2, 3, 4]
            assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.with_suffix(".blocks").name, path.name]
            assert len(list(path.with_suffix(".blocks").iterdir())) == 4
            shutil.rmtree(path)
            shutil.rmtree(path.with_suffix(".blocks"))


def test_slices_are_predicted_across_all_axes_where_voxels_are_isotropic(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Steep(torch.nn.Module):
        """How steeply the image rises along the rows of a slice: along y, except in slices across y, where it is z."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[2] == 1
            rise = 20 * (x - x.roll(1, dims=3))
            return torch.logit((rise + 0.2).clamp(0.01, 0.99)).repeat(1, 3, 1, 1, 1)

    image = (np.indices((150, 40, 40))[0] + 2 * np.indices((150, 40, 40))[1] + 20).astype(np.uint8)
    zarr.open_array(str(root / "data/jrc_a/jrc_a.zarr/em/s0"), mode="r+")[...] = image
    expected = {"z": 20 * 2 / 255 + 0.2, "all": 20 * (2 + 1 + 1) / 255 / 3 + 0.2}
    for planes, value in expected.items():
        used = {**SETTINGS, "planes": planes}
        (record,) = run(root, Steep(), [volume(shape=(6, 6, 6))], monkeypatch, patch=(1, 16, 16), settings=used)[
            "records"
        ]
        found = array_of(root, record)[0] / 255
        assert np.abs(found - value).max() < 0.01


def test_the_em_is_surveyed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    surveys: list[EMVolume] = []
    reading = EMVolume._read_all

    def counting(self: EMVolume) -> Any:
        surveys.append(self)
        return reading(self)

    monkeypatch.setattr(EMVolume, "_read_all", counting)
    for shard in range(3):
        run(root, Net(), [volume()], monkeypatch, shard=shard, shards=3)
    assert len(surveys) == 1
    zarr.open_array(str(root / "data/jrc_a/jrc_a.zarr/em/s0"), mode="r+")[20, 20, 20] = 0
    (root / "out/volumes/jrc_a_crop1.survey.json").write_text("{")
    run(root, Net(), [volume()], monkeypatch)
    assert len(surveys) == 2


def test_failed_volumes_are_named_and_the_others_are_done(
    root: Path, ngff: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    em = Lattice(VOXEL, (4, 4, 4), (64, 64, 64))
    ngff(root / "data/jrc_blank/jrc_blank.zarr/em", np.zeros(em.shape, np.uint8), VOXEL, (4, 4, 4), chunks=CHUNKS)
    blank = volume("jrc_blank/crop1", lattice=em.to_dict(), target=em.to_dict())
    volumes = [blank, volume("jrc_gone/crop1"), volume("jrc_a/crop9", (16, 16, 16))]
    with pytest.raises(PredictionError) as caught:
        run(root, Net(), volumes, monkeypatch)
    message = str(caught.value)
    assert message.startswith("2 of 3 volumes failed: ")
    assert "jrc_blank/crop1" in message and "the EM is blank under this volume (every voxel is 0)" in message
    assert "jrc_gone/crop1" in message and "there is no such image group" in message
    assert not (root / "out/shard0.json").exists()
    network = Net()
    run(root, network, volumes[2:], monkeypatch)
    assert network.windows == 0


def test_nan_fails_its_blocks_and_the_others_are_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Poisoned(Net):
        """NaN wherever the brightest voxel of the EM is seen."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where((x > 254.5 / 255).any(), torch.nan, super().forward(x))

    array = zarr.open_array(str(root / "data/jrc_a/jrc_a.zarr/em/s0"), mode="r+")
    array[10 + 100, 20, 20] = 255
    with pytest.raises(PredictionError) as caught:
        run(root, Poisoned(), [volume(), volume("jrc_a/crop2", (64, 24, 24))], monkeypatch)
    message = str(caught.value)
    assert message.startswith("1 of 2 volumes failed: jrc_a/crop1, block [64:128 0:24 0:24]: the network gave NaN in ")
    assert message.count("block [") == 1
    assert not (root / "out/shard0.json").exists()
    done = sorted(str(path.relative_to(root / "out/volumes")) for path in (root / "out/volumes").glob("*.blocks/*"))
    assert [name.split("/")[-1] for name in done] == ["0_0_0.json", "128_0_0.json", "0_0_0.json"]


def test_a_damaged_chunk_fails_the_blocks_that_need_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lattice = Lattice(VOXEL, (4, 68, 68), (140, 24, 24)).to_dict()
    asked = volume(lattice=lattice, target=lattice)
    damaged = root / "data/jrc_a/jrc_a.zarr/em/s0/4/0/0"
    intact = damaged.read_bytes()
    damaged.write_bytes(b"damaged")
    with pytest.raises(PredictionError) as caught:
        run(root, Net(), [asked], monkeypatch)
    message = str(caught.value)
    assert message.startswith("1 of 1 volumes failed: jrc_a/crop1, block [64:128 0:24 0:24]: ")
    assert "; jrc_a/crop1, block [128:140 0:24 0:24]: " in message
    assert message.count("s0/4/0/0: damaged chunk") == message.count("block [") == 2
    assert [path.name for path in (root / "out/volumes").glob("*.blocks/*")] == ["0_0_0.json"]
    assert not (root / "out/shard0.json").exists()
    damaged.write_bytes(intact)
    (record,) = run(root, Net(), [asked], monkeypatch)["records"]
    expected = ramp((150, 40, 40))[:140, 8:32, 8:32]
    assert np.abs(array_of(root, record)[0].astype(int) - expected).max() <= 1


def test_blocks_outlive_a_damage_that_is_mended(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = run(root, Net(), [volume()], monkeypatch)["records"]
    damaged = root / "data/jrc_a/jrc_a.zarr/em/s0/1/0/0"
    intact = damaged.read_bytes()
    damaged.write_bytes(b"damaged")
    with pytest.raises(PredictionError, match="damaged chunk"):
        run(root, Net(), [volume()], monkeypatch)
    damaged.write_bytes(intact)
    network = Net()
    (again,) = run(root, network, [volume()], monkeypatch)["records"]
    assert (again, network.windows) == (record, 0)
    assert [path.name for path in (root / "out/volumes").glob("*.zarr")] == [store_of(root, record).name]


@pytest.mark.parametrize("place", ["store", "chunk", "record"])
def test_a_full_disk_stops_the_job_and_leaves_no_record(
    root: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    target, name = {
        "store": (store, "create_probabilities"),
        "chunk": (zarr.Array, "__setitem__"),
        "record": (store, "write_json"),
    }[place]
    with monkeypatch.context() as patch:
        patch.setattr(target, name, full)
        with pytest.raises(PredictionError) as caught:
            run(root, Net(), [volume("jrc_a/crop1"), volume("jrc_a/crop2")], monkeypatch)
    message = str(caught.value)
    assert message.startswith(
        "jrc_a/crop1: [Errno 28] No space left on device: this job's volumes from here on take up "
    )
    assert "up to 0.000449 GB" in message and "volumes failed" not in message
    assert not list((root / "out/volumes").glob("*.blocks/*.json"))
    run(root, Net(), [volume("jrc_a/crop1"), volume("jrc_a/crop2")], monkeypatch)


def test_lack_of_memory_stops_the_job(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise self.error

    for error, remedy in (
        (MemoryError(), "set predict.memory_gb lower"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "set predict.memory_gb lower"),
        (torch.OutOfMemoryError("CUDA out of memory"), "lower predict.batch"),
    ):
        network = Greedy()
        network.error = error
        with pytest.raises(PredictionError, match=rf"^jrc_a/crop1: .*{remedy}"):
            run(root, network, [volume(), volume("jrc_a/crop2")], monkeypatch)


def test_weights_of_another_grid_or_settings_that_lack_a_key_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Lattice((9, 9, 9), (4, 4, 4), (16, 16, 16)).to_dict()
    with pytest.raises(CellmapError, match=r"was trained on grid 8nm"):
        run(root, Net(), [volume(lattice=other)], monkeypatch)
    lacking = {key: value for key, value in SETTINGS.items() if key != "overlap"}
    for used, message in (
        (lacking, r"predict.overlap is missing"),
        ({**SETTINGS, "output": "mask"}, r"predict.thresholds is missing"),
        ({**SETTINGS, "output": "bits"}, r"predict.output: unknown 'bits'; allowed: uint8"),
        ({**SETTINGS, "tta": 48}, r"predict.tta 48"),
    ):
        with pytest.raises(CellmapError, match=message):
            run(root, Net(), [volume()], monkeypatch, settings=used)
    with pytest.raises(ContractError, match=r"model.pt predicts ecs, mito_mem, mito_lum, but model m .* ecs, pm"):
        run(root, Net(), [volume()], monkeypatch, classes=["ecs", "pm"])
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"resources\.predict\.gpus to 0"):
            run(root, Net(), [volume()], monkeypatch, device="cuda")


def predict_with(root: Path, weights: Path, volumes: list[dict[str, Any]]) -> Any:
    predict.predict_shard(
        weights,
        volumes,
        root / "out/shard0.json",
        data_root=root / "data",
        shard=0,
        shards=1,
        store_dir=root / "out/volumes",
        settings=SETTINGS,
        served=SERVED,
        model="m",
        fold=0,
        subset="test",
        device="cpu",
    )
    return read_json(root / "out/shard0.json")


def test_a_checkpoint_predicts_as_its_network_does(root: Path) -> None:
    arguments = {"channels": [2, 4], "strides": [2]}
    patch = [16, 16, 16]
    torch.manual_seed(0)
    network = build_network("UNet", arguments, patch=patch, n_classes=2, spatial_dims=3)
    contents = {
        "format": FORMAT,
        "state_dict": network.state_dict(),
        "settings": {
            "network": "UNet",
            "arguments": arguments,
            "spatial_dims": 3,
            "amp": "none",
            "normalisation": "percentile",
        },
        "classes": ["ecs", "pm"],
        "grid": "8nm",
        "voxel_nm": list(VOXEL),
        "patch": patch,
        "normalisation": {"jrc_a": [10.0, 200.0]},
    }
    torch.save(contents, root / "model.pt")
    (record,) = predict_with(root, root / "model.pt", [volume(shape=(16, 16, 16))])["records"]
    assert record["normalisation"] == {"range": [10.0, 200.0], "from": "training"}
    image = lookup_table(10, 200)[ramp((150, 40, 40))[10:26, 8:24, 8:24]]
    with torch.no_grad():
        expected = torch.sigmoid(network.eval()(torch.from_numpy(image)[None, None]))[0].numpy() * 255
    assert np.abs(array_of(root, record) - expected).max() <= 0.51
    contents["settings"]["arguments"] = {"channels": [2, 6], "strides": [2]}
    torch.save(contents, root / "model.pt")
    with pytest.raises(ContractError, match=r"model\.pt: its weights do not fit its settings .*make it again with"):
        predict_with(root, root / "model.pt", [volume(shape=(16, 16, 16))])


def test_a_damaged_checkpoint_is_named(root: Path) -> None:
    (root / "model.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ContractError, match=r"model\.pt"):
        predict_with(root, root / "model.pt", [volume()])
    assert not (root / "out/shard0.json").exists()


def test_a_checkpoint_that_does_not_name_its_normalisation_is_refused(root: Path) -> None:
    torch.save({"format": FORMAT - 1, "state_dict": {}}, root / "model.pt")
    with pytest.raises(ContractError, match=rf"model\.pt: model format 1, this version reads {FORMAT}; make it again"):
        predict_with(root, root / "model.pt", [volume()])
