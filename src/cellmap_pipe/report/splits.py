"""The page of the folds: what each trains and validates on, class by class, and how far apart both sides are."""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path as FilePath

from cellmap_pipe.colours import colour_of
from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import read_json, write_text
from cellmap_pipe.geometry import gap_nm
from cellmap_pipe.prepare.crops import read_crops
from cellmap_pipe.prepare.specimens import specimens_of
from cellmap_pipe.prepare.splits import ALWAYS_TRAINING, Crop, crops_with_boxes, describe_folds, near
from cellmap_pipe.report.pages import Cell, Column, Content, heading, page, paragraph, table

Path = str | os.PathLike[str]

# Words of a class's note, the gravest first; the colours of the quality check's verdicts, with the word beside them.
_GRAVE, _MILD, _FINE = "#D55E00", "#E69F00", "#009E73"

_VALIDATED = "crops by which trainings on this grid choose their weights: of the grids it is nearest to their labels"

_REMEDY = "delete it and run `snakemake -R folds`"


@dataclass(frozen=True)
class _Division:
    """All crops with a fold: the fold, the group and the specimen of each."""

    crops: Mapping[str, Crop]
    fold: Mapping[str, int]
    group: Mapping[str, str]
    specimen: Mapping[str, str]

    @property
    def folds(self) -> list[int]:
        return sorted(set(self.fold.values()) - {ALWAYS_TRAINING})

    def side(self, crop: str, fold: int) -> str:
        return "validation" if self.fold[crop] == fold else "training"


def write_splits(
    crops_csv: Path,
    folds_csv: Path,
    quality_csvs: Mapping[str, Path],
    datalist_jsons: Sequence[Path],
    out_html: Path,
    *,
    classes: Sequence[str],
    run: Sequence[str],
    group: str,
    margin_nm: float,
    n: int,
    seed: int,
    specimens: Mapping[str, str] = {},
    datasplit: str | None = None,
    keep: str | None = None,
) -> None:
    """Write the page of the folds: crops, classes, datasets and specimens of both sides, and how far apart they are.

    quality_csvs: `quality/{grid}/crops.csv` by grid; crops with verdict keep are used. datalist_jsons: the datalists
    that networks are trained on, `{grid}/fold{k}.json`; they say what a fold is validated on. classes: those that are
    learned; run: the folds that are trained. The others are settings of `prepare.splits.write_folds`; with `datasplit`,
    n, seed and group decided nothing and are not shown.
    Raises ContractError, naming the crops, for a leak: crops on both sides of a datalist, or crops of different sides
    that share voxels.
    """
    division = _read(crops_csv, folds_csv, specimens)
    validated = _validated(datalist_jsons)
    _refuse_leaks(division, FilePath(folds_csv))
    deciding = {"datasplit": datasplit} if datasplit else {"n": n, "seed": seed, "group": group}
    deciding |= {"keep": keep} if keep else {}
    values = ", ".join(f"folds.{key} = {value}" for key, value in (*deciding.items(), ("margin_nm", f"{margin_nm:g}")))
    parts = [
        paragraph(f"{describe_folds(folds_csv)}. Settings: {values}; trained: {', '.join(run) or 'none'}."),
        paragraph(
            f"{_origin(datasplit, keep)}, so that models on different grids agree on what is validation. A network of "
            "fold k is validated on the crops of fold k and trained on all others. Of several grids, each is validated "
            "on those crops of the fold alone to whose labels it is the nearest. The fold 'all' trains on every crop "
            "and validates on none. Click on a column's head to sort; hover over it for its meaning."
        ),
        paragraph(
            "Leaks: none. No crop stands on both sides of a datalist, and no crops of different folds share voxels; "
            "this page is not made otherwise."
        ),
        heading("Distances between the sides"),
        *_distances(division, margin_nm, kept_together=group == "crop" and not datasplit),
        heading("Datasets and specimens"),
        table(*_datasets(division), name="datasets"),
        paragraph(_specimen_sentence(division, datasplit)),
    ]
    shared = len(quality_csvs) > 1
    for grid, path in quality_csvs.items():
        rows = {row["crop"]: row for row in read_crops(os.fspath(path)) if row["crop"] in division.fold}
        here = {fold: validated[grid, str(fold)] for fold in division.folds if str(fold) in run}
        parts += [
            heading(f"Crops of each fold on the grid {grid}"),
            table(*_sizes(division, rows, here, shared=shared), name=f"sizes_{grid}"),
            heading(f"Classes of each fold on the grid {grid}"),
            paragraph(
                "Crops in use (verdict keep) in which the class is present, on the validation side and on the training "
                "side of each fold. A class that is absent everywhere on one side is either not learned there or not "
                "measured."
                + (" A class is measured by the crops that are validated here, on this grid." if shared else "")
            ),
            table(*_classes(division, rows, classes, here, shared=shared), name=f"classes_{grid}"),
        ]
    parts += [heading("Fold of every crop"), table(*_crops(division, quality_csvs), name="crops")]
    write_text(out_html, page("Folds", parts))


