"""`cellmap-pipe status` tells where every training stands, with and without Slurm."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from training_case import finish, start, wait_for_step, write_request

from cellmap_pipe import cli
from cellmap_pipe.cluster.queue import REASONS, WILDCARDS, jobs, named, reason_in_words
from cellmap_pipe.cluster.slurm import SlurmError, seconds_of
from cellmap_pipe.cluster.status import Run, as_json, as_text, duration, status
from cellmap_pipe.log import ALL_ATTEMPTS, ATTEMPT
from cellmap_pipe.training.owner import IN_USE

ROOT = Path(__file__).parents[2]


def only(folder: Path) -> Run:
    (run,) = status(folder).runs
    return run


def request_in(folder: Path, **settings: object) -> dict[str, object]:
    """Return the request of a training as the workflow lays it out under `folder`."""
    request = write_request(folder, **settings)
    results = folder / "results/train/unet_3d/fold2"
    request |= {
        "model": "unet_3d",
        "fold": "2",
        "run_dir": str(folder / "runs/unet_3d/fold2"),
        "log": str(folder / "logs/train/unet_3d_fold2.log"),
        "outputs": {
            kind: str(results / name)
            for kind, name in (("weights", "model.pt"), ("metrics", "metrics.json"), ("history", "history.csv"))
        },
    }
    Path(folder, "runs/unet_3d").mkdir(parents=True)
    return request


def test_training_is_followed_from_its_start_to_its_end(tmp_path: Path) -> None:
    request = request_in(tmp_path, max_steps=600, steps_per_epoch=20)
    process = start(request)
    wait_for_step(request, 40, process)
    running = only(tmp_path)
    assert (running.model, running.fold, running.state) == ("unet_3d", "2", "running")
    assert running.step is not None
    assert 40 <= running.step <= 600 == running.max_steps
    assert running.score is not None
    assert running.score_step is not None
    assert running.score_step % 20 == 0
    assert (running.pid, running.device, running.attempts) == (process.pid, "cpu", 1)
    assert running.patches_per_s is not None
    assert running.patches_per_s > 0
    assert running.eta_s is not None
    assert 0 <= running.eta_s < 3600
    text = as_text(status(tmp_path))
    assert re.search(rf"unet_3d +2 +running +\d+/600 .* process {process.pid} on ", text)
    assert "GPU" not in text  # none is in use, and none is told of

    process.terminate()
    assert finish(process) == [1]
    stopped = only(tmp_path)
    assert (stopped.state, stopped.pid, stopped.eta_s) == ("stopped", None, None)
    assert re.fullmatch(r"ERROR train model=unet_3d,fold=2: stopped by SIGTERM after step \d+; .*", stopped.why)

    request["settings"] = {**request["settings"], "max_steps": stopped.step + 4}  # type: ignore[dict-item,operator]
    assert finish(start({**request, "run_dir": request["run_dir"]})) == [0]
    finished = only(tmp_path)
    assert finished.state == "finished"
    assert finished.step == finished.max_steps
    assert finished.why == f"best weights of step {finished.score_step}"


def test_killed_training_is_no_running_one(tmp_path: Path) -> None:
    request = request_in(tmp_path, max_steps=600)
    process = start(request)
    wait_for_step(request, 4, process)
    os.kill(process.pid or 0, signal.SIGKILL)
    finish(process)
    assert (tmp_path / "runs/unet_3d/fold2/owner.json").exists()
    run = only(tmp_path)
    assert run.state == "stopped"
    assert "killed" in run.why


def test_failed_training_shows_the_last_line_of_its_log(tmp_path: Path) -> None:
    request = request_in(tmp_path, lr=1e30, clip=None, max_steps=100)
    assert finish(start(request)) == [1]
    run = only(tmp_path)
    assert run.state == "failed"
    assert run.why.startswith("ERROR train model=unet_3d,fold=2: the loss is ")
    assert run.why in as_text(status(tmp_path))


def test_the_score_outlives_the_log_of_the_attempt_that_made_it_but_not_its_run_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/unet_3d/fold0"
    run_dir.mkdir(parents=True)
    (tmp_path / "logs/train").mkdir(parents=True)
    (tmp_path / "logs/train/unet_3d_fold0.log").write_text("ERROR train model=unet_3d,fold=0: no room\n")
    scored = "epoch 3, step 7: loss 0.5, mean Dice 0.4, smoothed 0.3"
    (run_dir / ALL_ATTEMPTS).write_text(f"ERROR train model=unet_3d,fold=0: of an earlier attempt\n{scored}\n")
    run = only(tmp_path)
    assert (run.score, run.score_step, run.why) == (0.3, 7, "ERROR train model=unet_3d,fold=0: no room")
    run_dir.rename(run_dir.with_name("fold0.stale-20261122-070000"))
    run_dir.mkdir()
    assert only(tmp_path).score is None


@pytest.mark.parametrize(
    ("words", "state", "why"),
    [
        ("", "stopped", "ended without a word (killed?); it goes on from its last checkpoint"),
        ("ERROR train model=unet_3d,fold=0: the loss is nan\n", "failed", "the loss is nan"),
        ("ERROR train model=unet_3d,fold=0: stopped by SIGTERM after step 9; start it\n", "stopped", "SIGTERM after"),
    ],
)
def test_a_second_copy_that_found_the_directory_in_use_does_not_speak_for_the_training(
    tmp_path: Path, words: str, state: str, why: str
) -> None:
    run_dir = tmp_path / "runs/unet_3d/fold0"
    run_dir.mkdir(parents=True)
    (tmp_path / "logs/train").mkdir(parents=True)
    copy = f"ERROR train model=unet_3d,fold=0: {run_dir} {IN_USE} process 1 on g1801; wait for it\n"
    (tmp_path / "logs/train/unet_3d_fold0.log").write_text(copy)
    earlier = f"INFO: {ATTEMPT} 1 on g1 begins\nERROR train model=unet_3d,fold=0: an earlier one\n"
    (run_dir / ALL_ATTEMPTS).write_text(f"{earlier}INFO: {ATTEMPT} 2 on g1 begins\n{words}{copy}")
    run = only(tmp_path)
    assert run.state == state
    assert why in run.why


def test_last_score_of_another_host_counts_as_running_while_its_heart_beats(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/unet_3d/foldall"
    run_dir.mkdir(parents=True)
    owner = {"host": "g1801", "pid": 7, "job": "4711", "heartbeat": time.time(), "started": 1, "token": "x"}
    (run_dir / "owner.json").write_text(json.dumps(owner))
    run = only(tmp_path)
    assert (run.fold, run.state, run.job, run.host) == ("all", "running", "4711", "g1801")


def test_half_written_files_are_passed_over(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/unet_3d/fold0"
    run_dir.mkdir(parents=True)
    for name in ("owner.json", "request.json", "usage.csv"):
        (run_dir / name).write_text('{"host": ')
    assert only(tmp_path).state == "stopped"
    (run_dir / "request.json").write_text('{"settings": null, "log": null}')
    assert only(tmp_path).state == "stopped"


def test_runs_that_were_set_aside_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "runs/unet_3d/fold0.stale-20261122-070000").mkdir(parents=True)
    found = status(tmp_path)
    assert not found.runs
    assert "no training has begun here" in as_text(found)


def test_folder_that_snakemake_holds_is_told(tmp_path: Path) -> None:
    (tmp_path / ".snakemake/locks").mkdir(parents=True)
    (tmp_path / ".snakemake/locks/0.input.lock").touch()
    assert "a Snakemake holds this folder" in as_text(status(tmp_path))


def test_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs/unet_3d/fold0").mkdir(parents=True)
    assert cli.main(["status", "--directory", str(tmp_path)]) == 0
    assert "1 trainings: 1 stopped" in capsys.readouterr().out
    assert cli.main(["status", "--directory", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(run["model"], run["fold"], run["state"]) for run in found["runs"]] == [("unet_3d", "0", "stopped")]
    assert json.loads(as_json(status(tmp_path))) == found
    assert cli.main(["status", "--directory", str(tmp_path / "none")]) == 2
    assert "is no folder; give the one that holds results and runs" in capsys.readouterr().err


def test_queue_that_does_not_answer_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2\nexit 1\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    with pytest.raises(SlurmError, match="Unable to contact"):
        jobs()
    assert "what waits in the queue is not known" in as_text(status(tmp_path))


def queue(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> Path:
    """Put a `squeue` on the path that lists `lines`, and return the file in which it notes how it was called."""
    program, calls = folder / "bin/squeue", folder / "calls.txt"
    program.parent.mkdir()
    listed = "\n".join(f"{line}|{folder}|rule_train_wildcards_unet_3d_{fold}" for fold, line in enumerate(lines))
    (folder / "queue.txt").write_text(listed + "\n")
    program.write_text(f'#!/bin/sh\necho $SQUEUE_STATES "$*" >> {calls}\ncat {folder}/queue.txt\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return calls


def test_slurm_is_asked_once_however_many_trainings_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")  # a habit of the user, which would hide what runs
    lines = [f"{number}|RUNNING|None|l40-gpu|1:00|4-00:00:00|N/A|g1801" for number in range(5)]
    calls = queue(tmp_path, monkeypatch, *lines)
    for fold in range(5):
        run_dir = tmp_path / f"runs/unet_3d/fold{fold}"
        run_dir.mkdir(parents=True)
        owner = {"host": "g1801", "pid": 7, "job": str(fold), "heartbeat": time.time(), "started": 1, "token": "x"}
        (run_dir / "owner.json").write_text(json.dumps(owner))
    found = status(tmp_path)
    assert [(run.fold, run.state, run.host) for run in found.runs] == [(str(n), "running", "g1801") for n in range(5)]
    assert len(calls.read_text().splitlines()) == 1
    assert "PENDING" not in calls.read_text()


def test_training_that_slurm_started_again_waits_though_its_first_life_left_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(tmp_path, monkeypatch, "4711|PENDING|BeginTime|l40-gpu|0:00|4-00:00:00|N/A|")
    run_dir = tmp_path / "runs/unet_3d/fold0"
    run_dir.mkdir(parents=True)
    owner = {"host": "g1801", "pid": 7, "job": "4711", "heartbeat": time.time(), "started": 1, "token": "x"}
    (run_dir / "owner.json").write_text(json.dumps(owner))
    run = only(tmp_path)
    assert (run.state, run.job, run.host) == ("queued", "4711", None)
    assert run.why.startswith("waits for its time to begin")


def test_comment_of_a_job_names_rule_and_wildcards() -> None:
    assert named("rule_train_wildcards_unet_3d_0") == ("train", {"model": "unet_3d", "fold": "0"})
    assert named("rule_train_wildcards_swin_2d_8nm_all") == ("train", {"model": "swin_2d_8nm", "fold": "all"})
    assert named("rule_predict_wildcards_segresnet_ds_0_validation_0") == (
        "predict",
        {"model": "segresnet_ds", "fold": "0", "subset": "validation", "shard": "0"},
    )
    assert named("rule_network_check_wildcards_unet_3d") == ("network_check", {"model": "unet_3d"})
    assert named("rule_ensemble_wildcards_test_all") == ("ensemble", {"subset": "test", "fold": "all"})
    assert named("rule_phantom") == ("phantom", {})
    assert named("rule_new_wildcards_a_b") == ("new", {"values": "a_b"})
    assert named("(null)") == ("", {})


def test_wildcards_are_those_of_the_rules_in_their_order() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    for rule, names in WILDCARDS.items():
        block = re.search(rf"^ *rule {rule}:\n(.*?)^ +log:", text, re.MULTILINE | re.DOTALL)
        assert block, rule
        output = block[1].split("output:")[1]
        assert tuple(dict.fromkeys(re.findall(r"\{(\w+)\}", output))) == names, rule


def test_durations_of_slurm_are_read() -> None:
    assert [seconds_of(text) for text in ("0:05", "1:02:03", "4-00:00:00", "UNLIMITED", "INVALID")] == [
        *(5, 3723, 345600, None, None)
    ]
    assert (duration(0), duration(3600 * 25 + 60), duration(345600)) == ("0 min", "1 d 1 h 1 min", "4 d 0 h 0 min")


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("Priority", "other jobs come first"),
        ("QOSMaxGRESPerUser", "the limit of what may be used at once is reached (QOSMaxGRESPerUser)"),
        ("AssocGrpCpuLimit", "the limit of what may be used at once is reached"),
        ("QOSMaxJobsPerUserLimit", "the limit of jobs at once is reached"),
        ("ReqNodeNotAvail, UnavailableNodes:g1801l4001", "the nodes that could run it are down or reserved"),
        ("launch failed requeued held", "held after it failed to start"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_reasons_are_said_in_words(reason: str, said: str) -> None:
    assert reason_in_words(reason).startswith(said)


def test_reasons_are_regular_expressions_with_words() -> None:
    for pattern, words in REASONS:
        assert re.compile(pattern)
        assert words.format("X")
