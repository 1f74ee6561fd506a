"""Folds of crops: one table for every grid, from the crop list and a seed alone, and an earlier table if one is kept.

Crops that lie close together show the same cell, so they are grouped and a group is never divided. Verdicts and grids
play no part: two models on different grids must agree on what is validation, else their ensemble is scored on crops
that one of them was trained on.
"""

import csv
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cellmap_pipe.errors import ConfigError, ContractError
from cellmap_pipe.files import replacing
from cellmap_pipe.geometry import TOLERANCE_NM, Lattice, gap_nm, shape3, vec3
from cellmap_pipe.prepare.crops import read_crops
from cellmap_pipe.prepare.specimens import specimens_of

logger = logging.getLogger(__name__)

COLUMNS = ("crop", "group", "fold", "grouped_by")
DATASPLIT = "datasplit"

# What a validation estimates, by what stays on one side (column grouped_by).
ESTIMATES = {
    "crop": "neighbouring crops stay together; validation estimates the score on new crops of these datasets, "
    "as on the leaderboard",
    "dataset": "datasets stay together; validation estimates the score on a new dataset",
    "specimen": "specimens stay together; validation estimates the score on a new specimen",
    DATASPLIT: "divided as the given datasplit.csv says; validation is as independent as that is",
}

ALWAYS_TRAINING = -1
VALIDATION = 0

_SIDES = {"train": ALWAYS_TRAINING, "training": ALWAYS_TRAINING} | dict.fromkeys(
    ("validate", "validation", "val", "valid"), VALIDATION
)
_CROP = re.compile(r"(?:^|/)(crop[0-9A-Za-z-]+)(?=/|$)")
_CONTAINER = re.compile(r"([^/]+)\.(?:zarr|n5)(?=/|$)")


