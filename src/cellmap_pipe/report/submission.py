"""The submission's page: what is in the file, what is wrong with it, and what it scores or can be expected to score."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.colours import VERDICTS, colour_of
from cellmap_pipe.evaluation.rules import CLEAN
from cellmap_pipe.files import read_json, write_text
from cellmap_pipe.report.forecast import forecast_section
from cellmap_pipe.report.pages import Cell, Column, Content, folded, heading, page, paragraph, table
from cellmap_pipe.report.tables import counted, differing_columns, differing_rows, in_order
from cellmap_pipe.report.versions import rules_name, rules_sentences

# A list of more rows is folded
SHOWN_ROWS = 20


def _truth_section(content: Mapping[str, Any]) -> list[str]:
    """Return the scores of a submission against known truth (`evaluation.official.score_submission`) as parts."""
    rules = rules_name(content["rules"])
    columns = [
        Column("class"),
        Column("iou", ".3f", "intersection over union, of semantic classes"),
        Column("f1", ".3f", "of instances: 2 TP / (2 TP + FP + FN)"),
        Column("hausdorff", ".3f", "mean normalised Hausdorff distance of instances"),
        Column("score", ".3f", f"IoU, or the root of F1 times Hausdorff, by the rules {rules}"),
        Column("score_clean", ".3f", "score by the rules 'clean', without the official evaluator's artefacts"),
    ]
    clean = content[CLEAN]
    keys = {kind: f"overall_{kind}_score" for kind in ("instance", "semantic")}
    overall = [
        [kind, None, None, None, content[key], clean[key]] for kind, key in {"overall": "overall_score", **keys}.items()
    ]
    by_class: list[list[Content]] = [
        [
            Cell(name, colour_of(name) if name in CLASSES else None),
            score.get("iou"),
            score.get("f1"),
            score.get("normalized_hausdorff_distance"),
            _score(score),
            _score(clean["label_scores"].get(name, {})),
        ]
        for name in in_order(content["label_scores"])
        for score in [content["label_scores"][name]]
    ]
    parts = [
        heading("Scores against the known truth"),
        paragraph(
            f"{content['num_evals_done']} of {content['total_evals']} arrays were scored, by the rules {rules} and "
            f"{CLEAN}."
        ),
        table(columns, [*overall, *by_class], strong=range(len(overall)), name="truth"),
    ]
    parts += [
        table([Column(title)], [[line] for line in content[key]], name=key)
        for title, key in (("not scored", "failed"), ("about the truth", "warnings"))
        if content[key]
    ]
    rows = _differences(content)
    if rows:
        summary = f"{counted(len(rows), 'label')} of crops that {rules} and {CLEAN} count differently"
        parts.append(folded(summary, [table(differing_columns(rules), rows, name="differs")]))
    alone = sorted(set(content["differs"]) - {f"{crop}/{name}" for crop, name in _names(content["clean_records"])})
    if alone:
        parts.append(paragraph(f"Scored by one of these rules alone: {', '.join(alone)}."))
    return parts


def _score(entry: Mapping[str, float]) -> float | None:
    return entry.get("iou", entry.get("combined_score"))


def _names(records: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(crop, label) for crop, labels in records.items() for label in labels]


def _differences(content: Mapping[str, Any]) -> list[list[Content]]:
    first, second = (
        [{**content[key][crop][label], "crop": crop, "label": label} for crop, label in _names(content[key])]
        for key in ("records", "clean_records")
    )
    return differing_rows(first, second)


def _expected(content: Mapping[str, Any]) -> str:
    score, low, high = (content[key] for key in ("score", "low", "high"))
    return f"{score:.3f} ({low:.3f} to {high:.3f}), by {rules_name(content['rules'])} on validation crops"


def _empty(label: str, presence: Mapping[str, Sequence[int]]) -> str:
    """Return what to say of a predicted array without any voxel; presence: as in `write_forecast`."""
    if label not in presence:
        return "predicted, and empty"
    n, of = presence[label]
    return f"predicted, and empty; {n} of {of} validation crops have some of it"


def _listed(title: str, note: str, columns: Sequence[str], rows: Sequence[Sequence[Content]], name: str) -> list[str]:
    """Return a list under its heading and a note on it, as parts of a page; a long one shows when it is clicked."""
    whole = table([Column(column) for column in columns], rows, name=name)
    shown = whole if len(rows) <= SHOWN_ROWS else folded(counted(len(rows), columns[0]), [whole])
    return [heading(title), *([paragraph(note)] if note else []), shown]


def write_submission(
    report_json: Path, forecast_jsons: Sequence[Path], score_jsons: Sequence[Path], out_html: Path
) -> None:
    """Write the submission's page: what is in the file, its digest, every problem found, and what it scores.

    forecast_jsons: at most one, the forecast by the validation crops (`report.forecast.write_forecast`). score_jsons:
    at most one, the scores of the submission against known truth (`evaluation.official.score_submission`).
    """
    report = read_json(report_json, "run `snakemake -R submission`")
    forecasts = [read_json(path, "run `snakemake -R submission_forecast`") for path in forecast_jsons]
    scores = [read_json(path, "run `snakemake -R score_submission`") for path in score_jsons]
    problems = report["problems"]
    verdict = f"{counted(len(problems), 'problem')}: not ready to send" if problems else "ready to send"
    expected: list[list[Content]] = [["forecast", _expected(each)] for each in forecasts]
    facts: list[list[Content]] = [
        ["verdict", Cell(verdict, VERDICTS["reject" if problems else "keep"])],
        ["warnings", f"{len(report['warnings']):,}"],
        *expected,
        ["arrays", f"{report['rows']:,}"],
        ["arrays without any voxel set", f"{len(report['zero_rows']):,}"],
        ["arrays that no model answers", f"{len(report['not_predicted']):,}"],
        ["arrays that lack some of their parts", f"{len(report['approximate']):,}"],
        ["size (MB)", f"{report['size'] / 1e6:,.1f}"],
        ["SHA-256", report["sha256"]],
        ["rules", rules_name(report["rules"])],
    ]
    rules = [content["rules"] for content in (*forecasts, *scores)]
    said = rules_sentences([*rules, CLEAN]) if rules else report["note"]
    parts = [table([Column("item"), Column("value")], facts, name="facts"), paragraph(said)]
    if problems:
        parts += [heading("Problems"), table([Column("problem")], [[line] for line in problems], name="problems")]
    for content in forecasts:
        parts += forecast_section(content)
    for content in scores:
        parts += _truth_section(content)
    if report["warnings"]:
        parts += _listed("Warnings", "", ["warning"], [[line] for line in report["warnings"]], "warnings")
    if report["approximate"]:
        parts += _listed(
            "Groups without some of their parts",
            "Formed from the classes that were predicted; voxels of the missing ones are not in them.",
            ["array", "missing"],
            [[name, ", ".join(missing)] for name, missing in report["approximate"].items()],
            "approximate",
        )
    if report["zero_rows"]:
        unanswered = set(report["not_predicted"])
        known = {name: counts for each in forecasts for name, counts in each["presence"].items()}
        parts += _listed(
            "Arrays without any voxel set",
            "The challenge counts a missing array more harshly than an empty one, so every row is answered.",
            ["array", "why"],
            [
                [name, "no model answers it" if name in unanswered else _empty(name.rpartition("/")[2], known)]
                for name in report["zero_rows"]
            ],
            "zeros",
        )
    write_text(out_html, page("Submission", parts))
