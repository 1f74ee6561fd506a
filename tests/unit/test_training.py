"""Trainings in processes of their own: outputs, resume after a kill, several ranks, run directories, failures."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training_case import (
    CLASSES,
    SETTINGS,
    finish,
    start,
    start_ranks,
    wait_for_step,
    write_request,
    write_request_file,
    write_store,
)

from cellmap_pipe.errors import ContractError, TrainingError
from cellmap_pipe.files import read_json
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.training import checkpoint, main, results
from cellmap_pipe.training.inference import load_model
from cellmap_pipe.training.loop import Process, StoppedError, StopRequest, Training
from cellmap_pipe.training.main import choose_device, fold_crops, run_training
from cellmap_pipe.training.optimisation import learning_rate, update_average

Request = dict[str, Any]


def outputs(request: Request) -> dict[str, bytes]:
    return {kind: Path(path).read_bytes() for kind, path in request["outputs"].items()}


def final_state(request: Request) -> list[Any]:
    """Return all values of the last checkpoint, tensors as bytes: weights, average, optimiser, progress, history."""
    path = sorted(Path(request["run_dir"]).glob("step*.pt"))[-1]
    return list(flattened(torch.load(path, weights_only=True)))


def flattened(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key in value:
            yield key
            yield from flattened(value[key])
    elif isinstance(value, list):
        for item in value:
            yield from flattened(item)
    else:
        yield value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def same(first: Request, second: Request) -> bool:
    """Return whether two trainings ended bit by bit alike."""
    return outputs(first) == outputs(second) and final_state(first) == final_state(second)


def log(request: Request) -> str:
    path = Path(request["log"])
    return path.read_text() if path.exists() else ""


def wait_for_start(request: Request, alive: Callable[[], bool]) -> None:
    """Return when the training's log says that it begins."""
    while "patches per step" not in log(request):
        assert alive(), log(request)
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
    assert history[0] == "step,loss,lr,mean_dice,dice_ecs,dice_mito_mem,dice_nuc"
    assert [int(line.split(",")[0]) for line in history[1:]] == [4, 8, 12]
    assert list((Path(whole["run_dir"]) / "tensorboard").iterdir())


def test_model_loads_without_unpickling_and_gives_logits_of_its_patch(whole: Request) -> None:
    trained = load_model(whole["outputs"]["weights"])
    assert trained.classes == tuple(CLASSES)
    assert trained.normalisation["set-1"] == (30.0, 230.0)
    assert (trained.grid, trained.voxel_nm, trained.patch) == ("8nm", [8.0, 8.0, 8.0], (16, 16, 16))
    with torch.inference_mode():
        assert trained.network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)
    contents = torch.load(whole["outputs"]["weights"], weights_only=True)
    assert contents["validation"]["mean_dice"] == read_json(whole["outputs"]["metrics"])["best_mean_dice"]


def test_damaged_model_is_refused(whole: Request, tmp_path: Path) -> None:
    data = Path(whole["outputs"]["weights"]).read_bytes()
    (tmp_path / "torn.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pt").write_text("weights")
    for name in ("torn.pt", "text.pt", "missing.pt"):
        with pytest.raises(ContractError, match=f"{name}.*-R train"):
            load_model(tmp_path / name)


def test_killed_training_ends_as_if_it_had_not_been_killed(root: Path, whole: Request) -> None:
    request = write_request(root, "killed")
    for step in (1, 4, 7):
        process = start(request)
        wait_for_step(request, step, process)
        process.kill()
        assert finish(process) == [-signal.SIGKILL]
        assert not Path(request["outputs"]["weights"]).exists()
    assert finish(start(request)) == [0], log(request)
    assert "resumed after step" in log(request)
    assert same(request, whole)


def test_terminated_training_saves_and_goes_on(root: Path, whole: Request) -> None:
    request = write_request(root, "terminated", checkpoint_minutes=60)
    process = start(request)
    wait_for_start(request, process.is_alive)
    os.kill(process.pid or 0, signal.SIGUSR1)
    assert finish(process) == [1]
    assert log(request).splitlines()[-1].startswith("ERROR train model=tiny,fold=0: stopped by SIGUSR1 after step ")
    assert len(list(Path(request["run_dir"]).glob("step*.pt"))) == 1
    assert finish(start(request)) == [0], log(request)
    assert final_state(request) == final_state(whole)


