"""Tabulate and draw the scores of all models and of the ensemble."""

from pathlib import Path
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.report.figures import class_scores
from cellmap_pipe.report.tables import write_scores

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_scores(
        snakemake.input.scores,
        snakemake.input.metrics,
        snakemake.input.ceilings,
        Path(snakemake.output.table),
        Path(snakemake.output.page),
        out_crops=Path(snakemake.output.crops),
        folds_csv=snakemake.input.folds,
    )
    class_scores(
        snakemake.input.scores,
        Path(snakemake.output.classes),
        metrics_jsons=snakemake.input.metrics,
        ceiling_jsons=snakemake.input.ceilings,
    )
