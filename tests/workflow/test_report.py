"""The demo's report in a real browser, without a network: every result opens, shows something, and works."""

import json
import shutil
from html import escape
from pathlib import Path

import pytest
from demo_run import MODELS, ROOT

from cellmap_pipe.files import file_digest
from cellmap_pipe.report.evidence import collect
from cellmap_pipe.report.provenance import write_provenance

# made with blank EM, and with EM that was not downloaded; a plane without any class has no labels to lay over it
BLANK = ("EM of phantom-1/crop106", "EM of phantom-3/crop304", "its labels")
CATEGORIES = ("Data", "Prediction plan", "Predictions", "Provenance", "Scores", "Submission", "Training")


def follow(browser, name):
    """Click on a line of the report's menu."""
    [line] = [each for each in browser.find("nav li a") if each.text.strip() == name]
    browser.run("arguments[0].click()", line)


@pytest.mark.parametrize("name", ["examples_ensemble.html", "provenance.html", "scores.html"])
def test_every_page_stands_alone_and_works(demo, browser, name):
    browser.check_page(demo / "results/report" / name)


def test_the_report_opens_offline_with_every_category(demo, browser):
    browser.open(demo / "report.html")
    assert browser.requests() == []
    assert browser.errors() == []
    menu = [each.text.strip() for each in browser.find("nav li")]
    assert [name for name in CATEGORIES if name not in menu] == []
    assert "sparse label crops" in browser.find("body")[0].text
    assert browser.check_pictures() >= 1


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_result_of_a_category_opens(demo, browser, category):
    browser.open(demo / "report.html")
    follow(browser, category)
    expected = browser.run("return Object.values(categories[arguments[0]]).flat()", category)
    rows = browser.find("nav table tbody tr")
    assert len(rows) == len(expected) > 0
    titles = [row.text for row in rows]
    assert len(set(titles)) == len(titles) and all(titles)
    for row in browser.find("nav table tbody tr"):
        view = row.find_elements("css selector", "a")[0]
        if view.get_attribute("download"):  # tables and JSON are handed out, not shown
            assert view.get_attribute("href").startswith("data:")
            continue
        browser.run("arguments[0].click()", view)
        frames = browser.find("iframe")
        if not frames:
            assert browser.check_pictures() >= 1
            continue
        browser.driver.switch_to.frame(frames[0])
        browser.check_shown(BLANK)
        browser.driver.switch_to.default_content()
    assert browser.errors() == []
    assert browser.requests() == []


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_result_has_a_caption(demo, browser, category):
    browser.open(demo / "report.html")
    for path in browser.run("return Object.values(categories[arguments[0]]).flat()", category):
        assert len(browser.run("return results[arguments[0]].caption ?? ''", path)) > 40, path


def test_best_and_worst_crops_are_shown_as_em_truth_and_prediction(demo, browser):
    browser.open(demo / "results/report/examples_ensemble.html")
    cards = browser.find(".example")
    assert len(cards) >= 6
    for card in cards:
        assert [each.text for each in card.find_elements("css selector", "figcaption")] == ["EM", "Truth", "Prediction"]
        assert "Score" in card.text and "voxel" in card.text and "nm" in card.text
    scores = [float(each.text) for each in browser.find("#crops tbody td:nth-child(6)")]
    assert scores == sorted(scores, reverse=True)


def inputs_of(demo, folder):
    """Return what the rule `provenance` reads, of a demo's results under `folder`."""
    recorded = json.loads((demo / "results/report/provenance.json").read_text())["files"]
    kinds = {
        "crops": "crops.csv",
        "folds": "folds.csv",
        "table": "report/scores.csv",
        "crop_scores": "report/crop_scores.csv",
        "ranking": "report/ranking.csv",
        "comparison": "report/comparison.csv",
        "quality": "quality/*/crops.csv",
        "converted": "convert/*/shard*.json",
        "ceilings": "ceiling/*/shard*.json",
        "stores": "chunks/*/index.json",
        "datalists": "datalist/*/fold*.json",
        "metrics": "train/*/fold*/metrics.json",
        "weights": "train/*/fold*/model.pt",
        "history": "train/*/fold*/history.csv",
        "predictions": "predict/*/fold*/*/shard*.json",
        "ensembles": "ensemble/*/fold*.json",
        "tuned": "tune/*.json",
        "segmentations": "segment/*/fold*/*.json",
        "scores": "scores/*/fold*.json",
        "submission": "submission/report.json",
        "archive": "submission/submission.zip",
        "forecast": "submission/forecast.json",
        "truth_scores": "submission/scores.json",
    }
    found = {kind: sorted(map(str, Path("results").glob(pattern))) for kind, pattern in kinds.items()}
    of_runs = set(map(str, Path("runs").glob("*/fold*/usage.csv")))
    assert {path for paths in found.values() for path in paths} | of_runs == set(recorded)
    return found


def assert_all_is_shown(content, page):
    """Every file stands in a table of the page; every comparison stands in a section that it links to."""
    assert [path for path in content["files"] if f">{path}<" not in page] == []
    assert {check["of"] for check in content["checks"] if f'id="{check["of"]}"' not in page} == set()
    assert [check["what"] for check in content["checks"] if escape(check["what"]) not in page] == []


