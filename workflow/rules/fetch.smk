# Copies data from their publisher into data.root. Nothing in `all` asks for it: `snakemake fetch` does.


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
    output:
        table="results/fetch_plan.csv",
    log:
        "logs/fetch_plan.log",
    retries: 0
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: 2
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        settings=rules.fetch.params.settings,
    script:
        "../scripts/fetch_plan.py"
