# Copies data from their publisher into data.root. Nothing in `all` asks for it: `snakemake fetch` does.
# The plan declares no output, so that it is made and printed anew each time, on the machine where Snakemake runs.


rule fetch:
    input:
        crops=given(CONFIG.data.crops),
        volumes=given(CONFIG.data.volumes),
    output:
        record="results/fetch.json",
    log:
        "logs/fetch.log",
    retries: 0
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: 4
    resources:
        mem_mb=8000,
        runtime=2880,
    params:
        settings=canonical_json(CONFIG.fetch_settings()),
    script:
        "../scripts/fetch.py"


rule fetch_plan:
    input:
        crops=rules.fetch.input.crops,
        volumes=rules.fetch.input.volumes,
    log:
        "logs/fetch_plan.log",
    retries: 0
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        settings=rules.fetch.params.settings,
        table="results/fetch_plan.csv",
    script:
        "../scripts/fetch_plan.py"
