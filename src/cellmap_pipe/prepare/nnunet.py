"""Export of a grid's crops as a raw dataset of nnU-Net v2.

`{raw_dir}/{name}/` holds imagesTr/{case}_0000.nii.gz, labelsTr/{case}.nii.gz, dataset.json and splits_final.json; a
case is `{dataset}_crop{N}`. Format: dataset_format.md, ignore_label.md and manual_data_splits.md of nnU-Net's
documentation. nnU-Net reads splits from its own folder: copy splits_final.json to `nnUNet_preprocessed/{name}/` after
`nnUNetv2_plan_and_preprocess`, before training.

nnU-Net knows one label per voxel and no unknown class, so a voxel has

- the value of a class, 1..C in the order configured, where that class alone is known to be present;
- 0, background, where every class is known to be absent;
- C + 1, "ignore", everywhere else: some class is unknown, or two are marked.

Classes must exclude each other for that. Where a group and some of its parts are configured (mito and mito_mem), the
group is left out; it can be put together again if all of its parts are exported. Region-based training could express
groups, but not those that overlap in part (ne and er_mem_all), nor a voxel of a group whose parts are unknown.
"""

import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_pipe.classes import derivable, disjoint, get_class
from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.errors import ConfigError, ContractError
from cellmap_pipe.files import check_file, describe_file, digest, read_json, replacing, write_json, write_text
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.convert import map_isolated
from cellmap_pipe.prepare.datalist import REMEDY, Record, kept_records
from cellmap_pipe.prepare.labels import ABSENT, PRESENT
from cellmap_pipe.prepare.nifti import nifti_slabs, write_nifti_slabs
from cellmap_pipe.prepare.splits import read_folds
from cellmap_pipe.prepare.state_table import count_values, decode_table

logger = logging.getLogger(__name__)

FILE_ENDING = ".nii.gz"

# nnU-Net chooses the normalisation by the channel's name, and for one that it does not know z-scores each case: its
# recommendation for all but CT, and what evens out the contrast of different microscopes and samples.
CHANNEL = "EM"

_SUFFIXES = {"imagesTr": f"_0000{FILE_ENDING}", "labelsTr": FILE_ENDING, "records": ".json"}


def export_nnunet(
    quality_csv: str | os.PathLike[str],
    folds_csv: str | os.PathLike[str],
    shard_jsons: Sequence[str | os.PathLike[str]],
    out_json: str | os.PathLike[str],
    *,
    nifti_dir: str | os.PathLike[str],
    raw_dir: str | os.PathLike[str],
    workers: int,
    name: str,
    classes: Sequence[str],
) -> None:
    """Write the nnU-Net dataset `{raw_dir}/{name}` and, last, its contract: labels, cases, their digests and voxels.

    quality_csv, folds_csv, shard_jsons, nifti_dir: verdicts, folds, records and bulk files of the grid; crops with
    verdict `keep` and a fold become cases, except those without one voxel that is known. Images are hard links where
    the file system can, else copies. name: `Dataset{number}_{name}`. classes: the configured ones. workers: processes.
    Cases whose input is unchanged are not written again; those of crops that are gone are removed.
    Raises ConfigError if no case is left, CellmapError naming the crop whose NIfTI is missing or damaged.
    """
    folds = read_folds(folds_csv)
    used, dropped = exclusive_classes(classes)
    for group, rivals in dropped.items():
        if derivable(group, used):
            logger.info("%s is not exported: it is the union of classes that are (%s)", group, rivals)
        else:
            logger.warning("%s is not exported, nor all of its parts: it shares voxels with %s", group, rivals)
    folder = Path(raw_dir) / name
    records = kept_records(quality_csv, folds, shard_jsons)
    jobs = [(record, Path(nifti_dir), folder, used) for record in records]
    exported = sorted(map_isolated(_export, jobs, workers), key=lambda case: str(case["crop"]))
    cases = {case["case"]: case for case in exported if case["files"]}
    unknown = [case["crop"] for case in exported if not case["files"]]
    if unknown:
        logger.warning("left out, nothing known of %s: %s", ", ".join(used), ", ".join(unknown))
    if not cases:
        raise ConfigError(f"no crop to export ({quality_csv}): none passed the quality check with a class to learn")
    labels = label_values(used)
    _remove_stale(folder, cases, {case["case"] for case in exported})
    # in the order of the values: the file is read by people, too
    description = {
        "name": name,
        "description": "voxel size and offset in nm",
        "channel_names": {"0": CHANNEL},
        "labels": labels,
        "numTraining": len(cases),
        "file_ending": FILE_ENDING,
        "overwrite_image_reader_writer": "NibabelIO",
    }
    write_text(folder / "dataset.json", json.dumps(description, indent=1) + "\n")
    fold_of = {case: folds[entry["crop"]] for case, entry in cases.items()}
    write_json(folder / "splits_final.json", _splits(fold_of, 1 + max(folds.values())))
    write_json(
        out_json,
        {
            "folder": os.path.relpath(folder, Path(out_json).parent),
            "labels": labels,
            "dropped_classes": dropped,
            "left_out": unknown,
            "cases": {
                case: {"crop": entry["crop"], "fold": fold_of[case], **{key: entry[key] for key in ("files", "voxels")}}
                for case, entry in cases.items()
            },
        },
    )


