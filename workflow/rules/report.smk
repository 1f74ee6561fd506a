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
            labels={"shows": "curves: loss, Dice, learning rate"},
            caption="../report/training.rst",
        ),
        usage=report(
            "results/report/training_usage.svg",
            category="Training",
            labels={"shows": "curves: speed, waiting for data, memory"},
            caption="../report/training_usage.rst",
        ),
        page=report(
            "results/report/training.html",
            category="Training",
            labels={"shows": "table of all runs"},
            caption="../report/training_runs.rst",
        ),
    log:
        "logs/report/training.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        version=CONFIG.version("report"),
        # what the runs noted of themselves; a run directory may be gone when its results still stand
        run_dirs=expand(rules.train.params.run_dir, model=MODELS, fold=FOLDS),
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
        crops=report(
            "results/report/crop_scores.csv",
            category="Scores",
            labels={"shows": "every crop (CSV)"},
            caption="../report/scores.rst",
        ),
        classes=report(
            "results/report/class_scores.svg",
            category="Scores",
            labels={"shows": "per class"},
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


rule comparison_page:
    input:
        scores=validation_scores(SOURCES, "there are no scores to compare"),
        history=expand(rules.train.output.history, model=MODELS, fold=VALIDATED_FOLDS),
        metrics=expand(rules.train.output.metrics, model=MODELS, fold=VALIDATED_FOLDS),
        folds=rules.folds.output.table,
    output:
        page=report(
            "results/report/comparison.html",
            category="Comparison",
            labels={"shows": "ranking, differences, cost, equal budget"},
            caption="../report/comparison.rst",
        ),
        pairs=report(
            "results/report/comparison.csv",
            category="Comparison",
            labels={"shows": "every pair (CSV)"},
            caption="../report/comparison.rst",
        ),
        ranking=report(
            "results/report/ranking.csv",
            category="Comparison",
            labels={"shows": "ranking (CSV)"},
            caption="../report/comparison.rst",
        ),
        differences=report(
            "results/report/differences.svg",
            category="Comparison",
            labels={"shows": "differences from the best"},
            caption="../report/differences.rst",
        ),
        gain=report(
            "results/report/ensemble_gain.svg",
            category="Comparison",
            labels={"shows": "ensemble against models"},
            caption="../report/ensemble_gain.rst",
        ),
        budget=report(
            "results/report/equal_budget.svg",
            category="Comparison",
            labels={"shows": "equal budget"},
            caption="../report/equal_budget.rst",
        ),
    log:
        "logs/report/comparison.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        version=CONFIG.version("report"),
        specimens=canonical_json(CONFIG.folds.specimens),
        run_dirs=expand(rules.train.params.run_dir, model=MODELS, fold=VALIDATED_FOLDS),
    script:
        "../scripts/comparison.py"


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
            labels={"shows": "ensemble and best models, fold {fold}"},
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


rule splits_page:
    input:
        crops=rules.crops.output.table,
        folds=rules.folds.output.table,
        quality=expand(rules.quality.output.crops, grid=CONFIG.grids_in_use),
        datalists=expand(
            rules.datalist.output.datalist, grid=CONFIG.grids_in_use, fold=FOLDS
        ),
    output:
        page=report(
            "results/report/splits.html",
            category="Data",
            labels={"grid": "all", "shows": "folds: classes, distances, leaks"},
            caption="../report/splits.rst",
        ),
    log:
        "logs/report/splits.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        grids=list(CONFIG.grids_in_use),
        settings=canonical_json(
            {
                **CONFIG.fold_settings(),
                "datasplit": CONFIG.folds.datasplit,
                "keep": CONFIG.folds.keep,
                "classes": list(CONFIG.classes),
                "run": list(FOLDS),
            }
        ),
        version=CONFIG.version("report"),
    script:
        "../scripts/splits_page.py"


rule examples_page:
    input:
        scores=expand(
            rules.evaluate.output.scores, fold=VALIDATED_FOLDS, allow_missing=True
        ),
        segmentations=expand(
            rules.segment.output.index,
            fold=VALIDATED_FOLDS,
            subset="validation",
            allow_missing=True,
        ),
        crops=rules.crops.output.table,
    output:
        page=report(
            "results/report/examples_{source}.html",
            category="Predictions",
            labels={"shows": "best and worst crops of {source}"},
            caption="../report/examples.rst",
        ),
    log:
        "logs/report/examples_{source}.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    resources:
        mem_mb=lambda wc, attempt: 8000 * attempt,
        runtime=120,
    params:
        version=CONFIG.version("report"),
    script:
        "../scripts/examples_page.py"


rule provenance:
    input:
        crops=rules.crops.output.table,
        folds=rules.folds.output.table,
        # without validation crops there are no scores; the submission's origin is asked for all the same
        table=given(VALIDATED_FOLDS and rules.compare.output.table),
        crop_scores=given(VALIDATED_FOLDS and rules.compare.output.crops),
        ranking=given(VALIDATED_FOLDS and rules.comparison_page.output.ranking),
        comparison=given(VALIDATED_FOLDS and rules.comparison_page.output.pairs),
        quality=expand(rules.quality.output.crops, grid=CONFIG.grids_in_use),
        converted=expand(
            rules.convert.output.index, grid=CONFIG.grids_in_use, shard=SHARDS
        ),
        ceilings=rules.compare.input.ceilings,
        stores=expand(rules.chunk_index.output.index, grid=CONFIG.grids_in_use),
        datalists=rules.splits_page.input.datalists,
        metrics=expand(rules.train.output.metrics, model=MODELS, fold=FOLDS),
        weights=expand(rules.train.output.weights, model=MODELS, fold=FOLDS),
        history=rules.training_curves.input.history,
        predictions=all_predictions,
        ensembles=[
            *expand(
                rules.ensemble.output.index, subset="validation", fold=VALIDATED_FOLDS
            ),
            *given(SUBMITTED and rules.ensemble.output.index.format(**SUBMITTED)),
        ],
        tuned=expand(rules.tune.output.tuned, source=SOURCES) if TUNED else [],
        segmentations=[
            *expand(
                rules.segment.output.index,
                source=SOURCES,
                fold=VALIDATED_FOLDS,
                subset="validation",
            ),
            *given(SUBMITTED and rules.segment.output.index.format(**SUBMITTED)),
        ],
        scores=expand(
            rules.evaluate.output.scores, source=SOURCES, fold=VALIDATED_FOLDS
        ),
        submission=given(SUBMITTED and rules.submission.output.checks),
        archive=given(SUBMITTED and rules.submission.output.archive),
        forecast=given(
            SUBMITTED and VALIDATED_FOLDS and rules.submission_forecast.output.forecast
        ),
        truth_scores=given(
            SUBMITTED and CONFIG.data.truth and rules.score_submission.output.scores
        ),
    output:
        table=report(
            "results/report/provenance.json",
            category="Provenance",
            labels={"shows": "all digests and settings (JSON)"},
            caption="../report/provenance.rst",
        ),
        page=report(
            "results/report/provenance.html",
            category="Provenance",
            labels={"shows": "what every number was made of"},
            caption="../report/provenance.rst",
        ),
    log:
        "logs/report/provenance.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    resources:
        mem_mb=4000,
        runtime=120,
    params:
        settings=lambda wc: canonical_json(resolved_settings()),
        code=str(Path(workflow.basedir)),
        version=CONFIG.version("report"),
    script:
        "../scripts/provenance.py"