def test_training_stops_before_the_walltime(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    request = {**write_request(root, "walltime", checkpoint_minutes=60), "runtime_min": 1e-4}
    with pytest.raises(StoppedError, match="stopped by the end of the walltime"):
        train(request)
    assert list(Path(request["run_dir"]).glob("step*.pt"))


def test_two_ranks_one_killed_resume_exactly(root: Path, whole: Request) -> None:
    request = write_request(root, "ranks", batch=1)
    assert finish(*start_ranks(request, 2)) == [0, 0], log(request)
    killed = write_request(root, "ranks-killed", batch=1)
    ranks = start_ranks(killed, 2)
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
    request = write_request(root, "torchrun", max_steps=24, steps_per_epoch=1000, checkpoint_minutes=60, batch=1)
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
    wait_for_start(request, lambda: job.poll() is None)
    job.terminate()
    terminal = job.communicate(timeout=120)[0].decode()
    assert job.returncode != 0
    assert "on 2 x cpu (1 threads)" in log(request)
    assert log(request).splitlines()[-1].startswith("ERROR train model=tiny,fold=0: stopped by SIGTERM after step ")
    assert "ERROR train model=tiny,fold=0: stopped by SIGTERM" in terminal
    assert finish(start(request)) == [0], log(request)
    assert "ran on 2 processes and goes on with 1" in log(request)
    assert read_json(request["outputs"]["metrics"])["steps"] == 24


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
    assert len(list(Path(again["run_dir"]).parent.glob("changed.stale-*/best.pt"))) == 1
    train({**again, "retrain": True})
    assert len(list(Path(again["run_dir"]).parent.glob("changed.stale-*/best.pt"))) == 2


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


def trainer(request: Request, process: Process) -> Training:
    """Return the training of a request, in this process."""
    store = Store(request["index"])
    folder = Path(request["run_dir"])
    folder.mkdir(parents=True)
    return Training(request["settings"], store, ["set-0/crop0", "set-1/crop1"], [], folder, "f", process, None)


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
        with pytest.raises(TrainingError, match=r"best\.pt: step and fingerprint are .* train again"):
            results.publish(run_dir, changed, paths, "tiny", "0")


def test_loss_that_is_not_finite_ends_the_training_and_names_the_step(root: Path) -> None:
    request = write_request(root, "diverged", lr=1e30, clip=None, checkpoint_minutes=60)
    with pytest.raises(TrainingError, match=r"the loss is nan at step .* last good checkpoint"):
        train(request)


def test_fold_all_needs_no_validation(root: Path) -> None:
    request = write_request(root, "all", max_steps=2)
    lists = read_json(request["datalist"])
    Path(root / "all.json").write_text(json.dumps({"training": lists["training"], "validation": []}))
    request |= {"datalist": str(root / "all.json"), "fold": "all"}
    train(request)
    metrics = read_json(request["outputs"]["metrics"])
    assert (metrics["best_step"], metrics["best_mean_dice"]) == (2, None)
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
    first = results.fingerprint(SETTINGS, store, used, shown)
    assert results.fingerprint({**SETTINGS, "checkpoint_minutes": 5}, store, used, shown) == first
    assert results.fingerprint({**SETTINGS, "lr": 1e-5}, store, used, shown) != first
    assert results.fingerprint(SETTINGS, store, [*used, "set-1/crop1"], shown) != first
    assert results.fingerprint({**SETTINGS, "on_damage": "skip"}, store, used, shown) == first
    assert results.fingerprint({**SETTINGS, "normalisation": "uint8/255"}, store, used, shown) != first
    store.crops["set-1/crop1"]["content"]["label"] = "0"
    assert results.fingerprint(SETTINGS, store, used, shown) == first
    store.crops["set-0/crop0"]["content"]["label"] = "0"
    assert results.fingerprint(SETTINGS, store, used, shown) != first


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
