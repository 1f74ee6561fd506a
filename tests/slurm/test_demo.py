"""The demo through profiles/longleaf: what each job asked of Slurm, by Slurm's own records, and what came of it."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from .cluster import PROFILE, QOS, ROOT, Cluster

HERE = Path(__file__).parent
JOBS = yaml.safe_load((HERE / "demo.yaml").read_text())["overrides"]
# What rules ask for by themselves: cores, MB, minutes.
ASKED = {
    "phantom": (1, 1500, 30),
    "network_check": (1, 6000, 30),
    "convert": (8, 24000, 480),
    "ceiling": (8, 24000, 480),
    "chunk": (8, 24000, 480),
    "ensemble": (8, 24000, 480),
    "tune": (8, 48000, 720),
    "segment": (2, 48000, 720),
    "evaluate": (8, 24000, 480),
    "submission": (8, 16000, 480),
    "score_submission": (8, 24000, 480),
}
GPU_RULES = {"train": 2, "predict": 4}
COLUMNS = ("Comment", "State", "ExitCode", "Account", "Partition", "QOS", "ReqCPUS", "ReqMem", "TimelimitRaw", "NNodes")


@dataclass(frozen=True)
class Planned:
    """A job of which Snakemake says that it hands it to Slurm."""

    rule: str
    wildcards: tuple[str, ...]
    threads: int
    resources: dict[str, str]

    @property
    def comment(self) -> str:
        return f"rule_{self.rule}" + (f"_wildcards_{'_'.join(self.wildcards)}" if self.wildcards else "")


@dataclass(frozen=True)
class Done:
    """A job as Slurm's accounting recorded it."""

    values: dict[str, str]
    asked: dict[str, str]
    given: dict[str, str]


@pytest.fixture(scope="module")
def said(slurm_demo: Path) -> str:
    return (slurm_demo / "snakemake.txt").read_text()


@pytest.fixture(scope="module")
def planned(said: str) -> list[Planned]:
    jobs = []
    for block in re.findall(r"^rule \w+:\n(?: +\S.*\n)+", said, re.MULTILINE):
        values = dict(re.findall(r"^ +(\w+): (.*)$", block, re.MULTILINE))
        resources = dict(item.split("=", 1) for item in values["resources"].split(", "))
        wildcards = [item.split("=", 1)[1] for item in values.get("wildcards", "").split(", ") if item]
        jobs.append(Planned(block[5:].split(":")[0], tuple(wildcards), int(values.get("threads", 1)), resources))
    return jobs


@pytest.fixture(scope="module")
def recorded(cluster: Cluster, said: str) -> dict[str, Done]:
    """The jobs of the demo by their comment, of sacct."""
    run = re.search(r"^SLURM run ID: (\S+)$", said, re.MULTILINE)
    assert run, said[:2000]
    command = ["sacct", "-X", "-P", "-n", "--starttime", "now-1days", "--name", run[1]]
    lines = cluster.run(*command, f"--format={','.join((*COLUMNS, 'ReqTRES', 'AllocTRES'))}").stdout.splitlines()
    jobs = {}
    for line in lines:
        *values, asked, given = line.split("|")
        assert values[0] not in jobs, f"{values[0]} was submitted twice"
        jobs[values[0]] = Done(dict(zip(COLUMNS, values, strict=True)), tres(asked), tres(given))
    return jobs


def tres(text: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in text.split(","))


def of_rule(recorded: dict[str, Done], rule: str) -> list[Done]:
    return [job for comment, job in recorded.items() if re.match(rf"rule_{rule}(_wildcards_|$)", comment)]


def site(rule: str) -> dict:
    """Return what the profile says of a rule's jobs."""
    return {**PROFILE["default-resources"], **PROFILE["set-resources"].get(rule, {})}


def test_each_job_of_the_workflow_is_one_of_slurms_and_local_rules_left_none(planned, recorded, said):
    assert sorted(recorded) == sorted(job.comment for job in planned)
    local = set(re.findall(r"^localrule (\w+):$", said, re.MULTILINE))
    assert {"all", "crops", "quality", "folds", "datalist", "chunk_index", "training_curves", "compare"} <= local
    assert not local & {job.rule for job in planned}
    assert {*ASKED, *GPU_RULES} <= {job.rule for job in planned}


def test_each_job_ended_well_at_its_first_attempt(recorded):
    assert {(job.values["State"], job.values["ExitCode"]) for job in recorded.values()} == {("COMPLETED", "0:0")}


def test_each_job_ran_where_the_profile_says(planned, recorded):
    for job in planned:
        values, rule = recorded[job.comment].values, site(job.rule)
        place = (values["Account"], values["Partition"], values["QOS"], values["NNodes"])
        assert place == (rule["slurm_account"], rule["slurm_partition"], rule.get("qos", "normal"), "1"), job.comment


def test_each_job_asked_for_what_snakemake_says_and_got_it(planned, recorded):
    for job in planned:
        record = recorded[job.comment]
        wanted = {"cpu": str(job.threads), "mem": megabytes(int(job.resources["mem_mb"])), "node": "1"}
        if gpus := int(job.resources.get("gpu", 0)):
            wanted |= {"gres/gpu": str(gpus), f"gres/gpu:{job.resources['gpu_model']}": str(gpus)}
        for which in (record.asked, record.given):
            assert {name: value for name, value in which.items() if name != "billing"} == wanted, job.comment
        assert record.values["TimelimitRaw"] == job.resources["runtime"], job.comment


