"""What the doctor reads from Slurm and Snakemake, and what it makes of a node's answer."""

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cellmap_pipe.cli import build_parser
from cellmap_pipe.cluster.doctor import FAILED, OK, WARNING, Doctor, diagnose, probe_findings
from cellmap_pipe.cluster.requests import Request, local_rules, parse_plan, read_profile, requests, sbatch_command
from cellmap_pipe.cluster.site import Association, Node, Partition, gpus_of
from cellmap_pipe.cluster.slurm import seconds_of
from cellmap_pipe.errors import ConfigError
from cellmap_pipe.training.probe import probe

ROOT = Path(__file__).parents[2]
LONGLEAF = ROOT / "profiles/longleaf"

ANSWER = {
    "host": "g1",
    "time": 1000.0,
    "python_version": "3.11.7",
    "token": "abc",
    "visible": "0",
    "driver": "550.1",
    "torch": "2.13.0",
    "cuda": "12.8",
    "gpus": [{"name": "NVIDIA L40S", "memory_gb": 47.7, "float32": True, "bfloat16": True}],
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("11-00:00:00", 15840), ("01:30:00", 90), ("30", 30), ("90:30", 90.5), ("1-12", 2160), ("UNLIMITED", None)],
)
def test_time_limits_are_read_as_slurm_writes_them(text, expected):
    assert seconds_of(text) == (None if expected is None else 60 * expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpu:l40s:8", {"l40s": 8}),
        ("gpu:L40S:8(S:0-1)", {"l40s": 8}),
        ("lustre:1,gpu:a100:4(IDX:0-3),gpu:v100:2", {"a100": 4, "v100": 2}),
        ("gpu:4", {"": 4}),
        ("(null)", {}),
    ],
)
def test_gpus_are_counted_by_type(text, expected):
    assert gpus_of(text) == expected


