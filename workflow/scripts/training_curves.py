"""Draw the course of all trainings."""

from pathlib import Path
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.report.figures import training_curves

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    training_curves(snakemake.input.history, snakemake.input.metrics, Path(snakemake.output.figure))
