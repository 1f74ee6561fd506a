"""Whether the bulk files are still what the results say of them."""

import logging
from pathlib import Path

from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import check_file, read_json
from cellmap_pipe.prepare.store import verify_store

logger = logging.getLogger(__name__)

# Where each stage lists the arrays that it wrote, relative to the results.
_VOLUME_LISTS = {
    "predict": "predict/*/fold*/*/shard*.json",
    "ensemble": "ensemble/*/fold*.json",
    "segment": "segment/*/fold*/*.json",
}


def verify_results(results: str | Path) -> int:
    """Return how many contracts under the folder `results` were compared with the disk: all that are there.

    Compared are, by digest, the NIfTI files of each grid and the training stores, and, by presence, the arrays of
    predictions, ensembles and segmentations. Each fault is logged. Raises ContractError with the number of faults and
    the first of them.
    """
    results = Path(results)
    faults: list[str] = []
    checked = 0
    for shard in sorted(results.glob("convert/*/shard*.json")):
        faults += _faults_of_conversion(shard, results / "nifti" / shard.parent.name)
        checked += 1
    for index in sorted(results.glob("chunks/*/index.json")):
        faults += verify_store(index)
        checked += 1
    for stage, pattern in _VOLUME_LISTS.items():
        for path in sorted(results.glob(pattern)):
            faults += _missing_arrays(path, f"run `snakemake -R {stage}`")
            checked += 1
    for fault in faults:
        logger.error(fault)
    if faults:
        raise ContractError(f"{len(faults)} of the bulk files are not what the results say; the first: {faults[0]}")
    logger.info("%d contracts agree with the disk", checked)
    return checked


def _faults_of_conversion(shard: Path, nifti_dir: Path) -> list[str]:
    remedy = "run `snakemake -R convert`"
    faults = []
    for record in read_json(shard, remedy)["records"]:
        for contract in record.get("files", {}).values():
            try:
                check_file(contract, nifti_dir, remedy, full=True)
            except ContractError as error:
                faults.append(str(error))
    return faults


def _missing_arrays(path: Path, remedy: str) -> list[str]:
    return [
        f"{path.parent / record['path']}: missing; {remedy}"
        for record in read_json(path, remedy)["records"]
        if record["status"] == "ok" and not (path.parent / record["path"]).exists()
    ]
