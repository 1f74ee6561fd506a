"""Turn probabilities into masks and instances at the volumes' own voxel size."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.prediction.postprocess import segment

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    segment(
        snakemake.input.probabilities,
        snakemake.output.index,
        store_dir=snakemake.params.store_dir,
        settings=json.loads(snakemake.params.settings),
        tuned=snakemake.input.get("tuned") or None,
        subset=snakemake.wildcards.subset,
        memory_gb=snakemake.resources.mem_mb / 1000,
    )
