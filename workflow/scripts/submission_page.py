"""Show the flight check of the submission, its forecast, and its scores where the truth is known."""

from pathlib import Path
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.report.submission import write_submission

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_submission(
        Path(snakemake.input.checks),
        snakemake.input.forecast,
        snakemake.input.scores,
        Path(snakemake.output.page),
    )
