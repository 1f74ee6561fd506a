"""Compare the bulk files with what the results say of them."""

from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.verify import verify_results

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    verify_results("results", snakemake.config["data"]["root"])
