"""Make a synthetic challenge with known truth."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.phantom import write_challenge

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_challenge(
        Path(snakemake.config["data"]["root"]),
        out_json=Path(snakemake.output.index),
        **json.loads(snakemake.params.settings),
    )
