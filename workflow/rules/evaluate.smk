rule evaluate:
    input:
        segmentation="results/segment/{source}/fold{fold}/validation.json",
        crops=rules.crops.output.table,
    output:
        scores="results/scores/{source}/fold{fold}.json",
    log:
        "logs/evaluate/{source}_fold{fold}.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: 8
    resources:
        mem_mb=lambda wc, attempt: 48000 * attempt,
        runtime=480,
    params:
        settings=canonical_json(CONFIG.scoring_settings()),
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
        page=report(
            "results/submission/report.html",
            category="Submission",
            labels={"shows": "flight check"},
            caption="../report/submission.rst",
        ),
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


for _model in KNOWN_MODELS:

    rule:
        name:
            f"evaluate_{_model}"
        input:
            expand(rules.evaluate.output.scores, source=_model, fold=VALIDATED_FOLDS),
        localrule: True
