"""The report's tables hold the numbers of their inputs, sort, and are the same bytes each time."""

import csv
import json
import re

import pytest

from cellmap_pipe.errors import ContractError
from cellmap_pipe.report.pages import Cell, Column, table
from cellmap_pipe.report.tables import SCORE_COLUMNS, read_csv, write_audit, write_scores, write_submission


def aggregate(pm, nuc, overall):
    return {
        "label_scores": {
            "pm": {"iou": pm},
            "nuc": {"f1": nuc, "normalized_hausdorff_distance": nuc, "combined_score": nuc},
        },
        "overall_instance_score": nuc,
        "overall_semantic_score": pm,
        "overall_score": overall,
    }


def scores_json(path, model, fold, pm=0.5, nuc=0.25):
    content = {
        "rules": "csc-2026.06",
        "model": model,
        "fold": fold,
        "records": [
            {"crop": "d/crop1", "label": "pm", "kind": "semantic", "dice": pm},
            {"crop": "d/crop2", "label": "pm", "kind": "semantic", "dice": pm},
            {"crop": "d/crop2", "label": "nuc", "kind": "instance", "dice": None},
        ],
        "aggregate": aggregate(pm, nuc, (pm * nuc) ** 0.5),
        "clean": aggregate(pm, nuc / 2, (pm * nuc / 2) ** 0.5),
        "background": aggregate(0.0, 0.1, 0.0),
        "mean_dice": pm + 0.1,
        "dice": {"pm": pm + 0.1, "nuc": None},
        "ceiling": 0.185,
        "interval": {"low": 0.1, "high": 0.6},
        "failed": [],
        "note": "the portal may differ",
    }
    path.write_text(json.dumps(content))
    return path


def metrics_json(path, model, fold):
    path.write_text(
        json.dumps(
            {
                "model": model,
                "fold": fold,
                "parameters": 1200,
                "steps": 300,
                "untrained_mean_dice": 0.05,
                "best_step": 200,
                "classes": ["pm", "nuc"],
            }
        )
    )
    return path


@pytest.fixture
def written(tmp_path):
    scores = [
        scores_json(tmp_path / "a0.json", "unet", "0", pm=0.5),
        scores_json(tmp_path / "a1.json", "unet", "1", pm=0.7),
        scores_json(tmp_path / "e0.json", "ensemble", "0", pm=0.8),
    ]
    metrics = [metrics_json(tmp_path / f"m{fold}.json", "unet", str(fold)) for fold in (0, 1)]
    out = tmp_path / "scores.csv", tmp_path / "scores.html"
    write_scores(scores, metrics, *out)
    return out


def test_scores_have_an_overall_row_per_source_and_fold_and_one_row_per_class(written):
    rows = read_csv(written[0])
    assert list(rows[0]) == [column.name for column in SCORE_COLUMNS]
    keys = [(row["source"], row["fold"], row["class"]) for row in rows]
    assert keys == [
        (source, fold, name)
        for source, fold in (("unet", "mean"), ("unet", "0"), ("unet", "1"), ("ensemble", "0"))
        for name in ("overall", "pm", "nuc")
    ]


def test_scores_are_those_of_the_input(written):
    rows = {(row["source"], row["fold"], row["class"]): row for row in read_csv(written[0])}
    overall = rows["unet", "0", "overall"]
    assert float(overall["score"]) == pytest.approx(0.125**0.5, abs=1e-5)
    assert float(overall["score_clean"]) == pytest.approx(0.0625**0.5, abs=1e-5)
    assert float(overall["score_background"]) == 0
    assert (overall["score_low"], overall["score_high"]) == ("0.1", "0.6")
    assert float(overall["dice"]) == pytest.approx(0.6)
    assert (overall["ceiling"], overall["parameters"], overall["steps"], overall["untrained_dice"]) == (
        "0.185",
        "1200",
        "300",
        "0.05",
    )
    assert rows["ensemble", "0", "overall"]["parameters"] == ""
    pm, nuc = rows["unet", "1", "pm"], rows["unet", "1", "nuc"]
    assert (pm["kind"], pm["crops"], pm["iou"], pm["f1"]) == ("semantic", "2", "0.7", "")
    assert (nuc["kind"], nuc["dice"], nuc["combined"], nuc["score"]) == ("instance", "", "0.25", "0.25")


def test_folds_are_averaged_and_their_crops_added(written):
    mean = next(row for row in read_csv(written[0]) if (row["fold"], row["class"]) == ("mean", "pm"))
    assert float(mean["iou"]) == pytest.approx(0.6)
    assert mean["crops"] == "4"
    assert mean["score_low"] == ""
    assert mean["rules"] == "csc-2026.06"


def test_scores_page_needs_nothing_but_itself_and_names_the_ceiling(written):
    text = written[1].read_text()
    assert "http" not in text
    assert "48 classes" in text
    assert "0.185" in text  # what the models and derived groups can answer
    assert "2 learned classes can reach there is 0.051" in text
    assert text.count("<table") == 2
    assert "the portal may differ" in text


def test_tables_are_the_same_bytes_each_time(written, tmp_path):
    before = [path.read_bytes() for path in written]
    scores = [tmp_path / name for name in ("a0.json", "a1.json", "e0.json")]
    write_scores(scores, [tmp_path / "m0.json", tmp_path / "m1.json"], *written)
    assert [path.read_bytes() for path in written] == before


