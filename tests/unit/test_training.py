"""Trainings in processes of their own: outputs, resume after a kill, several ranks, run directories, failures."""

import csv
import importlib.util
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent))
from training_case import (
    CLASSES,
    PATIENCE,
    SETTINGS,
    finish,
    flattened,
    in_ranks,
    start,
    start_ranks,
    wait_for_step,
    write_request,
    write_request_file,
    write_store,
)

from cellmap_pipe.classes import get_class
from cellmap_pipe.errors import ContractError, TrainingError
from cellmap_pipe.files import read_json
from cellmap_pipe.log import ALL_ATTEMPTS
from cellmap_pipe.prepare.layout import BLOCKED, MAPPED
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.training import checkpoint, main, record, results
from cellmap_pipe.training.alarms import ENOUGH_PATCHES, Alarms
from cellmap_pipe.training.expand import Expander
from cellmap_pipe.training.fingerprint import fingerprint
from cellmap_pipe.training.inference import load_model
from cellmap_pipe.training.loop import Process, StoppedError, StopRequest, Training, mean_over_ranks
from cellmap_pipe.training.main import choose_device, fold_crops, run_training
from cellmap_pipe.training.optimisation import learning_rate, update_average
from cellmap_pipe.training.record import Progress
from cellmap_pipe.training.sampling import Patches
from cellmap_pipe.training.starting import begin_with, channels_of, prevalence
from cellmap_pipe.training.validation import Scores, Validation, check_validation, scores_of

Request = dict[str, Any]


def outputs(request: Request) -> dict[str, bytes]:
    return {kind: Path(path).read_bytes() for kind, path in request["outputs"].items()}


def final_state(request: Request) -> list[Any]:
    """Return all values of the last checkpoint, tensors as bytes: weights, average, optimiser, progress, history."""
    path = sorted(Path(request["run_dir"]).glob("step*.pt"))[-1]
    return list(flattened(torch.load(path, weights_only=True)))


def same(first: Request, second: Request) -> bool:
    """Return whether two trainings ended bit by bit alike."""
    return outputs(first) == outputs(second) and final_state(first) == final_state(second)


def log(request: Request) -> str:
    path = Path(request["log"])
    return path.read_text() if path.exists() else ""


def wait_for_start(request: Request, alive: Callable[[], bool]) -> None:
    """Return when the training's log says that it begins."""
    deadline = time.monotonic() + PATIENCE
    while "patches per step" not in log(request):
        assert alive(), log(request)
        assert time.monotonic() < deadline, log(request)
        time.sleep(0.01)


def train(request: Request) -> None:
    """Run a training in this process, which spares the start of another."""
    run_training(write_request_file(request))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def whole(root: Path) -> Request:
    """The request of a training that ran to its end without interruption."""
    request = write_request(root, "whole")
    assert finish(start(request)) == [0], log(request)
    return request


def test_outputs_tell_what_was_trained(whole: Request) -> None:
    metrics = read_json(whole["outputs"]["metrics"])
    assert metrics["steps"] == 12
    assert metrics["best_step"] in (4, 8, 12)
    assert set(metrics["dice"]) == set(CLASSES)
    assert metrics["best_mean_dice"] > metrics["untrained_mean_dice"]
    history = Path(whole["outputs"]["history"]).read_text().splitlines()
    assert history[0] == "step,loss,lr,mean_dice,smoothed_dice,challenge_score,dice_ecs,dice_mito_mem,dice_nuc"
    assert [int(line.split(",")[0]) for line in history[1:]] == [4, 8, 12]
    assert list((Path(whole["run_dir"]) / "tensorboard").iterdir())


def test_model_loads_without_unpickling_and_gives_logits_of_its_patch(whole: Request) -> None:
    trained = load_model(whole["outputs"]["weights"])
    assert trained.classes == tuple(CLASSES)
    assert trained.normalisation["set-1"] == (30.0, 230.0)
    assert (trained.grid, trained.voxel_nm, trained.patch) == ("8nm", [8.0, 8.0, 8.0], (16, 16, 16))
    with torch.inference_mode():
        assert trained.network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)
    validation = torch.load(whole["outputs"]["weights"], weights_only=True)["validation"]
    metrics = read_json(whole["outputs"]["metrics"])
    assert validation["mean_dice"] == metrics["best_mean_dice"]
    assert validation["challenge_score"] == metrics["best_challenge_score"]


def test_damaged_model_is_refused(whole: Request, tmp_path: Path) -> None:
    data = Path(whole["outputs"]["weights"]).read_bytes()
    (tmp_path / "torn.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pt").write_text("weights")
    for name in ("torn.pt", "text.pt", "missing.pt"):
        with pytest.raises(ContractError, match=f"{name}.*-R train"):
            load_model(tmp_path / name)


def test_killed_training_ends_as_if_it_had_not_been_killed(root: Path, whole: Request) -> None:
    request = write_request(root, "killed")
    for step, end_of_epoch in ((1, 4), (4, 4), (7, 8)):  # by when a checkpoint is written for sure
        process = start(request, hold=end_of_epoch)
        wait_for_step(request, step, process)
        process.kill()
        assert finish(process) == [-signal.SIGKILL]
        assert not Path(request["outputs"]["weights"]).exists()
    assert finish(start(request)) == [0], log(request)
    assert "resumed after step" in log(request)
    assert same(request, whole)
    with Path(request["outputs"]["history"]).open() as stream:
        assert shown(request["run_dir"]) == [int(row["step"]) for row in csv.DictReader(stream)]


