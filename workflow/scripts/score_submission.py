"""Score the submission against the known truth of its volumes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cellmap_pipe.evaluation.official import score_submission
from cellmap_pipe.files import write_json
from cellmap_pipe.log import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    scores = score_submission(
        snakemake.input.archive,
        Path(snakemake.input.truth).parent,
        workers=snakemake.threads,
        memory_gb=0.8 * snakemake.resources.mem_mb / 1000,  # the rest is for what estimates cannot know
        **json.loads(snakemake.params.settings),
    )
    write_json(snakemake.output.scores, scores)
