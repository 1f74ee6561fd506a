"""What a run will take is told before anything is queued, and what cannot fit is refused."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cellmap_pipe.cluster.plan import COLUMNS, CORE_TFLOPS, EFFICIENCY, GPUS, Plan, Row, as_text, plan_run, write_plan
from cellmap_pipe.config import Config, load_config, merged
from cellmap_pipe.errors import ConfigError
from cellmap_pipe.training.usage import UsageLog

ROOT = Path(__file__).parents[2]
JOB = {"gpus": 2, "cores": 16, "memory_gb": 96.0, "walltime_h": 96.0, "gpu_model": "l40s"}
GFLOP = 4000.0  # of a forward pass over a batch


def config(**over: Any) -> Config:
    values = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    over = {"models": ["unet_3d"], "folds": {"run": [0, 1]}, **over}
    return load_config(merged(values, over), schemas=ROOT / "workflow/schemas", models=ROOT / "config/models")


def write_network(folder: Path, settings: Config, name: str = "unet_3d", **over: Any) -> dict[str, Any]:
    """Write what the network check of a model leaves."""
    model = settings.model(name)
    found = {
        "network": model.network,
        "patch": list(model.train["patch"]),
        "batch": model.train["batch"],
        "precision": "bf16",
        "forward_gflop": GFLOP,
        "memory_gb": {"weights": 0.1, "average": 0.1, "optimizer": 0.2, "total": 20.0},
        **over,
    }
    path = folder / f"results/networks/{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


def write_table(folder: Path, *rows: dict[str, Any], grid: str = "8nm") -> None:
    """Write a quality table of crops."""
    usual = {"verdict": "keep", "cause": "", "shape": "200;200;200", "train_mb": 50.0, "predict_mb": 300.0}
    path = folder / f"results/quality/{grid}/crops.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["crop", *usual])
        writer.writeheader()
        writer.writerows({"crop": f"set/crop{number}", **usual, **row} for number, row in enumerate(rows))


def row_of(plan: Plan, rule: str, model: str = "") -> Row:
    (row,) = [row for row in plan.rows if (row.rule, row.model) == (rule, model)]
    return row


def test_jobs_are_counted_from_the_configuration_alone(tmp_path: Path) -> None:
    plan = plan_run(config(), tmp_path)
    assert (row_of(plan, "convert").jobs, row_of(plan, "train", "unet_3d").jobs) == (16, 2)
    assert row_of(plan, "train", "unet_3d").gpus == config().model("unet_3d").training_job.gpus
    assert not plan.faults
    text = as_text(plan)
    assert "no results/networks/unet_3d.json yet" in text
    assert "`snakemake network_checks` tells what training takes of unet_3d" in text
    assert "no quality table yet of 8nm" in text


def test_hours_follow_from_flops_and_the_gpu_of_the_profile(tmp_path: Path) -> None:
    settings = config(overrides={"unet_3d": {"train": {"max_steps": 36000, "accumulate": 2}}})
    write_network(tmp_path, settings)
    asked = {"train:unet_3d": JOB, "predict:unet_3d": {**JOB, "gpus": 1}}
    row = row_of(plan_run(settings, tmp_path, asked=asked, retries=2), "train", "unet_3d")
    hours = 36000 * 2 * 3 * GFLOP / 1e3 / (GPUS["l40s"][0] * EFFICIENCY) / 3600
    assert row.hours_each == pytest.approx(hours)
    assert row.gpu_hours == pytest.approx(2 * 2 * hours)  # two folds on two GPUs each
    assert row.cpu_hours == pytest.approx(2 * 16 * hours)
    assert row.basis == "FLOPs on L40S"
    faster = {name: {**job, "gpu_model": "h100"} for name, job in asked.items()}
    again = row_of(plan_run(settings, tmp_path, asked=faster, retries=2), "train", "unet_3d")
    assert again.hours_each == pytest.approx(hours * GPUS["l40s"][0] / GPUS["h100"][0])


def test_validations_cost_the_passes_over_the_folds_crops(tmp_path: Path) -> None:
    settings = config(overrides={"unet_3d": {"train": {"max_steps": 1000, "patch": [96, 96, 96]}}})
    network = write_network(tmp_path, settings)
    asked = {"train:unet_3d": JOB, "predict:unet_3d": {**JOB, "gpus": 1}}
    without = row_of(plan_run(settings, tmp_path, asked=asked, retries=0), "train", "unet_3d").hours_each
    write_table(tmp_path, {"shape": "96;97;192"}, {"shape": "96;96;96", "verdict": "reject"})
    model = settings.model("unet_3d").train
    found = row_of(plan_run(settings, tmp_path, asked=asked, retries=0), "train", "unet_3d").hours_each
    passes = 1000 / (model["steps_per_epoch"] * model["validate_every"]) * 4 / settings.folds.n
    work = passes * GFLOP / network["batch"] / 1e3 / 2  # two processes share the tiles
    assert without is not None
    assert found == pytest.approx(without + work / (GPUS["l40s"][0] * EFFICIENCY) / 3600)


def test_measured_speed_wins_and_counts_from_where_the_training_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(overrides={"unet_3d": {"train": {"max_steps": 1000}}})
    write_network(tmp_path, settings)
    run_dir = tmp_path / "runs/unet_3d/fold1"
    run_dir.mkdir(parents=True)
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    usage = UsageLog(run_dir, 2, "NVIDIA L40S")
    for step, seconds in ((0, 500.0), (400, 400.0), (400, 100.0)):  # the start is no measure of steps, validations are
        clock[0] += seconds
        usage.count(step and 400 - (seconds == 100) * 400, 0, seconds, 0.0)
        usage.write(step)
    monkeypatch.undo()
    asked = {"train:unet_3d": JOB, "predict:unet_3d": {**JOB, "gpus": 1}}
    row = row_of(plan_run(settings, tmp_path, asked=asked, retries=0), "train", "unet_3d")
    assert row.basis == "measured over 400 steps on NVIDIA L40S"
    each = 500 / 400 / 3600
    assert row.hours_each == pytest.approx(1000 * each)  # of the fold that has not begun
    assert row.gpu_hours == pytest.approx(2 * (1000 + 600) * each)
    other = {"train:unet_3d": {**JOB, "gpus": 4}, "predict:unet_3d": JOB}
    assert row_of(plan_run(settings, tmp_path, asked=other), "train", "unet_3d").basis == "FLOPs on L40S"


def test_what_is_done_is_not_counted_again(tmp_path: Path) -> None:
    settings = config()
    write_network(tmp_path, settings)
    for fold in (0, 1):
        path = tmp_path / f"results/train/unet_3d/fold{fold}/model.pt"
        path.parent.mkdir(parents=True)
        path.touch()
    row = row_of(plan_run(settings, tmp_path), "train", "unet_3d")
    assert (row.jobs, row.left, row.gpu_hours, row.disk_gb) == (2, 0, None, 0.0)
    assert row_of(plan_run(settings, tmp_path), "network_check").left == 0


def test_cpu_trainings_are_planned_by_their_cores(tmp_path: Path) -> None:
    settings = config(overrides={"unet_3d": {"train": {"max_steps": 10, "accumulate": 1}}})
    write_network(tmp_path, settings)
    asked = {"train:unet_3d": {**JOB, "gpus": 0, "cores": 8}, "predict:unet_3d": {**JOB, "gpus": 0}}
    row = row_of(plan_run(settings, tmp_path, asked=asked, retries=0), "train", "unet_3d")
    assert row.gpu_hours is None
    assert row.hours_each == pytest.approx(10 * 3 * GFLOP / 1e3 / (8 * CORE_TFLOPS) / 3600)


def test_plan_is_written_with_all_its_columns(tmp_path: Path) -> None:
    plan = plan_run(config(), tmp_path)
    assert write_plan(tmp_path / "plan.csv", plan) == as_text(plan)
    with (tmp_path / "plan.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == COLUMNS
    assert [row["rule"] for row in rows] == [row.rule for row in plan.rows]


def slow(settings: Config, folder: Path) -> dict[str, Any]:
    write_network(folder, settings, forward_gflop=1e6)
    return {}


def memory_of_gpu(settings: Config, folder: Path) -> dict[str, Any]:
    write_network(folder, settings, memory_gb={"weights": 0.1, "average": 0.1, "optimizer": 0.2, "total": 50.0})
    return {"resources": {"train": {"gpu_gb": 48}}}


def large_crop(settings: Config, folder: Path) -> dict[str, Any]:
    write_table(folder, {}, {"predict_mb": 500_000.0})
    return {}


def full_disk(settings: Config, folder: Path) -> dict[str, Any]:
    write_network(folder, settings, memory_gb={"weights": 1e6, "average": 0, "optimizer": 0, "total": 1.0})
    return {}


def large_batch(settings: Config, folder: Path) -> dict[str, Any]:
    return {"overrides": {"unet_3d": {"train": {"batch": 20000}}}}


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (
            slow,
            r"model unet_3d: a training takes about .* h \(FLOPs on L40S\) and a job's walltime is 96 h, in 3 attempts",
        ),
        (memory_of_gpu, r"model unet_3d: training needs about 50 GB on a GPU, resources.train.gpu_gb is 48; lower"),
        (large_crop, r"model unet_3d: set/crop1 takes 500 GB to predict and the job has 48 GB \(144 GB in the last"),
        (full_disk, r"GB will be written and .* GB are free; make room"),
        (
            large_batch,
            r"training processes with batches of 20000 patches take at least .* raise resources.train.mem_mb",
        ),
    ],
)
def test_what_cannot_fit_is_refused(
    tmp_path: Path, prepare: Callable[[Config, Path], dict[str, Any]], said: str
) -> None:
    settings = config(**prepare(config(), tmp_path))
    asked = {"train:unet_3d": JOB, "predict:unet_3d": {**JOB, "gpus": 1, "memory_gb": 48.0}}
    plan = plan_run(settings, tmp_path, asked=asked, retries=2)
    assert len(plan.faults) == 1, plan.faults
    with pytest.raises(ConfigError, match=said):
        plan.check()
    assert f"cannot fit: {plan.faults[0]}" in as_text(plan)


def test_walltime_that_one_attempt_exceeds_is_only_told_where_retries_are_not_known(tmp_path: Path) -> None:
    settings = config()
    write_network(tmp_path, settings, forward_gflop=1e6)
    plan = plan_run(settings, tmp_path)
    assert not plan.faults
    assert any("it needs" in text and "attempts" in text for text in plan.warnings)


def test_crop_that_only_a_later_attempt_has_memory_for_is_a_warning(tmp_path: Path) -> None:
    settings = config()
    write_table(tmp_path, {"predict_mb": 60_000.0})
    plan = plan_run(settings, tmp_path, retries=1)
    plan.check()
    assert any(
        "set/crop0 takes 60 GB to predict, more than the first attempt's 48 GB" in text for text in plan.warnings
    )


def test_check_of_another_network_is_not_counted(tmp_path: Path) -> None:
    settings = config()
    write_network(tmp_path, settings, patch=[8, 8, 8])
    assert "no results/networks" in row_of(plan_run(settings, tmp_path), "train", "unet_3d").basis


def test_tables_that_another_version_wrote_or_a_crash_tore_count_as_missing(tmp_path: Path) -> None:
    settings = config()
    network = write_network(tmp_path, settings)
    write_table(tmp_path, {})
    assert row_of(plan_run(settings, tmp_path), "train", "unet_3d").basis.startswith("FLOPs")
    table = tmp_path / "results/quality/8nm/crops.csv"
    for content in (b"crop,verdict\nset/crop0,keep\n", b"\xff\0" * 100_000):
        table.write_bytes(content)
        assert any("no quality table yet" in note for note in plan_run(settings, tmp_path).notes)
    del network["forward_gflop"]
    (tmp_path / "results/networks/unet_3d.json").write_text(json.dumps(network))
    assert row_of(plan_run(settings, tmp_path), "train", "unet_3d").basis.startswith("unknown: no results/networks/")
