"""Losses for partly annotated data: what is unknown teaches nothing.

For logits x, targets y and known-masks m, with p = sigmoid(x) and sums S over the voxels of one (sample, class) pair:
    overlap = 1 - (S m p y + e) / (S m p y + alpha (S m p - S m p y) + beta (S m y - S m p y) + e),   e = 1
    bce     = (S m [softplus(x) - x y]) / (S m)
(Tversky; alpha = beta = 1/2 makes it the Dice loss.) Each term is averaged over pairs with the classes' weights: bce
over pairs with a known voxel, overlap over pairs with a positive one, because on a pair without positives it is a
constant with next to no gradient. The weights are inside a normalised mean, so that a crop of heavy classes does not
make a larger step, and the denominators are those of the whole batch on all ranks.
"""

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

    Called as loss(logits, target, known, weight=None): logits (B, C, *spatial), or a list of them with full resolution
    first; target and known (B, C, *spatial), 0/1 or fractions, of any dtype; weight (B,) of the samples. Returns a
    scalar, 0.0 attached to the graph where nothing is known. Under torch.distributed the mean of the ranks' values is
    the loss of the joint batch, and the mean of their gradients (what DistributedDataParallel takes) its gradient.
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
        self, logits: Tensor | Sequence[Tensor], target: Tensor, known: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        heads = [logits] if isinstance(logits, Tensor) else list(logits)
        weights = [*self.head_weights, *[0.0] * len(heads)][: len(heads)]
        total = sum(weights)
        with torch.autocast(heads[0].device.type, enabled=False):
            known = known.float()
            # where() and not a product: a target without meaning (even NaN) must not pass
            target = torch.where(known > 0, target.float(), 0.0)
            loss = heads[0].new_zeros((), dtype=torch.float32)
            for head, share in zip(heads, weights, strict=True):
                if share:
                    loss = loss + share / total * self._one(head.float(), *pool(target, known, head.shape[2:]), weight)
                else:  # stays in the graph: DistributedDataParallel waits for the gradient of every head
                    loss = loss + 0.0 * head.float().sum()
        return loss

    def _one(self, x: Tensor, y: Tensor, m: Tensor, weight: Tensor | None) -> Tensor:
        axes = tuple(range(2, x.ndim))
        my = m * y
        mp = m * torch.sigmoid(x)
        true_positive = (mp * y).sum(axes)
        predicted, positive, voxels = mp.sum(axes), my.sum(axes), m.sum(axes)
        false_positive, false_negative = predicted - true_positive, positive - true_positive
        overlap = 1 - (true_positive + SMOOTH) / (
            true_positive + self.alpha * false_positive + self.beta * false_negative + SMOOTH
        )
        bce = (m * functional.softplus(x) - my * x).sum(axes) / torch.where(voxels > 0, voxels, 1.0)
        pairs = self.class_weights.expand_as(bce)
        if weight is not None:
            pairs = pairs * weight.to(pairs)[:, None]
        return weighted_mean(torch.stack([overlap, bce]), torch.stack([pairs * (positive > 0), pairs * (voxels > 0)]))


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over terms of sum(weights * values) / sum(weights), denominators taken over all ranks.

    values, weights: (terms, B, C). A term without weight gives 0. Multiplied by the number of ranks, so that the mean
    over ranks is the value of the joint batch.
    """
    totals = weights.sum((1, 2)).detach()
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        ranks = dist.get_world_size()
        totals = totals.clone()
        dist.all_reduce(totals)
    return ((weights * values).sum((1, 2)) / torch.where(totals > 0, totals, 1.0)).sum() * ranks


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

    Missing keys mean dice_bce, no class weights, the first output only. Raises ConfigError for an unknown preset or a
    wrong number of class weights.
    """
    preset = settings.get("loss", "dice_bce")
    if preset not in PRESETS:
        raise ConfigError(f"train.loss '{preset}' is unknown; allowed: {', '.join(sorted(PRESETS))}")
    given = settings.get("class_weights", "none")
    weights = [1.0] * n_classes if given in (None, "none") else [float(value) for value in given]
    if len(weights) != n_classes:
        raise ConfigError(f"train.class_weights has {len(weights)} entries for {n_classes} classes; give one per class")
    alpha, beta = PRESETS[preset]
    return MaskedLoss(torch.tensor(weights), alpha, beta, settings.get("deep_supervision", (1.0,)))
