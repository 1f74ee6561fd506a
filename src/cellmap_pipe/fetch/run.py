"""Fetching from first to last: plan it, or copy, verify and record."""

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.errors import ConfigError, DataError
from cellmap_pipe.fetch.needs import VoxelSize, read_wanted
from cellmap_pipe.fetch.records import missing_here, write_record
from cellmap_pipe.fetch.source import Source
from cellmap_pipe.fetch.transfer import Transfer, in_bytes
from cellmap_pipe.files import replacing, write_json

logger = logging.getLogger(__name__)

PLAN_COLUMNS = "dataset crop kind arrays files bytes bytes_here problem warning".split()


def fetch(out_json: str | Path, *, recheck: bool = False, **settings: Any) -> dict[str, Any]:
    """Copy what a run needs, verify it, write the record to `out_json` and return it.

    settings: as `plan_fetch`. recheck: also compare the MD5 of the files that are here, where the source tells it, and
    copy the others again. The record: source, and per crop and volume {classes, arrays, files, bytes, absent_chunks
    (chunks that the source does not have: they read as the fill value), problems, warnings}.
    An array that fails does not stop the others. Raises DataError at the end, when the record is written, naming what
    is incomplete; fetching again copies only what is missing.
    """
    with _run(copy=True, recheck=recheck, **settings) as run:
        items = run.items()
    record: dict[str, Any] = {"source": run.source.url, "crops": {}, "volumes": {}}
    problems: list[str] = []
    for item in items:
        item.problems += missing_here(run.root, item.chunks, item.metadata, item.problems)
        write_record(run.root, run.source.url, item)
        section = record["volumes" if item.wanted.is_volume else "crops"]
        section[item.wanted.name] = item.summary()
        problems += [f"{item.wanted.name}: {problem}" for problem in item.problems]
        for warning in item.warnings:
            logger.warning("%s: %s", item.wanted.name, warning)
    write_json(out_json, record)
    for problem in problems:
        logger.error("%s", problem)
    if problems:
        incomplete = sum(bool(item.problems) for item in items)
        raise DataError(
            f"{incomplete} of {len(items)} crops and volumes are incomplete: {'; '.join(problems[:3])}"
            f"{f'; and {len(problems) - 3} more, see the lines above' if len(problems) > 3 else ''}; "
            "fetch again, after correcting what can be: only what is missing is copied"
        )
    return record


def plan_fetch(**settings: Any) -> list[dict[str, Any]]:
    """Return what `fetch` would copy, without writing anything: rows of PLAN_COLUMNS, bytes as stored at the source.

    settings: source (folder or URL of {dataset}/{dataset}.zarr) and options of its file system; root (folder to copy
    to); crops, volumes (tables, or None); classes (None = all that are listed); em_path, labels_path; grids (voxel size
    in nm (z, y, x), or "native", by name), max_upsample, context_nm and train_context_nm (that of the
    training store) by grid, max_train_gb; workers, retries.
    Two rows per crop, `kind` labels and em; a chunk that several crops share is counted once. bytes_here: what of them
    need not be copied. Raises ConfigError for tables or a source that cannot be used.
    """
    with _run(copy=False, recheck=False, **settings) as run:
        items = run.items()
    rows = []
    for item in items:
        kinds = {"em": [item.em]} if item.wanted.is_volume else {"labels": item.labels, "em": [item.em]}
        for kind, parts in kinds.items():
            is_em = kind == "em"
            problems = [text for text in item.problems if (text in item.em.problems) == is_em]
            warnings = [text for text in item.warnings if (text in item.em.warnings) == is_em]
            row = {
                "dataset": item.wanted.dataset,
                "crop": item.wanted.crop,
                "kind": kind,
                "arrays": sum(len(part.chunks) for part in parts),
                **{name: sum(getattr(part, name) for part in parts) for name in ("files", "bytes", "bytes_here")},
                "problem": "; ".join(problems),
                "warning": "; ".join(warnings),
            }
            rows.append(row)
    return rows


