"""Tabulate what each fold trains and validates on, and how far apart both are."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.report.splits import write_splits

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_splits(
        snakemake.input.crops,
        snakemake.input.folds,
        dict(zip(snakemake.params.grids, snakemake.input.quality, strict=True)),
        snakemake.input.datalists,
        Path(snakemake.output.page),
        **json.loads(snakemake.params.settings),
    )
