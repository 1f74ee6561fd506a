"""Compare all models and the ensemble: which differ, what each cost, and who leads at an equal budget."""

import json
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.report.comparison import grids_of, write_comparison
from cellmap_pipe.report.figures import budgets, differences, ensemble_gain
from cellmap_pipe.report.training import read_runs

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake):
    runs = read_runs(snakemake.input.history, snakemake.input.metrics, snakemake.params.run_dirs)
    write_comparison(
        snakemake.input.scores,
        runs,
        snakemake.output.pairs,
        snakemake.output.ranking,
        snakemake.output.page,
        folds_csv=snakemake.input.folds,
        specimens=json.loads(snakemake.params.specimens),
    )
    differences(snakemake.input.scores, snakemake.output.differences, grids=grids_of(runs))
    ensemble_gain(snakemake.input.scores, snakemake.output.gain, grids=grids_of(runs))
    budgets(runs, snakemake.output.budget)
