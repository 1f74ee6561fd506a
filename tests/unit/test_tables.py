"""The report's tables hold the numbers of their inputs, sort, and are the same bytes each time."""

import json
import re

import pytest

from cellmap_pipe.errors import ContractError
from cellmap_pipe.report.figures import class_scores, ensemble_gain
from cellmap_pipe.report.pages import Cell, Column, table
from cellmap_pipe.report.tables import SCORE_COLUMNS, read_csv, write_scores


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


def record(crop, label, counts, distances=(), status="scored", dice=None):
    """counts: tp, fp, fn. distances: sum and number of the normalised distances of an instance class."""
    result = {"crop": crop, "label": label, "kind": "semantic", "status": status, "dice": dice}
    result |= dict(zip(("tp", "fp", "fn"), counts, strict=True))
    if distances:
        result |= {"kind": "instance"} | dict(zip(("hausdorff_norm_sum", "n_hausdorff"), distances, strict=True))
    return result


def scores_json(path, model, fold, pm=0.5, nuc=0.25, rules="csc-2026.06"):
    content = {
        "rules": rules,
        "model": model,
        "fold": fold,
        "records": [
            record("d/crop1", "pm", (1, 1, 0), dice=pm),
            record("d/crop2", "pm", (1, 1, 0), dice=pm),
            record("d/crop2", "nuc", (0, 0, 0), (0.0, 0), "skipped_too_many_instances"),
        ],
        "aggregate": aggregate(pm, nuc, (pm * nuc) ** 0.5),
        "clean": aggregate(pm, nuc / 2, (pm * nuc / 2) ** 0.5),
        "differs": ["d/crop2/nuc"],
        "clean_records": [record("d/crop2", "nuc", (0, 0, 7), (0.0, 7), "skipped_too_many_instances")],
        "background": aggregate(0.0, 0.1, 0.0),
        "mean_dice": pm + 0.1,
        "dice": {"pm": pm + 0.1, "nuc": None},
        "ceiling": 0.185,
        "interval": {"low": 0.1, "high": 0.6},
        "failed": [],
    }
    path.write_text(json.dumps(content))
    return path


def ceiling_json(path, grid, entries, rules="csc-2026.06"):
    """entries: (crop, class, voxel, tp, fp, fn) of the crops in a shard."""
    records = []
    for crop, label, voxel, *counts in entries:
        record = {"crop": crop, "label": label, "voxel_size": [voxel] * 3, "status": "scored"}
        record |= dict(zip(("tp", "fp", "fn"), counts, strict=True))
        if label == "nuc":
            record |= {"kind": "instance", "hausdorff_norm_sum": 0.5 * sum(counts), "n_hausdorff": sum(counts)}
        records.append({"kind": "semantic", **record})
    size = "native" if grid == "native" else [float(grid.removesuffix("nm"))] * 3
    path.write_text(json.dumps({"grid": grid, "voxel_nm": size, "rules": rules, "records": records}))
    return path


SCORED = [("unet", "0"), ("unet", "1"), ("ensemble", "0")]
CEILINGS = {
    "8nm": [("d/crop1", "pm", 4, 60, 20, 20), ("d/crop2", "pm", 16, 90, 5, 5), ("d/crop2", "nuc", 16, 1, 0, 0)],
    "16nm": [("d/crop1", "pm", 4, 20, 40, 40), ("d/crop2", "pm", 16, 100, 0, 0), ("d/crop2", "nuc", 16, 2, 2, 0)],
}


@pytest.fixture
def ceilings(tmp_path):
    return [ceiling_json(tmp_path / f"{grid}.json", grid, entries) for grid, entries in CEILINGS.items()]


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
                "grid": "8nm",
            }
        )
    )
    return path


@pytest.fixture
def written(tmp_path, ceilings):
    scores = [
        scores_json(tmp_path / "a0.json", "unet", "0", pm=0.5),
        scores_json(tmp_path / "a1.json", "unet", "1", pm=0.7),
        scores_json(tmp_path / "e0.json", "ensemble", "0", pm=0.8),
    ]
    metrics = [metrics_json(tmp_path / f"m{fold}.json", "unet", str(fold)) for fold in (0, 1)]
    out = tmp_path / "scores.csv", tmp_path / "scores.html"
    write_scores(scores, metrics, ceilings, *out)
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
    names = ["overall", "differs", "classes", "voxels", "crops", "crops_clean"]
    assert re.findall('<table id="([^"]*)"', text) == names
    assert "portal may differ" in text


