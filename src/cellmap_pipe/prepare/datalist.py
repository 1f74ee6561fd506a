"""MONAI datalists: the training and validation crops of a fold as NIfTI pairs, for MONAI's own tools and for ours."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.files import check_file, read_json, write_json
from cellmap_pipe.prepare.quality import KEEP, read_verdicts
from cellmap_pipe.prepare.splits import read_folds

REMEDY = "make it again with `snakemake -R convert`"
ALL = "all"


def write_datalists(
    quality_csv: str | os.PathLike[str],
    folds_csv: str | os.PathLike[str],
    shard_jsons: Sequence[str | os.PathLike[str]],
    outputs: Mapping[int | str, str | os.PathLike[str]],
    *,
    nifti_dir: str | os.PathLike[str],
) -> None:
    """Write one datalist per entry of `outputs` (file by fold number, or by "all" for training on every crop).

    Keys are MONAI's: {"training": [...], "validation": [...]}, each entry {"image", "label", "crop", "dataset", "fold",
    "annotated_classes"}, with paths relative to the datalist's folder, from where `load_decathlon_datalist` resolves
    them. Only crops with verdict `keep` that the fold table names are listed.
    Raises ConfigError naming a fold with no crop on one side, ContractError for a NIfTI that is not as recorded.
    """
    verdicts, folds = read_verdicts(quality_csv), read_folds(folds_csv)
    records = [record for path in shard_jsons for record in read_json(path, REMEDY)["records"]]
    kept = sorted(
        (record for record in records if verdicts.get(record["crop"]) == KEEP and record["crop"] in folds),
        key=lambda record: record["crop"],
    )
    paths = {
        record["crop"]: {kind: check_file(record["files"][kind], nifti_dir, REMEDY) for kind in ("image", "label")}
        for record in kept
    }
    for fold, out in outputs.items():
        sides: dict[str, list[dict[str, Any]]] = {"training": [], "validation": []}
        for record in kept:
            crop = record["crop"]
            side = "validation" if str(folds[crop]) == str(fold) else "training"
            pair = {kind: os.path.relpath(path, Path(out).parent) for kind, path in paths[crop].items()}
            sides[side].append(
                {
                    **pair,
                    "crop": crop,
                    "dataset": record["dataset"],
                    "fold": folds[crop],
                    "annotated_classes": record["annotated"],
                }
            )
        _check(sides, str(fold), quality_csv)
        write_json(out, sides)


def _check(sides: Mapping[str, Sequence[Any]], fold: str, quality_csv: str | os.PathLike[str]) -> None:
    for side in ("training", *([] if fold == ALL else ["validation"])):
        if not sides[side]:
            raise ConfigError(
                f"fold {fold} has no {side} crop: none assigned to it passed the quality check ({quality_csv}); "
                "run another fold (folds.run), divide anew (folds.n, folds.seed), or keep crops by quality.keep"
            )
