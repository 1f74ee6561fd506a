rule quality_page:
    input:
        crops=rules.quality.output.crops,
        converted=rules.quality.input.converted,
    output:
        page=report(
            "results/report/quality_{grid}.html",
            category="Data",
            labels={"grid": "{grid}", "shows": "crops with labels and verdicts"},
            caption="../report/quality.rst",
        ),
        audit=report(
            "results/report/audit_{grid}.html",
            category="Data",
            labels={"grid": "{grid}", "shows": "what is known of each class"},
            caption="../report/data.rst",
        ),
    log:
        "logs/report/quality_{grid}.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    resources:
        mem_mb=lambda wc, attempt: 8000 * attempt,
        runtime=120,
    params:
        settings=lambda wc: canonical_json(CONFIG.memory_settings(wc.grid)),
        version=CONFIG.version("report"),
        nifti_dir=rules.convert.params.nifti_dir,
    script:
        "../scripts/quality_page.py"


rule ceiling_page:
    input:
        ceilings=expand(rules.ceiling.output.index, shard=SHARDS, allow_missing=True),
        crops=rules.quality.output.crops,
    output:
        page=report(
            "results/report/ceiling_{grid}.html",
            category="Data",
            labels={"grid": "{grid}", "shows": "best score that the grid allows"},
            caption="../report/ceiling.rst",
        ),
    log:
        "logs/report/ceiling_{grid}.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        version=CONFIG.version("report"),
    script:
        "../scripts/ceiling_page.py"


rule training_curves:
    input:
        history=expand(rules.train.output.history, model=MODELS, fold=FOLDS),
        metrics=expand(rules.train.output.metrics, model=MODELS, fold=FOLDS),
    output:
        figure=report(
            "results/report/training.svg",
            category="Training",
            labels={"shows": "training curves"},
            caption="../report/training.rst",
        ),
    log:
        "logs/report/training.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        version=CONFIG.version("report"),
    script:
        "../scripts/training_curves.py"


rule compare:
    input:
        scores=validation_scores(SOURCES, "there are no scores to compare"),
        metrics=expand(rules.train.output.metrics, model=MODELS, fold=VALIDATED_FOLDS),
        ceilings=expand(
            rules.ceiling.output.index, grid=CONFIG.grids_in_use, shard=SHARDS
        ),
        folds=rules.folds.output.table,
    output:
        table=report(
            "results/report/scores.csv",
            category="Scores",
            labels={"shows": "table (CSV)"},
            caption="../report/scores.rst",
        ),
        page=report(
            "results/report/scores.html",
            category="Scores",
            labels={"shows": "table"},
            caption="../report/scores.rst",
        ),
        classes=report(
            "results/report/class_scores.svg",
            category="Scores",
            labels={"shows": "per class"},
            caption="../report/scores.rst",
        ),
        gain=report(
            "results/report/ensemble_gain.svg",
            category="Scores",
            labels={"shows": "ensemble against models"},
            caption="../report/scores.rst",
        ),
    log:
        "logs/report/compare.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        version=CONFIG.version("report"),
    script:
        "../scripts/compare.py"


rule tuning_page:
    input:
        tuned=expand(rules.tune.output.tuned, source=SOURCES),
    output:
        page=report(
            "results/report/tuning.html",
            category="Scores",
            labels={"shows": "post-processing"},
            caption="../report/tuning.rst",
        ),
    log:
        "logs/report/tuning.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        version=CONFIG.version("report"),
    script:
        "../scripts/tuning_page.py"


rule predictions_page:
    input:
        scores=expand(rules.evaluate.output.scores, source=SOURCES, allow_missing=True),
        segmentations=expand(
            rules.segment.output.index,
            source=SOURCES,
            subset="validation",
            allow_missing=True,
        ),
        crops=rules.crops.output.table,
    output:
        figure=report(
            "results/report/predictions_fold{fold}.png",
            category="Predictions",
            labels={"fold": "{fold}", "shows": "EM, truth and predictions"},
            caption="../report/predictions.rst",
        ),
    log:
        "logs/report/predictions_fold{fold}.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    resources:
        mem_mb=lambda wc, attempt: 16000 * attempt,
        runtime=120,
    params:
        version=CONFIG.version("report"),
    script:
        "../scripts/predictions_page.py"
