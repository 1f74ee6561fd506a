"""Lay out which model predicts which class of which volume, and what that takes."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.prediction.assignment import write_plan

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_plan(
        snakemake.input.volumes,
        snakemake.output.table,
        snakemake.output.models,
        data_root=snakemake.config["data"]["root"],
        **json.loads(snakemake.params.settings),
    )