def shown(run_dir: str | Path) -> list[int]:
    """Return the steps of which TensorBoard shows a loss."""
    events = EventAccumulator(str(Path(run_dir, "tensorboard")))
    events.Reload()
    return [event.step for event in events.Scalars("loss")]


def test_epoch_of_the_best_weights_stays_in_tensorboard_after_a_resume(tmp_path: Path) -> None:
    def row(step: int) -> dict[str, Any]:
        empty = dict.fromkeys(("mean_dice", "smoothed_dice", "challenge_score"))
        return {"step": step, "loss": 1.0, "lr": 0.1, "dice": {}, **empty}

    def go_on(progress: Progress, *steps: int) -> None:
        with record.Journal(tmp_path, {"mlflow": None}, progress) as journal:
            for step in steps:
                journal.write(row(step), progress, 1)

    go_on(Progress(), 10, 20)
    go_on(Progress(step=20, history=[row(10), row(20)]), 30)  # the checkpoint was written after the validation
    assert shown(tmp_path) == [10, 20, 30]
    go_on(Progress(step=30, history=[row(10), row(20)]), 30, 40)  # and this one before it
    assert shown(tmp_path) == [10, 20, 30, 40]


def test_threads_add_gradients_in_the_same_order_in_every_run(root: Path) -> None:
    # the gradient of SwinUNETR's position biases is a sum over indices, which torch by itself adds as threads arrive
    network = {"network": "SwinUNETR", "arguments": {"feature_size": 12, "depths": [1, 1, 1, 1]}}
    settings = {**network, "patch": [32, 64, 64], "batch": 1, "deep_supervision": [1], "max_steps": 3}
    first, second = ({**write_request(root, name, **settings), "threads": 4} for name in ("swin-1", "swin-2"))
    assert finish(start(first), start(second)) == [0, 0], log(first) + log(second)
    assert same(first, second)


def test_resume_with_other_threads_is_told(root: Path) -> None:
    request = write_request(root, "threads", max_steps=8)
    process = start(request, hold=4)
    wait_for_step(request, 1, process)
    process.terminate()
    assert finish(process) == [1]
    assert finish(start({**request, "threads": 2})) == [0], log(request)
    assert "ran on 1 threads and goes on with 2" in log(request)


def test_terminated_training_saves_and_goes_on(root: Path, whole: Request) -> None:
    request = write_request(root, "terminated", checkpoint_minutes=60)
    process = start(request, hold=1)
    wait_for_start(request, process.is_alive)
    os.kill(process.pid or 0, signal.SIGUSR1)
    assert finish(process) == [1]
    assert log(request).splitlines()[-1].startswith("ERROR train model=tiny,fold=0: stopped by SIGUSR1 after step ")
    assert len(list(Path(request["run_dir"]).glob("step*.pt"))) == 1
    Path(request["log"]).unlink()  # as Snakemake does before each attempt
    assert finish(start(request)) == [0], log(request)
    assert same(request, whole)  # a setting of when something is kept is nothing of the model's
    told = Path(request["run_dir"], ALL_ATTEMPTS).read_text()
    expected = [" begins", "patches per step", "stopped by SIGUSR1", " begins", "resumed after", "finished after"]
    assert re.search(".*".join(expected), told, re.DOTALL), told
    assert told.count(" begins") == 2


def test_training_stops_before_the_walltime(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    request = {**write_request(root, "walltime", checkpoint_minutes=60), "runtime_min": 1e-4}
    with pytest.raises(StoppedError, match="stopped by the end of the walltime"):
        train(request)
    assert list(Path(request["run_dir"]).glob("step*.pt"))


@pytest.mark.parametrize(("stop_minutes", "expected"), [(5, 95), (60, 90), (0, 100)])
def test_time_kept_back_is_as_configured_but_a_tenth_of_the_walltime_at_most(
    stop_minutes: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    request = {"settings": {"stop_minutes": stop_minutes}, "runtime_min": 100}
    assert main._deadline(request, 7.0) == 7.0 + 60 * expected
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 6000))
    assert main._deadline(request, 7.0) == pytest.approx(time.monotonic() + 60 * expected, abs=2)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) - 60))  # the job was given more time
    assert main._deadline(request, 7.0) == 7.0 + 60 * expected
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert main._deadline({**request, "runtime_min": None}, 7.0) is None


def test_checkpoints_of_chosen_steps_stay(root: Path) -> None:
    request = write_request(root, "kept", keep_every=3, max_steps=10, checkpoint_minutes=60)
    train(request)
    kept = sorted(Path(request["run_dir"]).glob("step*.pt"))
    assert [int(path.name[4:13]) for path in kept] == [3, 6, 9, 10]
    for path in kept:
        assert torch.load(path, weights_only=True)["progress"]["step"] == int(path.name[4:13])


def test_two_ranks_one_killed_resume_exactly(root: Path, whole: Request) -> None:
    request = write_request(root, "ranks", batch=1)
    assert finish(*start_ranks(request, 2)) == [0, 0], log(request)
    killed = write_request(root, "ranks-killed", batch=1)
    ranks = start_ranks(killed, 2, hold=8)
    wait_for_step(killed, 5, ranks[0])
    ranks[1].kill()
    assert finish(*ranks) == [1, -signal.SIGKILL]
    assert log(killed).splitlines()[-1].startswith("ERROR train model=tiny,fold=0: ")
    assert finish(*start_ranks(killed, 2)) == [0, 0], log(killed)
    assert same(killed, request)
    # two ranks of one patch see what one process of two patches sees; batches are added up in another order
    alone, shared = (torch.load(r["outputs"]["weights"], weights_only=True) for r in (whole, request))
    for name, weights in alone["state_dict"].items():
        torch.testing.assert_close(shared["state_dict"][name], weights, rtol=0.05, atol=0.02)


