"""Networks by name, with one face: a list of logits (full resolution first) in training, one tensor in evaluation."""

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import monai.networks.nets
import torch
from monai.networks.nets import dints
from torch import Tensor, nn

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.training.architecture import path_ends
from cellmap_pipe.training.zoo import DYNAMIC, check_network, constructor_arguments, get_network

logger = logging.getLogger(__name__)


class SegmentationNetwork(nn.Module):
    """A library's network behind the pipeline's interface.

    Takes float (B, channels, z, y, x). In training it returns a list of logits (B, classes, z', y', x'), full
    resolution first; in evaluation one tensor (B, classes, z, y, x). A network of slices takes one slice (z = 1).
    """

    def __init__(self, network: nn.Module, spatial_dims: int) -> None:
        super().__init__()
        self.network = network
        self.spatial_dims = spatial_dims

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        flat = self.spatial_dims == 2
        outputs = _as_list(self.network(image.squeeze(2) if flat else image), self.spatial_dims)
        if flat:
            outputs = [output.unsqueeze(2) for output in outputs]
        return outputs if self.training else outputs[0]


def _as_list(output: Any, spatial_dims: int) -> list[Tensor]:
    if isinstance(output, list | tuple):
        return list(output)
    # DynUNet stacks its heads, all resized to the full size, along an axis of their own
    return list(output.unbind(1)) if output.ndim == spatial_dims + 3 else [output]


