"""Whether the bulk files are still what the results say of them."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cellmap_pipe.errors import ContractError
from cellmap_pipe.fetch import verify_fetch
from cellmap_pipe.fetched import fetch_digest
from cellmap_pipe.files import read_json
from cellmap_pipe.prediction.store import ARRAY, fault_of_probabilities
from cellmap_pipe.prepare.store import fault_of_file, verify_store

logger = logging.getLogger(__name__)


def verify_results(results: str | Path, data_root: str | Path | None = None) -> int:
    """Return how many contracts under the folder `results` were compared with the disk: all that are there.

    Compared are, by digest, the NIfTI files of each grid, exports and the training stores; by number and bytes of their
    chunks, predictions; and, by presence, the arrays of ensembles and segmentations, and of what was fetched into
    `data_root`. Each fault is logged.
    Raises ContractError with the number of faults and the first of them.
    """
    results = Path(results)
    faults: list[str] = []
    checked = 0
    for pattern, faults_of in _CHECKS.items():
        for path in sorted(results.glob(pattern)):
            try:
                faults += faults_of(path)
            except ContractError as error:  # the contract itself cannot be used; the others can
                faults.append(str(error))
            checked += 1
    if data_root is not None and fetch_digest(data_root):
        faults += [f"data.root {data_root}: {line}; run `snakemake fetch -R fetch`" for line in verify_fetch(data_root)]
        checked += 1
    for fault in faults:
        logger.error(fault)
    if faults:
        raise ContractError(f"{len(faults)} of the bulk files are not what the results say; the first: {faults[0]}")
    logger.info("%d contracts agree with the disk", checked)
    return checked


def _left_over(path: Path, content: Mapping[str, Any], remedy: str) -> bool:
    """Return whether a shard is left from a run with more of them, so that nothing reads it."""
    first = path.with_name("shard0.json")
    # earlier versions do not tell how many shards there were
    return first.is_file() and content.get("shard", 0) >= read_json(first, remedy).get("shards", math.inf)


def _faults_of_conversion(shard: Path) -> list[str]:
    remedy = "run `snakemake -R convert`"
    content = read_json(shard, remedy)
    records = [] if _left_over(shard, content, remedy) else content["records"]
    nifti_dir = shard.parents[2] / "nifti" / shard.parent.name
    return _faults((file for record in records for file in record.get("files", {}).values()), nifti_dir, remedy)


def _faults_of_export(index: Path) -> list[str]:
    remedy = "run `snakemake export_nnunet -R nnunet`"
    contract = read_json(index, remedy)
    files = (file for case in contract["cases"].values() for file in case["files"].values())
    return _faults(files, index.parent / contract["folder"], remedy)


def _faults(contracts: Iterable[dict[str, Any]], folder: Path, remedy: str) -> list[str]:
    return [fault for contract in contracts if (fault := fault_of_file(contract, folder, remedy, full=True))]


def _faults_of_predictions(shard: Path) -> list[str]:
    remedy = "run `snakemake -R predict`"
    content = read_json(shard, remedy)
    if _left_over(shard, content, remedy):
        return []
    return [
        f"{store}: {fault}; {remedy}"
        for record in content["records"]
        if record["status"] == "ok"
        and (fault := fault_of_probabilities(store := shard.parent / record["path"], record["fingerprint"]))
    ]


def _missing_arrays(path: Path, arrays: Callable[[dict[str, Any]], Iterable[str]], remedy: str) -> list[str]:
    return [
        f"{path.parent / record['path']}: missing, or without its {name}; {remedy}"
        for record in read_json(path, remedy)["records"]
        if record["status"] == "ok"
        for name in arrays(record)
        if not (path.parent / record["path"] / name / ".zarray").is_file()
    ]


# Where the contracts of each stage lie, relative to the results, and what finds their faults.
_CHECKS: dict[str, Callable[[Path], list[str]]] = {
    "convert/*/shard*.json": _faults_of_conversion,
    "nnunet/*.json": _faults_of_export,
    "chunks/*/index.json": verify_store,
    "predict/*/fold*/*/shard*.json": _faults_of_predictions,
    "ensemble/*/fold*.json": partial(
        _missing_arrays, arrays=lambda record: [ARRAY], remedy="delete it and run `snakemake -R ensemble`"
    ),
    "segment/*/fold*/*.json": partial(
        _missing_arrays,
        arrays=lambda record: [f"{name}/{ARRAY}" for name in record["classes"]],
        remedy="delete it and run `snakemake -R segment`",
    ),
}
