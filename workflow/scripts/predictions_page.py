"""Draw EM, truth and predictions of validation crops."""

from pathlib import Path
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.report.slices import predictions

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    predictions(
        snakemake.input.scores,
        snakemake.input.segmentations,
        snakemake.input.crops,
        Path(snakemake.output.figure),
        data_root=Path(snakemake.config["data"]["root"]),
    )