def test_the_best_mean_over_folds_stands_out_not_the_easiest_fold(tmp_path, ceilings):
    scores = [
        scores_json(tmp_path / f"{source}{fold}.json", source, fold, pm=pm)
        for source, fold, pm in (("a", "0", 0.9), ("a", "1", 0.1), ("b", "0", 0.6), ("b", "1", 0.6))
    ]
    write_scores(scores, [], ceilings, tmp_path / "s.csv", tmp_path / "s.html")
    (strong,) = re.findall('<tr class="strong">(.*?)</tr>', (tmp_path / "s.html").read_text())
    assert cells(strong)[:2] == ["b", "mean"]


def cells(row):
    return [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]


def test_scores_by_both_rules_stand_side_by_side_and_the_page_names_where_they_differ(written):
    names = [column.name for column in SCORE_COLUMNS]
    assert names[names.index("score") + 1] == "score_clean"
    text = written[1].read_text()
    assert "Scored by the rules csc-2026.06: the official evaluator" in text and "Scored by the rules clean: " in text
    assert "<details><summary>3 labels of crops</summary>" in text
    rows = [cells(row) for row in text.splitlines() if "skipped_too_many_instances" in row]
    assert [row[:4] for row in rows] == [[source, fold, "d/crop2", "nuc"] for source, fold in SCORED]
    # by the official rules the crop drops out of the pool, by the clean ones all its objects are missed
    assert rows[0][4:] == ["&ndash;", "0.000", "0, 0, 0", "0, 0, 7", "skipped_too_many_instances"]


def test_where_no_rules_differ_nothing_is_said_of_it(tmp_path):
    scores = scores_json(tmp_path / "a.json", "unet", "0")
    content = json.loads(scores.read_text()) | {"differs": [], "clean_records": []}
    scores.write_text(json.dumps(content))
    write_scores([scores], [], [], tmp_path / "s.csv", tmp_path / "s.html")
    text = (tmp_path / "s.html").read_text()
    assert "Where the rules differ" not in text and 'id="differs"' not in text


def test_provisional_rules_are_called_so_in_every_table_page_and_figure(tmp_path):
    scores = [scores_json(tmp_path / f"{name}.json", name, "0", rules="csc-2026.07") for name in ("unet", "ensemble")]
    write_scores(scores, [], [], tmp_path / "s.csv", tmp_path / "s.html")
    assert {row["rules"] for row in read_csv(tmp_path / "s.csv")} == {"csc-2026.07 (provisional)"}
    assert "csc-2026.07 is provisional (the official formula is not public)" in (tmp_path / "s.html").read_text()
    class_scores(scores, tmp_path / "classes.svg")
    ensemble_gain(scores, tmp_path / "gain.svg")
    for name in ("classes.svg", "gain.svg"):
        assert "rules csc-2026.07 (provisional)" in (tmp_path / name).read_text()


def test_the_grids_ceiling_stands_beside_each_score(written):
    assert [column.name for column in SCORE_COLUMNS].index("grid_ceiling") == 12
    rows = {(row["source"], row["fold"], row["class"]): row for row in read_csv(written[0])}
    of_unet = {name: rows["unet", "0", name]["grid_ceiling"] for name in ("pm", "nuc", "overall")}
    iou = 150 / 200  # both crops on the model's grid
    assert float(of_unet["pm"]) == pytest.approx(iou)
    assert float(of_unet["nuc"]) == pytest.approx(0.5**0.5, abs=1e-5)
    assert float(of_unet["overall"]) == pytest.approx((iou * 0.5**0.5) ** 0.5, abs=1e-5)
    assert rows["unet", "mean", "pm"]["grid_ceiling"] == of_unet["pm"]
    # for the ensemble each crop on the grid nearest its voxels: crop1 on 8nm, crop2 on 16nm
    assert float(rows["ensemble", "0", "pm"]["grid_ceiling"]) == pytest.approx(160 / 200)
    assert float(rows["ensemble", "0", "nuc"]["grid_ceiling"]) == pytest.approx((2 / 3 * 0.5) ** 0.5, abs=1e-5)
    assert "grid_ceiling" in written[1].read_text()