class Crop(NamedTuple):
    """One row of crops.csv: name, dataset, annotated and listed classes, and its box, None where that is not known."""

    name: str
    dataset: str
    annotated: tuple[str, ...]
    box: Lattice | None
    listed: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Those that the folds go by: what is not fetched, or not yet, must not move crops to other folds."""
        return self.listed or self.annotated


def write_folds(
    crops_csv: str | os.PathLike[str],
    out_csv: str | os.PathLike[str],
    *,
    n: int,
    seed: int,
    group: str,
    margin_nm: float,
    specimens: Mapping[str, str] = {},
    datasplit: str | os.PathLike[str] | None = None,
    keep: str | os.PathLike[str] | None = None,
) -> None:
    """Write the fold of every crop: columns crop, group, fold (-1: in training whatever the fold), grouped_by.

    crops_csv: of prepare.crops. n: number of folds. group: what stays together: "crop" (crops of a dataset that are
    closer than `margin_nm`), "dataset" or "specimen". specimens: specimen by dataset, where the built-in list
    (prepare.specimens) does not know it or is wrong. datasplit: a table of the challenge's toolbox to use instead; its
    validation crops are fold 0, its training crops -1, and crops it does not name are left out. keep: an earlier table
    of this function, whose crops keep their folds (without `datasplit`); a crop that it does not name goes where its
    group is, or is left out if it would join two folds.
    grouped_by is `group`, or "datasplit".
    Raises ConfigError, naming the crops, if they cannot be divided so, and for an unknown dataset in `specimens`.
    """
    crops = crops_with_boxes(crops_csv)
    annotated = {crop.name: crop.classes for crop in crops}
    if datasplit:
        folds = read_datasplit(datasplit, crops)
        check_sides(crops, folds, margin_nm, Path(datasplit))
        groups, group = {crop: crop for crop in folds}, DATASPLIT
    else:
        groups = group_crops(crops, group, margin_nm, specimens)
        kept = read_kept(keep, groups, n) if keep else {}
        if keep:
            # of the datasets at hand: others in `specimens` are unknown names to it
            groups = groups_beside(
                kept, crops, keep, lambda some: group_crops(some, group, margin_nm, _of(some, specimens))
            )
        folds = assign_folds(annotated, groups, n=n, seed=seed, kept=kept)
        if missing := sorted(set(range(n)) - set(folds.values())):
            raise ConfigError(
                f"folds.keep {keep}: leaves fold {missing[0]} without a crop; lower folds.n, or take crops out of the "
                "table"
            )
    with replacing(out_csv) as partial, open(partial, "w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(sorted((crop, groups[crop], fold, group) for crop, fold in folds.items()))
    logger.info("%s: %s", out_csv, describe_folds(out_csv))
    on_disk = {crop.name: crop.annotated for crop in crops}
    lonely = _one_sided(folds, on_disk if any(on_disk.values()) else annotated)
    if lonely:
        logger.warning(
            "%s: all crops with these classes are in one fold, so none is both trained and validated: %s",
            out_csv,
            ", ".join(lonely),
        )


def read_folds(folds_csv: str | os.PathLike[str]) -> dict[str, int]:
    """Return the fold of each crop in a fold table."""
    return {row["crop"]: int(row["fold"]) for row in read_crops(str(folds_csv))}


def describe_folds(folds_csv: str | os.PathLike[str]) -> str:
    """Return one sentence on a fold table: crops per fold, what stays together, and what a validation estimates."""
    rows = read_crops(str(folds_csv))
    sizes = Counter(int(row["fold"]) for row in rows)
    always = sizes.pop(ALWAYS_TRAINING, 0)
    text = (
        f"{len(sizes)} fold{'s' * (len(sizes) != 1)} of {', '.join(str(sizes[fold]) for fold in sorted(sizes))} crops"
    )
    text += f" ({always} more are always in training)" if always else ""
    return f"{text}; {ESTIMATES[rows[0]['grouped_by']]}"


def group_crops(
    crops: Sequence[Crop], group: str, margin_nm: float, specimens: Mapping[str, str] = {}
) -> dict[str, str]:
    """Return the group of each crop: dataset, specimen, or the first crop that a chain of near neighbours links it to.

    Two crops are near if they are of one dataset and the gap between their boxes is below `margin_nm` on every axis. A
    crop whose box is unknown stands alone. specimens: see `write_folds`.
    Raises ConfigError for another `group` than crop, dataset and specimen, and as `specimens_of` does.
    """
    specimen = specimens_of((crop.dataset for crop in crops), specimens)
    if group == "dataset":
        return {crop.name: crop.dataset for crop in crops}
    if group == "specimen":
        return {crop.name: specimen[crop.dataset] for crop in crops}
    if group != "crop":
        raise ConfigError(f"folds.group is '{group}'; allowed: crop, dataset, specimen")
    root = {crop.name: crop.name for crop in crops}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    for first, second in combinations(sorted(crops, key=_name), 2):
        if near(first, second, margin_nm):
            ends = sorted((find(first.name), find(second.name)))
            root[ends[1]] = ends[0]
    return {crop.name: find(crop.name) for crop in crops}


def near(first: Crop, second: Crop, margin_nm: float) -> bool:
    """Return whether two crops are of one dataset and closer than the margin; with margin 0, whether they overlap."""
    if first.dataset != second.dataset or first.box is None or second.box is None:
        return False
    return gap_nm(first.box, second.box) < margin_nm - TOLERANCE_NM


def read_kept(path: str | os.PathLike[str], crops: Iterable[str], n: int) -> dict[str, int]:
    """Return the folds that an earlier fold table gives to those of `crops` that it names.

    Raises ConfigError, naming the file, if it is no such table, has other folds than 0..n-1 or names none of the crops.
    """
    try:
        rows = read_crops(os.fspath(path))
        folds = {row["crop"]: int(row["fold"]) for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"folds.keep {path}: is no table of folds ({type(error).__name__}: {error}); "
            "give a copy of results/folds.csv"
        ) from error
    if min(folds.values(), default=0) < 0:
        raise ConfigError(
            f"folds.keep {path}: has crops that are always in training; set folds.datasplit to the table that it was "
            "made from"
        )
    if (most := max(folds.values(), default=0)) >= n:
        raise ConfigError(f"folds.keep {path}: has fold {most}, folds.n is {n}; set folds.n to {most + 1} or more")
    by_number = {_numbered(name): fold for name, fold in folds.items()}
    found = {_numbered(crop): crop for crop in crops}
    kept = {crop: by_number[number] for number, crop in found.items() if number in by_number}
    if not kept:
        raise ConfigError(f"folds.keep {path}: names none of the crops found; correct the path or set null")
    logger.info("%s: %d crops keep their folds, %d are new", path, len(kept), len(found) - len(kept))
    if gone := sorted(name for name in folds if _numbered(name) not in found):
        logger.warning("%s: %d of its crops are not among the crops found: %s", path, len(gone), ", ".join(gone[:5]))
    return kept


def groups_beside(
    kept: Mapping[str, int],
    crops: Sequence[Crop],
    path: str | os.PathLike[str],
    group_of: Callable[[Sequence[Crop]], dict[str, str]],
) -> dict[str, str]:
    """Return the groups of the crops of an earlier table and of those new ones that join no two of its folds.

    A crop that lies between others that are trained and validated apart would be a leak on either side. They are added
    one by one, by name, and those that are left out are named in a warning.
    Raises ConfigError, naming two of them, if crops of one group are in different folds of the table.
    """
    of_table = [crop for crop in crops if crop.name in kept]
    if clash := _clash(group_of(of_table), kept):
        first, second = clash
        raise ConfigError(
            f"folds.keep {path}: {first} (fold {kept[first]}) and {second} (fold {kept[second]}) must stay together; "
            "take folds.group, folds.margin_nm and folds.specimens of the run that the table is from. If they are "
            "those already, the box of one was not known then: delete one of the two lines"
        )
    groups = group_of(crops)
    folds_of: dict[str, set[int]] = {}
    for name, fold in kept.items():
        folds_of.setdefault(groups[name], set()).add(fold)
    in_doubt = {name for name, group in groups.items() if len(folds_of.get(group, ())) > 1 and name not in kept}
    accepted, out = [crop for crop in crops if crop.name not in in_doubt], []
    for crop in sorted((crop for crop in crops if crop.name in in_doubt), key=_name):
        if _clash(group_of([*accepted, crop]), kept):
            out.append(crop.name)
        else:
            accepted.append(crop)
    if out:
        logger.warning(
            "folds.keep %s: %d new crops lie close to crops of different folds and are left out: %s",
            *(path, len(out), ", ".join(out)),
        )
    return group_of(accepted)


def _clash(groups: Mapping[str, str], kept: Mapping[str, int]) -> tuple[str, str] | None:
    """Return two kept crops of one group and different folds, or None."""
    first: dict[str, str] = {}
    for name in sorted(kept.keys() & groups.keys()):
        other = first.setdefault(groups[name], name)
        if kept[other] != kept[name]:
            return other, name
    return None


def _of(crops: Sequence[Crop], specimens: Mapping[str, str]) -> dict[str, str]:
    datasets = {crop.dataset for crop in crops}
    return {dataset: specimen for dataset, specimen in specimens.items() if dataset in datasets}


def assign_folds(
    annotated: Mapping[str, Sequence[str]],
    groups: Mapping[str, str],
    *,
    n: int,
    seed: int,
    kept: Mapping[str, int] = {},
) -> dict[str, int]:
    """Return the fold, 0..n-1, of each crop, the same for all crops of a group.

    annotated: classes annotated in each crop. Each class shall be in as many folds as it can, first of all in two, so
    that it is trained and validated; then the crops of each class, and all crops, are spread evenly. Groups are placed
    one by one, those with the rarest classes first, then moved and exchanged as long as that helps. The seed orders
    groups that are alike. kept: folds of crops that are not moved, nor are the others of their groups.
    Raises ConfigError for fewer than two folds, or fewer groups than folds.
    """
    names = sorted(set(groups.values()), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    if n < 2:
        raise ConfigError(f"folds.n is {n}; at least 2 folds are needed: one to validate on, the others to train on")
    if len(names) < n:
        raise ConfigError(
            f"folds.n is {n}, but the crops form only {len(names)} groups that stay together; "
            "use fewer folds (folds.n), a smaller folds.margin_nm, or folds.group: crop"
        )
    classes = sorted({name for crop in annotated.values() for name in crop})
    # crops per group and class; the last column counts the group's crops
    table = np.zeros((len(names), len(classes) + 1), np.int64)
    row = {name: i for i, name in enumerate(names)}
    column = {name: i for i, name in enumerate(classes)}
    for crop in sorted(groups):
        table[row[groups[crop]], [column[name] for name in annotated[crop]]] += 1
        table[row[groups[crop]], -1] += 1
    by_group = {groups[crop]: fold for crop, fold in kept.items()}
    free = [name for name in names if name not in by_group]
    fixed = np.zeros((n, table.shape[1]), np.int64)
    for name, fold in by_group.items():
        fixed[fold] += table[row[name]]
    if free:
        movable, in_groups = table[[row[name] for name in free]], (table > 0).sum(axis=0)
        fold_of = _placed(movable, fixed, in_groups)
        _improve(movable, fold_of, fixed, in_groups)
        by_group |= {name: int(fold) for name, fold in zip(free, fold_of, strict=True)}
    return {crop: by_group[groups[crop]] for crop in sorted(groups)}


def read_datasplit(path: str | os.PathLike[str], crops: Sequence[Crop]) -> dict[str, int]:
    """Return the fold of each crop named in a partition: 0 for validation, -1 for training.

    Rows are those of the challenge's toolbox, without header: "train" or "validate", then paths of which one holds
    `{dataset}.zarr` and one `crop{N}` (one row per crop, or per crop and class); or, with a header, the columns split,
    dataset and crop (`crop101`, `101`, or `dataset/crop101`). Numbers of crops may have leading zeros. Rows on crops
    that are not in `crops` are left out.
    Raises ConfigError naming file and line, or the crop that is on both sides.
    """
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            lines = [(i, [cell.strip() for cell in row]) for i, row in enumerate(csv.reader(stream), 1)]
            lines = [(i, cells) for i, cells in lines if any(cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"folds.datasplit {path}: cannot be read ({error}); correct the path or set null") from error
    header = [cell.lower() for cell in lines[0][1]] if lines else []
    columns = {name: header.index(name) for name in ("split", "dataset", "crop") if name in header}
    if columns:
        if not {"split", "crop"} <= set(columns):
            raise ConfigError(f"folds.datasplit {path}: has columns {header}; split, dataset and crop are needed")
        lines = lines[1:]
    known = {crop.name for crop in crops}
    by_number = {_numbered(name): name for name in sorted(known)}
    datasets = {crop.dataset for crop in crops}
    sides: dict[str, int] = {}
    skipped = []
    for number, cells in lines:
        place = f"folds.datasplit {path}, line {number}"
        if columns and (len(cells) <= max(columns.values()) or any(cells[len(header) :])):
            raise ConfigError(f"{place}: has {len(cells)} cells, its header {len(header)}; make them agree")
        side = _SIDES.get((cells[columns["split"]] if columns else cells[0]).lower())
        if side is None:
            raise ConfigError(f"{place}: starts with '{cells[0]}'; allowed: train, validate")
        if columns:
            wanted = [cells[columns[name]] for name in ("dataset", "crop") if name in columns]
            wanted[-1] = f"crop{wanted[-1]}" if wanted[-1].isdigit() else wanted[-1]
        else:
            wanted = cells[1:]
        crop = _named_crop(wanted, datasets)
        if crop is None:
            raise ConfigError(f"{place}: no dataset and crop found; expected paths with {{dataset}}.zarr and crop{{N}}")
        if crop not in known:
            crop = by_number.get(_numbered(crop), crop)
        if crop not in known:
            skipped.append(crop)
        elif sides.setdefault(crop, side) != side:
            raise ConfigError(f"{place}: {crop} is on both sides, training and validation; leave it on one")
    if skipped:
        names = ", ".join(sorted(set(skipped))[:5])
        logger.warning("%s: %d of its crops are not among the crops found: %s", path, len(set(skipped)), names)
    for side, word in ((VALIDATION, "validate"), (ALWAYS_TRAINING, "train")):
        if side not in sides.values():
            raise ConfigError(f"folds.datasplit {path}: no crop on side '{word}' is among the crops found; add one")
    return sides


def check_sides(crops: Sequence[Crop], sides: Mapping[str, int], margin_nm: float, path: Path) -> None:
    """Raise ConfigError, naming the pairs, if crops of both sides overlap; warn of pairs closer than `margin_nm`."""
    used = sorted((crop for crop in crops if crop.name in sides), key=_name)
    overlapping = []
    for first, second in combinations(used, 2):
        if sides[first.name] == sides[second.name]:
            continue
        pair = f"{first.name} ({_word(sides[first.name])}) and {second.name} ({_word(sides[second.name])})"
        if near(first, second, 0.0):
            overlapping.append(pair)
        elif near(first, second, margin_nm):
            assert first.box is not None and second.box is not None
            logger.warning(
                "%s: %s are %g nm apart, less than folds.margin_nm %g: validation is not independent",
                path,
                pair,
                max(0.0, gap_nm(first.box, second.box)),
                margin_nm,
            )
    if overlapping:
        more = f"; {len(overlapping) - 1} more: {', '.join(overlapping[1:5])}" if overlapping[1:] else ""
        raise ConfigError(
            f"folds.datasplit {path}: {overlapping[0]} overlap; put both on one side or leave one out{more}"
        )


def _one_sided(folds: Mapping[str, int], annotated: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the classes whose crops are all in one fold, so that they are trained or validated but never both."""
    met: dict[str, set[int]] = {}
    for crop, fold in folds.items():
        for name in annotated[crop]:
            met.setdefault(name, set()).add(fold)
    return sorted(name for name, where in met.items() if len(where) < 2)


