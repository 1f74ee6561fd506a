"""What the workflow plans, and how it refuses a configuration; nothing is run but Snakemake itself."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MODELS = sorted(path.stem for path in (ROOT / "config" / "models").glob("*.yaml"))
COMPARED = yaml.safe_load((ROOT / "config" / "comparison.yaml").read_text())["models"]


def snakemake(*arguments: str | Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SNAKEMAKE")}
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def plan(*arguments: str | Path, folder: Path = ROOT) -> dict[str, int]:
    """Return the number of jobs by rule of a dry-run."""
    result = snakemake(*arguments, "-n", "--quiet", "rules", folder=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    table = (result.stdout + result.stderr).split("Job stats:")[-1]
    return {rule: int(count) for rule, count in re.findall(r"^([a-z_0-9]+) +(\d+)$", table, re.MULTILINE)}


def refusal(folder: Path, extra: str, *arguments: str) -> str:
    """Return the one line with which the workflow refuses the configuration `extra`."""
    (folder / "extra.yaml").write_text(extra)
    result = in_folder(folder, *arguments, "--configfile", folder / "extra.yaml")
    assert result.returncode == 1
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("ERROR")]
    assert len(lines) == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def child_seconds() -> float:
    """Return the CPU seconds of all processes that were waited for."""
    times = os.times()
    return times.children_user + times.children_system


def in_folder(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the workflow from elsewhere, with all results under `folder`."""
    return snakemake(
        *arguments, "--cores", 1, "--directory", folder, "--snakefile", ROOT / "workflow" / "Snakefile", folder=folder
    )


def test_the_default_is_planned_although_its_data_are_missing():
    started = child_seconds()
    jobs = plan()
    assert child_seconds() - started < 4  # 2 s alone on a machine
    assert jobs["train"] == jobs["network_check"] == 4
    assert jobs["convert"] == jobs["chunk"] == 32
    assert jobs["evaluate"] == 5  # four models and their ensemble
    assert "submission" not in jobs
    assert jobs["total"] < 160


def test_a_model_can_be_trained_by_name():
    jobs = plan("train_swinunetr")
    assert jobs["train"] == jobs["train_swinunetr"] == jobs["network_check"] == 1
    assert jobs["convert"] == 16  # of its grid alone
    assert "predict" not in jobs


def test_networks_are_checked_without_preparing_anything(tmp_path):
    jobs = plan("network_checks", "--directory", tmp_path, "--snakefile", ROOT / "workflow/Snakefile")
    assert jobs == {"network_check": 4, "network_checks": 1, "total": 5}


def test_every_model_has_its_targets():
    targets = snakemake("--list-rules").stdout.split()
    for model in MODELS:
        assert {f"train_{model}", f"predict_{model}", f"evaluate_{model}", f"segment_{model}"} <= set(targets)
    assert "verify" in targets


def test_the_cluster_profile_is_planned():
    pytest.importorskip("snakemake_executor_plugin_slurm")
    jobs = plan("--profile", "profiles/longleaf", "all")
    assert jobs["train"] == 4
    assert "fetch" not in jobs
    assert plan("--profile", "profiles/longleaf", "fetch", "fetch_plan", "export_nnunet")["nnunet"] == 2


