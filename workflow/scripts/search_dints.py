"""Search for an architecture of DiNTS."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.training.main import choose_device
from cellmap_pipe.training.search import search_architecture

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    search_architecture(
        snakemake.input.index,
        snakemake.input.datalist,
        json.loads(snakemake.params.settings),
        json.loads(snakemake.params.plan),
        snakemake.output.architecture,
        device=choose_device("auto", local_rank=0, processes=1),
        threads=snakemake.threads,
    )