def test_torchrun_saves_on_sigterm_and_any_ranks_go_on(root: Path) -> None:
    request = write_request(root, "torchrun", max_steps=200, steps_per_epoch=1000, checkpoint_minutes=60, batch=1)
    arguments = {key: value for key, value in request.items() if key not in ("log", "threads")}
    code = (
        "import json, sys; from cellmap_pipe.training.launch import launch;"
        "launch(json.loads(sys.argv[1]), sys.argv[2], processes=2, threads=2)"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(arguments), request["log"]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for_start(request, lambda: job.poll() is None)
        job.terminate()
        terminal = job.communicate(timeout=PATIENCE)[0].decode()
    finally:
        job.kill()  # its ranks die with it
    assert job.returncode != 0
    assert "on 2 x cpu (1 threads)" in log(request)
    assert log(request).splitlines()[-1].startswith("ERROR train model=tiny,fold=0: stopped by SIGTERM after step ")
    assert "ERROR train model=tiny,fold=0: stopped by SIGTERM" in terminal
    assert finish(start(request)) == [0], log(request)
    assert "ran on 2 processes and goes on with 1" in log(request)
    assert read_json(request["outputs"]["metrics"])["steps"] == 200


def save_means(environment: dict[str, str], path: str) -> None:
    os.environ.update(environment)
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = torch.rand(world, 50, generator=torch.Generator().manual_seed(0))
    together = mean_over_ranks(losses[rank], world)
    alone = torch.cat([mean_over_ranks(loss, world) for loss in losses[rank].split(1)])
    if not rank:
        torch.save([losses, together, alone], path)
    torch.distributed.barrier()


def test_mean_loss_over_ranks_does_not_depend_on_what_is_collected_with_it(tmp_path: Path) -> None:
    # as many ranks as a sum of floats needs to depend on their order
    path = tmp_path / "means.pt"
    assert finish(*in_ranks(4, save_means, str(path))) == [0] * 4
    losses, together, alone = torch.load(path, weights_only=True)
    assert torch.equal(together, alone)
    torch.testing.assert_close(alone, losses.mean(0))


def test_finished_training_is_published_again_without_training(root: Path, whole: Request) -> None:
    before = outputs(whole)
    for path in whole["outputs"].values():
        Path(path).unlink()
    assert finish(start(whole)) == [0], log(whole)
    assert outputs(whole) == before
    assert log(whole).count("patches per step") == 1


def test_changed_settings_set_the_old_run_aside(root: Path) -> None:
    train(write_request(root, "changed", max_steps=1))
    again = write_request(root, "changed", max_steps=2)
    train(again)
    assert read_json(again["outputs"]["metrics"])["steps"] == 2
    for name in ("best*.pt", ALL_ATTEMPTS):
        assert len(list(Path(again["run_dir"]).parent.glob(f"changed.stale-*/{name}"))) == 1
        assert len(list(Path(again["run_dir"]).glob(name))) == 1
    train({**again, "retrain": True})
    assert len(list(Path(again["run_dir"]).parent.glob("changed.stale-*/best*.pt"))) == 2


def damaged_case(root: Path, *, bit_of: str, length_of: str | None = None, **settings: Any) -> Request:
    """Return a request whose store has a flipped bit in one file and, if asked, another file cut short."""
    root.mkdir()
    request = write_request(root, **settings)
    flipped = root / "store" / bit_of
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 4
    flipped.write_bytes(data)
    if length_of:
        os.truncate(root / "store" / length_of, 1000)
    return request


def test_damaged_files_stop_the_training_before_its_first_step(root: Path) -> None:
    request = damaged_case(root / "flipped", bit_of="set-0_crop0_label.npy", length_of="set-0_crop2_image.npy")
    assert finish(start(request)) == [1]
    last = log(request).splitlines()[-1]
    assert last.startswith("ERROR train model=tiny,fold=0: 2 of the fold's crops are damaged")
    assert "set-0_crop0_label.npy: damaged" in last
    assert "set-0_crop2_image.npy: 1000 bytes on disk" in last
    assert "-R chunk" in last
    assert "train.on_damage: skip" in last
    assert "patches per step" not in log(request)
    assert not list(Path(request["run_dir"]).glob("step*.pt"))


def test_damaged_crops_can_be_left_out(root: Path) -> None:
    # the first rank reads the other crops
    request = damaged_case(root / "skip", bit_of="set-1_crop1_image.npy", on_damage="skip", max_steps=2)
    assert finish(*start_ranks(request, 2)) == [0, 0], log(request)
    assert "crop set-1/crop1 is left out" in log(request)
    assert "1 training crops" in log(request)
    assert read_json(request["outputs"]["metrics"])["skipped_crops"] == ["set-1/crop1"]


def test_ranks_that_know_other_crops_as_damaged_decide_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(write_store(tmp_path, crops=5))
    crops, known = list(store.crops), [{}, {"set-0/crop0": "gone"}]
    (tmp_path / "store" / "set-1_crop3_label.npy").unlink()
    found: list[dict[str, str]] = []
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda _, own: found.append(own))
    for rank, damaged in enumerate(known):
        main._read_through(store, crops, damaged, Process(rank, 2, torch.device("cpu"), StopRequest()))
    shares = [set(part) for part in found]
    assert shares == [set(), {"set-0/crop0", "set-1/crop3"}]
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda parts, _: parts.__setitem__(slice(None), found))
    for rank, damaged in enumerate(known):
        process = Process(rank, 2, torch.device("cpu"), StopRequest())
        assert set(main._read_through(store, crops, damaged, process)) == shares[0] | shares[1]


