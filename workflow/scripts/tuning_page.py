"""Tabulate what post-processing was tuned to."""

from pathlib import Path
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.report.tuning import write_tuning

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_tuning(snakemake.input.tuned, Path(snakemake.output.page))
