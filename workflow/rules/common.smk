import sys
from functools import cache
from pathlib import Path

from cellmap_pipe.config import RESULT_VERSIONS, load_config
from cellmap_pipe.errors import ConfigError
from cellmap_pipe.files import canonical_json


report: "../report/workflow.rst"


def refuse(error):
    """Stop with the one line of `error`; Snakemake would put a traceback round an exception."""
    sys.exit(f"ERROR {error}")


try:
    CONFIG = load_config(
        config,
        schemas=Path(workflow.basedir) / "schemas",
        models=Path(workflow.basedir).parent / "config" / "models",
        # Snakemake lists the workflow's own file last, though the others replace its values
        files=[workflow.configfiles[-1], *workflow.configfiles[:-1]],
    )
except ConfigError as error:
    refuse(error)

KNOWN_MODELS = list(CONFIG.resolved)
MODELS = list(CONFIG.models)
SOURCES = [*MODELS, "ensemble"]
SHARDS = range(CONFIG.shards)
FOLDS = CONFIG.folds.run
VALIDATED_FOLDS = CONFIG.folds.validated
# what the submission is made of, {} where there is none
SUBMITTED = (
    {"source": "ensemble", "fold": "all", "subset": "test"}
    if CONFIG.data.volumes
    else {}
)
# without validation crops there is nothing to tune on
TUNED = CONFIG.segment["tune"] and bool(VALIDATED_FOLDS)


wildcard_constraints:
    grid="[^/]+",
    model="|".join(KNOWN_MODELS),
    source="|".join([*KNOWN_MODELS, "ensemble"]),
    shard=r"\d+",
    fold=r"\d+|all",
    subset="validation|test",


def model_named(name):
    """Return a model; the faults of one that `all` does not use show when it is asked for."""
    try:
        return CONFIG.model(name)
    except ConfigError as error:
        refuse(error)


def model_of(wildcards):
    """Return the model that a job is about."""
    return model_named(wildcards.model)


def search_settings():
    """Return what the search takes from the model."""
    try:
        return CONFIG.search_settings()
    except ConfigError as error:
        refuse(error)


def searched_model():
    """Return the model whose patches, batch, classes and crops the search uses."""
    return CONFIG.model(CONFIG.search["model"])


def given_truth(wildcards):
    """Return the truth of the volumes to segment; its group file stands for it, for a folder's time says nothing."""
    if not CONFIG.data.truth:
        refuse(
            "data.truth is not set; set it to the zarr group that holds the volumes' truth as crop{N}/{label}"
        )
    return f"{CONFIG.data.truth}/.zgroup"


def volumes_table(wildcards):
    """Return the table of the volumes to segment."""
    if not CONFIG.data.volumes:
        refuse(
            "data.volumes is not set; set it to the CSV of the volumes to segment, in the format of the challenge's"
            " test_crop_manifest.csv"
        )
    return CONFIG.data.volumes


def given(path):
    """Return `path` as a list of input files, empty where the configuration names none."""
    return [path] if path else []


def require_data():
    """Stop, before any job, if the data are not where the configuration says.

    Where the crops are listed already, results can be verified and compared without the data.
    """
    root = Path(CONFIG.data.root)
    listed = Path("results/crops.csv").is_file()
    fetching = {
        "fetch",
        "fetch_plan",
        "plan",
        "results/fetch.json",
        "network_checks",
    }.intersection(sys.argv)
    if not (CONFIG.data.phantom or listed or fetching or root.is_dir()):
        refuse(
            f"data.root: '{root}' does not exist (looked in {Path.cwd()}); set data.root, in a file given by"
            " --configfile, to the folder that holds {dataset}/{dataset}.zarr"
        )


