"""How weights move: optimiser, learning rate as a function of the step, and the moving average of the weights."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from cellmap_pipe.errors import ConfigError

# A one-cycle schedule begins at lr / 25 and ends at a ten-thousandth of that (Smith & Topin 2018, torch's defaults).
ONECYCLE_START, ONECYCLE_END = 1 / 25, 1 / 25 * 1e-4
POLY_POWER = 0.9
EMA_DECAY = 0.999


def build_optimizer(parameters: Iterable[nn.Parameter], settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Return the optimiser of the resolved `train` section: adamw, adam, or sgd with Nesterov momentum."""
    name, lr, decay = settings["optimizer"], settings["lr"], settings["weight_decay"]
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=decay)
    if name == "sgd":
        momentum = settings["momentum"]
        return torch.optim.SGD(parameters, lr=lr, weight_decay=decay, momentum=momentum, nesterov=momentum > 0)
    raise ConfigError(f"train.optimizer '{name}' is unknown; allowed: adamw, adam, sgd")


def learning_rate(step: int, settings: Mapping[str, Any]) -> float:
    """Return the learning rate of step `step` (0 .. max_steps - 1).

    It rises linearly over the share `warmup` of the steps (one-cycle: as half a cosine), then follows `schedule`:
    cosine to 0, poly (1 - t)^0.9, onecycle (cosine to almost 0), constant.
    """
    schedule, lr, total = settings["schedule"], float(settings["lr"]), settings["max_steps"]
    rising = min(round(settings["warmup"] * total), total - 1)
    if step < rising:
        share = (step + 1) / rising
        if schedule == "onecycle":
            return lr * (ONECYCLE_START + (1 - ONECYCLE_START) * (1 - math.cos(math.pi * share)) / 2)
        return lr * share
    t = (step - rising) / max(total - rising, 1)
    fall = (1 + math.cos(math.pi * t)) / 2
    if schedule == "cosine":
        return lr * fall
    if schedule == "onecycle":
        return lr * (ONECYCLE_END + (1 - ONECYCLE_END) * fall)
    if schedule == "poly":
        return lr * float((1 - t) ** POLY_POWER)
    if schedule == "constant":
        return lr
    raise ConfigError(f"train.schedule '{schedule}' is unknown; allowed: cosine, poly, onecycle, constant")


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, step: int) -> None:
    """Move `average` towards `network` after step `step` (1, 2, ..): decay min(0.999, (1 + step) / (10 + step)).

    Batch-norm statistics are averaged with the weights; integer buffers are copied.
    """
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    averaged, current = average.state_dict(), network.state_dict()
    floating = [name for name, value in averaged.items() if value.is_floating_point()]
    torch._foreach_lerp_([averaged[name] for name in floating], [current[name] for name in floating], 1 - decay)
    for name in averaged.keys() - set(floating):
        averaged[name].copy_(current[name])
