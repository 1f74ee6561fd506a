"""A node on which torch.compile does not work trains all the same, or says what to set."""

from functools import partial
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from cellmap_pipe.errors import TrainingError
from cellmap_pipe.training.alarms import Alarms
from cellmap_pipe.training.compiling import compile_fault, compiled, compiler_faults

CPU = torch.device("cpu")


def without_compiler(*_: Any) -> NoReturn:
    raise RuntimeError("Failed to find C compiler.\n\nSet TORCHDYNAMO_VERBOSE=1 for more")


@pytest.fixture
def network() -> nn.Module:
    torch._dynamo.reset()
    return nn.Linear(2, 2)


def use(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))


def test_a_network_is_compiled_where_that_works(monkeypatch: pytest.MonkeyPatch, network: nn.Module) -> None:
    use(monkeypatch, "eager")
    alarms = Alarms({})
    trained = compiled(network, CPU, alarms, world=1)
    assert trained is not network and not alarms.raised
    assert torch.equal(trained(torch.ones(1, 2)), network(torch.ones(1, 2)))


def test_without_a_compiler_the_training_goes_on_with_an_alarm(
    monkeypatch: pytest.MonkeyPatch, network: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, without_compiler)
    alarms, drawn = Alarms({}), torch.get_rng_state()
    for _ in range(2):
        assert compiled(network, CPU, alarms, world=1) is network
    assert torch.equal(torch.get_rng_state(), drawn)
    (alarm,) = alarms.raised.values()
    assert "Failed to find C compiler.)" in alarm and "TORCHDYNAMO" not in alarm and "train.compile: false" in alarm
    assert [record.getMessage() for record in caplog.records if record.name.startswith("cellmap_pipe")] == [alarm]


def test_wrong_numbers_are_a_fault(monkeypatch: pytest.MonkeyPatch, network: nn.Module) -> None:
    use(monkeypatch, lambda graph, inputs: lambda *given: (given[0],))
    assert compile_fault(CPU) == "it computes wrong numbers"


def test_a_network_that_cannot_be_compiled_is_named_with_the_remedy(network: nn.Module) -> None:
    with (
        pytest.raises(TrainingError, match=r"fails on Linear \(.*Failed to find C.*\); set train.compile: false"),
        compiler_faults("Linear"),
    ):
        torch.compile(network, backend=without_compiler)(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="out of memory"), compiler_faults("Linear"):
        raise RuntimeError("out of memory")
