"""Networks are built by name and look alike from outside."""

import contextlib
import copy
import importlib.util
import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import dints
from torch import nn

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.training.networks import build_network, freeze_unused, library_arguments
from cellmap_pipe.training.zoo import DYNAMIC, NETWORKS, RESERVED, divisor

torch.set_num_threads(1)

STRIDED = {"channels": [4, 8, 8], "strides": [2, 2]}
DYNUNET = {
    "kernel_size": [3] * 3,
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2] * 2,
    "filters": [4, 8, 8],
    "deep_supervision": True,
}
UNETR = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 2}
MEDNEXT = {
    "init_filters": 4,
    "kernel_size": 3,
    "deep_supervision": True,
    "blocks_down": [1, 1],
    "blocks_up": [1, 1],
    "blocks_bottleneck": 1,
}

# Two paths that part and meet again; the second stem feeds nothing.
DINTS: dict[str, Any] = {
    "channel_mul": 0.125,
    "architecture": {
        "spatial_dims": 3,
        "num_blocks": 2,
        "num_depths": 2,
        "node_a": [[1, 0], [1, 1], [1, 0]],
        "arch_code_a": [[1, 0, 1, 0], [1, 1, 0, 0]],
        "arch_code_c": [[1, 0, 2, 0], [0, 3, 0, 0]],
    },
}
DINTS_2D = {"channel_mul": 0.125, "architecture": {**DINTS["architecture"], "spatial_dims": 2}}
DINTS_2D["architecture"]["arch_code_c"] = [[1, 0, 0, 0], [0, 1, 0, 0]]
STAGES = {
    "n_stages": 3,
    "features_per_stage": [4, 8, 8],
    "kernel_sizes": 3,
    "strides": [1, 2, [2, 2, 2]],
    "n_conv_per_stage_decoder": 1,
}
RESENC = {**STAGES, "n_blocks_per_stage": [1, 2, 1], "deep_supervision": True}

CASES: list[tuple[str, dict[str, Any], int, list[int], int]] = [
    ("SegResNetDS", {"init_filters": 4, "blocks_down": [1, 1, 1]}, 3, [16, 24, 8], 2),
    ("SegResNetDS", {"init_filters": 4, "blocks_down": [1, 1, 1], "dsdepth": 1}, 2, [1, 16, 16], 1),
    ("SegResNet", {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}, 3, [8, 8, 8], 1),
    ("BasicUNet", {"features": [4, 4, 4, 4, 8, 4]}, 3, [37, 33, 35], 1),
    ("BasicUNet", {"features": [4, 4, 4, 4, 8, 4]}, 2, [1, 32, 48], 1),
    ("FlexibleUNet", {"backbone": "resnet10", "decoder_channels": [8, 8, 8, 8, 8]}, 2, [1, 64, 64], 1),
    ("SwinUNETR", {"feature_size": 12, "depths": [1, 1, 1, 1], "window_size": 2}, 3, [32, 32, 64], 1),
    ("SwinUNETR", {"feature_size": 12, "use_v2": True}, 2, [1, 64, 64], 1),
    ("UNETR", UNETR, 3, [16, 32, 16], 1),
    ("AutoEncoder", {"channels": [4, 8], "strides": [2, 2]}, 3, [8, 12, 8], 1),
    ("UNet", {**STRIDED, "num_res_units": 1}, 3, [8, 12, 8], 1),
    ("DynUNet", DYNUNET, 3, [8, 16, 8], 2),
    ("DynUNet", DYNUNET, 2, [1, 16, 16], 2),
    ("AttentionUnet", STRIDED, 3, [8, 12, 8], 1),
    ("VNet", {}, 2, [1, 32, 16], 1),
    ("MedNeXt", MEDNEXT, 3, [16, 8, 8], 3),
    ("DiNTS", DINTS, 3, [8, 12, 8], 1),
    ("DiNTS", {**DINTS, "use_downsample": False}, 3, [8, 6, 8], 1),
    ("DiNTS", DINTS_2D, 2, [1, 16, 8], 1),
    ("ResidualEncoderUNet", RESENC, 3, [8, 16, 12], 2),
    ("ResidualEncoderUNet", {**RESENC, "strides": [1, 2, 2], "deep_supervision": False}, 2, [1, 16, 16], 1),
    ("ResidualUNet", {**STAGES, "n_blocks_per_stage": 1}, 3, [8, 8, 8], 1),
    ("PlainConvUNet", {**STAGES, "n_conv_per_stage": 1, "deep_supervision": True}, 3, [8, 8, 8], 2),
]
NAMES = [f"{case[0]}-{case[2]}d" for case in CASES]