def write_plan(out_csv: str | Path, **settings: Any) -> str:
    """Write the rows of `plan_fetch` to `out_csv` and return them as `plan_table` does."""
    rows = plan_fetch(**settings)
    with replacing(out_csv) as partial, open(partial, "w", newline="") as stream:
        writer = csv.DictWriter(stream, PLAN_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return plan_table(rows)


def plan_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of `plan_fetch` as text: what is wrong or to be known of crops, then each dataset, then all."""
    lines = [
        f"{kind}: {row['dataset']}/{row['crop']}: {row[kind]}"
        for row in rows
        for kind in ("problem", "warning")
        if row[kind]
    ]
    width = max([len("dataset"), *(len(row["dataset"]) for row in rows)])
    lines.append(f"{'dataset':{width}} {'crops':>6} {'files':>9} {'size':>10} {'here':>10} {'to copy':>10}")
    for dataset in [*dict.fromkeys(row["dataset"] for row in rows), None]:
        chosen = [row for row in rows if dataset in (None, row["dataset"])]
        crops = len({(row["dataset"], row["crop"]) for row in chosen})
        files, total, here = (sum(row[key] for row in chosen) for key in ("files", "bytes", "bytes_here"))
        sizes = " ".join(f"{in_bytes(size):>10}" for size in (total, here, total - here))
        lines.append(f"{dataset or 'total':{width}} {crops:>6} {files:>9} {sizes}")
    return "\n".join(lines)


def _check_root(root: Path) -> None:
    """Raise ConfigError if nothing can be written into `root`, before anything is asked of the source."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=root) as stream:
            stream.write(b"0")
    except OSError as error:
        raise ConfigError(
            f"data.root {root}: cannot be written ({error.strerror}); set data.root to a folder that can be"
        ) from error


@contextmanager
def _run(
    *,
    copy: bool,
    recheck: bool,
    source: str,
    options: Mapping[str, Any],
    root: str | Path,
    crops: str | Path | None,
    volumes: str | Path | None,
    classes: Sequence[str] | None,
    em_path: str,
    labels_path: str,
    grids: Mapping[str, VoxelSize],
    max_upsample: float,
    context_nm: Mapping[str, float],
    train_context_nm: Mapping[str, float],
    max_train_gb: float | None,
    workers: int,
    retries: int,
) -> Iterator["Transfer"]:
    """Yield a run with its threads and its staging folder; they end with the block."""
    wanted = read_wanted(crops, is_volume=False, classes=classes, key="data.crops") if crops else []
    wanted += read_wanted(volumes, is_volume=True, key="data.volumes") if volumes else []
    if not wanted:
        raise ConfigError(
            "data.crops and data.volumes name nothing to fetch; set them to the challenge's train_crop_manifest.csv "
            "and test_crop_manifest.csv, or to tables like these"
        )
    if copy:
        _check_root(Path(root))
    opened = Source(source, options, workers=2 * workers, retries=retries)
    with TemporaryDirectory(prefix="cellmap-fetch-") as stage:
        # as many arrays are looked at as files are copied: mostly both wait for answers
        arrays, files = ThreadPoolExecutor(workers), ThreadPoolExecutor(workers)
        try:
            yield Transfer(
                source=opened,
                root=Path(root),
                stage=Path(stage),
                wanted=wanted,
                classes=list(CLASSES) if classes is None else list(classes),
                em_path=em_path,
                labels_path=labels_path,
                needs={
                    "grids": grids,
                    "max_upsample": max_upsample,
                    "context_nm": context_nm,
                    "train_context_nm": train_context_nm,
                    "max_train_gb": max_train_gb,
                },
                copy=copy,
                recheck=recheck,
                arrays=arrays,
                files=files,
            )
        except OSError as error:  # the source's are problems of their crops: what comes here is this side's
            raise DataError(
                f"{error.filename or f'data.root {root}'}: cannot be written ({error.strerror or error}); free space "
                f"there or in {stage}, then fetch again: only what is missing is copied"
            ) from error
        finally:
            opened.stop()
            for pool in (arrays, files):  # the first waits for the second: what was not begun must not begin
                pool.shutdown(wait=False, cancel_futures=True)
            for pool in (files, arrays):
                pool.shutdown(wait=True)
