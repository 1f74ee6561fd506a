"""Write the training and validation crops of one fold in MONAI's format."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.prepare.datalist import write_datalists

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_datalists(
        snakemake.input.crops,
        snakemake.input.folds,
        snakemake.input.converted,
        {snakemake.wildcards.fold: snakemake.output.datalist},
        nifti_dir=snakemake.params.nifti_dir,
        **json.loads(snakemake.params.settings),
    )
