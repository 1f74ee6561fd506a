"""List the crops on disk."""

from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.prepare.crops import write_crops

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_crops(snakemake.config["data"], snakemake.output.table)
