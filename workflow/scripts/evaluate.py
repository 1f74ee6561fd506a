"""Score the segmentations of one fold's validation crops."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.evaluation.crops import evaluate_fold
from cellmap_pipe.log import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    evaluate_fold(
        snakemake.input.segmentation,
        snakemake.input.crops,
        snakemake.config["data"]["root"],
        snakemake.output.scores,
        workers=snakemake.threads,
        memory_gb=0.8 * snakemake.resources.mem_mb / 1000,  # the rest is for what estimates cannot know
        **json.loads(snakemake.params.settings),
    )
