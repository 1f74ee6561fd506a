"""Average the probabilities of several predictions."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.prediction.ensemble import write_ensemble

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    write_ensemble(
        snakemake.input.members,
        snakemake.output.index,
        store_dir=snakemake.params.store_dir,
        workers=snakemake.threads,
        scores=snakemake.input.get("scores", []),
        **json.loads(snakemake.params.settings),
    )
