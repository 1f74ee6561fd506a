rule train:
    input:
        datalist=lambda wc: f"results/datalist/{model_of(wc).grid}/fold{wc.fold}.json",
        index=lambda wc: f"results/chunks/{model_of(wc).grid}/index.json",
        begin=lambda wc: given(model_of(wc).train["init_from"]),
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
