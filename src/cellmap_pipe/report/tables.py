"""The report's table of scores: every source and fold, every class."""

import csv
import io
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from cellmap_pipe.classes import CLASSES, TESTED, score_ceiling
from cellmap_pipe.colours import colour_of
from cellmap_pipe.evaluation.challenge import aggregate
from cellmap_pipe.evaluation.paired import kinds_score
from cellmap_pipe.evaluation.rules import CLEAN
from cellmap_pipe.files import read_json, write_text
from cellmap_pipe.prepare.splits import describe_folds
from cellmap_pipe.report.ceiling import Ceilings, Pooled, pooled_ceiling, read_ceilings
from cellmap_pipe.report.pages import Cell, Column, Content, folded, heading, page, paragraph, table
from cellmap_pipe.report.versions import rules_name, rules_sentences

Path = str | os.PathLike[str]
Record = Mapping[str, Any]

OVERALL = "overall"
ENSEMBLE = "ensemble"

SCORE_COLUMNS: tuple[Column, ...] = (
    Column("source", hint="a model's name, or the ensemble of all models"),
    Column("fold", hint="validation fold; 'mean' is the mean over the folds"),
    Column("class"),
    Column("kind", hint="how the challenge scores the class: by instance or by voxel"),
    Column("crops", "d", "validation crops in which the class is annotated"),
    Column("dice", ".3f", "Dice over the known voxels; in the overall row the mean over the classes that occur"),
    Column("iou", ".3f", "intersection over union of the voxels, pooled over crops"),
    Column("f1", ".3f", "F1 of the matched instances, pooled over crops"),
    Column("hausdorff", ".3f", "normalised Hausdorff distance: 1 is perfect"),
    Column("combined", ".3f", "square root of f1 x hausdorff"),
    Column("score", ".3f", "the challenge's score: iou or combined; overall, the geometric mean of both kinds"),
    Column("score_clean", ".3f", "score by the rules 'clean', without the official evaluator's artefacts"),
    Column("grid_ceiling", ".3f", "the score of the labels themselves after their way to the grid and back"),
    Column("score_low", ".3f", "lower end of the score's 95 % interval (bootstrap over crops)"),
    Column("score_high", ".3f", "upper end of that interval"),
    Column("score_background", ".3f", "the score of an answer that marks nothing"),
    Column("untrained_dice", ".3f", "mean Dice of the network before training"),
    Column("ceiling", ".3f", "highest score that the answered classes can reach on the challenge's 48 classes"),
    Column("parameters", "d", "weights of the network"),
    Column("steps", "d", "optimiser steps"),
    Column("rules", hint="version of the scoring rules"),
)

CROP_COLUMNS = tuple("source fold crop voxel_nm classes dice instance semantic score score_clean rules".split())

VOXEL_COLUMNS: tuple[Column, ...] = (
    Column("voxel edge (nm)", ".4g", "cube root of the voxel's volume"),
    Column("voxel (z y x, nm)", hint="voxels of the labels, on which predictions are scored"),
    Column("source"),
    Column("crops", "d", "validation crops of this voxel size, of all folds"),
    Column("classes", "d", "classes that these crops annotate"),
    Column("instance", ".3f", "mean score over the instance classes, pooled over these crops"),
    Column("semantic", ".3f", "mean score over the semantic classes, pooled over these crops"),
    Column("score", ".3f", "geometric mean of both kinds, or the score of the only kind that occurs"),
    Column("score_clean", ".3f", "the same by the rules 'clean', without the official evaluator's artefacts"),
)

# Columns that are empty in the rows of classes, and in the overall rows.
_OF_WHOLE_RUNS = ("score_low", "score_high", "untrained_dice", "ceiling", "parameters", "steps")
_OF_CLASSES = ("class", "kind", "iou", "f1", "hausdorff", "combined")

ScoreRow = dict[str, str | int | float | None]


