"""The command `cellmap-pipe`: check a site, say how a run stands, fetch data, score, pack and check submissions, make a
synthetic challenge, import a network's architecture.

Thin: every command calls one function of the library and prints what it returns. An error is one line on standard error
and exit status 2; a submission with problems gives exit status 1.
"""

import argparse
import errno
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cellmap_pipe.errors import CellmapError, ConfigError
from cellmap_pipe.files import read_json, write_json


def _score(arguments: argparse.Namespace) -> int:
    from cellmap_pipe.evaluation.official import score_submission, score_table

    if arguments.out:
        _check_writable(arguments.out)
    with _bar(" labels") as shown:
        result = score_submission(
            arguments.submission,
            arguments.truth,
            rules=arguments.rules,
            workers=arguments.workers,
            memory_gb=arguments.memory_gb,
            progress=shown,
        )
    _say(score_table(result))
    if arguments.out:
        with _writing(str(arguments.out)):
            write_json(arguments.out, result)
    return 1 if result["failed"] else 0


def _validate(arguments: argparse.Namespace) -> int:
    from cellmap_pipe.evaluation.flight import unanswered, validate
    from cellmap_pipe.evaluation.forecast import read_validation
    from cellmap_pipe.evaluation.manifest import read_manifest
    from cellmap_pipe.evaluation.problem import lines_of

    rows = read_manifest(arguments.manifest, arguments.classes)
    validation = read_validation(arguments.scores) if arguments.scores else None
    with _bar(" crops") as shown:
        problems = validate(
            arguments.submission,
            arguments.manifest,
            arguments.classes,
            workers=arguments.workers,
            presence=validation.presence() if validation else None,
            progress=shown,
        )
    status = _report(arguments.submission, lines_of(problems, "error"), lines_of(problems, "warning"))
    if validation:
        _say_forecast(validation.forecast({row.label for row in rows}, unanswered(problems, rows)))
    return status


def _pack(arguments: argparse.Namespace) -> int:
    from cellmap_pipe.evaluation.submission import pack

    report = arguments.report or arguments.out.with_suffix(".json")
    for path in (arguments.out, report):
        _check_writable(path)
    with _writing(f"{arguments.out}, or its report {report}"), _bar(" arrays") as shown:
        pack(
            arguments.predictions,
            arguments.manifest,
            arguments.out,
            report,
            classes=arguments.classes,
            workers=arguments.workers,
            scores=arguments.scores,
            progress=shown,
        )
    result = read_json(report)
    if absent := result["not_predicted"]:
        names = ", ".join(absent[:6]) + (", ..." if len(absent) > 6 else "")
        _say(f"{len(absent)} of {result['rows']} rows were not predicted, and are zeros: {names}")
    if approximate := result["approximate"]:
        without = [f"{name} ({', '.join(lacking)})" for name, lacking in list(approximate.items())[:6]]
        names = "; ".join(without) + ("; ..." if len(approximate) > 6 else "")
        _say(f"{len(approximate)} rows are groups formed without some of their parts: {names}")
    status = _report(arguments.out, result["problems"], result["warnings"])
    if result.get("forecast"):
        _say_forecast(result["forecast"])
    return status


def _phantom(arguments: argparse.Namespace) -> int:
    from cellmap_pipe.phantom import write_challenge

    write_challenge(arguments.root, seed=arguments.seed, out_json=arguments.root / "phantom.json")
    _say(f"{arguments.root}: synthetic challenge of seed {arguments.seed}, described in phantom.json")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from cellmap_pipe.cluster.status import as_json, as_text, status

    if not arguments.directory.is_dir():
        raise ConfigError(f"--directory {arguments.directory}: is no folder; give the one that holds results and runs")
    found = status(arguments.directory)
    _say(as_json(found) if arguments.json else as_text(found))
    return 0


