"""Write one shard of the training store."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.prepare.chunks import chunk_shard

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    chunk_shard(
        snakemake.input.crops,
        snakemake.input.converted,
        snakemake.output.index,
        data_root=snakemake.config["data"]["root"],
        nifti_dir=snakemake.params.nifti_dir,
        store_dir=snakemake.params.store_dir,
        workers=snakemake.threads,
        **json.loads(snakemake.params.settings),
    )