def need(network: str) -> None:
    """Skip the test if the network's library is an optional one that is not installed."""
    if NETWORKS[network].library == DYNAMIC and importlib.util.find_spec(DYNAMIC) is None:
        pytest.skip(f"{DYNAMIC} is not installed")


@pytest.mark.parametrize(("network", "arguments", "spatial_dims", "patch", "heads"), CASES, ids=NAMES)
def test_list_in_training_and_tensor_in_evaluation(
    network: str, arguments: dict[str, Any], spatial_dims: int, patch: list[int], heads: int
) -> None:
    need(network)
    torch.manual_seed(0)
    built = build_network(network, arguments, patch=patch, n_classes=3, spatial_dims=spatial_dims)
    image = torch.rand(2, 1, *patch)
    outputs = built(image)
    assert isinstance(outputs, list)
    assert len(outputs) == heads
    assert outputs[0].shape == (2, 3, *patch)
    sizes = [output[0, 0].numel() for output in outputs]
    assert sizes == sorted(sizes, reverse=True)
    with torch.inference_mode():
        assert built.eval()(image).shape == (2, 3, *patch)


@pytest.mark.parametrize(("network", "arguments", "spatial_dims", "patch", "heads"), CASES, ids=NAMES)
def test_one_step_moves_every_weight_that_counts_and_no_other_copy_of_the_network(
    network: str, arguments: dict[str, Any], spatial_dims: int, patch: list[int], heads: int
) -> None:
    need(network)
    torch.manual_seed(0)
    built = build_network(network, arguments, patch=patch, n_classes=3, spatial_dims=spatial_dims)
    image = torch.rand(1, 1, *patch)
    average = copy.deepcopy(built)
    frozen = freeze_unused(built, image)
    trainable = [parameter for parameter in built.parameters() if parameter.requires_grad]
    torch.stack([output.square().mean() for output in built(image)]).sum().backward()
    assert all(parameter.grad is not None for parameter in trainable)
    torch.optim.SGD(trainable, lr=0.1).step()
    before, after = dict(average.named_parameters()), dict(built.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert all(torch.isfinite(parameter).all() for parameter in after.values())
    average.load_state_dict(built.state_dict())
    with torch.inference_mode():
        assert torch.equal(average.eval()(image), built.eval()(image))


@pytest.mark.parametrize(("network", "arguments", "spatial_dims", "patch", "heads"), CASES, ids=NAMES)
def test_every_weight_has_one_name(
    network: str, arguments: dict[str, Any], spatial_dims: int, patch: list[int], heads: int
) -> None:
    need(network)
    built = build_network(network, arguments, patch=patch, n_classes=3, spatial_dims=spatial_dims)
    places = [tensor.data_ptr() for tensor in built.state_dict().values() if tensor.numel()]
    assert len(set(places)) == len(places)


# Those whose library says by an error of its own what a patch must be divisible by, and what is left at the coarsest.
UNEVEN = ["AttentionUnet", "DiNTS", "PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet", "SegResNet", "UNet", "VNet"]


@pytest.mark.parametrize("network", UNEVEN)
def test_the_divisor_of_a_patch_is_the_librarys(network: str) -> None:
    need(network)
    _, arguments, dims, patch, _ = next(case for case in CASES if case[0] == network)
    step = divisor(network, arguments, dims)
    built = build_network(network, arguments, patch=patch, n_classes=2, spatial_dims=dims)
    whole = [1] * (3 - dims) + [2 * step] * dims
    assert built(torch.rand(1, 1, *whole))[0].shape == (1, 2, *whole)
    for size in (2 * step + step // 2, 2 * step + 1):
        with pytest.raises(RuntimeError):
            built(torch.rand(1, 1, *whole[:-1], size))


@pytest.mark.parametrize("network", ["DiNTS", "PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet", "VNet"])
def test_one_voxel_at_the_coarsest_level_is_too_few(network: str) -> None:
    need(network)
    _, arguments, dims, patch, _ = next(case for case in CASES if case[0] == network)
    built = build_network(network, arguments, patch=patch, n_classes=2, spatial_dims=dims)
    step = divisor(network, arguments, dims)
    with pytest.raises(ValueError, match="Expected more than 1"):
        built(torch.rand(1, 1, *[1] * (3 - dims), *[step] * dims))


@pytest.mark.parametrize("use_downsample", [True, False])
def test_dints_is_the_librarys_for_an_architecture(use_downsample: bool) -> None:
    torch.manual_seed(0)
    arguments = {**DINTS, "use_downsample": use_downsample}
    codes = DINTS["architecture"]
    ours = build_network("DiNTS", arguments, patch=[8, 8, 8], n_classes=3)
    with contextlib.redirect_stdout(io.StringIO()):
        space = dints.TopologyInstance(
            arch_code=[np.array(codes["arch_code_a"]), np.array(codes["arch_code_c"])],
            channel_mul=0.125,
            num_blocks=2,
            num_depths=2,
            use_downsample=use_downsample,
        )
    theirs = dints.DiNTS(
        dints_space=space,
        in_channels=1,
        num_classes=3,
        use_downsample=use_downsample,
        node_a=np.array(codes["node_a"]),
    )
    theirs.load_state_dict(ours.network.state_dict())
    image = torch.rand(2, 1, 8, 12, 8)
    assert torch.equal(ours(image)[0], theirs(image))


def test_stems_of_dints_that_feed_nothing_are_frozen() -> None:
    built = build_network("DiNTS", DINTS, patch=[8, 8, 8], n_classes=2)
    frozen = freeze_unused(built, torch.rand(1, 1, 8, 8, 8))
    assert {name.rsplit(".mod.", 1)[0] for name in frozen} == {"network.stem_down.1", "network.stem_up.1"}


def test_a_network_of_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{DYNAMIC}.architectures.unet", None)
    with pytest.raises(ConfigError, match=r"ResidualEncoderUNet needs .* extra `resenc` .*`pip install --no-deps"):
        build_network("ResidualEncoderUNet", RESENC, patch=[8, 8, 8], n_classes=2)


def test_nnunets_networks_have_its_operations_and_first_weights() -> None:
    need("ResidualEncoderUNet")
    torch.manual_seed(0)
    built = build_network("ResidualEncoderUNet", RESENC, patch=[8, 8, 8], n_classes=2)
    kinds = {type(module) for module in built.modules() if not list(module.children())}
    assert kinds >= {nn.Conv3d, nn.InstanceNorm3d, nn.LeakyReLU, nn.ConvTranspose3d}
    assert not kinds & {nn.BatchNorm3d, nn.ReLU}
    convolutions = [module for module in built.modules() if isinstance(module, nn.Conv3d)]
    # Kaiming's, and no bias at first
    assert all(module.bias is None or not module.bias.any() for module in convolutions)


def test_mednext_gives_its_finest_head_first() -> None:
    built = build_network("MedNeXt", MEDNEXT, patch=[16, 16, 16], n_classes=3)
    assert [output.shape[2] for output in built(torch.rand(1, 1, 16, 16, 16))] == [16, 8, 4]


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_allowed_arguments_exist_in_the_library(network: str) -> None:
    need(network)
    taken = library_arguments(network)
    assert NETWORKS[network].arguments <= taken
    assert NETWORKS[network].arguments.isdisjoint(RESERVED)


def test_patch_that_the_list_refuses_is_refused_by_the_library() -> None:
    built = build_network("SegResNetDS", {"init_filters": 4, "blocks_down": [1, 1, 1]}, patch=[8, 8, 8], n_classes=2)
    with pytest.raises(ValueError, match="must be divisible"):
        built(torch.rand(1, 1, 8, 8, 10))


def test_parameters_without_influence_are_frozen() -> None:
    built = build_network("UNETR", UNETR, patch=[16, 16, 16], n_classes=2)
    frozen = freeze_unused(built, torch.rand(1, 1, 16, 16, 16))
    assert frozen
    assert all("norm_cross_attn" in name for name in frozen)
    assert not any(built.get_parameter(name).requires_grad for name in frozen)
    assert freeze_unused(built, torch.rand(1, 1, 16, 16, 16)) == []


def test_looking_for_unused_parameters_leaves_batch_statistics_alone() -> None:
    arguments = {"backbone": "resnet10", "decoder_channels": [8] * 5}
    built = build_network("FlexibleUNet", arguments, patch=[1, 64, 64], n_classes=2, spatial_dims=2)
    before = {name: buffer.clone() for name, buffer in built.named_buffers()}
    freeze_unused(built, torch.rand(2, 1, 1, 64, 64))
    assert before
    assert all(torch.equal(before[name], buffer) for name, buffer in built.named_buffers())


def test_arguments_that_the_library_refuses_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"SegResNet cannot be built with arguments .*'norm'"):
        build_network("SegResNet", {"norm": "nothing"}, patch=[16, 16, 16], n_classes=2)
