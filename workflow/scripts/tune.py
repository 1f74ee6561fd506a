"""Choose how probabilities become masks and objects on validation crops."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.prediction.tuning import tune

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    tune(
        snakemake.input.probabilities,
        snakemake.input.crops,
        snakemake.output.tuned,
        folds_csv=snakemake.input.folds,
        data_root=snakemake.config["data"]["root"],
        workers=snakemake.threads,
        memory_gb=snakemake.resources.mem_mb / 1000,
        **json.loads(snakemake.params.settings),
    )
