"""Pack and check the submission."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.evaluation.submission import pack
from cellmap_pipe.log import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    pack(
        snakemake.input.segmentation,
        snakemake.input.volumes,
        snakemake.output.archive,
        snakemake.output.checks,
        workers=snakemake.threads,
        **json.loads(snakemake.params.settings),
    )