def test_store_that_exceeds_the_memory_is_told_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(write_store(tmp_path))
    size, warnings = store.mapped_bytes(store.crops), []
    for limit in (size, size - 1):
        monkeypatch.setattr(main, "memory_limit", lambda limit=limit: limit)
        main._read_through(store, list(store.crops), {}, alone())
        warnings.append([record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING])
    assert not warnings[0]
    (message,) = warnings[1]
    assert "(resources.train.mem_mb), or set chunks.memory_gb to 0.000" in message  # 0 would be refused


def test_a_side_of_the_fold_of_which_nothing_is_left_is_an_error() -> None:
    def left(damaged: list[str], validation: list[str], on_damage: str = "skip") -> Any:
        faults = {crop: f"{crop} is torn" for crop in damaged}
        return main._undamaged(["a", "b"], validation, faults, on_damage, alone())

    assert left(["b", "other"], ["c"]) == (["a"], ["c"], ["b"])
    assert left(["a"], []) == (["b"], [], ["a"])  # fold `all` has no validation
    with pytest.raises(TrainingError, match=r"every training crop of the fold is damaged .* a is torn"):
        left(["a", "b"], ["c"])
    with pytest.raises(TrainingError, match=r"every validation crop of the fold is damaged .* c is torn"):
        left(["a", "c"], ["c"])


def test_line_of_an_error_names_a_few_damaged_crops_and_the_log_all(caplog: pytest.LogCaptureFixture) -> None:
    faults = {f"crop{number}": f"file{number}: damaged" for number in range(289)}
    with pytest.raises(ContractError, match=r"^289 .*file2: damaged; 286 more are in the log\. train\.on_damage: skip"):
        main._undamaged(list(faults), [], faults, "stop", alone())
    assert len(caplog.records) == 289


def trainer(request: Request, process: Process, validation: Sequence[str] = ()) -> Training:
    """Return the training of a request, in this process."""
    store = Store(request["index"])
    folder = Path(request["run_dir"])
    folder.mkdir(parents=True)
    crops = ["set-0/crop0", "set-1/crop1"], list(validation)
    return Training(request["settings"], store, *crops, folder, "f", process, None)


def alone() -> Process:
    return Process(0, 1, torch.device("cpu"), StopRequest())


def test_accumulated_passes_make_the_step_of_the_joint_batch(root: Path) -> None:
    gradients = []
    for batch, accumulate in ((4, 1), (1, 4)):
        request = write_request(
            root, f"passes{accumulate}", batch=batch, accumulate=accumulate, max_steps=1, clip=None, ema=False
        )
        training = trainer(request, alone())
        # double precision: in single, rounding grows to 1e-3 on the way back through the normalisations
        training.network.double().register_forward_pre_hook(lambda _, images: (images[0].double(),))
        parameters = [parameter for parameter in training.network.parameters() if parameter.requires_grad]
        training.optimizer.register_step_pre_hook(
            lambda *_, own=parameters: gradients.append(torch.cat([p.grad.flatten() for p in own]))
        )
        training.run()
    joint, accumulated = gradients
    assert (accumulated - joint).norm() <= 1e-6 * joint.norm()


def test_groups_are_taught_and_are_no_outputs(root: Path, tmp_path: Path) -> None:
    request = write_request(root, "groups", classes=["golgi_mem", "golgi_lum"], groups=["golgi"], max_steps=2)
    index = read_json(request["index"])
    index["classes"] = ["golgi_mem", "golgi_lum", "golgi"]
    for state in index["crops"][0]["counts"].values():
        state[:2] = [0, 0]  # annotates the group alone
    (root / "groups.json").write_text(json.dumps(index))
    request["index"] = str(root / "groups.json")
    training = trainer({**request, "run_dir": str(tmp_path / "run")}, alone())
    assert training.sampler.classes == [(0, [1]), (1, [1]), (2, [0])]
    assert training.loss.groups == ((0, 1),)
    train(request)
    assert torch.load(request["outputs"]["weights"], weights_only=True)["classes"] == ["golgi_mem", "golgi_lum"]
    assert set(read_json(request["outputs"]["metrics"])["dice"]) == {"golgi_mem", "golgi_lum"}


def test_channels_of_a_group_leave_out_parts_of_parts() -> None:
    assert channels_of(["mito"], ["mito_ribo", "ecs", "mito_mem", "mito_lum"]) == [[0, 2, 3]]
    assert channels_of(["er", "ne"], ["er_mem", "ne", "ne_mem", "er_lum", "ne_lum"]) == [[0, 1, 3], [2, 4]]


def test_prevalence_counts_known_voxels_of_all_crops(root: Path) -> None:
    store = Store(write_request(root)["index"])
    both, one = (Patches(store, crops, CLASSES, (16, 16, 16)) for crops in (list(store.crops), ["set-1/crop1"]))
    counts = [store.crops[crop]["counts"]["ecs"] for crop in store.crops]
    positive, absent = (sum(count[state] for count in counts) for state in ("present", "absent"))
    assert prevalence(both)[0] == positive / (positive + absent)
    assert math.isnan(prevalence(one)[2])


