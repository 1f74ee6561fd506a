# Looks for an architecture for DiNTS. Nothing in `all` asks for it: `snakemake search_dints` does, and a model then names
# the file under `arguments: {architecture: ...}`. One process, on the first fold: its validation crops take no part.


rule search_dints:
    input:
        datalist=lambda wc: f"results/datalist/{search_settings()['grid']}/fold{FOLDS[0]}.json",
        index=lambda wc: f"results/chunks/{search_settings()['grid']}/index.json",
    output:
        # stays while it is searched for anew: a model that names it must be read by the job
        architecture=update("results/search/dints.json"),
    log:
        "logs/search_dints.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: lambda wc: searched_model().training_job.threads
    resources:
        gpu=lambda wc: min(1, searched_model().training_job.gpus),
        cpus_per_task=lambda wc: searched_model().training_job.threads,
        mem_mb=lambda wc, attempt: searched_model().training_job.mem_mb * attempt,
        runtime=lambda wc: searched_model().training_job.runtime_min,
    params:
        settings=lambda wc: canonical_json(search_settings()),
        plan=lambda wc: canonical_json(CONFIG.search),
        version=CONFIG.version("search"),
    script:
        "../scripts/search_dints.py"
