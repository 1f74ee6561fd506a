"""torch.compile, tried on a small function first: it needs a C compiler and Python's headers on the node.

What fails there fails before the network has seen anything. A first step of the network itself would not do: backward
passes are compiled when they come, with gradients half made and other processes waiting for them.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cellmap_pipe.errors import TrainingError

if TYPE_CHECKING:
    from cellmap_pipe.training.alarms import Alarms

REMEDY = 'set train.compile: false, for all models in overrides["*"]'


def compile_fault(device: torch.device) -> str | None:
    """Return why torch.compile does not work on a device, in one line; None if it does."""
    try:
        numbers = torch.arange(64, dtype=torch.float32, device=device)
        if not torch.equal(torch.compile(_small)(numbers), _small(numbers)):
            return "it computes wrong numbers"
    except Exception as error:  # whatever compiler, driver or a broken installation raise is the answer
        return _told(error)
    return None


def _small(numbers: Tensor) -> Tensor:
    return 2 * numbers + 1


def _told(error: BaseException) -> str:
    """Return a compiler's error in one line, without the advice on debugging that torch adds."""
    return " ".join(f"{type(error).__name__}: {error}".split("\n\n")[0].split())[:300]


def compiled(network: nn.Module, device: torch.device, alarms: "Alarms", world: int) -> nn.Module:
    """Return the network compiled, or itself, with an alarm, where torch.compile does not work.

    world: processes of the training; if it fails for one of them, all go on without, so that they compute alike.
    """
    fault = compile_fault(device)
    failed = torch.tensor(fault is not None, dtype=torch.int32, device=device)
    if world > 1:
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if not failed.item():
        return cast(nn.Module, torch.compile(network))  # typed as any callable
    alarms.raise_once(
        "compile",
        f"torch.compile does not work here ({fault or 'on another process'}): the training goes on without it, slower; "
        f"install a C compiler and Python's headers, or {REMEDY}",
    )
    return network


@contextlib.contextmanager
def compiler_faults(network: str) -> Iterator[None]:
    """Raise a compiler's error in the block as a TrainingError with the remedy; others pass.

    network: its name.
    """
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException  # takes a second that trainings without it need not spend

        if not isinstance(error, TorchDynamoException):
            raise
        raise TrainingError(f"torch.compile fails on {network} ({_told(error)}); {REMEDY}") from error
