"""Which models differ and which are ties, what each score cost, and who leads at an equal budget."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.colours import colour_of
from cellmap_pipe.errors import ContractError
from cellmap_pipe.evaluation.paired import (
    FEWEST_UNITS,
    NOT_SHOWN,
    SHOWN,
    SHOWN_ALONE,
    TOO_FEW,
    Comparison,
    Difference,
    class_differences,
    compare_sources,
)
from cellmap_pipe.evaluation.rules import CLEAN
from cellmap_pipe.files import write_text
from cellmap_pipe.prepare.specimens import specimens_of
from cellmap_pipe.prepare.splits import describe_folds
from cellmap_pipe.report.pages import Bar, Cell, Column, Content, folded, heading, page, paragraph, table
from cellmap_pipe.report.tables import ENSEMBLE, Record, Scores, as_csv, counted, in_order, read_scores
from cellmap_pipe.report.training import NOT_MEASURED, Run, equal_budget, reached, summed_hours
from cellmap_pipe.report.versions import rules_sentences

Path = str | os.PathLike[str]

CROPS = "crops"
SPECIMENS = "specimens"

RANKING_COLUMNS: tuple[Column, ...] = (
    Column("source", hint="a model's name, or the ensemble of all models"),
    Column("rank", "d", "the best rank it can have: one more than there are sources shown to be better"),
    Column("to rank", "d", "the worst rank it can have, by the sources shown to be worse"),
    Column("ties", hint="two sources share a letter where no difference between them is shown"),
    Column("score", ".4f", "the challenge's score, pooled over the validation crops of all folds"),
    Column("low", ".4f", "lower end of the score's 95 % interval (bootstrap over crops)"),
    Column("high", ".4f", "upper end of that interval"),
    Column("from 0 to 1", ".3f", "bar: the score; line: its interval"),
    Column("score_clean", ".4f", "the same by the rules 'clean', without the official evaluator's artefacts"),
    Column("behind the best", ".4f", "score of the best source less this one, on the same crops"),
    Column(
        "GPU hours",
        ",.3f",
        "of the trainings whose folds are scored; the ensemble's are those of all models; empty: not measured",
    ),
    Column("CPU hours", ",.3f", "hours x processes of such trainings without GPUs"),
    Column("steps", ",d", "optimiser steps of such trainings"),
    Column("trainings", "d", "folds that were trained and scored; the ensemble's are those of all models"),
    Column("weights", ",d", "parameters of the network, of all models for the ensemble"),
)

_COSTS = ("GPU hours", "CPU hours", "steps", "trainings", "weights")

PAIR_COLUMNS: tuple[Column, ...] = (
    Column("better"),
    Column("worse"),
    Column("difference", ".4f", "score of the better source less that of the worse one, on the same crops"),
    Column("low", ".4f", "lower end of the difference's 95 % interval, of this pair by itself"),
    Column("high", ".4f", "upper end of that interval"),
    Column("low, all pairs", ".4f", "lower end of the interval in which all pairs lie at once in 95 % of cases"),
    Column("high, all pairs", ".4f", "upper end of that interval"),
    Column("verdict", hint="whether 0 lies in the intervals"),
)

BUDGET_COLUMNS: tuple[Column, ...] = (
    Column("model"),
    Column("at equal steps", ".3f", "smoothed mean Dice at the last validation within the steps that all runs made"),
    Column("at equal hours", ".3f", "the same within the hours that all runs had; empty: hours were not measured"),
    Column("steps there", ",d", "steps that the model made in these hours, mean over folds"),
    Column("in the end", ".3f", "smoothed mean Dice of the weights that were kept"),
    Column("steps", ",d", "steps per training, mean over folds"),
    Column("hours", ",.3f", "hours x processes per training, without what a kill lost; mean over folds"),
    Column("grid"),
)

CSV_COLUMNS = (
    "grid rules drawn units first second score_first score_second difference low high low_all high_all verdict".split()
)

# Blues that differ in lightness, and greys, so that they differ for every kind of sight.
VERDICTS_SHOWN: dict[str, str] = {SHOWN: "#0072B2", SHOWN_ALONE: "#56B4E9", NOT_SHOWN: "#BBBBBB", TOO_FEW: "#DDDDDD"}


@dataclass(frozen=True)
class Compared:
    """Sources of one grid by the official rules over crops and over specimens, and by the rules `clean` over crops."""

    grid: str
    scores: list[Scores]
    rules: str
    official: Comparison
    specimens: Comparison
    clean: Comparison


def grids_of(runs: Sequence[Run]) -> dict[str, str]:
    """Return the grid of each model."""
    return {run.model: str(run.metrics["grid"]) for run in runs}


def by_grid(scores: Sequence[Scores], grids: Mapping[str, str]) -> dict[str, list[Scores]]:
    """Return the scores that compare, by grid: those of its models, and of the ensemble. grids: by model.

    A class of a crop is answered by the models of one grid alone, the nearest to its voxels, so that models of two
    grids are scored on different labels. The ensemble has the answers of all.
    """
    models = dict.fromkeys(entry.source for entry in scores if entry.source != ENSEMBLE)
    return {
        grid: [entry for entry in scores if entry.source == ENSEMBLE or grids.get(entry.source, "") == grid]
        for grid in dict.fromkeys(grids.get(model, "") for model in models)
    } or {"": list(scores)}


def pooled_records(scores: Sequence[Scores], *, clean: bool = False) -> dict[str, list[Record]]:
    """Return the records of all folds by source, those by the rules `clean` if asked for.

    Raises ContractError if the sources are scored by different rules: such scores do not compare.
    """
    rules = sorted({str(entry.content["rules"]) for entry in scores})
    if len(rules) > 1:
        raise ContractError(
            f"results/scores: scored by different rules ({', '.join(rules)}); run `snakemake -R evaluate`"
        )
    found: dict[str, list[Record]] = {}
    for entry in scores:
        found.setdefault(entry.source, []).extend(entry.clean_records() if clean else entry.content["records"])
    return found


def compare(scores: Sequence[Scores], specimens: Mapping[str, str], grids: Mapping[str, str]) -> list[Compared]:
    """Return the comparison of the sources of each grid.

    specimens: by dataset, where the built-in list does not know it. grids: by model. Raises ContractError for different
    rules.
    """
    everything = pooled_records(scores)
    datasets = {
        crop: crop.split("/")[0] for records in everything.values() for crop in {str(e["crop"]) for e in records}
    }
    known = {dataset: specimen for dataset, specimen in specimens.items() if dataset in datasets.values()}
    specimen = specimens_of(sorted(set(datasets.values())), known)
    unit_of = {crop: specimen[dataset] for crop, dataset in datasets.items()}
    rules = str(scores[0].content["rules"]) if scores else ""
    found = []
    for grid, own in by_grid(scores, grids).items():
        official, clean = pooled_records(own), pooled_records(own, clean=True)
        parts = compare_sources(official), compare_sources(official, unit_of), compare_sources(clean)
        found.append(Compared(grid, own, rules, *parts))
    return found


def write_comparison(
    score_jsons: Sequence[Path],
    runs: Sequence[Run],
    out_csv: Path,
    out_ranking: Path,
    out_html: Path,
    *,
    folds_csv: Path,
    specimens: Mapping[str, str] = {},
) -> None:
    """Write every pair of sources and the ranking as CSV, and both with costs and equal budgets as a page.

    score_jsons: `scores/{source}/fold{k}.json`. runs: the trainings of all models. specimens: `folds.specimens` of the
    configuration. Raises ContractError for scores by different rules.
    """
    scores = read_scores(score_jsons)
    compared = compare(scores, specimens, grids_of(runs))
    write_text(out_csv, as_csv(CSV_COLUMNS, [row for of_grid in compared for row in _pair_records(of_grid)]))
    rankings = [_ranking(of_grid, runs) for of_grid in compared]
    columns = [column for column in RANKING_COLUMNS if column.name != "from 0 to 1"]
    names = [column.name.replace(" ", "_") for column in columns]
    content = [
        {"grid": of_grid.grid, **{name: row[RANKING_COLUMNS.index(c)] for name, c in zip(names, columns, strict=True)}}
        for of_grid, ranking in zip(compared, rankings, strict=True)
        for row in ranking
    ]
    write_text(out_ranking, as_csv(["grid", *names], content))
    write_text(out_html, _page(compared, rankings, runs, describe_folds(folds_csv)))


def _pair_records(compared: Compared) -> list[dict[str, str | float | None]]:
    parts = (
        (compared.rules, CROPS, compared.official),
        (compared.rules, SPECIMENS, compared.specimens),
        (CLEAN, CROPS, compared.clean),
    )
    return [
        {
            "grid": compared.grid,
            "rules": rules,
            "drawn": drawn,
            "units": each.units,
            "first": each.first,
            "second": each.second,
            "score_first": part.scores[each.first].score,
            "score_second": part.scores[each.second].score,
            "difference": each.difference,
            **dict(zip(("low", "high", "low_all", "high_all"), _ends(each), strict=True)),
            "verdict": each.verdict,
        }
        for rules, drawn, part in parts
        for each in part.differences
    ]


def _ranking(compared: Compared, runs: Sequence[Run]) -> list[list[Content]]:
    """Return the sources, the best first, with what they cost; that alone where no label was scored for all."""
    official = compared.official
    ranks, groups = official.ranks(), official.groups()
    rows: list[list[Content]] = []
    for source in official.order or dict.fromkeys(entry.source for entry in compared.scores):
        scored: list[Content] = [None] * (len(RANKING_COLUMNS) - len(_COSTS) - 1)
        if source in official.scores:
            entry, best = official.scores[source], official.scores[official.order[0]].score
            scored = [
                *ranks[source],
                groups[source],
                entry.score,
                *((entry.low, entry.high) if official.units > 1 else (None, None)),
                Bar(entry.score, entry.low, entry.high) if official.units > 1 else Bar(entry.score),
                compared.clean.scores[source].score if source in compared.clean.scores else None,
                best - entry.score,
            ]
        own = [run for run in runs if source in (run.model, ENSEMBLE)]
        networks = {run.model: int(run.metrics["parameters"]) for run in own}
        rows.append(
            [
                source,
                *scored,
                *summed_hours(own),
                sum(int(run.metrics["steps"]) for run in own) if own else None,
                len(own) if own else None,
                sum(networks.values()) if own else None,
            ]
        )
    return rows


def _page(
    compared: Sequence[Compared], rankings: Sequence[Sequence[Sequence[Content]]], runs: Sequence[Run], division: str
) -> str:
    parts = [*map(paragraph, _introduction(compared, division))]
    for of_grid, ranking in zip(compared, rankings, strict=True):
        parts += _of_grid(of_grid, ranking, several=len(compared) > 1)
    parts += _unmeasured(runs)
    parts += _budget(runs)
    return page("Comparison", parts)


def _of_grid(compared: Compared, ranking: Sequence[Sequence[Content]], *, several: bool) -> list[str]:
    """Return the sections of one grid, which say so where there are several."""
    official, where = compared.official, f", grid {compared.grid}" if several else ""
    suffix = f"_{compared.grid}" if several else ""
    sources = sorted({entry.source for entry in compared.scores})
    parts = [heading(f"Ranking, with what it cost{where}")]
    if official.scores:
        parts += [paragraph(_scope(official)), paragraph(_leader(official))]
    else:
        said = f"no label of a crop was scored for all of {', '.join(sources)}" if sources else "nothing was scored"
        parts.append(paragraph(f"Nothing to compare: {said}."))
    parts += [table(RANKING_COLUMNS, ranking, name=f"ranking{suffix}")] if ranking else []
    if official.differences:
        parts += [heading(f"Every pair{where}"), *_pairs(official, f"pairs{suffix}", CROPS)]
        parts += _by_specimen(compared.specimens, where, suffix)
        parts += _by_clean(compared, where, suffix)
    return [*parts, *_gain(compared, where, suffix)]


def _introduction(compared: Sequence[Compared], division: str) -> list[str]:
    several = (
        [
            "A class of a crop is answered by the models of one grid, the nearest to its voxels: models of different "
            "grids are scored on different labels and do not compare. The ensemble has the answers of all, and is "
            "compared with the models of each grid on theirs."
        ]
        if len(compared) > 1
        else []
    )
    drawings = max((of_grid.official.resamples for of_grid in compared), default=0)
    return [
        f"Pooled over the folds that were trained. Validation: {division}. Scores are without unit; 1 is perfect. "
        f"{rules_sentences([*dict.fromkeys(of_grid.rules for of_grid in compared if of_grid.rules), CLEAN])}",
        *several,
        "Intervals say how far a score, or a difference, moves with the choice of crops. Each of "
        f"{drawings:,} drawings takes as many crops as there are, the same ones for every source: what makes "
        "a crop hard for all cancels in a difference. Voxels and objects are pooled, so that a few large crops may "
        "decide it: the interval of a difference is as wide as their number asks for, not that of all crops. Intervals "
        "do not contain how far a score moves when a training is repeated with another seed, as each was trained once "
        "per fold; a small difference that is shown here may "
        "still be luck of that kind.",
        f"'{SHOWN}': the difference holds among all pairs at once. "
        f"'{SHOWN_ALONE}': only if one had asked for this pair and no other; among many pairs some seem to differ by "
        f"chance. '{NOT_SHOWN}': a tie, 0 lies in the interval; it is no proof that both are the same. '{TOO_FEW}': "
        f"fewer than {FEWEST_UNITS} crops (or specimens), of which chance alone may let one source win every one.",
    ]


def _scope(official: Comparison) -> str:
    left_out = (
        f" {counted(official.left_out, 'label')} that not every source has are left out." if official.left_out else ""
    )
    kinds = (
        f" Only {official.kinds[0]} classes occur; the score is the mean over them." if len(official.kinds) == 1 else ""
    )
    return (
        f"{counted(len(official.scores), 'source')} on the same {counted(official.crops, 'validation crop')}, "
        f"{counted(official.labels, 'label')} in all.{left_out}{kinds}"
    )


def _leader(official: Comparison) -> str:
    best = official.order[0]
    ties = [source for source in official.order[1:] if (best, source) not in official.shown()]
    text = f"{best} has the highest score, {official.scores[best].score:.4f}."
    if official.units < FEWEST_UNITS:
        return (
            f"{text} {counted(official.units, 'crop')} are too few to tell whether any source is better than another."
        )
    if not ties:
        return f"{text} It is shown to be better than every other source." if len(official.scores) > 1 else text
    return f"{text} Not shown to be worse: {', '.join(ties)}."


def _pairs(part: Comparison, name: str, drawn: str) -> list[str]:
    rows: list[list[Content]] = [
        [
            each.first,
            each.second,
            each.difference,
            *_ends(each),
            Cell(each.verdict, VERDICTS_SHOWN[each.verdict]),
        ]
        for each in part.differences
    ]
    tally = ", ".join(
        f"{sum(each.verdict == verdict for each in part.differences)} {verdict}"
        for verdict in VERDICTS_SHOWN
        if any(each.verdict == verdict for each in part.differences)
    )
    return [
        paragraph(f"{counted(len(rows), 'pair')}: {tally}. Drawn: {part.units} {drawn}."),
        table(PAIR_COLUMNS, rows, name=name),
    ]


def _by_specimen(part: Comparison, where: str, suffix: str) -> list[str]:
    text = (
        "Crops of one specimen share preparation, staining and contrast. Drawing whole specimens says what may be "
        "expected of specimens that nobody has seen, drawing crops what may be expected of other crops of these."
    )
    if part.units < FEWEST_UNITS:
        few = f"There {'is' if part.units == 1 else 'are'} {counted(part.units, 'specimen')}: too few to tell."
        return [heading(f"Every pair, by specimen{where}"), paragraph(f"{text} {few}")]
    return [
        heading(f"Every pair, by specimen{where}"),
        paragraph(text),
        folded(counted(len(part.differences), "pair"), _pairs(part, f"pairs_specimens{suffix}", SPECIMENS)),
    ]


def _by_clean(compared: Compared, where: str, suffix: str) -> list[str]:
    official = {frozenset((each.first, each.second)): each for each in compared.official.differences}
    turned = [
        f"{each.first} and {each.second}"
        for each in compared.clean.differences
        if _claim(each) != _claim(official[frozenset((each.first, each.second))])
    ]
    said = f"The verdict is another one for {'; '.join(turned)}." if turned else "Every pair has the same verdict."
    return [
        heading(f"Every pair, by the rules 'clean'{where}"),
        paragraph(f"The same without the official evaluator's artefacts. {said}"),
        folded(counted(len(compared.clean.differences), "pair"), _pairs(compared.clean, f"pairs_clean{suffix}", CROPS)),
    ]


def _ends(each: Difference, *, turned: bool = False) -> list[float | None]:
    """Return low, high, low_all and high_all, or None four times: of a single crop nothing varies.

    turned: of the second source's score less the first's.
    """
    if each.units < 2:
        return [None] * 4
    if turned:
        return [-each.high, -each.low, -each.high_all, -each.low_all]
    return [each.low, each.high, each.low_all, each.high_all]


def _claim(each: Difference) -> tuple[str, str]:
    """Return the verdict, and who is better where a difference is shown."""
    return each.verdict, each.first if each.verdict in (SHOWN, SHOWN_ALONE) else ""


def _gain(compared: Compared, where: str, suffix: str) -> list[str]:
    """Return what the ensemble gains over each model, and over the best of them by class."""
    official = compared.official
    models = [source for source in official.order if source != ENSEMBLE]
    if ENSEMBLE not in official.scores or not models:
        return []
    of_ensemble = [each for each in official.differences if ENSEMBLE in (each.first, each.second)]
    rows: list[list[Content]] = []
    for each in of_ensemble:
        sign = 1 if each.first == ENSEMBLE else -1
        low, high, low_all, high_all = _ends(each) if sign > 0 else _ends(each, turned=True)
        other = each.second if sign > 0 else each.first
        rows.append(
            [
                other,
                sign * each.difference,
                low,
                high,
                low_all,
                high_all,
                Cell(each.verdict, VERDICTS_SHOWN[each.verdict]),
            ]
        )
    rows.sort(key=lambda row: models.index(str(row[0])))
    records = pooled_records(compared.scores)
    by_class = class_differences(records[ENSEMBLE], records[models[0]])
    numbers = [
        Column("gain", "+.4f", "score of the ensemble less that of the model, on the same crops"),
        Column("low", "+.4f", "lower end of its 95 % interval, by itself"),
        Column("high", "+.4f", "upper end of that interval"),
    ]
    of_all = [
        Column(f"{end}, all pairs", "+.4f", "of the interval that holds for all pairs") for end in ("low", "high")
    ]
    return [
        heading(f"What the ensemble gains{where}"),
        table([Column("over"), *numbers, *of_all, Column("verdict")], rows, name=f"gain{suffix}"),
        paragraph(
            f"Over {models[0]}, the best single model, by class. Each class by itself: of twenty classes without any "
            "difference one seems to have one by chance."
        ),
        table(
            [Column("class"), Column("crops", "d"), *numbers, Column("verdict")],
            [
                [
                    Cell(name, colour_of(name) if name in CLASSES else None),
                    by_class[name].units,
                    by_class[name].difference,
                    *_ends(by_class[name])[:2],
                    Cell(by_class[name].verdict, VERDICTS_SHOWN[by_class[name].verdict]),
                ]
                for name in in_order(by_class)
            ],
            name=f"gain_classes{suffix}",
        ),
    ]


def _unmeasured(runs: Sequence[Run]) -> list[str]:
    lacking = [f"{run.model}, fold {run.fold}" for run in runs if run.cost is None]
    if not lacking:
        return []
    return [paragraph(f"Hours are empty where a training was not measured: {'; '.join(lacking)} ({NOT_MEASURED}).")]


def _budget(runs: Sequence[Run]) -> list[str]:
    budget = equal_budget(runs)
    if not budget.runs:
        return []
    rows: list[list[Content]] = []
    for model in dict.fromkeys(run.model for run in budget.runs):
        own = [run for run in budget.runs if run.model == model]
        at_steps = [reached(run, steps=budget.steps) for run in own]
        at_hours = [reached(run, hours=budget.hours) if budget.hours is not None else None for run in own]
        hours = [None if run.course is None else float(run.course[1][-1]) for run in own]
        rows.append(
            [
                model,
                _mean([None if each is None else each[1] for each in at_steps]),
                _mean([None if each is None else each[1] for each in at_hours]),
                _rounded(_mean([None if each is None else each[0] for each in at_hours])),
                _mean([run.metrics["best_smoothed_dice"] for run in own]),
                _rounded(_mean([float(run.metrics["steps"]) for run in own])),
                _mean(hours),
                ", ".join(dict.fromkeys(str(run.metrics["grid"]) for run in own)),
            ]
        )
    rows.sort(key=lambda row: (-_number(row[2]), -_number(row[1]), str(row[0])))
    devices = dict.fromkeys(line.device for run in budget.runs for line in run.usage)
    kind = "GPU hours" if any(run.on_gpu for run in budget.runs) else "CPU hours (hours x processes)"
    by_hours = (
        f"{budget.hours:.3g} {kind} on {', '.join(devices)}{f' ({budget.note})' if budget.note else ''}"
        if budget.hours is not None
        else f"there is no equal budget of hours: {budget.note}"
    )
    grids = {str(run.metrics["grid"]) for run in budget.runs}
    warning = " The models are on different grids, and their Dice is measured there: compare with care." * (
        len(grids) > 1
    )
    return [
        heading("At an equal budget"),
        paragraph(
            f"The largest budget that all {counted(len(budget.runs), 'training')} reached: {budget.steps:,.0f} steps; "
            f"{by_hours}. Smoothed mean Dice of the training's own validations within it, mean over folds, without "
            "unit and without interval. A learning rate that falls over the whole training is still high in the middle "
            f"of one: a longer training looks worse here than one that was planned for this budget.{warning}"
        ),
        table(BUDGET_COLUMNS, rows, name="budget"),
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, None unless all values are known: other folds would be another comparison."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def _number(value: Content) -> float:
    return float(value) if isinstance(value, int | float) else -1.0
