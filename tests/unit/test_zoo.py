"""The allow-list of networks says of a configuration what the libraries would say, without importing them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.schema import load_yaml
from cellmap_pipe.training.zoo import (
    NETWORKS,
    RESERVED,
    check_network,
    check_patch,
    divisor,
    with_architecture,
)

MODELS = Path(__file__).parents[2] / "config" / "models"

ARCHITECTURE: dict[str, Any] = {
    "spatial_dims": 3,
    "num_blocks": 1,
    "num_depths": 2,
    "node_a": [[1, 0], [1, 1]],
    "arch_code_a": [[1, 0, 1, 0]],
    "arch_code_c": [[0, 0, 1, 0]],
}
RESENC = {
    "n_stages": 3,
    "features_per_stage": [8, 16, 16],
    "kernel_sizes": 3,
    "strides": [1, [1, 2, 2], 2],
    "n_blocks_per_stage": 1,
    "n_conv_per_stage_decoder": 1,
}
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
        ("AttentionUnet", {"channels": [8, 16, 32], "strides": [2, 2]}, 4),
        ("VNet", {}, 16),
        ("ResidualEncoderUNet", RESENC, 4),
        ("DiNTS", {"architecture": {**ARCHITECTURE, "num_depths": 4}}, 16),
        ("DiNTS", {"architecture": {**ARCHITECTURE, "num_depths": 4}, "use_downsample": False}, 8),
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
    for absent in ("VISTA3D", "Linear"):
        with pytest.raises(ConfigError, match=f"'{absent}' is unknown; .*allowed: AttentionUnet"):
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
    for size in (0, "two", [2, 2, 2], True):
        with pytest.raises(ConfigError, match=r"arguments\.patch_size is .*; give a positive integer"):
            check_network("SwinUNETR", {"patch_size": size}, 3, [64, 64, 64])
    with pytest.raises(ConfigError, match=r"arguments\.strides holds True; give a positive integer"):
        check_network("UNet", {"channels": [8, 16], "strides": [True]}, 3, [32, 32, 32])
    with pytest.raises(ConfigError, match="pretrained of FlexibleUNet would download"):
        check_network("FlexibleUNet", {"backbone": "resnet34", "pretrained": True}, 3, [64, 64, 64])


def test_a_u_net_of_stages_begins_at_full_resolution_and_has_a_stride_for_each() -> None:
    check_network("ResidualEncoderUNet", RESENC, 3, [4, 8, 8])
    with pytest.raises(ConfigError, match=r"strides has 2 entries for n_stages 3; give one per stage"):
        check_network("ResidualEncoderUNet", {**RESENC, "strides": [1, 2]}, 3, [8, 8, 8])
    with pytest.raises(ConfigError, match=r"strides begins with 2: .* begin with 1"):
        check_network("ResidualEncoderUNet", {**RESENC, "strides": [2, 2, 2]}, 3, [8, 8, 8])
    with pytest.raises(ConfigError, match=r"arguments\.n_blocks_per_stage is missing"):
        lacking = {name: value for name, value in RESENC.items() if name != "n_blocks_per_stage"}
        check_network("ResidualEncoderUNet", lacking, 3, [8, 8, 8])


def test_an_architecture_is_checked_with_the_network() -> None:
    check_network("DiNTS", {"architecture": ARCHITECTURE}, 3, [8, 8, 8])
    with pytest.raises(ConfigError, match=r"arguments\.architecture is missing"):
        check_network("DiNTS", {}, 3, [8, 8, 8])
    with pytest.raises(ConfigError, match=r"arguments\.architecture: arch_code_c\[0\] holds 5; allowed: 0 \.\. 4"):
        check_network("DiNTS", {"architecture": {**ARCHITECTURE, "arch_code_c": [[0, 0, 5, 0]]}}, 3, [8, 8, 8])
    with pytest.raises(ConfigError, match=r"arguments\.use_downsample is 'no'; give true or false"):
        check_network("DiNTS", {"architecture": ARCHITECTURE, "use_downsample": "no"}, 3, [8, 8, 8])
    with pytest.raises(ConfigError, match=r"of spatial_dims 3; it does not fit a network of spatial_dims 2"):
        check_network("DiNTS", {"architecture": ARCHITECTURE}, 2, [1, 8, 8])


def test_an_architecture_is_found_in_the_first_folder_that_has_it(tmp_path: Path) -> None:
    folders = [tmp_path / "here", tmp_path / "there"]
    for number, folder in enumerate(folders, 1):
        folder.mkdir()
        content = {"format": 1, "source": f"folder {number}", **ARCHITECTURE, "arch_code_c": [[number, 0, 1, 0]]}
        (folder / "found.json").write_text(json.dumps(content))

    def first_operation() -> int:
        given = with_architecture("DiNTS", {"architecture": "found.json", "channel_mul": 0.5}, folders)
        assert given["channel_mul"] == 0.5
        operation: int = given["architecture"]["arch_code_c"][0][0]
        return operation

    assert first_operation() == 1
    (folders[0] / "found.json").unlink()
    assert first_operation() == 2
    (folders[1] / "found.json").unlink()
    with pytest.raises(
        ConfigError, match=r"architecture 'found\.json' does not exist \(looked in .*here and .*there\)"
    ):
        first_operation()


def test_arguments_without_a_named_architecture_stay_as_they_are() -> None:
    assert with_architecture("DiNTS", {"architecture": ARCHITECTURE}, []) == {"architecture": ARCHITECTURE}
    assert with_architecture("UNet", {"architecture": "a.json"}, []) == {"architecture": "a.json"}


FAMILIES = [f"{family}_{dims}d" for family in ("unet", "resnet", "swin", "vit") for dims in (2, 3)]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_presets_for_8_nm_differ_in_the_patch_and_see_as_many_voxels(name: str) -> None:
    plain, preset = load_yaml(MODELS / f"{name}.yaml"), load_yaml(MODELS / f"{name}_8nm.yaml")
    assert preset.pop("grid") == "8nm"
    voxels = [math.prod(model["train"].pop("patch")) * model["train"].pop("batch") for model in (plain, preset)]
    assert voxels[0] == voxels[1]
    assert plain == preset


def test_defaults_are_arguments_and_the_pipelines_own_are_not() -> None:
    for network in NETWORKS.values():
        assert set(network.defaults) | set(network.required) <= network.arguments
        assert not network.arguments & RESERVED