def test_jobs_that_ask_for_the_same_are_one_request_and_local_rules_are_none(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = requests(LONGLEAF)
    by_rule = {request.rule: request for request in found}
    assert by_rule["train"].jobs == 4
    assert by_rule["train"].text("slurm_partition") == "l40-gpu"
    assert by_rule["convert"].jobs == 32
    assert by_rule["convert"].cpus == 8  # its threads, which the machine that plans may not have
    assert "quality" not in by_rule and "all" not in by_rule


def test_the_local_rules_are_those_of_snakemake():
    found = local_rules(ROOT / "workflow")
    assert {"all", "crops", "quality", "folds", "verify"} <= found
    assert not {"train", "predict", "convert", "evaluate"} & found


def test_a_plan_is_read_with_its_extra_options():
    text = (
        "rule train:\n    input: a\n    threads: 16\n"
        "    resources: tmpdir=/tmp, mem_mb=<TBD>, gpu=2, slurm_account=007, slurm_extra=--reservation=mine --nice=5, "
        "qos=gold\n"
    )
    (found,) = parse_plan(text)
    resources = {"gpu": 2, "slurm_account": "007", "slurm_extra": "--reservation=mine --nice=5", "qos": "gold"}
    assert found == Request("train", 16, resources, 1)


def test_sbatch_is_asked_for_what_the_profile_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    train = next(request for request in requests(LONGLEAF) if request.rule == "train")
    command = sbatch_command(train, read_profile(LONGLEAF))
    for words in (
        ["-A", "your_account"],
        ["-p", "l40-gpu"],
        ["-t", "5760"],
        ["--mem", "96000"],
        ["--qos=gpu_access"],
        ["--nodes=1"],
        ["--cpus-per-task=16"],
        ["--gpus=l40s:2"],
        ["--requeue"],
    ):
        assert " ".join(words) in " ".join(command)
    assert "--ntasks-per-gpu" not in " ".join(command)


def test_options_that_the_plugin_refuses_are_named_with_their_rule():
    with pytest.raises(ConfigError, match=r"set-resources of rule train: .*quality of service"):
        sbatch_command(Request("train", 1, {"slurm_extra": "--qos=gold"}, 1), {})


def test_every_rule_with_gpus_is_sent_to_the_gpu_partition():
    text = "".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    rules = {block.split(":")[0] for block in text.split("\nrule ")[0:] if "\n        gpu=" in block}
    rules = {name.removeprefix("rule ").strip() for name in rules}
    assert rules == {"train", "predict", "search_dints"}
    sent = yaml.safe_load((LONGLEAF / "config.v9+.yaml").read_text())["set-resources"]
    assert {name for name, entry in sent.items() if entry["slurm_partition"] == "l40-gpu"} == rules


def test_a_sound_node_is_ok():
    for answer in (ANSWER, {**ANSWER, "compiled": True, "compile_seconds": 9.0}):
        assert [finding.outcome for finding in probe_findings(answer, "abc", 1, 999.0, 1001.0, "node")] == [OK, OK]


@pytest.mark.parametrize(
    ("changes", "gpus", "outcome", "said"),
    [
        ({"token": "old"}, 1, FAILED, "use a shared file system"),
        ({"time": 1100.0}, 1, WARNING, "is 99 s off"),
        ({"time": 900.0}, 1, WARNING, "is 99 s off"),
        ({"fault": "ImportError: libcudnn"}, 1, FAILED, "libcudnn"),
        ({"gpus": [], "cuda": None}, 1, FAILED, "install its CUDA build"),
        ({}, 2, FAILED, "2 asked for, 1 seen"),
        ({"gpus": [{**ANSWER["gpus"][0], "bfloat16": False}]}, 1, WARNING, "train.amp: none"),
        ({"gpus": [{**ANSWER["gpus"][0], "float32": False, "fault": "no kernel"}]}, 1, FAILED, "no kernel"),
        ({"compiled": "no C compiler"}, 1, WARNING, "torch.compile does not work there (no C compiler)"),
    ],
)
def test_what_a_node_lacks_is_told_with_the_remedy(changes, gpus, outcome, said):
    findings = list(probe_findings({**ANSWER, **changes}, "abc", gpus, 999.0, 1001.0, "node"))
    assert any(finding.outcome == outcome and said in finding.said for finding in findings)


def test_the_probe_tells_of_this_machine(tmp_path):
    token = tmp_path / "token"
    token.write_text("abc")
    found = probe(token)
    assert found["token"] == "abc"
    assert found["torch"] and found["cpus"] >= 1 and "fault" not in found
    assert "token_fault" in probe(tmp_path / "missing")


def test_a_workstation_is_checked_without_slurm(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    config = tmp_path / "mine.yaml"
    config.write_text(f"data: {{root: {tmp_path}/nothing}}\nmodels: [unet_3d]\n")
    quality = tmp_path / "results/quality/8nm/crops.csv"
    quality.parent.mkdir(parents=True)
    # the predictions of such a crop would fill any disk
    quality.write_text("crop,verdict,shape,train_mb,predict_mb\nx/crop1,keep,90000;90000;90000,50,300\n")
    lines: list[str] = []
    status = diagnose(Doctor(ROOT / "profiles/local", (config,), folder=tmp_path), lines.append)
    text = "\n".join(lines)
    assert status == 1
    assert "not checked Slurm" in text
    assert "this machine: " in text and "torch" in text
    assert re.search(r"FAILED +plan: .* GB will be written and .* GB are free; make room", text)
    assert "nothing does not exist; set data.root" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"mine\.yaml: cannot be read \(No such file"),
        ("a: [1\nb: 2", r"mine\.yaml: line 2: is not YAML"),
        ("train: {patchh: 3}", r"train\.patchh is not a known key; did you mean 'patch'\?"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_one_line_and_the_machine_is_checked_all_the_same(
    monkeypatch, tmp_path, text, said
):
    monkeypatch.chdir(ROOT)
    config = tmp_path / "mine.yaml"
    if text:
        config.write_text(text)
    lines: list[str] = []
    assert diagnose(Doctor(ROOT / "profiles/local", (config,), folder=tmp_path), lines.append) == 1
    failed = [line for line in lines if line.startswith("FAILED")]
    assert len(failed) == 1 and re.search(said, failed[0]) and "\n" not in failed[0]
    assert any(line.startswith("ok") and "this machine: " in line for line in lines)
    assert any("disk: " in line and "foreseen" not in line for line in lines)


def test_what_snakemake_says_last_is_told_when_it_cannot_plan(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"No such file or directory: '.*mine\.yaml'"):
        requests(LONGLEAF, [tmp_path / "mine.yaml"])


def test_the_profile_that_snakemake_takes_is_the_one_that_is_checked(monkeypatch):
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "profiles/mine")
    assert build_parser().parse_args(["doctor"]).profile == Path("profiles/mine")
    monkeypatch.delenv("SNAKEMAKE_PROFILE")
    assert build_parser().parse_args(["doctor"]).profile == Path("profiles/longleaf")


def test_a_check_of_torch_that_hangs_costs_no_other_check(tmp_path, monkeypatch):
    def hangs(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr("cellmap_pipe.cluster.doctor.subprocess.run", hangs)
    doctor = Doctor(ROOT / "profiles/local", folder=tmp_path)
    found = [finding for finding in doctor._machine([]) if finding.subject == "environment"]
    assert [finding.outcome for finding in found] == [WARNING, FAILED]
    assert all("did not end in 5 min" in finding.said for finding in found)


def test_a_profile_that_is_not_there_is_named(tmp_path):
    (finding,) = Doctor(tmp_path).findings()
    assert finding.outcome == FAILED and "give the folder of one by --profile" in finding.said


def test_the_scripts_of_the_profile_are_shell(tmp_path):
    for script in (LONGLEAF / "head.sh", LONGLEAF / "bin/sbatch"):
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)
        assert script.stat().st_mode & 0o111


NODES = (Node("g1", "drained", 64, 500_000, {"l40s": 8}), Node("g2", "idle", 64, 500_000, {"l40s": 4}))
SITE = {
    "l40-gpu": Partition("l40-gpu", True, None, ("gpu_access",), None, NODES),
    "small": Partition("small", True, None, None, ("Lab", "Other"), NODES),
    "general": Partition("general", True, 15840.0, None, None, (Node("c1", "mixed", 48, 200_000, {}),)),
}


def asked(**resources: int | str) -> Request:
    usual: dict[str, int | str] = {"slurm_account": "lab", "slurm_partition": "l40-gpu", "runtime": 60, "mem_mb": 8000}
    return Request("train", 1, {**usual, **resources}, 1)


@pytest.mark.parametrize(
    ("default", "resources", "said"),
    [
        ("", {}, "no QOS, but partition l40-gpu takes only gpu_access"),
        ("gpu_access", {}, None),  # Slurm takes it for a job that names none
        ("gpu_access", {"qos": "long"}, "QOS 'long', but partition l40-gpu takes only gpu_access"),
        ("", {"qos": "gpu_access"}, None),
        ("", {"slurm_partition": "l40-gpu,general", "qos": "gpu_access"}, None),
        ("", {"slurm_partition": "general,l40gpu"}, "there is no partition 'l40gpu'"),
        ("", {"slurm_partition": "small", "slurm_account": "LAB, other"}, None),
        ("", {"slurm_partition": "small", "slurm_account": "other lab"}, "account is 'other'"),
    ],
)
def test_access_is_judged_as_slurm_judges_it(default, resources, said):
    charged = [Association("lab", "", ("gpu_access", "long"), default)]
    faults = [finding.said for finding in Doctor(LONGLEAF)._access(asked(**resources), SITE, charged)]
    assert len(faults) == bool(said)
    assert said is None or said in faults[0]


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        ((20, 0), []),
        ((31, 0), ["up to 31 at once (jobs: 200), but QOS gpu_access takes 30 of yours in the queue"]),
        ((0, 400), ["up to 200 at once (jobs: 200), but account Lab takes 100 of yours"]),
        ((30, 71), ["up to 101 at once (jobs: 200), but account Lab takes 100 of yours"]),
    ],
)
def test_limits_of_jobs_in_the_queue_are_held_against_what_will_be_sent(jobs, said):
    usual = {"slurm_account": "lab", "slurm_partition": "l40-gpu"}
    trainings = Request("train", 1, {**usual, "qos": "gpu_access"}, jobs[0])
    others = Request("convert", 1, usual, jobs[1])
    charged = [Association("Lab", "", ("normal", "gpu_access"), "normal", 100)]
    found = list(Doctor(LONGLEAF)._crowd([trainings, others], SITE, charged, {"gpu_access": 30}))
    assert [finding.outcome for finding in found] == [WARNING] * len(said)
    assert all(words in finding.said for words, finding in zip(said, found, strict=True))


