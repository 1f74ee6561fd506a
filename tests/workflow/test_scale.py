"""The whole challenge stays a small plan: its jobs are laid out in seconds, and the table of its crops is read."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT.parent / "shared/data/manifests"
MODELS = [
    *("segresnet_ds", "flexunet_resnet34", "swinunetr", "segresnet_32nm", "dints", "unet_2d", "resnet_2d", "swin_2d"),
    *("vit_2d", "unet_3d", "resnet_3d", "swin_3d", "vit_3d"),
]
FOLDS, SHARDS, GRIDS = 5, 16, 2

# Alone on a machine it takes less than half of it; beside other tests a CPU second holds less work.
CPU_SECONDS = 8.0

needs_manifests = pytest.mark.skipif(
    not (MANIFESTS / "train_crop_manifest.csv").is_file(), reason=f"the challenge's manifests are not at {MANIFESTS}"
)


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the workflow with the full challenge's configuration in `folder`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SNAKEMAKE")}
    command = [sys.executable, "-m", "snakemake", *arguments, "--cores", "1", "--directory", str(folder)]
    command += ["--snakefile", str(ROOT / "workflow/Snakefile")]
    command += ["--configfile", str(ROOT / "config/challenge.yaml"), str(folder / "full.yaml")]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.fixture
def challenge(tmp_path: Path) -> Path:
    """The folder of a run of the full challenge: 13 models, 5 folds, 16 shards, 2 grids."""
    crops, volumes = (tmp_path / f"{name}.csv" for name in ("crops", "volumes"))
    if (MANIFESTS / "train_crop_manifest.csv").is_file():
        crops, volumes = MANIFESTS / "train_crop_manifest.csv", MANIFESTS / "test_crop_manifest.csv"
    else:
        for path in (crops, volumes):
            path.write_text("crop_name,dataset,class_label,voxel_size,translation,shape\n")
    (tmp_path / "data").mkdir()
    full = {
        "models": MODELS,
        "folds": {"run": list(range(FOLDS))},
        "shards": SHARDS,
        "data": {"root": str(tmp_path / "data"), "crops": str(crops), "volumes": str(volumes)},
    }
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(full))
    return tmp_path


def test_full_challenge_is_planned_in_seconds(challenge: Path) -> None:
    before = os.times()
    result = snakemake(challenge, "-n", "--quiet", "rules")
    after = os.times()
    assert result.returncode == 0, result.stdout + result.stderr
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"dry-run of the full challenge: {cpu:.2f} s of CPU")
    table = (result.stdout + result.stderr).split("Job stats:")[-1]
    jobs = {rule: int(count) for rule, count in re.findall(r"^([a-z_0-9]+) +(\d+)$", table, re.MULTILINE)}
    sources = len(MODELS) + 1
    expected = {
        "convert": GRIDS * SHARDS,
        "chunk": GRIDS * SHARDS,
        "ceiling": GRIDS * SHARDS,
        "quality": GRIDS,
        "network_check": len(MODELS),
        "train": len(MODELS) * FOLDS,
        "predict": len(MODELS) * FOLDS * (1 + 4),
        "ensemble": FOLDS + 1,
        "tune": sources,
        "segment": sources * FOLDS + 1,
        "evaluate": sources * FOLDS,
        "submission": 1,
    }
    assert {rule: jobs.get(rule) for rule in expected} == expected
    # the rest are pages and lists: they grow with the models at most, never with folds times models
    assert sum(expected.values()) < jobs["total"] < sum(expected.values()) + 6 * len(MODELS)
    assert cpu < CPU_SECONDS


def test_plan_counts_the_jobs_that_snakemake_does(challenge: Path) -> None:
    done = snakemake(challenge, "plan", "--quiet", "all")
    assert done.returncode == 0, done.stdout + done.stderr
    with (challenge / "results/plan.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    planned: dict[str, int] = {}
    for row in rows:
        rule = row["rule"].split(" ")[0]
        planned[rule] = planned.get(rule, 0) + int(row["jobs"])
    result = snakemake(challenge, "-n", "--quiet", "rules")
    table = (result.stdout + result.stderr).split("Job stats:")[-1]
    jobs = {rule: int(count) for rule, count in re.findall(r"^([a-z_0-9]+) +(\d+)$", table, re.MULTILINE)}
    assert planned == {rule: jobs[rule] for rule in planned}
    train = next(row for row in rows if (row["rule"], row["model"]) == ("train", "swinunetr"))
    assert (train["jobs"], train["left"]) == ("5", "5")
    assert "network_checks" in done.stdout


@needs_manifests
def test_every_crop_of_the_challenge_is_listed(challenge: Path) -> None:
    """289 crops of 48 classes; their data are not here, so each is one that is told as missing when it is converted."""
    done = snakemake(challenge, "results/crops.csv", "results/folds.csv", "--quiet", "all")
    assert done.returncode == 0, done.stdout + done.stderr
    with (challenge / "results/crops.csv").open(newline="") as stream:
        crops = list(csv.DictReader(stream))
    assert len(crops) == 289
    with (challenge / "results/folds.csv").open(newline="") as stream:
        folds = list(csv.DictReader(stream))
    assert len(folds) == 289
    assert {row["fold"] for row in folds} == {str(fold) for fold in range(FOLDS)}
