"""Export the crops of a grid as an nnU-Net v2 dataset."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.prepare.nnunet import export_nnunet

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    export_nnunet(
        snakemake.input.crops,
        snakemake.input.folds,
        snakemake.input.converted,
        snakemake.output.index,
        nifti_dir=snakemake.params.nifti_dir,
        raw_dir=snakemake.params.raw_dir,
        workers=snakemake.threads,
        **json.loads(snakemake.params.settings),
    )
