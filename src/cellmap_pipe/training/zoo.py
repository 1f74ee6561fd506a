"""Which networks can be trained, which arguments they take and which patch sizes they accept, without importing any.

The networks are classes of `monai.networks.nets` and of `dynamic_network_architectures`. Checking a configuration must
cost milliseconds and work without the latter, and importing torch and MONAI costs seconds, so what they would say about
a patch is written down here; a test compares it with the libraries.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.training.architecture import check_architecture, load_architecture

Steps = tuple[int, ...]

# What the pipeline itself passes to every constructor.
RESERVED = frozenset({"spatial_dims", "in_channels", "out_channels", "img_size"})

# Libraries that networks come from; the second is optional, see `networks`.
MONAI, DYNAMIC = "monai", "dynamic_network_architectures"

FLEXIBLE_UNET_BACKBONES = tuple(
    [f"resnet{depth}" for depth in (10, 18, 34, 50, 101, 152, 200)]
    + [f"efficientnet-{size}" for size in ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "b8", "l2")]
)


@dataclass(frozen=True)
class Network:
    """What is known of a network before it is built.

    arguments: names of the constructor arguments that a configuration may set; required: those it must set;
    defaults: values that differ from the library's own. reduction: per axis, how many voxels of the patch become one
    at the coarsest level. divisible: whether the patch must be divisible by that. normalised: whether the coarsest
    level is normalised over its voxels in training, so that one voxel is not enough there. library: whose it is.
    """

    arguments: frozenset[str]
    reduction: Callable[[Mapping[str, Any], int], Steps]
    required: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    divisible: bool = True
    normalised: bool = True
    library: str = MONAI


def _halvings(key: str, default: int, undivided: int) -> Callable[[Mapping[str, Any], int], Steps]:
    """Return the reduction of a network that halves at each entry of argument `key`, `undivided` of them apart."""

    def reduction(arguments: Mapping[str, Any], spatial_dims: int) -> Steps:
        levels = len(_sequence(arguments, key)) if key in arguments else default
        return (2 ** (levels - undivided),) * spatial_dims

    return reduction


def _fixed(step: int) -> Callable[[Mapping[str, Any], int], Steps]:
    return lambda arguments, spatial_dims: (step,) * spatial_dims


def _strides(arguments: Mapping[str, Any], spatial_dims: int) -> Steps:
    """Return the product of the `strides` per axis; a stride is one number or one per axis."""
    steps = [1] * spatial_dims
    for stride in _sequence(arguments, "strides"):
        per_axis = list(stride) if isinstance(stride, list | tuple) else [stride] * spatial_dims
        if len(per_axis) != spatial_dims or not all(type(n) is int and n > 0 for n in per_axis):
            raise ConfigError(f"arguments.strides holds {stride}; give a positive integer, or one per axis")
        steps = [step * n for step, n in zip(steps, per_axis, strict=True)]
    return tuple(steps)


def _swin(arguments: Mapping[str, Any], spatial_dims: int) -> Steps:
    size = arguments.get("patch_size", 2)
    if type(size) is not int or size < 1:
        raise ConfigError(f"arguments.patch_size is {size!r}; give a positive integer, the same for every axis")
    return (size**5,) * spatial_dims


def _dints(arguments: Mapping[str, Any], spatial_dims: int) -> Steps:
    """Return the reduction of DiNTS: a halving before the lattice, if `use_downsample`, and one per depth below."""
    halved = arguments.get("use_downsample", True)
    if not isinstance(halved, bool):
        raise ConfigError(f"arguments.use_downsample is {halved!r}; give true or false")
    return (2 ** (int(arguments["architecture"]["num_depths"]) - 1 + halved),) * spatial_dims


def _sequence(arguments: Mapping[str, Any], key: str) -> Sequence[Any]:
    value = arguments[key]
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"arguments.{key} is {value!r}; give a list")
    return value


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DYNAMIC_ARGUMENTS = (
    "n_stages features_per_stage kernel_sizes strides n_conv_per_stage_decoder conv_bias deep_supervision"
)


def _dynamic(own: str) -> Network:
    """Return a network of dynamic_network_architectures with `own` arguments, of which the first is required."""
    return Network(
        arguments=_names(f"{_DYNAMIC_ARGUMENTS} {own}"),
        reduction=_strides,
        required=(*_DYNAMIC_ARGUMENTS.split()[:5], own.split()[0]),
        defaults={"conv_bias": True},
        library=DYNAMIC,
    )


_MEDNEXT = Network(arguments=_names("kernel_size deep_supervision"), reduction=_fixed(16))

NETWORKS: Mapping[str, Network] = {
    "AttentionUnet": Network(
        arguments=_names("channels strides kernel_size up_kernel_size dropout"),
        reduction=_strides,
        required=("channels", "strides"),
    ),
    "AutoEncoder": Network(
        arguments=_names(
            "channels strides kernel_size up_kernel_size num_res_units inter_channels inter_dilations num_inter_units "
            "act norm dropout bias padding"
        ),
        reduction=_strides,
        required=("channels", "strides"),
        defaults={"norm": "INSTANCE"},
    ),
    "BasicUNet": Network(
        arguments=_names("features act norm bias dropout upsample"),
        reduction=_fixed(16),
        defaults={"norm": ("instance", {"affine": True})},
        divisible=False,
    ),
    "DiNTS": Network(
        arguments=_names("architecture channel_mul use_downsample act_name norm_name"),
        reduction=_dints,
        required=("architecture",),
    ),
    "DynUNet": Network(
        arguments=_names(
            "kernel_size strides upsample_kernel_size filters dropout norm_name act_name deep_supervision "
            "deep_supr_num res_block trans_bias"
        ),
        reduction=_strides,
        required=("kernel_size", "strides", "upsample_kernel_size"),
    ),
    "FlexibleUNet": Network(
        arguments=_names(
            "backbone pretrained decoder_channels norm act dropout decoder_bias upsample pre_conv interp_mode is_pad"
        ),
        reduction=_fixed(32),
        required=("backbone",),
        # Weights learnt elsewhere would be downloaded; the decoder sees batches too small for batch statistics.
        defaults={"pretrained": False, "norm": ("instance", {"affine": True})},
    ),
    "MedNeXt": Network(
        arguments=_names(
            "init_filters encoder_expansion_ratio decoder_expansion_ratio bottleneck_expansion_ratio kernel_size "
            "deep_supervision use_residual_connection blocks_down blocks_bottleneck blocks_up norm_type "
            "global_resp_norm"
        ),
        reduction=_halvings("blocks_down", default=4, undivided=0),
    ),
    "MedNeXtB": _MEDNEXT,
    "MedNeXtL": _MEDNEXT,
    "MedNeXtM": _MEDNEXT,
    "MedNeXtS": _MEDNEXT,
    "PlainConvUNet": _dynamic("n_conv_per_stage nonlin_first"),
    "ResidualEncoderUNet": _dynamic("n_blocks_per_stage stem_channels"),
    "ResidualUNet": _dynamic("n_blocks_per_stage stem_channels"),
    "SegResNet": Network(
        arguments=_names(
            "init_filters dropout_prob act norm norm_name num_groups use_conv_final blocks_down blocks_up upsample_mode"
        ),
        reduction=_halvings("blocks_down", default=4, undivided=1),
    ),
    "SegResNetDS": Network(
        arguments=_names("init_filters act norm blocks_down blocks_up dsdepth upsample_mode"),
        reduction=_halvings("blocks_down", default=4, undivided=1),
        # The library's default of 1 means no deep supervision at all.
        defaults={"norm": "INSTANCE", "dsdepth": 4},
    ),
    "SwinUNETR": Network(
        arguments=_names(
            "patch_size depths num_heads window_size qkv_bias mlp_ratio feature_size norm_name drop_rate "
            "attn_drop_rate dropout_path_rate normalize patch_norm use_checkpoint downsample use_v2"
        ),
        reduction=_swin,
    ),
    "UNETR": Network(
        arguments=_names(
            "feature_size hidden_size mlp_dim num_heads proj_type norm_name conv_block res_block dropout_rate "
            "qkv_bias save_attn"
        ),
        reduction=_fixed(16),
        normalised=False,
    ),
    "UNet": Network(
        arguments=_names(
            "channels strides kernel_size up_kernel_size num_res_units act norm dropout bias adn_ordering"
        ),
        reduction=_strides,
        required=("channels", "strides"),
        defaults={"norm": "INSTANCE"},
    ),
    "VNet": Network(
        arguments=_names("act dropout_prob_down dropout_prob_up dropout_dim bias"),
        reduction=_fixed(16),
    ),
}


def get_network(network: str) -> Network:
    """Return what is known of `network`. Raises ConfigError naming the nearest known one."""
    if network in NETWORKS:
        return NETWORKS[network]
    folded = {name.lower(): name for name in NETWORKS}
    near = difflib.get_close_matches(network.lower(), folded, n=1, cutoff=0.6)
    hint = f"did you mean {folded[near[0]]}? " if near else ""
    raise ConfigError(f"network '{network}' is unknown; {hint}allowed: {', '.join(sorted(NETWORKS))}")


def constructor_arguments(
    network: str, arguments: Mapping[str, Any], patch: Sequence[int], spatial_dims: int
) -> dict[str, Any]:
    """Return the keyword arguments of the network's constructor, all but the channels.

    patch: (z, y, x) in voxels; UNETR is built for one size.
    """
    sizes = {"img_size": tuple(patch)[-spatial_dims:]} if network == "UNETR" else {}
    return {**get_network(network).defaults, **arguments, **sizes, "spatial_dims": spatial_dims}


def with_architecture(network: str, arguments: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """Return `arguments` with the content of the architecture file that they name, if the network takes one.

    The content, not the path, is what a training is made of: a changed file trains anew, and the trained model can be
    built without it. folders: where a relative path is looked for. Raises ConfigError, see `load_architecture`.
    """
    named = arguments.get("architecture")
    if network != "DiNTS" or not isinstance(named, str):
        return dict(arguments)
    return {**arguments, "architecture": load_architecture(named, folders)}


def divisor(network: str, arguments: Mapping[str, Any], spatial_dims: int = 3) -> int:
    """Return the number of voxels by which every patch size must be divisible (1: any size)."""
    known = get_network(network)
    return math.lcm(*known.reduction(arguments, spatial_dims)) if known.divisible else 1


def check_arguments(network: str, arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming the nearest known argument, if the network does not take `arguments`."""
    known = get_network(network)
    for name in arguments:
        if name in RESERVED:
            raise ConfigError(f"arguments.{name} of {network} is set by the pipeline; remove it")
        if name not in known.arguments:
            near = difflib.get_close_matches(name, known.arguments, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"arguments.{name}: {network} has no such argument; {hint}allowed: {', '.join(sorted(known.arguments))}"
            )
    for name in known.required:
        if name not in arguments:
            raise ConfigError(f"arguments.{name} is missing; {network} needs {', '.join(known.required)}")
    if network == "FlexibleUNet" and arguments["backbone"] not in FLEXIBLE_UNET_BACKBONES:
        raise ConfigError(
            f"arguments.backbone '{arguments['backbone']}' is unknown; allowed: {', '.join(FLEXIBLE_UNET_BACKBONES)}"
        )
    if network == "DiNTS":
        check_architecture(arguments["architecture"], "arguments.architecture")
    if known.library == DYNAMIC or network == "DynUNet":
        _check_strides(network, arguments)
    if arguments.get("pretrained"):
        raise ConfigError(f"arguments.pretrained of {network} would download weights; set it to false")