def _name(crop: Crop) -> str:
    return crop.name


def _word(side: int) -> str:
    return "validation" if side == VALIDATION else "training"


def crops_with_boxes(path: str | os.PathLike[str]) -> list[Crop]:
    crops = []
    for row in read_crops(str(path)):
        annotated = tuple(name for name in row["annotated"].split(";") if name)
        box = None
        if row["voxel_nm"] and row["translation_nm"] and row["shape"]:
            voxel, translation, shape = (row[key].split(";") for key in ("voxel_nm", "translation_nm", "shape"))
            box = Lattice(
                vec3([float(v) for v in voxel]), vec3([float(t) for t in translation]), shape3([int(s) for s in shape])
            )
        listed = tuple(name for name in row["listed"].split(";") if name)
        crops.append(Crop(row["crop"], row["dataset"], annotated, box, listed))
    if not crops:
        raise ContractError(f"{path}: lists no crop; make it again with `snakemake -R crops`")
    return crops


def _named_crop(cells: Sequence[str], datasets: set[str]) -> str | None:
    """Return the crop, `dataset/cropN`, that the cells of a row name, or None."""
    names = [match[1] for cell in cells for match in _CROP.finditer(cell)]
    containers = [match[1] for cell in cells for match in _CONTAINER.finditer(cell)]
    owners = [name for name in containers if name in datasets]
    owners += [part for cell in cells for part in (cell, cell.split("/")[0]) if part in datasets]
    owners += containers[-1:]
    return f"{owners[0]}/{names[-1]}" if names and owners else None


