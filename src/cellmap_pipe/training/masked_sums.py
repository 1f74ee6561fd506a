"""The sums over known voxels that a loss consists of, and their gradient, without temporaries of the logits' size.

Formulas in autograd make a dozen tensors as large as the logits, and filling those takes most of the time. Here pieces
pass through small buffers: forward keeps sums per (sample, class); backward goes over the pieces once more and writes
the gradient, the only large tensor. For logits x, targets y, known-masks m, with p = sigmoid(x):
    true positives  S m p y,    gradient m y p (1 - p)
    predicted       S m p,      gradient m p (1 - p)
    pointwise       S m [y (1 - p)^g softplus(-x) + (1 - y) p^g softplus(x)],    gradient
                    m [(1 - y) p^g (p + g (1 - p) softplus(x)) - y (1 - p)^g (1 - p + g p softplus(-x))]
Pointwise is the focal loss of Lin et al. 2017 without their alpha; for g = 0 cross-entropy, with gradient m (p - y). A
target that is a fraction, in a cell of a coarser output, counts as that share of positive voxels among negative ones.

A group's voxel where its parts are unknown teaches that the union of them is present: -log(1 - prod (1 - p_i)) over the
parts that may be there. With u the logit of the union, which two parts at a time give as log(e^a + e^b + e^(a + b)), it
is softplus(-u), its gradient -p_i / e^u; neither over- nor underflows.
"""

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, softplus

# Elements treated at once. On a CPU what lies between two operations stays in its cache; on a GPU a kernel takes longer
# than its launch, and the buffers little of the memory.
CPU_PIECE = 2**16
GPU_PIECE = 2**23


