"""What post-processing was tuned to, and what that is worth on crops that were not looked at."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.colours import colour_of
from cellmap_pipe.files import read_json, write_text
from cellmap_pipe.prediction.processing import REMEDY
from cellmap_pipe.report.pages import Cell, Column, Content, heading, page, paragraph, table
from cellmap_pipe.report.versions import rules_sentences

Path = str | os.PathLike[str]

COLUMNS: tuple[Column, ...] = (
    Column("class"),
    Column("kind", hint="how the challenge scores the class: by instance or by voxel"),
    Column("crops", "d", "validation crops in which the class is annotated"),
    Column("configured", ".3f", "score on these crops with the configured processing"),
    Column("tuned", ".3f", "score with what the crops of other groups led to: no crop is scored by what it taught"),
    Column("gain", "+.3f", "tuned less configured"),
    Column("kept", hint="whether the volumes to segment are processed as tuned"),
    Column("threshold", ".3f", "probability above which a voxel belongs to the class, for volumes that are segmented"),
    Column("holes (nm3)", ".3g", "smaller pockets of background are filled"),
    Column("split (nm)", ".3g", "objects are parted where a neck is thinner than twice this"),
    Column("least size (nm3)", ".3g", "smaller objects are removed"),
    Column("cause", hint="why nothing was tuned"),
)


def write_tuning(tuned_jsons: Sequence[Path], out_html: Path) -> None:
    """Write a page with one table per model, and one for the ensemble: scores before and after, and the choice.

    tuned_jsons: `tune/{source}.json`. Raises ContractError for a file that cannot be read.
    """
    parts = [
        paragraph(
            "Thresholds and least sizes, holes of classes that are scored by voxel and splits of those that are "
            "scored by instance were chosen by the challenge's score on validation crops. The crops are dealt into "
            "groups, and each group is scored by what the others led to; only what raises that score is kept. The "
            "scores in the tables are of single classes, before masks are made consistent, and without unit. Click on "
            "a column's head to sort; hover over it for its meaning."
        )
    ]
    for path in tuned_jsons:
        content = read_json(path, REMEDY)
        rows = [_row(name, content["report"][name]) for name in CLASSES if name in content["report"]]
        source = FilePath(path).stem
        parts += [
            heading(source),
            paragraph(
                f"{len(content['groups'])} crops; masks of different classes {_repair(content)}. "
                f"{rules_sentences([content['rules']])}"
            ),
            table(COLUMNS, rows, name=source),
        ]
        if content["failed"]:
            left_out = [[str(line)] for line in content["failed"]]
            parts += [table([Column("left out")], left_out, name=f"{source}_failed")]
    write_text(out_html, page("Post-processing", parts))


def _repair(content: Mapping[str, Any]) -> str:
    made = "are made consistent" if content["overall"]["repair"] else "are not made consistent"
    before, after = content["repair"]["score_default"], content["repair"]["score_tuned"]
    if before is None or after is None:
        return made
    return f"{made} (mean IoU of the masks {before:.4f} as they are, {after:.4f} made consistent)"


def _row(name: str, entry: Mapping[str, Any]) -> list[Content]:
    before, after, how = entry["score_default"], entry["score_tuned"], entry["overall"]
    gain = None if before is None or after is None else after - before
    scores = [before, after, gain, "yes" if entry["kept"] else "no"]
    chosen = [how[key] for key in ("threshold", "hole_nm3", "split_nm", "min_size_nm3")]
    return [Cell(name, colour_of(name)), entry["kind"], entry["n_crops"], *scores, *chosen, entry["cause"]]
