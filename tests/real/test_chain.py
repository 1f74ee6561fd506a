"""The whole workflow on real volume EM: verdicts, voxel counts, and a network that beats any intensity threshold."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cellmap_pipe.prepare.convert import read_nifti
from cellmap_pipe.prepare.labels import PRESENT, UNKNOWN
from cellmap_pipe.prepare.state_table import decode_table

ROOT = Path(__file__).parents[2]
REAL_EM = ROOT.parent / "shared" / "data" / "real-em"

pytestmark = pytest.mark.skipif(not REAL_EM.is_dir(), reason=f"real EM is missing: {REAL_EM}")

TRAINED, VALIDATED = "fly_medulla-2/crop101", "fly_medulla-2/crop102"

CONFIG = {
    "data": {"root": str(REAL_EM)},
    "classes": ["pm", "mito", "cyto", "nuc"],
    "grids": {"8nm": None, "32nm": None, "10nm": {"voxel_nm": [10, 10, 10]}},
    "grid": "10nm",
    "max_upsample": 5,
    "shards": 2,
    "models": ["segresnet_ds"],
    "folds": {"n": 1, "run": [0], "margin_nm": 0, "datasplit": "datasplit.csv"},
    "chunks": {"context_nm": 0},
    "segment": {"derive": []},
    "overrides": {
        "segresnet_ds": {
            "arguments": {"init_filters": 12, "blocks_down": [1, 1, 2], "dsdepth": 2},
            "train": {
                "patch": [48, 48, 48],
                "batch": 2,
                "lr": 2.0e-3,
                "max_steps": 400,
                "steps_per_epoch": 50,
                "validate_every": 4,
                "deep_supervision": [1, 0.5],
            },
            "resources": {
                "train": {"gpus": 0, "threads": 2, "mem_mb": 4000, "runtime_min": 30},
                "predict": {"gpus": 0, "threads": 2, "mem_mb": 4000, "runtime_min": 30},
            },
        }
    },
}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a finished `snakemake all` on the real EM."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "config.json").write_text(json.dumps(CONFIG))  # JSON is YAML
    labels = "{dataset}.zarr/recon-1/labels/groundtruth"
    rows = [("train", TRAINED), ("validate", VALIDATED)]
    with (folder / "datasplit.csv").open("w", newline="") as stream:
        for side, crop in rows:
            dataset, name = crop.split("/")
            raw = REAL_EM / dataset / f"{dataset}.zarr"
            label = REAL_EM / dataset / labels.format(dataset=dataset) / name / "[pm,mito,cyto,nuc]"
            csv.writer(stream).writerow([side, raw, "recon-1/em/fibsem-uint8", label, ""])
    command = [sys.executable, "-m", "snakemake", "all", "--cores", "2", "--directory", str(folder)]
    command += ["--snakefile", str(ROOT / "workflow" / "Snakefile"), "--configfile", str(folder / "config.json")]
    command += ["--rerun-triggers", "mtime", "params", "input"]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return folder


@pytest.fixture(scope="session")
def expected() -> dict[str, dict]:
    return json.loads((REAL_EM / "expected.json").read_text())


@pytest.fixture(scope="session")
def records(run: Path) -> dict[str, dict]:
    shards = sorted((run / "results" / "convert" / "10nm").glob("shard*.json"))
    return {record["crop"]: record for path in shards for record in json.loads(path.read_text())["records"]}


def test_every_crop_gets_the_verdict_that_its_description_asks_for(run: Path, expected: dict) -> None:
    with (run / "results" / "quality" / "10nm" / "crops.csv").open() as stream:
        verdicts = {row["crop"]: row for row in csv.DictReader(stream)}
    assert set(verdicts) == set(expected)
    told = {crop: entry["verdict"] for crop, entry in expected.items()}
    assert {crop: row["verdict"] for crop, row in verdicts.items()} == told
    assert verdicts["fly_medulla-3/crop303"]["cause"] == "EM not downloaded"
    assert verdicts["fly_medulla-3/crop304"]["cause"] == "unannotated"
    # the description says that these labels were rolled by (30, 45, 38) voxels; their outlines are rough to a voxel
    cause = verdicts["fly_medulla-3/crop305"]["cause"]
    measured = [int(number) for number in re.findall(r"[+-]\d+", cause)]
    assert cause.startswith("misregistered") and np.abs(np.subtract(measured, (30, 45, 38))).max() <= 1


def test_stored_voxels_are_counted_by_state_as_described(records: dict, expected: dict) -> None:
    for crop, entry in expected.items():
        states = ("present", "absent", "unknown")
        told = {name: {state: counts[state] for state in states} for name, counts in entry["classes"].items()}
        assert records[crop]["source_counts"] == told, crop


def test_voxels_beyond_the_em_are_unknown(records: dict) -> None:
    record = records["fly_medulla-1/crop203"]
    beyond = 20 / 140
    assert record["em_inside_fraction"] == pytest.approx(1 - beyond, abs=1e-3)
    assert record["counts"]["mito"]["unknown"] == pytest.approx(beyond * 128 * 120 * 140, rel=1e-3)


def test_a_class_without_an_array_is_unknown_except_where_another_excludes_it(records: dict) -> None:
    record = records["fly_medulla-1/crop201"]  # mito alone is annotated
    present = record["counts"]["mito"]["present"]
    assert record["counts"]["nuc"] == {"present": 0, "absent": present, "unknown": 128 * 247 * 125 - present}


def test_a_short_training_beats_the_best_intensity_threshold_by_far(run: Path, records: dict) -> None:
    trained = json.loads((run / "results" / "train" / "segresnet_ds" / "fold0" / "metrics.json").read_text())
    best = threshold_dice(run, records[VALIDATED], "pm")
    print(f"\npm on {VALIDATED}: network {trained['dice']['pm']:.3f}, best intensity threshold {best:.3f}")
    assert best == pytest.approx(0.61, abs=0.02)
    assert trained["dice"]["pm"] >= best + 0.08


def test_scores_come_from_the_native_labels_and_name_their_rules(run: Path) -> None:
    scores = json.loads((run / "results" / "scores" / "segresnet_ds" / "fold0.json").read_text())
    assert scores["rules"] == "csc-2026.06"
    record = next(entry for entry in scores["records"] if entry["label"] == "pm")
    assert record["crop"] == VALIDATED
    assert record["tp"] + record["fn"] == 5618528, "pm is scored on its own 5 nm grid, every present voxel once"
    assert record["dice"] >= 0.68


def threshold_dice(run: Path, record: dict, name: str) -> float:
    """Return the best Dice of any single-intensity threshold, either way round, over the known voxels of a crop."""
    folder = run / "results" / "nifti" / "10nm"
    image = read_nifti(folder / record["files"]["image"]["path"])
    rows = read_nifti(folder / record["files"]["label"]["path"])
    states = decode_table(record["table"], len(record["classes"]))[:, record["classes"].index(name)][rows]
    inside = np.bincount(image[states == PRESENT], minlength=256).cumsum()
    known = np.bincount(image[states != UNKNOWN], minlength=256).cumsum()
    darker = 2 * inside / (known + inside[-1])
    brighter = 2 * (inside[-1] - inside) / (known[-1] - known + inside[-1])
    return float(max(darker.max(), brighter.max()))