class MaskedSums(torch.autograd.Function):
    """Sums over known voxels, per (sample, class) and per (sample, group).

    apply(logits, target, known, shift, gamma, groups): logits (B, C, *spatial), floating; target and known
    (B, C + G, *spatial), bool, uint8 or floating, strides of 0 allowed; shift (C,) is added to the logits, or None;
    groups: of each of the G groups, the classes that are its parts. Returns float64: sums (3, B, C) of true positives,
    predicted, pointwise; counts (2, B, C) of positive and known voxels; union (B, G), sums of -log P(union) over the
    voxels of `group_voxels`; numbers (B, G) of those. Sums and union have a gradient, in the logits' dtype, exactly
    zero in unknown voxels whatever logits and target are there. Half precision is computed in single precision.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        known: Tensor,
        shift: Tensor | None,
        gamma: float,
        groups: Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n_classes = logits.shape[1]
        scratch = Scratch(logits, shift)
        # of pieces, on a CPU alone: whether there are known voxels, and whether what unknown ones hold might pass
        learnt, spoilt = [], []
        found = logits.new_zeros((5, *logits.shape[:2]), dtype=torch.float64)
        for b, c, (x, y, m) in pieces(logits, target[:, :n_classes], known[:, :n_classes]):
            m = scratch.numbers("m", m)
            voxels = m.sum(-1)
            if logits.is_cpu:  # elsewhere to look at a number is to wait for the device
                learnt.append(bool(voxels.any()))
                if not learnt[-1]:
                    continue
            x, y = scratch.logits(x, c), scratch.numbers("y", y)
            if logits.is_cpu:
                sums = _sums(x, y, m, voxels, gamma, scratch, fast=True)
                spoilt.append(not math.isfinite(sums.sum()))
                if spoilt[-1]:  # by unknown voxels, or by known ones with large logits
                    x, y = _cleared(x, y, m)
                    sums = _sums(x, y, m, voxels, gamma, scratch, fast=True)
            if not logits.is_cpu or not math.isfinite(sums.sum()):
                sums = _sums(*_cleared(x, y, m), m, voxels, gamma, scratch)
            found[:, b, c] += sums
        taught = [group_voxels(target, known, group, n_classes + g) for g, group in enumerate(groups)]
        union = found.new_zeros((2, len(logits), len(groups)))
        for g, (group, voxels) in enumerate(zip(groups, taught, strict=True)):
            for b, where, x, m in union_pieces(voxels, group, logits, known):
                likely = reduce(_either, _possible(x, m, where, scratch, group))
                union[0, b, g] += torch.where(where, softplus(-likely), 0.0).sum()
                union[1, b, g] += where.sum()
        ctx.save_for_backward(logits, target, known, shift, *taught)
        ctx.gamma, ctx.groups, ctx.learnt, ctx.spoilt = gamma, groups, learnt, spoilt
        sums, counts, numbers = found[:3].clone(), found[3:].clone(), union[1].clone()
        ctx.mark_non_differentiable(counts, numbers)
        return sums, counts, union[0].clone(), numbers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sums: Tensor, _: Tensor, of_union: Tensor, __: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, known, shift, *taught = ctx.saved_tensors
        n_classes = logits.shape[1]
        scratch = Scratch(logits, shift)
        of_sums, of_union = (slopes.to(scratch.dtype) for slopes in (of_sums, of_union))
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        learnt, spoilt = iter(ctx.learnt), iter(ctx.spoilt)
        for b, c, (x, y, m, out) in pieces(logits, target[:, :n_classes], known[:, :n_classes], gradient):
            if logits.is_cpu and not next(learnt):
                out.zero_()
                continue
            x, y, m = scratch.logits(x, c), scratch.numbers("y", y), scratch.numbers("m", m)
            if not logits.is_cpu or next(spoilt):
                x, y = _cleared(x, y, m)
            torch.mul(_slopes(x, y, of_sums[:, b, c, None], ctx.gamma, scratch), m, out=out)
        for g, (group, voxels) in enumerate(zip(ctx.groups, taught, strict=True)):
            for b, where, x, m, out in union_pieces(voxels, group, logits, known, gradient):
                parts = _possible(x, m, where, scratch, group)
                likely = reduce(_either, parts)
                for part, mask, slopes in zip(parts, m, out, strict=True):
                    rise = (logsigmoid(part) - likely).exp_().mul_(-of_union[b, g])
                    slopes += torch.where(where & ~is_positive(mask), rise, 0.0)
        return gradient, None, None, None, None, None


class Scratch:
    """Buffers for what a piece goes through, of the dtype it is computed in."""

    def __init__(self, logits: Tensor, shift: Tensor | None) -> None:
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.shift = None if shift is None else shift.to(self.dtype)
        self._buffers: dict[tuple[str, torch.Size], Tensor] = {}

    def __call__(self, name: str, like: Tensor) -> Tensor:
        """Return the buffer `name` of the shape of `like`; pieces have few shapes."""
        key = name, like.shape
        if key not in self._buffers:
            self._buffers[key] = torch.empty(like.shape, dtype=self.dtype, device=like.device)
        return self._buffers[key]

    def numbers(self, name: str, states: Tensor) -> Tensor:
        """Return a piece of target or known as numbers, in the buffer `name` if it is of another dtype."""
        if states.dtype == self.dtype and states.is_contiguous():
            return states
        # torch copies bytes many at a time, bool one by one
        return self(name, states).copy_(states.view(torch.uint8) if states.dtype == torch.bool else states)

    def logits(self, piece: Tensor, classes: slice) -> Tensor:
        """Return a piece (b, c, n) of the logits, shifted."""
        piece = piece.to(self.dtype).contiguous()
        return piece if self.shift is None else torch.add(piece, self.shift[classes, None], out=self("x", piece))


def row_blocks(tensor: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield samples and classes whose rows of a tensor (B, C, *spatial) are a piece, or a single row that is larger."""
    limit = _limit(tensor)
    n_samples, n_classes, *spatial = tensor.shape
    n = max(1, math.prod(spatial))
    samples = max(1, limit // (n_classes * n))
    classes = n_classes if n_classes * n <= limit else max(1, limit // n)
    for b in range(0, n_samples, samples):
        for c in range(0, n_classes, classes):
            yield slice(b, b + samples), slice(c, c + classes)


def pieces(*tensors: Tensor) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """Yield samples, classes and a piece (b, c, n) of each tensor (B, C, *spatial): several rows, or a part of one."""
    limit = _limit(tensors[0])
    for b, c in row_blocks(tensors[0]):
        rows = [tensor[b, c].flatten(2) for tensor in tensors]
        for parts in zip(*(row.split(limit, 2) for row in rows), strict=True):
            yield b, c, list(parts)


def union_pieces(voxels: Tensor, group: Sequence[int], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield the sample, where a group teaches, and of each tensor (B, C, *spatial) the parts' rows, piece by piece."""
    limit = _limit(voxels)
    for b in range(len(voxels)):
        where = voxels[b].flatten()
        rows = [[tensor[b, c].flatten() for c in group] for tensor in tensors]
        for start in range(0, len(where), limit):
            v = slice(start, start + limit)
            if not where.is_cpu or where[v].any():
                yield b, where[v], *([row[v] for row in parts] for parts in rows)


def group_voxels(target: Tensor, known: Tensor, group: Sequence[int], channel: int) -> Tensor:
    """Return where a group teaches, bool (B, *spatial): it is known to be present, of which of its parts is not known.

    target, known: (B, C + G, *spatial). channel: the group's own. Where every part is known to be absent the labels
    contradict each other, and nothing is taught.
    """
    taught = is_positive(target[:, channel]) & is_positive(known[:, channel])
    possible = torch.zeros_like(taught)
    for part in group:
        is_known = is_positive(known[:, part])
        taught &= ~(is_known & is_positive(target[:, part]))
        possible |= ~is_known
    return taught & possible


def is_positive(states: Tensor) -> Tensor:
    """Return target or known as bool."""
    return states if states.dtype == torch.bool else states > 0


def _limit(tensor: Tensor) -> int:
    return CPU_PIECE if tensor.is_cpu else GPU_PIECE


def _cleared(x: Tensor, y: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    # where() and not a product, which would let infinity and nan pass
    return torch.where(m > 0, x, 0.0), torch.where(m > 0, y, 0.0)


def _sums(
    x: Tensor, y: Tensor, m: Tensor, voxels: Tensor, gamma: float, scratch: Scratch, *, fast: bool = False
) -> Tensor:
    """Return true positives, predicted, pointwise, positive and known voxels (5, b, c) of a piece (b, c, n).

    fast: in fewer steps, but not finite for large logits.
    """
    p, my, spare = scratch("p", x), torch.mul(m, y, out=scratch("my", x)), scratch("spare", x)
    if fast:
        odds = torch.exp(x, out=scratch("loss", x))
        torch.div(odds, torch.add(odds, 1, out=p), out=p)
    else:
        torch.sigmoid(x, out=p)
    true_positive, predicted = _product_sums(p, my, spare), _product_sums(p, m, spare)
    if gamma:
        if_present, if_absent = softplus(-x), softplus(x)
        loss = y * if_present * torch.exp(-gamma * if_absent) + (1 - y) * if_absent * torch.exp(-gamma * if_present)
    else:
        loss = (odds.log1p_() if fast else softplus(x)).addcmul_(x, y, value=-1)
    return torch.stack([true_positive, predicted, _product_sums(loss, m, spare), my.sum(-1), voxels])


def _product_sums(a: Tensor, b: Tensor, spare: Tensor) -> Tensor:
    """Return the sums of a * b over the last axis of (b, c, n)."""
    if a.is_cpu and a.shape[:2] == (1, 1):
        return torch.dot(a.view(-1), b.view(-1)).view(1, 1)
    return torch.mul(a, b, out=spare).sum(-1)  # no matrix product: GPUs may round its factors to ten bits


def _slopes(x: Tensor, y: Tensor, of_sums: Tensor, gamma: float, scratch: Scratch) -> Tensor:
    """Return the gradient of a piece's known voxels. of_sums: (3, b, c, 1), that of the sums."""
    of_true_positive, of_predicted, of_pointwise = of_sums
    p = torch.sigmoid(x, out=scratch("p", x))
    slopes = torch.mul(y, of_true_positive, out=scratch("slopes", x)).add_(of_predicted)
    slopes *= torch.addcmul(p, p, p, value=-1, out=scratch("spare", x))
    if gamma:
        if_present, if_absent = softplus(-x), softplus(x)
        q = torch.exp(-if_absent)
        absent = (1 - y) * torch.exp(-gamma * if_present) * (p + gamma * q * if_absent)
        pointwise = absent - y * torch.exp(-gamma * if_absent) * (q + gamma * p * if_present)
    else:
        pointwise = torch.sub(p, y, out=scratch("spare", x))
    return slopes.addcmul_(pointwise, of_pointwise)


def _possible(
    x: Sequence[Tensor], m: Sequence[Tensor], where: Tensor, scratch: Scratch, group: Sequence[int]
) -> list[Tensor]:
    """Return the logits of a group's parts (n,) where they may be present, elsewhere one that means never."""
    never = torch.finfo(scratch.dtype).min / 4  # finite: sums of it stay numbers
    found = []
    for c, part, mask in zip(group, x, m, strict=True):
        part = part.to(scratch.dtype) if scratch.shift is None else part + scratch.shift[c]
        found.append(torch.where(where & ~is_positive(mask), part, never))
    return found


def _either(a: Tensor, b: Tensor) -> Tensor:
    """Return the logit of the union of two independent events of logits a and b."""
    return torch.logaddexp(torch.logaddexp(a, b), a + b)