def _origin(datasplit: str | None, keep: str | None) -> str:
    if datasplit:
        return (
            f"Folds are those of {datasplit} (folds.datasplit): its validation crops are fold 0, its training crops "
            "are always in training, crops that it does not name are in neither. They are the same for every grid and "
            "verdict"
        )
    if keep:
        return (
            f"Crops that {keep} names (folds.keep) have the folds that it gives them, new ones those of their "
            "neighbours; new ones between neighbours of different folds are in none. Folds of all others follow from "
            "these, the list of crops and the seed, never from grid or verdict"
        )
    return "Folds follow from the list of crops and the seed alone, never from grid or verdict"


def _read(crops_csv: Path, folds_csv: Path, specimens: Mapping[str, str]) -> _Division:
    listed = {crop.name: crop for crop in crops_with_boxes(crops_csv)}
    divided = read_crops(os.fspath(folds_csv))
    lost = [row["crop"] for row in divided if row["crop"] not in listed]
    if lost:
        raise ContractError(f"{folds_csv}: {lost[0]} is not in {crops_csv} ({len(lost)} such crops); {_REMEDY}")
    crops = {row["crop"]: listed[row["crop"]] for row in divided}
    of_dataset = specimens_of((crop.dataset for crop in crops.values()), specimens)
    return _Division(
        crops,
        {row["crop"]: int(row["fold"]) for row in divided},
        {row["crop"]: row["group"] for row in divided},
        {name: of_dataset[crop.dataset] for name, crop in crops.items()},
    )


def _validated(datalist_jsons: Sequence[Path]) -> dict[tuple[str, str], set[str]]:
    """Return the crops of the validation side by grid and fold. Raises ContractError for a crop on both sides."""
    result = {}
    for path in map(FilePath, datalist_jsons):
        datalist = read_json(path, "run `snakemake -R datalist`")
        training, validation = ({str(entry["crop"]) for entry in datalist[side]} for side in ("training", "validation"))
        both = sorted(training & validation)
        if both:
            raise ContractError(
                f"{path}: leak: {both[0]} is in training and in validation ({len(both)} such crops); run `snakemake -R "
                "datalist`, and train anew what was trained on it"
            )
        result[path.parent.name, path.stem.removeprefix("fold")] = validation
    return result


def _refuse_leaks(division: _Division, folds_csv: FilePath) -> None:
    pairs = [
        (first, second)
        for first, second in combinations(sorted(division.crops), 2)
        if division.fold[first] != division.fold[second] and near(division.crops[first], division.crops[second], 0.0)
    ]
    if pairs:
        first, second = pairs[0]
        raise ContractError(
            f"{folds_csv}: leak: {first} (fold {division.fold[first]}) and {second} (fold {division.fold[second]}) "
            f"share voxels ({len(pairs)} such pairs); {_REMEDY}, and train anew what was trained on it"
        )