@dataclass(frozen=True)
class Scores:
    """One scores JSON: of which `source` (a model or "ensemble") and `fold`, and its content."""

    source: str
    fold: str
    content: dict[str, Any]

    @property
    def dice(self) -> dict[str, float | None]:
        """Dice by class, None where it is undefined."""
        return dict(self.content["dice"])

    def class_score(self, name: str, variant: str = "aggregate") -> float | None:
        """Return the class's score (iou or combined) in `variant`: aggregate, clean or background."""
        entry = self.content[variant]["label_scores"].get(name)
        return None if entry is None else entry.get("iou", entry.get("combined_score"))

    def overall(self, variant: str = "aggregate") -> float | None:
        """Return the overall score in `variant`."""
        score = self.content[variant]["overall_score"]
        return None if score is None else float(score)

    @property
    def mean_dice(self) -> float | None:
        """Mean Dice over the classes that occur."""
        value = self.content["mean_dice"]
        return None if value is None else float(value)

    def clean_records(self) -> list[Record]:
        """Return the records by the rules 'clean', where they do not differ those by the official ones."""
        differing = {(entry["crop"], entry["label"]): entry for entry in self.content["clean_records"]}
        return [differing.get((entry["crop"], entry["label"]), entry) for entry in self.content["records"]]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The (crop, class) that count in the scores."""
        return [(entry["crop"], entry["label"]) for entry in self.content["records"] if entry.get("status") != "failed"]

    @property
    def classes(self) -> list[str]:
        """The scored classes in the challenge's order."""
        named = {*self.content["dice"], *self.content["aggregate"]["label_scores"]}
        return [name for name in CLASSES if name in named]


def read_scores(score_jsons: Iterable[Path]) -> list[Scores]:
    """Return the scores in the given order. Raises ContractError for an unreadable file."""
    contents = [read_json(path, "run `snakemake -R evaluate`") for path in score_jsons]
    return [Scores(str(content["model"]), str(content["fold"]), content) for content in contents]


