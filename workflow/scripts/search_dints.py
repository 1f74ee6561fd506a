"""Search for an architecture of DiNTS."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.training.lease import assign_gpus

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    # before anything asks torch which GPUs there are
    given = assign_gpus(snakemake.resources.gpu, {"rule": snakemake.rule})
    from cellmap_pipe.training.main import choose_device
    from cellmap_pipe.training.search import search_architecture

    search_architecture(
        snakemake.input.index,
        snakemake.input.datalist,
        json.loads(snakemake.params.settings),
        json.loads(snakemake.params.plan),
        snakemake.output.architecture,
        device=choose_device("cuda" if given else "cpu", local_rank=0, processes=1),
        threads=snakemake.threads,
    )