@pytest.mark.parametrize("given", ["unlimited", None])
def test_jobs_without_a_limit_of_snakemake_are_all_that_are_planned_and_a_partition_s_own_qos_counts(tmp_path, given):
    profile = {"executor": "slurm", **({"jobs": given} if given else {})}
    (tmp_path / "config.v9+.yaml").write_text(yaml.safe_dump(profile))
    site = {"l40-gpu": replace(SITE["l40-gpu"], own_qos="gpu_limits")}
    planned = [replace(asked(qos="gpu_access"), jobs=12)]
    for limits, said in (
        ({"gpu_access": 12, "gpu_limits": 11}, ["up to 12 at once (jobs: unlimited), but QOS gpu_limits takes 11 of"]),
        ({"gpu_limits": 12}, []),
    ):
        found = list(Doctor(tmp_path)._crowd(planned, site, [], limits))
        assert len(found) == len(said)
        assert all(words in finding.said for words, finding in zip(said, found, strict=True))


@pytest.mark.parametrize(("gpus", "outcomes"), [(4, []), (8, [WARNING]), (9, [FAILED])])
def test_what_only_a_drained_node_holds_waits_and_what_none_holds_fails(gpus, outcomes):
    found = list(Doctor(LONGLEAF)._fit(asked(gpu=gpus, gpu_model="l40s"), SITE))
    assert [finding.outcome for finding in found] == outcomes
    assert all("out of use just now" in finding.said for finding in found if finding.outcome == WARNING)


def test_an_interrupted_doctor_leaves_no_job_in_the_queue(tmp_path, monkeypatch):
    answers = {"sbatch": "echo 77", "squeue": "echo 'PENDING|Priority|N/A'", "scancel": f"echo $@ > {tmp_path}/ended"}
    for name, script in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cellmap_pipe.cluster.doctor.Doctor._await", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(Doctor(LONGLEAF, folder=tmp_path)._probed(asked()))
    assert (tmp_path / "ended").read_text() == "77\n"
    assert not list(tmp_path.glob("doctor-*"))
