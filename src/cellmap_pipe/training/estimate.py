"""What a training needs on a GPU, found on a CPU: its memory, and whether the network trains at all.

The training pass is run on fake tensors, which have shapes and no content, at the size of the real patch and batch.
What is alive of them at the worst moment is the memory of a pass; everything else is a multiple of the weights.
"""

import contextlib
import copy
import logging
import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.training import zoo
from cellmap_pipe.training.losses import build_loss
from cellmap_pipe.training.masked_sums import GPU_PIECE
from cellmap_pipe.training.networks import network_of

logger = logging.getLogger(__name__)

# CUDA's context, the workspaces of cuDNN and cuBLAS, and what the allocator loses between blocks: an allowance.
CONTEXT_BYTES = 1_500_000_000

FLOAT_BYTES = 4
# A part of a pass does not shrink with the patch (bf16 copies of the weights); the rest is at least this share.
GROWTH_AT_LEAST = 0.5

STATES = 2  # target and known-mask, one byte per voxel and class each

# Buffers of GPU_PIECE numbers, or of a whole output where that is less, that the loss works in.
PIECE_BUFFERS = 18

# Tensors as large as the weights that the optimiser keeps.
OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "sgd": 1}

FAKE = "fake tensors"
NOT_FAKEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
# In the messages of other errors of networks that treat their tensors as arrays.
SPEAKS_OF_FAKES = re.compile("fake ?tensor|tensor subclass", re.IGNORECASE)

# What autocast on CUDA computes in float32 and autocast on a CPU does not (ATen/autocast_mode.h, AT_FORALL_FP32), as
# far as networks use it. Their inputs are kept in float32, so they take twice the memory.
FLOAT32_ON_CUDA = frozenset(
    {
        *(functional.layer_norm, functional.group_norm, functional.rms_norm, functional.softmax, functional.softplus),
        *(functional.interpolate, torch.softmax, Tensor.softmax, torch.sum, Tensor.sum, torch.exp, Tensor.exp),
    }
)


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of a network over a batch.

    saved: bytes that autograd keeps for the backward pass. peak: most bytes alive at once, weights, gradients and input
    apart. flops: of the forward pass. heads: shapes (B, classes, z, y, x) of the outputs; head_bytes: of one number
    in them. frozen: names of the parameters that no output depends on. method: how it was measured.
    """

    saved: int
    peak: int
    flops: int
    heads: tuple[tuple[int, ...], ...]
    head_bytes: int
    frozen: tuple[str, ...]
    method: str = FAKE


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU while training, by what they hold.

    activations: what a forward and backward pass of the network holds at its worst moment. buckets: copies of the
    gradients that processes exchange. context: see CONTEXT_BYTES.
    """

    weights: int
    gradients: int
    buckets: int
    optimizer: int
    average: int
    activations: int
    loss: int
    inputs: int
    context: int = CONTEXT_BYTES

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def training_memory(settings: Mapping[str, Any], gpus: int = 1) -> Memory:
    """Return what each of `gpus` training processes needs on its GPU for the resolved `train` settings."""
    return _Estimate(settings, gpus).memory(settings["batch"])


def check_network(settings: Mapping[str, Any], gpu_gb: float | None = None, gpus: int = 1) -> dict[str, Any]:
    """Return what training by the resolved `train` settings takes, as JSON, after training the network a little.

    gpu_gb: memory of a GPU in 10^9 bytes, if known. Raises ConfigError if the network cannot be built, does not train,
    or needs more than that; the message says what fits.
    """
    tried = try_network(settings)
    estimate = _Estimate(settings, gpus)
    measured, memory = estimate.measured(settings["batch"]), estimate.memory(settings["batch"])
    if gpu_gb is not None and (shortage := estimate.shortage(gpu_gb * 1e9)):
        raise ConfigError(f"{shortage}. If it is known to fit, set resources.train.gpu_gb to null")
    parameters = sum(parameter.numel() for parameter in estimate.network.parameters())
    return {
        "network": settings["network"],
        "spatial_dims": settings["spatial_dims"],
        "patch": list(settings["patch"]),
        "batch": settings["batch"],
        "precision": "bf16" if _bf16(settings) else "float32",
        "parameters": parameters,
        "frozen": list(measured.frozen),
        "heads": [list(shape) for shape in measured.heads],
        "head_weights": tried["head_weights"],
        "forward_gflop": round(measured.flops / 1e9, 3),
        "step_gflop": round(3 * measured.flops * settings["accumulate"] / 1e9, 3),
        "memory_gb": {name: round(size / 1e9, 3) for name, size in {**asdict(memory), "total": memory.total}.items()},
        "saved_gb": round(measured.saved / 1e9, 3),
        "measured_on": measured.method,
        "gpus": gpus,
        "gpu_gb": gpu_gb,
        "largest_batch": None if gpu_gb is None else estimate.largest_batch(gpu_gb * 1e9),
        "tried": tried,
    }


