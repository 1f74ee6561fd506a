"""Losses for partly annotated data: what is unknown teaches nothing.

For logits x, targets y and known-masks m, with p = sigmoid(x) and sums S over the voxels of one (sample, class) pair:
    overlap = 1 - (S m p y + e) / (S m p y + alpha (S m p - S m p y) + beta (S m y - S m p y) + e),   e = 1
    bce     = (S m [softplus(x) - x y]) / (S m)
(Tversky; alpha = beta = 1/2 makes it the Dice loss.) Each term is averaged over pairs with the classes' weights: bce
over pairs with a known voxel, overlap over pairs with a positive one, because on a pair without positives it is a
constant with next to no gradient. The weights are inside a normalised mean, so that a crop of heavy classes does not
make a larger step, and the denominators are those of the whole batch: all ranks, all passes of an optimisation step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from cellmap_pipe.errors import ConfigError

# alpha (weight of false positives), beta (of false negatives) of the overlap term, by preset
PRESETS: Mapping[str, tuple[float, float]] = {"dice_bce": (0.5, 0.5)}
SMOOTH = 1.0


class MaskedLoss(nn.Module):
    """Overlap plus binary cross-entropy over known voxels, on one output or several of a network.

    Called as loss(logits, target, known, weight=None, totals=None): logits (B, C, *spatial), or a list of them with
    full resolution first; target and known (B, C, *spatial) or of a shape that broadcasts to it, 0/1 or fractions, of
    any dtype; weight (B,) of the samples. Returns a scalar, 0.0 attached to the graph where nothing is known. Under
    torch.distributed the mean of the ranks' values is the loss of the joint batch, and the mean of their gradients
    (what DistributedDataParallel takes) its gradient. For a batch in several passes, totals are the passes' summed
    `totals`, over all ranks; the passes' losses and gradients then add up to those of the joint batch.
    Raises ValueError for a target or known that does not broadcast to the logits.
    """

    def __init__(
        self, class_weights: Tensor, alpha: float = 0.5, beta: float = 0.5, head_weights: Sequence[float] = (1.0,)
    ) -> None:
        super().__init__()
        self.class_weights: Tensor
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.alpha = alpha
        self.beta = beta
        self.head_weights = tuple(head_weights)

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        target: Tensor,
        known: Tensor,
        weight: Tensor | None = None,
        totals: Tensor | None = None,
    ) -> Tensor:
        heads = [logits] if isinstance(logits, Tensor) else list(logits)
        weights = [*self.head_weights, *[0.0] * len(heads)][: len(heads)]
        total = sum(weights)
        with torch.autocast(heads[0].device.type, enabled=False):
            target, known = (_expanded(states, heads[0]) for states in (target, known))
            known = known.float()
            # where() and not a product: a target without meaning (even NaN) must not pass
            target = torch.where(known > 0, target.float(), 0.0)
            loss = heads[0].new_zeros((), dtype=torch.float32)
            for head, share in zip(heads, weights, strict=True):
                if share:
                    pooled = pool(target, known, head.shape[2:])
                    loss = loss + share / total * self._one(head.float(), *pooled, weight, totals)
                else:  # stays in the graph: DistributedDataParallel waits for the gradient of every head
                    loss = loss + 0.0 * torch.nan_to_num(head.float(), 0.0, 0.0, 0.0).sum()
        return loss

    def totals(self, target: Tensor, known: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the denominators (2,) of overlap and bce that a pass adds to its batch's, of this rank alone.

        target, known (B, C, *spatial) and weight as for a call. They are those of every output: an output's cells cover
        all voxels, so a pair has a known or positive cell where it has such a voxel.
        """
        axes = tuple(range(2, target.ndim))
        known = known > 0
        return self._pairs((known & (target > 0)).any(axes), known.any(axes), weight).sum((1, 2))

    def _pairs(self, positive: Tensor, known: Tensor, weight: Tensor | None) -> Tensor:
        """Return the pairs' weights (2, B, C) in overlap and bce. positive, known: which pairs have such voxels."""
        pairs = self.class_weights.expand_as(known)
        if weight is not None:
            pairs = pairs * weight.to(pairs)[:, None]
        return torch.stack([pairs * positive, pairs * known])

    def _one(self, x: Tensor, y: Tensor, m: Tensor, weight: Tensor | None, totals: Tensor | None) -> Tensor:
        axes = tuple(range(2, x.ndim))
        x = torch.where(m > 0, x, 0.0)  # what stands in unknown voxels must not pass, infinite or not a number
        my = m * y
        mp = m * torch.sigmoid(x)
        true_positive = (mp * y).sum(axes)
        predicted, positive, voxels = mp.sum(axes), my.sum(axes), m.sum(axes)
        false_positive, false_negative = predicted - true_positive, positive - true_positive
        overlap = 1 - (true_positive + SMOOTH) / (
            true_positive + self.alpha * false_positive + self.beta * false_negative + SMOOTH
        )
        bce = (m * functional.softplus(x) - my * x).sum(axes) / torch.where(voxels > 0, voxels, 1.0)
        return weighted_mean(torch.stack([overlap, bce]), self._pairs(positive > 0, voxels > 0, weight), totals)


