"""Predict the probabilities of one shard of the volumes."""

import json
from functools import partial
from typing import TYPE_CHECKING

from cellmap_pipe.log import job
from cellmap_pipe.prediction.predict import predict_shard
from cellmap_pipe.prediction.volumes import test_volumes, validation_volumes
from cellmap_pipe.training.lease import assign_gpus

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

inputs = dict(snakemake.input.items())
weights = inputs.pop("weights")
inputs.pop("plan", None)  # it is laid out before anything is predicted, no more
data_root = snakemake.config["data"]["root"]
list_volumes = {
    "validation": partial(validation_volumes, fold=snakemake.wildcards.fold),
    "test": partial(test_volumes, data_root=data_root, **json.loads(snakemake.params.volumes)),
}[snakemake.wildcards.subset]

with job(snakemake):
    # where torch cannot use them (a broken driver), `auto` would predict on the CPU until the walltime ends
    count = {"auto": snakemake.resources.gpu, "cpu": 0}[snakemake.resources.device]
    gpus = assign_gpus(count, {"rule": snakemake.rule, **dict(snakemake.wildcards.items())})
    predict_shard(
        weights,
        list_volumes(**inputs),
        snakemake.output.index,
        data_root=data_root,
        store_dir=snakemake.params.store_dir,
        model=snakemake.wildcards.model,
        fold=snakemake.wildcards.fold,
        subset=snakemake.wildcards.subset,
        shard=int(snakemake.wildcards.shard),
        device="cuda" if gpus else "cpu",
        **json.loads(snakemake.params.settings),
    )
