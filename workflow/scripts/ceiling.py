"""Score the labels themselves after their way to the grid and back."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.evaluation.ceiling import ceiling_shard
from cellmap_pipe.log import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    ceiling_shard(
        snakemake.input.converted,
        snakemake.input.crops,
        snakemake.output.index,
        data_root=snakemake.config["data"]["root"],
        nifti_dir=snakemake.params.nifti_dir,
        workers=snakemake.threads,
        memory_gb=0.8 * snakemake.resources.mem_mb / 1000,  # the rest is for what estimates cannot know
        **json.loads(snakemake.params.settings),
    )
