"""The loss's own kernel against the same formulas in plain autograd: values, gradients, and where they must be zero."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from cellmap_pipe.training import masked_sums
from cellmap_pipe.training.loss_options import PRESETS
from cellmap_pipe.training.losses import MaskedLoss, build_loss, pool

torch.set_num_threads(1)

GROUPS = [[0, 2], [1, 2, 3]]


def plain(
    loss: MaskedLoss, heads: Sequence[Tensor], target: Tensor, known: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Return the loss by its formula, in whole tensors and float64."""
    options, n_classes = loss.options, heads[0].shape[1]
    shape = (len(heads[0]), n_classes + len(loss.groups), *heads[0].shape[2:])
    known = known.double().expand(shape)
    target = torch.where(known > 0, target.double().expand(shape), 0.0)
    shares = loss.head_weights[: len(heads)]
    samples = torch.ones(len(heads[0])) if weight is None else weight
    total = torch.zeros((), dtype=torch.float64)
    for number, (head, share) in enumerate(zip(heads, shares, strict=False)):
        y, m = pool(target[:, :n_classes], known[:, :n_classes], head.shape[2:])
        axes = tuple(range(2, y.ndim))
        logits = head.double() + (loss.adjustment().view(1, -1, *[1] * len(axes)) if loss.adjusted else 0)
        x = torch.where(m > 0, logits, 0.0)
        p = torch.sigmoid(x)
        tp, fp, fn = (p * y * m).sum(axes), (p * (1 - y) * m).sum(axes), ((1 - p) * y * m).sum(axes)
        overlap = 1 - (tp + 1) / (tp + options.alpha * fp + options.beta * fn + 1)
        focal = y * (1 - p) ** options.gamma * functional.softplus(-x)
        focal = focal + (1 - y) * p**options.gamma * functional.softplus(x)
        pointwise = (m * focal).sum(axes) / m.sum(axes).clamp(min=1e-9)
        terms = [(overlap, (m * y).sum(axes) > 0, loss.class_weights), (pointwise, m.sum(axes) > 0, loss.class_weights)]
        if number == 0 and loss.groups:
            values, taught = plain_union(logits, target, known, loss.groups)
            terms.append((values, taught, loss.group_weights))
        for values, pairs, weights in terms:
            w = pairs * weights * samples[:, None]
            total = total + share / sum(shares) * (w * values).sum() / (w.sum() if w.sum() > 0 else 1.0)
    return total