def _numbered(crop: str) -> str:
    """Return the crop's name without leading zeros of its number: crop001 is crop1."""
    return re.sub(r"(?<=/crop)0+(?=[0-9]+$)", "", crop)


Table = npt.NDArray[np.int64]


def _cost(totals: Table, in_groups: Table) -> npt.NDArray[np.float64]:
    """Return how bad divisions are: one-sided classes first, then missing folds of classes, then uneven spread.

    totals: crops per fold and class (last column: all crops), (..., n, classes + 1). in_groups: groups per class.
    """
    n = totals.shape[-2]
    covered = (totals > 0).sum(axis=-2)
    one_sided = ((in_groups > 1) & (covered < 2)).sum(axis=-1)
    absent = (np.minimum(in_groups, n) - covered).sum(axis=-1)
    crops = np.maximum(totals.sum(axis=-2), 1)
    # squared share of each fold, 1/n when even and 1 when all is in one fold: below 1 per class
    uneven = ((totals / crops[..., None, :]) ** 2).sum(axis=-2).mean(axis=-1)
    scale = totals.shape[-1] * n + 1
    return np.asarray(one_sided * float(scale) ** 2 + absent * float(scale) + uneven)


def _placed(table: Table, fixed: Table, in_groups: Table) -> npt.NDArray[np.int64]:
    """Return the fold of each group, placed greedily: rarest class first, larger groups before smaller ones.

    fixed: crops per fold and class that are placed already. in_groups: groups per class, those included.
    """
    n, most = len(fixed), int(in_groups[-1]) + 1
    rarity = np.where(table[:, :-1] > 0, in_groups[:-1], most).min(axis=1, initial=most)
    order = np.lexsort((np.arange(len(table)), -table[:, -1], rarity))
    totals = fixed.copy()
    fold_of = np.zeros(len(table), np.int64)
    weight = 1 / np.maximum(table.sum(axis=0) + fixed.sum(axis=0), 1)
    for group in order:
        # the fold that has least of what the group brings, rare classes counting most; then the emptiest
        load = (totals * (table[group] > 0) * weight).sum(axis=1)
        fold = int(np.lexsort((np.arange(n), totals[:, -1], np.round(load, 9)))[0])
        fold_of[group] = fold
        totals[fold] += table[group]
    return fold_of


