"""The demo from beginning to end: what it makes, what it costs, and that a second run finds nothing to do."""

import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

sys.path.insert(0, str(Path(__file__).parent))

from demo_run import MODELS, snakemake


def scores(demo: Path, source: str) -> dict:
    return json.loads((demo / "results" / "scores" / source / "fold0.json").read_text())


def test_it_stays_within_its_budget(demo):
    if os.environ.get("CELLMAP_DEMO"):
        pytest.skip("CELLMAP_DEMO was run elsewhere")
    spent = int((demo / "cpu_seconds.txt").read_text())
    print(f"the demo took {spent} CPU-seconds")
    assert spent <= 720


def test_crops_that_cannot_be_trusted_are_left_out_with_their_cause(demo):
    with (demo / "results/quality/16nm/crops.csv").open() as stream:
        rows = {row["crop"]: row for row in csv.DictReader(stream)}
    verdicts = {crop: (row["verdict"], row["cause"]) for crop, row in rows.items() if row["verdict"] != "keep"}
    displaced, rescaled = verdicts.pop("phantom-2/crop206"), verdicts.pop("phantom-3/crop305")
    assert verdicts == {
        "phantom-1/crop106": ("reject", "blank EM"),
        "phantom-2/crop205": ("reject", "unannotated"),
        "phantom-3/crop304": ("reject", "EM not downloaded"),
    }
    assert displaced[0] == rescaled[0] == "flag"
    assert displaced[1].startswith("misregistered") and rescaled[1].startswith("resolution mismatch")
    used = [row for row in rows.values() if row["verdict"] == "keep"]
    assert len(used) >= 8
    assert len({row["dataset"] for row in used}) == 3


def test_damaged_crops_are_recorded_and_the_others_go_on(demo, tmp_path):
    shutil.copytree(demo / "challenge", tmp_path / "challenge")
    crops = tmp_path / "challenge/phantom-1/phantom-1.zarr/recon-1/labels/groundtruth"
    chunk = next(path for path in (crops / "crop101/pm/s0").rglob("*") if path.is_file() and path.name.isdigit())
    chunk.write_bytes(chunk.read_bytes()[:20])
    (crops / "crop102/ecs/.zattrs").unlink()
    level = crops / "crop103/ecs/s0"
    values = zarr.open_array(level, mode="r")[...]
    shutil.rmtree(level)
    zarr.create_array(level, data=values.astype(np.float32), zarr_format=2)
    (tmp_path / "extra.yaml").write_text("data: {phantom: null, truth: null}")
    snakemake(tmp_path, "results/quality/16nm/crops.csv", extra=tmp_path / "extra.yaml")
    with (tmp_path / "results/quality/16nm/crops.csv").open() as stream:
        rows = {row["crop"]: row for row in csv.DictReader(stream)}
    causes = {crop: rows[f"phantom-1/{crop}"]["cause"] for crop in ("crop101", "crop102", "crop103")}
    assert "damaged chunk" in causes["crop101"] and "pm/s0" in causes["crop101"]
    assert "ecs" in causes["crop102"] and ".zattrs" in causes["crop102"]
    assert "labels of dtype float32" in causes["crop103"]
    assert {row["verdict"] for crop, row in rows.items() if crop.endswith(("201", "202", "301", "302"))} == {"keep"}
    assert not list(tmp_path.rglob(".partial-*"))


def test_no_crop_is_on_both_sides(demo):
    datalist = json.loads((demo / "results/datalist/16nm/fold0.json").read_text())
    training, validation = ({entry["crop"] for entry in datalist[side]} for side in ("training", "validation"))
    assert training and validation
    assert not training & validation


def test_the_networks_learn(demo):
    dice = {model: scores(demo, model)["mean_dice"] for model in MODELS}
    untrained = [
        json.loads((demo / f"results/train/{model}/fold0/metrics.json").read_text())["untrained_mean_dice"]
        for model in MODELS
    ]
    print(f"mean Dice {dice}, untrained {untrained}")
    assert max(dice.values()) >= 0.35
    assert min(dice.values()) > 2 * max(untrained)


def test_the_scores_are_above_those_of_an_empty_answer(demo):
    best = max((scores(demo, source) for source in (*MODELS, "ensemble")), key=lambda entry: entry["mean_dice"])
    assert best["aggregate"]["overall_semantic_score"] > best["background"]["overall_semantic_score"] + 0.1
    assert best["clean"]["overall_score"] > best["background"]["overall_score"]