@pytest.fixture
def copied(demo, tmp_path, monkeypatch):
    """A copy of the demo's results to damage, the working directory; with what the rule reads, and its settings."""
    shutil.copytree(demo / "results", tmp_path / "results", symlinks=True)
    shutil.copytree(demo / "runs", tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    settings = json.loads(Path("results/report/provenance.json").read_text())["settings"]["values"]
    return inputs_of(demo, tmp_path), settings


def differing(copied):
    files, settings = copied
    return {
        (check["of"], check["what"])
        for check in collect(files, settings, Path("runs"))["checks"]
        if not check["agrees"]
    }


def test_every_number_of_the_demo_is_traced_and_agrees(demo, copied):
    content = json.loads(Path("results/report/provenance.json").read_text())
    assert len(content["checks"]) > 30 and all(check["agrees"] for check in content["checks"])
    assert set(content["sources"]) == {f"{source}/fold0" for source in (*MODELS, "ensemble")}
    assert content["submission"]["sha256"] == file_digest("results/submission/submission.zip")
    assert content["files"]["results/train/unet_3d/fold0/model.pt"]["sha256"] == file_digest(
        "results/train/unet_3d/fold0/model.pt"
    )
    page = Path("results/report/provenance.html").read_text()
    assert "comparisons agree" in page and "DIFFERS" not in page
    assert_all_is_shown(content, page)
    for source in (*MODELS, "ensemble"):
        assert f'id="{source}-fold0"' in page


def test_the_submissions_section_has_its_comparisons_and_the_predictions_behind_it(demo):
    content = json.loads((demo / "results/report/provenance.json").read_text())
    said = {check["what"] for check in content["checks"] if check["of"] == "submission"}
    whose = {f"{model}/fold0" for model in MODELS}
    assert {f"test, {name}: weights of the predictions are those of model.pt" for name in whose} <= said
    assert PACKED in said
    assert not [check for check in content["checks"] if "test" in check["what"] and check["of"] != "submission"]
    page = (demo / "results/report/provenance.html").read_text()
    section = page[page.index('id="submission"') : page.index('id="data"')]
    for model in MODELS:
        assert f"results/predict/{model}/fold0/test/shard0.json" in section
    assert "results/submission/forecast.json" in section and "results/submission/scores.json" in section


def test_provenance_is_the_same_each_time(demo, copied, tmp_path):
    files, settings = copied
    for name in ("a", "b"):
        write_provenance(
            files, f"{name}.json", f"{name}.html", settings=settings, repository=ROOT, data_root=demo / "challenge"
        )
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()
    assert Path("a.html").read_bytes() == Path("b.html").read_bytes()


def test_a_submission_is_traced_where_nothing_was_scored(copied):
    """As after a training on all crops."""
    files, settings = copied
    of_scores = {kind: [] for kind in ("scores", "table", "crop_scores", "ranking", "comparison", "forecast")}
    files = {kind: [path for path in paths if "validation" not in path] for kind, paths in files.items()} | of_scores
    files["tuned"] = ["results/tune/ensemble.json"]  # as it was for the segmentations that there are
    write_provenance(files, "p.json", "p.html", settings=settings, repository=ROOT, data_root="none")
    content, page = json.loads(Path("p.json").read_text()), Path("p.html").read_text()
    assert not content["sources"]
    assert content["submission"]["sha256"] == file_digest("results/submission/submission.zip")
    assert len(content["checks"]) > 10 and all(check["agrees"] for check in content["checks"])
    assert "Nothing was scored" in page and ">Scores<" not in page
    assert_all_is_shown(content, page)


def test_where_a_run_directory_is_gone_the_training_is_traced_without_it(copied):
    files, settings = copied
    shutil.rmtree("runs")
    content = collect(files, settings, Path("runs"))
    assert all(check["agrees"] for check in content["checks"])
    assert all(training["usage"] is None for training in content["trainings"].values())


def test_other_weights_than_the_recorded_ones_are_noticed(copied):
    weights = Path("results/train/unet_3d/fold0/model.pt")
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert differing(copied) == {
        ("unet_3d-fold0", "validation: weights of the predictions are those of model.pt"),
        ("submission", "test, unet_3d/fold0: weights of the predictions are those of model.pt"),
    }


def test_a_submission_that_is_older_than_its_segmentations_is_noticed(copied):
    """As after `snakemake --touch`."""
    segmentation = "results/segment/ensemble/foldall/test.json"
    changed(segmentation, lambda content: content["records"][0].update(fingerprint="0" * 64))
    assert ("submission", PACKED) in differing(copied)
    changed("results/submission/report.json", lambda report: report.pop("segmentations"))  # of an earlier version
    assert PACKED not in {what for _, what in differing(copied)}


def test_scores_of_another_archive_are_noticed(copied):
    changed("results/submission/scores.json", lambda scores: scores["digests"].update(submission="0" * 64))
    what = "the archive that was scored against the truth is the one that is there"
    assert differing(copied) == {("submission", what)}


def test_other_settings_crops_or_code_than_those_trained_with_are_noticed(copied, monkeypatch):
    files, settings = copied
    settings["train"]["unet_3d"]["lr"] *= 2
    assert differing((files, settings)) == {("train-unet_3d-fold0", "fingerprint of the training")}
    settings["train"]["unet_3d"]["lr"] /= 2
    datalist = Path("results/datalist/16nm/fold0.json")
    content = json.loads(datalist.read_text())
    datalist.write_text(json.dumps(content | {"training": content["training"][1:]}))
    assert differing(copied) == {(f"train-{model}-fold0", "fingerprint of the training") for model in MODELS}


def test_a_changed_score_a_moved_crop_and_a_changed_mask_are_noticed(copied):
    table = Path("results/report/scores.csv")
    scores = json.loads(Path("results/scores/unet_3d/fold0.json").read_text())
    shown = f"{scores['aggregate']['overall_score']:.6g}"
    table.write_text(table.read_text().replace(shown, "0.99"))
    folds = Path("results/folds.csv")
    moved = scores["records"][0]["crop"]
    lines = [line.replace(",0,", ",1,") if line.startswith(moved) else line for line in folds.read_text().splitlines()]
    folds.write_text("\n".join(lines) + "\n")
    segmentation = Path("results/segment/ensemble/fold0/validation.json")
    content = json.loads(segmentation.read_text())
    content["records"][0]["repair"] = not content["records"][0]["repair"]
    segmentation.write_text(json.dumps(content))
    found = differing(copied)
    assert ("unet_3d-fold0", "score in scores.csv is that of the scores file") in found
    assert ("unet_3d-fold0", "scored crops are validation crops of this fold") in found
    assert ("ensemble-fold0", "validation: segmentations follow from the predictions and their processing") in found
    assert ("ensemble-fold0", "validation: processing is that of the settings and of tuning") in found
    moved = "crops of the datalist are on the side that their fold says"
    assert {(f"train-{model}-fold0", moved) for model in MODELS} <= found
    assert len(found) == 8  # every source is scored on the moved crop


def changed(path, change):
    """Change a JSON file by `change` (its content) in place."""
    content = json.loads(Path(path).read_text())
    change(content)
    Path(path).write_text(json.dumps(content))


PACKED = "the segmentations that were packed are those that are there"
CLASSES = "score, score_clean and Dice of each class, also in scores.csv, are those of the records"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda scores: next(iter(scores["aggregate"]["label_scores"].values())).update(tp=-1), CLASSES),
        (lambda scores: scores["dice"].update(mito_lum=0.99), CLASSES),
        (lambda scores: scores["clean"].update(overall_score=0.99), "score_clean is that of its records"),
        (lambda scores: scores["interval"].update(low=0.99), "lower end of the interval is that of the records"),
        (
            lambda scores: scores["segmentations"].update(dict.fromkeys(scores["segmentations"], "0" * 64)),
            "the segmentations that were scored are those that are there",
        ),
    ],
)
def test_scores_that_are_not_of_their_records_or_of_other_segmentations_are_noticed(copied, change, what):
    changed("results/scores/unet_3d/fold0.json", change)
    assert ("unet_3d-fold0", what) in differing(copied)


