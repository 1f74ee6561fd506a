"""Forecast what the submission will score, by the validation crops."""

from pathlib import Path
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.report.forecast import write_forecast

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_forecast(
        snakemake.input.scores,
        Path(snakemake.input.archive),
        Path(snakemake.input.checks),
        Path(snakemake.output.forecast),
    )
