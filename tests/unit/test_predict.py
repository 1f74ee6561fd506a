"""The predict job: geometry of what it writes, records, resuming, and volumes that fail."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from cellmap_pipe.colours import colour_of
from cellmap_pipe.errors import CellmapError, ConfigError, ContractError
from cellmap_pipe.files import read_json
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.intensity import intensity_range, lookup_table
from cellmap_pipe.prediction import predict
from cellmap_pipe.prediction.sliding_window import PredictionError
from cellmap_pipe.prediction.volumes import grid_lattice
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
}
VOXEL = (8.0, 8.0, 8.0)


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
        patch=(32, 16, 16),
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
        "served": {"8nm": VOXEL},
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
    store = root / "out" / record["path"]
    attributes = json.loads((store / ".zattrs").read_text())
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
    layout = json.loads((store / "s0/.zarray").read_text())
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
    run(root, Net(), [volume()], monkeypatch)
    before = contents(root / "out/volumes")
    (root / "out/volumes/jrc_a_crop1.zarr/s0/0/0/0/0.1234.partial").write_bytes(b"half a chunk")
    (root / "out/volumes/jrc_a_crop1.blocks/.partial-1234-0_0_0.json").write_text("{")
    (root / "out/volumes/.partial-1234-jrc_a_crop1.zarr").mkdir()
    run(root, Net(), [volume()], monkeypatch)
    assert contents(root / "out/volumes") == before
    assert not (root / "out/volumes/.partial-1234-jrc_a_crop1.zarr").exists()


def test_a_damaged_record_or_another_fingerprint_is_redone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = run(root, Net(), [volume()], monkeypatch)["records"]
    first = contents(root / "out/volumes")
    blocks = sorted((root / "out/volumes/jrc_a_crop1.blocks").iterdir())
    assert [path.name for path in blocks] == ["0_0_0.json", "128_0_0.json", "64_0_0.json"]
    blocks[0].write_text("{")
    network = Net()
    run(root, network, [volume()], monkeypatch)
    assert network.windows > 0
    assert contents(root / "out/volumes") == first
    for change in (
        {"weights": "w2"},
        {"settings": {**SETTINGS, "overlap": 0.25}},
        {"settings": {**SETTINGS, "rev": 1}},
    ):
        network = Net()
        (other,) = run(root, network, [volume()], monkeypatch, **change)["records"]
        assert network.windows > 0 and other["fingerprint"] != record["fingerprint"]
    neutral = Net()
    run(root, neutral, [volume()], monkeypatch, settings={**SETTINGS, "rev": 1, "max_oversampling": 3})
    assert neutral.windows == 0


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
    assert {arithmetic("none", "cuda"), arithmetic("bf16", "cpu"), arithmetic("none", "cpu")} == {"float32"}


def test_changed_em_is_predicted_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(root, Net(), [volume()], monkeypatch)
    zarr.open_array(str(root / "data/jrc_a/jrc_a.zarr/em/s0"), mode="r+")[20, 20, 20] = 0
    network = Net()
    run(root, network, [volume()], monkeypatch)
    assert network.windows > 0


def test_memory_limit_changes_nothing_but_the_cut(root: Path, ngff: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = volume(shape=(40, 24, 24))
    ngff(root / "data/jrc_b/jrc_b.zarr/em", ramp((40, 160, 300)), VOXEL, (4, 4, 4), chunks=CHUNKS)
    lattice = Lattice(VOXEL, (4, 4, 4), (40, 160, 300)).to_dict()
    wide |= {"name": "jrc_b/crop1", "em": "jrc_b/jrc_b.zarr/em", "lattice": lattice, "target": lattice}
    (whole,) = run(root, Net(), [wide], monkeypatch)["records"]
    expected = array_of(root, whole)
    settings = {**SETTINGS, "memory_gb": 0.02}
    (cut,) = run(root, Net(), [wide], monkeypatch, settings=settings, store_dir=root / "out/cut")["records"]
    assert len(list((root / "out/cut/jrc_b_crop1.blocks").iterdir())) > 1
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
    (record,) = run(root, network, [coarse], monkeypatch, served={"32nm": (32, 32, 32)})["records"]
    assert (record["status"], network.windows) == ("not served", 0)
    assert "grid 32nm" in record["cause"]
    (record,) = run(root, network, [coarse], monkeypatch)["records"]
    assert "64 times the voxels" in record["cause"]


def test_shards_share_the_volumes_and_delete_what_is_not_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes = [volume(f"jrc_a/crop{i}", (8, 8, 8)) for i in range(6)]
    for shard in range(3):
        run(root, Net(), volumes, monkeypatch, shard=shard, shards=3)
    names = [[record["name"] for record in read_json(root / f"out/shard{shard}.json")["records"]] for shard in range(3)]
    assert sorted(name for shard_names in names for name in shard_names) == [v["name"] for v in volumes]
    for shard in range(3):
        run(root, Net(), volumes[:2], monkeypatch, shard=shard, shards=3)
    assert sorted(path.stem for path in (root / "out/volumes").glob("*.zarr")) == ["jrc_a_crop0", "jrc_a_crop1"]
    assert len(list((root / "out/volumes").glob("*.blocks"))) == 2


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


def test_nan_fails_its_volume_and_is_not_recorded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Net(nan_at=12)
    with pytest.raises(PredictionError, match=r"jrc_a/crop1: the network gave NaN in the window at voxel \("):
        run(root, network, [volume()], monkeypatch)
    assert not (root / "out/shard0.json").exists()
    assert not list((root / "out/volumes").glob("*.blocks/*"))


def test_disk_full_fails_the_job_and_leaves_no_record(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    with pytest.raises(PredictionError, match="No space left on device"):
        run(root, Net(), [volume(shape=(8, 8, 8))], monkeypatch)
    assert not list((root / "out/volumes").glob("*.blocks/*"))


def test_weights_of_another_grid_or_settings_that_lack_a_key_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Lattice((9, 9, 9), (4, 4, 4), (16, 16, 16)).to_dict()
    with pytest.raises(CellmapError, match=r"was trained on grid 8nm"):
        run(root, Net(), [volume(lattice=other)], monkeypatch)
    lacking = {key: value for key, value in SETTINGS.items() if key != "overlap"}
    with pytest.raises(ConfigError, match=r"predict.overlap is missing"):
        run(root, Net(), [volume()], monkeypatch, settings=lacking)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
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
        served={"8nm": VOXEL},
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


def test_a_damaged_checkpoint_is_named(root: Path) -> None:
    (root / "model.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ContractError, match=r"model\.pt"):
        predict_with(root, root / "model.pt", [volume()])
    assert not (root / "out/shard0.json").exists()


def test_a_checkpoint_that_does_not_name_its_normalisation_is_refused(root: Path) -> None:
    torch.save({"format": FORMAT - 1, "state_dict": {}}, root / "model.pt")
    with pytest.raises(ContractError, match=rf"model\.pt: model format 1, this version reads {FORMAT}; train it again"):
        predict_with(root, root / "model.pt", [volume()])