def weighted_mean(values: Tensor, weights: Tensor, totals: Tensor | None = None) -> Tensor:
    """Return the sum over terms of sum(weights * values) / totals.

    values, weights: (terms, B, C). totals: (terms,), by default sum(weights) over all ranks. A term without weight
    gives 0. Multiplied by the number of ranks, so that the mean over ranks is the value of the joint batch.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if totals is None:
        totals = weights.sum((1, 2)).detach()
        if ranks > 1:
            totals = totals.clone()
            dist.all_reduce(totals)
    return ((weights * values).sum((1, 2)) / torch.where(totals > 0, totals, 1.0)).sum() * ranks


def _expanded(states: Tensor, logits: Tensor) -> Tensor:
    try:
        return states.expand_as(logits)
    except RuntimeError as error:
        raise ValueError(
            f"target or known of shape {tuple(states.shape)} does not broadcast to the logits' {tuple(logits.shape)}"
        ) from error


def pool(target: Tensor, known: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return target and known-mask (B, C, *spatial) at the size `shape` of a coarser output, by masked area means.

    known becomes the known share of each cell, target the positive share of what is known there. (Taking every n-th
    voxel would shift the target by half a cell and lose membranes thinner than one.)
    """
    if tuple(target.shape[2:]) == tuple(shape):
        return target, known
    pools = {1: functional.adaptive_avg_pool1d, 2: functional.adaptive_avg_pool2d, 3: functional.adaptive_avg_pool3d}
    mean: Callable[[Tensor, tuple[int, ...]], Tensor] = pools[target.ndim - 2]  # type: ignore[assignment]
    share = mean(known, tuple(shape))
    return mean(target * known, tuple(shape)) / torch.where(share > 0, share, 1.0), share


def build_loss(settings: Mapping[str, Any], n_classes: int) -> MaskedLoss:
    """Return the loss that `settings` describe: keys `loss` (preset), `class_weights`, `deep_supervision`.

    Missing keys mean dice_bce, no class weights, the first output only. Raises ConfigError for an unknown preset, or
    for a wrong number of class weights or negative ones.
    """
    preset = settings.get("loss", "dice_bce")
    if preset not in PRESETS:
        raise ConfigError(f"train.loss '{preset}' is unknown; allowed: {', '.join(sorted(PRESETS))}")
    given = settings.get("class_weights", "none")
    weights = [1.0] * n_classes if given in (None, "none") else [float(value) for value in given]
    if len(weights) != n_classes:
        raise ConfigError(f"train.class_weights has {len(weights)} entries for {n_classes} classes; give one per class")
    if not all(0 <= value < math.inf for value in weights):
        raise ConfigError(f"train.class_weights {weights} must be finite and not negative")
    alpha, beta = PRESETS[preset]
    return MaskedLoss(torch.tensor(weights), alpha, beta, settings.get("deep_supervision") or (1.0,))