def _improve(table: Table, fold_of: npt.NDArray[np.int64], fixed: Table, in_groups: Table) -> None:
    """Move and exchange groups, in place, as long as the cost falls; the best change of each round is made.

    fixed, in_groups: see `_placed`.
    """
    totals = fixed.copy()
    np.add.at(totals, fold_of, table)
    cost = float(_cost(totals, in_groups))
    while True:
        best, change = cost - 1e-9, None
        for i in range(len(table)):
            moved, change_i = _changes(table, fold_of, totals, i)
            costs = _cost(moved, in_groups)
            k = int(np.argmin(costs))
            if costs[k] < best:
                best, change = float(costs[k]), (i, change_i[k])
        if change is None:
            return
        i, (j, fold) = change
        if j >= 0:
            fold_of[j] = fold_of[i]
        fold_of[i] = fold
        totals[:] = fixed
        np.add.at(totals, fold_of, table)
        cost = best


def _changes(
    table: Table, fold_of: npt.NDArray[np.int64], totals: Table, i: int
) -> tuple[Table, list[tuple[int, int]]]:
    """Return the totals after every change of group `i`, and the changes as (partner or -1, new fold of `i`).

    Group `i` moves to another fold, or changes places with a later group of another fold.
    """
    home = int(fold_of[i])
    changes = [(-1, fold) for fold in range(len(totals)) if fold != home]
    changes += [(j, int(fold_of[j])) for j in range(i + 1, len(table)) if fold_of[j] != home]
    partner = np.array([j for j, _ in changes])
    target = np.array([fold for _, fold in changes])
    brought = np.where(partner[:, None] >= 0, table[partner], 0)
    moved = np.repeat(totals[None], len(changes), axis=0)
    moved[:, home] += brought - table[i]
    moved[np.arange(len(changes)), target] += table[i] - brought
    return moved, changes