def memory_line(settings: Mapping[str, Any], device: torch.device, gpus: int = 1) -> str:
    """Return the line of a training's log that says what it needs on its GPU.

    Warns if a CUDA device has less: what is refused is for the device to say, this is an estimate. torch's random
    generators are left as they were.
    """
    estimate = _Estimate(settings, gpus)
    memory = estimate.memory(settings["batch"])
    text = f"needs about {memory.total / 1e9:.1f} GB on a GPU ({_parts(memory)})"
    if device.type != "cuda":
        return text
    has = torch.cuda.get_device_properties(device).total_memory
    if shortage := estimate.shortage(has):
        logger.warning("%s", shortage)
    return f"{text}; it has {has / 1e9:.1f} GB"


def describe(result: Mapping[str, Any]) -> str:
    """Return the result of `check_network` as a block of text."""
    memory = dict(result["memory_gb"])
    total = memory.pop("total")
    patch = " x ".join(map(str, result["patch"]))
    heads = ", ".join(" x ".join(map(str, shape[2:])) for shape in result["heads"])
    rows = [
        ("network", f"{result['network']}, {result['spatial_dims']}D, patch {patch}, batch {result['batch']}"),
        ("parameters", f"{result['parameters'] / 1e6:.2f} million"),
        ("frozen", ", ".join(result["frozen"]) or "none"),
        ("heads", f"{len(result['heads'])} ({heads}), weights {result['head_weights']}"),
        ("computation", f"{result['forward_gflop']:.0f} GFLOP forward, {result['step_gflop']:.0f} per step and GPU"),
        ("GPU memory", f"{total:.2f} GB in {result['precision']}, by {result['measured_on']}"),
        *[(f"  {name}", f"{size:.2f} GB") for name, size in memory.items()],
        ("largest batch", _largest(result)),
        ("tried", f"{result['tried']['patch']} on a CPU: loss {result['tried']['loss']:.4f}, every gradient finite"),
    ]
    return "\n".join(f"{name:<15} {value}" for name, value in rows)


def _largest(result: Mapping[str, Any]) -> str:
    if result["gpu_gb"] is None:
        return "unknown; set resources.train.gpu_gb to the memory of a GPU"
    return f"{result['largest_batch']} on a GPU of {result['gpu_gb']:g} GB"


# -- does it train ----------------------------------------------------------------------------------------------------


