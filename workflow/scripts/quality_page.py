"""Draw every crop with its labels and verdict, and tabulate what is known of each class."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.report.audit import write_audit
from cellmap_pipe.report.quality import write_quality_page

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_quality_page(
        snakemake.input.crops,
        snakemake.input.converted,
        Path(snakemake.output.page),
        nifti_dir=Path(snakemake.params.nifti_dir),
        **json.loads(snakemake.params.settings),
    )
    write_audit(snakemake.input.crops, snakemake.input.converted, Path(snakemake.output.audit))
