"""What the packed submission will score, by the validation crops: as JSON, and as a section of its page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.colours import colour_of
from cellmap_pipe.evaluation.container import open_container
from cellmap_pipe.evaluation.forecast import read_validation
from cellmap_pipe.evaluation.rules import CLEAN
from cellmap_pipe.files import read_json, write_json
from cellmap_pipe.report.pages import Bar, Cell, Column, Content, heading, paragraph, table
from cellmap_pipe.report.tables import in_order
from cellmap_pipe.report.versions import rules_name

CLASS_COLUMNS: tuple[Column, ...] = (
    Column("class"),
    Column("kind", hint="how the challenge scores the class: by instance or by voxel"),
    Column("crops", "d", "validation crops in which the class is annotated"),
    Column("present", "d", "those in which there is some of it"),
    Column("forecast", ".3f", "score on the validation crops; 0 where the submission or the crops have nothing"),
    Column("low", ".3f", "lower end of its 95 % interval (bootstrap over crops)"),
    Column("high", ".3f", "upper end of that interval"),
    Column("from 0 to 1", ".3f", "bar: the forecast; line: its interval"),
    Column("clean", ".3f", "the same by the rules 'clean', without the official evaluator's artefacts"),
    Column("note", hint="why a class counts 0"),
)
UNANSWERED = "no voxel in the submission"
UNVALIDATED = "in no validation crop"


def write_forecast(score_jsons: Sequence[Path], archive: Path, report_json: Path, out_json: Path) -> None:
    """Write the score that the packed submission can expect, by the validation scores of what it was made of.

    score_jsons: `scores/{source}/fold*.json` of one source. archive, report_json: the submission and its flight check.
    Keys: those of `Validation.forecast`, over all classes of the archive; unanswered are those without a voxel in it;
    and presence {class: [crops with some of it, crops that annotate it]}.
    Raises ConfigError for scores of several sources or rules, ContractError for a file that is damaged.
    """
    validation = read_validation(score_jsons)
    container = open_container(archive)
    rows = [(crop, label) for crop in container.crops() for label in container.labels(crop)]
    empty = set(read_json(report_json, "run `snakemake -R submission`")["zero_rows"])
    labels = {label for _, label in rows}
    unanswered = labels - {label for crop, label in rows if f"{crop}/{label}" not in empty}
    write_json(out_json, {**validation.forecast(labels, unanswered), "presence": validation.presence()})


def forecast_section(content: Mapping[str, Any]) -> list[str]:
    """Return the forecast of `write_forecast` as parts of a page: overall, by class, and what counts 0."""
    scores = content["label_scores"]
    names = in_order(scores)
    by_rules = {content["rules"]: content} | ({} if content["rules"] == CLEAN else {CLEAN: content[CLEAN]})
    silent = [
        f"{len(content[key])} of {len(names)} classes are {what}: {', '.join(content[key])}."
        for key, what in (
            ("unanswered", "not answered (no voxel of them in the submission) and count 0"),
            ("unvalidated", "answered, but in no validation crop, and count 0 here"),
        )
        if content[key]
    ]
    return [
        heading("Forecast"),
        paragraph(
            f"What the validation crops let one expect, by the scores of {content['source']} on {content['crops']} "
            f"crops: {content['score']:.3f} by the rules {rules_name(content['rules'])}, between {content['low']:.3f} "
            f"and {content['high']:.3f} in 95 % of drawings of as many crops. Every class of the volumes' table "
            "counts, as in the challenge. The interval says how far the score moves with the choice of crops, not how "
            "far the test crops differ from validation crops as a kind. Bars show the forecast, lines its interval."
        ),
        *(paragraph(text) for text in silent),
        table(
            [
                Column("rules"),
                *(Column(name, ".3f") for name in ("forecast", "low", "high", "from 0 to 1", "instance", "semantic")),
            ],
            [_overall(rules, part) for rules, part in by_rules.items()],
            strong=[0],
            name="forecast",
        ),
        table(CLASS_COLUMNS, [_row(name, content) for name in names], name="forecast_classes"),
    ]


def _overall(rules: str, part: Mapping[str, Any]) -> list[Content]:
    kinds = [part["overall_instance_score"], part["overall_semantic_score"]]
    return [
        rules_name(rules),
        part["score"],
        part["low"],
        part["high"],
        Bar(part["score"], part["low"], part["high"]),
        *kinds,
    ]


def _row(name: str, content: Mapping[str, Any]) -> list[Content]:
    entry, known = content["label_scores"][name], content["presence"].get(name, (0, 0))
    notes = {**dict.fromkeys(content["unanswered"], UNANSWERED), **dict.fromkeys(content["unvalidated"], UNVALIDATED)}
    score, low, high = (None, None, None) if name in notes else (entry["score"], entry["low"], entry["high"])
    return [
        Cell(name, colour_of(name) if name in CLASSES else None),
        "instance" if name in CLASSES and CLASSES[name].instance else "semantic",
        known[1],
        known[0],
        entry["score"],
        low,
        high,
        None if score is None else Bar(score, low, high),
        content[CLEAN]["label_scores"][name]["score"],
        notes.get(name, ""),
    ]
