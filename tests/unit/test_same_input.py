"""Training and prediction show a network the same voxels, bit for bit, from the EM on disk to the input tensor.

Nothing here is a stand-in: small OME-Zarr crops are converted, judged and chunked, a network is trained on them for one
step, and its checkpoint predicts the same EM. What training gives a network for a box is compared with what prediction
gives it, wherever both see EM: elsewhere each mirrors what it has.
"""

import csv
import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training_case import SETTINGS

from cellmap_pipe.files import read_json, write_json
from cellmap_pipe.geometry import Shape3, shape3
from cellmap_pipe.prediction import predict
from cellmap_pipe.prediction.plan import Plan
from cellmap_pipe.prediction.sliding_window import Network, predict_box
from cellmap_pipe.prediction.volumes import validation_volumes
from cellmap_pipe.prepare.chunks import chunk_shard, write_index
from cellmap_pipe.prepare.convert import convert_shard
from cellmap_pipe.prepare.crops import write_crops
from cellmap_pipe.prepare.quality import write_quality
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.training.augment import Variation
from cellmap_pipe.training.expand import Expander
from cellmap_pipe.training.inference import load_model
from cellmap_pipe.training.main import run_training
from cellmap_pipe.training.sampling import Patch, Patches
from cellmap_pipe.training.transform import varied

CLASSES = ["pm", "mito"]
CROPS = ["cell/crop1", "cell/crop2"]
PATCH = (16, 16, 16)
NORMALISATIONS = ["percentile", "range", "uint8/255", [90, 210]]

# Voxel sizes (z, y, x) in nm of EM and labels, the grid, and the layout of the store: EM twice as fine as the grid; EM
# whose voxels are no fraction of the grid's; no resampling.
CASES: dict[str, dict[str, Any]] = {
    "twice finer": {"em": (4, 4, 4), "label": (4, 4, 4), "grid": [8, 8, 8], "layout": "mapped"},
    "uneven": {"em": (5.24, 4, 4.6), "label": (4, 4, 4), "grid": [8, 8, 8], "layout": "blocked"},
    "native": {"em": (8, 8, 8), "label": (8, 8, 8), "grid": "native", "layout": "mapped"},
}
# One case with every normalisation, the others with one: what resamples knows nothing of intensities.
SEEN = [*[("twice finer", kind) for kind in NORMALISATIONS], ("uneven", "percentile"), ("native", "range")]
CONTEXT_NM = 64
CHUNK_NM = 128


