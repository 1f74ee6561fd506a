"""The submission's page names every fault, what the file can be expected to score, and what it scores."""

import json
import re

import numpy as np
import pytest
import zarr

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.evaluation.challenge import aggregate
from cellmap_pipe.report.forecast import write_forecast
from cellmap_pipe.report.submission import write_submission


def cells(row):
    return [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]


def report_json(path, **changes):
    lists = {name: [] for name in ("problems", "warnings", "zero_rows", "not_predicted", "approximate")}
    facts = {
        "rows": 2,
        "sha256": "ab" * 32,
        "size": 12_300_000,
        "rules": "csc-2026.06",
        "note": "the portal may differ",
    }
    path.write_text(json.dumps({**lists, **facts, **changes}))
    return path


def page_rows(folder, forecasts=(), scores=()):
    write_submission(folder / "report.json", forecasts, scores, folder / "report.html")
    return [cells(row) for row in (folder / "report.html").read_text().splitlines()]


@pytest.mark.parametrize(
    ("problems", "verdict"), [([], "ready to send"), (["crop1/pm: wrong shape"], "1 problem: not ready")]
)
def test_flight_check_names_every_problem(tmp_path, problems, verdict):
    report_json(
        tmp_path / "report.json",
        problems=problems,
        rows=28,
        zero_rows=["crop1/nuc", "crop2/nuc"],
        not_predicted=["crop2/nuc"],
        approximate={"crop1/er": ["ne_mem", "ne_lum"]},
    )
    rows = page_rows(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert verdict in text
    assert "the portal may differ" in text
    assert ["crop1/nuc", "predicted, and empty"] in rows
    assert ["crop2/nuc", "no model answers it"] in rows
    assert ["crop1/er", "ne_mem, ne_lum"] in rows
    assert all(problem in text for problem in problems)


def instance(tp, fp, fn, total):
    return {"tp": tp, "fp": fp, "fn": fn, "hausdorff_norm_sum": total, "n_hausdorff": tp + fp + fn, "status": "scored"}


def semantic(tp, fp, fn):
    return {"tp": tp, "fp": fp, "fn": fn, "status": "scored"}


def test_known_truth_adds_the_submissions_scores_by_both_rules(tmp_path):
    records = {"crop1": {"pm": semantic(1, 2, 1), "nuc": instance(1, 1, 1, 2.4), "pm_mask": semantic(0, 0, 9)}}
    clean = {"crop1": {"nuc": instance(1, 1, 1, 1.5)}}
    scores = {
        **aggregate(records),
        "clean": aggregate({"crop1": {**records["crop1"], **clean["crop1"]}}),
        "records": records,
        "clean_records": clean,
        "differs": ["crop1/nuc", "crop1/pm_mask"],
        "failed": ["crop1/ecs: chunk 0.0.0 is damaged"],
        "warnings": ["crop1/pm: no translation, 0 is taken"],
        "rules": "csc-2026.07",
        "num_evals_done": 3,
        "total_evals": 4,
    }
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    report_json(tmp_path / "report.json")
    rows = page_rows(tmp_path, scores=[tmp_path / "scores.json"])
    by_name = {row[0]: row[1:] for row in rows if row}
    assert by_name["pm"] == ["0.250", "&ndash;", "&ndash;", "0.250", "0.250"]
    assert by_name["nuc"] == ["&ndash;", "0.500", "0.800", "0.632", "0.500"]
    assert by_name["instance"][-2:] == ["0.632", "0.500"]
    assert ["crop1", "nuc", "0.632", "0.500", "1, 1, 1", "1, 1, 1", "scored"] in rows
    text = (tmp_path / "report.html").read_text()
    assert "1 label of crops that csc-2026.07 (provisional) and clean count differently" in text
    assert "Scored by one of these rules alone: crop1/pm_mask." in text
    assert "crop1/ecs: chunk 0.0.0 is damaged" in text and "crop1/pm: no translation" in text
    assert "3 of 4 arrays were scored" in text and "csc-2026.07 is provisional" in text


@pytest.fixture
def submission(tmp_path):
    """A folder with a submission of three classes in two crops, its report, and two folds of validation scores."""
    root = zarr.open_group(tmp_path / "submission.zarr", mode="w", zarr_format=2)
    for crop in ("crop1", "crop2"):
        for label in ("pm", "nuc", "ecs", "mito"):
            root.create_array(f"{crop}/{label}", shape=(2, 2, 2), dtype=np.uint8)
    empty = ["crop1/ecs", "crop2/ecs", "crop1/pm"]
    report_json(tmp_path / "report.json", zero_rows=[*empty, "crop2/nuc"], not_predicted=empty)
    nothing = {"crop": "d/crop1", "label": "mito", "status": "failed", "cause": "damaged"}
    folds = [
        [{"crop": "d/crop1", "label": "pm", **semantic(1, 0, 1)}, nothing],
        [
            {"crop": "d/crop2", "label": "pm", **semantic(1, 1, 1)},
            {"crop": "d/crop2", "label": "nuc", **instance(1, 0, 0, 1.0)},
        ],
    ]
    for fold, records in enumerate(folds):
        content = {"model": "ensemble", "fold": str(fold), "rules": "csc-2026.06", "records": records}
        clean = [record | {"fn": 3} for record in records if record["label"] == "nuc"]
        (tmp_path / f"fold{fold}.json").write_text(json.dumps(content | {"clean_records": clean}))
    return tmp_path


def written_forecast(folder):
    scores = sorted(folder.glob("fold*.json"))
    write_forecast(scores, folder / "submission.zarr", folder / "report.json", folder / "forecast.json")
    return json.loads((folder / "forecast.json").read_text())


@pytest.mark.parametrize(("n", "folded"), [(20, False), (21, True)])
def test_a_long_list_shows_on_a_click_but_problems_always(tmp_path, n, folded):
    lines = [f"crop1/pm{i}: wrong shape" for i in range(n)]
    report_json(tmp_path / "report.json", problems=lines, warnings=lines)
    page_rows(tmp_path)
    problems, warnings = (tmp_path / "report.html").read_text().split("<h2>Problems</h2>")[1].split("<h2>Warnings</h2>")
    assert "<details>" not in problems
    assert ("<summary>21 warnings</summary>" in warnings) is folded


def test_the_forecast_counts_every_class_of_the_submission_and_pools_all_folds(submission):
    result = written_forecast(submission)
    assert result["unanswered"] == ["ecs"]  # pm is answered in one of the crops
    assert result["unvalidated"] == ["mito"]
    assert {name: entry["score"] for name, entry in result["label_scores"].items()} == {
        "ecs": 0,
        "mito": 0,
        "nuc": 1,
        "pm": pytest.approx(2 / 5),
    }
    assert result["score"] == pytest.approx((0.5 * 0.2) ** 0.5)  # means over nuc and mito, over pm and ecs
    assert result["clean"]["label_scores"]["nuc"]["score"] < 1
    assert result["presence"]["pm"] == [2, 2]
    assert (result["source"], result["rules"], result["provisional"]) == ("ensemble", "csc-2026.06", False)


def test_the_page_shows_the_forecast_with_its_interval_and_names_what_counts_0(submission):
    result = written_forecast(submission)
    rows = page_rows(submission, forecasts=[submission / "forecast.json"])
    by_name = {row[0]: row[1:] for row in rows if row}
    assert by_name["forecast"] == [
        f"{result['score']:.3f} ({result['low']:.3f} to {result['high']:.3f}), by csc-2026.06 on validation crops"
    ]
    assert by_name["pm"][:4] == ["semantic", "2", "2", "0.400"]
    assert by_name["ecs"][-1] == "no voxel in the submission"
    assert by_name["mito"][-1] == "in no validation crop"
    assert by_name["crop2/nuc"] == ["predicted, and empty; 1 of 1 validation crops have some of it"]
    text = (submission / "report.html").read_text()
    assert "1 of 4 classes are not answered (no voxel of them in the submission) and count 0: ecs." in text
    assert 'class="bar"' in text and "portal may differ" in text


def test_a_forecast_from_scores_of_several_sources_is_refused(submission):
    content = json.loads((submission / "fold1.json").read_text()) | {"model": "unet_3d"}
    (submission / "fold1.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="unet_3d"):
        written_forecast(submission)
    assert not (submission / "forecast.json").exists()


def test_page_and_forecast_are_the_same_bytes_each_time(submission):
    def both():
        written_forecast(submission)
        page_rows(submission, forecasts=[submission / "forecast.json"])
        return [(submission / name).read_bytes() for name in ("forecast.json", "report.html")]

    assert both() == both()
