"""The search for an architecture ends with a network that can be trained, and is a function of its seed."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training_case import CLASSES, SETTINGS, write_request, write_request_file, write_store

from cellmap_pipe.errors import ConfigError, TrainingError
from cellmap_pipe.files import write_json
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.training.architecture import SEARCH_SETTINGS, load_architecture
from cellmap_pipe.training.inference import load_model
from cellmap_pipe.training.main import run_training
from cellmap_pipe.training.search import Search, architecture_penalty, halves, search_architecture

CPU = torch.device("cpu")
PLAN: dict[str, Any] = {
    "max_steps": 4,
    "warmup": 0.5,
    "channel_mul": 0.125,
    "num_blocks": 2,
    "num_depths": 2,
    "lr": 0.025,
    "architecture_lr": 0.05,
    "memory": 0.8,
}
# the same crops in two orders
CROPS = [["set-0/crop0", "set-1/crop1", "set-0/crop2"], ["set-0/crop2", "set-0/crop0", "set-1/crop1"]]
GIVEN = {key: {**SETTINGS, "batch": 1}[key] for key in SEARCH_SETTINGS}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("search"))


def search(index: Path, out: Path, plan: dict[str, Any] = PLAN, **settings: Any) -> dict[str, Any]:
    datalist = out.with_suffix(".datalist.json")
    write_json(datalist, {"training": [{"crop": f"set-{n % 2}/crop{n}"} for n in range(3)], "validation": []})
    search_architecture(index, datalist, {**GIVEN, **settings}, plan, out, device=CPU)
    return load_architecture(out)


def test_what_a_search_finds_is_trained_and_loaded_again(store: Path, tmp_path: Path) -> None:
    found = search(store, tmp_path / "found.json")
    write_store(tmp_path)
    request = write_request(
        tmp_path,
        network="DiNTS",
        arguments={"architecture": found, "channel_mul": 0.125},
        deep_supervision=[1],
        max_steps=1,
        steps_per_epoch=1,
    )
    run_training(write_request_file(request))
    trained = load_model(request["outputs"]["weights"])
    assert trained.contents["step"] == 1
    with torch.inference_mode():
        assert trained.network(torch.rand(1, 1, 16, 16, 16)).shape == (1, len(CLASSES), 16, 16, 16)


def test_a_search_is_a_function_of_its_seed(store: Path, tmp_path: Path) -> None:
    first, again = (Search(Store(store, grid="8nm"), crops, GIVEN, PLAN, CPU) for crops in CROPS[:2])
    other = Search(Store(store, grid="8nm"), CROPS[0], {**GIVEN, "seed": 1}, PLAN, CPU)
    for one in (first, again, other):
        one.run()
    weights, same = first.network.state_dict(), again.network.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not torch.equal(first.space.log_alpha_c, other.space.log_alpha_c)


def test_the_architecture_stays_as_drawn_while_the_convolutions_warm_up(store: Path) -> None:
    one = Search(Store(store, grid="8nm"), CROPS[0], GIVEN, {**PLAN, "warmup": 1.0, "max_steps": 2}, CPU)
    architecture = [parameter.detach().clone() for parameter in one.architecture]
    convolution = one.convolutions[0].detach().clone()
    one.run()
    assert all(torch.equal(*pair) for pair in zip(architecture, one.architecture, strict=True))
    assert not torch.equal(convolution, one.convolutions[0])


def test_slices_are_searched_too(store: Path, tmp_path: Path) -> None:
    found = search(
        store, tmp_path / "flat.json", {**PLAN, "max_steps": 1, "warmup": 0.0}, spatial_dims=2, patch=[1, 16, 16]
    )
    assert found["spatial_dims"] == 2


def test_convolutions_and_architecture_see_different_crops() -> None:
    first, second = halves(CROPS[0], seed=0)
    assert sorted(first + second) == sorted(CROPS[0])
    assert (first, second) == halves(CROPS[1], seed=0)
    crops = [f"crop{number}" for number in range(20)]
    assert abs(len(halves(crops, 0)[0]) - len(halves(crops, 0)[1])) <= 1
    assert halves(crops, 0) != halves(crops, 1)


def test_less_memory_than_aimed_at_draws_paths_in_and_more_drives_them_out(store: Path) -> None:
    space = Search(Store(store, grid="8nm"), CROPS[0], GIVEN, PLAN, CPU).space
    gradients = []
    for aim in (0.0, 1.0):
        cost, _ = architecture_penalty(space, (1, 1, 16, 16, 16), aim)
        (gradient,) = torch.autograd.grad((aim - cost).abs(), space.log_alpha_a)
        gradients.append(gradient.sum())
    assert gradients[0] > 0 > gradients[1]


def test_decided_paths_and_operations_have_no_entropy(store: Path) -> None:
    space = Search(Store(store, grid="8nm"), CROPS[0], GIVEN, PLAN, CPU).space
    undecided = architecture_penalty(space, (1, 1, 16, 16, 16), 0.5)[1]
    with torch.no_grad():
        space.log_alpha_a.fill_(20.0)
        space.log_alpha_c.fill_(0.0)[..., 1] = 20.0
    cost, decided = architecture_penalty(space, (1, 1, 16, 16, 16), 0.5)
    # every path taken: the whole memory, and nothing left but its distance from the aim
    assert float(cost.detach()) == pytest.approx(1.0, abs=1e-3)
    assert float(decided.detach()) == pytest.approx(0.5, abs=1e-2)
    assert float(undecided.detach()) > float(decided.detach())


def test_a_search_without_a_second_crop_or_a_patch_that_fits_is_refused(store: Path) -> None:
    with pytest.raises(TrainingError, match="needs two training crops"):
        Search(Store(store, grid="8nm"), CROPS[0][:1], GIVEN, PLAN, CPU)
    with pytest.raises(ConfigError, match=r"must be divisible by 4 for DiNTS; try \[16, 16, 16\]"):
        Search(Store(store, grid="8nm"), CROPS[0], {**GIVEN, "patch": [16, 16, 18]}, PLAN, CPU)


def test_a_loss_that_is_not_finite_stops_the_search(store: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss of the search is nan at step \d; lower search\.lr"):
        Search(Store(store, grid="8nm"), CROPS[0], GIVEN, {**PLAN, "lr": 1e30}, CPU).run()