class Case:
    """One dataset of two crops, from OME-Zarr to the store: the first in the middle of the EM, the other at its edge.

    One EM chunk, which reaches into both of their boxes, is missing.
    """

    def __init__(self, folder: Path, ngff: Callable[..., Path], em: Any, label: Any, grid: Any, layout: str) -> None:
        self.folder, self.data, self.grid = folder, folder / "data", grid
        rng = np.random.default_rng(3)
        shape = [math.ceil(nm / voxel) for nm, voxel in zip((400, 380, 420), em, strict=True)]
        # brighter from plane to plane: no crop has the dataset's percentiles; with outliers, which make the range
        brightness = np.linspace(90, 160, shape[0])[:, None, None]
        image = rng.normal(brightness, 25, shape).clip(20, 230).astype(np.uint8)
        image[rng.random(shape) < 0.002] = 7
        image[rng.random(shape) < 0.002] = 251
        container = self.data / "cell/cell.zarr"
        chunk = [round(CHUNK_NM / voxel) for voxel in em]
        ngff(container / "em", image, em, (1.3, 2.1, 0.7), chunks=chunk)
        for crop, box, lower in (("crop1", (168, 176, 152), (104, 96, 128)), ("crop2", (144, 152, 160), (3, 88, 5))):
            kinds = rng.integers(0, 3, [nm // voxel for nm, voxel in zip(box, label, strict=True)])
            for value, name in enumerate(CLASSES, 1):
                array = (kinds == value).astype(np.uint8)
                ngff(container / "labels" / crop / name, array, label, lower, chunks=kinds.shape)
        (container / "em/s0/1/1/0").unlink()
        self._prepare(1e-9 if layout == "blocked" else 1)
        assert {record["layout"] for record in Store(folder / "index.json").crops.values()} == {layout}

    def _prepare(self, memory_gb: float) -> None:
        folder, crops_csv, quality_csv = self.folder, self.folder / "crops.csv", self.folder / "quality.csv"
        data = {"root": str(self.data), "em_path": "em", "labels_path": "labels", "crops": None}
        write_crops(data, crops_csv)
        common = {"data_root": self.data, "nifti_dir": folder / "nifti", "max_upsample": 4, "workers": 1}
        convert_shard(
            crops_csv,
            folder / "convert.json",
            shard=0,
            shards=1,
            grid_name="grid",
            voxel_nm=self.grid,
            classes=CLASSES,
            labels={"empty": "absent"},
            **common,
        )
        write_quality(
            [folder / "convert.json"],
            quality_csv,
            folder / "statistics.json",
            settings={"min_em_fraction": 0.5, "min_std": 2.0, "max_train_gb": None, "max_predict_gb": None},
            keep=CROPS,
            drop=[],
            context_nm=CONTEXT_NM,
            models=[],
        )
        chunk_shard(
            quality_csv,
            folder / "convert.json",
            folder / "shard.json",
            store_dir=folder / "store",
            context_nm=CONTEXT_NM,
            memory_gb=memory_gb,
            **common,
        )
        write_index([folder / "shard.json"], folder / "statistics.json", folder / "index.json")
        write_json(folder / "fold.json", {"training": [{"crop": CROPS[0]}], "validation": [{"crop": CROPS[1]}]})
        with open(folder / "folds.csv", "w", newline="") as stream:
            csv.writer(stream).writerows([("crop", "fold"), *((crop, 0) for crop in CROPS)])

    def train(self, normalisation: Any) -> Path:
        """Train for one step and return the checkpoint."""
        run = self.folder / "runs" / str(normalisation).replace("/", "_")
        settings = {
            **SETTINGS,
            "network": "UNet",
            "arguments": {"channels": [2, 4], "strides": [2]},
            "grid": "grid",
            "classes": CLASSES,
            "patch": list(PATCH),
            "batch": 1,
            "max_steps": 1,
            "steps_per_epoch": 1,
            "normalisation": normalisation,
        }
        request = {
            "rule": "train",
            "model": "tiny",
            "fold": "0",
            "settings": settings,
            "datalist": str(self.folder / "fold.json"),
            "index": str(self.folder / "index.json"),
            "run_dir": str(run / "run"),
            "outputs": {
                kind: str(run / name)
                for kind, name in (("weights", "model.pt"), ("metrics", "metrics.json"), ("history", "history.csv"))
            },
            "device": "cpu",
            "log": str(run / "log"),
            "threads": 1,
        }
        write_json(run / "request.json", request)
        run_training(run / "request.json")
        return run / "model.pt"

    def predict(self, weights: Path) -> list[dict[str, Any]]:
        """Predict both crops and return their records."""
        volumes = validation_volumes(
            self.folder / "quality.csv", self.folder / "folds.csv", [self.folder / "convert.json"], 0
        )
        predict.predict_shard(
            weights,
            volumes,
            weights.parent / "shard0.json",
            data_root=self.data,
            shard=0,
            shards=1,
            store_dir=weights.parent / "volumes",
            settings={
                "overlap": 0.5,
                "blending": "gaussian",
                "batch": 3,
                "memory_gb": None,
                "max_oversampling": 8,
                "allow_oversampling": False,
                "max_upsample": 4,
                "tta": 1,
                "planes": "z",
                "output": "uint8",
            },
            served={"grid": {"voxel_nm": self.grid, "classes": CLASSES}},
            model="tiny",
            fold=0,
            subset="validation",
            device="cpu",
        )
        return list(read_json(weights.parent / "shard0.json")["records"])


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory, ngff: Callable[..., Path]) -> Callable[[str], Case]:
    return functools.cache(lambda name: Case(tmp_path_factory.mktemp("same_input"), ngff, **CASES[name]))


@dataclass
class Seen:
    """A training and a prediction of a case: plan and windows (corner, input tensor) of each crop, in order."""

    case: Case
    normalisation: Any
    weights: Path
    records: list[dict[str, Any]]
    watched: list[tuple[Plan, list[tuple[Shape3, torch.Tensor]]]]


@pytest.fixture(scope="module", params=SEEN, ids=str)
def seen(case_of: Callable[[str], Case], request: pytest.FixtureRequest) -> Seen:
    name, normalisation = request.param
    case = case_of(name)
    weights = case.train(normalisation)
    watched = []

    def watching(network: Network, source: Any, plans: Sequence[Plan], box: Any, write: Any, **options: Any) -> None:
        shown: list[torch.Tensor] = []

        def looking(images: torch.Tensor) -> torch.Tensor:
            shown.extend(images.clone())
            return network(images)

        predict_box(looking, source, plans, box, write, **options)
        (plan,) = plans
        corners = product(*(axis.starts for axis in plan))
        watched.append((plan, [(shape3(corner), image) for corner, image in zip(corners, shown, strict=True)]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "predict_box", watching)
        records = case.predict(weights)
    return Seen(case, normalisation, weights, records, watched)


def trained_on(store: Store, crop: str, normalisation: Any, origin: Any) -> torch.Tensor:
    """Return what training shows a network of the box at `origin` of a crop's stored arrays, unvaried: (z, y, x)."""
    patches = Patches(store, [crop], CLASSES, PATCH)
    limits = [store.intensity_range(dataset, normalisation) for dataset in patches.datasets]
    expander = Expander(patches.tables, limits, torch.device("cpu"))
    image, label = np.empty(PATCH, np.uint8), np.empty(PATCH, patches.label_dtype)
    patches.copy(Patch(0, shape3(origin), (0, 0, 0)), image, label)
    stored, labels = torch.from_numpy(image)[None], torch.from_numpy(label)[None]
    shown = varied(stored, labels, [0], [Variation()], expander)[0].clone()
    assert torch.equal(shown, expander.image(stored, [0])), "what validation shows is not what training shows"
    return shown[0, 0]


def test_training_and_prediction_show_a_network_the_same(seen: Seen) -> None:
    store = Store(seen.case.folder / "index.json")
    for crop, (plan, windows) in zip(CROPS, seen.watched, strict=True):
        record = store.crops[crop]
        offset, shape = record["label_offset"], record["lattice"]["shape"]
        # inside the stored array, and EM that prediction does not mirror
        lower = [max(0, axis.domain[0] + o) for axis, o in zip(plan, offset, strict=True)]
        upper = [min(n, axis.domain[1] + o) for n, axis, o in zip(shape, plan, offset, strict=True)]
        compared = np.zeros(shape, bool)
        for corner, (predicted,) in windows:
            origin = [c + o for c, o in zip(corner, offset, strict=True)]
            trained = trained_on(store, crop, seen.normalisation, origin)
            assert predicted.dtype == trained.dtype == torch.float32
            box = [
                slice(max(o, a), min(o + length, b))
                for o, length, a, b in zip(origin, PATCH, lower, upper, strict=True)
            ]
            inside = tuple(slice(part.start - o, part.stop - o) for part, o in zip(box, origin, strict=True))
            assert torch.equal(predicted[inside], trained[inside]), (crop, corner)
            compared[tuple(box)] = True
        label_box = tuple(slice(o, o + n) for o, n in zip(offset, record["label_shape"], strict=True))
        assert compared[label_box].all()
        assert compared.sum() > compared[label_box].sum(), "nothing of the context was compared"


def test_the_constants_of_the_valid_voxels_reach_index_checkpoint_and_record(seen: Seen) -> None:
    records = read_json(seen.case.folder / "convert.json")["records"]
    voxels = np.repeat(np.arange(256), np.sum([record["em_stats"]["histogram"] for record in records], axis=0))
    expected = {
        "percentile": np.percentile(voxels, [0.5, 99.5]).tolist(),
        "range": [voxels.min(), voxels.max()],
        "uint8/255": [0, 255],
    }.get(str(seen.normalisation), seen.normalisation)
    constants = Store(seen.case.folder / "index.json").intensity_range("cell", seen.normalisation)
    assert constants == pytest.approx(tuple(expected))
    assert load_model(seen.weights).normalisation == {"cell": constants}
    assert [entry["normalisation"] for entry in seen.records] == [{"range": list(constants), "from": "training"}] * 2
