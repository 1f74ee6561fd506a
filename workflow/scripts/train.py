"""Train one network; this process becomes the launcher of the training processes."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.training.launch import launch

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    launch(
        {
            "rule": snakemake.rule,
            "model": snakemake.wildcards.model,
            "fold": snakemake.wildcards.fold,
            "settings": json.loads(snakemake.params.settings),
            "datalist": snakemake.input.datalist,
            "index": snakemake.input.index,
            "run_dir": snakemake.params.run_dir,
            "outputs": dict(snakemake.output.items()),
            "device": snakemake.resources.device if snakemake.resources.gpu else "cpu",
            "runtime_min": snakemake.resources.runtime,
            "retrain": snakemake.config["retrain"],
        },
        log=snakemake.log[0],
        processes=max(1, snakemake.resources.gpu),
        threads=snakemake.threads,
    )
