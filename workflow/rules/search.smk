# Looks for an architecture for DiNTS. Nothing in `all` asks for it: `snakemake search_dints` does, and a model then names
# the file under `arguments: {architecture: ...}`. One process, on the first fold: its validation crops take no part.


from cellmap_pipe.training.architecture import SEARCH_SETTINGS


def searched_model():
    """Return the model whose patches, batch, classes and crops the search uses."""
    name = config["search"]["model"]
    if name not in KNOWN_MODELS:
        refuse(
            f"search.model names an unknown model '{name}'; known: {', '.join(KNOWN_MODELS)}"
        )
    return model_named(name)


def search_settings():
    """Return what the search takes from the model: its own network, even another architecture, changes nothing."""
    settings = searched_model().training_settings()
    return {key: settings[key] for key in SEARCH_SETTINGS}


rule search_dints:
    input:
        datalist=lambda wc: f"results/datalist/{searched_model().grid}/fold{FOLDS[0]}.json",
        index=lambda wc: f"results/chunks/{searched_model().grid}/index.json",
    output:
        architecture="results/search/dints.json",
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
        plan=lambda wc: canonical_json(config["search"]),
        version=CONFIG.version("search"),
    script:
        "../scripts/search_dints.py"
