"""The demo with a second, coarser grid: which grid answers what, and that all of it comes together in the results.

The finished demo goes on with one of its models, a grid of 32 nm with a model of two classes, and a coarse volume to
segment. Each grid then answers a part of that volume, and of the demo's one coarse crop.
"""

import csv
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import zarr

sys.path.insert(0, str(Path(__file__).parent))

from demo_run import snakemake

from cellmap_pipe.evaluation.paired import kinds_score
from cellmap_pipe.phantom.challenge import EVERYTHING

FINE, COARSE = "unet_3d", "segresnet_32nm"
MODELS = {"16nm": FINE, "32nm": COARSE}
# What the coarse model knows; mito of the coarse crop is left to the fine model.
COARSE_CLASSES = ("ecs", "nuc")
COARSE_CROP = "phantom-2/crop204"
FINE_CROPS = ("phantom-1/crop102", "phantom-3/crop301", "phantom-3/crop303")

# The coarse crop is validated at 32 nm and no longer at 16 nm, for which the demo's model trains anew: a few steps do.
SETTINGS = """
data: {volumes: volumes.csv}
grids: {32nm: {voxel_nm: [32, 32, 32]}}
models: [unet_3d, segresnet_32nm]
overrides:
  "*": {train: {max_steps: 20}, predict: {overlap: 0.25}}
  segresnet_32nm:
    classes: [ecs, nuc]
    arguments: {init_filters: 8, blocks_down: [1, 2, 2], dsdepth: 2}
    train: {lr: 3.0e-3, deep_supervision: [1, 0.5], max_steps: 40}
"""
ONE_MORE = SETTINGS.replace("[unet_3d, segresnet_32nm]", "[unet_3d, segresnet_32nm, resnet_3d]")
ONE_MORE += "  resnet_3d: {grid: 32nm}\n"


