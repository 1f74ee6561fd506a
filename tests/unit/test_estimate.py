"""The estimate of memory: fake passes against real ones, against measurements, and what is refused."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training_case import SETTINGS

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.training.estimate import (
    CONTEXT_BYTES,
    FAKE,
    FLOAT_BYTES,
    PIECE_BUFFERS,
    Alive,
    check_network,
    describe,
    measure_pass,
    memory_line,
    smallest_patch,
    training_memory,
    training_pass,
    try_network,
)
from cellmap_pipe.training.losses import build_loss
from cellmap_pipe.training.masked_sums import GPU_PIECE, MaskedSums
from cellmap_pipe.training.networks import SegmentationNetwork, build_network

CUBE = {"network": "SegResNetDS", "arguments": {"init_filters": 8, "blocks_down": [1, 1, 1, 1]}, "patch": [16, 24, 16]}
NETWORKS = [
    CUBE,
    {
        "network": "FlexibleUNet",
        "arguments": {"backbone": "resnet10"},
        "patch": [1, 64, 32],
        "spatial_dims": 2,
    },
    {
        "network": "SwinUNETR",
        "arguments": {"feature_size": 12, "depths": [1, 1, 1, 1], "use_v2": True},
        "patch": [32, 32, 64],
    },
    {"network": "UNETR", "arguments": {"hidden_size": 48, "mlp_dim": 96, "num_heads": 4}, "patch": [16, 32, 32]},
    {"network": "UNet", "arguments": {"channels": [4, 8], "strides": [2]}, "patch": [8, 8, 8]},
]

# GiB that autograd keeps in float32 for one patch and 14 classes, measured in real runs. Weights of linear layers were
# in the figures, for autograd keeps their transposed views; those are memory that the weights take anyway.
MEASURED = {
    "SegResNetDS": ({"init_filters": 32, "blocks_down": [1, 2, 2, 4, 4], "dsdepth": 4}, 64, 0.46, 163),
    "SwinUNETR": ({"feature_size": 48, "use_v2": True}, 64, 1.60, 209),
    "BasicUNet": (
        {"features": [64, 128, 256, 512, 1024, 64], "act": ["relu", {"inplace": True}], "norm": "batch", "bias": False},
        *(64, 1.07, 537),
    ),
}


def settings_of(**changes):
    return {**SETTINGS, **changes}


def built(settings):
    torch.manual_seed(0)
    return build_network(
        settings["network"],
        settings["arguments"],
        patch=settings["patch"],
        n_classes=len(settings["classes"]),
        spatial_dims=settings["spatial_dims"],
    ).train()


@pytest.mark.parametrize(
    ("network", "amp"),
    # SwinUNETR, whose real pass takes seconds, is compared with a figure measured before
    [(NETWORKS[0], "none"), (NETWORKS[0], "bf16"), (NETWORKS[1], "none"), (NETWORKS[3], "bf16"), (NETWORKS[4], "none")],
    ids=lambda value: value if isinstance(value, str) else value["network"],
)
def test_a_fake_pass_keeps_exactly_what_a_real_one_keeps(network, amp):
    settings = settings_of(**network, amp=amp)
    network = built(settings)
    fake = training_pass(network, settings, 2)
    real = measure_pass(network, torch.zeros(2, 1, *settings["patch"]), bf16=amp == "bf16")
    assert fake.method == FAKE
    assert (fake.heads, fake.frozen, fake.head_bytes) == (real.heads, real.frozen, real.head_bytes)
    # in bf16 a real normalisation keeps its means in float32, a fake one in bf16: a few bytes for each channel
    assert fake.saved == pytest.approx(real.saved, rel=0 if amp == "none" else 5e-3)
    assert fake.flops == real.flops > 0
    # operations inside of which a real pass has memory of its own are one operation more in a fake one
    assert fake.peak == pytest.approx(real.peak, rel=0.1)
    assert fake.peak >= fake.saved


@pytest.mark.parametrize("name", MEASURED)
def test_a_pass_keeps_what_was_measured_at_real_sizes(name):
    arguments, size, gib, gflop = MEASURED[name]
    settings = settings_of(
        network=name, arguments=arguments, patch=[size] * 3, amp="none", classes=[str(n) for n in range(14)]
    )
    network = built(settings)
    linear = sum(layer.weight.nbytes for layer in network.modules() if isinstance(layer, torch.nn.Linear))
    found = training_pass(network, settings, 1)
    assert (found.saved + linear) / 2**30 == pytest.approx(gib, rel=0.03)
    assert found.flops / 1e9 == pytest.approx(gflop, rel=0.01)


def test_the_parts_that_depend_on_the_weights_are_multiples_of_them():
    settings = settings_of(**CUBE, ema=True, optimizer="adamw")
    network = built(settings)
    weights = sum(p.nbytes for p in network.parameters())
    alone, paired = training_memory(settings), training_memory(settings, gpus=2)
    assert (alone.weights, alone.gradients, alone.optimizer, alone.average) == (weights, weights, 2 * weights, weights)
    assert (alone.buckets, paired.buckets) == (0, weights)
    assert alone.context == CONTEXT_BYTES
    assert paired.total == alone.total + weights
    plain = training_memory({**settings, "ema": False, "optimizer": "sgd"})
    assert (plain.average, plain.optimizer) == (0, weights)
    assert training_memory({**settings, "optimizer": "sgd", "momentum": 0.0}).optimizer == 0


def test_frozen_parameters_have_neither_gradient_nor_state():
    settings = settings_of(**{**NETWORKS[3], "patch": [16, 16, 16]})
    network = built(settings)
    memory = training_memory(settings)
    frozen = [name for name, _ in network.named_parameters() if "norm_cross_attn" in name]
    assert training_pass(network, settings, 1).frozen == tuple(frozen)
    unused = sum(p.nbytes for name, p in network.named_parameters() if name in frozen)
    assert memory.gradients == memory.weights - unused > 0


def test_mixed_and_accumulated_patches_take_more():
    settings = settings_of(**CUBE, mixup={"probability": 0.0, "alpha": 0.4}, accumulate=1)
    plain = training_memory(settings)
    mixed = training_memory({**settings, "mixup": {"probability": 0.1, "alpha": 0.4}})
    assert mixed.loss >= 2 * plain.loss
    assert mixed.inputs >= 2 * plain.inputs
    assert mixed.activations == plain.activations
    assert training_memory({**settings, "accumulate": 4}).inputs > plain.inputs
    assert training_memory({**settings, "groups": ["mito"]}).inputs > plain.inputs


class Conscious(torch.nn.Module):
    """A network that looks at what it computes."""

    def __init__(self, look):
        super().__init__()
        self.layer, self.look = torch.nn.Conv3d(1, 3, 3, padding=1), look

    def forward(self, image):
        found = self.layer(image)
        return found * (2 if self.look(found.detach()) > 0 else 3)


@pytest.mark.parametrize("look", [lambda x: x.mean().item(), lambda x: x.numpy().mean()], ids=["item", "numpy"])
def test_a_network_that_looks_at_values_is_measured_really_and_scaled(monkeypatch, look):
    settings = settings_of(**NETWORKS[-1], amp="none")
    network = SegmentationNetwork(Conscious(look), 3)
    monkeypatch.setattr("cellmap_pipe.training.estimate.network_of", lambda *_, **__: network)
    small = smallest_patch(settings)
    found = training_pass(network, settings, 3)
    assert found.method == f"a real pass at {small}, scaled"
    assert found.heads == ((3, 3, *settings["patch"]),)
    one = measure_pass(network, torch.zeros(1, 1, *small), bf16=False)
    assert found.saved == one.saved * 3 * math.prod(settings["patch"]) / math.prod(small)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network["network"])
def test_a_network_trains_on_its_smallest_patch(network):
    found = try_network(settings_of(**network))
    assert math.isfinite(found["loss"])
    assert all(small <= size for small, size in zip(found["patch"], network["patch"], strict=True))


def test_the_check_says_what_a_training_takes(monkeypatch):
    settings = settings_of(**CUBE)
    before = torch.get_rng_state()
    passes = []

    def counted(*arguments):
        passes.append(arguments[2])
        return training_pass(*arguments)

    monkeypatch.setattr("cellmap_pipe.training.estimate.training_pass", counted)
    result = check_network(settings, gpu_gb=4, gpus=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert result["heads"] == [[2, 3, 16, 24, 16], [2, 3, 8, 12, 8], [2, 3, 4, 6, 4]]
    assert result["head_weights"] == [0.5714, 0.2857, 0.1429]
    memory = training_memory(settings, gpus=2)
    assert result["memory_gb"]["total"] == round(memory.total / 1e9, 3)
    largest = result["largest_batch"]
    assert {largest, largest + 1} < set(passes)
    assert len(passes) <= 8  # of seconds each, where the network is large
    assert training_memory({**settings, "batch": largest}, 2).total <= 4e9
    assert training_memory({**settings, "batch": largest + 1}, 2).total > 4e9
    text = describe(result)
    assert f"largest batch   {largest} on a GPU of 4 GB" in text
    assert "3 (16 x 24 x 16, 8 x 12 x 8, 4 x 6 x 4)" in text
    assert memory_line(settings, torch.device("cpu"), 2).startswith(f"needs about {memory.total / 1e9:.1f} GB on a GPU")


def test_a_batch_too_large_for_the_gpu_is_refused_with_one_that_fits():
    settings = settings_of(**CUBE, batch=12, accumulate=2)
    five = training_memory({**settings, "batch": 5}).total
    with pytest.raises(ConfigError) as caught:
        check_network(settings, gpu_gb=five / 1e9)
    assert "train.batch 12 of patches [16, 24, 16] needs about" in str(caught.value)
    # of 24 patches per step; 5 would fit and do not divide them
    assert "set train.batch to 4 and train.accumulate to 6" in str(caught.value)


def test_the_advised_passes_fit_too():
    settings = settings_of(**NETWORKS[-1], batch=12, accumulate=1)
    six = training_memory({**settings, "batch": 6}).total  # but not in two passes, of which one waits
    with pytest.raises(ConfigError, match=r"train\.batch to 4 and train\.accumulate to 3") as caught:
        check_network(settings, gpu_gb=six / 1e9)
    assert str(caught.value).endswith("If it is known to fit, set resources.train.gpu_gb to null")
    assert training_memory({**settings, "batch": 6, "accumulate": 2}).total > six
    assert training_memory({**settings, "batch": 4, "accumulate": 3}).total <= six


def test_a_gpu_that_seems_too_small_is_tried_all_the_same(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=10**9))
    line = memory_line(settings_of(**CUBE), torch.device("cuda"))
    assert line.endswith("; it has 1.0 GB")
    assert "on a GPU of 1.0 GB" in caplog.text


def test_what_the_loss_works_in_is_what_is_counted():
    """On tensors without content, which it treats as those of a GPU."""
    piece = PIECE_BUFFERS * FLOAT_BYTES * GPU_PIECE
    for preset, lowest in (("dice_bce", 0.5), ("dice_focal", 0.9)):
        with torch.device("meta"):
            loss = build_loss({"loss": preset}, 14, groups=[[0, 1, 2]])
            logits = torch.zeros(2, 14, 128, 128, 128, dtype=torch.bfloat16, requires_grad=True)
            states = torch.zeros(2, 15, 128, 128, 128, dtype=torch.bool)
            with Alive(tensor.untyped_storage()._cdata for tensor in (logits, states)) as alive:
                sums, _, union, _ = MaskedSums.apply(logits, states, states, None, loss.options.gamma, loss.groups)
                (sums.sum() + union.sum()).backward()
        assert lowest * piece <= alive.peak - logits.nbytes <= piece


def test_a_patch_too_large_for_the_gpu_is_refused_with_one_that_fits():
    settings = settings_of(**{**CUBE, "patch": [64, 64, 64]}, batch=2)
    fits = training_memory({**settings, "patch": [64, 56, 56], "batch": 1, "accumulate": 2}).total
    with pytest.raises(ConfigError) as caught:
        check_network(settings, gpu_gb=fits / 1e9)
    assert "set train.patch to [64, 56, 56], train.batch to 1 and train.accumulate to 2" in str(caught.value)


def test_a_network_that_fits_nowhere_is_refused():
    with pytest.raises(ConfigError, match="no smaller patch fits"):
        check_network(settings_of(**CUBE), gpu_gb=1.2)


def test_a_first_output_of_another_size_than_the_patch_is_refused(monkeypatch):
    network = SegmentationNetwork(torch.nn.Conv3d(1, 3, 3), 3)
    monkeypatch.setattr("cellmap_pipe.training.estimate.network_of", lambda *_, **__: network)
    with pytest.raises(ConfigError, match=r"the first output for a patch \[8, 16, 8\] is \(3, 6, 14, 6\)"):
        try_network(settings_of(**{**CUBE, "patch": [8, 16, 8]}))


def test_a_network_that_fails_on_its_patch_is_refused_in_the_library_s_words():
    arguments = {"channels": [4, 8], "strides": [2, 2], "padding": 0}
    with pytest.raises(ConfigError, match=r"AutoEncoder fails on a patch .*Kernel size can't be greater"):
        try_network(settings_of(network="AutoEncoder", arguments=arguments, patch=[32, 32, 32]))


def test_outputs_without_any_weight_are_refused():
    with pytest.raises(ConfigError, match="gives no weight to the 1 outputs"):
        try_network(settings_of(**NETWORKS[-1], deep_supervision=[0, 1]))


@pytest.mark.parametrize(("weights", "expected"), [([1, 1], "learn nothing"), ([1] * 4, "not used")])
def test_other_weights_than_outputs_are_warned_of(caplog, weights, expected):
    try_network(settings_of(**CUBE, deep_supervision=weights))
    assert expected in caplog.text