def build_network(
    network: str,
    arguments: Mapping[str, Any],
    *,
    patch: Sequence[int],
    n_classes: int,
    in_channels: int = 1,
    spatial_dims: int = 3,
) -> SegmentationNetwork:
    """Return a freshly initialised network of the allow-list (training.zoo), its weights drawn from torch's generator.

    patch: (z, y, x) voxels it will be trained on. Raises ConfigError if name, arguments or patch do not fit.
    """
    check_network(network, arguments, spatial_dims, patch)
    construct = constructor(network)
    try:
        built = construct(
            in_channels=in_channels,
            out_channels=n_classes,
            **constructor_arguments(network, arguments, patch, spatial_dims),
        )
    except (TypeError, ValueError, KeyError, AssertionError, IndexError, NotImplementedError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        shown = {name: value for name, value in arguments.items() if name != "architecture"}
        raise ConfigError(f"{network} cannot be built with arguments {shown}: {message}") from error
    name_once(built)
    return SegmentationNetwork(built, spatial_dims)


def network_of(settings: Mapping[str, Any]) -> SegmentationNetwork:
    """Return the freshly initialised network of a model's resolved settings, in the memory layout that they name.

    settings: network, arguments, patch, classes, spatial_dims, channels_last. Raises ConfigError as `build_network`.
    """
    network = build_network(
        settings["network"],
        settings["arguments"],
        patch=settings["patch"],
        n_classes=len(settings["classes"]),
        spatial_dims=settings["spatial_dims"],
    )
    if settings["channels_last"]:
        layout = torch.channels_last if settings["spatial_dims"] == 2 else torch.channels_last_3d
        network.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs lack this form
    return network


def constructor(network: str) -> Callable[..., nn.Module]:
    """Return what builds a network from in_channels, out_channels and `zoo.constructor_arguments`.

    Raises ConfigError if its library is not installed.
    """
    if network == "DiNTS":
        return build_dints
    if get_network(network).library == DYNAMIC:
        return functools.partial(_build_dynamic, getattr(_dynamic_library(network), network))
    named: Callable[..., nn.Module] = getattr(monai.networks.nets, network)
    return named


class Topology(nn.Module):
    """The lattice of DiNTS with the paths of one architecture, as monai's TopologyInstance and with its weights' names.

    It asks no tensor which paths are active: that would wait for the GPU, and fails where tensors have no values.
    architecture: the keys of training.architecture.CODES. Takes and returns one feature map per depth, or 0.0.
    """

    def __init__(
        self, architecture: Mapping[str, Any], channel_mul: float, use_downsample: bool, act_name: Any, norm_name: Any
    ) -> None:
        super().__init__()
        dims, self.num_depths = architecture["spatial_dims"], architecture["num_depths"]
        self.num_blocks = architecture["num_blocks"]
        self.filter_nums = [int(32 * 2**depth * channel_mul) for depth in range(self.num_depths + 1)]
        self.cell_tree = nn.ModuleDict()
        self.paths: list[list[tuple[str, int, int]]] = []
        operations = len(dints.Cell.OPS2D if dims == 2 else dints.Cell.OPS3D)
        for block, active in enumerate(architecture["arch_code_a"]):
            self.paths.append([])
            for number, (start, end) in enumerate(path_ends(self.num_depths)):
                if not active[number]:
                    continue
                name, chosen = str((block, number)), architecture["arch_code_c"][block][number]
                self.cell_tree[name] = dints.Cell(
                    self.filter_nums[start + use_downsample],
                    self.filter_nums[end + use_downsample],
                    start - end,  # 1 doubles the resolution, -1 halves it
                    [int(operation == chosen) for operation in range(operations)],
                    dims,
                    act_name,
                    norm_name,
                )
                self.paths[block].append((name, start, end))

    def forward(self, maps: list[Any]) -> list[Any]:
        for paths in self.paths:
            made: list[Any] = [0.0] * self.num_depths
            for name, start, end in paths:
                made[end] = made[end] + self.cell_tree[name](maps[start], None)
            maps = made
        return maps


def build_dints(
    in_channels: int,
    out_channels: int,
    spatial_dims: int,
    architecture: Mapping[str, Any],
    channel_mul: float = 1.0,
    use_downsample: bool = True,
    act_name: Any = "RELU",
    norm_name: Any = ("INSTANCE", {"affine": True}),
) -> nn.Module:
    """Return monai's DiNTS with the paths and operations of an architecture, see training.architecture."""
    return dints.DiNTS(
        dints_space=Topology(architecture, channel_mul, use_downsample, act_name, norm_name),
        in_channels=in_channels,
        num_classes=out_channels,
        act_name=act_name,
        norm_name=norm_name,
        spatial_dims=spatial_dims,
        use_downsample=use_downsample,
        node_a=architecture["node_a"],
    )


def _dynamic_library(network: str) -> ModuleType:
    """Return the module of dynamic_network_architectures that holds the networks; it imports without torchvision."""
    try:
        return importlib.import_module(f"{DYNAMIC}.architectures.unet")
    except ImportError as error:
        raise ConfigError(
            f"{network} needs the package {DYNAMIC} ({error}), which the extra `resenc` of cellmap_pipe names; install "
            f"it by `pip install --no-deps {DYNAMIC}`: with its dependencies comes a torchvision that may not fit torch"
        ) from error


def _build_dynamic(network: Any, in_channels: int, out_channels: int, spatial_dims: int, **arguments: Any) -> nn.Module:
    """Return a network with the operations that nnU-Net gives it, its weights drawn as nnU-Net does."""
    built: nn.Module = network(
        input_channels=in_channels,
        num_classes=out_channels,
        conv_op=nn.Conv2d if spatial_dims == 2 else nn.Conv3d,
        norm_op=nn.InstanceNorm2d if spatial_dims == 2 else nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        **arguments,
    )
    return built.apply(network.initialize)


def name_once(network: nn.Module) -> None:
    """Have every weight under one name: averaged once per step, and saved once.

    DynUNet and the networks of dynamic_network_architectures hold modules twice: as an attribute and in a sequence, or
    in encoder and decoder. The second holder keeps its attribute, which is no part of the tree of modules any more.
    """
    ordered = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    kept = {id(child) for parent in network.modules() if isinstance(parent, ordered) for child in parent.children()}
    for parent in list(network.modules()):
        if isinstance(parent, ordered):
            continue
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if id(child) in kept:
                del parent._modules[name]
                object.__setattr__(parent, name, child)
            kept.add(id(child))


def library_arguments(network: str) -> set[str]:
    """Return the argument names of the library's constructor, for comparison with the allow-list."""
    if network == "DiNTS":
        both = (dints.DiNTS, dints.TopologyInstance)
        return {"architecture"}.union(*(inspect.signature(part).parameters for part in both))
    construct: Callable[..., Any] = constructor(network)
    if isinstance(construct, functools.partial):
        construct = construct.args[0]
    if not inspect.isclass(construct):
        construct = monai.networks.nets.mednext.create_mednext
    return set(inspect.signature(construct).parameters)


def freeze_unused(network: nn.Module, image: Tensor) -> list[str]:
    """Return the names of the parameters that no output depends on, after excluding them from training.

    DistributedDataParallel waits for a gradient of every trainable parameter and fails where none comes (UNETR's
    cross-attention norms, EfficientNet's classifier). image: (B, channels, z, y, x). Buffers are left as they were.
    """
    with unchanged_buffers(network):
        backward_of_nothing(network, image)
    unused = [
        name for name, parameter in network.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    network.zero_grad(set_to_none=True)
    for name in unused:
        network.get_parameter(name).requires_grad_(False)
    if unused:
        logger.info("%d parameters have no influence on the output and are frozen: %s", len(unused), ", ".join(unused))
    return unused


def backward_of_nothing(network: nn.Module, image: Tensor) -> None:
    """Run one forward and backward pass whose loss is zero whatever the outputs are."""
    torch.stack([0.0 * output.float().sum() for output in network(image)]).sum().backward()


class unchanged_buffers:  # noqa: N801  (a context manager, named as one)
    """Restore the network's buffers (batch-norm statistics) at the end of the block."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.saved: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        self.saved = {name: buffer.clone() for name, buffer in self.network.named_buffers()}

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, buffer in self.network.named_buffers():
                buffer.copy_(self.saved[name])


def parameter_count(parameters: Iterable[nn.Parameter]) -> int:
    """Return the number of trainable weights."""
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
