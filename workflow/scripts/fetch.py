"""Copy crops and the EM round them from their publisher, and verify them."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.fetch import fetch
from cellmap_pipe.log import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    fetch(
        snakemake.output.record,
        crops=snakemake.config["data"]["crops"],
        volumes=snakemake.config["data"]["volumes"],
        **json.loads(snakemake.params.settings),
    )