def test_a_class_in_the_table_a_rank_and_another_tuning_are_noticed(copied):
    scores = json.loads(Path("results/scores/unet_3d/fold0.json").read_text())
    table = Path("results/report/scores.csv")
    table.write_text(table.read_text().replace(f"{scores['dice']['mito_lum']:.6g}", "0.99"))
    ranking = Path("results/report/ranking.csv")
    lines = ranking.read_text().splitlines()
    ranking.write_text("\n".join(line.replace("0.", "0.9", 1) for line in lines) + "\n")
    changed("results/tune/ensemble.json", lambda tuned: tuned["overall"].update(repair=not tuned["overall"]["repair"]))
    found = differing(copied)
    assert ("unet_3d-fold0", CLASSES) in found
    assert ("unet_3d-fold0", "score in ranking.csv is that of the records of all folds") in found
    processing = "processing is that of the settings and of tuning"
    assert [of for of, what in found if what.startswith("test, ensemble/") and what.endswith(processing)] == [
        "submission"
    ]


def test_a_difference_is_said_in_red_and_in_words(copied, browser):
    files, settings = copied
    weights = Path("results/train/unet_3d/fold0/model.pt")
    weights.write_bytes(weights.read_bytes() + b"\0")
    write_provenance(files, "p.json", "p.html", settings=settings, repository=ROOT, data_root="none")
    browser.open(Path("p.html"))
    [verdict] = browser.find(".verdict.bad")
    assert "2 of" in verdict.text and "DIFFER" in verdict.text and "unet_3d-fold0" in verdict.text
    content = json.loads(Path("p.json").read_text())
    assert_all_is_shown(content, Path("p.html").read_text())
    red, green, blue, _ = browser.run(
        "return getComputedStyle(arguments[0]).color.match(/[0-9]+/g).concat(1).map(Number)", verdict
    )[:4]
    assert red > 100 and max(green, blue) < 40
    browser.check_page(Path("p.html"))
