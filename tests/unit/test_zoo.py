"""The allow-list of networks says of a configuration what the libraries would say, without importing them."""

import subprocess
import sys

import pytest

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.training.zoo import NETWORKS, RESERVED, check_network, check_patch, divisor

DYNUNET = {"kernel_size": [3] * 3, "strides": [1, [1, 2, 2], 2], "upsample_kernel_size": [[1, 2, 2], 2]}


@pytest.mark.parametrize(
    ("network", "arguments", "expected"),
    [
        ("SegResNetDS", {"blocks_down": [1, 2, 2, 4, 4]}, 16),
        ("SegResNetDS", {}, 8),
        ("SegResNet", {"blocks_down": [1, 2]}, 2),
        ("BasicUNet", {}, 1),
        ("FlexibleUNet", {"backbone": "resnet34"}, 32),
        ("SwinUNETR", {}, 32),
        ("MedNeXtS", {}, 16),
        ("MedNeXt", {"blocks_down": [2, 2]}, 4),
        ("UNet", {"channels": [8, 16, 32], "strides": [2, 2]}, 4),
        ("DynUNet", DYNUNET, 4),
    ],
)
def test_divisor_of_patch_sizes(network: str, arguments: dict[str, object], expected: int) -> None:
    assert divisor(network, arguments) == expected


def test_indivisible_patch_is_refused_with_a_size_that_fits() -> None:
    arguments = {"blocks_down": [1, 2, 2, 4, 4]}
    with pytest.raises(ConfigError) as error:
        check_network("SegResNetDS", arguments, 3, [100, 128, 4])
    assert str(error.value) == ("train.patch [100, 128, 4] must be divisible by 16 for SegResNetDS; try [96, 128, 16]")
    check_network("SegResNetDS", arguments, 3, [96, 128, 16])


def test_steps_may_differ_by_axis() -> None:
    check_patch("DynUNet", DYNUNET, [2, 8, 12])
    with pytest.raises(ConfigError, match=r"must be divisible by \[2, 4, 4\] for DynUNet; try \[4, 8, 12\]"):
        check_patch("DynUNet", DYNUNET, [3, 8, 12])


def test_patch_that_leaves_one_voxel_to_normalise_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"too small for SwinUNETR.*try \[64, 64, 64\]"):
        check_patch("SwinUNETR", {}, [32, 32, 32])
    check_patch("SwinUNETR", {}, [32, 64, 32])
    with pytest.raises(ConfigError, match="too small for BasicUNet"):
        check_patch("BasicUNet", {}, [37, 41, 8])


def test_networks_of_slices_take_one_slice() -> None:
    check_network("BasicUNet", {}, 2, [1, 64, 64])
    with pytest.raises(ConfigError, match=r"must be one slice .*try \[1, 64, 64\]"):
        check_network("BasicUNet", {}, 2, [32, 64, 64])


def test_unknown_network_or_argument_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'SegResnetDS' is unknown; did you mean SegResNetDS"):
        check_network("SegResnetDS", {}, 3, [32, 32, 32])
    for absent in ("DiNTS", "ResidualEncoderUNet"):
        with pytest.raises(ConfigError, match=f"'{absent}' is unknown; .*allowed: AutoEncoder"):
            check_network(absent, {}, 3, [32, 32, 32])
    with pytest.raises(ConfigError, match="no such argument; did you mean init_filters"):
        check_network("SegResNet", {"init_filter": 8}, 3, [32, 32, 32])
    with pytest.raises(ConfigError, match=r"arguments.out_channels of SegResNet is set by the pipeline"):
        check_network("SegResNet", {"out_channels": 8}, 3, [32, 32, 32])


def test_missing_or_unusable_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"arguments\.strides is missing; UNet needs channels, strides"):
        check_network("UNet", {"channels": [8, 16]}, 3, [32, 32, 32])
    with pytest.raises(ConfigError, match="backbone 'resnet35' is unknown; allowed: resnet10"):
        check_network("FlexibleUNet", {"backbone": "resnet35"}, 3, [64, 64, 64])
    with pytest.raises(ConfigError, match=r"arguments\.blocks_down is 3; give a list"):
        check_network("SegResNet", {"blocks_down": 3}, 3, [32, 32, 32])
    with pytest.raises(ConfigError, match="pretrained of FlexibleUNet would download"):
        check_network("FlexibleUNet", {"backbone": "resnet34", "pretrained": True}, 3, [64, 64, 64])


def test_defaults_are_arguments_and_the_pipelines_own_are_not() -> None:
    for network in NETWORKS.values():
        assert set(network.defaults) | set(network.required) <= network.arguments
        assert not network.arguments & RESERVED


def test_check_imports_neither_torch_nor_monai() -> None:
    code = "import sys, cellmap_pipe.training.zoo; assert not {'torch', 'monai', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