def _distances(division: _Division, margin_nm: float, *, kept_together: bool) -> list[str]:
    """Return the table of the nearest pair of crops of different folds in each dataset, and what it says.

    kept_together: whether the folds were made so that crops closer than the margin are in one.
    """
    by_dataset: dict[str, list[Crop]] = {}
    for crop in division.crops.values():
        by_dataset.setdefault(crop.dataset, []).append(crop)
    rows: list[list[Content]] = []
    close = 0
    for dataset, crops in sorted(by_dataset.items()):
        groups = len({division.group[crop.name] for crop in crops})
        folds = len({division.fold[crop.name] for crop in crops})
        boxless = sum(crop.box is None for crop in crops)
        nearest = _nearest(division, crops)
        if nearest is None:
            verdict: Content = Cell("in one fold only", _FINE) if folds < 2 else Cell("not known: no boxes", _MILD)
            rows.append([dataset, len(crops), groups, folds, None, None, verdict, boxless])
            continue
        gap, first, second = nearest
        pair = f"{first.name} (fold {division.fold[first.name]}), {second.name} (fold {division.fold[second.name]})"
        apart = not near(first, second, margin_nm)
        close += not apart
        verdict = Cell("at least the margin", _FINE) if apart else Cell("CLOSER THAN THE MARGIN", _GRAVE)
        rows.append([dataset, len(crops), groups, folds, max(0.0, gap), pair, verdict, boxless])
    columns = [
        Column("dataset"),
        Column("crops", "d"),
        Column("groups", "d", "crops that stay together count as one"),
        Column("folds", "d", "folds among which its crops are divided"),
        Column("nearest (nm)", ",.0f", "gap between the two nearest boxes of different folds, on the axis with most"),
        Column("which"),
        Column("verdict", hint=f"the margin, folds.margin_nm, is {margin_nm:g} nm"),
        Column("without box", "d", "crops of unknown position: how near they are is not known"),
    ]
    warning = (
        f"In {close} dataset{'s' * (close != 1)}, crops of different folds are closer than the margin: what is "
        "measured there is not independent of what was trained on."
        if close
        else f"Within every dataset, crops of different folds are at least {margin_nm:g} nm apart"
        + (", the margin below which neighbours stay together." if kept_together else ".")
    )
    return [paragraph(warning), table(columns, rows, name="distances")]


def _nearest(division: _Division, crops: Sequence[Crop]) -> tuple[float, Crop, Crop] | None:
    """Return the smallest gap in nm between two boxes of different folds, and whose; None if there are no two."""
    best: tuple[float, Crop, Crop] | None = None
    for first, second in combinations(sorted(crops, key=lambda crop: crop.name), 2):
        if division.fold[first.name] == division.fold[second.name] or first.box is None or second.box is None:
            continue
        gap = gap_nm(first.box, second.box)
        if best is None or gap < best[0]:
            best = (gap, first, second)
    return best


def _datasets(division: _Division) -> tuple[list[Column], list[list[Content]]]:
    counts = Counter((crop.dataset, division.fold[name]) for name, crop in division.crops.items())
    folds = [*division.folds, *([ALWAYS_TRAINING] if ALWAYS_TRAINING in division.fold.values() else [])]
    specimen = {crop.dataset: division.specimen[name] for name, crop in division.crops.items()}
    columns = [Column("dataset"), Column("specimen", hint="of what animal, dish or cell the volume is")]
    columns += [Column(_fold_word(fold), "d", "crops") for fold in folds]
    rows: list[list[Content]] = [
        [dataset, specimen[dataset], *(counts[dataset, fold] for fold in folds)] for dataset in sorted(specimen)
    ]
    return columns, rows


def _fold_word(fold: int) -> str:
    return "always in training" if fold == ALWAYS_TRAINING else f"fold {fold}"


def _specimen_sentence(division: _Division, datasplit: str | None) -> str:
    """Return which specimens are on both sides, which is what a validation estimates."""
    folds: dict[str, set[int]] = {}
    for crop, fold in division.fold.items():
        folds.setdefault(division.specimen[crop], set()).add(fold)
    shared = sorted(name for name, where in folds.items() if len(where) > 1)
    if not shared:
        return "No specimen is on both sides of any fold: a validation estimates the score on a new specimen."
    return (
        f"{len(shared)} of {len(folds)} specimens are on both sides of a fold ({', '.join(shared)}): there a "
        "validation estimates the score on new crops of known specimens, not on a new specimen "
        f"(folds.group: specimen would{', without folds.datasplit' if datasplit else ''})."
    )


