rule network_check:
    output:
        "results/networks/{model}.json",
    log:
        "logs/network_check/{model}.log",
    retries: 0
    conda:
        "../envs/cellmap_pipe.yaml"
    resources:
        mem_mb=6000,
        runtime=30,
        # of the training job; as parameters they would make a job run again, and with it every training that is done
        training_gpus=lambda wc: model_of(wc).training_job.gpus,
        training_gpu_mb=lambda wc: round(1000 * (model_of(wc).training_job.gpu_gb or 0)),
    params:
        settings=lambda wc: canonical_json(model_of(wc).training_settings()),
        version=CONFIG.version("network_check"),
    script:
        "../scripts/network_check.py"


rule network_checks:
    input:
        expand(rules.network_check.output, model=MODELS),
    localrule: True


rule train:
    input:
        datalist=lambda wc: f"results/datalist/{model_of(wc).grid}/fold{wc.fold}.json",
        index=lambda wc: f"results/chunks/{model_of(wc).grid}/index.json",
        begin=lambda wc: given(model_of(wc).train["init_from"]),
        # A network that fails its check is not worth a GPU. Not ancient(), although the weights do not depend on what is
        # found: a check that runs anew would hide from Snakemake that the settings of the training changed, too.
        network=rules.network_check.output[0],
    output:
        weights="results/train/{model}/fold{fold}/model.pt",
        metrics="results/train/{model}/fold{fold}/metrics.json",
        history="results/train/{model}/fold{fold}/history.csv",
    log:
        "logs/train/{model}_fold{fold}.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: lambda wc: model_of(wc).training_job.threads
    resources:
        gpu=lambda wc: model_of(wc).training_job.gpus,
        # threads alone would be taken as CPU cores per GPU
        cpus_per_task=lambda wc: model_of(wc).training_job.threads,
        mem_mb=lambda wc, attempt: model_of(wc).training_job.mem_mb * attempt,
        runtime=lambda wc: model_of(wc).training_job.runtime_min,
        device=lambda wc: model_of(wc).training_job.device,
    params:
        settings=lambda wc: canonical_json(model_of(wc).training_settings()),
        version=CONFIG.version("train"),
        run_dir="runs/{model}/fold{fold}",
    script:
        "../scripts/train.py"


for _model in KNOWN_MODELS:

    rule:
        name:
            f"train_{_model}"
        input:
            expand(rules.train.output.weights, model=_model, fold=FOLDS),
        localrule: True