def test_the_table_compares_models_and_ensemble(demo):
    with (demo / "results/report/scores.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["source"] for row in rows} == {*MODELS, "ensemble"}
    assert {f"{float(row['ceiling']):.3f}" for row in rows if row["ceiling"]} == {"0.410"}


def test_the_submission_answers_every_row_and_can_be_scored(demo):
    report = json.loads((demo / "results/submission/report.json").read_text())
    with (demo / "challenge/test_crop_manifest.csv").open() as stream:
        assert report["rows"] == len(list(csv.DictReader(stream)))
    result = json.loads((demo / "results/submission/scores.json").read_text())
    print(f"test volumes: overall {result['overall_score']:.3f}, semantic {result['overall_semantic_score']:.3f}")
    assert result["num_evals_done"] == result["total_evals"] == report["rows"]
    assert result["overall_semantic_score"] > 0.1


def test_the_submissions_score_is_forecast_for_every_class_that_is_asked_for(demo):
    forecast = json.loads((demo / "results/submission/forecast.json").read_text())
    with (demo / "challenge/test_crop_manifest.csv").open() as stream:
        assert set(forecast["label_scores"]) == {row["class_label"] for row in csv.DictReader(stream)}
    assert 0 < forecast["low"] <= forecast["score"] <= forecast["high"] <= 1
    assert forecast["rules"] == "csc-2026.06" and not forecast["unanswered"]
    page = (demo / "results/submission/report.html").read_text()
    assert f"{forecast['score']:.3f} ({forecast['low']:.3f} to {forecast['high']:.3f})" in page


def test_scores_by_both_rules_are_in_every_result(demo):
    for path in [*(demo / "results/scores").glob("*/fold0.json"), demo / "results/submission/scores.json"]:
        content = json.loads(path.read_text())
        assert (content["rules"], content["provisional"]) == ("csc-2026.06", False)
        assert content["clean"]["overall_score"] > 0
        assert "differs" in content and "portal" in content["note"]


def test_the_report_is_one_file_with_every_figure(demo):
    text = (demo / "report.html").read_text()
    for name in (
        "quality_16nm.html",
        "audit_16nm.html",
        "ceiling_16nm.html",
        "splits.html",
        "training.html",
        "training.svg",
        "training_usage.svg",
        "scores.html",
        "crop_scores.csv",
        "comparison.html",
        "comparison.csv",
        "ranking.csv",
        "differences.svg",
        "ensemble_gain.svg",
        "equal_budget.svg",
        "examples_ensemble.html",
        "provenance.html",
        "tuning.html",
        "plan_models.csv",
        "predictions_fold0.png",
    ):
        assert name in text


def test_a_second_run_finds_nothing_to_do(demo):
    assert "Nothing to be done" in snakemake(demo, "all")


@pytest.mark.parametrize("change", ["models: [unet_3d]", 'overrides: {"*": {predict: {tta: 4}}}'])
def test_what_the_submission_is_made_of_follows_a_change_in_one_run(demo, tmp_path, change):
    (tmp_path / "extra.yaml").write_text(change)
    said = snakemake(demo, "all", "-n", extra=tmp_path / "extra.yaml")
    made = {name for line in re.findall(r"output: (.+)", said) for name in line.split(", ")}
    assert {"results/ensemble/test/foldall.json", "results/submission/submission.zip"} <= made
    assert "results/predict/unet_3d/fold0/test/shard0.json" in made


def test_the_files_are_what_the_results_say(demo):
    snakemake(demo, "verify")
    assert "contracts agree with the disk" in (demo / "logs/verify.log").read_text()


def test_declared_results_are_small_and_nothing_partial_is_left(demo):
    declared = [path for path in (demo / "results").rglob("*.json") if ".zarr" not in str(path)]
    assert max(path.stat().st_size for path in declared) < 1_000_000
    assert not list(demo.rglob(".partial-*"))


@pytest.mark.parametrize(
    ("change", "first", "untouched"),
    [
        ("revisions: {segment: 1}", "segment", "predict"),
        ("revisions: {tune: 1}", "tune", "predict"),
        ("segment: {thresholds: {pm: 0.4}}", "tune", "predict"),
        ("overrides: {unet_3d: {train: {lr: 0.01}}}", "train", "chunk"),
        ("quality: {min_std: 3}", "quality", "convert"),
        ("overrides: {unet_3d: {predict: {batch: 1}}}", "predict", "train"),
    ],
)
def test_a_change_does_again_only_what_depends_on_it(demo, change, first, untouched):
    (demo / "change.yaml").write_text(change)
    plan = snakemake(demo, "all", "-n", "--quiet", "rules", extra=demo / "change.yaml")
    jobs = plan.split("Job stats:")[1].split("total")[0]
    assert re.search(rf"^{first} ", jobs, re.MULTILINE)
    assert not re.search(rf"^{untouched} ", jobs, re.MULTILINE)


def test_a_change_of_resources_does_nothing_again(demo):
    (demo / "change.yaml").write_text("overrides: {'*': {resources: {train: {gpus: 1, threads: 2, gpu_gb: 24}}}}")
    assert "Nothing to be done" in snakemake(demo, "all", "-n", extra=demo / "change.yaml")


def test_a_new_crop_is_never_overlooked(demo):
    folder = demo / "challenge/phantom-1/phantom-1.zarr/recon-1/labels/groundtruth/crop199/ecs"
    folder.mkdir(parents=True)
    try:
        assert "rule crops" in snakemake(demo, "results/crops.csv", "-n")
    finally:
        shutil.rmtree(folder.parent)


def test_fetched_crops_are_judged_like_those_at_the_source(demo, tmp_path):
    (tmp_path / "crops.csv").write_text("crop\nphantom-1/crop101\nphantom-2/crop203\nphantom-2/crop206\n")
    extra = tmp_path / "extra.yaml"
    extra.write_text(
        f"data: {{root: fetched, crops: crops.csv, volumes: null, truth: null, phantom: null}}\n"
        f"fetch: {{source: {demo / 'challenge'}, options: {{}}}}\n"
    )
    assert re.search(r"^total +3 ", snakemake(tmp_path, "fetch_plan", extra=extra), re.MULTILINE)
    snakemake(tmp_path, "fetch", extra=extra)
    assert "Nothing to be done" in snakemake(tmp_path, "fetch", extra=extra)
    snakemake(tmp_path, "results/quality/16nm/crops.csv", extra=extra)
    found, expected = (
        {row["crop"]: row for row in csv.DictReader((folder / "results/quality/16nm/crops.csv").open())}
        for folder in (tmp_path, demo)
    )
    assert found == {crop: expected[crop] for crop in found} and len(found) == 3
    chunk = next(path for path in (tmp_path / "fetched/phantom-1").rglob("s0/1/0/0"))
    chunk.unlink()
    with pytest.raises(AssertionError):
        snakemake(tmp_path, "verify", extra=extra)
    array = chunk.relative_to(tmp_path / "fetched").parents[2]
    assert f"{array}: 1 of 4 chunks are missing here, first 1/0/0" in (tmp_path / "logs/verify.log").read_text()


def test_the_crops_can_be_exported_for_nnunet(demo):
    snakemake(demo, "export_nnunet")
    folder = demo / "results/nnunet/raw/Dataset801_16nm"
    description = json.loads((folder / "dataset.json").read_text())
    assert len(list((folder / "labelsTr").glob("*.nii.gz"))) == description["numTraining"] >= 8
    assert max(description["labels"].values()) == description["labels"]["ignore"]


def test_a_store_cut_into_blocks_holds_the_same_and_trains_nothing_again(demo, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(demo, folder, symlinks=True)
    cut = tmp_path / "cut.yaml"
    cut.write_text("chunks: {memory_gb: 0.001}\n")
    before = [path.stat().st_mtime_ns for path in sorted(folder.glob("runs/*/fold0/step*.pt"))]
    said = snakemake(folder, "train_segresnet_ds", extra=cut)
    assert "results/chunks/16nm/shard0.json" in said
    records = json.loads((folder / "results/chunks/16nm/index.json").read_text())["crops"]
    assert {record["layout"] for record in records} == {"blocked"}
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("runs/*/fold0/step*.pt"))] == before
    weights = "results/train/segresnet_ds/fold0/model.pt"
    assert (folder / weights).read_bytes() == (demo / weights).read_bytes()
    snakemake(folder, "verify", extra=cut)