def plain_union(
    logits: Tensor, target: Tensor, known: Tensor, groups: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Return the mean of -log P(union) of each (sample, group), and which have such voxels, voxel by voxel."""
    n_classes = logits.shape[1]
    x, y, m = logits.flatten(2), target.flatten(2), known.flatten(2)
    values, taught = [], []
    for b in range(len(x)):
        for g, group in enumerate(groups):
            terms = []
            for v in range(x.shape[2]):
                possible = [c for c in group if not m[b, c, v] > 0]
                present = any(m[b, c, v] > 0 and y[b, c, v] > 0 for c in group)
                if m[b, n_classes + g, v] > 0 and y[b, n_classes + g, v] > 0 and possible and not present:
                    terms.append(-torch.log(1 - torch.stack([1 - torch.sigmoid(x[b, c, v]) for c in possible]).prod()))
            values.append(torch.stack(terms).mean() if terms else x.new_zeros(()))
            taught.append(bool(terms))
    shape = (len(x), len(groups))
    return torch.stack(values).view(shape), torch.tensor(taught).view(shape)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "alpha": st.sampled_from([0.0, 0.2, 1.5]),
        "beta": st.sampled_from([0.4, 1]),
        "gamma": st.sampled_from([0, 0.5, 1, 3.0]),
        "tau": st.sampled_from([0, 0.3, 2.0]),
        "adjustment": st.sampled_from(["add", "subtract"]),
    },
)


@given(
    preset=st.sampled_from(sorted(PRESETS)),
    options=OPTIONS,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    states=st.sampled_from([torch.bool, torch.uint8, torch.float32, "soft"]),
    mask=st.sampled_from(["voxel", "class", "image"]),
    rates=st.sampled_from([(0.0, 0.3), (0.5, 0.0), (0.6, 0.3), (1.0, 0.5)]),
    grouped=st.booleans(),
    weighted=st.booleans(),
    n_heads=st.integers(1, 3),
    piece=st.sampled_from([50, 300, 2**16]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_value_and_gradient_are_those_of_the_plain_formula(
    preset: str,
    options: Mapping[str, Any],
    dtype: torch.dtype,
    states: Any,
    mask: str,
    rates: tuple[float, float],
    grouped: bool,
    weighted: bool,
    n_heads: int,
    piece: int,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    groups = GROUPS if grouped else []
    shape = (2, 4 + len(groups), 4, 6, 5)
    loss = build_loss(
        {"loss": preset, "loss_options": options, "deep_supervision": [1, 0.5, 0.2], "class_weights": [1, 2, 0.5, 3]},
        4,
        groups=groups,
    )
    loss.observe(torch.tensor([[5.0, 0, 70, 3], [10, 0, 100, 3000]]))
    masks = {"voxel": shape, "class": (*shape[:2], 1, 1, 1), "image": (shape[0], 1, *shape[2:])}
    known = torch.rand(masks[mask], generator=random)
    known = known * (known < rates[0]) if states == "soft" else (known < rates[0]).to(states)
    target = torch.rand(shape, generator=random)
    target = target if states == "soft" else (target < rates[1]).to(states)
    weight = torch.tensor([0.7, 0.2]) if weighted else None
    sizes = [(4, 6, 5), (2, 3, 3), (1, 2, 2)][:n_heads]
    heads = [(3 * torch.randn((2, 4, *size), generator=random)).to(dtype).requires_grad_() for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked_sums, "CPU_PIECE", piece)
        value = loss(heads, target, known, weight)
        gradients = torch.autograd.grad(value, heads)
    expected = plain(loss, heads, target, known, weight)
    wanted = torch.autograd.grad(expected, heads)
    assert value.dtype == dtype
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6, abs=1e-12)
    norm = torch.stack([gradient.double().norm() for gradient in wanted]).norm()
    for found, gradient in zip(gradients, wanted, strict=True):
        assert (found.double() - gradient.double()).norm() <= 1e-6 * norm


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded"])
def test_any_memory_layout_of_the_logits_gives_the_same(layout: str) -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 4, 6, 5, generator=random)
    if layout == "expanded":
        logits = logits[:1].expand(2, -1, -1, -1, -1)
    given = logits.contiguous(memory_format=torch.channels_last_3d) if layout == "channels_last" else logits
    given.requires_grad_()
    target, known = (torch.rand(logits.shape, generator=random) > 0.5 for _ in range(2))
    loss = build_loss({}, 4)
    (found,) = torch.autograd.grad(loss(given, target, known), given)
    expected = plain(loss, [given], target, known)
    assert difference(found, torch.autograd.grad(expected, given)[0]) <= 1e-6


@pytest.mark.parametrize("gamma", [0.0, 2.0, 0.7])
def test_gradient_is_the_slope_of_the_value(gamma: float) -> None:
    random = torch.Generator().manual_seed(1)
    heads = [torch.randn(2, 4, *size, generator=random, dtype=torch.float64) for size in ((2, 3), (1, 2))]
    target = torch.rand(2, 6, 2, 3, generator=random) > 0.5
    known = torch.rand(2, 6, 2, 3, generator=random) > 0.4
    settings = {"loss_options": {"gamma": gamma, "tau": 1}, "deep_supervision": [1, 0.5]}
    loss = build_loss(settings, 4, groups=GROUPS)
    loss.observe(torch.tensor([[5.0, 0, 70, 3], [10, 0, 100, 3000]]))
    assert torch.autograd.gradcheck(lambda *x: loss(list(x), target, known), [x.requires_grad_() for x in heads])


def test_half_precision_logits_get_half_precision_gradients() -> None:
    random = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 4, 3, 4, generator=random).bfloat16().requires_grad_()
    target, known = (torch.rand(2, 6, 3, 4, generator=random) > 0.4 for _ in range(2))
    loss = build_loss({"loss_options": {"tau": 1}}, 4, groups=GROUPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits, target, known)
    value.backward()
    single = logits.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(loss(single, target, known), single)
    assert value.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad, expected.bfloat16())


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf])
def test_nonsense_in_unknown_voxels_is_not_seen(preset: str, nonsense: float) -> None:
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 4, 3, 4, 5, generator=random)
    target, known = (torch.rand(2, 6, 3, 4, 5, generator=random) > 0.5 for _ in range(2))
    loss = build_loss({"loss": preset}, 4, groups=GROUPS)
    unseen = ~known[:, :4]
    for g, group in enumerate(GROUPS):
        taught = masked_sums.group_voxels(target, known, group, 4 + g)
        for part in group:
            unseen[:, part] &= ~taught
    clean, spoilt = logits.requires_grad_(), torch.where(unseen, nonsense, logits.detach()).requires_grad_()
    answers = torch.where(known, target.float(), nonsense)
    values = [loss(clean, target, known), loss(spoilt, answers, known)]
    (expected,), (found,) = (torch.autograd.grad(value, x) for value, x in zip(values, (clean, spoilt), strict=True))
    assert values[0] == values[1]
    assert torch.equal(found, expected)
    assert torch.all(found[unseen] == 0)
    assert torch.all(found[~unseen] != 0)


@pytest.mark.parametrize("gamma", [0, 2])
def test_logits_whose_exponential_overflows_are_as_good_as_others(gamma: int) -> None:
    random = torch.Generator().manual_seed(4)
    logits = (200 * torch.randn(1, 4, 3, 4, generator=random)).requires_grad_()
    target, known = (torch.rand(1, 4, 3, 4, generator=random) > 0.4 for _ in range(2))
    loss = build_loss({"loss_options": {"gamma": gamma}}, 4)
    value, expected = loss(logits, target, known), plain(loss, [logits], target, known)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    (found,), (wanted,) = (torch.autograd.grad(scalar, logits) for scalar in (value, expected))
    assert difference(found, wanted) <= 1e-6


def test_saturated_logits_keep_their_gradient() -> None:
    """At -200 the probability of each part is 0 in single precision, that of their union has a slope all the same."""
    cases = [
        ([-200, -200], 200 - math.log(2), [-0.5, -0.5]),
        ([-200, -190], 190, [0, -1]),
        ([300, -5], 0, [0, 0]),
    ]
    for values, expected, wanted in cases:
        logits = torch.tensor(values, dtype=torch.float32).view(1, 2, 1).requires_grad_()
        known = torch.tensor([False, False, True]).view(1, 3, 1)
        value = build_loss({}, 2, groups=[[0, 1]])(logits, torch.ones(1, 3, 1), known)
        value.backward()
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad.flatten(), torch.tensor(wanted, dtype=torch.float32), atol=1e-4, rtol=0)
        assert float(value.detach()) == pytest.approx(expected, abs=1e-3)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    logits = torch.randn(1, 2, 3, requires_grad=True)
    value = build_loss({}, 2)(logits, torch.ones(1, 2, 3), torch.ones(1, 2, 3))
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_numbers_are_looked_at_on_a_cpu_alone() -> None:
    """Tensors that hold none, as if on a GPU, which a look would wait for, go through all of it without an error."""
    with torch.device("meta"):
        loss = build_loss({"loss": "balanced_tversky"}, 4, groups=GROUPS)
        logits = torch.zeros(2, 4, 8, 8, 8, dtype=torch.bfloat16, requires_grad=True)
        target, known = (torch.zeros(2, 6, 8, 8, 8, dtype=torch.bool) for _ in range(2))
        loss.observe(loss.counts(target, known))
        assert loss.totals(target, known, torch.ones(2)).shape == (3,)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(masked_sums, "GPU_PIECE", 1500)
            sums, counts, union, taught = masked_sums.MaskedSums.apply(
                logits, target, known, loss.adjustment(), 0.0, GROUPS
            )
            (sums.sum() + union.sum()).backward()
    assert (sums.shape, counts.shape) == ((3, 2, 4), (2, 2, 4))
    assert union.shape == taught.shape == (2, 2)
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape
    with pytest.raises(RuntimeError, match="meta"):
        float(sums.detach().sum())
