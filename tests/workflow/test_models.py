"""Every network of the model files trains through the workflow: made small, a step on tiny crops, three on two ranks.

A preset of a model for another grid trains the same network: that it can be resolved is enough.
"""

import csv
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cellmap_pipe.config import load_config
from cellmap_pipe.training.inference import load_model

ROOT = Path(__file__).parents[2]
FILES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "config" / "models").glob("*.yaml"))}
# The package that a network comes from, where it is an optional one.
EXTRAS = {"ResidualEncoderUNet": "dynamic_network_architectures"}
PRESETS = [name for name in FILES if name.endswith("_8nm")]
NETWORKS = [name for name in FILES if name not in PRESETS]
MODELS = [name for name in NETWORKS if importlib.util.find_spec(EXTRAS.get(FILES[name]["network"], "torch"))]
# Deep supervision, parameters without a gradient, slices.
TWO_RANKS = ("segresnet_ds", "vit_3d", "unet_2d")

# Arguments that make a network small, by its name.
SMALL: dict[str, dict[str, Any]] = {
    "BasicUNet": {"features": [8, 8, 16, 16, 32, 8]},
    "DiNTS": {"channel_mul": 0.25},
    "FlexibleUNet": {"backbone": "resnet10"},
    "ResidualEncoderUNet": {"features_per_stage": [8, 8, 16, 16, 16, 16], "n_blocks_per_stage": 1},
    "SegResNet": {"init_filters": 8},
    "SegResNetDS": {"init_filters": 8},
    "SwinUNETR": {"feature_size": 12},
    "UNETR": {"feature_size": 8, "hidden_size": 48, "num_heads": 4, "mlp_dim": 96},
}


def overrides(name: str) -> dict[str, Any]:
    """Return what makes the training of a model small enough for a processor."""
    file = FILES[name]
    return {
        "arguments": SMALL.get(file["network"], {}),
        "train": {"patch": [1, 64, 64] if file["spatial_dims"] == 2 else [32, 32, 64]},
        "resources": {"train": {"gpus": 2 if name in TWO_RANKS else 0}},
    }


def run_workflow(folder: Path, configuration: dict[str, Any], targets: list[str]) -> None:
    """Make the targets with everything under `folder`."""
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration))
    command = [sys.executable, "-m", "snakemake", *targets, "--cores", "2", "--directory", str(folder), "--keep-going"]
    command += ["--snakefile", "workflow/Snakefile", "--configfile", str(folder / "config.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    logs = "".join(path.read_text()[-1500:] for path in folder.glob("logs/**/*.log")) if done.returncode else ""
    faults = [line for line in logs.splitlines() if line.startswith("ERROR")]
    assert done.returncode == 0, done.stderr[-4000:] + logs[-8000:] + "\n".join(faults)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory in which every model was trained for a step, on crops of 36^3 voxels."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "crops.csv").write_text("crop\nphantom-1/crop101\nphantom-1/crop102\nphantom-2/crop202\n")
    tiny = {"batch": 1, "accumulate": 1, "max_steps": 1, "steps_per_epoch": 1, "validate_every": 1}
    every = {
        "grid": "32nm",
        "train": tiny,
        "resources": {"train": {"threads": 1, "mem_mb": 1800, "runtime_min": 30}},
    }
    configuration = {
        "data": {"root": "challenge", "crops": "crops.csv", "phantom": {"seed": 0}},
        "grid": "32nm",
        "shards": 1,
        "models": ["segresnet_ds"],
        "folds": {"n": 3, "margin_nm": 200},
        "chunks": {"context_nm": 256},
        "overrides": {"*": every, **{name: overrides(name) for name in MODELS}},
    }
    run_workflow(folder, configuration, [f"train_{name}" for name in MODELS])
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_model_trains_through_the_workflow_and_can_be_used(trained: Path, name: str) -> None:
    folder = trained / "results" / "train" / name / "fold0"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 1
    with (folder / "history.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == [1]
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    model = load_model(folder / "model.pt")
    with torch.no_grad():
        logits = model.network(torch.zeros((1, 1, *model.patch)))
    assert logits.shape == (1, len(model.classes), *model.patch)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", TWO_RANKS)
def test_model_trains_on_two_ranks(trained: Path, name: str) -> None:
    log = (trained / "logs" / "train" / f"{name}_fold0.log").read_text()
    assert " on 2 x cpu" in log


def test_only_networks_of_optional_packages_are_left_out() -> None:
    assert {FILES[name]["network"] for name in NETWORKS if name not in MODELS} <= set(EXTRAS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_trains_the_network_of_its_model(name: str) -> None:
    values = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    config = load_config(values, schemas=ROOT / "workflow" / "schemas", models=ROOT / "config" / "models")
    preset, model = config.model(name), config.model(name.removesuffix("_8nm"))
    assert (preset.network, preset.spatial_dims, preset.arguments) == (
        model.network,
        model.spatial_dims,
        model.arguments,
    )
    assert config.grids[preset.grid] == (8, 8, 8)
    assert max(preset.train["patch"]) <= 128
