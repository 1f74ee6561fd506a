"""Judge every crop of a grid and describe those that are kept."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.prepare.quality import write_quality

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_quality(
        snakemake.input.converted,
        snakemake.output.crops,
        snakemake.output.statistics,
        **json.loads(snakemake.params.settings),
    )
