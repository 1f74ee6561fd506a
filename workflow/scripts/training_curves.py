"""Draw and tabulate the course of all trainings, and what they took."""

from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.report.figures import training_curves, training_usage
from cellmap_pipe.report.training import read_runs, write_training

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    training_curves(snakemake.input.history, snakemake.input.metrics, snakemake.output.figure)
    runs = read_runs(snakemake.input.history, snakemake.input.metrics, snakemake.params.run_dirs)
    training_usage(runs, snakemake.output.usage)
    write_training(runs, snakemake.output.page)
