"""MONAI datalists: the crops as NIfTI pairs, for MONAI's own tools and for ours.

`fold{k}.json` has the two sides of one fold, for `monai.data.load_decathlon_datalist`: training on every grid, but
validation on the grid nearest the crop's labels alone, which is the one that is asked for it. `datafold.json` has every
crop with its fold, for `monai.auto3dseg.utils.datafold_read`, DataAnalyzer and AutoRunner. Paths are relative to the
folder of the datalist, which is the base directory to give to MONAI (load_decathlon_datalist takes it by itself).
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.files import check_file, read_json, write_json
from cellmap_pipe.geometry import nearest_grid
from cellmap_pipe.prepare.quality import KEEP, read_verdicts
from cellmap_pipe.prepare.splits import ALWAYS_TRAINING, read_folds

logger = logging.getLogger(__name__)

REMEDY = "make it again with `snakemake -R convert`"
ALL = "all"

Record = Mapping[str, Any]


def write_datalists(
    quality_csv: str | os.PathLike[str],
    folds_csv: str | os.PathLike[str],
    shard_jsons: Sequence[str | os.PathLike[str]],
    outputs: Mapping[int | str, str | os.PathLike[str]],
    *,
    nifti_dir: str | os.PathLike[str],
    grid: str,
    grids: Mapping[str, Sequence[float] | str],
) -> None:
    """Write one datalist per entry of `outputs` (file by fold number, or by "all" for training on every crop).

    Keys are MONAI's: {"training": [...], "validation": [...]}, each entry {"image", "label", "crop", "dataset", "fold",
    "annotated_classes"}. Only crops with verdict `keep` that the fold table names are listed, and on the validation
    side only those to whose labels `grid` is the nearest of `grids` (voxel size (z, y, x) in nm, or "native", by name);
    if it is to none of them, all of the fold.
    Raises ConfigError naming a fold with no crop on one side, ContractError for a NIfTI that is not as recorded.
    """
    folds = read_folds(folds_csv)
    kept = kept_records(quality_csv, folds, shard_jsons)
    paths = [_paths(record, nifti_dir) for record in kept]
    for fold, out in outputs.items():
        held_out = {record["crop"]: record for record in kept if str(folds[record["crop"]]) == str(fold)}
        validated = _validated(held_out, grid, grids, fold)
        sides: dict[str, list[dict[str, Any]]] = {"training": [], "validation": []}
        for record, pair in zip(kept, paths, strict=True):
            crop = record["crop"]
            if crop in held_out and crop not in validated:
                continue
            sides["validation" if crop in held_out else "training"].append(
                {
                    **_relative(pair, out),
                    "crop": crop,
                    "dataset": record["dataset"],
                    "fold": folds[crop],
                    "annotated_classes": record["annotated"],
                }
            )
        _check(sides, str(fold), quality_csv)
        write_json(out, sides)


def write_datafold(
    quality_csv: str | os.PathLike[str],
    folds_csv: str | os.PathLike[str],
    shard_jsons: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    nifti_dir: str | os.PathLike[str],
) -> None:
    """Write the crops of all folds as one datalist: {"training": [...], "testing": []}.

    Entries: image, label, fold (missing in a crop that is always in training), crop {name, dataset}, annotated_classes
    {class: 1 or 0}. `datafold_read(..., fold=k)` gives the sides of fold k, fold=-1 every crop for training.
    MONAI's reader takes every text and every list of texts of an entry for paths, and for fold=-1 takes those that say
    -1 for validation; hence mappings and a missing key. Every entry names the same classes, because MONAI's loaders
    put entries together by key.
    Raises ConfigError if no crop is left, ContractError for a NIfTI that is not as recorded.
    """
    folds = read_folds(folds_csv)
    kept = kept_records(quality_csv, folds, shard_jsons)
    if not kept:
        raise ConfigError(f"no crop passed the quality check ({quality_csv}); keep crops by quality.keep")
    for fold in sorted({*folds.values()} - {ALWAYS_TRAINING, *(folds[record["crop"]] for record in kept)}):
        logger.warning("no crop of fold %d passed the quality check: MONAI's AutoRunner wants folds without gaps", fold)
    classes = sorted({name for record in kept for name in record["annotated"]})
    entries: list[dict[str, Any]] = []
    for record in kept:
        fold = folds[record["crop"]]
        entries.append(
            {
                **_relative(_paths(record, nifti_dir), out),
                **({} if fold == ALWAYS_TRAINING else {"fold": fold}),
                "crop": {"name": record["crop"], "dataset": record["dataset"]},
                "annotated_classes": {name: int(name in record["annotated"]) for name in classes},
            }
        )
    write_json(out, {"training": entries, "testing": []})


def kept_records(
    quality_csv: str | os.PathLike[str], folds: Mapping[str, int], shard_jsons: Sequence[str | os.PathLike[str]]
) -> list[Record]:
    """Return the records of the crops with verdict `keep` that have a fold, ordered by name."""
    verdicts = read_verdicts(quality_csv)
    records = [record for path in shard_jsons for record in read_json(path, REMEDY)["records"]]
    kept = [record for record in records if verdicts.get(record["crop"]) == KEEP and record["crop"] in folds]
    return sorted(kept, key=lambda record: str(record["crop"]))


def _validated(
    held_out: Mapping[str, Record], grid: str, grids: Mapping[str, Sequence[float] | str], fold: int | str
) -> set[str]:
    """Return those of a fold's crops that are validated on `grid`: to which it is the nearest, or all if to none.

    Predictions are divided in the same way (`prediction.assignment`): other crops would choose weights by voxels that
    the networks of this grid are never asked for.
    """
    nearest = {
        crop for crop, record in held_out.items() if nearest_grid(grids, record["label_lattice"]["voxel_nm"]) == grid
    }
    if held_out and not nearest:
        logger.warning(
            "fold %s: of the grids %s, %s is the nearest to the labels of none of its crops (%d): it is validated on "
            "all of them, on voxels that it is never asked for",
            *(fold, ", ".join(grids), grid, len(held_out)),
        )
    return nearest or set(held_out)


def _paths(record: Record, nifti_dir: str | os.PathLike[str]) -> dict[str, Path]:
    return {kind: check_file(record["files"][kind], nifti_dir, REMEDY) for kind in ("image", "label")}


def _relative(pair: Mapping[str, Path], out: str | os.PathLike[str]) -> dict[str, str]:
    return {kind: os.path.relpath(path, Path(out).parent) for kind, path in pair.items()}


def _check(sides: Mapping[str, Sequence[Any]], fold: str, quality_csv: str | os.PathLike[str]) -> None:
    for side in ("training", *([] if fold == ALL else ["validation"])):
        if not sides[side]:
            raise ConfigError(
                f"fold {fold} has no {side} crop: none assigned to it passed the quality check ({quality_csv}); "
                "run another fold (folds.run), divide anew (folds.n, folds.seed), or keep crops by quality.keep"
            )
