"""Bring one shard of the crops to a grid."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.prepare.convert import convert_shard

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    convert_shard(
        snakemake.input.crops,
        snakemake.output.index,
        data_root=snakemake.config["data"]["root"],
        shard=int(snakemake.wildcards.shard),
        nifti_dir=snakemake.params.nifti_dir,
        workers=snakemake.threads,
        **json.loads(snakemake.params.settings),
    )
