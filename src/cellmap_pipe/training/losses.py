"""Losses for partly annotated data: what is unknown teaches nothing.

For logits x, targets y and known-masks m, with p = sigmoid(x) and sums S over the voxels of one (sample, class) pair:
    overlap   = 1 - (S m p y + e) / (S m p y + alpha (S m p - S m p y) + beta (S m y - S m p y) + e),   e = 1
    pointwise = (S m [y (1 - p)^gamma softplus(-x) + (1 - y) p^gamma softplus(x)]) / (S m)
(Tversky, Salehi et al. 2017, alpha = beta = 1/2 makes it the Dice loss; focal, Lin et al. 2017, gamma = 0 makes it
binary cross-entropy.) Each term is averaged over pairs with the classes' weights: pointwise over pairs with a known
voxel, overlap over pairs with a positive one, because on a pair without positives it is a constant with next to no
gradient. The weights are inside a normalised mean, so that a crop of heavy classes does not make a larger step, and the
denominators are those of the whole batch: all ranks, all passes of an optimisation step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.training.loss_options import Options, loss_options
from cellmap_pipe.training.masked_sums import MaskedSums, group_voxels, is_positive, row_blocks

SMOOTH = 1.0

# Largest logit adjustment; beyond it a class would be learnt from its rarity more than from the image.
MAX_ADJUSTMENT = 2.0

# Share of the earlier steps in the online prior: it remembers about a thousand, as voxels of a rare class come in few.
PRIOR_DECAY = 0.999

# Greatest ratio of an automatic class weight to the median, or of the median to it.
MAX_WEIGHT_RATIO = 10.0


class MaskedLoss(nn.Module):
    """Overlap plus a pointwise term over known voxels, on one output or several of a network.

    Called as loss(logits, target, known, weight=None, totals=None): logits (B, C, *spatial), or a list of them with
    full resolution first; target and known (B, C, *spatial) or of a shape that broadcasts to it, 0/1 or fractions, of
    any dtype; with G `groups` (B, C + G, *spatial), the groups' channels last; weight (B,) of the samples. Returns a
    scalar, 0.0 attached to the graph where nothing is known. Under torch.distributed the mean of the ranks' values is
    the loss of the joint batch, and the mean of their gradients (what DistributedDataParallel takes) its gradient. For
    a batch in several passes, totals are the passes' summed `totals`, over all ranks; the passes' losses and gradients
    then add up to those of the joint batch. Raises ValueError for a target or known that does not broadcast.

    groups: of each group, the classes whose union it is. A voxel that is known to be of the group, and of which of its
    parts is not known, teaches the first output -log P(union), averaged as the pointwise term is; the weight of a group
    is the mean of its parts'. Where a group is absent, its parts are absent in the labels already.

    Logit adjustment (Menon et al. 2021, Ren et al. 2020): in training the loss sees x + tau log(pi / (1 - pi)), with
    pi the class's share of positive voxels among *annotated* ones, limited to +-`MAX_ADJUSTMENT`. Shares of crops would
    take a rarely annotated class for a rare one. A network that is to compensate what is added to a rare class's
    (negative) has higher logits there when nothing is added any more. "subtract" is the sign of published recipes; it
    makes the raw logits of rare classes lower. The prior moves with `observe` and is in the state_dict.
    """

    def __init__(
        self,
        class_weights: Tensor,
        options: Options | None = None,
        head_weights: Sequence[float] = (1.0,),
        groups: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__()
        self.class_weights: Tensor
        self.group_weights: Tensor
        self.positives: Tensor
        self.voxels: Tensor
        self.options = options or Options()
        self.head_weights = tuple(head_weights)
        self.groups = tuple(tuple(group) for group in groups)
        self.register_buffer("class_weights", class_weights, persistent=False)
        of_groups = [class_weights[list(group)].mean() for group in self.groups]
        self.register_buffer("group_weights", torch.stack(of_groups) if groups else None, persistent=False)
        # moving averages of a step's positive and annotated voxels
        self.register_buffer("positives", torch.zeros(len(class_weights), dtype=torch.float64))
        self.register_buffer("voxels", torch.zeros(len(class_weights), dtype=torch.float64))

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        target: Tensor,
        known: Tensor,
        weight: Tensor | None = None,
        totals: Tensor | None = None,
    ) -> Tensor:
        heads = [logits] if isinstance(logits, Tensor) else list(logits)
        shares = [*self.head_weights, *[0.0] * len(heads)][: len(heads)]
        shift = self.adjustment() if self.adjusted else None
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        n_classes = heads[0].shape[1]
        with torch.autocast(heads[0].device.type, enabled=False):
            target, known = (self._expanded(states, heads[0]) for states in (target, known))
            cells = target[:, :n_classes], known[:, :n_classes]
            loss = heads[0].new_zeros((), dtype=torch.float64)
            for number, (head, share) in enumerate(zip(heads, shares, strict=True)):
                if not share:  # stays in the graph: DistributedDataParallel waits for the gradient of every head
                    loss = loss + head[:0].sum()
                    continue
                if number:
                    nested = all(n % m == 0 for n, m in zip(cells[0].shape[2:], head.shape[2:], strict=True))
                    finer = cells if nested else (target[:, :n_classes], known[:, :n_classes])
                    cells = pool(*finer, head.shape[2:])
                    terms, weights = self._terms(head, *cells, weight, shift)
                else:
                    terms, weights = self._terms(head, target, known, weight, shift, self.groups)
                if totals is None:
                    totals = weights.detach()
                    if ranks > 1:
                        dist.all_reduce(totals)
                # what coarser outputs have of the terms comes first
                shared = torch.where(totals > 0, totals, 1.0)[: len(terms)]
                loss = loss + share / sum(shares) * ranks * (terms / shared).sum()
        return loss.to(torch.promote_types(heads[0].dtype, torch.float32))

    def totals(self, target: Tensor, known: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the denominators that a pass adds to its batch's, of this rank alone: (2,), with groups (3,).

        target, known (B, C + G, *spatial) and weight as for a call. They are those of every output: an output's cells
        cover all voxels, so a pair has a known or positive cell where it has such a voxel.
        """
        n_classes = len(self.class_weights)
        target, known = torch.broadcast_tensors(is_positive(target), is_positive(known))
        axes = tuple(range(2, target.ndim))
        classes = known[:, :n_classes]
        pairs = [(classes & target[:, :n_classes]).any(axes), classes.any(axes)]
        if self.groups:
            taught = [group_voxels(target, known, group, n_classes + g) for g, group in enumerate(self.groups)]
            pairs.append(torch.stack([voxels.flatten(1).any(1) for voxels in taught], 1))
        return torch.stack([weights.sum() for weights in self._weights(pairs, weight)])

    @property
    def adjusted(self) -> bool:
        """Whether logits are adjusted, so that `observe` is to be called."""
        return self.options.tau > 0

    def counts(self, target: Tensor, known: Tensor) -> Tensor:
        """Return the positive and the known voxels of the classes, float64 (2, C), of this pass on this rank."""
        n_classes = len(self.class_weights)
        target, known = (states[:, :n_classes] for states in torch.broadcast_tensors(target, known))
        known = is_positive(known)
        positive = known & is_positive(target)
        # class by class: counting along axes is several times slower
        counted = [[torch.count_nonzero(states[:, c]) for c in range(n_classes)] for states in (positive, known)]
        return torch.stack([torch.stack(row) for row in counted]).double()

    def observe(self, counts: Tensor) -> None:
        """Move the online prior by a step's `counts`, summed over its passes and the ranks.

        A class without known voxels keeps its value.
        """
        counts = counts.to(self.voxels)
        for average, seen in zip((self.positives, self.voxels), counts, strict=True):
            average.copy_(torch.where(counts[1] > 0, PRIOR_DECAY * average + (1 - PRIOR_DECAY) * seen, average))

    def adjustment(self) -> Tensor:
        """Return what is added to the classes' logits in training, float64 (C,); 0 for classes never seen."""
        prior = self.positives / torch.where(self.voxels > 0, self.voxels, 1.0)
        sign = 1.0 if self.options.adjustment == "add" else -1.0
        added = sign * (self.options.tau * torch.logit(prior)).clamp(-MAX_ADJUSTMENT, MAX_ADJUSTMENT)
        return torch.where(self.voxels > 0, added, 0.0)

    def _terms(
        self,
        x: Tensor,
        y: Tensor,
        m: Tensor,
        weight: Tensor | None,
        shift: Tensor | None,
        groups: Sequence[Sequence[int]] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return overlap, pointwise and, with groups, their term: weighted sums over pairs, sums of weights."""
        sums, counts, union, taught = MaskedSums.apply(x, y, m, shift, self.options.gamma, groups)
        (true_positive, predicted, pointwise), (positive, voxels) = sums, counts
        false_positive, false_negative = predicted - true_positive, positive - true_positive
        overlap = 1 - (true_positive + SMOOTH) / (
            true_positive + self.options.alpha * false_positive + self.options.beta * false_negative + SMOOTH
        )
        values = [overlap, pointwise / torch.where(voxels > 0, voxels, 1.0)]
        pairs = [positive > 0, voxels > 0]
        if groups:
            values.append(union / taught.clamp(min=1))
            pairs.append(taught > 0)
        weights = self._weights(pairs, weight)
        terms = [(value * share).sum() for value, share in zip(values, weights, strict=True)]
        return torch.stack(terms), torch.stack([share.sum() for share in weights])

    def _weights(self, pairs: Sequence[Tensor], weight: Tensor | None) -> list[Tensor]:
        """Return the weights of the pairs that each term is averaged over, float64 (B, C), the third (B, G)."""
        given = [self.class_weights, self.class_weights, self.group_weights]
        samples = 1.0 if weight is None else weight.double()[:, None]
        return [chosen * of_class * samples for chosen, of_class in zip(pairs, given, strict=False)]

    def _expanded(self, states: Tensor, logits: Tensor) -> Tensor:
        n_samples, n_classes, *spatial = logits.shape
        try:
            return states.expand(n_samples, n_classes + len(self.groups), *spatial)
        except RuntimeError as error:
            also = f" and {len(self.groups)} groups" if self.groups else ""
            raise ValueError(
                f"target or known of shape {tuple(states.shape)} does not broadcast to the logits' "
                f"{tuple(logits.shape)}{also}"
            ) from error


def pool(target: Tensor, known: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return target and known-mask (B, C, *spatial) at the size `shape` of a coarser output, by masked area means.

    known becomes the known share of each cell, target the positive share of what is known there. (Taking every n-th
    voxel would shift the target by half a cell and lose membranes thinner than one.) Pooling what is pooled already is
    the same as pooling at once if the cells are nested.
    """
    if tuple(target.shape[2:]) == tuple(shape):
        return target, known
    pools = {1: functional.adaptive_avg_pool1d, 2: functional.adaptive_avg_pool2d, 3: functional.adaptive_avg_pool3d}
    mean: Callable[[Tensor, tuple[int, ...]], Tensor] = pools[target.ndim - 2]  # type: ignore[assignment]
    shares, masks = (
        torch.empty(
            (*target.shape[:2], *shape), dtype=torch.promote_types(states.dtype, torch.float32), device=states.device
        )
        for states in (target, known)
    )
    for b, c in row_blocks(target):
        y, m = target[b, c], known[b, c].to(masks.dtype)
        if y.is_floating_point():  # where() and not a product: a target without meaning (even NaN) must not pass
            y = torch.where(m > 0, y, 0.0)
        masks[b, c] = share = mean(m, tuple(shape))
        shares[b, c] = mean(y * m, tuple(shape)) / torch.where(share > 0, share, 1.0)
    return shares, masks


def class_weights(given: Any, n_classes: int, prevalence: Sequence[float] | None = None) -> list[float]:
    """Return the classes' weights from `train.class_weights`: none, auto, or one number per class.

    prevalence: the classes' shares of positive voxels among annotated ones, nan where never annotated. auto makes the
    weights proportional to prevalence^-1/2, at most `MAX_WEIGHT_RATIO` times their median and at least the median over
    it, with mean 1; classes that are never annotated or never positive get the median. Raises ConfigError.
    """
    if given in (None, "none"):
        return [1.0] * n_classes
    if given == "auto":
        if prevalence is None:
            raise ConfigError(
                "train.class_weights auto needs the classes' prevalence in the training crops, which is not known "
                "here; give none or one weight per class"
            )
        if len(prevalence) != n_classes:
            raise ValueError(f"prevalence has {len(prevalence)} entries for {n_classes} classes")
        rarity = [share**-0.5 if share > 0 else math.nan for share in prevalence]
        middle = median([value for value in rarity if not math.isnan(value)] or [1.0])
        weights = [
            middle if math.isnan(value) else min(max(value, middle / MAX_WEIGHT_RATIO), middle * MAX_WEIGHT_RATIO)
            for value in rarity
        ]
        return [value * n_classes / sum(weights) for value in weights]
    weights = [float(value) for value in given]
    if len(weights) != n_classes:
        raise ConfigError(f"train.class_weights has {len(weights)} entries for {n_classes} classes; give one per class")
    if not all(0 <= value < math.inf for value in weights):
        raise ConfigError(f"train.class_weights {weights} must be finite and not negative")
    if not any(weights):
        raise ConfigError(f"train.class_weights {weights}: no class is learnt; raise one of them")
    return weights


def build_loss(
    settings: Mapping[str, Any],
    n_classes: int,
    *,
    groups: Sequence[Sequence[int]] = (),
    prevalence: Sequence[float] | None = None,
) -> MaskedLoss:
    """Return the loss of `settings`: keys `loss` (preset), `loss_options`, `class_weights`, `deep_supervision`.

    Missing keys mean dice_bce as it is, no class weights, the first output only. groups: of each group of
    `train.groups`, the classes that form it. prevalence: see `class_weights`. Raises ConfigError for an unknown preset,
    for options that make no loss, for a wrong number of class weights or negative ones, and for a group without parts;
    ValueError for a part that is no class.
    """
    options = loss_options(settings.get("loss", "dice_bce"), settings.get("loss_options"))
    weights = class_weights(settings.get("class_weights"), n_classes, prevalence)
    for number, group in enumerate(groups):
        if not group:
            raise ConfigError(f"train.groups: entry {number + 1} has no parts among the model's classes; leave it out")
        if not all(0 <= part < n_classes for part in group):
            raise ValueError(f"group {list(group)} has parts that are none of {n_classes} classes")
    return MaskedLoss(
        torch.tensor(weights, dtype=torch.float64), options, settings.get("deep_supervision") or (1.0,), groups
    )
