"""Predictions that are killed again and again end bit by bit as one that was left alone."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import torch

from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prediction import predict

CLASSES = ["ecs", "pm"]
VOXEL = (8.0, 8.0, 8.0)
PATCH = (64, 8, 8)
SHAPE = (512, 8, 8)
SETTINGS = {
    "overlap": 0.5,
    "blending": "gaussian",
    "batch": 1,
    "memory_gb": None,
    "max_oversampling": 8,
    "allow_oversampling": False,
    "max_upsample": 4,
    "tta": 1,
    "planes": "all",
    "output": "uint8",
}
KILLS = 10
WINDOW_S = 0.05

# Longer than any of these processes takes, on a loaded machine too.
PATIENCE_S = 120


class Slow(torch.nn.Module):
    """Intensity and its complement, after a while: most kills come while the network is at work, as they do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(WINDOW_S)
        p = x.clamp(1e-4, 1 - 1e-4)
        return torch.logit(torch.cat([p, 1 - p], 1))


def predict_all(root: Path, out: Path) -> None:
    """Predict three volumes, as one job of the rule does."""
    # in a child process, where no fixture puts it back: a network whose windows take a known time
    predict.load_model = lambda path, device: SimpleNamespace(  # type: ignore[assignment, return-value]
        network=Slow(),
        classes=CLASSES,
        grid="8nm",
        voxel_nm=VOXEL,
        patch=PATCH,
        normalisation={"jrc_a": [0.0, 255.0]},
        digest="w1",
        contents={"settings": {"normalisation": "percentile"}},
    )
    lattice = Lattice(VOXEL, (4, 4, 4), SHAPE).to_dict()
    volume = {"dataset": "jrc_a", "em": "em", "lattice": lattice, "target": lattice, "classes": None}
    predict.predict_shard(
        "model.pt",
        [{"name": f"jrc_a/crop{i}", **volume} for i in range(3)],
        out / "shard0.json",
        data_root=root,
        shard=0,
        shards=1,
        store_dir=out / "volumes",
        settings=SETTINGS,
        served={},
        model="m",
        fold=0,
        subset="test",
        device="cpu",
    )


def start(root: Path, out: Path) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cellmap_pipe.prediction.predict"])
    process = context.Process(target=predict_all, args=(root, out))
    process.start()
    return process


def finish(process: BaseProcess) -> None:
    process.join(PATIENCE_S)
    assert process.exitcode == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def written(out: Path) -> dict[Path, int]:
    """Return when each finished block was recorded."""
    records = [path for path in out.glob("volumes/*.blocks/*.json") if not path.name.startswith(".")]
    return {path: path.stat().st_mtime_ns for path in records}


def test_killed_predictions_lose_no_block_and_do_none_twice(tmp_path: Path, ngff: Callable[..., Path]) -> None:
    image = np.random.default_rng(0).integers(1, 256, SHAPE, dtype=np.uint8)
    ngff(tmp_path / "em", image, VOXEL, (4, 4, 4), chunks=(64, 8, 8))
    reference = start(tmp_path, tmp_path / "whole")
    random, out, known, kills = Random(0), tmp_path / "killed", {}, 0
    patience = time.monotonic() + PATIENCE_S
    while kills < KILLS and not (out / "shard0.json").exists():
        process = start(tmp_path, out)
        wanted = len(known) + random.randrange(2)
        while process.is_alive() and len(written(out)) < wanted:
            assert time.monotonic() < patience
            time.sleep(0.002)
        process.join(random.uniform(0, 4 * WINDOW_S))
        process.kill()
        process.join(PATIENCE_S)
        kills += process.exitcode == -9
        found = written(out)
        assert found.items() >= known.items()
        known = found
    assert kills == KILLS
    last = start(tmp_path, out)
    finish(last)
    finish(reference)
    final = written(out)
    assert final.items() >= known.items() and len(final) == 3 * SHAPE[0] // 64
    assert contents(out / "volumes") == contents(tmp_path / "whole/volumes")
    assert (out / "shard0.json").read_bytes() == (tmp_path / "whole/shard0.json").read_bytes()
