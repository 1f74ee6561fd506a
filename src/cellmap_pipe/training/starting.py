"""What a training begins with: groups as channels, frequencies of its classes, weights of an earlier model."""

import logging
import math
from collections.abc import Sequence

from torch import nn

from cellmap_pipe.classes import contains, parts_of
from cellmap_pipe.errors import TrainingError
from cellmap_pipe.training import checkpoint
from cellmap_pipe.training.sampling import Patches

logger = logging.getLogger(__name__)


def channels_of(groups: Sequence[str], classes: Sequence[str]) -> list[list[int]]:
    """Return for each group the channels of the classes that form it, leaving out what lies inside another of them."""
    parts = [parts_of(group, classes) for group in groups]
    return [
        [classes.index(name) for name in names if not any(contains(other, name) for other in names)] for names in parts
    ]


def prevalence(patches: Patches) -> list[float]:
    """Return the share of positive voxels among the known ones by class, nan where none is known."""
    shares = []
    for name in patches.classes:
        counts = [patches.counts(crop, name) for crop in range(len(patches.crops))]
        known = sum(known for known, _ in counts)
        shares.append(sum(positive for _, positive in counts) / known if known else math.nan)
    return shares


def begin_with(network: nn.Module, path: str) -> None:
    """Copy the weights of the model file `path` into `network` where name and shape agree, and log what did not."""
    given = checkpoint.read_model(path, "set train.init_from to a model.pt, or to null")["state_dict"]
    own = network.state_dict()
    matched = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    if not matched:
        raise TrainingError(f"{path}: none of its weights fits the network; set train.init_from to another file")
    network.load_state_dict(matched, strict=False)
    logger.info("%d of %d tensors begin as in %s", len(matched), len(own), path)
    if fresh := sorted(own.keys() - matched.keys()):
        logger.warning("not in %s, hence fresh: %s", path, ", ".join(fresh))
    if unused := sorted(given.keys() - matched.keys()):
        logger.warning("in %s and of no use here: %s", path, ", ".join(unused))
