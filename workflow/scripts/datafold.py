"""List the crops of all folds in one file, as MONAI's datafold_read takes it."""

from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.prepare.datalist import write_datafold

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_datafold(
        snakemake.input.crops,
        snakemake.input.folds,
        snakemake.input.converted,
        snakemake.output.datalist,
        nifti_dir=snakemake.params.nifti_dir,
    )