def exclusive_classes(classes: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return those of `classes`, in their order, that exclude each other, and the others with what they overlap.

    Of two classes that share atoms the one with fewer atoms is kept, so parts go before the groups made of them.
    """
    kept: list[str] = []
    dropped: dict[str, str] = {}
    for name in sorted(classes, key=lambda name: (len(get_class(name).atoms), classes.index(name))):
        rivals = [other for other in kept if not disjoint(name, other)]
        if rivals:
            dropped[name] = ", ".join(rivals)
        else:
            kept.append(name)
    return sorted(kept, key=classes.index), dropped


def label_values(classes: Sequence[str]) -> dict[str, int]:
    """Return the `labels` of dataset.json: background 0, the classes from 1 on, and last, highest, ignore."""
    return {name: value for value, name in enumerate(["background", *classes, "ignore"])}


def value_of_rows(table: np.ndarray) -> np.ndarray:
    """Return the exported value of each row of a state table, uint8 (rows,).

    table: states, uint8 (rows, classes), of classes that exclude each other.
    """
    present = table == PRESENT
    values = np.full(len(table), table.shape[1] + 1, np.uint8)
    values[(table == ABSENT).all(axis=1)] = 0
    alone = present.sum(axis=1) == 1
    values[alone] = 1 + present[alone].argmax(axis=1)
    return values


def _export(record: Record, nifti_dir: Path, folder: Path, used: Sequence[str]) -> dict[str, Any]:
    """Return the record of one case, written if it is not there yet; without files if nothing in it is known."""
    case = record["crop"].replace("/", "_")
    sources = {kind: check_file(record["files"][kind], nifti_dir, REMEDY) for kind in ("image", "label")}
    paths = {key: folder / key / f"{case}{suffix}" for key, suffix in _SUFFIXES.items()}
    input_digest = digest(
        {
            "version": RESULT_VERSIONS["nnunet"],
            "sources": {kind: record["files"][kind]["sha256"] for kind in sources},
            "table": record["table"],
            "columns": [[name, record["classes"].index(name)] for name in used],
        }
    )
    earlier = _unchanged(paths["records"], folder, input_digest)
    if earlier is not None:
        return earlier
    table = decode_table(record["table"], len(record["classes"]))
    values = value_of_rows(table[:, [record["classes"].index(name) for name in used]])
    voxels = _recode(sources["label"], paths["labelsTr"], values, Lattice.from_dict(record["lattice"]))
    files = {}
    if voxels[:-1].any():  # the last value is "ignore"
        _link(sources["image"], paths["imagesTr"])
        # a link or a copy: its digest is the source's
        image = record["files"]["image"] | {"path": os.path.relpath(paths["imagesTr"], folder)}
        files = {"image": image, "label": describe_file(paths["labelsTr"], folder)}
    else:
        paths["labelsTr"].unlink()
    found = {label: int(voxels[value]) for label, value in label_values(used).items() if voxels[value]}
    exported = {"crop": record["crop"], "case": case, "files": files, "voxels": found, "input_digest": input_digest}
    write_json(paths["records"], exported)
    return exported


def _unchanged(path: Path, folder: Path, input_digest: str) -> dict[str, Any] | None:
    """Return the record in `path` if it was made from the same input and its files are there, else None."""
    with suppress(ContractError, KeyError, TypeError):
        record = read_json(path)
        if record["input_digest"] == input_digest:
            for contract in record["files"].values():
                check_file(contract, folder, "")
            return dict(record)
    return None


def _link(source: Path, target: Path) -> None:
    with replacing(target) as partial:
        try:
            os.link(source, partial)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, partial)


def _recode(source: Path, target: Path, values: np.ndarray, lattice: Lattice) -> np.ndarray:
    """Write the label map `source` with row r as values[r], uint8, on the same voxels; return the voxels per value.

    Slab by slab along z. Raises ContractError if `source` is damaged.
    """
    counts = np.zeros(int(values.max()) + 1, np.int64)

    def recoded() -> Iterator[np.ndarray]:
        for rows in nifti_slabs(source, lattice.shape):
            slab = values[rows]
            counts[:] += count_values(slab, len(counts))
            yield slab

    write_nifti_slabs(target, recoded(), lattice)
    return counts


def _splits(fold_of: Mapping[str, int], n: int) -> list[dict[str, list[str]]]:
    """Return nnU-Net's splits, entry k for fold k of `n`: a case of fold -1 is in training in each."""
    splits = []
    for k in range(n):
        train = [case for case, fold in fold_of.items() if fold != k]
        val = [case for case, fold in fold_of.items() if fold == k]
        if not train or not val:
            logger.warning("fold %d has no case to %s; nnU-Net cannot run it", k, "validate" if train else "train")
        splits.append({"train": train, "val": val})
    return splits


def _remove_stale(folder: Path, cases: Collection[str], recorded: Collection[str]) -> None:
    """Delete the files of cases that are gone, and what killed runs left half-written (nnU-Net takes it for a case)."""
    for key, suffix in _SUFFIXES.items():
        wanted = {f"{case}{suffix}" for case in (recorded if key == "records" else cases)}
        for path in sorted((folder / key).iterdir()):
            if path.name not in wanted:
                logger.info("%s: removed, its crop is not exported any more", path)
                path.unlink()
