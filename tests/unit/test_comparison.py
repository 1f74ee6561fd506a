"""The pages of trainings and of their comparison: numbers as measured, ties as ties, costs and equal budgets."""

import csv
import json
import re

import numpy as np
import pytest

from cellmap_pipe.colours import SERIES
from cellmap_pipe.errors import ContractError
from cellmap_pipe.evaluation.challenge import aggregate
from cellmap_pipe.evaluation.paired import NOT_SHOWN, SHOWN, TOO_FEW
from cellmap_pipe.report.comparison import RANKING_COLUMNS, write_comparison
from cellmap_pipe.report.figures import _styles, budgets, differences, ensemble_gain, training_usage
from cellmap_pipe.report.tables import read_csv, write_scores
from cellmap_pipe.report.training import RUN_COLUMNS, equal_budget, reached, read_runs, write_training
from cellmap_pipe.training.usage import COLUMNS as USAGE_COLUMNS

GPU = "NVIDIA L40S"


def usage_csv(run_dir, attempts, device=GPU, processes=2):
    """attempts: the lines of each as (step, seconds, steps, waiting)."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = [",".join(USAGE_COLUMNS)]
    for number, attempt in enumerate(attempts):
        began = f"2026-11-0{number + 1}T00:00:00Z"
        for step, seconds, steps, waiting in attempt:
            memory = ("5.5", "30.25" if device != "cpu" else "")
            cells = [f"{number:08x}", began, began, step, seconds, steps, 4 * steps, waiting, *memory]
            lines.append(",".join(map(str, [*cells, processes, device, "g1801", 7 + number])))
    (run_dir / "usage.csv").write_text("\n".join(lines) + "\n")
    return run_dir


# of 1200 GPU seconds in 300 steps and 100 more for each validation
STEADY = [(100, 200, 100, 0.0), (100, 50, 0, 0.0), (200, 200, 100, 0.0), (200, 50, 0, 0.0), (300, 250, 100, 0.0)]


class Trained:
    """Results of trainings in a folder: history.csv, metrics.json and usage.csv of each."""

    def __init__(self, folder):
        self.folder = folder
        self.files = ([], [], [])

    def add(self, model, fold="0", dice=(0.3, 0.5, 0.6), every=100, attempts=(STEADY,), **others):
        run = self.folder / model / fold
        run.mkdir(parents=True)
        rows = ["step,loss,lr,mean_dice,smoothed_dice,challenge_score"]
        rows += [f"{every // 2},0.9,0.001,,,"]
        rows += [f"{every * (i + 1)},0.5,0.001,{value},{value},0.4" for i, value in enumerate(dice)]
        (run / "history.csv").write_text("\n".join(rows) + "\n")
        metrics = {"model": model, "fold": fold, "steps": every * len(dice), "best_step": every * len(dice)}
        metrics |= {"parameters": 1200, "best_mean_dice": max(dice), "best_smoothed_dice": max(dice), "alarms": []}
        metrics |= {"untrained_mean_dice": 0.05, "classes": ["er", "mito"], "grid": "8nm", "patch": [32, 32, 32]}
        metrics |= {"skipped_crops": [], "dice": {"er": 0.5}}
        device = others.pop("device", GPU)
        (run / "metrics.json").write_text(json.dumps(metrics | others))
        run_dir = self.folder / "runs" / model / fold
        if attempts:
            usage_csv(run_dir, attempts, device)
        for found, path in zip(self.files, (run / "history.csv", run / "metrics.json", run_dir), strict=True):
            found.append(path)
        return self

    def runs(self):
        return read_runs(*self.files)


@pytest.fixture
def trained(tmp_path):
    return Trained(tmp_path)


def tables(path):
    """Return {name: (heads, rows of texts)} of all tables of a page."""
    text = path.read_text()
    found = {}
    for name, content in re.findall(r'<table id="([^"]*)">(.*?)</table>', text, re.DOTALL):
        heads = [re.sub("<[^>]*>", "", head) for head in re.findall(r"<th[^>]*>(.*?)</th>", content)]
        rows = [
            [re.sub("<[^>]*>", "", cell).replace("&ndash;", "") for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
            for row in re.findall(r"<tr[^>]*>(.*?)</tr>", content.split("</thead>")[1], re.DOTALL)
        ]
        found[name] = (heads, rows)
    return found


def as_dicts(page, name):
    heads, rows = tables(page)[name]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def test_a_training_says_what_it_took(trained, tmp_path):
    trained.add("unet").add("net", attempts=())
    write_training(trained.runs(), tmp_path / "t.html")
    unet, net, total = as_dicts(tmp_path / "t.html", "runs")
    assert list(unet) == [column.name for column in RUN_COLUMNS]
    # 300 steps of 4 patches in 650 s; 750 s on two GPUs
    assert (unet["patches/s"], unet["hours"], unet["GPU hours"], unet["CPU hours"]) == (
        "1.85",
        "0.208",
        "0.417",
        "0.000",
    )
    assert (unet["memory (GiB)"], unet["GPU memory (GiB)"], unet["device"], unet["attempts"]) == (
        "5.5",
        "30.2",
        GPU,
        "1",
    )
    assert (unet["steps"], unet["Dice"], unet["untrained"], unet["alarms"]) == ("300", "0.600", "0.050", "0")
    assert (net["hours"], net["GPU hours"], net["device"], net["steps"]) == ("", "", "", "300")
    assert (total["model"], total["steps"], total["GPU hours"]) == ("all", "600", "")  # of one it is not known
    assert "Not measured: net, fold 0" in (tmp_path / "t.html").read_text()


def test_alarms_of_all_runs_are_named(trained, tmp_path):
    slow = [[(100, 200, 100, 0.6), (300, 400, 200, 0.3)]]
    trained.add("unet", alarms=["class er had no positive voxel"], skipped_crops=["d/crop3"], attempts=slow).add("net")
    write_training(trained.runs(), tmp_path / "t.html")
    found = [(row["model"], row["alarm"]) for row in as_dicts(tmp_path / "t.html", "alarms")]
    assert [model for model, _ in found] == ["unet"] * 3
    assert [text.split(":")[0] for _, text in found] == [
        "class er had no positive voxel",
        "crop d/crop3 is damaged and was left out",
        "the device waited for data 40 % of the time",
    ]
    assert [row["alarms"] for row in as_dicts(tmp_path / "t.html", "runs")] == ["3", "0", "3"]


def test_work_that_a_kill_lost_is_paid_but_does_not_count_against_a_network(trained):
    lost = [
        [(100, 200, 100, 0), (100, 50, 0, 0), (150, 100, 50, 0)],  # killed at 150, the checkpoint is of step 100
        [(100, 30, 0, 0), (200, 200, 100, 0), (200, 50, 0, 0), (300, 250, 100, 0)],
    ]
    steady, killed = trained.add("steady").add("killed", attempts=lost).runs()
    assert killed.cost.attempts == 2
    assert killed.cost.gpu_hours - steady.cost.gpu_hours == pytest.approx(2 * 130 / 3600)
    at = np.array([100, 200, 300])
    # in place of the lost 100 s the second start took 30 s
    assert 1800 * steady.hours_at(at) == pytest.approx([250, 500, 750])
    assert 1800 * killed.hours_at(at) == pytest.approx([280, 530, 780])


def test_hours_before_a_step_are_unknown_if_the_beginning_was_not_measured(trained):
    (run,) = trained.add("unet", attempts=[[(300, 200, 100, 0.0)]]).runs()
    assert run.course is None and run.hours_at(np.array([300])) is None
    assert run.cost.gpu_hours == pytest.approx(400 / 3600)


def test_at_an_equal_budget_every_run_counts_by_its_last_validation_within_it(trained):
    slow = [[(100, 400, 100, 0.0), (200, 400, 100, 0.0), (300, 400, 100, 0.0)]]
    runs = trained.add("long", dice=(0.2, 0.4, 0.5, 0.7), attempts=[STEADY, [(400, 200, 100, 0)]])
    runs = runs.add("slow", dice=(0.3, 0.5, 0.6), attempts=slow).runs()
    budget = equal_budget(runs)
    assert (budget.steps, budget.note) == (300, "")
    assert budget.hours == pytest.approx(950 * 2 / 3600)  # all that `long` ever took
    assert [reached(run, steps=budget.steps) for run in budget.runs] == [(300, 0.5), (300, 0.6)]
    assert [reached(run, hours=budget.hours) for run in budget.runs] == [(400, 0.7), (200, 0.5)]
    assert reached(runs[0], steps=50) is None


def test_hours_of_gpus_and_of_cpus_do_not_compare(trained):
    budget = equal_budget(trained.add("a").add("b", device="cpu").runs())
    assert budget.steps == 300 and budget.hours is None and "do not compare" in budget.note
    assert equal_budget([]).runs == []


def test_hours_of_two_kinds_of_gpus_do_not_compare(trained):
    budget = equal_budget(trained.add("unet").add("net", device="NVIDIA H200").runs())
    assert budget.hours is None and budget.note == f"they ran on NVIDIA H200, {GPU}, whose hours do not compare"
    assert budget.steps == 300


def test_runs_that_were_not_measured_do_not_spoil_the_hours_of_the_others(trained):
    budget = equal_budget(trained.add("a").add("old", attempts=()).runs())
    assert budget.hours == pytest.approx(2 * 750 / 3600)
    assert budget.note == "the hours of old, fold 0 were not measured from the start"
    assert [reached(run, hours=budget.hours) for run in budget.runs] == [(300, 0.6), None]
    budget = equal_budget(budget.runs[1:])
    assert budget.hours is None and "of no run were measured" in budget.note


def record(crop, label, share, voxel=8.0):
    counts = {"tp": round(1e6 * share), "fp": 1_000_000 - round(1e6 * share), "fn": 0}
    if label == "mito":
        counts = {"tp": 100 * share, "fp": 100 - 100 * share, "fn": 100 - 100 * share}
        counts |= {"hausdorff_norm_sum": 100 * (2 - share) * share, "n_hausdorff": 100 * (2 - share)}
    return {"crop": crop, "label": label, "status": "scored", "dice": share, "voxel_size": [voxel] * 3, **counts}


def scores_json(path, source, fold, records, clean=(), rules="csc-2026.06"):
    official = aggregate(records)
    content = {"rules": rules, "model": source, "fold": fold, "records": records, "clean_records": list(clean)}
    content |= {"aggregate": official, "clean": official, "background": official, "mean_dice": 0.5, "ceiling": 0.2}
    content |= {"dice": {"er": 0.5, "mito": 0.5}, "failed": [], "differs": [], "interval": {"low": 0.1, "high": 0.9}}
    path.write_text(json.dumps(content))
    return path


def records(quality, seed, crops=range(24), noise=0.02):
    """Return records of crops whose difficulty is the same for all sources."""
    rng, hard = np.random.default_rng(seed), np.random.default_rng(0).normal(size=1000)
    return [
        record(
            f"d{i % 8}/crop{i}",
            label,
            float(np.clip(quality + 0.1 * hard[i] + noise * rng.normal(), 0.01, 0.99)),
            4 << i % 3,
        )
        for i in crops
        for label in ("er", "mito")
    ]


@pytest.fixture
def compared(trained, tmp_path):
    """Four sources over two folds: `good` and `alike` are ties, `poor` is worse, the ensemble better than all."""
    trained.add("good").add("good", "1").add("alike", dice=(0.3, 0.6)).add("alike", "1").add("poor").add("poor", "1")
    scores = []
    for number, (source, quality) in enumerate({"good": 0.6, "alike": 0.599, "poor": 0.5, "ensemble": 0.65}.items()):
        for fold in (0, 1):
            found = records(quality, 10 * number + fold, range(12 * fold, 12 * fold + 12))
            scores.append(scores_json(tmp_path / f"{source}{fold}.json", source, str(fold), found))
    (tmp_path / "folds.csv").write_text(
        "crop,group,fold,grouped_by\n" + "".join(f"d{i % 8}/crop{i},g{i},{i // 12},crop\n" for i in range(24))
    )
    out = tmp_path / "comparison.csv", tmp_path / "ranking.csv", tmp_path / "comparison.html"
    write_comparison(scores, trained.runs(), *out, folds_csv=tmp_path / "folds.csv")
    return scores, out


def test_differences_are_shown_and_ties_are_ties(compared):
    pairs = {
        (row["rules"], row["drawn"], row["first"], row["second"]): row for row in csv.DictReader(compared[1][0].open())
    }
    tie = next(row for key, row in pairs.items() if set(key[2:]) == {"good", "alike"})
    assert tie["verdict"] == NOT_SHOWN and float(tie["low"]) < 0 < float(tie["high"])
    other = pairs["csc-2026.06", "crops", "ensemble", "poor"]
    assert other["verdict"] == SHOWN and other["units"] == "24"
    assert float(other["difference"]) == pytest.approx(
        float(other["score_first"]) - float(other["score_second"]), abs=2e-6
    )
    assert float(other["low_all"]) <= float(other["low"]) <= float(other["difference"]) <= float(other["high"])
    assert pairs["csc-2026.06", "specimens", "ensemble", "poor"]["units"] == "8"
    assert pairs["clean", "crops", "ensemble", "poor"]["verdict"] == SHOWN
    assert len(pairs) == 3 * 6


def test_the_ranking_has_groups_of_ties_and_what_each_score_cost(compared):
    rows = as_dicts(compared[1][2], "ranking")
    assert list(rows[0]) == [column.name for column in RANKING_COLUMNS]
    by_source = {row["source"]: row for row in rows}
    assert [row["source"] for row in rows][::3] == ["ensemble", "poor"]
    assert [
        (by_source[name]["rank"], by_source[name]["to rank"]) for name in ("ensemble", "good", "alike", "poor")
    ] == [
        ("1", "1"),
        ("2", "3"),
        ("2", "3"),
        ("4", "4"),
    ]
    assert [by_source[name]["ties"] for name in ("ensemble", "good", "alike", "poor")] == ["a", "b", "b", "c"]
    hours = {name: float(row["GPU hours"]) for name, row in by_source.items()}
    assert hours["good"] == pytest.approx(2 * 2 * 750 / 3600, abs=0.001)
    assert hours["ensemble"] == pytest.approx(3 * hours["good"], abs=0.02)
    assert by_source["alike"]["steps"] == "500" and by_source["ensemble"]["steps"] == "1,700"
    table = list(csv.DictReader(compared[1][1].open()))
    assert [row["source"] for row in table] == [row["source"] for row in rows]
    assert float(table[0]["behind_the_best"]) == 0 and float(table[3]["behind_the_best"]) > 0.1
    text = compared[1][2].read_text()
    assert "ensemble has the highest score" in text and "shown to be better than every other source" in text


def test_the_ensembles_gain_has_an_interval_over_each_model_and_by_class(compared):
    rows = as_dicts(compared[1][2], "gain")
    assert sorted(row["over"] for row in rows) == ["alike", "good", "poor"]
    for row in rows:
        assert 0 < float(row["low"]) < float(row["gain"]) < float(row["high"])
        assert float(row["low, all pairs"]) <= float(row["low"])
        assert row["verdict"] == SHOWN
    by_class = as_dicts(compared[1][2], "gain_classes")
    assert [(row["class"], row["crops"]) for row in by_class] == [("mito", "24"), ("er", "24")]
    assert all(float(row["low"]) < float(row["gain"]) < float(row["high"]) for row in by_class)


def test_equal_budgets_stand_beside_the_final_scores(compared):
    rows = {row["model"]: row for row in as_dicts(compared[1][2], "budget")}
    assert set(rows) == {"good", "alike", "poor"}
    # one fold of `alike` made 200 steps: 0.6 there, 0.5 in the other fold, as `good` has in both
    assert (rows["alike"]["at equal steps"], rows["good"]["at equal steps"]) == ("0.550", "0.500")
    assert rows["good"]["in the end"] == "0.600" and rows["good"]["steps there"] == "200"
    text = compared[1][2].read_text()
    assert "200 steps" in text and f"GPU hours on {GPU}" in text


@pytest.fixture
def of_two_grids(trained, tmp_path):
    """Two models of a fine grid, one of a coarse grid that answers other crops, and the ensemble, which answers all."""
    trained.add("fine").add("other").add("coarse", grid="32nm")
    parts = {"fine": (0.6, range(12)), "other": (0.4, range(12)), "coarse": (0.5, range(12, 24))}
    scores = [
        scores_json(tmp_path / f"{name}.json", name, "0", records(quality, 1, crops))
        for name, (quality, crops) in parts.items()
    ]
    whole = [*records(0.65, 2, range(12)), *records(0.5, 1, range(12, 24))]
    scores.append(scores_json(tmp_path / "ensemble.json", "ensemble", "0", whole))
    (tmp_path / "folds.csv").write_text("crop,group,fold,grouped_by\nd0/crop0,g,0,crop\nd1/crop1,h,1,crop\n")
    return scores, {"fine": "8nm", "other": "8nm", "coarse": "32nm"}


def test_models_are_compared_with_those_of_their_grid_which_are_asked_for_the_same(of_two_grids, trained, tmp_path):
    scores, _ = of_two_grids
    out = tmp_path / "c.csv", tmp_path / "r.csv", tmp_path / "c.html"
    write_comparison(scores, trained.runs(), *out, folds_csv=tmp_path / "folds.csv")
    pairs = {
        (row["grid"], row["first"], row["second"]): row
        for row in csv.DictReader(out[0].open())
        if (row["rules"], row["drawn"]) == ("csc-2026.06", "crops")
    }
    assert set(pairs) == {
        ("8nm", "ensemble", "fine"),
        ("8nm", "ensemble", "other"),
        ("8nm", "fine", "other"),
        ("32nm", "coarse", "ensemble"),
    }
    assert pairs["8nm", "fine", "other"]["verdict"] == SHOWN
    # of the coarse crops the ensemble has the answers of their only model
    assert float(pairs["32nm", "coarse", "ensemble"]["difference"]) == 0
    ranking = list(csv.DictReader(out[1].open()))
    assert [(row["grid"], row["source"]) for row in ranking] == [
        ("8nm", "ensemble"),
        ("8nm", "fine"),
        ("8nm", "other"),
        ("32nm", "coarse"),
        ("32nm", "ensemble"),
    ]
    assert as_dicts(out[2], "ranking_8nm")[1]["GPU hours"] == as_dicts(out[2], "ranking_32nm")[0]["GPU hours"] != ""
    text = out[2].read_text()
    assert "3 sources on the same 12 validation crops, 24 labels in all. 24 labels that not every source has" in text
    assert "models of different grids are scored on different labels" in text
    assert {row["over"] for row in as_dicts(out[2], "gain_8nm")} == {"fine", "other"}
    assert {row["model"] for row in as_dicts(out[2], "budget")} == {"fine", "other", "coarse"}


def test_a_grid_without_scored_labels_says_so_and_what_its_models_cost(of_two_grids, trained, tmp_path):
    scores, _ = of_two_grids
    scores_json(tmp_path / "coarse.json", "coarse", "0", [])
    out = tmp_path / "c.csv", tmp_path / "r.csv", tmp_path / "c.html"
    write_comparison(scores, trained.runs(), *out, folds_csv=tmp_path / "folds.csv")
    assert "Nothing to compare: no label of a crop was scored for all of coarse, ensemble." in out[2].read_text()
    (coarse,) = [row for row in as_dicts(out[2], "ranking_32nm") if row["source"] == "coarse"]
    assert coarse["score"] == "" and float(coarse["GPU hours"]) > 0
    assert "3 sources on the same" in out[2].read_text()


def test_each_grid_has_a_panel_of_differences_and_of_the_ensembles_gain(of_two_grids, tmp_path):
    scores, grids = of_two_grids
    for draw in (differences, ensemble_gain):
        draw(scores, tmp_path / "two.svg", grids=grids)
        text = (tmp_path / "two.svg").read_text()
        assert all(f"grid {grid}" in text for grid in ("8nm", "32nm")) and "coarse" in text
        draw(scores[:2] + scores[3:], tmp_path / "one.svg", grids=grids)
        assert "grid 8nm" not in (tmp_path / "one.svg").read_text()


def test_the_best_score_is_marked_among_those_of_the_same_labels(of_two_grids, tmp_path):
    scores, _ = of_two_grids
    content = json.loads(scores[2].read_text())
    scores[2].write_text(json.dumps(content | {"not_served": ["d0/crop0", "d1/crop1"]}))
    write_scores(scores, [], [], tmp_path / "s.csv", tmp_path / "s.html")
    text = (tmp_path / "s.html").read_text()
    (strong,) = re.findall(r'<tr class="strong">.*?</tr>', text)
    assert "fine" in strong  # neither the ensemble nor the model of the other grid, whatever they score
    assert "left to another grid: coarse 2." in text


def test_too_few_crops_are_said_to_tell_nothing(trained, tmp_path):
    scores = [
        scores_json(tmp_path / f"{name}.json", name, "0", records(quality, 1, range(4)))
        for name, quality in (("a", 0.8), ("ensemble", 0.4))
    ]
    (tmp_path / "folds.csv").write_text("crop,group,fold,grouped_by\nd0/crop0,g,0,crop\nd1/crop1,h,1,crop\n")
    out = tmp_path / "c.csv", tmp_path / "r.csv", tmp_path / "c.html"
    write_comparison(scores, trained.add("a").runs(), *out, folds_csv=tmp_path / "folds.csv")
    assert {row["verdict"] for row in csv.DictReader(out[0].open())} == {TOO_FEW}
    assert "4 crops are too few to tell whether any source is better than another" in out[2].read_text()


def test_scores_by_different_rules_are_not_compared(compared, trained, tmp_path):
    scores_json(tmp_path / "good0.json", "good", "0", records(0.6, 1), rules="clean")
    with pytest.raises(ContractError, match=r"different rules \(clean, csc-2026.06\).*-R evaluate"):
        write_comparison(compared[0], trained.runs(), *compared[1], folds_csv=tmp_path / "folds.csv")


def test_pages_and_figures_are_the_same_bytes_each_time(compared, trained, tmp_path):
    scores, out = compared

    def everything():
        write_comparison(scores, trained.runs(), *out, folds_csv=tmp_path / "folds.csv")
        write_training(trained.runs(), tmp_path / "t.html")
        differences(scores, tmp_path / "d.svg")
        budgets(trained.runs(), tmp_path / "b.svg")
        training_usage(trained.runs(), tmp_path / "u.svg")
        return [
            path.read_bytes() for path in (*out, *(tmp_path / name for name in ("t.html", "d.svg", "b.svg", "u.svg")))
        ]

    first = everything()
    assert everything() == first
    assert not any(b"http-equiv" in content or b"src=" in content for content in first)


def test_figures_name_every_run_and_source(compared, trained, tmp_path):
    differences(compared[0], tmp_path / "d.svg")
    text = (tmp_path / "d.svg").read_text()
    for name in ("ensemble", "good", "alike", "poor", SHOWN):
        assert name in text
    budgets(trained.runs(), tmp_path / "b.svg")
    training_usage(trained.runs(), tmp_path / "u.svg", points=2)
    for name in ("b.svg", "u.svg"):
        text = (tmp_path / name).read_text()
        assert "good, fold 0" in text and "poor, fold 1" in text
    assert "GPU hours" in (tmp_path / "b.svg").read_text()


def test_figures_without_measurements_say_so(trained, tmp_path):
    trained.add("unet", attempts=())
    training_usage(trained.runs(), tmp_path / "u.svg")
    assert "No training has noted its speed" in (tmp_path / "u.svg").read_text()
    budgets(trained.runs(), tmp_path / "b.svg")
    assert "of no run were measured from the start" in (tmp_path / "b.svg").read_text()
    differences([], tmp_path / "d.svg")
    assert "Nothing to compare" in (tmp_path / "d.svg").read_text()


def test_no_two_of_many_models_are_drawn_alike(trained):
    for number in range(2 * len(SERIES) + 1):
        for fold in ("0", "1"):
            trained.add(f"m{number:02}", fold, attempts=())
    looks = [tuple(style[key] for key in ("color", "linestyle", "marker")) for style in _styles(trained.runs())]
    assert len(set(looks)) == len(looks) == 2 * (2 * len(SERIES) + 1)


def test_of_a_single_crop_there_is_no_interval(trained, tmp_path):
    scores = [
        scores_json(tmp_path / f"{name}.json", name, "0", records(quality, 1, range(1)))
        for name, quality in (("a", 0.4), ("ensemble", 0.8))
    ]
    (tmp_path / "folds.csv").write_text("crop,group,fold,grouped_by\nd0/crop0,g,0,crop\n")
    out = tmp_path / "c.csv", tmp_path / "r.csv", tmp_path / "c.html"
    write_comparison(scores, trained.add("a").runs(), *out, folds_csv=tmp_path / "folds.csv")
    assert [(row["low"], row["high"]) for row in as_dicts(out[2], "ranking")] == [("", "")] * 2
    assert [(row["low"], row["high"]) for row in as_dicts(out[2], "gain_classes")] == [("", "")] * 2
    assert [(row["low"], row["high"]) for row in as_dicts(out[2], "pairs")] == [("", "")]
    assert [row["low"] for row in csv.DictReader(out[0].open())] == [""] * 3


def test_long_runs_are_averaged_to_a_small_figure(trained, tmp_path):
    for model, lines in (("short", 120), ("long", 6000)):
        trained.add(model, attempts=[[(i + 1, 30, 1, 0.0) for i in range(lines)]])
    short, long = trained.runs()
    for run in (short, long):
        training_usage([run], tmp_path / f"{run.model}.svg")
    assert (tmp_path / "long.svg").stat().st_size < 1.1 * (tmp_path / "short.svg").stat().st_size


def test_every_crop_and_voxel_size_is_scored_by_itself_by_both_rules(compared, tmp_path):
    scores = compared[0]
    worse = {**record("d0/crop0", "mito", 0.3, 4.0)}
    content = json.loads(scores[0].read_text()) | {"clean_records": [worse]}
    scores[0].write_text(json.dumps(content))
    write_scores(scores, [], [], tmp_path / "s.csv", tmp_path / "s.html", out_crops=tmp_path / "crops.csv")
    rows = {(row["source"], row["crop"]): row for row in read_csv(tmp_path / "crops.csv")}
    assert len(rows) == 4 * 24
    own = [entry for entry in content["records"] if entry["crop"] == "d0/crop0"]
    first = rows["good", "d0/crop0"]
    assert float(first["score"]) == pytest.approx(aggregate(own)["overall_score"], abs=1e-6)
    assert float(first["score_clean"]) == pytest.approx(aggregate([own[0], worse])["overall_score"], abs=1e-6)
    assert (first["voxel_nm"], first["classes"], first["fold"]) == ("4;4;4", "2", "0")
    assert rows["good", "d1/crop1"]["score"] == rows["good", "d1/crop1"]["score_clean"]
    page = as_dicts(tmp_path / "s.html", "crops")
    assert len(page) == 24 and list(page[0])[4:] == ["good", "alike", "poor", "ensemble"]
    assert page[0]["crop"] == "d0/crop0" and page[0]["good"] == f"{float(first['score']):.3f}"
    voxels = as_dicts(tmp_path / "s.html", "voxels")
    assert [(row["voxel (z y x, nm)"], row["source"], row["crops"]) for row in voxels][::4] == [
        ("4 x 4 x 4", "good", "8"),
        ("8 x 8 x 8", "good", "8"),
        ("16 x 16 x 16", "good", "8"),
    ]
    pooled = [e for path in scores[:2] for e in json.loads(path.read_text())["records"] if e["voxel_size"] == [8.0] * 3]
    assert voxels[4]["score"] == f"{aggregate(pooled)['overall_score']:.3f}"


def test_a_crop_of_one_kind_of_classes_counts_by_that_kind(tmp_path):
    found = [record("d/crop1", "er", 0.5), record("d/crop2", "mito", 0.6), record("d/crop2", "er", 0.9)]
    scores = [scores_json(tmp_path / "a.json", "a", "0", found)]
    write_scores(scores, [], [], tmp_path / "s.csv", tmp_path / "s.html", out_crops=tmp_path / "crops.csv")
    first, second = read_csv(tmp_path / "crops.csv")
    assert (first["instance"], first["semantic"], first["score"]) == ("", "0.5", "0.5")
    assert float(second["score"]) == pytest.approx((float(second["instance"]) * 0.9) ** 0.5, abs=1e-6)
