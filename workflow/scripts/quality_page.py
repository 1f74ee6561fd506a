"""Draw every crop with its labels and verdict, and tabulate what is known of each class."""

from pathlib import Path
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.report.slices import quality_page
from cellmap_pipe.report.tables import write_audit

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    quality_page(
        snakemake.input.crops,
        snakemake.input.converted,
        Path(snakemake.output.figure),
        nifti_dir=Path(snakemake.params.nifti_dir),
    )
    write_audit(snakemake.input.crops, snakemake.input.converted, Path(snakemake.output.audit))