def _import_architecture(arguments: argparse.Namespace) -> int:
    from cellmap_pipe.training.architecture import import_architecture

    codes = import_architecture(arguments.published, arguments.out, spatial_dims=arguments.spatial_dims)
    paths = sum(map(sum, codes["arch_code_a"]))
    _say(f"{arguments.out}: {paths} paths in {codes['num_blocks']} blocks of {codes['num_depths']} depths")
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    from cellmap_pipe.classes import get_class
    from cellmap_pipe.config import default_context_nm
    from cellmap_pipe.fetch import fetch, plan_fetch, plan_table

    for name in arguments.classes or ():
        get_class(name)
    grids = dict(_grid(words) for words in arguments.grid)
    given = arguments.context_nm
    context = {grid: default_context_nm(voxel_nm) if given is None else given for grid, voxel_nm in grids.items()}
    settings = {
        "source": arguments.source,
        "options": _options(arguments),
        "root": arguments.root,
        "crops": arguments.crops,
        "volumes": arguments.volumes,
        "classes": arguments.classes or None,
        "em_path": arguments.em_path,
        "labels_path": arguments.labels_path,
        "grids": grids,
        "max_upsample": arguments.max_upsample,
        "context_nm": context,
        "train_context_nm": context,
        "max_train_gb": arguments.max_train_gb,
        "workers": arguments.workers,
        "retries": arguments.retries,
    }
    if arguments.dry_run:
        rows = plan_fetch(**settings)
        _say(plan_table(rows))
        return 1 if any(row["problem"] for row in rows) else 0
    logging.getLogger("cellmap_pipe.fetch").setLevel(logging.INFO)  # what is done shows while it lasts
    out = arguments.out or arguments.root / "fetch.json"
    record = fetch(out, recheck=arguments.recheck, **settings)
    _say(f"{arguments.root}: {len(record['crops']) + len(record['volumes'])} crops and volumes are whole; see {out}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from cellmap_pipe.cluster.doctor import Doctor, diagnose

    if not Path("workflow/Snakefile").is_file():
        raise ConfigError(f"{Path.cwd()} holds no workflow/Snakefile; run this in the project's folder")
    if not arguments.directory.is_dir():
        raise ConfigError(f"--directory {arguments.directory}: is no folder; make it first")
    return diagnose(
        Doctor(
            profile=arguments.profile,
            configfiles=tuple(arguments.configfile),
            folder=arguments.directory,
            submit=arguments.submit,
            wait_minutes=arguments.wait_minutes,
        ),
        _say,
    )


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the source's file system; a public bucket is read without an account."""
    if arguments.options is None:
        return {"anon": True} if arguments.source.startswith("s3://") else {}
    try:
        options = json.loads(arguments.options)
    except ValueError as error:
        raise ConfigError(f"--options {arguments.options}: is not JSON ({error})") from error
    if not isinstance(options, dict):
        raise ConfigError(f'--options {arguments.options}: must be a JSON object such as {{"anon": true}}')
    return options


def _grid(words: Sequence[str]) -> tuple[str, list[float] | str]:
    """Return name and voxel size of a grid given on the command line."""
    if list(words) == ["native"]:
        return "native", "native"
    try:
        sizes = [float(word) for word in words]
    except ValueError:
        sizes = []
    if len(sizes) != 3 or min(sizes) <= 0:
        raise ConfigError(f"--grid {' '.join(words)}: give three voxel sizes z y x in nm, or native")
    return "x".join(f"{size:g}" for size in sizes), sizes


def _at_least(least: int) -> Callable[[str], int]:
    """Return the type of an option that takes whole numbers from `least` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _report(archive: Path, problems: Sequence[str], warnings: Sequence[str]) -> int:
    for line in [*(f"problem: {text}" for text in problems), *(f"warning: {text}" for text in warnings)]:
        _say(line)
    verdict = _counted(problems, "problem") if problems else "ready to send"
    _say(f"{archive}: {verdict}, {_counted(warnings, 'warning')}")
    return 1 if problems else 0


def _counted(items: Sequence[str], name: str) -> str:
    return f"{len(items)} {name}" if len(items) == 1 else f"{len(items)} {name}s"


def _check_writable(path: Path) -> None:
    """Raise ConfigError if no file can be written there: that is better known before the work than after it."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give the name of a file in it")
    with _writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


@contextmanager
def _writing(what: str) -> Iterator[None]:
    """Name what is written in errors of the system, which know of no file, or of a temporary one."""
    try:
        yield
    except OSError as error:
        remedy = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "give another place"
        raise ConfigError(f"{what}: cannot be written ({error.strerror or error}); {remedy}") from error