def prepare_slurm():
    """Stop, before any job, if there is no Slurm or it would refuse the account of the jobs; mend its executor."""
    sent = (job for job in workflow.dag.needrun_jobs() if not job.is_local)
    if workflow.executor_plugin.name != "slurm" or not any(sent):
        return
    from cellmap_pipe.cluster.account import check_accounts
    from cellmap_pipe.cluster.executor import mend_executor
    from cellmap_pipe.cluster.slurm import installed

    if not installed("squeue"):  # the profile has an sbatch of its own
        refuse(
            "the profile sends jobs to Slurm, and this machine has none; run it on a login node of the cluster, or"
            " with --profile profiles/local"
        )
    accounts = [rule.resources.get("slurm_account") for rule in workflow.rules]
    try:
        mend_executor()
        check_accounts({account.raw for account in accounts if account})
    except ConfigError as error:
        refuse(error)


def listing(wildcards):
    """Return a digest of the crops on disk; taken when a job is planned, not when the workflow is read."""
    from cellmap_pipe.prepare.crops import data_listing

    return data_listing(config["data"])


@cache
def fetched():
    """Return a digest of what `snakemake fetch` copied: converted crops follow it; others are noticed by `-R convert`."""
    from cellmap_pipe.fetched import fetch_digest

    return fetch_digest(CONFIG.data.root)


def volumes_of(wildcards):
    """Return what says which volumes a prediction is about: the fold's crops, or the table of volumes."""
    if wildcards.subset == "test":
        table = {"volumes_csv": volumes_table(wildcards)}
        if wildcards.model not in MODELS:
            return table
        # The plan of the models in use refuses what would take too many voxels before any GPU is asked for. Not ancient(),
        # although blocks that are done stay: a plan that is made anew would hide from Snakemake that a model was removed
        # or that its predictions changed, and the submission would still be that of before.
        return {**table, "plan": rules.prediction_plan.output.table}
    grid = model_of(wildcards).grid
    return {
        "quality_csv": f"results/quality/{grid}/crops.csv",
        "folds_csv": rules.folds.output.table,
        "convert_jsons": expand(rules.convert.output.index, grid=grid, shard=SHARDS),
    }


def predictions(model, folds, subset):
    """Return the function that names one model's predictions of all volumes of a subset."""

    def paths(wildcards):
        if not folds:
            refuse(
                "folds.run trains no fold that has validation crops, so that there are none to predict; add a fold to"
                " folds.run"
            )
        return [
            path
            for fold in folds
            for path in expand(
                rules.predict.output.index,
                model=model,
                fold=fold,
                subset=subset,
                shard=range(model_named(model).predict["shards"][subset]),
            )
        ]

    return paths


def members_of(wildcards):
    """Return the predictions that an ensemble averages: over the models, with fold `all` over the folds as well."""
    folds = FOLDS if wildcards.fold == "all" else [wildcards.fold]
    return [
        path
        for model in MODELS
        for path in predictions(model, folds, wildcards.subset)(wildcards)
    ]


def weighing_scores(wildcards):
    """Return the validation scores that weigh an ensemble's models, none where all count the same."""
    policy = CONFIG.ensemble["policy"]
    if policy == "mean":
        return []
    if not VALIDATED_FOLDS:
        refuse(
            f"ensemble.policy is {policy}, but folds.run trains no fold that has validation crops to weigh the models"
            " by; use mean, or add a fold to folds.run"
        )
    return expand(rules.evaluate.output.scores, source=MODELS, fold=VALIDATED_FOLDS)


def validation_scores(sources, lost):
    """Return the function that names the validation scores of all folds; `lost`: what there is not without any."""

    def paths(wildcards):
        if not VALIDATED_FOLDS:
            refuse(
                f"folds.run trains no fold that has validation crops, so that {lost}; add a fold to folds.run"
            )
        return expand(
            rules.evaluate.output.scores, source=sources, fold=VALIDATED_FOLDS
        )

    return paths


def probabilities(source, folds, subset):
    """Return the predictions of some folds by a model, or of the ensemble."""
    if source == "ensemble":
        return expand(rules.ensemble.output.index, subset=subset, fold=folds)
    return predictions(source, folds, subset)(None)


def probabilities_of(wildcards):
    """Return the predictions that a segmentation begins with."""
    return probabilities(wildcards.source, [wildcards.fold], wildcards.subset)


