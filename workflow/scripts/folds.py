"""Divide the crops into folds."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.prepare.splits import write_folds

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_folds(
        snakemake.input.crops,
        snakemake.output.table,
        datasplit=snakemake.config["folds"]["datasplit"],
        keep=snakemake.config["folds"]["keep"],
        **json.loads(snakemake.params.settings),
    )
