"""Collect the shards of the training store."""

from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.prepare.chunks import write_index

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_index(snakemake.input.chunks, snakemake.input.statistics, snakemake.output.index)
