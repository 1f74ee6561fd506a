"""The presets of the loss and what a configuration may change of them, see training.losses. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cellmap_pipe.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """What presets differ in, and `train.loss_options` changes.

    alpha, beta: weights of false positives and false negatives in the overlap term. gamma: of the focal term, 0 for
    cross-entropy. tau, adjustment: strength and sign of the logit adjustment (`MaskedLoss`).
    """

    alpha: float = 0.5
    beta: float = 0.5
    gamma: float = 0.0
    tau: float = 0.0
    adjustment: str = "add"


PRESETS: Mapping[str, Options] = {
    "dice_bce": Options(),
    "tversky_bce": Options(alpha=0.3, beta=0.7),
    "dice_focal": Options(gamma=2.0),
    "balanced_tversky": Options(alpha=0.6, beta=0.4, tau=0.5),
}


def loss_options(preset: str, given: Mapping[str, Any] | None) -> Options:
    """Return the options of a preset (`train.loss`), changed by those `given` (`train.loss_options`).

    Raises ConfigError for an unknown preset or option, and for values that make no loss.
    """
    if preset not in PRESETS:
        raise ConfigError(f"train.loss '{preset}' is unknown; allowed: {', '.join(sorted(PRESETS))}")
    given = given or {}
    names = list(asdict(Options()))
    for name, value in given.items():
        if name not in names:
            raise ConfigError(f"train.loss_options: '{name}' is unknown; allowed: {', '.join(names)}")
        if name == "adjustment":
            if value not in ("add", "subtract"):
                raise ConfigError(f"train.loss_options.adjustment '{value}' is unknown; allowed: add, subtract")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ConfigError(f"train.loss_options.{name} is {value!r}; it must be a finite number, not negative")
    options = replace(PRESETS[preset], **given)
    if not options.alpha + options.beta > 0:
        raise ConfigError(
            "train.loss_options: alpha and beta are both 0, which makes the overlap term a constant; raise one of them"
        )
    return options
