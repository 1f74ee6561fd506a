"""Print what a run will take, and refuse what cannot fit."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cellmap_pipe.cluster.plan import plan_run, write_plan
from cellmap_pipe.config import load_config
from cellmap_pipe.log import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    project = snakemake.params.project
    plan = plan_run(
        load_config(snakemake.config, schemas=project / "workflow/schemas", models=project / "config/models"),
        Path(),
        asked=json.loads(snakemake.params.asked),
        retries=snakemake.params.attempts - 1,
    )
    print(write_plan(snakemake.params.table, plan))
    plan.check()
