"""The masked loss: against its formula voxel by voxel, and on the points where a careless one goes wrong."""

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed

sys.path.insert(0, str(Path(__file__).parent))
from training_case import finish, in_ranks

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.training.losses import build_loss, pool

torch.set_num_threads(1)


def batch(seed: int, shape: tuple[int, ...] = (2, 3, 4, 4, 4)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=random)
    return (
        logits.requires_grad_(),
        (torch.rand(shape, generator=random) > 0.7).float(),
        (torch.rand(shape, generator=random) > 0.4).float(),
    )


def plain(x: np.ndarray, y: np.ndarray, m: np.ndarray, weights: list[float]) -> float:
    """Return the documented formula, voxel by voxel."""
    terms = np.zeros(2)
    totals = np.zeros(2)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            tp = predicted = positive = bce = voxels = 0.0
            for xv, yv, mv in zip(x[b, c].ravel(), y[b, c].ravel(), m[b, c].ravel(), strict=True):
                if not mv:
                    continue
                p = 1 / (1 + math.exp(-xv))
                tp += p * yv
                predicted += p
                positive += yv
                bce -= yv * math.log(p) + (1 - yv) * math.log(1 - p)
                voxels += 1
            if voxels:
                terms[1] += weights[c] * bce / voxels
                totals[1] += weights[c]
            if positive:
                terms[0] += weights[c] * (1 - (tp + 1) / ((predicted + positive) / 2 + 1))
                totals[0] += weights[c]
    return float(sum(term / total for term, total in zip(terms, totals, strict=True) if total))


@given(seed=st.integers(0, 10_000), known=st.sampled_from([0.0, 0.1, 0.6, 1.0]), positive=st.sampled_from([0.0, 0.3]))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_value_is_that_of_the_formula(seed: int, known: float, positive: float) -> None:
    random = np.random.default_rng(seed)
    x = random.normal(size=(2, 2, 2, 3, 2))
    y, m = random.random(x.shape) < positive, random.random(x.shape) < known
    weights = [1.0, 3.0]
    loss = build_loss({"class_weights": weights}, 2)(torch.tensor(x), torch.tensor(y), torch.tensor(m))
    assert float(loss) == pytest.approx(plain(x, y, m, weights), rel=1e-5, abs=1e-6)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_unknown_voxels_give_no_gradient(seed: int) -> None:
    logits, target, known = batch(seed)
    known[0, 1] = 0
    build_loss({}, 3)(logits, target, known).backward()
    assert logits.grad is not None
    assert torch.all(logits.grad[known == 0] == 0)
    assert torch.all(logits.grad[known > 0] != 0)


def test_what_stands_in_unknown_voxels_does_not_matter() -> None:
    logits, target, known = batch(1)
    loss = build_loss({}, 3)
    expected = loss(logits, target, known)
    for nonsense in (1.0, float("nan")):
        assert loss(logits, torch.where(known > 0, target, nonsense), known) == expected


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf])
def test_logits_of_unknown_voxels_do_not_matter(nonsense: float) -> None:
    logits, target, known = batch(1)
    loss = build_loss({"deep_supervision": [1]}, 3)
    spoilt = torch.where(known > 0, logits.detach(), nonsense).requires_grad_()
    unused = torch.full((2, 3, 2, 2, 2), nonsense, requires_grad=True)
    value = loss([spoilt, unused], target, known)
    assert value == loss(logits, target, known)
    value.backward()
    assert spoilt.grad is not None
    assert torch.isfinite(spoilt.grad).all()
    assert torch.all(spoilt.grad[known == 0] == 0)
    assert unused.grad is not None
    assert torch.all(unused.grad == 0)


def test_masks_and_targets_broadcast_or_are_refused() -> None:
    logits, target, known = batch(1)
    loss = build_loss({}, 3)
    classes = torch.tensor([[1, 0, 1], [0, 1, 1]]).view(2, 3, 1, 1, 1)
    assert loss(logits, target, classes) == loss(logits, target, classes.expand_as(logits))
    assert loss(logits, classes, known) == loss(logits, classes.expand_as(logits), known)
    with pytest.raises(ValueError, match=r"\(2, 3, 2, 2, 2\) does not broadcast to the logits' \(2, 3, 4, 4, 4\)"):
        loss(logits, target, known[..., :2, :2, :2])


def test_nothing_known_gives_zero_attached_to_the_graph() -> None:
    logits, target, known = batch(2)
    loss = build_loss({"deep_supervision": [1, 0.5]}, 3)([logits, logits[..., ::2, ::2, ::2]], target, 0 * known)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert torch.all(logits.grad == 0)