def test_without_slurm_jobs_for_it_are_refused_in_one_line_and_what_runs_here_is_done(tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "sh", "which"):
        (programs / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", str(programs))
    profile = ("--profile", ROOT / "profiles/longleaf", "--slurm-init-seconds-before-status-checks", 1)
    given = ("--configfile", ROOT / "config/demo.yaml", *profile)
    refused = in_folder(tmp_path, "all", *given)
    assert refused.returncode == 1
    lines = [line for line in (refused.stdout + refused.stderr).splitlines() if "ERROR" in line or "Error" in line]
    assert len(lines) == 1 and "this machine has none; run it on a login node" in lines[0]
    planned = in_folder(tmp_path, "plan", *given)
    assert planned.returncode == 0 and (tmp_path / "results/plan.csv").is_file(), planned.stderr


def test_data_are_fetched_only_when_asked_for_and_then_need_no_data(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    extra = f"data: {{root: nowhere, crops: crops.csv}}\nfetch: {{source: {source}, options: {{}}}}\n"
    (tmp_path / "crops.csv").write_text("crop\njrc_x/crop1\n")
    (tmp_path / "extra.yaml").write_text(extra)
    for _ in range(2):  # a plan is never up to date
        result = in_folder(tmp_path, "fetch_plan", "--configfile", tmp_path / "extra.yaml")
        assert f"ERROR fetch_plan -: fetch.source {source}: has none of the datasets jrc_x" in result.stderr
    assert "fetch" not in plan(
        "all",
        "--directory",
        tmp_path,
        "--snakefile",
        ROOT / "workflow/Snakefile",
        "--configfile",
        tmp_path / "extra.yaml",
    )


def test_the_demo_is_planned_with_its_synthetic_data(tmp_path):
    jobs = plan(
        "all", "--directory", tmp_path, "--snakefile", ROOT / "workflow/Snakefile", "--configfile", "config/demo.yaml"
    )
    assert jobs["phantom"] == jobs["submission"] == 1
    assert jobs["train"] == 2


def test_the_comparison_trains_its_models():
    jobs = plan("--configfile", "config/comparison.yaml")
    assert jobs["train"] == jobs["network_check"] == len(COMPARED)
    assert jobs["evaluate"] == len(COMPARED) + 1


def test_all_classes_all_models_and_all_folds_stay_a_small_plan(tmp_path):
    (tmp_path / "volumes.csv").write_text("crop_name,dataset,class_label,voxel_size,translation,shape\n")
    (tmp_path / "extra.yaml").write_text(
        f"folds: {{run: [0, 1, 2, 3, 4]}}\ndata: {{volumes: {tmp_path / 'volumes.csv'}}}\n"
    )
    files = ["config/challenge.yaml", "config/comparison.yaml", tmp_path / "extra.yaml"]
    started = child_seconds()
    jobs = plan("--configfile", *files)
    assert child_seconds() - started < 8  # 4 s alone on a machine
    assert jobs["train"] == 5 * len(COMPARED)
    assert jobs["network_check"] == len(COMPARED)
    assert jobs["predict"] == 5 * len(COMPARED) * (1 + 4)
    assert jobs["submission"] == 1
    assert jobs["total"] < 900


def test_a_volume_is_segmented_by_each_fold_of_a_model(tmp_path):
    (tmp_path / "volumes.csv").write_text("crop_name,dataset,class_label,voxel_size,translation,shape\n")
    (tmp_path / "extra.yaml").write_text(f"folds: {{run: [0, 1]}}\ndata: {{volumes: {tmp_path / 'volumes.csv'}}}\n")
    jobs = plan("segment_unet_2d", "--configfile", tmp_path / "extra.yaml")
    assert jobs["segment"] == 2
    assert jobs["predict"] == 2 * (4 + 1)  # shards of the volumes, and validation crops to tune on
    assert "prediction_plan" not in jobs  # of the models in use, which must not refuse another one's volumes
    jobs = plan("segment_swinunetr", "--configfile", tmp_path / "extra.yaml")
    assert jobs["prediction_plan"] == 1


def test_a_training_on_all_crops_has_nothing_to_score():
    jobs = plan("--config", "folds={run: [all]}")
    assert jobs["train"] == 4
    assert "evaluate" not in jobs
    assert "compare" not in jobs


def with_volumes(folder: Path, extra: str = "") -> str:
    """Return a configuration with a table of volumes to segment."""
    (folder / "volumes.csv").write_text("crop_name,dataset,class_label,voxel_size,translation,shape\n")
    return f"data: {{volumes: {folder / 'volumes.csv'}}}\n{extra}"


def test_scores_of_a_model_and_their_comparison_are_planned_by_name():
    jobs = plan("evaluate_swinunetr")
    assert jobs["evaluate"] == jobs["predict"] == jobs["segment"] == 1
    assert "ensemble" not in jobs
    jobs = plan("compare")
    assert jobs["evaluate"] == 5
    assert jobs["ceiling"] == 32
    assert "submission" not in jobs


def test_a_submission_does_not_wait_for_validation_scores_and_its_page_has_their_forecast(tmp_path):
    (tmp_path / "extra.yaml").write_text(with_volumes(tmp_path))
    jobs = plan("submission", "--configfile", tmp_path / "extra.yaml")
    assert jobs["submission"] == 1
    assert "evaluate" not in jobs
    jobs = plan("submission_page", "--configfile", tmp_path / "extra.yaml")
    assert jobs["submission_forecast"] == jobs["evaluate"] == 1  # of the ensemble
    assert plan("all", "--configfile", tmp_path / "extra.yaml")["submission_forecast"] == 1


def test_without_a_validated_fold_no_score_is_forecast(tmp_path):
    extra = with_volumes(tmp_path, "folds: {run: [all]}\n")
    (tmp_path / "extra.yaml").write_text(extra)
    jobs = plan("all", "--configfile", tmp_path / "extra.yaml")
    assert jobs["submission_page"] == jobs["provenance"] == 1
    assert "submission_forecast" not in jobs
    message = refusal(tmp_path, extra, "submission_forecast", "-n")
    assert "no score can be forecast; add a fold to folds.run" in message


@pytest.mark.parametrize("target", ["predict_swinunetr", "evaluate_swinunetr", "compare"])
def test_targets_of_validation_crops_without_any_are_refused_instead_of_being_done_at_once(tmp_path, target):
    message = refusal(tmp_path, "folds: {run: [all]}\n", target, "-n")
    assert "folds.run trains no fold that has validation crops" in message


def test_a_missing_data_folder_is_one_line_before_any_job(tmp_path):
    message = refusal(tmp_path, "data: {root: nowhere}")
    assert "data.root: 'nowhere' does not exist" in message
    assert str(tmp_path) in message
    assert "set data.root" in message
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("foldz: {n: 3}", "extra.yaml: foldz is not a known key; did you mean 'folds'?"),
        ("fetch: {sorce: s3://mine}", "extra.yaml: fetch.sorce is not a known key; did you mean 'source'?"),
        ("nnunet: {dataset_id: 999}", "extra.yaml: nnunet.dataset_id is 999"),
        ("classes: [ecs, nucc]", "unknown class 'nucc'; did you mean 'nuc'?"),
        ("overrides: {swinunetr: {network: SwinUNTR}}", "network 'SwinUNTR' is unknown; did you mean SwinUNETR?"),
        (
            "overrides: {swinunetr: {train: {patch: [96, 96, 100]}}}",
            "train.patch [96, 96, 100] must be divisible by 32",
        ),
    ],
)
def test_a_bad_configuration_is_refused_in_one_line(tmp_path, extra, expected):
    assert expected in refusal(tmp_path, extra, "-n")