def test_same_parameters_are_trained_by_any_number_of_processes(root: Path) -> None:
    request = write_request(
        root, "frozen", network="UNETR", arguments={"feature_size": 4, "hidden_size": 12, "mlp_dim": 12, "num_heads": 2}
    )
    network = trainer(request, alone()).network
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert all("norm_cross_attn" in name for name in frozen)


def test_weights_to_begin_with_are_reported_both_ways(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    network = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 3), "head": torch.nn.Linear(3, 4)})
    given = {
        "body.weight": torch.ones(3, 2),
        "body.bias": torch.ones(3),
        "head.weight": torch.ones(5, 3),
        "old.bias": torch.ones(1),
    }
    checkpoint.write_model(tmp_path / "begin.pt", {"state_dict": given})
    begin_with(network, str(tmp_path / "begin.pt"))
    assert network["body"].weight.detach().tolist() == [[1.0, 1.0]] * 3
    assert "2 of 4 tensors begin as in" in caplog.text
    assert "hence fresh: head.bias, head.weight" in caplog.text
    assert "of no use here: head.weight, old.bias" in caplog.text
    checkpoint.write_model(tmp_path / "other.pt", {"state_dict": {"old.bias": torch.ones(1)}})
    with pytest.raises(TrainingError, match="none of its weights fits the network"):
        begin_with(network, str(tmp_path / "other.pt"))


def test_alarms_are_raised_once_and_published(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    request = write_request(root, "alarms", max_steps=2)
    index = read_json(request["index"])
    for crop in index["crops"]:
        if crop["crop"] != "set-0/crop2":  # which is validated on
            crop["counts"]["present"][2], crop["counts"]["absent"][2] = 0, 5
    Path(root / "alarms.json").write_text(json.dumps(index))
    request["index"] = str(root / "alarms.json")
    train(request)
    train({**request, "retrain": True})
    (alarm,) = read_json(request["outputs"]["metrics"])["alarms"]
    assert alarm.startswith("class nuc is positive in no training crop of the fold (annotated in 2 of them)")
    assert caplog.text.count("class nuc is positive in no") == 2  # once per training


def test_alarms_of_what_a_training_sees(caplog: pytest.LogCaptureFixture) -> None:
    raised: dict[str, str] = {}
    alarms = Alarms(raised)
    alarms.never_seen(CLASSES, [5, 0, 9], ENOUGH_PATCHES - 1)
    alarms.waiting(0.29)
    assert not (raised or caplog.records)
    for _ in range(2):
        alarms.never_seen(CLASSES, [5, 0, 9], ENOUGH_PATCHES)
        alarms.waiting(0.31)
    Alarms(raised).never_seen(CLASSES, [5, 0, 9], 2 * ENOUGH_PATCHES)  # another process of the same training
    assert list(raised) == ["class mito_mem"]  # waiting is of the clock, and no part of a result
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    Alarms({}, quiet=True).waiting(0.9)
    assert len(caplog.records) == 2


def test_positive_voxels_are_counted_over_ranks_passes_and_processes(root: Path) -> None:
    counted = {}
    for name, batch, accumulate in (("joint", 4, 1), ("passes", 2, 2)):
        request = write_request(root, f"count-{name}", batch=batch, accumulate=accumulate, max_steps=11)
        training = trainer(request, alone())
        training.run()
        counted[name] = training.progress.positives
        assert training.progress.looked_at == 2 * 4  # steps 0 and 10
    assert counted["joint"] == counted["passes"]
    assert all(counted["joint"])


def test_missing_mlflow_is_an_error_before_the_first_step(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TrainingError, match=r"pip install 'cellmap_pipe\[mlflow\]'"):
        trainer(write_request(root, "no-mlflow", mlflow=f"file:{root}/mlruns"), alone())


def test_mlflow_has_one_run_of_a_training_that_was_stopped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{root}/mlflow.db" if importlib.util.find_spec("sqlalchemy") else (root / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    request = write_request(root, "mlflow", mlflow=uri, max_steps=8)
    with pytest.raises(StoppedError):
        train({**request, "runtime_min": 1e-4})
    client = mlflow.MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'cellmap_pipe'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"
    train(request)
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "runs/mlflow")
    assert run.data.params["network"] == "SegResNetDS"
    history = client.get_metric_history(run.info.run_id, "mean_dice")
    assert [entry.step for entry in history] == [4, 8]
    assert "dice/mito_mem" in run.data.metrics


