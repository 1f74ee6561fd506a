"""The command `cellmap-pipe`: score, pack and check submissions, and make a synthetic challenge, without Snakemake.

Thin: every command calls one function of the library and prints what it returns. An error is one line on standard error
and exit status 2; a submission with problems gives exit status 1.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cellmap_pipe.errors import CellmapError
from cellmap_pipe.files import read_json, write_json


def _score(arguments: argparse.Namespace) -> int:
    from cellmap_pipe.evaluation.challenge import score_submission, score_table

    result = score_submission(arguments.submission, arguments.truth, rules=arguments.rules, workers=arguments.workers)
    if arguments.out:
        write_json(arguments.out, result)
    _say(score_table(result))
    return 1 if result["failed"] else 0


def _validate(arguments: argparse.Namespace) -> int:
    from cellmap_pipe.evaluation.flight import as_json, validate

    problems = validate(arguments.submission, arguments.volumes, arguments.classes, workers=arguments.workers)
    return _report(arguments.submission, as_json(problems, "error"), as_json(problems, "warning"))


def _pack(arguments: argparse.Namespace) -> int:
    from cellmap_pipe.evaluation.submission import pack

    report = arguments.report or arguments.archive.with_suffix(".json")
    pack(
        arguments.segmentation,
        arguments.volumes,
        arguments.archive,
        report,
        classes=arguments.classes,
        workers=arguments.workers,
    )
    result = read_json(report)
    return _report(arguments.archive, result["problems"], result["warnings"])


def _phantom(arguments: argparse.Namespace) -> int:
    from cellmap_pipe.phantom import write_challenge

    write_challenge(arguments.root, seed=arguments.seed, out_json=arguments.root / "phantom.json")
    _say(f"{arguments.root}: synthetic challenge of seed {arguments.seed}, described in phantom.json")
    return 0


def _report(archive: Path, problems: Sequence[str], warnings: Sequence[str]) -> int:
    for line in [*(f"problem: {text}" for text in problems), *(f"warning: {text}" for text in warnings)]:
        _say(line)
    verdict = f"{len(problems)} problems" if problems else "ready to send"
    _say(f"{archive}: {verdict}, {len(warnings)} warnings")
    return 1 if problems else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; each command's function stands under `run`."""
    parser = argparse.ArgumentParser(
        prog="cellmap-pipe", description="Score, pack and check submissions, and make a synthetic challenge."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    score = commands.add_parser("score", help="score a submission against truth by the challenge's rules")
    score.add_argument("submission", type=Path, help="zip file or zarr folder with crop{N}/{label}")
    score.add_argument("truth", type=Path, help="zip file or zarr folder with crop{N}/{label}")
    score.add_argument("--rules", default="csc-2026.06", help="version of the rules (default: %(default)s)")
    score.add_argument("--out", type=Path, help="JSON file for the scores and the record of every label")
    score.set_defaults(run=_score)

    validate = commands.add_parser("validate", help="check a submission before it is sent")
    validate.add_argument("submission", type=Path, help="zip file")
    validate.add_argument("volumes", type=Path, help="CSV of the volumes, as test_crop_manifest.csv")
    validate.set_defaults(run=_validate)

    pack = commands.add_parser("pack", help="pack segmentations as a submission")
    pack.add_argument("segmentation", type=Path, help="JSON of the segmentations (results/segment/.../test.json)")
    pack.add_argument("volumes", type=Path, help="CSV of the volumes, as test_crop_manifest.csv")
    pack.add_argument("archive", type=Path, help="zip file to write")
    pack.add_argument("--report", type=Path, help="JSON file for the check (default: beside the zip file)")
    pack.set_defaults(run=_pack)

    for command in (score, validate, pack):
        command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    for command in (validate, pack):
        command.add_argument(
            "--classes", nargs="+", default=[], metavar="CLASS", help="what an empty class_label in the CSV stands for"
        )

    phantom = commands.add_parser("phantom", help="make a synthetic challenge with known truth")
    phantom.add_argument("root", type=Path, help="folder to write")
    phantom.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    phantom.set_defaults(run=_phantom)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    parsed = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        return int(parsed.run(parsed))
    except (CellmapError, OSError) as error:
        sys.stderr.write(f"ERROR {' '.join(str(error).split())}\n")
        return 2