def read_metrics(metrics_jsons: Iterable[Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the contents of metrics.json files by (model, fold). Raises ContractError for an unreadable file."""
    contents = [read_json(path, "run `snakemake -R train`") for path in metrics_jsons]
    return {(str(content["model"]), str(content["fold"])): content for content in contents}


def score_rows(
    scores: Sequence[Scores], metrics: Mapping[tuple[str, str], Mapping[str, Any]], ceilings: Ceilings
) -> list[ScoreRow]:
    """Return one overall row per source and fold, followed by one row per class; means where a source has many folds.

    metrics: contents of metrics.json by (model, fold); the ensemble has none. ceilings: of all grids; a model's grid
    counts for it, for the ensemble the grid nearest each crop. Where one is lacking `grid_ceiling` is empty.
    """
    rows: list[ScoreRow] = []
    for source in dict.fromkeys(entry.source for entry in scores):
        of_source = [entry for entry in scores if entry.source == source]
        by_fold = [_rows_of(entry, metrics.get((entry.source, entry.fold), {}), ceilings) for entry in of_source]
        if len(by_fold) > 1:
            rows += _mean_rows(by_fold)
        rows += [row for fold_rows in by_fold for row in fold_rows]
    return rows


def grid_ceiling(entry: Scores, metrics: Mapping[str, Any], ceilings: Ceilings) -> Pooled:
    """Return what the labels score on the grid that served each crop: the model's, or, for an ensemble, the nearest.

    metrics: content of the model's metrics.json, empty for the ensemble.
    """
    return pooled_ceiling(ceilings.serving(entry.pairs, metrics.get("grid")), entry.pairs, entry.content["rules"])


def _rows_of(entry: Scores, metrics: Mapping[str, Any], ceilings: Ceilings) -> list[ScoreRow]:
    content = entry.content
    ceiling = grid_ceiling(entry, metrics, ceilings)
    base: ScoreRow = {column.name: None for column in SCORE_COLUMNS}
    base |= {"source": entry.source, "fold": entry.fold, "rules": rules_name(content["rules"])}
    crops_of = {
        name: len({record["crop"] for record in content["records"] if record["label"] == name})
        for name in entry.classes
    }
    overall = base | {
        "class": OVERALL,
        "crops": len({record["crop"] for record in content["records"]}),
        "dice": entry.mean_dice,
        "score": entry.overall(),
        "grid_ceiling": ceiling.overall,
        "score_low": content["interval"]["low"],
        "score_high": content["interval"]["high"],
        "score_clean": entry.overall("clean"),
        "score_background": entry.overall("background"),
        "untrained_dice": metrics.get("untrained_mean_dice"),
        "ceiling": content["ceiling"],
        "parameters": metrics.get("parameters"),
        "steps": metrics.get("steps"),
    }
    rows = [overall]
    for name in entry.classes:
        official = content["aggregate"]["label_scores"].get(name, {})
        rows.append(
            base
            | {
                "class": name,
                "kind": "instance" if CLASSES[name].instance else "semantic",
                "crops": crops_of[name],
                "dice": entry.dice.get(name),
                "iou": official.get("iou"),
                "f1": official.get("f1"),
                "hausdorff": official.get("normalized_hausdorff_distance"),
                "combined": official.get("combined_score"),
                "score": entry.class_score(name),
                "grid_ceiling": ceiling.classes.get(name),
                "score_clean": entry.class_score(name, "clean"),
                "score_background": entry.class_score(name, "background"),
            }
        )
    return rows


def _mean_rows(by_fold: Sequence[Sequence[ScoreRow]]) -> list[ScoreRow]:
    """Return the mean over folds of each class's row; crops are added up, words kept."""
    names = [OVERALL, *(name for name in CLASSES if any(row["class"] == name for rows in by_fold for row in rows))]
    means: list[ScoreRow] = []
    for name in names:
        same = [row for rows in by_fold for row in rows if row["class"] == name]
        mean = dict(same[0]) | {"fold": "mean"}
        for column in SCORE_COLUMNS:
            values = [value for row in same if isinstance(value := row[column.name], int | float)]
            if column.name in ("score_low", "score_high"):
                mean[column.name] = None  # the mean of intervals is not the interval of the mean
            elif column.format == "d" and values:
                mean[column.name] = sum(values) if column.name == "crops" else round(fmean(values))
            elif column.numeric and values:
                mean[column.name] = fmean(values)
        means.append(mean)
    return means


def as_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a header, numbers with six digits, None as an empty cell."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    return stream.getvalue()


def write_scores(
    score_jsons: Sequence[Path],
    metrics_jsons: Sequence[Path],
    ceiling_jsons: Sequence[Path],
    out_csv: Path,
    out_html: Path,
    *,
    out_crops: Path | None = None,
    folds_csv: Path | None = None,
) -> None:
    """Write the table of scores as CSV, and as a sortable HTML page that needs nothing but itself.

    out_crops: CSV of the scores of each crop by itself (`crop_rows`).

    score_jsons: `scores/{source}/fold{k}.json`; metrics_jsons: `train/{model}/fold{k}/metrics.json`; ceiling_jsons:
    `ceiling/{grid}/shard{n}.json` of all grids in use; folds_csv: the fold table, described on the page.
    One overall row per source and fold, then one row per class (`score_rows`); numbers with six digits in the CSV.
    """
    scores, metrics = read_scores(score_jsons), read_metrics(metrics_jsons)
    rows = score_rows(scores, metrics, read_ceilings(ceiling_jsons))
    write_text(out_csv, as_csv([column.name for column in SCORE_COLUMNS], rows))
    by_crop = crop_rows(scores)
    if out_crops is not None:
        write_text(out_crops, as_csv(CROP_COLUMNS, by_crop))
    learned = {str(name) for content in metrics.values() for name in content["classes"]}
    division = describe_folds(folds_csv) if folds_csv else ""
    write_text(out_html, _scores_page(scores, rows, by_crop, learned, division))


def crop_rows(scores: Sequence[Scores]) -> list[ScoreRow]:
    """Return what each source scores in each crop by itself, by both rules; keys are CROP_COLUMNS.

    A crop without classes of a kind counts by the other kind (`kinds_score`); dice is the mean over its classes.
    """
    rows: list[ScoreRow] = []
    for entry in scores:
        official, clean = _by_crop(entry.content["records"]), _by_crop(entry.clean_records())
        for crop in sorted(official):
            records = official[crop]
            kinds = _kind_scores(records)
            dice = [float(record["dice"]) for record in records if record.get("dice") is not None]
            rows.append(
                {
                    "source": entry.source,
                    "fold": entry.fold,
                    "crop": crop,
                    "voxel_nm": ";".join(f"{size:g}" for size in _voxel_nm(records)),
                    "classes": len({record["label"] for record in records}),
                    "dice": fmean(dice) if dice else None,
                    **kinds,
                    "score": kinds_score(records),
                    "score_clean": kinds_score(clean[crop]),
                    "rules": rules_name(entry.content["rules"]),
                }
            )
    return rows


def _by_crop(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the records that were scored, by crop."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["status"] != "failed":
            found.setdefault(str(record["crop"]), []).append(record)
    return found


def _voxel_nm(records: Iterable[Record]) -> tuple[float, ...]:
    """Return the voxel size (z, y, x) of the labels, () where the records do not tell."""
    return next((tuple(map(float, record["voxel_size"])) for record in records if record.get("voxel_size")), ())


def _kind_scores(records: Sequence[Record]) -> dict[str, float | None]:
    """Return the mean scores over the instance and over the semantic classes, None where there is none of a kind."""
    by_class = aggregate(records)["label_scores"].values()
    values = {
        kind: [float(entry[key]) for entry in by_class if key in entry]
        for kind, key in (("instance", "combined_score"), ("semantic", "iou"))
    }
    return {kind: fmean(found) if found else None for kind, found in values.items()}


def _voxel_rows(scores: Sequence[Scores]) -> list[list[Content]]:
    """Return what each source scores over the crops of each voxel size, the finest first; columns: VOXEL_COLUMNS."""
    pools: dict[tuple[tuple[float, ...], str], tuple[list[Record], list[Record]]] = {}
    for entry in scores:
        clean = _by_crop(entry.clean_records())
        for crop, records in _by_crop(entry.content["records"]).items():
            official_pool, clean_pool = pools.setdefault((_voxel_nm(records), entry.source), ([], []))
            official_pool += records
            clean_pool += clean[crop]
    order = list(dict.fromkeys(entry.source for entry in scores))
    return [
        [
            math.prod(voxel) ** (1 / 3) if voxel else None,
            " x ".join(f"{size:g}" for size in voxel),
            source,
            len({record["crop"] for record in official}),
            len({record["label"] for record in official}),
            *_kind_scores(official).values(),
            kinds_score(official),
            kinds_score(clean_pool),
        ]
        for (voxel, source), (official, clean_pool) in sorted(
            pools.items(), key=lambda item: (math.prod(item[0][0]), item[0][0], order.index(item[0][1]))
        )
    ]


def _crop_tables(by_crop: Sequence[ScoreRow], rules: Sequence[str]) -> list[str]:
    """Return a row per crop with a column per source: by the official rules, and, folded, by the rules 'clean'."""
    sources = list(dict.fromkeys(str(row["source"]) for row in by_crop))
    found = {(row["crop"], row["source"]): row for row in by_crop}
    crops = sorted({str(row["crop"]): row for row in by_crop}.items())
    first = [
        Column("crop"),
        Column("fold", hint="the fold in whose validation the crop is"),
        Column("voxel (z y x, nm)", hint="voxels of the labels"),
        Column("classes", "d", "classes that were scored"),
    ]

    def of_key(key: str, name: str) -> str:
        return table(
            [*first, *(Column(source, ".3f", "score of this crop alone") for source in sources)],
            [
                [
                    crop,
                    row["fold"],
                    str(row["voxel_nm"]).replace(";", " x "),
                    row["classes"],
                    *(found.get((crop, source), {}).get(key) for source in sources),
                ]
                for crop, row in crops
            ],
            name=name,
        )

    return [
        heading("Per crop"),
        paragraph(
            f"The score of each crop by itself, by the rules {rules_name(*rules)}: the geometric mean of its instance "
            "and semantic classes, or the score of the only kind that it has. A class that the crop annotates as "
            "absent counts 1 where nothing is marked. Pooled over crops, as above, large crops count for more."
        ),
        of_key("score", "crops"),
        folded("The same by the rules 'clean'", [of_key("score_clean", "crops_clean")]),
    ]


def _scores_page(
    scores: Sequence[Scores],
    rows: Sequence[ScoreRow],
    by_crop: Sequence[ScoreRow],
    learned: Collection[str],
    division: str,
) -> str:
    overall = [row for row in rows if row["class"] == OVERALL]
    rules = list(dict.fromkeys(str(entry.content["rules"]) for entry in scores))
    by_class = [row for row in rows if row["class"] != OVERALL]
    overall_columns = [column for column in SCORE_COLUMNS if column.name not in _OF_CLASSES]
    class_columns = [column for column in SCORE_COLUMNS if column.name not in _OF_WHOLE_RUNS]
    # where there are several folds the best of their means: the best of single folds would be that of the easiest one
    whole = [row for row in overall if row["fold"] == "mean"] or overall
    best = _best(scores, whole)
    parts = [
        paragraph(
            "Every number is measured on validation crops that the model never saw in training. All are without unit; "
            "1 is perfect. Click on a column's head to sort; hover over it for its meaning."
        ),
        *([paragraph(rules_sentences([*rules, CLEAN]))] if rules else []),
        *([paragraph(f"Validation: {division}.")] if division else []),
        paragraph(
            "Read each score beside its grid_ceiling: what the labels themselves score, over the same crops, after "
            "their way to the model's grid and back. A score near its ceiling asks for a finer grid, not for a better "
            "network."
        ),
        paragraph(_ceiling_sentence(scores, learned)),
        heading("Overall"),
        table(
            overall_columns,
            [[row[column.name] for column in overall_columns] for row in overall],
            strong=[overall.index(row) for row in best],
            name="overall",
        ),
        *(paragraph(text) for text in _overall_notes(scores, emphasised=bool(best))),
    ]
    failed = [[f"{entry.source}, fold {entry.fold}", line] for entry in scores for line in entry.content["failed"]]
    if failed:
        parts += [heading("Not scored"), table([Column("source"), Column("cause")], failed, name="failed")]
    differences = [
        [entry.source, entry.fold, *row]
        for entry in scores
        for row in differing_rows(entry.content["records"], entry.content["clean_records"])
    ]
    if differences:
        parts += [
            heading("Where the rules differ"),
            paragraph(
                f"Counts or distances of these labels of crops differ between {rules_name(*rules)} and {CLEAN}: ids of "
                "unmatched objects that collide with those of others, crops that are skipped, boxes that come to lie "
                "one voxel off."
            ),
            folded(
                counted(len(differences), "label") + " of crops",
                [
                    table(
                        [Column("source"), Column("fold"), *differing_columns(rules_name(*rules))],
                        differences,
                        name="differs",
                    )
                ],
            ),
        ]
    parts += [
        heading("Per class"),
        table(
            class_columns,
            [
                [
                    Cell(row[column.name], colour_of(str(row["class"]))) if column.name == "class" else row[column.name]
                    for column in class_columns
                ]
                for row in by_class
            ],
            name="classes",
        ),
    ]
    if by_crop:
        parts += [
            heading("Per voxel size"),
            paragraph("Crops whose labels have voxels of one size, pooled over the folds as for the overall score."),
            table(VOXEL_COLUMNS, _voxel_rows(scores), name="voxels"),
            *_crop_tables(by_crop, rules),
        ]
    return page("Scores", parts)


def _best(scores: Sequence[Scores], rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    """Return the best of those rows whose sources are scored on the same labels of crops, of each such group."""
    labels: dict[str, set[tuple[str, str, str]]] = {}
    for entry in scores:
        labels.setdefault(entry.source, set()).update((entry.fold, *pair) for pair in entry.pairs)
    groups: dict[frozenset[tuple[str, str, str]], list[ScoreRow]] = {}
    for row in rows:
        groups.setdefault(frozenset(labels[str(row["source"])]), []).append(row)
    found = []
    for group in groups.values():
        best = max(group, key=lambda row: float(row["score"] or 0))
        if best["score"] and (len(group) > 1 or len(groups) == 1):
            found.append(best)
    return found


def _overall_notes(scores: Sequence[Scores], *, emphasised: bool) -> list[str]:
    """Return what has to be known before overall scores are compared."""
    notes = ["Bold: the best of the sources that are scored on the same labels of crops."] if emphasised else []
    left: dict[str, int] = {}
    for entry in scores:
        left[entry.source] = left.get(entry.source, 0) + len(entry.content.get("not_served", ()))
    if any(left.values()):
        told = ", ".join(f"{source} {number}" for source, number in left.items() if number)
        notes.append(
            "Scores of models of different grids do not compare: each answers what its grid is the nearest for. Crops "
            f"or labels of crops that were left to another grid: {told}."
        )
    kinds = {key for entry in scores for found in entry.content["aggregate"]["label_scores"].values() for key in found}
    lacking = [kind for kind, key in (("instance", "combined_score"), ("semantic", "iou")) if key not in kinds]
    if scores and len(lacking) == 1:
        notes.append(
            f"No {lacking[0]} class occurs: the challenge's overall score, a geometric mean of both kinds, is 0 then "
            "for every source. The comparison of models ranks by the kind that occurs."
        )
    return notes


def differing_columns(rules: str) -> list[Column]:
    """Return the columns of `differing_rows`; rules: name of the rules beside `clean`."""
    counts = "objects of an instance class, voxels of the others"
    return [
        Column("crop"),
        Column("class"),
        Column(f"score by {rules}", ".3f"),
        Column("score by clean", ".3f"),
        Column(f"tp, fp, fn by {rules}", hint=counts),
        Column("tp, fp, fn by clean", hint=counts),
        Column("status", hint="what the first rules did with this label"),
    ]


def differing_rows(records: Iterable[Record], clean: Iterable[Record]) -> list[list[Content]]:
    """Return a row for each label that two versions of the rules count differently.

    records, clean: records with `crop` and `label`, those of `clean` where they differ. What `clean` does not score at
    all (a truth array `<label>_mask`) is no record of it and has no row.
    """
    by_name = {(record["crop"], record["label"]): record for record in records}
    rows: list[list[Content]] = []
    for other in clean:
        record = by_name[other["crop"], other["label"]]
        counts = [", ".join(str(each.get(key, "")) for key in ("tp", "fp", "fn")) for each in (record, other)]
        name = Cell(other["label"], colour_of(other["label"]) if other["label"] in CLASSES else None)
        rows.append([other["crop"], name, _alone(record), _alone(other), *counts, str(record["status"])])
    return rows


def _alone(record: Record) -> float | None:
    """Return what one record scores by itself, None where it drops out of the pool."""
    if record["status"] != "scored" and not any(record.get(key) for key in ("tp", "fp", "fn")):
        return None
    score = next(iter(aggregate([record])["label_scores"].values()))
    return float(score["iou"] if "iou" in score else score["combined_score"])


def in_order(names: Collection[str]) -> list[str]:
    """Return classes in the challenge's order, others behind them."""
    return [*(name for name in CLASSES if name in names), *sorted(set(names) - set(CLASSES))]


def counted(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _ceiling_sentence(scores: Sequence[Scores], learned: Collection[str]) -> str:
    """Return what the class list can reach at best; learned: the classes that the models were trained on."""
    if not scores:
        return "Nothing was scored."
    answered = max(float(entry.content["ceiling"]) for entry in scores)
    alone = score_ceiling(learned)
    derived = f"; with the groups that are derived from them, {answered:.3f}" if answered > alone else ""
    return (
        f"The challenge tests {len(TESTED)} classes and counts a missing one as 0. The highest overall score that the "
        f"{len(learned)} learned classes can reach there is {alone:.3f}{derived}. The scores below are means over the "
        "classes that these crops annotate, not over all of those, and may therefore be higher."
    )


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as dicts of text."""
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))