def test_class_without_positives_learns_from_the_cross_entropy_alone() -> None:
    logits, target, known = batch(3)
    target[:, 1] = 0
    build_loss({}, 3)(logits, target, known).backward()
    assert logits.grad is not None
    # six (sample, class) pairs have known voxels; the derivative of softplus is the sigmoid
    shares = known[:, 1] / known[:, 1].sum((1, 2, 3), keepdim=True)
    torch.testing.assert_close(logits.grad[:, 1], shares * torch.sigmoid(logits.detach()[:, 1]) / 6)


def test_class_weights_do_not_scale_the_loss() -> None:
    logits, target, known = batch(4)
    once = build_loss({"class_weights": [1, 2, 4]}, 3)(logits, target, known)
    assert float(build_loss({"class_weights": [8, 16, 32]}, 3)(logits.detach(), target, known)) == pytest.approx(
        float(once.detach())
    )


def test_heads_are_weighted_and_normalised() -> None:
    logits, target, known = batch(5)
    coarse = torch.nn.functional.avg_pool3d(logits, 2)
    one = build_loss({}, 3)
    both = build_loss({"deep_supervision": [1, 0.5, 0.25]}, 3)([logits, coarse], target, known)
    expected = one(logits, target, known) / 1.5 + 0.5 * one(coarse, *pool(target, known, coarse.shape[2:])) / 1.5
    assert float(both.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_head_beyond_the_weights_stays_in_the_graph() -> None:
    logits, target, known = batch(6)
    second = torch.zeros(2, 3, 2, 2, 2, requires_grad=True)
    build_loss({"deep_supervision": [1]}, 3)([logits, second], target, known).backward()
    assert second.grad is not None
    assert torch.all(second.grad == 0)


def test_coarse_targets_are_shares_of_what_is_known() -> None:
    target = torch.tensor([1.0, 0, 1, 1, 1, 1, 0, 0]).view(1, 1, 8)
    known = torch.tensor([1.0, 1, 0, 1, 0, 0, 1, 1]).view(1, 1, 8)
    shares, mask = pool(target, known, (4,))
    assert shares.flatten().tolist() == [0.5, 1, 0, 0]
    assert mask.flatten().tolist() == [1, 0.5, 0, 1]


def test_sample_weights_mix_two_answers() -> None:
    logits, target, known = batch(7, (1, 3, 4, 4, 4))
    other = 1 - target
    known = torch.ones_like(known)
    loss = build_loss({}, 3)
    twice = logits.expand(2, -1, -1, -1, -1)
    mixed = loss(twice, torch.cat([target, other]), torch.cat([known, known]), torch.tensor([0.8, 0.2]))
    expected = 0.8 * loss(logits, target, known) + 0.2 * loss(logits, other, known)
    assert float(mixed.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_half_precision_logits_are_added_up_in_single_precision() -> None:
    logits, target, known = batch(8)
    half = logits.detach().bfloat16()
    loss = build_loss({}, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(half, target, known)
    assert value.dtype == torch.float32
    assert value == loss(half.float(), target, known)


def test_passes_add_up_to_the_joint_batch() -> None:
    logits, target, known = batch(10, (4, 3, 8, 8, 8))
    known[0, 1:] = 0  # a crop with one annotated class among crops with many
    target[1, 2] = 0
    weight = torch.tensor([1.0, 0.3, 0.7, 1.0])
    loss = build_loss({"class_weights": [1, 2, 5], "deep_supervision": [1, 0.5]}, 3)

    def heads(x: torch.Tensor) -> list[torch.Tensor]:
        return [x, torch.nn.functional.avg_pool3d(x, 3, 2, 1)]

    joint = loss(heads(logits), target, known, weight)
    (expected,) = torch.autograd.grad(joint, logits)
    passes = [slice(0, 1), slice(1, 2), slice(2, 4)]
    totals = torch.stack([loss.totals(target[part], known[part], weight[part]) for part in passes]).sum(0)
    values = [loss(heads(logits[part]), target[part], known[part], weight[part], totals) for part in passes]
    (found,) = torch.autograd.grad(torch.stack(values).sum(), logits)
    assert float(torch.stack(values).detach().sum()) == pytest.approx(float(joint.detach()), rel=1e-6)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_passes_with_groups_add_up_to_the_joint_batch() -> None:
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 3, 8, 8, generator=random, requires_grad=True)
    target, known = (torch.rand(4, 5, 8, 8, generator=random) > 0.5 for _ in range(2))
    known[0, 3] = False  # no voxel of the first group in the first sample
    known[1, :3] = True  # parts known everywhere: nothing to learn from groups
    weight = torch.tensor([1.0, 0.3, 0.7, 1.0])
    loss = build_loss({"class_weights": [1, 2, 5]}, 3, groups=[[0, 1], [1, 2]])
    joint = loss(logits, target, known, weight)
    (expected,) = torch.autograd.grad(joint, logits)
    passes = [slice(0, 1), slice(1, 2), slice(2, 4)]
    totals = torch.stack([loss.totals(target[part], known[part], weight[part]) for part in passes]).sum(0)
    assert totals.tolist() == pytest.approx([8 * 3.0, 8 * 3.0, 1.5 * 1.7 + 3.5 * 2.7])
    values = [loss(logits[part], target[part], known[part], weight[part], totals) for part in passes]
    (found,) = torch.autograd.grad(torch.stack(values).sum(), logits)
    assert float(torch.stack(values).detach().sum()) == pytest.approx(float(joint.detach()), rel=1e-6)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


SHARED = {"class_weights": [1.0, 2.0, 5.0], "deep_supervision": [1, 0.5, 0], "loss": "balanced_tversky"}


class Heads(torch.nn.Module):
    """Three outputs, of which the last has no weight in the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Conv3d(1, 3, 3, padding=1, stride=2**n) for n in range(3))

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [layer(image) for layer in self.layers]


def joint_batch() -> tuple[torch.Tensor, ...]:
    """Return image, target and known-mask, with two groups, and the weights of four samples."""
    random = torch.Generator().manual_seed(1)
    target, known = ((torch.rand(4, 5, 8, 8, 8, generator=random) > limit).float() for limit in (0.7, 0.4))
    known[:2, 0] = 0  # what a rank knows differs from what the batch knows
    known[2:, 1] *= target[2:, 1]
    known[2:, 4] = 0  # a group that one rank alone learns from
    return torch.rand(4, 1, 8, 8, 8, generator=random), target, known, torch.tensor([1.0, 0.3, 0.7, 1.0])


def save_gradient(environment: dict[str, str], folder: str) -> None:
    os.environ.update(environment)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    network = torch.nn.parallel.DistributedDataParallel(Heads())
    loss = build_loss(SHARED, 3, groups=[[0, 1], [1, 2]])
    for _ in range(2):  # a parameter without gradient is an error in the second
        image, target, known, weight = (part.chunk(2)[rank] for part in joint_batch())
        counts = loss.counts(target, known)
        distributed.all_reduce(counts)
        loss.observe(counts)
        network.zero_grad()
        value = loss(network(image), target, known, weight)
        value.backward()
    distributed.all_reduce(value := value.detach().clone())
    if not rank:
        torch.save([value / 2, *(parameter.grad for parameter in network.parameters())], f"{folder}/found.pt")
    distributed.barrier()


def test_two_ranks_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    image, target, known, weight = joint_batch()
    network, loss = Heads(), build_loss(SHARED, 3, groups=[[0, 1], [1, 2]])
    loss.observe(loss.counts(target, known))
    expected = loss(network(image), target, known, weight)
    expected.backward()
    assert finish(*in_ranks(2, save_gradient, str(tmp_path))) == [0, 0]
    value, *gradients = torch.load(tmp_path / "found.pt", weights_only=True)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-6)
    wanted = [parameter.grad for parameter in network.parameters()]
    norm = torch.stack([gradient.norm() for gradient in wanted]).norm()
    assert norm > 0
    for found, gradient in zip(gradients, wanted, strict=True):
        assert (found - gradient).norm() <= 1e-6 * norm
    assert all(not gradient.any() for gradient in gradients[4:])


def test_unknown_preset_or_wrong_number_of_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.loss 'dice' is unknown; allowed: .*dice_bce"):
        build_loss({"loss": "dice"}, 3)
    with pytest.raises(ConfigError, match="2 entries for 3 classes"):
        build_loss({"class_weights": [1, 2]}, 3)
    with pytest.raises(ConfigError, match="must be finite and not negative"):
        build_loss({"class_weights": [1, -2, 1]}, 3)
    with pytest.raises(ConfigError, match="no class is learnt"):
        build_loss({"class_weights": [0, 0, 0]}, 3)


def test_no_deep_supervision_is_the_first_output_alone() -> None:
    logits, target, known = batch(1)
    heads = [logits, logits[..., ::2, ::2, ::2]]
    for none in (None, []):
        assert build_loss({"deep_supervision": none}, 3)(heads, target, known) == build_loss({}, 3)(
            logits, target, known
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0, "beta": 0}, "alpha and beta are both 0"),
        ({"gamma": -1}, r"train\.loss_options\.gamma is -1"),
        ({"tau": math.nan}, r"train\.loss_options\.tau is nan"),
        ({"beta": "high"}, r"train\.loss_options\.beta is 'high'"),
        ({"adjustment": "multiply"}, r"adjustment 'multiply' is unknown; allowed: add, subtract"),
        ({"delta": 1}, r"train\.loss_options: 'delta' is unknown; allowed: alpha, beta"),
    ],
)
def test_options_that_make_no_loss_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_loss({"loss_options": options}, 3)


def test_presets_are_options_by_name() -> None:
    logits, target, known = batch(12)
    options = {
        "tversky_bce": {"alpha": 0.3, "beta": 0.7},
        "dice_focal": {"gamma": 2},
        "balanced_tversky": {"alpha": 0.6, "beta": 0.4, "tau": 0.5},
    }
    found = {"dice_bce": float(build_loss({}, 3)(logits.detach(), target, known))}
    for preset, changes in options.items():
        losses = [build_loss({"loss": preset}, 3), build_loss({"loss_options": changes}, 3)]
        for loss in losses:
            loss.observe(loss.counts(target, known))
        values = [float(loss(logits.detach(), target, known)) for loss in losses]
        assert values[0] == values[1]
        found[preset] = values[0]
    assert len(set(found.values())) == 4


def test_focal_loss_is_that_of_the_paper() -> None:
    logits, target, known = batch(13)
    target[:] = 0  # no overlap term
    value = build_loss({"loss": "dice_focal"}, 3)(logits, target, torch.ones_like(known))
    p = torch.sigmoid(logits.detach())
    assert float(value.detach()) == pytest.approx(float((-(p**2) * torch.log(1 - p)).mean()), rel=1e-5)


def test_prior_is_the_positive_share_of_annotated_voxels() -> None:
    loss = build_loss({"loss_options": {"tau": 0.5}}, 3)
    assert loss.adjusted
    assert loss.adjustment().tolist() == [0, 0, 0]
    target = torch.tensor([1, 0, 0, 0, 1, 1, 1, 1]).view(2, 1, 4).expand(2, 3, 4)
    known = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).view(2, 1, 4).repeat(1, 3, 1)
    known[:, 1] = 0
    known[:, 2] = 1
    counts = loss.counts(target, known)
    assert counts.tolist() == [[1, 0, 5], [4, 0, 8]]
    loss.observe(counts)
    wanted = [0.5 * math.log(1 / 3), 0, 0.5 * math.log(5 / 3)]
    assert loss.adjustment().tolist() == pytest.approx(wanted)
    loss.observe(torch.tensor([[0.0, 3, 0], [0, 3, 0]]))  # nothing known of two classes, all of one positive
    assert loss.adjustment().tolist() == pytest.approx([wanted[0], 2, wanted[2]])
    loss.observe(1e9 * torch.tensor([[0.0, 0, 1], [1, 0, 2]]))
    assert loss.adjustment().tolist() == pytest.approx([-2, 2, 0], abs=1e-4)


def test_prior_forgets_and_is_saved_but_the_weights_are_not() -> None:
    settings = {"loss": "balanced_tversky", "class_weights": [1, 2]}
    loss = build_loss(settings, 2)
    for _ in range(3000):
        loss.observe(torch.tensor([[50.0, 90], [100, 100]]))
    before = loss.adjustment()
    for _ in range(6000):
        loss.observe(torch.tensor([[10.0, 10], [100, 100]]))
    assert before.tolist() == pytest.approx([0, 0.5 * math.log(9)])
    assert loss.adjustment().tolist() == pytest.approx([0.5 * math.log(1 / 9)] * 2, rel=0.05)
    state = loss.state_dict()
    assert {str(value.dtype) for value in state.values()} == {"torch.float64"}
    again = build_loss({**settings, "class_weights": [3, 4]}, 2)
    again.load_state_dict(state)
    assert again.adjustment().equal(loss.adjustment())
    assert again.class_weights.tolist() == [3, 4]


def test_rare_class_gets_higher_logits_by_adding_and_lower_by_subtracting() -> None:
    target = torch.zeros(1, 1, 1000)
    target[..., :100] = 1
    known = torch.ones_like(target)

    def learnt(**options: object) -> float:
        loss = build_loss({"loss_options": options}, 1)
        loss.observe(loss.counts(target, known))
        bias = torch.zeros(1, requires_grad=True)
        for _ in range(100):
            (gradient,) = torch.autograd.grad(loss(bias.expand(1, 1, 1000), target, known), bias)
            bias = (bias - 5 * gradient).detach().requires_grad_()
        return float(bias.detach())

    shift = 0.5 * math.log(0.1 / 0.9)
    assert learnt(tau=0.5) == pytest.approx(learnt() - shift, abs=1e-3)
    assert learnt(tau=0.5, adjustment="subtract") == pytest.approx(learnt() + shift, abs=1e-3)


def test_automatic_weights_follow_rarity_within_a_factor_of_ten() -> None:
    prevalence = [0.09, 0.01, 0.04, math.nan, 0.0, 1e-9]
    weights = build_loss({"class_weights": "auto"}, 6, prevalence=prevalence).class_weights.tolist()
    assert sum(weights) == pytest.approx(6)
    ratios = [weight / weights[0] for weight in weights]
    middle = (5 + 10) / 2 * 0.3  # the median of 10/3, 10, 5 and 31623, over the first
    assert ratios == pytest.approx([1, 3, 1.5, middle, middle, 10 * middle])
    assert build_loss({"class_weights": "auto"}, 2, prevalence=[math.nan] * 2).class_weights.tolist() == [1, 1]
    with pytest.raises(ConfigError, match=r"train\.class_weights auto needs the classes' prevalence"):
        build_loss({"class_weights": "auto"}, 3)


def test_group_raises_its_parts_where_they_are_unknown_and_only_there() -> None:
    """Voxels: parts unknown; a part known present; one part known absent; all absent; group absent; group unknown."""
    target = torch.tensor([[0, 1, 0, 0, 0, 0], [0] * 6, [0] * 6, [1, 1, 1, 1, 0, 1]]).view(1, 4, 6)
    known = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0], [0] * 6, [1, 1, 1, 1, 1, 0]]).view(1, 4, 6)
    logits = torch.zeros(1, 3, 6, requires_grad=True)
    loss = build_loss({}, 3, groups=[[0, 1]])
    with_group = torch.autograd.grad(loss(logits, target, known), logits)[0]
    classes_alone = torch.autograd.grad(build_loss({}, 3)(logits, target[:, :3], known[:, :3]), logits)[0]
    term = with_group - classes_alone
    # two voxels: -log(1 - 1/4) by both parts, -log(1/2) by the only one possible
    wanted = torch.zeros(3, 6)
    wanted[:2, 0], wanted[1, 2] = -(1 / 2) / 3 / 2, -(1 / 2) / 2
    torch.testing.assert_close(term[0], wanted)


def test_coarser_outputs_learn_nothing_from_groups() -> None:
    fine, coarse = torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, 2, requires_grad=True)
    known = torch.tensor([0, 0, 1]).view(1, 3, 1).expand(1, 3, 4)
    loss = build_loss({"deep_supervision": [1, 1]}, 2, groups=[[0, 1]])
    of_fine, of_coarse = torch.autograd.grad(loss([fine, coarse], torch.ones_like(known), known), [fine, coarse])
    assert torch.all(of_fine < 0)
    assert torch.all(of_coarse == 0)


def test_group_without_parts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.groups: entry 2 has no parts"):
        build_loss({}, 3, groups=[[0, 1], []])
    with pytest.raises(ValueError, match=r"\[3\] has parts that are none of 3 classes"):
        build_loss({}, 3, groups=[[3]])


def test_voxels_known_by_their_group_alone_teach_a_part_to_be_found() -> None:
    """A part looks in two ways, one of which is annotated as the group only, among voxels that the other part is not.

    Features: one for each look of the first part, one for the second part.
    """
    random = torch.Generator().manual_seed(0)
    look = torch.randint(0, 4, (1000,), generator=random)  # 0 and 1: of the first part, 2: the second, 3: neither
    features = (torch.nn.functional.one_hot(look, 4).T[:3] + 0.1 * torch.randn(3, 1000, generator=random))[None]
    target = torch.stack([look < 2, look == 2, look < 3])[None]
    known = torch.ones_like(target)
    known[0, 0, look == 1] = False

    def recall(groups: list[list[int]]) -> float:
        torch.manual_seed(0)
        layer = torch.nn.Conv1d(3, 2, 1)
        optimizer = torch.optim.Adam(layer.parameters(), 0.05)
        loss = build_loss({}, 2, groups=groups)
        channels = 2 + len(groups)
        for _ in range(200):
            optimizer.zero_grad()
            loss(layer(features), target[:, :channels], known[:, :channels]).backward()
            optimizer.step()
        with torch.no_grad():
            return float((layer(features)[0, 0, look < 2] > 0).float().mean())

    assert recall([]) < 0.7
    assert recall([[0, 1]]) > 0.95
