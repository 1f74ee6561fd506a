if CONFIG.data.phantom:

    rule phantom:
        output:
            index="results/phantom.json",
            volumes=f"{CONFIG.data.root}/test_crop_manifest.csv",
            truth=f"{CONFIG.data.root}/truth/test.zarr/.zgroup",
        log:
            "logs/phantom.log",
        conda:
            "../envs/cellmap_pipe.yaml"
        resources:
            mem_mb=1500,
            runtime=30,
        params:
            settings=canonical_json(CONFIG.data.phantom),
            version=CONFIG.version("phantom"),
        script:
            "../scripts/phantom.py"


rule crops:
    input:
        table=given(CONFIG.data.crops),
        phantom="results/phantom.json" if CONFIG.data.phantom else [],
    output:
        table="results/crops.csv",
    log:
        "logs/crops.log",
    retries: 0
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        listing=listing,
        settings=canonical_json(CONFIG.crop_settings()),
        version=CONFIG.version("crops"),
        fetched=lambda wc: fetched(),
    script:
        "../scripts/crops.py"


rule convert:
    input:
        crops=rules.crops.output.table,
    output:
        index="results/convert/{grid}/shard{shard}.json",
    log:
        "logs/convert/{grid}_shard{shard}.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: 8
    resources:
        mem_mb=lambda wc, attempt: 24000 * attempt,
        runtime=480,
    params:
        settings=lambda wc: canonical_json(CONFIG.conversion_settings(wc.grid)),
        version=CONFIG.version("convert"),
        fetched=lambda wc: fetched(),
        nifti_dir="results/nifti/{grid}",
    script:
        "../scripts/convert.py"


rule quality:
    input:
        converted=expand(rules.convert.output.index, shard=SHARDS, allow_missing=True),
    output:
        crops="results/quality/{grid}/crops.csv",
        statistics="results/quality/{grid}/statistics.json",
    log:
        "logs/quality/{grid}.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        settings=lambda wc: canonical_json(CONFIG.quality_settings(wc.grid)),
        version=CONFIG.version("quality"),
    script:
        "../scripts/quality.py"


rule folds:
    input:
        crops=rules.crops.output.table,
        datasplit=given(CONFIG.folds.datasplit),
        keep=given(CONFIG.folds.keep),
    output:
        table="results/folds.csv",
    log:
        "logs/folds.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        settings=canonical_json(CONFIG.fold_settings()),
        version=CONFIG.version("folds"),
    script:
        "../scripts/folds.py"


rule datalist:
    input:
        crops=rules.quality.output.crops,
        folds=rules.folds.output.table,
        converted=rules.quality.input.converted,
    output:
        datalist="results/datalist/{grid}/fold{fold}.json",
    log:
        "logs/datalist/{grid}_fold{fold}.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        settings=lambda wc: canonical_json(CONFIG.datalist_settings(wc.grid)),
        version=CONFIG.version("datalist"),
        nifti_dir=rules.convert.params.nifti_dir,
    script:
        "../scripts/datalist.py"


rule datafold:
    input:
        crops=rules.quality.output.crops,
        folds=rules.folds.output.table,
        converted=rules.quality.input.converted,
    output:
        datalist="results/datalist/{grid}/datafold.json",
    log:
        "logs/datalist/{grid}_datafold.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        version=CONFIG.version("datalist"),
        nifti_dir=rules.convert.params.nifti_dir,
    script:
        "../scripts/datafold.py"


rule nnunet:
    input:
        crops=rules.quality.output.crops,
        folds=rules.folds.output.table,
        converted=rules.quality.input.converted,
    output:
        index="results/nnunet/{grid}.json",
    log:
        "logs/nnunet/{grid}.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: 8
    resources:
        mem_mb=lambda wc, attempt: 16000 * attempt,
        runtime=240,
    params:
        settings=lambda wc: canonical_json(CONFIG.nnunet_settings(wc.grid)),
        version=CONFIG.version("nnunet"),
        nifti_dir=rules.convert.params.nifti_dir,
        raw_dir="results/nnunet/raw",
    script:
        "../scripts/nnunet.py"


rule export_nnunet:
    input:
        expand(rules.nnunet.output.index, grid=CONFIG.grids_in_use),
    localrule: True


rule ceiling:
    input:
        converted=rules.convert.output.index,
        crops=rules.crops.output.table,
    output:
        index="results/ceiling/{grid}/shard{shard}.json",
    log:
        "logs/ceiling/{grid}_shard{shard}.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: 8
    resources:
        mem_mb=lambda wc, attempt: 24000 * attempt,
        runtime=480,
    params:
        settings=canonical_json(CONFIG.ceiling_settings()),
        version=CONFIG.version("ceiling"),
        fetched=lambda wc: fetched(),
        nifti_dir=rules.convert.params.nifti_dir,
    script:
        "../scripts/ceiling.py"


rule chunk:
    input:
        crops=rules.quality.output.crops,
        converted=rules.convert.output.index,
    output:
        index="results/chunks/{grid}/shard{shard}.json",
    log:
        "logs/chunk/{grid}_shard{shard}.log",
    conda:
        "../envs/cellmap_pipe.yaml"
    threads: 8
    resources:
        mem_mb=lambda wc, attempt: 24000 * attempt,
        runtime=480,
    params:
        settings=lambda wc: canonical_json(CONFIG.chunk_settings(wc.grid)),
        version=CONFIG.version("chunk"),
        fetched=lambda wc: fetched(),
        nifti_dir=rules.convert.params.nifti_dir,
        store_dir="results/chunks/{grid}/store",
    script:
        "../scripts/chunk.py"


rule chunk_index:
    input:
        chunks=expand(rules.chunk.output.index, shard=SHARDS, allow_missing=True),
        statistics=rules.quality.output.statistics,
    output:
        index="results/chunks/{grid}/index.json",
    log:
        "logs/chunk/{grid}_index.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    params:
        version=CONFIG.version("chunk"),
    script:
        "../scripts/chunk_index.py"


rule verify:
    log:
        "logs/verify.log",
    localrule: True
    conda:
        "../envs/cellmap_pipe.yaml"
    script:
        "../scripts/verify.py"
