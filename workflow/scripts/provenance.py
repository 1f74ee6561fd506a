"""Follow every number back to files, settings and code, and compare what is recorded with what is there."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.report.provenance import write_provenance

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_provenance(
        dict(snakemake.input.items()),
        Path(snakemake.output.table),
        Path(snakemake.output.page),
        settings=json.loads(snakemake.params.settings),
        repository=Path(snakemake.params.code),
        data_root=Path(snakemake.config["data"]["root"]),
    )