def _sizes(
    division: _Division, rows: Mapping[str, Mapping[str, str]], validated: Mapping[int, set[str]], *, shared: bool
) -> tuple[list[Column], list[list[Content]]]:
    """Return columns and rows: what each side of each fold has on one grid. validated, shared: as in `_classes`."""
    columns = [
        Column("fold"),
        Column("side"),
        Column("crops", "d"),
        Column("in use", "d", "with verdict keep"),
        *([Column("validated here", "d", _VALIDATED)] if shared else []),
        Column("groups", "d", "crops that stay together count as one"),
        Column("datasets", "d"),
        Column("specimens", "d"),
        Column("volume (um3)", ",.3g", "label boxes of the crops in use, in cubic micrometres"),
        Column("known pairs (10^6)", ",.1f", "pairs of voxel and class whose state is known, in the crops in use"),
    ]
    lines: list[list[Content]] = []
    for fold in division.folds:
        for side in ("validation", "training"):
            names = [name for name in division.fold if division.side(name, fold) == side]
            used = [name for name in names if rows.get(name, {}).get("verdict") == "keep"]
            here = len(validated[fold]) if side == "validation" and fold in validated else None
            lines.append(
                [
                    f"{fold}",
                    side,
                    len(names),
                    len(used),
                    *([here] if shared else []),
                    len({division.group[name] for name in used}),
                    len({division.crops[name].dataset for name in used}),
                    len({division.specimen[name] for name in used}),
                    sum(_volume_um3(rows[name]) for name in used),
                    sum(float(rows[name].get("supervised_pairs") or 0) for name in used) / 1e6,
                ]
            )
    return columns, lines


def _volume_um3(row: Mapping[str, str]) -> float:
    sizes = [
        float(n) * float(v) for n, v in zip(row["shape"].split(";"), row["voxel_nm"].split(";"), strict=True) if n and v
    ]
    return math.prod(sizes) / 1e9 if sizes else 0.0


def _classes(
    division: _Division,
    rows: Mapping[str, Mapping[str, str]],
    classes: Sequence[str],
    validated: Mapping[int, set[str]],
    *,
    shared: bool,
) -> tuple[list[Column], list[list[Content]]]:
    """Return columns and rows: crops in use in which each class is present, on both sides of each fold.

    validated: the crops that each fold that is trained is validated on, on this grid; where several grids share
    (`shared`) the crops of the folds, they have a column of their own.
    """
    used = [name for name in division.fold if rows.get(name, {}).get("verdict") == "keep"]
    present = {name: set(rows[name]["present_classes"].split(";")) for name in used}
    annotated = {name: set(division.crops[name].annotated) for name in used}
    columns = [
        Column("class"),
        Column("annotated", "d", "crops in use that annotate the class"),
        Column("present", "d", "those in which there is some of it, on this grid"),
    ]
    for fold in division.folds:
        columns += [
            Column(f"fold {fold} validation", "d", "crops in which the class is present"),
            *([Column(f"fold {fold} validated here", "d", _VALIDATED)] if shared and fold in validated else []),
            Column(f"fold {fold} training", "d", "crops in which the class is present"),
        ]
    columns.append(Column("note"))
    lines: list[list[Content]] = []
    for name in classes:
        having = [crop for crop in used if name in present[crop]]
        labelled = sum(name in annotated[crop] for crop in used)
        counts: list[Content] = []
        notes = []
        for fold in division.folds:
            validation = sum(division.fold[crop] == fold for crop in having)
            training = len(having) - validation
            counts.append(validation)
            if fold in validated:
                here = sum(crop in validated[fold] for crop in having)
                counts += [here] if shared else []
                notes += [f"fold {fold} never sees it in training"] if having and not training else []
                notes += [f"fold {fold} cannot measure it"] if having and not here else []
            counts.append(training)
        if not having:
            notes = ["present in no crop in use"]
        grave = any("training" in note or "no crop" in note for note in notes)
        note: Content = Cell("; ".join(notes), _GRAVE if grave else _MILD) if notes else None
        lines.append([Cell(name, colour_of(name)), labelled, len(having), *counts, note])
    return columns, lines


def _crops(division: _Division, quality_csvs: Mapping[str, Path]) -> tuple[list[Column], list[list[Content]]]:
    verdicts = {
        grid: {row["crop"]: row["verdict"] for row in read_crops(os.fspath(path))}
        for grid, path in quality_csvs.items()
    }
    columns = [Column("crop"), Column("dataset"), Column("specimen"), Column("group"), Column("fold")]
    columns += [Column(f"verdict on {grid}") for grid in verdicts]
    rows: list[list[Content]] = [
        [
            name,
            crop.dataset,
            division.specimen[name],
            division.group[name],
            "always in training" if division.fold[name] == ALWAYS_TRAINING else str(division.fold[name]),
            *(found.get(name, "") for found in verdicts.values()),
        ]
        for name, crop in sorted(division.crops.items())
    ]
    return columns, rows
