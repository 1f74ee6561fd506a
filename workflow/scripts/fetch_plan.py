"""Print how many bytes `fetch` would copy."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.fetch import write_plan
from cellmap_pipe.log import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    print(
        write_plan(
            snakemake.params.table,
            crops=snakemake.config["data"]["crops"],
            volumes=snakemake.config["data"]["volumes"],
            **json.loads(snakemake.params.settings),
        )
    )