def test_a_fault_of_a_model_shows_when_it_is_targeted(tmp_path):
    extra = "overrides: {vit_3d: {train: {patch: [30, 256, 256]}}}"
    (tmp_path / "extra.yaml").write_text(extra)
    assert in_folder(tmp_path, "-n", "--configfile", tmp_path / "extra.yaml").returncode == 0
    assert "train.patch [30, 256, 256] must be divisible by 16" in refusal(tmp_path, extra, "train_vit_3d", "-n")


def test_a_search_is_planned_when_it_is_asked_for_and_refused_in_one_line(tmp_path):
    assert "search_dints" not in plan("--configfile", ROOT / "config" / "comparison.yaml")
    assert plan("search_dints")["search_dints"] == 1
    extra = "search: {model: dint}"
    assert "search.model names an unknown model 'dint'" in refusal(tmp_path, extra, "search_dints", "-n")


@pytest.mark.parametrize("target", ["submission", "segment_swinunetr"])
def test_without_volumes_their_targets_name_the_key_to_set(tmp_path, target):
    assert "data.volumes is not set" in refusal(tmp_path, "data: {volumes: null}", target, "-n")


def test_the_environment_file_pins_the_versions_of_the_constraints():
    def pins(path: Path) -> set[str]:
        return set(re.findall(r"[\w.-]+==[\w.+-]+", path.read_text()))

    # pip has no way to leave out the dependencies of one package of a file, and those of this one must be left out
    alone = {pin for pin in pins(ROOT / "constraints.txt") if pin.startswith("dynamic_network_architectures")}
    assert len(alone) == 1
    assert pins(ROOT / "workflow/envs/cellmap_pipe.yaml") == pins(ROOT / "constraints.txt") - alone


def test_an_environment_without_the_package_says_what_to_set(tmp_path):
    (tmp_path / "python").symlink_to("/bin/false")  # a Python that cannot import it
    script = ROOT / "workflow/envs/cellmap_pipe.post-deploy.sh"
    for folder, status in ((tmp_path, 1), (Path(sys.executable).parent, 0)):
        path = f"{folder}:{os.environ['PATH']}"
        done = subprocess.run(
            [script], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == status
        assert ("export PYTHONPATH=" in done.stderr) == bool(status)


def test_every_script_is_thin():
    for script in (ROOT / "workflow" / "scripts").glob("*.py"):
        text = script.read_text().replace("if TYPE_CHECKING:", "")
        assert not re.search(r"^\s*(if|for|while|def) ", text, re.MULTILINE), script
        assert "numpy" not in text


@pytest.mark.parametrize("rule", ["evaluate", "score_submission", "ceiling", "tune", "segment"])
def test_jobs_that_score_or_segment_keep_to_the_memory_that_they_ask_for(rule):
    script = (ROOT / "workflow" / "scripts" / f"{rule}.py").read_text()
    assert re.search(r"memory_gb=(0\.8 \* )?snakemake\.resources\.mem_mb / 1000", script)


def test_no_profile_reruns_because_code_changed():
    for profile in (ROOT / "profiles").glob("*/config*.yaml"):
        assert "rerun-triggers: [mtime, params, input]" in profile.read_text(), profile
