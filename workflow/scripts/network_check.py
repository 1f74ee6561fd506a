"""Try a network and say what its training takes, before any job waits for a GPU."""

import json
import logging
from typing import TYPE_CHECKING

from cellmap_pipe.files import write_json
from cellmap_pipe.log import job
from cellmap_pipe.training.estimate import check_network, describe

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    result = check_network(
        json.loads(snakemake.params.settings),
        gpu_gb=snakemake.resources.training_gpu_mb / 1000 or None,
        gpus=snakemake.resources.training_gpus,
    )
    logging.info("%s\n%s", snakemake.wildcards.model, describe(result))
    write_json(snakemake.output[0], result)
