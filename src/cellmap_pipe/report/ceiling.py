"""The best score that a grid allows: pooled as scores are, on a page of its own and beside every later score."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.colours import colour_of
from cellmap_pipe.evaluation.challenge import aggregate
from cellmap_pipe.files import read_json, write_text
from cellmap_pipe.geometry import nearest_grid
from cellmap_pipe.prepare.crops import read_crops
from cellmap_pipe.report.pages import Cell, Column, Content, heading, page, paragraph, table
from cellmap_pipe.report.versions import rules_sentences

Path = str | os.PathLike[str]
Record = Mapping[str, Any]
Pair = tuple[str, str]  # crop, class

CLASS_COLUMNS: tuple[Column, ...] = (
    Column("class"),
    Column("kind", hint="how the challenge scores the class: by instance or by voxel"),
    Column("voxel (z y x, nm)", hint="voxels of the labels, to which predictions are taken back"),
    Column("crops", "d", "crops in use in which the class is annotated at this voxel size"),
    Column("present", "d", "those in which there is some of it"),
    Column("iou", ".3f", "intersection over union of the voxels, pooled over crops"),
    Column("dice", ".3f", "Dice of the voxels, pooled over crops"),
    Column("f1", ".3f", "F1 of the matched instances, pooled over crops"),
    Column("hausdorff", ".3f", "normalised Hausdorff distance: 1 is perfect"),
    Column("combined", ".3f", "square root of f1 x hausdorff"),
    Column("score", ".3f", "the challenge's score, iou or combined; empty where no voxel is of the class"),
    Column(
        "volume kept (%)", ".1f", "volume after grid and way back, in % of that in the labels; above 100: thickened"
    ),
    Column("volume on the grid (%)", ".1f", "volume in the labels that a network learns from, in % of the same"),
    Column("volume (um3)", ".4g", "volume of the class in the labels, in cubic micrometres"),
)

OVERALL_COLUMNS: tuple[Column, ...] = (
    Column("voxel (z y x, nm)"),
    Column("crops", "d"),
    Column("classes", "d", "classes annotated in them"),
    Column("instance", ".3f", "mean score over the instance classes"),
    Column("semantic", ".3f", "mean score over the semantic classes"),
    Column("score", ".3f", "the challenge's overall score: the geometric mean of both"),
)

# Classes that the page names as losing most, if they score less than this.
_NOTABLE, _MOST = 0.9, 6


@dataclass(frozen=True)
class Pooled:
    """Scores by the challenge's formulas: overall, and by class; None where they cannot be told."""

    overall: float | None
    classes: Mapping[str, float | None]


@dataclass(frozen=True)
class Ceilings:
    """The ceilings of all grids: their voxel sizes ("native" or (z, y, x) in nm), and records by grid and pair."""

    voxel_nm: Mapping[str, Sequence[float] | str]
    records: Mapping[str, Mapping[Pair, Record]]

    def serving(self, pairs: Iterable[Pair], grid: str | None) -> dict[Pair, Record]:
        """Return the records of the pairs (crop, class) on `grid`, or, where it is None, on the grid nearest each crop.

        The nearest is the one that predictions of the crop are made on. Pairs without a record are left out.
        """
        sizes = {crop: entry["voxel_size"] for found in self.records.values() for (crop, _), entry in found.items()}
        chosen = {crop: grid or nearest_grid(self.voxel_nm, size) for crop, size in sizes.items()}
        return {
            (crop, label): self.records[chosen[crop]][crop, label]
            for crop, label in pairs
            if crop in chosen and (crop, label) in self.records.get(chosen[crop], {})
        }


def read_ceilings(ceiling_jsons: Iterable[Path]) -> Ceilings:
    """Return the ceilings in the shards of one or more grids. Raises ContractError for an unreadable file."""
    voxel_nm: dict[str, Sequence[float] | str] = {}
    records: dict[str, dict[Pair, Record]] = {}
    for path in ceiling_jsons:
        shard = read_json(path, "run `snakemake -R ceiling`")
        voxel_nm[shard["grid"]] = shard["voxel_nm"]
        found = records.setdefault(shard["grid"], {})
        found.update(
            {(entry["crop"], entry["label"]): {**entry, "rules": shard["rules"]} for entry in shard["records"]}
        )
    return Ceilings(voxel_nm, records)


def pooled_ceiling(records: Mapping[Pair, Record], pairs: Iterable[Pair], rules: str) -> Pooled:
    """Return the ceiling of scores over the given pairs (crop, class), pooled as those are (`challenge.aggregate`).

    A class of which a pair has no record, or an instance class whose records follow other rules, has None; then so has
    the overall score.
    """
    wanted = sorted(set(pairs))
    known = {pair: entry for pair in wanted if (entry := records.get(pair)) and _usable(entry, rules)}
    lacking = {label for crop, label in wanted if (crop, label) not in known}
    result = aggregate(known.values())
    classes = {
        label: None if label in lacking else _score(result["label_scores"][label])
        for label in sorted({label for _, label in wanted})
    }
    return Pooled(None if lacking or not wanted else float(result["overall_score"]), classes)


def _usable(record: Record, rules: str) -> bool:
    return record["status"] != "failed" and (record["kind"] == "semantic" or record["rules"] == rules)


def _score(entry: Mapping[str, float]) -> float:
    return entry["iou"] if "iou" in entry else entry["combined_score"]


