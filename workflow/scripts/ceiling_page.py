"""Tabulate the best score that a grid allows."""

from pathlib import Path
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.report.ceiling import write_ceiling

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_ceiling(snakemake.input.ceilings, snakemake.input.crops, Path(snakemake.output.page))
