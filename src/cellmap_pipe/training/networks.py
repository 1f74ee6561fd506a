"""Networks by name, with one face: a list of logits (full resolution first) in training, one tensor in evaluation."""

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import monai.networks.nets
import torch
from torch import Tensor, nn

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.training.zoo import check_network, constructor_arguments

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
    constructor = getattr(monai.networks.nets, network)
    try:
        built = constructor(
            in_channels=in_channels,
            out_channels=n_classes,
            **constructor_arguments(network, arguments, patch, spatial_dims),
        )
    except (TypeError, ValueError, KeyError, AssertionError, IndexError, NotImplementedError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{network} cannot be built with arguments {dict(arguments)}: {message}") from error
    return SegmentationNetwork(built, spatial_dims)


def library_arguments(network: str) -> set[str]:
    """Return the argument names of the library's constructor, for comparison with the allow-list."""
    constructor = getattr(monai.networks.nets, network)
    if not inspect.isclass(constructor):
        constructor = monai.networks.nets.mednext.create_mednext
    return set(inspect.signature(constructor).parameters)


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
