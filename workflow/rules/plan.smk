# What a run takes, before anything waits in a queue. Nothing in `all` asks for it: `snakemake plan` does. It declares no
# output, so that it is made and printed anew each time, on the machine where Snakemake runs.


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