def _check_strides(network: str, arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a U-Net of stages has a stride for each, and outputs at full resolution."""
    strides = _sequence(arguments, "strides")
    if arguments.get("n_stages", len(strides)) != len(strides):
        raise ConfigError(
            f"arguments.strides has {len(strides)} entries for n_stages {arguments['n_stages']}; give one per stage"
        )
    if strides[0] not in (1, [1] * 2, [1] * 3):
        raise ConfigError(
            f"arguments.strides begins with {strides[0]}: {network} would not give its outputs at full resolution; "
            "begin with 1"
        )


def check_patch(network: str, arguments: Mapping[str, Any], patch: Sequence[int], spatial_dims: int = 3) -> None:
    """Raise ConfigError, suggesting a size, if the network cannot be trained on patches of `patch` (z, y, x) voxels."""
    known = get_network(network)
    sizes = list(patch)
    if spatial_dims == 2 and sizes[0] != 1:
        raise ConfigError(
            f"train.patch {sizes} must be one slice for {network} with spatial_dims 2; try {[1, *sizes[1:]]}"
        )
    reduction = known.reduction(arguments, spatial_dims)
    steps = reduction if known.divisible else (1,) * spatial_dims
    plane = sizes[-spatial_dims:]
    if any(size % step for size, step in zip(plane, steps, strict=True)):
        suggestion = [max(step, round(size / step) * step) for size, step in zip(plane, steps, strict=True)]
        shown = steps[0] if len(set(steps)) == 1 else list(steps)
        raise ConfigError(
            f"train.patch {sizes} must be divisible by {shown} for {network}; "
            f"try {[1] * (3 - spatial_dims) + suggestion}"
        )
    coarsest = [size // step for size, step in zip(plane, reduction, strict=True)]
    if min(coarsest) < 1 or (known.normalised and math.prod(coarsest) < 2):
        suggestion = [max(size, 2 * step) for size, step in zip(plane, reduction, strict=True)]
        raise ConfigError(
            f"train.patch {sizes} is too small for {network}, whose coarsest level reduces it {max(reduction)} times; "
            f"try {[1] * (3 - spatial_dims) + suggestion}"
        )


def check_network(network: str, arguments: Mapping[str, Any], spatial_dims: int, patch: Sequence[int]) -> None:
    """Raise ConfigError if the network, its arguments or the patch (z, y, x voxels) cannot be trained."""
    check_arguments(network, arguments)
    if network == "DiNTS" and arguments["architecture"]["spatial_dims"] != spatial_dims:
        raise ConfigError(
            f"arguments.architecture is one of spatial_dims {arguments['architecture']['spatial_dims']}; it does not "
            f"fit a network of spatial_dims {spatial_dims}"
        )
    check_patch(network, arguments, patch, spatial_dims)