def write_ceiling(ceiling_jsons: Sequence[Path], quality_csv: Path, out_html: Path) -> None:
    """Write the page of one grid: what the labels score after their way to the grid and back, over the crops in use.

    ceiling_jsons: all shards of the grid. quality_csv: `quality/{grid}/crops.csv`; crops with verdict keep are in use.
    """
    ceilings = read_ceilings(ceiling_jsons)
    used = {row["crop"] for row in read_crops(os.fspath(quality_csv)) if row["verdict"] == "keep"}
    records = [entry for found in ceilings.records.values() for entry in found.values() if entry["crop"] in used]
    scored = [entry for entry in records if entry["status"] != "failed"]
    failed = [[f"{entry['crop']}/{entry['label']}", entry["cause"]] for entry in records if entry["status"] == "failed"]
    grid = next(iter(ceilings.voxel_nm), "")
    rules = sorted({entry["rules"] for entry in scored})
    parts = [paragraph(text) for text in _introduction(grid, scored)]
    parts += [paragraph(rules_sentences(rules))] if rules else []
    if scored:
        sizes = sorted({_voxel(entry) for entry in scored}, key=lambda size: (math.prod(size), size))
        by_size = {size: [entry for entry in scored if _voxel(entry) == size] for size in sizes}
        overall = [_overall_row(_text(size), entries) for size, entries in by_size.items()]
        parts += [
            heading("Overall"),
            table(OVERALL_COLUMNS, overall, totals=_overall_row("all", scored), name="overall"),
            heading("Per class and voxel size"),
            table(CLASS_COLUMNS, _class_rows(by_size), name="classes"),
        ]
    if failed:
        parts += [heading("Not scored"), table([Column("label"), Column("cause")], failed, name="failed")]
    write_text(out_html, page(f"Best score that grid {grid} allows", parts))


def _introduction(grid: str, records: Sequence[Record]) -> list[str]:
    if not records:
        return ["No crop in use has a label that could be scored."]
    return [
        f"The labels themselves were taken to grid {grid} and back to their own voxels, as predictions are, and scored "
        "against what they were: this is what a network reaches that answers with the labels of this grid without "
        "fault. What iou lacks to 1 is lost to the grid, mostly in structures as thin as its voxels, and a finer grid "
        "wins it back; an f1 far below 1 beside a good iou means objects that touch and are joined, or objects in "
        "pieces, since instances are connected components. Where there is no EM, labels on the grid are unknown and "
        "count as not answered. Read each later score beside its ceiling. (Probabilities "
        "between 0 and 1 place a surface within a voxel, so that a network may come a little above.) All scores are "
        "without unit. Click on a column's head to sort; hover over it for its meaning.",
        _losers(records),
    ]


def _losers(records: Sequence[Record]) -> str:
    """Return the sentence on the classes that lose most on the way."""
    present = {entry["label"] for entry in records if entry["truth_nm3"]}
    scores = {name: _score(value) for name, value in aggregate(records)["label_scores"].items() if name in present}
    worst = sorted((score, name) for name, score in scores.items() if score < _NOTABLE)[:_MOST]
    if not worst:
        return f"No class loses much: all {len(scores)} that occur keep a score of at least {_NOTABLE:g}."
    named = []
    for score, name in worst:
        kept = _share([entry for entry in records if entry["label"] == name], "kept_nm3")
        named.append(f"{name} ({score:.2f}, {kept:.0f} %)")
    return f"The lowest scores, with the volume that is kept: {', '.join(named)}."


def _share(records: Sequence[Record], key: str) -> float | None:
    truth = sum(entry["truth_nm3"] for entry in records)
    return 100 * sum(entry[key] for entry in records) / truth if truth else None


def _voxel(record: Record) -> tuple[float, ...]:
    return tuple(record["voxel_size"])


def _text(size: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in size)


def _overall_row(name: str, records: Sequence[Record]) -> list[Content]:
    result = aggregate(records)
    kinds = {entry["kind"] for entry in records}
    return [
        name,
        len({entry["crop"] for entry in records}),
        len(result["label_scores"]),
        result["overall_instance_score"] if "instance" in kinds else None,
        result["overall_semantic_score"] if "semantic" in kinds else None,
        result["overall_score"] if len(kinds) == 2 else None,
    ]


def _class_rows(by_size: Mapping[tuple[float, ...], Sequence[Record]]) -> list[list[Content]]:
    rows = []
    for name in CLASSES:
        for size, entries in by_size.items():
            of_class = [entry for entry in entries if entry["label"] == name]
            if of_class:
                rows.append(_class_row(name, size, of_class))
    return rows


def _class_row(name: str, size: Sequence[float], records: Sequence[Record]) -> list[Content]:
    """Return one row of the page; scores are left out where there is nothing to lose."""
    tp, fp, fn = (sum(entry["voxels"][key] for entry in records) for key in ("tp", "fp", "fn"))
    official = aggregate(records)["label_scores"][name] if tp + fp + fn else {}
    truth_nm3 = sum(entry["truth_nm3"] for entry in records)
    return [
        Cell(name, colour_of(name)),
        str(records[0]["kind"]),
        _text(size),
        len(records),
        sum(entry["truth_nm3"] > 0 for entry in records),
        tp / (tp + fp + fn) if tp + fp + fn else None,
        2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None,
        official.get("f1"),
        official.get("normalized_hausdorff_distance"),
        official.get("combined_score"),
        _score(official) if official else None,
        _share(records, "kept_nm3"),
        _share(records, "grid_nm3"),
        truth_nm3 / 1e9,
    ]
