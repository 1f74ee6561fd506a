"""Show the best and the worst validation crops of one source, and each class at its worst."""

from pathlib import Path
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.report.examples import write_examples

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_examples(
        snakemake.input.scores,
        snakemake.input.segmentations,
        snakemake.input.crops,
        Path(snakemake.output.page),
        data_root=Path(snakemake.config["data"]["root"]),
    )