def add_coarse_volume(demo: Path) -> None:
    """Ask for three classes of crop901 again, as crop903 on every second voxel; their truth is known, too."""
    with (demo / "challenge/test_crop_manifest.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    coarse = {"crop_name": "903", "voxel_size": "[32.0;32.0;32.0]", "shape": "[36;36;36]"}
    asked = (*COARSE_CLASSES, "mito")
    added = [{**row, **coarse} for row in rows if row["crop_name"] == "901" and row["class_label"] in asked]
    with (demo / "volumes.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, *added])
    truth = zarr.open_group(demo / "challenge/truth/test.zarr", mode="r+", zarr_format=2)
    group = truth.create_group("crop903")
    for name in asked:
        fine = truth[f"crop901/{name}"]
        array = group.create_array(name, data=fine[::2, ::2, ::2])
        array.attrs.update({**fine.attrs, "voxel_size": [32.0] * 3, "shape": list(array.shape)})


@pytest.fixture(scope="module")
def both(demo, tmp_path_factory):
    """The working directory of the demo, a copy, after a run with both grids."""
    folder = tmp_path_factory.mktemp("two_grids") / "demo"
    shutil.copytree(demo, folder, symlinks=True)  # with the times of its files, by which Snakemake judges
    add_coarse_volume(folder)
    (folder / "two_grids.yaml").write_text(SETTINGS)
    snakemake(folder, "all", extra=folder / "two_grids.yaml")
    return folder


def read_json(path):
    return json.loads(path.read_text())


def read_csv(path):
    with path.open() as stream:
        return list(csv.DictReader(stream))


def scores(both, source):
    return read_json(both / f"results/scores/{source}/fold0.json")


def labels(both, source):
    """Return the (crop, class) that a source is scored on."""
    return {(record["crop"], record["label"]) for record in scores(both, source)["records"]}


def sides(both, grid):
    """Return the crops that a grid trains on, and those that it is validated on."""
    datalist = read_json(both / f"results/datalist/{grid}/fold0.json")
    return tuple({entry["crop"] for entry in datalist[side]} for side in ("training", "validation"))


def answered_by(record):
    """Return the grids whose models an averaged volume's classes come from, by class."""
    grid_of = {f"{model}/fold0": grid for grid, model in MODELS.items()}
    return {name: {grid_of[member] for member in members} for name, members in record["weights"].items()}


def test_what_was_made_of_the_data_for_the_first_grid_stays(demo, both):
    of_data = ("convert", "ceiling", "chunks", "quality", "nifti")
    folders = [Path("results") / stage / "16nm" for stage in of_data]
    made = [{path.relative_to(demo) for path in (demo / f).rglob("*") if path.is_file()} for f in folders]
    assert all(made)
    paths = set.union(*made)
    again = [str(path) for path in paths if (demo / path).stat().st_mtime_ns != (both / path).stat().st_mtime_ns]
    assert again == []


def test_a_training_on_other_crops_is_begun_anew_and_the_old_one_is_kept(demo, both):
    [old] = both.glob(f"runs/{FINE}/fold0.stale-*")
    before = demo / f"runs/{FINE}/fold0"
    assert {path.name: path.read_bytes() for path in old.glob("step*.pt")} == {
        path.name: path.read_bytes() for path in before.glob("step*.pt")
    }
    assert read_json(both / f"results/train/{FINE}/fold0/metrics.json")["steps"] == 20


def test_each_grid_validates_the_crops_that_it_is_nearest_to(both):
    assert sides(both, "16nm")[1] == set(FINE_CROPS)
    assert sides(both, "32nm")[1] == {COARSE_CROP}


def test_every_kept_crop_of_the_other_folds_trains_on_both_grids_and_none_is_on_both_sides(both):
    folds = {row["crop"]: row["fold"] for row in read_csv(both / "results/folds.csv")}
    validated = set.union(*(sides(both, grid)[1] for grid in MODELS))
    for grid in MODELS:
        verdicts = read_csv(both / f"results/quality/{grid}/crops.csv")
        kept = {row["crop"] for row in verdicts if row["verdict"] == "keep"}
        training = sides(both, grid)[0]
        assert training == {crop for crop in kept if folds[crop] != "0"} and len(training) >= 6
        assert not training & validated


def test_each_class_of_a_crop_is_answered_by_one_grid(both):
    ensemble = read_json(both / "results/ensemble/validation/fold0.json")
    assert ensemble["members"] == sorted(f"{model}/fold0" for model in MODELS.values())
    found = {record["name"]: answered_by(record) for record in ensemble["records"]}
    assert set(found) == {*FINE_CROPS, COARSE_CROP}
    by_coarse = {(crop, name) for crop, grids in found.items() for name, by in grids.items() if by == {"32nm"}}
    assert by_coarse == {(COARSE_CROP, name) for name in COARSE_CLASSES}
    others = [by for crop, grids in found.items() for name, by in grids.items() if (crop, name) not in by_coarse]
    assert others and all(by == {"16nm"} for by in others)
    assert {"mito_mem", "mito_lum"} <= set(found[COARSE_CROP])


def test_the_ensemble_is_scored_on_every_annotated_class_of_every_crop(both):
    annotated = {row["crop"]: row["annotated"].split(";") for row in read_csv(both / "results/crops.csv")}
    expected = {(crop, name) for crop in (*FINE_CROPS, COARSE_CROP) for name in annotated[crop] if name in EVERYTHING}
    assert {(COARSE_CROP, name) for name in ("ecs", "nuc", "mito")} < expected
    assert labels(both, "ensemble") == expected
    result = scores(both, "ensemble")
    assert {record["status"] for record in result["records"]} == {"scored"}
    assert result["not_served"] == [] == result["failed"]
    assert result["aggregate"]["overall_score"] > 0


@pytest.mark.parametrize(
    ("model", "not_served"),
    [
        (FINE, {f"{COARSE_CROP}/{name}" for name in COARSE_CLASSES}),
        (COARSE, {*FINE_CROPS, f"{COARSE_CROP}/mito"}),
    ],
)
def test_a_model_is_scored_on_the_same_labels_but_for_those_that_another_grid_serves(both, model, not_served):
    assert scores(both, model)["not_served"] == sorted(not_served)
    everything = labels(both, "ensemble")
    left = {(crop, name) for crop, name in everything if {crop, f"{crop}/{name}"} & not_served}
    assert labels(both, model) == everything - left
    assert {record["status"] for record in scores(both, model)["records"]} == {"scored"}


def test_sources_are_compared_by_grid_on_the_labels_that_they_share(both):
    ranking = read_csv(both / "results/report/ranking.csv")
    pairs = [row for row in read_csv(both / "results/report/comparison.csv") if row["drawn"] == "crops"]
    pairs = [row for row in pairs if row["rules"] == "csc-2026.06"]
    assert [(row["grid"], {row["first"], row["second"]}) for row in pairs] == [
        (grid, {model, "ensemble"}) for grid, model in MODELS.items()
    ]
    for pair, (grid, model) in zip(pairs, MODELS.items(), strict=True):
        shared = labels(both, model)
        expected = {
            source: kinds_score(
                [entry for entry in scores(both, source)["records"] if (entry["crop"], entry["label"]) in shared]
            )
            for source in (model, "ensemble")
        }
        found = {row["source"]: float(row["score"]) for row in ranking if row["grid"] == grid}
        assert found == pytest.approx(expected, rel=1e-5)
        compared = {pair["first"]: float(pair["score_first"]), pair["second"]: float(pair["score_second"])}
        assert compared == pytest.approx(expected, rel=1e-5)
        assert int(pair["units"]) == len({crop for crop, _ in shared})
    assert {row["grid"] for row in ranking} == set(MODELS)


def test_the_plan_gives_each_class_of_a_volume_the_grid_nearest_to_its_voxels(both):
    rows = read_csv(both / "results/predict/plan.csv")
    grids = {(row["volume"].rpartition("/")[2], row["class"]): row["grid"] for row in rows}
    asked = {(f"crop{row['crop_name']}", row["class_label"]) for row in read_csv(both / "volumes.csv")}
    coarse = {("crop903", name) for name in COARSE_CLASSES}
    assert grids == {key: "32nm" if key in coarse else "16nm" for key in asked}


def test_the_submission_answers_every_row_by_the_grid_of_the_plan(both):
    rows = read_csv(both / "volumes.csv")
    report = read_json(both / "results/submission/report.json")
    assert report["rows"] == len(rows) and report["not_predicted"] == [] == report["problems"]
    with zipfile.ZipFile(both / "results/submission/submission.zip") as archive:
        for row in rows:
            array = json.loads(archive.read(f"crop{row['crop_name']}/{row['class_label']}/.zarray"))
            assert ";".join(map(str, array["shape"])) == row["shape"].strip("[]")
    ensemble = read_json(both / "results/ensemble/test/foldall.json")
    found = {record["name"].rpartition("/")[2]: answered_by(record) for record in ensemble["records"]}
    assert {name: by for name, by in found["crop903"].items() if not name.startswith("mito")} == {
        name: {"32nm"} for name in COARSE_CLASSES
    }
    others = [by for crop in found for name, by in found[crop].items() if crop != "crop903" or name.startswith("mito")]
    assert all(by == {"16nm"} for by in others) and len(found["crop903"]) > len(COARSE_CLASSES)


def test_the_submission_can_be_scored(both):
    rows = read_csv(both / "volumes.csv")
    result = read_json(both / "results/submission/scores.json")
    assert result["num_evals_done"] == result["total_evals"] == len(rows)
    coarse = result["records"]["crop903"]
    assert {name: record["status"] for name, record in coarse.items()} == dict.fromkeys(
        ("ecs", "mito", "nuc"), "scored"
    )


def test_every_number_of_both_grids_is_traced_and_agrees(both):
    content = read_json(both / "results/report/provenance.json")
    assert [check for check in content["checks"] if not check["agrees"]] == []
    assert set(content["sources"]) == {f"{source}/fold0" for source in (FINE, COARSE, "ensemble")}
    trainings = {training["grid"]: training for training in content["trainings"].values()}
    assert {grid: training["model"] for grid, training in trainings.items()} == MODELS
    assert {grid: set(training["validation"]) for grid, training in trainings.items()} == {
        "16nm": set(FINE_CROPS),
        "32nm": {COARSE_CROP},
    }
    said = {(check["of"], check["what"]) for check in content["checks"]}
    for grid, model in MODELS.items():
        assert {
            ("data", f"training store of {grid} is there with the recorded sizes"),
            (f"train-{model}-fold0", "fingerprint of the training"),
            (f"{model}-fold0", "score in ranking.csv is that of the records of all folds"),
            ("submission", f"test, {model}/fold0: weights of the predictions are those of model.pt"),
        } <= said


def test_the_files_of_both_grids_are_what_the_results_say(both):
    snakemake(both, "verify", extra=both / "two_grids.yaml")
    assert "contracts agree with the disk" in (both / "logs/verify.log").read_text()


def test_a_second_run_finds_nothing_to_do(both):
    assert "Nothing to be done" in snakemake(both, "all", extra=both / "two_grids.yaml")


def test_one_more_model_of_the_coarse_grid_trains_no_other(both, tmp_path):
    (tmp_path / "more.yaml").write_text(ONE_MORE)
    said = snakemake(both, "all", "-n", extra=tmp_path / "more.yaml")
    made = {name for line in re.findall(r"output: (.+)", said) for name in line.split(", ")}
    assert {name for name in made if name.endswith("/model.pt")} == {"results/train/resnet_3d/fold0/model.pt"}
    assert not [name for name in made if name.startswith(("results/convert/", "results/chunks/"))]
    assert "results/submission/submission.zip" in made


@pytest.mark.parametrize("name", ["ceiling_32nm", "comparison", "provenance", "scores", "splits"])
def test_every_page_of_two_grids_stands_alone_and_works(both, browser, name):
    browser.check_page(both / f"results/report/{name}.html")
