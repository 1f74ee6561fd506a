"""Networks are built by name and look alike from outside."""

from typing import Any

import pytest
import torch

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.training.networks import build_network, freeze_unused, library_arguments
from cellmap_pipe.training.zoo import NETWORKS, RESERVED

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
]


@pytest.mark.parametrize(("network", "arguments", "spatial_dims", "patch", "heads"), CASES)
def test_list_in_training_and_tensor_in_evaluation(
    network: str, arguments: dict[str, Any], spatial_dims: int, patch: list[int], heads: int
) -> None:
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


def test_mednext_gives_its_finest_head_first() -> None:
    built = build_network("MedNeXt", MEDNEXT, patch=[16, 16, 16], n_classes=3)
    assert [output.shape[2] for output in built(torch.rand(1, 1, 16, 16, 16))] == [16, 8, 4]


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_allowed_arguments_exist_in_the_library(network: str) -> None:
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