def test_failing_mlflow_store_costs_no_training(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("mlflow")
    (tmp_path / "file").write_text("no folder")
    request = write_request(root, "mlflow-fails", mlflow=f"sqlite:///{tmp_path}/file/mlflow.db", max_steps=1)
    train(request)
    assert "MLflow: the run could not be begun in sqlite:///" in caplog.text
    assert read_json(request["outputs"]["metrics"])["steps"] == 1


def test_disk_that_takes_nothing_of_tensorboard_costs_no_training(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", fail)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    request = write_request(root, "tensorboard", max_steps=2, steps_per_epoch=1)
    train(request)
    assert caplog.text.count("TensorBoard's files are written no further (No space left on device)") == 1
    assert read_json(request["outputs"]["metrics"])["steps"] == 2


@pytest.mark.parametrize("failing", ["weights", "checkpoint"])
def test_disk_full_at_the_best_weights_loses_none_that_a_training_may_go_on_from(
    root: Path, failing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    request = write_request(root, f"full-{failing}", checkpoint_minutes=60, max_steps=4, steps_per_epoch=1)
    name = {"weights": "write_model", "checkpoint": "save"}[failing]
    write, full, folder = getattr(checkpoint, name), [False], Path(request["run_dir"])

    def write_if_free(*arguments: Any, **options: Any) -> Any:
        if full[0]:
            raise OSError("No space left on device")
        return write(*arguments, **options)

    def consistent() -> int:
        """Return the best step of the last checkpoint, whose weights are there."""
        state = checkpoint.latest(folder)
        assert state is not None
        best: int = state["progress"]["best_step"]
        assert torch.load(results.best_path(folder, best), weights_only=True)["step"] == best
        return best

    monkeypatch.setattr(checkpoint, name, write_if_free)
    scores = iter([0.0, 0.1, 0.2, 0.3, 0.25])
    seen = []

    def evaluate(*_: Any, **__: Any) -> Any:
        step = training.progress.step
        if step:
            seen.append(consistent() if step > 1 else 0)
            full[0] = step in (2, 3)
        return Scores(dict.fromkeys(CLASSES, next(scores)))

    training = trainer(request, alone(), ["set-0/crop2"])
    monkeypatch.setattr(training.validation, "evaluate", evaluate)
    training.run()
    assert seen == [0, 1, 1, 1]  # while the disk was full the last good checkpoint had its weights
    assert consistent() == 3
    assert training._best is None
    assert caplog.text.count("(No space left on device); the last good one is kept") == 2
    found = {path.name for path in folder.glob("best*.pt")}
    assert found == {"best000000001.pt", "best000000003.pt"}


def test_what_is_measured_of_steps_is_dropped_with_each_line_on_every_rank(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "PROGRESS_SECONDS", 0.0)
    lines = []
    monkeypatch.setattr(record.Meter, "line", lambda *_: lines.append(1))
    training = trainer(write_request(root, "meter", max_steps=2, steps_per_epoch=1), alone())
    monkeypatch.setattr(training, "process", Process(1, 1, torch.device("cpu"), StopRequest()))
    training.run()
    assert len(lines) == 2


def test_validated_are_the_weights_that_are_kept_batch_norm_statistics_too(root: Path) -> None:
    arguments = {**SETTINGS["arguments"], "norm": "BATCH"}
    request = write_request(
        root, "statistics", arguments=arguments, batch=1, max_steps=4, augment=dict.fromkeys(SETTINGS["augment"], 0)
    )
    assert finish(*start_ranks(request, 2)) == [0, 0], log(request)
    trained = load_model(request["outputs"]["weights"])
    store = Store(request["index"])
    shown = Patches(store, ["set-0/crop2"], CLASSES, (16, 16, 16))
    expander = Expander(shown.tables, [store.intensity_range("set-0", "percentile")], torch.device("cpu"))
    device = torch.device("cpu")
    scores = Validation(shown, expander, batch=1, device=device, rank=0, world=1).evaluate(trained.network)
    assert scores is not None
    assert scores.dice == read_json(request["outputs"]["metrics"])["dice"]


def test_lost_connection_is_not_told_of_after_what_lost_it(tmp_path: Path) -> None:
    path, terminal = tmp_path / "log", os.open(os.devnull, os.O_WRONLY)
    request = {"log": str(path), "run_dir": str(tmp_path), "rule": "train", "model": "m", "fold": "0"}
    path.write_text("begun\nERROR train model=m,fold=0: of an earlier process\n")
    since = path.stat().st_size
    for text in ("out of memory", "Connection closed by peer"):
        main._report(RuntimeError(text), request, 0, terminal, since)
    os.close(terminal)
    for told in (path, tmp_path / ALL_ATTEMPTS):
        assert told.read_text().splitlines()[-1] == "ERROR train model=m,fold=0: out of memory"


def test_walltime_of_any_rank_stops_all(root: Path) -> None:
    training = trainer(write_request(root, "any-rank"), alone())
    training.process = Process(1, 1, torch.device("cpu"), StopRequest(), deadline=0.0)
    assert training._agree() == "the end of the walltime"


def test_gradient_that_is_not_finite_ends_the_training_without_a_checkpoint(root: Path) -> None:
    request = write_request(root, "gradient", max_steps=2, checkpoint_minutes=60)
    training = trainer(request, alone())
    next(training.network.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingError, match=r"at step 1 \(nan for a gradient that is not finite, too\)"):
        training.run()
    assert not list(Path(request["run_dir"]).glob("step*.pt"))


def test_stop_request_is_seen_before_a_validation(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = trainer(write_request(root, "before"), Process(0, 1, torch.device("cpu"), StopRequest(), 0.0))
    monkeypatch.setattr(training, "_record_epoch", lambda _: pytest.fail("validated"))
    with pytest.raises(StoppedError, match="the end of the walltime after step 0"):
        training.run()


def test_stop_request_cuts_a_validation_short_and_the_next_process_makes_it_anew(root: Path, whole: Request) -> None:
    request = write_request(root, "within", checkpoint_minutes=60)
    store, folder, stop = Store(request["index"]), Path(request["run_dir"]), StopRequest()
    folder.mkdir()
    process = Process(0, 1, torch.device("cpu"), stop)
    crops = ["set-0/crop0", "set-1/crop1"], ["set-0/crop2"]
    training = Training(request["settings"], store, *crops, folder, "f", process, None)

    def ask(*_: Any) -> None:
        if training.progress.step == 4:
            stop.signal = "SIGUSR1"

    training.evaluated.register_forward_hook(ask)
    with pytest.raises(StoppedError, match="stopped by SIGUSR1 after step 4;"):
        training.run()
    state = checkpoint.latest(folder)
    assert state is not None
    assert state["progress"]["recorded"] == 0
    Training(request["settings"], store, *crops, folder, "f", alone(), state).run()
    resumed = checkpoint.latest(folder)
    assert resumed is not None
    reference = checkpoint.latest(Path(whole["run_dir"]))
    assert reference is not None
    assert list(flattened(resumed["progress"])) == list(flattened(reference["progress"]))


def test_stop_request_is_seen_before_the_first_step_after_a_resume(root: Path) -> None:
    training = trainer(write_request(root, "early"), Process(0, 1, torch.device("cpu"), StopRequest("SIGTERM")))
    training.progress.step = 1  # no epoch ends here
    with pytest.raises(StoppedError, match="stopped by SIGTERM after step 1;"):
        training.run()


def test_signal_after_the_ranks_agreed_stops_none_of_them(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(0, 2, torch.device("cpu"), StopRequest())
    training = trainer(write_request(root, "agree"), alone())
    training.process = process
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda *_, **__: setattr(process.stop_requested, "signal", "X")
    )
    assert training._agree() is None
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    assert training._agree() == "X"


def test_best_weights_of_an_abandoned_future_are_not_published(whole: Request, tmp_path: Path) -> None:
    run_dir = Path(whole["run_dir"])
    state = checkpoint.latest(run_dir)
    assert state is not None
    paths = {kind: str(tmp_path / kind) for kind in whole["outputs"]}
    results.publish(run_dir, state, paths, "tiny", "0")
    for changed in (
        {**state, "fingerprint": "other"},
        {**state, "progress": {**state["progress"], "best_step": state["progress"]["best_step"] - 1}},
    ):
        with pytest.raises(TrainingError, match=r"best\d+\.pt: (step and fingerprint are|missing).* train again"):
            results.publish(run_dir, changed, paths, "tiny", "0")


def test_training_without_a_step_is_not_published(whole: Request, tmp_path: Path) -> None:
    state = checkpoint.latest(Path(whole["run_dir"]))
    assert state is not None
    state["progress"]["step"] = 0
    with pytest.raises(TrainingError, match=r"finished without a step; rename .* and train again"):
        results.publish(
            Path(whole["run_dir"]), state, {kind: str(tmp_path / kind) for kind in whole["outputs"]}, "", ""
        )


def test_smoothed_score_chooses_the_weights_and_ends_the_patience() -> None:
    progress, chosen = Progress(), []
    for step, score in enumerate([0.4, 0.8, 0.5, 0.7, 0.62]):
        progress.step = step
        if progress.judge(score, 0.5):
            chosen.append((step, progress.best))
    # 0.4, 0.6, 0.55, 0.625, 0.6225
    assert chosen == [(0, 0.4), (1, pytest.approx(0.6)), (3, pytest.approx(0.625))]
    assert (progress.best_step, progress.since_best) == (3, 1)
    assert progress.smoothed == pytest.approx(0.6225)
    progress = Progress()
    assert [progress.judge(score, 0.0) for score in (0.4, 0.8, 0.5, 0.81)] == [True, True, False, True]


def test_patience_counts_validations_whose_smoothed_score_is_no_better(root: Path) -> None:
    request = write_request(root, "patience", patience=2, smoothing=0.5, lr=1e-9, ema=False, max_steps=40)
    train(request)
    with open(request["outputs"]["history"], newline="") as stream:
        rows = list(csv.DictReader(stream))
    metrics = read_json(request["outputs"]["metrics"])
    assert len(rows) < 10
    assert metrics["best_step"] == metrics["steps"] - 2 * request["settings"]["steps_per_epoch"]
    smoothed = None
    for row in rows:
        mean = float(row["mean_dice"])
        smoothed = mean if smoothed is None else (smoothed + mean) / 2
        assert float(row["smoothed_dice"]) == pytest.approx(smoothed, abs=2e-6)
    best = next(row for row in rows if int(row["step"]) == metrics["best_step"])
    assert metrics["best_smoothed_dice"] == pytest.approx(float(best["smoothed_dice"]), abs=1e-6)
    assert metrics["best_mean_dice"] == pytest.approx(float(best["mean_dice"]), abs=1e-6)


def test_challenge_score_is_the_mean_iou_of_annotated_classes_scored_by_voxel() -> None:
    # mito is scored by instance, pm is annotated nowhere, and mito_mem neither there nor found: a perfect answer
    classes = ["ecs", "mito_mem", "nuc", "mito", "pm"]
    scores = scores_of(classes, [[6, 0, 5, 9, 0], [8, 0, 5, 9, 0], [10, 0, 6, 9, 0], [50, 50, 50, 50, 0]])
    assert scores.dice == {"ecs": 12 / 18, "mito_mem": None, "nuc": 10 / 11, "mito": 1.0, "pm": None}
    assert get_class("mito").instance
    assert get_class("nuc").instance
    assert scores.challenge == pytest.approx((6 / 12 + 1.0) / 2)
    assert scores_of(["mito"], [[1], [1], [1], [1]]).challenge is None


@pytest.mark.parametrize("layout", [MAPPED, BLOCKED])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_validation_counts_every_known_voxel_once_on_any_number_of_ranks(
    tmp_path: Path, layout: str, batch: int
) -> None:
    store = Store(write_store(tmp_path, layout=layout))
    crops = ["set-1/crop1", "set-0/crop2"]
    patches = Patches(store, crops, CLASSES, (16, 16, 16))
    expander = Expander(patches.tables, [(0, 255)] * len(crops), torch.device("cpu"))
    network = torch.nn.Conv3d(1, len(CLASSES), 1)
    torch.nn.init.zeros_(network.weight)
    torch.nn.init.ones_(network.bias)  # everything is there
    for world in (1, 3):
        counts = torch.zeros((4, len(CLASSES)), dtype=torch.int64)
        for rank in range(world):
            ranked = Validation(patches, expander, batch=batch, device=torch.device("cpu"), rank=rank, world=world)
            for shown in ranked._batches():
                assert len(shown[1]) == batch
                counts += ranked._counts(network, shown, bf16=False)
        for column, name in enumerate(CLASSES):
            totals = [patches.counts(crop, name) for crop in range(len(crops))]
            known, positive = (sum(pair[k] for pair in totals) for k in (0, 1))
            assert counts[:, column].tolist() == [positive, known, positive, known], name


def test_validation_without_a_positive_voxel_is_an_error(tmp_path: Path) -> None:
    store = Store(write_store(tmp_path))
    check_validation(Patches(store, ["set-0/crop0"], CLASSES, (16, 16, 16)))
    nothing_known = Patches(store, ["set-1/crop1"], ["nuc"], (16, 16, 16))
    with pytest.raises(TrainingError, match=r"none of the 1 validation crops has a known voxel of nuc.* or fold all"):
        check_validation(nothing_known)
    store.crops["set-0/crop0"]["counts"]["nuc"] = {"present": 0, "absent": 9, "unknown": 0}
    with pytest.raises(TrainingError, match="has a positive voxel of nuc"):
        check_validation(Patches(store, ["set-0/crop0"], ["nuc"], (16, 16, 16)))


def test_loss_that_is_not_finite_ends_the_training_and_names_the_step(root: Path) -> None:
    request = write_request(root, "diverged", lr=1e30, clip=None, checkpoint_minutes=60)
    with pytest.raises(TrainingError, match=r"the loss is nan at step .* last good checkpoint"):
        train(request)


def test_fold_all_needs_no_validation(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    request = write_request(root, "all", max_steps=2)
    lists = read_json(request["datalist"])
    Path(root / "all.json").write_text(json.dumps({"training": lists["training"], "validation": []}))
    request |= {"datalist": str(root / "all.json"), "fold": "all"}
    train(request)
    metrics = read_json(request["outputs"]["metrics"])
    assert (metrics["best_step"], metrics["best_mean_dice"]) == (2, None)
    assert "no validation: the weights after step 2 are kept" in caplog.text
    with pytest.raises(TrainingError, match="no validation crop in fold 0"):
        fold_crops(request["datalist"], "0")


def test_fold_without_training_crops_or_with_a_crop_on_both_sides_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fold0.json"
    path.write_text(json.dumps({"training": [], "validation": [{"crop": "a/crop1"}]}))
    with pytest.raises(TrainingError, match="no training crop in fold 0"):
        fold_crops(path, "0")
    path.write_text(json.dumps({"training": [{"crop": "a/crop1"}], "validation": [{"crop": "a/crop1"}]}))
    with pytest.raises(TrainingError, match="a/crop1 is on both sides"):
        fold_crops(path, "0")


def test_fingerprint_depends_on_settings_and_the_crops_used(tmp_path: Path) -> None:
    store = Store(write_store(tmp_path))
    used, shown = ["set-0/crop0"], ["set-0/crop2"]
    first = fingerprint(SETTINGS, store, used, shown)
    inert = {"checkpoint_minutes": 5, "keep_every": 7, "stop_minutes": 1, "mlflow": "sqlite:///x.db"}
    assert fingerprint({**SETTINGS, **inert}, store, used, shown) == first
    assert fingerprint({**SETTINGS, "lr": 1e-5}, store, used, shown) != first
    assert fingerprint(SETTINGS, store, [*used, "set-1/crop1"], shown) != first
    assert fingerprint({**SETTINGS, "on_damage": "skip"}, store, used, shown) == first
    assert fingerprint({**SETTINGS, "normalisation": "uint8/255"}, store, used, shown) != first
    store.crops["set-1/crop1"]["content"]["label"] = "0"
    assert fingerprint(SETTINGS, store, used, shown) == first
    store.crops["set-0/crop0"]["content"]["label"] = "0"
    assert fingerprint(SETTINGS, store, used, shown) != first


@pytest.mark.parametrize("schedule", ["cosine", "poly", "onecycle", "constant"])
def test_learning_rate_rises_to_its_maximum_and_falls(schedule: str) -> None:
    settings = {"schedule": schedule, "lr": 0.5, "max_steps": 200, "warmup": 0.1}
    rates = [learning_rate(step, settings) for step in range(200)]
    assert max(rates) == pytest.approx(0.5)
    assert rates[:20] == sorted(rates[:20])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert min(rates) >= 0
    assert rates[-1] < 0.02 or schedule == "constant"


def test_average_follows_the_weights() -> None:
    average, network = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    start_weight, end_weight = average.weight.detach().clone(), network.weight.detach().clone()
    update_average(average, network, 1)
    decay = 2 / 11
    np.testing.assert_allclose(average.weight.detach(), decay * start_weight + (1 - decay) * end_weight, rtol=1e-5)


def test_fewer_gpus_than_processes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TrainingError, match="2 processes were asked for and 1 GPUs are visible"):
        choose_device("auto", 0, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0, 2) == torch.device("cpu")
