# What a run takes, before anything waits in a queue. Nothing in `all` asks for it: `snakemake plan` does. It declares no
# output, so that it is made and printed anew each time, on the machine where Snakemake runs.


def asked_by_profile():
    """Return what one job of each rule asks for, by rule or rule:model, as the profile leaves it."""

    def of(name, **wildcards):
        asked = workflow.get_rule(name).expand_resources(
            wildcards, input=[], attempt=1, skip_evaluation={"tmpdir"}
        )
        return {
            "gpus": asked.get("gpu", 0),
            "cores": asked["_cores"],
            "memory_gb": asked["mem_mb"] / 1000,
            "walltime_h": asked["runtime"] / 60,
            "gpu_model": asked.get("gpu_model"),
        }

    grid = {"grid": CONFIG.grids_in_use[0], "shard": "0"}
    fold = {"source": MODELS[0], "fold": "0", "subset": "validation", "shard": "0"}
    asked = {name: of(name, **grid) for name in ("convert", "ceiling", "chunk")}
    for name in ("ensemble", "tune", "segment", "evaluate"):
        asked[name] = of(name, **fold)
    for name in ("submission", "score_submission", "phantom"):
        if workflow.is_rule(name):
            asked[name] = of(name)
    asked["network_check"] = of("network_check", model=MODELS[0])
    for model in MODELS:
        for name in ("train", "predict"):
            asked[f"{name}:{model}"] = of(name, model=model, **fold)
    return asked


rule plan:
    log:
        "logs/plan.log",
    retries: 0
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        project=Path(workflow.basedir).parent,
        asked=lambda wc: canonical_json(asked_by_profile()),
        attempts=lambda wc: workflow.execution_settings.retries + 1,
        table="results/plan.csv",
    script:
        "../scripts/plan.py"