def _say_forecast(forecast: Mapping[str, Any]) -> None:
    """Print the score to expect: overall, by class, and the classes that count 0."""
    from cellmap_pipe.evaluation.rules import CLEAN, get_rules

    width = max([14, *(len(label) + 2 for label in forecast["label_scores"])])
    _say(f"{'label':<{width}}{'score':>8}{'95 %':>18}{'crops':>7}")
    for label, score in forecast["label_scores"].items():
        if score["crops"]:
            _say(f"{label:<{width}}{score['score']:>8.4f}{_interval(score):>18}{score['crops']:>7}")
    overall = {"overall": forecast} | ({} if forecast["rules"] == CLEAN else {f"by {CLEAN}": forecast[CLEAN]})
    for name, part in overall.items():
        _say(f"{name:<{width}}{part['score']:>8.4f}{_interval(part):>18}{part['crops']:>7}")
    for key, why in (("unanswered", "no voxel in the submission"), ("unvalidated", "not in the validation scores")):
        if forecast[key]:
            _say(f"{why}, counted as 0: {', '.join(forecast[key])}")
    rules = get_rules(forecast["rules"])
    _say(f"as on the validation crops of {forecast['source']}; rules {rules.name}; {rules.note}")


def _interval(score: Mapping[str, float]) -> str:
    return f"{score['low']:.4f} - {score['high']:.4f}"


@contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what is told (done, in all) and draws it on standard error, if that is a terminal."""
    from tqdm import tqdm

    with tqdm(total=0, unit=unit, disable=None, leave=False) as bar:

        def shown(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        yield shown


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; each command's function stands under `run`."""
    parser = argparse.ArgumentParser(
        prog="cellmap-pipe",
        description=(
            "Check a site, say how a run stands, fetch data, score, pack and check submissions, make a synthetic "
            "challenge, import architectures of DiNTS."
        ),
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    score = commands.add_parser("score", help="score a submission against truth by the challenge's rules")
    score.add_argument("submission", type=Path, help="zip file or zarr folder with crop{N}/{label}")
    score.add_argument("truth", type=Path, help="zip file or zarr folder with crop{N}/{label}")
    score.add_argument("--rules", default="csc-2026.06", help="version of the rules (default: %(default)s)")
    score.add_argument("--out", type=Path, help="JSON file for the scores and the record of every label")
    score.add_argument(
        "--memory-gb", type=_positive, help="for all workers together (default: 80 %% of what is available)"
    )
    score.set_defaults(run=_score)

    validate = commands.add_parser("validate", help="check a submission before it is sent")
    validate.add_argument("submission", type=Path, help="zip file or zarr folder with crop{N}/{label}")
    validate.set_defaults(run=_validate)

    pack = commands.add_parser("pack", help="pack segmentations as a submission, and check it")
    pack.add_argument(
        "predictions", type=Path, help="zip file or zarr folder with crop{N}/{label}, or results/segment/.../test.json"
    )
    pack.add_argument("--out", type=Path, required=True, help="zip file to write")
    pack.add_argument("--report", type=Path, help="JSON file for the check (default: beside the zip file)")
    pack.set_defaults(run=_pack)

    for command in (score, validate, pack):
        command.add_argument("--workers", type=_at_least(1), default=os.cpu_count() or 1, help="default: %(default)s")
    for command in (validate, pack):
        command.add_argument(
            "--manifest", type=Path, required=True, help="CSV of the (crop, label) rows: test_crop_manifest.csv"
        )
        command.add_argument(
            "--scores",
            type=Path,
            nargs="+",
            default=[],
            metavar="JSON",
            help="validation scores of all folds (results/scores/{source}/fold*.json), to predict the score from",
        )
        command.add_argument(
            "--classes", nargs="+", default=[], metavar="CLASS", help="what an empty class_label in the CSV stands for"
        )

    fetch = commands.add_parser("fetch", help="copy crops and the EM round them from S3, a web server or a folder")
    fetch.add_argument("--crops", type=Path, help="CSV of the crops, as train_crop_manifest.csv")
    fetch.add_argument("--volumes", type=Path, help="CSV of the volumes, as test_crop_manifest.csv: EM alone")
    fetch.add_argument("--root", type=Path, required=True, help="folder to copy to: {dataset}/{dataset}.zarr")
    fetch.add_argument(
        "--grid",
        nargs="+",
        action="append",
        required=True,
        metavar="NM",
        help="voxel size (z y x, nm) that crops are brought to, or native; several may be given",
    )
    fetch.add_argument("--context-nm", type=float, help="EM round each box (default: 64 voxels of each grid)")
    fetch.add_argument("--max-upsample", type=float, default=4, help="default: %(default)s")
    fetch.add_argument(
        "--max-train-gb", type=float, default=10, help="largest crop of a grid in training (default: %(default)s)"
    )
    fetch.add_argument("--classes", nargs="+", metavar="CLASS", help="class arrays to copy (default: all in the CSV)")
    fetch.add_argument("--source", default="s3://janelia-cosem-datasets", help="folder or URL (default: %(default)s)")
    fetch.add_argument("--options", help='JSON for the source\'s file system (default for s3://: {"anon": true})')
    fetch.add_argument("--em-path", default="recon-1/em/fibsem-uint8", help="default: %(default)s")
    fetch.add_argument("--labels-path", default="recon-1/labels/groundtruth", help="default: %(default)s")
    fetch.add_argument("--workers", type=_at_least(1), default=32, help="files copied at once (default: %(default)s)")
    fetch.add_argument(
        "--retries", type=_at_least(0), default=5, help="further attempts at a file (default: %(default)s)"
    )
    fetch.add_argument("--recheck", action="store_true", help="compare the files that are here by MD5, not by size")
    fetch.add_argument("--dry-run", action="store_true", help="print the bytes that would be copied")
    fetch.add_argument("--out", type=Path, help="JSON of what is there (default: fetch.json in the root)")
    fetch.set_defaults(run=_fetch)

    phantom = commands.add_parser("phantom", help="make a synthetic challenge with known truth")
    phantom.add_argument("root", type=Path, help="folder to write")
    phantom.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    phantom.set_defaults(run=_phantom)

    status = commands.add_parser("status", help="show every training of a run: step, speed, score, and why it waits")
    status.add_argument(
        "--directory", type=Path, default=Path(), help="folder of `results` and `runs` (default: this one)"
    )
    status.add_argument("--json", action="store_true", help="as JSON, durations in seconds")
    status.set_defaults(run=_status)

    doctor = commands.add_parser("doctor", help="check a site before the first real job, and say what to edit")
    doctor.add_argument(
        "--profile",
        type=Path,
        default=Path(os.environ.get("SNAKEMAKE_PROFILE") or "profiles/longleaf"),
        help="folder of the profile (default: SNAKEMAKE_PROFILE, or else profiles/longleaf)",
    )
    doctor.add_argument(
        "--configfile", type=Path, nargs="+", default=[], help="configuration of the run, as Snakemake is given it"
    )
    doctor.add_argument("--directory", type=Path, default=Path(), help="where results are written (default: here)")
    doctor.add_argument(
        "--submit",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="send a job of a minute to each partition that the workflow uses (default: yes)",
    )
    doctor.add_argument(
        "--wait-minutes", type=_positive, default=10.0, help="longest wait for it to start (default: %(default)g)"
    )
    doctor.set_defaults(run=_doctor)

    architecture = commands.add_parser(
        "import-architecture", help="write an architecture of DiNTS published by MONAI as JSON"
    )
    architecture.add_argument("published", type=Path, help="file saved by MONAI's search, as Auto3DSeg's arch_code.pth")
    architecture.add_argument(
        "out", type=Path, help="JSON file to write, for `arguments: {architecture: ...}` of a model"
    )
    architecture.add_argument("--spatial-dims", type=int, choices=(2, 3), default=3, help="default: %(default)s")
    architecture.set_defaults(run=_import_architecture)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    parsed = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        return int(parsed.run(parsed))
    except BrokenPipeError:  # who reads has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("ERROR stopped by Ctrl-C; what is written is whole: give the command again\n")
        return 130
    except (CellmapError, OSError) as error:
        sys.stderr.write(f"ERROR {' '.join(str(error).split())}\n")
        return 2
