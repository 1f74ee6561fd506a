rule prediction_plan:
    input:
        volumes=volumes_table,
    output:
        # which grid serves which class of which volume; and, apart from it, what that takes of each model
        table=report(
            "results/predict/plan.csv",
            category="Prediction plan",
            labels={"shows": "grid of each class and volume"},
            caption="../report/plan.rst",
        ),
        models=report(
            "results/predict/plan_models.csv",
            category="Prediction plan",
            labels={"shows": "what each model takes"},
            caption="../report/plan.rst",
        ),
    log:
        "logs/prediction_plan.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        settings=canonical_json(CONFIG.plan_settings()),
        version=CONFIG.version("prediction_plan"),
    script:
        "../scripts/prediction_plan.py"


rule predict:
    input:
        unpack(volumes_of),
        weights=rules.train.output.weights,
    output:
        index="results/predict/{model}/fold{fold}/{subset}/shard{shard}.json",
    log:
        "logs/predict/{model}_fold{fold}_{subset}_shard{shard}.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: lambda wc: model_of(wc).prediction_job.threads
    resources:
        gpu=lambda wc: model_of(wc).prediction_job.gpus,
        cpus_per_task=lambda wc: model_of(wc).prediction_job.threads,
        mem_mb=lambda wc, attempt: model_of(wc).prediction_job.mem_mb * attempt,
        runtime=lambda wc: model_of(wc).prediction_job.runtime_min,
        device=lambda wc: model_of(wc).prediction_job.device,
    params:
        settings=lambda wc: canonical_json(
            CONFIG.prediction_settings(wc.model, wc.subset)
        ),
        volumes=lambda wc: canonical_json(CONFIG.volume_settings(wc.model)),
        version=CONFIG.version("predict"),
        store_dir="results/predict/{model}/fold{fold}/{subset}/volumes",
    script:
        "../scripts/predict.py"


rule ensemble:
    input:
        members=members_of,
        scores=weighing_scores,
    output:
        index="results/ensemble/{subset}/fold{fold}.json",
    log:
        "logs/ensemble/{subset}_fold{fold}.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: 8
    resources:
        mem_mb=lambda wc, attempt: 24000 * attempt,
        runtime=480,
    params:
        settings=canonical_json(CONFIG.ensemble_settings()),
        version=CONFIG.version("ensemble"),
        store_dir="results/ensemble/{subset}/volumes_fold{fold}",
    script:
        "../scripts/ensemble.py"


rule tune:
    input:
        probabilities=validation_probabilities,
        crops=rules.crops.output.table,
        folds=rules.folds.output.table,
        # what they were made of is the truth
        converted=expand(
            rules.convert.output.index, grid=CONFIG.grids_in_use, shard=SHARDS
        ),
    output:
        tuned="results/tune/{source}.json",
    log:
        "logs/tune/{source}.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: 8
    resources:
        mem_mb=lambda wc, attempt: 48000 * attempt,
        runtime=720,
    params:
        settings=canonical_json(CONFIG.tuning_settings()),
        version=CONFIG.version("tune"),
    script:
        "../scripts/tune.py"


rule segment:
    input:
        probabilities=probabilities_of,
        tuned=rules.tune.output.tuned if TUNED else [],
    output:
        index="results/segment/{source}/fold{fold}/{subset}.json",
    log:
        "logs/segment/{source}_fold{fold}_{subset}.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: 2  # one process; zarr encodes beside it
    resources:
        mem_mb=lambda wc, attempt: 48000 * attempt,
        runtime=720,
    params:
        settings=canonical_json(CONFIG.segmentation_settings()),
        version=CONFIG.version("segment"),
        store_dir="results/segment/{source}/fold{fold}/{subset}",
    script:
        "../scripts/segment.py"


for _model in KNOWN_MODELS:

    rule:
        name:
            f"predict_{_model}"
        input:
            predictions(_model, VALIDATED_FOLDS, "validation"),
        localrule: True

    rule:
        name:
            f"segment_{_model}"
        input:
            expand(rules.segment.output.index, source=_model, fold=FOLDS, subset="test"),
        localrule: True