def validation_probabilities(wildcards):
    """Return the predictions of all validation crops, on which a source is tuned."""
    return probabilities(wildcards.source, VALIDATED_FOLDS, "validation")


def all_predictions(wildcards):
    """Return the predictions behind all scores and, where there is one, behind the submission."""
    wanted = {"validation": VALIDATED_FOLDS, "test": FOLDS if SUBMITTED else []}
    return [
        path
        for subset, folds in wanted.items()
        for model in MODELS
        for path in (predictions(model, folds, subset)(wildcards) if folds else [])
    ]


def resolved_settings():
    """Return what determines the results, by stage; most of it is a parameter of the stage's rule as well."""
    grids, models = CONFIG.grids_in_use, {name: CONFIG.model(name) for name in MODELS}
    return {
        "versions": {stage: CONFIG.version(stage) for stage in RESULT_VERSIONS},
        "crops": CONFIG.crop_settings(),
        "convert": {grid: CONFIG.conversion_settings(grid) for grid in grids},
        "quality": {grid: CONFIG.quality_settings(grid) for grid in grids},
        # of the rule's inputs, not of its parameters
        "folds": {
            **CONFIG.fold_settings(),
            "datasplit": CONFIG.folds.datasplit,
            "keep": CONFIG.folds.keep,
        },
        "chunk": {grid: CONFIG.chunk_settings(grid) for grid in grids},
        "train": {name: model.training_settings() for name, model in models.items()},
        "predict": {
            name: CONFIG.prediction_settings(name, "validation") for name in MODELS
        },
        "ensemble": CONFIG.ensemble_settings(),
        "tune": CONFIG.tuning_settings(),
        "segment": CONFIG.segmentation_settings(),
        "evaluate": CONFIG.evaluation_settings(),
    }


def asked_by_profile():
    """Return what one job of each rule asks for as the profile leaves it, by name, of trainings and predictions by model."""

    def of(name, **wildcards):
        asked = workflow.get_rule(name).expand_resources(
            wildcards, input=[], attempt=1, skip_evaluation={"tmpdir"}
        )
        return {
            "gpus": asked.get("gpu", 0),
            "cores": asked["_cores"],
            "memory_gb": asked["mem_mb"] / 1000,
            "walltime_h": asked["runtime"] / 60,
            "gpu_model": asked.get("gpu_model"),
        }

    grid = {"grid": CONFIG.grids_in_use[0], "shard": "0"}
    fold = {"source": MODELS[0], "fold": "0", "subset": "validation", "shard": "0"}
    asked = {name: of(name, **grid) for name in ("convert", "ceiling", "chunk")}
    for name in ("ensemble", "tune", "segment", "evaluate"):
        asked[name] = of(name, **fold)
    for name in ("submission", "score_submission", "phantom"):
        if workflow.is_rule(name):
            asked[name] = of(name)
    asked["network_check"] = of("network_check", model=MODELS[0])
    for model in MODELS:
        for name in ("train", "predict"):
            asked[f"{name}:{model}"] = of(name, model=model, **fold)
    return asked


def everything(wildcards):
    """Return what `all` makes: what needs validation crops or volumes is left out where there are none."""
    targets = [
        *rules.training_curves.output,
        *rules.splits_page.output,
        *rules.provenance.output,
    ]
    targets += expand(rules.quality_page.output, grid=CONFIG.grids_in_use)
    targets += expand(rules.ceiling_page.output, grid=CONFIG.grids_in_use)
    targets += expand(rules.datafold.output, grid=CONFIG.grids_in_use)
    if VALIDATED_FOLDS:
        targets += [*rules.compare.output, *rules.comparison_page.output]
        targets += expand(rules.predictions_page.output, fold=VALIDATED_FOLDS)
        targets += expand(rules.examples_page.output, source=SOURCES)
    if TUNED:
        targets += rules.tuning_page.output
    if CONFIG.data.volumes:
        targets += [*rules.submission.output, *rules.submission_page.output]
        targets += rules.submission_forecast.output if VALIDATED_FOLDS else []
    else:
        logger.info("data.volumes is not set: `all` makes no submission")
    return targets