def try_network(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run one pass, forward, loss and backward, on the smallest patch that the network accepts, on the CPU in float32.

    Returns the patch, the loss, the number of outputs and their weights. Raises ConfigError if the first output is not
    of the patch's size, no output has a weight, or loss or gradient is not finite.
    """
    classes, patch = len(settings["classes"]), smallest_patch(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        network = network_of({**settings, "patch": patch}).train()
        image = torch.rand(1, 1, *patch)
        with _blaming(settings, patch):
            outputs = network(image)
        if tuple(outputs[0].shape) != (1, classes, *patch):
            raise ConfigError(
                f"{settings['network']}: the first output for a patch {patch} is {tuple(outputs[0].shape[1:])}, "
                f"{(classes, *patch)} expected; change `arguments` so that the output has the size of the patch"
            )
        weights = _head_weights(settings, len(outputs))
        target = torch.rand(1, classes, *patch) < 0.5
        plain = {**settings, "class_weights": "none"}  # what they depend on is known when there are crops
        loss = build_loss(plain, classes)(outputs, target, torch.ones_like(target))
        loss.backward()
    broken = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
    ]
    value = float(loss.detach())
    if not math.isfinite(value) or broken:
        raise ConfigError(
            f"{settings['network']} with arguments {dict(settings['arguments'])}: loss {value} and "
            f"{len(broken)} gradients that are not finite after one pass ({', '.join(broken[:3])}); change `arguments`"
        )
    return {"patch": patch, "loss": value, "outputs": len(outputs), "head_weights": weights}


def smallest_patch(settings: Mapping[str, Any]) -> list[int]:
    """Return the smallest patch (z, y, x), no larger than that of the settings, on which the network trains.

    The coarsest level is left with two voxels, for one alone cannot be normalised.
    """
    network, dims, patch = settings["network"], settings["spatial_dims"], list(settings["patch"])
    steps = zoo.get_network(network).reduction(settings["arguments"], dims)
    small = [min(size, step) for size, step in zip(patch[-dims:], steps, strict=True)]
    for axis in reversed(range(dims)):
        doubled = [size * 2 if number == axis else size for number, size in enumerate(small)]
        if doubled[axis] <= patch[-dims:][axis]:
            small = doubled
            break
    found = [1] * (3 - dims) + small
    zoo.check_patch(network, settings["arguments"], found, dims)
    return found


def _head_weights(settings: Mapping[str, Any], outputs: int) -> list[float]:
    """Return the share of each output in the loss; warns where the network has other outputs than there are weights."""
    given = list(settings["deep_supervision"])
    used = [*given, *[0.0] * outputs][:outputs]
    if not sum(used):
        raise ConfigError(
            f"train.deep_supervision {given} gives no weight to the {outputs} outputs of {settings['network']}; the "
            "first needs one"
        )
    if 1 < outputs != len(given):
        logger.warning(
            "%s has %d outputs and train.deep_supervision %d weights: %s",
            *(settings["network"], outputs, len(given)),
            "the coarsest learn nothing" if outputs > len(given) else "the last weights are not used",
        )
    return [round(weight / sum(used), 4) for weight in used]


# -- memory -----------------------------------------------------------------------------------------------------------


class _Estimate:
    """Memory of one training as a function of the batch; each pass is measured once."""

    def __init__(self, settings: Mapping[str, Any], gpus: int) -> None:
        self.settings, self.gpus = settings, gpus
        with torch.random.fork_rng(devices=[]):
            # really, on the CPU: constructors look at values, which fake tensors have not
            self.network = network_of(settings).train()
        self._passes: dict[int, Pass] = {}

    def measured(self, batch: int) -> Pass:
        if batch not in self._passes:
            self._passes[batch] = training_pass(self.network, self.settings, batch)
        return self._passes[batch]

    def memory(self, batch: int, accumulate: int | None = None) -> Memory:
        settings, measured = self.settings, self.measured(batch)
        passes = settings["accumulate"] if accumulate is None else accumulate
        frozen = set(measured.frozen)
        named = dict(self.network.named_parameters())
        trained = _size(parameter for name, parameter in named.items() if name not in frozen)
        weights = _size(named.values()) + _size(self.network.buffers())
        optimizer = OPTIMIZER_STATES[settings["optimizer"]] * trained
        if settings["optimizer"] == "sgd" and not settings["momentum"]:
            optimizer = 0
        return Memory(
            weights=weights,
            gradients=trained,
            buckets=trained if self.gpus > 1 else 0,
            optimizer=optimizer,
            average=weights if settings["ema"] else 0,
            activations=measured.peak,
            loss=_loss_bytes(settings, measured),
            inputs=_input_bytes(settings, batch, passes),
        )

    def largest_batch(self, limit: float) -> int:
        """Return the largest batch whose training takes at most `limit` bytes, 0 if there is none."""
        least = self.memory(1).total
        if least > limit:
            return 0
        fits, batch, fails = 1, 2, math.inf
        before = 1, least
        while fits + 1 < fails:
            total = self.memory(batch).total
            fits, fails = (batch, fails) if total <= limit else (fits, batch)
            # it grows by nearly the same for each patch
            each = (total - before[1]) / (batch - before[0])
            before = batch, total
            batch = int(min(max(batch + (limit - total) // each, fits + 1), fails - 1))
        return fits

    def shortage(self, limit: float) -> str | None:
        """Return what is wrong, and what fits, if the training takes more than `limit` bytes."""
        settings = self.settings
        memory = self.memory(settings["batch"])
        if memory.total <= limit:
            return None
        joint = settings["batch"] * settings["accumulate"]
        divisors = [size for size in range(self.largest_batch(limit), 0, -1) if not joint % size]
        if batch := next((size for size in divisors if self.memory(size, joint // size).total <= limit), None):
            advice = f"set train.batch to {batch} and train.accumulate to {joint // batch}"
        elif smaller := self._smaller_patch(limit, joint):
            advice = f"a batch of 1 needs too much as well: set train.patch to {smaller}, train.batch to 1"
            advice += f" and train.accumulate to {joint}" if joint > 1 else ""
        else:
            advice = "no smaller patch fits: use a smaller network, or GPUs with more memory"
        return (
            f"train.batch {settings['batch']} of patches {list(settings['patch'])} needs about "
            f"{memory.total / 1e9:.1f} GB on a GPU of {limit / 1e9:.1f} GB ({_parts(memory)}); {advice}"
        )

    def _smaller_patch(self, limit: float, passes: int) -> list[int] | None:
        """Return the largest patch that fits in so many passes of one, made by shortening the longest axis."""
        settings = self.settings
        dims, patch, least = settings["spatial_dims"], list(settings["patch"]), smallest_patch(settings)
        steps = [1] * (3 - dims) + list(zoo.get_network(settings["network"]).reduction(settings["arguments"], dims))
        memory = self.memory(1, passes)
        growing = memory.activations + memory.loss + memory.inputs
        constant, voxels = memory.total - growing, math.prod(patch)
        while axes := [axis for axis in range(3) if patch[axis] - steps[axis] >= least[axis]]:
            longest = max(axes, key=lambda axis: (patch[axis], axis))
            patch[longest] -= steps[longest]
            # measuring costs seconds: what is far too large is passed over
            if constant + GROWTH_AT_LEAST * growing * math.prod(patch) / voxels > limit:
                continue
            if _Estimate({**settings, "patch": patch}, self.gpus).memory(1, passes).total <= limit:
                return patch
        return None


def training_pass(network: nn.Module, settings: Mapping[str, Any], batch: int) -> Pass:
    """Return what a pass of `batch` patches takes, on fake tensors; `network` is not used up.

    A network that looks at the values of its tensors cannot be run on those: it is then run on one of the smallest
    patches it accepts, really, and the result scaled by the number of voxels, which is said in `method`.
    """
    patch = settings["patch"]
    fake = FakeTensorMode()
    try:
        with FakeCopyMode(fake):
            copied = copy.deepcopy(network)
        with fake, _blaming(settings, patch):
            return measure_pass(copied, torch.zeros(batch, 1, *patch), bf16=_bf16(settings))
    except Exception as error:
        if not _not_fakeable(error):
            raise
        small = smallest_patch(settings)
        with torch.random.fork_rng(devices=[]):
            copied = network_of({**settings, "patch": small}).train()
            found = measure_pass(copied, torch.zeros(1, 1, *small), bf16=_bf16(settings))
        ratio = batch * math.prod(patch) / math.prod(small)
        return Pass(
            saved=math.ceil(found.saved * ratio),
            peak=math.ceil(found.peak * ratio),
            flops=math.ceil(found.flops * ratio),
            heads=tuple(
                (batch, shape[1], *(n * p // s for n, p, s in zip(shape[2:], patch, small, strict=True)))
                for shape in found.heads
            ),
            head_bytes=found.head_bytes,
            frozen=found.frozen,
            method=f"a real pass at {small}, scaled",
        )


def measure_pass(network: nn.Module, image: Tensor, *, bf16: bool) -> Pass:
    """Return what a forward and backward pass takes, as autocast on CUDA would have it; tensors are real or fake.

    image: float32 (B, 1, z, y, x). The parameters' gradients are in place before, as in all but the first pass of a
    step, and deleted after.
    """
    parameters = dict(network.named_parameters())
    own = {tensor.untyped_storage()._cdata for tensor in [*parameters.values(), *network.buffers(), image]}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    reached: set[str] = set()
    hooks = []
    for name, parameter in parameters.items():
        parameter.grad = torch.zeros_like(parameter)
        hooks.append(parameter.register_post_accumulate_grad_hook(_noting(reached, name)))
    flops = FlopCounterMode(display=False)
    try:
        with Alive(own) as alive:
            with (
                torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
                torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
                _float32_as_on_cuda() if bf16 else contextlib.nullcontext(),
                flops,
            ):
                outputs = network(image)
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    finally:
        for hook in hooks:
            hook.remove()
        network.zero_grad(set_to_none=True)
    return Pass(
        saved=sum(saved.values()),
        peak=alive.peak,
        flops=flops.get_total_flops(),
        heads=tuple(tuple(output.shape) for output in outputs),
        head_bytes=outputs[0].element_size(),
        frozen=tuple(name for name in parameters if name not in reached),
    )


class Alive(TorchDispatchMode):
    """Follows how many bytes are alive of the tensors made within the block; those of the storages `own` are not."""

    def __init__(self, own: Iterable[int]) -> None:
        super().__init__()
        self.sizes = dict.fromkeys(own, 0)
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, operator: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata)
        return result

    def _gone(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


class _Float32(TorchFunctionMode):
    """Gives functions of FLOAT32_ON_CUDA their inputs in float32."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function in FLOAT32_ON_CUDA and args[0].dtype == torch.bfloat16:
            args = (args[0].float(), *args[1:])
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def _float32_as_on_cuda() -> Iterator[None]:
    with _Float32():
        yield


@contextlib.contextmanager
def _blaming(settings: Mapping[str, Any], patch: Sequence[int]) -> Iterator[None]:
    """Turn what a network says of a patch that it cannot use into one line."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        if _not_fakeable(error):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{settings['network']} fails on a patch {list(patch)}: {message}; change train.patch or `arguments`"
        ) from error


def _not_fakeable(error: Exception) -> bool:
    return isinstance(error, NOT_FAKEABLE) or bool(SPEAKS_OF_FAKES.search(str(error)))


def _noting(reached: set[str], name: str) -> Callable[[Tensor], None]:
    return lambda _: reached.add(name)


def _loss_bytes(settings: Mapping[str, Any], measured: Pass) -> int:
    """Return the bytes of the loss, but for the outputs' gradients, which are part of the pass.

    The buffers through which pieces go, targets and known-masks of the coarser outputs; mixed samples answer twice, on
    copies of the outputs that have gradients of their own.
    """
    rows = 2 if _mixes(settings) else 1
    finest, *coarser = (math.prod(shape) for shape in measured.heads)
    buffers = PIECE_BUFFERS * min(GPU_PIECE, rows * finest)
    copies = 2 * rows * (finest + sum(coarser)) * measured.head_bytes if _mixes(settings) else 0
    return FLOAT_BYTES * (buffers + STATES * rows * sum(coarser)) + copies


def _input_bytes(settings: Mapping[str, Any], batch: int, passes: int) -> int:
    """Return the bytes of the patches, every one of them mixed if any can be.

    Per voxel: EM and label as they come and label after the variations, 1 each; the image in float32, and as much again
    while it is varied; target and known-mask of all channels, twice for mixed samples. For each pass of a step that
    has several, image and label once more.
    """
    voxels = math.prod(settings["patch"]) * batch * (2 if _mixes(settings) else 1)
    states = STATES * (len(settings["classes"]) + len(settings["groups"])) * (2 if _mixes(settings) else 1)
    waiting = passes if passes > 1 else 0
    return voxels * (3 + 2 * FLOAT_BYTES + states + waiting * (1 + FLOAT_BYTES))


def _mixes(settings: Mapping[str, Any]) -> bool:
    return settings["mixup"]["probability"] > 0


def _bf16(settings: Mapping[str, Any]) -> bool:
    return bool(settings["amp"] == "bf16")


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _parts(memory: Memory) -> str:
    return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in asdict(memory).items() if size)