def test_unreadable_scores_name_file_and_remedy(tmp_path):
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(ContractError, match=r"s\.json.*-R evaluate"):
        write_scores([tmp_path / "s.json"], [], tmp_path / "s.csv", tmp_path / "s.html")
    assert not (tmp_path / "s.csv").exists()


def test_html_tables_escape_text_and_keep_exact_values_for_sorting():
    text = table([Column("a"), Column("b", ".1f")], [["<x>", 0.123456], [Cell("y", "#FF0000"), None]], strong=[1])
    assert "&lt;x&gt;" in text
    assert 'data-value="0.123456">0.1<' in text
    assert 'style="background:#FF0000"' in text
    assert text.count('<tr class="strong">') == 1
    assert 'data-value=""' in text


@pytest.fixture
def audited(tmp_path):
    def record(crop, present, **more):
        counts = {
            "pm": {"present": present, "absent": 60, "unknown": 0},
            "nuc": {"present": 0, "absent": 0, "unknown": 60},
        }
        return {
            "crop": crop,
            "counts": counts,
            "annotated": ["pm"],
            "label_lattice": {"voxel_nm": [4.0, 4.0, 4.0]},
            "em_level": {"path": "s1"},
            "em_valid_fraction": 0.5,
            "overlaps": {"pm+nuc": 3},
            "warnings": ["odd translation"],
            **more,
        }

    shard = {
        "grid": "8nm",
        "classes": ["pm", "nuc"],
        "records": [record("d/crop2", 40), record("d/crop1", 20), record("d/crop4", 9)],
    }
    (tmp_path / "shard0.json").write_text(json.dumps(shard))
    failed = {"crop": "d/crop3", "status": "failed", "cause": "no .zattrs", "counts": {}, "annotated": []}
    (tmp_path / "shard1.json").write_text(json.dumps({"grid": "8nm", "classes": ["pm", "nuc"], "records": [failed]}))
    with open(tmp_path / "crops.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["crop", "verdict", "cause"])
        writer.writerows(
            [
                ["d/crop1", "keep", ""],
                ["d/crop2", "keep", ""],
                ["d/crop3", "reject", "unreadable: no .zattrs"],
                ["d/crop4", "flag", "low contrast"],
            ]
        )
    write_audit(tmp_path / "crops.csv", [tmp_path / "shard0.json", tmp_path / "shard1.json"], tmp_path / "audit.html")
    return (tmp_path / "audit.html").read_text()


def cells(row):
    return [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]


def test_audit_counts_states_of_the_crops_in_use(audited):
    rows = [cells(row) for row in audited.splitlines() if row.startswith("<tr>")]
    pm = next(row for row in rows if row[0] == "pm")
    assert pm[1:] == ["2", "2", "60", "120", "0", "33.333", "100.0"]
    nuc = next(row for row in rows if row[0] == "nuc")
    assert nuc[1:] == ["0", "0", "0", "0", "120", "&ndash;", "0.0"]


def test_audit_lists_every_crop_with_its_cause(audited):
    assert "4 crops: 2 keep, 1 flag, 1 reject" in audited
    assert audited.index("d/crop1") < audited.index("d/crop2") < audited.index("d/crop3")
    assert "unreadable: no .zattrs" in audited
    assert "4 x 4 x 4" in audited


@pytest.mark.parametrize(
    ("problems", "verdict"), [([], "ready to send"), (["crop1/pm: wrong shape"], "1 problem: not ready")]
)
def test_flight_check_names_every_problem(tmp_path, problems, verdict):
    report = {
        "problems": problems,
        "warnings": [],
        "rows": 28,
        "zero_rows": ["crop1/nuc", "crop2/nuc"],
        "not_predicted": ["crop2/nuc"],
        "sha256": "ab" * 32,
        "size": 12_300_000,
        "rules": "csc-2026.06",
        "note": "the portal may differ",
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    write_submission(tmp_path / "report.json", [], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert verdict in text
    rows = [cells(row) for row in text.splitlines()]
    assert ["crop1/nuc", "predicted, and empty"] in rows
    assert ["crop2/nuc", "no model answers it"] in rows
    assert all(problem in text for problem in problems)


def test_known_truth_adds_the_submissions_scores(tmp_path):
    report = {name: [] for name in ("problems", "warnings", "zero_rows", "not_predicted")}
    report |= {"rows": 2, "sha256": "ab" * 32, "size": 1000, "rules": "csc-2026.06", "note": "the portal may differ"}
    instance = {"f1": 0.5, "normalized_hausdorff_distance": 0.98, "combined_score": 0.7}
    scores = {
        "label_scores": {"pm": {"iou": 0.25}, "nuc": instance},
        "overall_instance_score": 0.7,
        "overall_semantic_score": 0.25,
        "overall_score": 0.418,
        "rules": "csc-2026.06",
        "num_evals_done": 2,
        "total_evals": 2,
    }
    for name, value in (("report", report), ("scores", scores)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    write_submission(tmp_path / "report.json", [tmp_path / "scores.json"], tmp_path / "report.html")
    rows = [cells(row) for row in (tmp_path / "report.html").read_text().splitlines()]
    assert [row[0] for row in rows if row and row[-1] == "0.418"] == ["overall"]
    assert [row[-1] for row in rows if row and row[0] == "pm"] == ["0.250"]
    assert [row[2:] for row in rows if row and row[0] == "nuc"] == [["0.500", "0.980", "0.700"]]