def test_the_figure_marks_the_grids_ceiling(written, ceilings, tmp_path):
    scores, metrics = [tmp_path / "a0.json", tmp_path / "e0.json"], [tmp_path / "m0.json"]
    class_scores(scores, tmp_path / "with.svg", metrics_jsons=metrics, ceiling_jsons=ceilings)
    class_scores(scores, tmp_path / "without.svg")
    dots = [(tmp_path / name).read_text().count("stroke: #666666") for name in ("without.svg", "with.svg")]
    assert dots[1] - dots[0] == 5  # two classes of two sources, and the legend's


def test_a_ceiling_that_is_lacking_leaves_its_cell_empty(tmp_path):
    scores = [scores_json(tmp_path / "a.json", "unet", "0")]
    metrics = [metrics_json(tmp_path / "m.json", "unet", "0")]
    out = tmp_path / "s.csv", tmp_path / "s.html"

    def cells_of(*ceilings):
        write_scores(scores, metrics, ceilings, *out)
        return [row["grid_ceiling"] for row in read_csv(out[0])]

    assert cells_of() == ["", "", ""]
    assert cells_of(ceiling_json(tmp_path / "c.json", "16nm", CEILINGS["16nm"])) == ["", "", ""]
    one_lacking = ceiling_json(tmp_path / "c.json", "8nm", CEILINGS["8nm"][1:])
    assert cells_of(one_lacking) == ["", "", f"{0.5**0.5:.6g}"]
    other_rules = ceiling_json(tmp_path / "c.json", "8nm", CEILINGS["8nm"], rules="clean")
    assert cells_of(other_rules) == ["", "0.75", ""]


def test_the_native_grid_is_the_nearest_to_every_crop(tmp_path):
    scores = [scores_json(tmp_path / "e.json", "ensemble", "0")]
    native = ceiling_json(
        tmp_path / "native.json", "native", [(*entry[:3], 7, 0, 0) for entry in CEILINGS["8nm"] if entry[1] == "pm"]
    )
    out = tmp_path / "s.csv", tmp_path / "s.html"
    write_scores(scores, [], [native, ceiling_json(tmp_path / "c.json", "8nm", CEILINGS["8nm"])], *out)
    assert [row["grid_ceiling"] for row in read_csv(out[0])] == ["", "1", ""]


def test_the_page_says_how_the_crops_were_divided(written, ceilings, tmp_path):
    folds = tmp_path / "folds.csv"
    folds.write_text("crop,group,fold,grouped_by\nd/crop1,d,0,specimen\nd/crop2,e,1,specimen\n")
    write_scores([tmp_path / "a0.json"], [tmp_path / "m0.json"], ceilings, *written, folds_csv=folds)
    assert "2 folds of 1, 1 crops; specimens stay together" in written[1].read_text()


def test_tables_are_the_same_bytes_each_time(written, ceilings, tmp_path):
    before = [path.read_bytes() for path in written]
    scores = [tmp_path / name for name in ("a0.json", "a1.json", "e0.json")]
    write_scores(scores, [tmp_path / "m0.json", tmp_path / "m1.json"], ceilings, *written)
    assert [path.read_bytes() for path in written] == before


def test_unreadable_scores_name_file_and_remedy(tmp_path):
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(ContractError, match=r"s\.json.*-R evaluate"):
        write_scores([tmp_path / "s.json"], [], [], tmp_path / "s.csv", tmp_path / "s.html")
    assert not (tmp_path / "s.csv").exists()


def test_html_tables_escape_text_and_keep_exact_values_for_sorting():
    text = table([Column("a"), Column("b", ".1f")], [["<x>", 0.123456], [Cell("y", "#FF0000"), None]], strong=[1])
    assert "&lt;x&gt;" in text
    assert 'data-value="0.123456">0.1<' in text
    assert 'style="background:#FF0000"' in text
    assert text.count('<tr class="strong">') == 1
    assert 'data-value=""' in text
