rule evaluate:
    input:
        segmentation="results/segment/{source}/fold{fold}/validation.json",
        crops=rules.crops.output.table,
        # what they were made of is the truth
        converted=expand(
            rules.convert.output.index, grid=CONFIG.grids_in_use, shard=SHARDS
        ),
    output:
        scores="results/scores/{source}/fold{fold}.json",
    log:
        "logs/evaluate/{source}_fold{fold}.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: 8
    resources:
        mem_mb=lambda wc, attempt: 24000 * attempt,
        runtime=480,
    params:
        settings=canonical_json(CONFIG.evaluation_settings()),
        version=CONFIG.version("evaluate"),
    script:
        "../scripts/evaluate.py"


rule submission:
    input:
        segmentation="results/segment/ensemble/foldall/test.json",
        volumes=volumes_table,
    output:
        archive="results/submission/submission.zip",
        checks="results/submission/report.json",
    log:
        "logs/submission.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: 8
    resources:
        mem_mb=lambda wc, attempt: 16000 * attempt,
        runtime=480,
    params:
        settings=canonical_json(CONFIG.scoring_settings()),
        version=CONFIG.version("submission"),
    script:
        "../scripts/submission.py"


rule score_submission:
    input:
        archive=rules.submission.output.archive,
        truth=given_truth,
    output:
        scores="results/submission/scores.json",
    log:
        "logs/score_submission.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: 8
    resources:
        mem_mb=lambda wc, attempt: 24000 * attempt,
        runtime=480,
    params:
        settings=canonical_json({"rules": CONFIG.rules}),
        version=CONFIG.version("evaluate"),
    script:
        "../scripts/score_submission.py"


rule submission_forecast:
    input:
        # the submission is made of the ensemble
        scores=validation_scores("ensemble", "no score can be forecast"),
        archive=rules.submission.output.archive,
        checks=rules.submission.output.checks,
    output:
        forecast="results/submission/forecast.json",
    log:
        "logs/submission_forecast.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        version=CONFIG.version("report"),
    script:
        "../scripts/submission_forecast.py"


rule submission_page:
    input:
        checks=rules.submission.output.checks,
        forecast=(
            [rules.submission_forecast.output.forecast] if VALIDATED_FOLDS else []
        ),
        scores=[rules.score_submission.output.scores] if CONFIG.data.truth else [],
    output:
        page=report(
            "results/submission/report.html",
            category="Submission",
            labels={"shows": "flight check, forecast and scores"},
            caption="../report/submission.rst",
        ),
    log:
        "logs/report/submission.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        version=CONFIG.version("report"),
    script:
        "../scripts/submission_page.py"


for _model in KNOWN_MODELS:

    rule:
        name:
            f"evaluate_{_model}"
        input:
            validation_scores(_model, "nothing can be scored"),
        localrule: True