def megabytes(amount: int) -> str:
    """Return an amount of memory as sacct writes it: in G where that is whole."""
    return f"{amount // 1024}G" if amount % 1024 == 0 else f"{amount}M"


@pytest.mark.parametrize("rule", ASKED)
def test_a_rules_own_request_reaches_slurm(recorded, rule):
    cores, memory, minutes = ASKED[rule]
    jobs = of_rule(recorded, rule)
    assert jobs
    for job in jobs:
        values = (job.values["ReqCPUS"], job.asked["mem"], job.values["TimelimitRaw"])
        assert values == (str(cores), megabytes(memory), str(minutes))
        assert not [name for name in (*job.asked, *job.given) if "gpu" in name]


@pytest.mark.parametrize("rule", GPU_RULES)
@pytest.mark.parametrize("model", ["segresnet_ds", "unet_3d"])
def test_trainings_and_predictions_ask_for_the_gpus_cores_memory_and_time_of_their_model(recorded, rule, model):
    wanted = {**JOBS["*"]["resources"][rule], **JOBS[model].get("resources", {}).get(rule, {})}
    jobs = [job for comment, job in recorded.items() if comment.startswith(f"rule_{rule}_wildcards_{model}_")]
    assert len(jobs) == GPU_RULES[rule] // 2
    for job in jobs:
        assert job.given["gres/gpu:l40s"] == job.asked["gres/gpu:l40s"] == str(wanted["gpus"])
        assert (job.asked["cpu"], job.asked["mem"]) == (str(wanted["threads"]), megabytes(wanted["mem_mb"]))
        assert job.values["TimelimitRaw"] == str(wanted["runtime_min"])
        assert (job.values["Partition"], job.values["QOS"]) == ("l40-gpu", QOS)


def test_a_training_has_a_process_for_each_of_its_gpus(slurm_demo):
    for model, processes in (("segresnet_ds", 1), ("unet_3d", 2)):
        log = (slurm_demo / f"logs/train/{model}_fold0.log").read_text()
        assert f"on {processes} x cpu" in log
        assert "finished after 16 steps" in log


def test_the_trainings_tell_the_number_of_their_slurm_job(slurm_demo, said):
    """What `cellmap-pipe status` and a second copy of a training name is what squeue shows."""
    for model in ("segresnet_ds", "unet_3d"):
        block = rf"rule train:\n(?: +.*\n)*? +jobid: (\d+)\n(?: +.*\n)*? +wildcards: model={model},"
        number = re.search(block, said)
        submitted = re.search(rf"Job {number[1]} has been submitted with SLURM jobid (\d+)", said)
        with (slurm_demo / f"runs/{model}/fold0/usage.csv").open() as stream:
            assert {row["job"] for row in csv.DictReader(stream)} == {submitted[1]}


def test_the_logs_of_jobs_stay_and_slurms_own_go_with_success(slurm_demo, said):
    logs = re.findall(r"^ +log: (\S+)", said, re.MULTILINE)
    assert len(logs) >= 30
    assert not [name for name in logs if not (slurm_demo / name).is_file()]
    assert not [path for path in (slurm_demo / ".snakemake/slurm_logs").rglob("*.log") if path.is_file()]


def test_slurms_records_give_the_efficiency_of_each_job(slurm_demo, recorded):
    (path,) = slurm_demo.glob("efficiency_report_*.csv")
    with path.open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(recorded)
    # memory in use is looked at every second
    assert all(float(row["MaxRSS_MB"]) > 100 for row in rows if float(row["Elapsed_sec"]) >= 5)


def test_the_run_ends_with_scores_a_submission_and_the_report(slurm_demo):
    for source in ("segresnet_ds", "unet_3d", "ensemble"):
        scores = json.loads((slurm_demo / f"results/scores/{source}/fold0.json").read_text())
        assert 0 <= scores["aggregate"]["overall_score"] <= 1
    assert json.loads((slurm_demo / "results/submission/scores.json").read_text())["overall_score"] >= 0
    report = (slurm_demo / "report.html").read_text()
    assert "scores.html" in report and "training.svg" in report


def test_snakemake_needs_no_other_setting_than_the_profiles(said):
    """What it guessed or could not find would be said in its log."""
    assert "trying to guess" not in said
    assert "No SLURM account" not in said and "No partition" not in said
    assert not re.search(r"^(Traceback|WorkflowError|Error)", said, re.MULTILINE)


def test_the_waits_and_sizes_are_all_that_the_tests_override():
    quick = yaml.safe_load((HERE / "quick/config.v9+.yaml").read_text())
    assert not {"executor", "retries", "default-resources", "set-resources", "set-threads"} & set(quick)
    assert set(JOBS) == {"*", "segresnet_ds", "unet_3d"}
    assert (ROOT / "profiles/longleaf/config.v9+.yaml").is_file()
