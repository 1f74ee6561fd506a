"""How long a training step takes, by network and by what it is spent on, eager and compiled.

    python benchmarks/train_step.py [--models NAME ...] [--patch Z Y X] [--batch N] [--steps N] [--compile] [--quick]

Networks, batches, optimisers and losses are those of config/models, of every model without --models; 14 classes, all
augmentations, no mixup, one pass per step. On a GPU patches have their real size, and networks run eager and compiled;
on the CPU (one thread, float32) they are cut to 64 voxels per axis, slices to 128, and two to a batch, and only
--compile compiles. Steps per second are those of a run in which no part waits for another, after two steps that do not
count; the shares are those of further steps, in which each part waits for the one before:
- data: the wait for the loader's batch, its way to the device, augmentation, targets and known-masks;
- forward, backward: of the network; loss: of the loss, its own backward pass included;
- optimiser: clipping, the step, the moving average.
The plain loop trains segresnet_ds as it is usually written: eager (bf16 on a GPU), dense float targets and masks, Dice
and cross-entropy, masked, in single operations on every output, no moving average; its batch is on the device already.
The last line is one JSON object: name, device, patches_per_s, loss_share, ratios (compiled to eager by model, and our
faster way to the plain loop), targets (of a GPU at the real size), ok.
"""

import argparse
import copy
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from volumes import ATOMS, CONFIG, crop_pair, shifted, write_store

from cellmap_pipe.config import load_config
from cellmap_pipe.errors import CellmapError
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.schema import load_yaml
from cellmap_pipe.training.expand import Expander
from cellmap_pipe.training.loader import Loader
from cellmap_pipe.training.losses import build_loss
from cellmap_pipe.training.networks import network_of
from cellmap_pipe.training.optimisation import build_optimizer, learning_rate, update_average
from cellmap_pipe.training.sampling import Patches, Sampler
from cellmap_pipe.training.transform import varied

logger = logging.getLogger("train_step")

ROOT = CONFIG.parents[1]
MODELS = sorted(path.stem for path in (ROOT / "config" / "models").glob("*.yaml"))
PLAIN = "segresnet_ds"
PARTS = ("data", "forward", "backward", "loss", "optimiser")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU_EDGE = {2: 128, 3: 64}
CPU_BATCH = 2
WARM = 2
STORE_EDGE = {"cpu": 160, "cuda": 288}  # longer than any patch

# On a GPU: least ratio of segresnet_ds to the plain loop, largest share of the loss in its step.
TARGETS = {"plain": 2.0, "loss_share": 0.05}

Outputs = list[Tensor]


class Clock:
    """Seconds of the parts of steps; measured apart, a part on a GPU ends before the next begins."""

    def __init__(self, *, apart: bool) -> None:
        self.apart = apart
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self.apart:
            synchronise()
            self.seconds[part] += time.perf_counter() - begin

    def shares(self) -> dict[str, float]:
        """Return the parts' shares of a step."""
        return {part: seconds / sum(self.seconds.values()) for part, seconds in self.seconds.items()}


def synchronise() -> None:
    """Wait for what is queued on the GPU, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def settings_of(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings with which the model is measured."""
    config = load_config(load_yaml(CONFIG), schemas=ROOT / "workflow" / "schemas", models=ROOT / "config" / "models")
    settings = config.model(model).training_settings()
    if DEVICE.type == "cpu":
        edge = CPU_EDGE[settings["spatial_dims"]]
        settings["patch"] = [min(n, edge) for n in settings["patch"]]
        settings["batch"] = min(settings["batch"], CPU_BATCH)
    settings["patch"] = options.patch or settings["patch"]
    settings["batch"] = options.batch or settings["batch"]
    return {**settings, "classes": ATOMS, "accumulate": 1, "max_steps": 10**6, "mixup": {"probability": 0.0}}


def drawn(settings: Mapping[str, Any]) -> nn.Module:
    """Return the network, its weights drawn, on the device."""
    torch.manual_seed(0)
    return network_of(settings).to(DEVICE)


def clip(network: nn.Module, settings: Mapping[str, Any]) -> None:
    """Limit the norm of the gradient as the settings say."""
    torch.nn.utils.clip_grad_norm_(network.parameters(), math.inf if settings["clip"] is None else settings["clip"])


def autocast() -> torch.autocast:
    """Return the mixed precision of the training loop: bf16 on a GPU."""
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DEVICE.type == "cuda")


class Training:
    """What a training consists of, with steps whose parts can be timed."""

    def __init__(self, store: Store, settings: Mapping[str, Any], *, compiled: bool) -> None:
        self.settings = settings
        patches = Patches(store, list(store.crops), settings["classes"], settings["patch"])
        sampler = Sampler(
            patches,
            seed=0,
            centred_fraction=settings["centred_fraction"],
            class_power=settings["class_power"],
            planes=settings["planes"],
        )
        ranges = [store.intensity_range(name, settings["normalisation"]) for name in patches.datasets]
        self.expander = Expander(patches.tables, ranges, DEVICE)
        self.loader = Loader(
            sampler, settings, rank=0, world=1, first=0, last=10**6, pinned=DEVICE.type == "cuda", workers=2
        )
        self.batches = iter(self.loader)
        self.network = drawn(settings)
        self.average = copy.deepcopy(self.network)
        self.trained: Callable[[Tensor], Outputs] = torch.compile(self.network) if compiled else self.network
        self.loss = build_loss(settings, len(settings["classes"])).to(DEVICE)
        self.optimizer = build_optimizer(self.network.parameters(), settings)

    def step(self, clock: Clock) -> None:
        """Make one step as the training loop makes it."""
        with clock("data"):
            batch = next(self.batches)
            image, label = (part.to(DEVICE, non_blocking=True) for part in (batch.image, batch.label))
            image, label = varied(image, label, batch.crops, batch.variations, self.expander)
            target, known = self.expander.states(label, batch.crops)
        with clock("forward"), autocast():
            outputs = self.trained(image)
        # the loss's gradient goes on into the network in a pass of its own
        leaves = [output.detach().requires_grad_() for output in outputs]
        with clock("loss"):
            self.loss(leaves, target, known).backward()
        with clock("backward"):
            torch.autograd.backward(outputs, [leaf.grad for leaf in leaves])
        with clock("optimiser"):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(batch.step, self.settings)
            clip(self.network, self.settings)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            update_average(self.average, self.network, batch.step + 1)

    def close(self) -> None:
        self.loader.close()


def plain_loss(outputs: Outputs, target: Tensor, known: Tensor, weights: Sequence[float]) -> Tensor:
    """Return masked Dice and cross-entropy, float32, of targets pooled to every output's size."""
    total = torch.zeros((), device=target.device)
    for output, weight in zip(outputs, weights, strict=False):
        logits, size = output.float(), list(output.shape[2:])
        share = functional.adaptive_avg_pool3d(known, size)
        wanted = functional.adaptive_avg_pool3d(target * known, size) / share.clamp(min=1e-6)
        answer = torch.sigmoid(logits)
        axes = (2, 3, 4)
        both = (share * answer * wanted).sum(axes)
        dice = 1 - (2 * both + 1) / ((share * answer).sum(axes) + (share * wanted).sum(axes) + 1)
        entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        entropy = (share * entropy).sum(axes) / share.sum(axes).clamp(min=1)
        total = total + weight / sum(weights) * (dice + entropy).mean()
    return total


class PlainLoop:
    """The usual loop: everything dense, one operation after the other."""

    def __init__(self, store: Store, settings: Mapping[str, Any]) -> None:
        training = Training(store, settings, compiled=False)
        batch = next(training.batches)
        image, label = (part.to(DEVICE) for part in (batch.image, batch.label))
        self.image = training.expander.image(image, batch.crops).clone()
        self.target, self.known = (states.float() for states in training.expander.states(label, batch.crops))
        training.close()
        self.settings = settings
        self.network = drawn({**settings, "channels_last": False})
        self.optimizer = build_optimizer(self.network.parameters(), settings)

    def step(self, clock: Clock) -> None:
        """Make one step; its parts are not timed."""
        with autocast():
            outputs = self.network(self.image)
        plain_loss(outputs, self.target, self.known, self.settings["deep_supervision"]).backward()
        clip(self.network, self.settings)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Measured:
    """Steps per second, the parts' shares of a step (of ours), peak memory in GB (of a GPU)."""

    rate: float
    shares: dict[str, float] | None
    peak_gb: float | None


def measure(store: Store, settings: Mapping[str, Any], way: str, steps: int) -> Measured:
    """Return what steps of a training cost: eager, compiled, or those of the plain loop."""
    torch.compiler.reset()
    plain = way == "plain"
    trained = PlainLoop(store, settings) if plain else Training(store, settings, compiled=way == "compiled")
    apart, together = Clock(apart=True), Clock(apart=False)
    for _ in range(WARM):
        trained.step(together)
    synchronise()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(steps):
        trained.step(together)
    synchronise()
    rate = steps / (time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None
    for _ in range(0 if plain else steps):
        trained.step(apart)
    trained.close()
    return Measured(rate, None if plain else apart.shares(), peak)


def line(name: str, way: str, settings: Mapping[str, Any], found: Measured) -> str:
    """Return a line of the table."""
    patch, batch = "x".join(map(str, settings["patch"])), settings["batch"]
    shares = "".join(f"{found.shares[part]:10.1%}" if found.shares else f"{'':10}" for part in PARTS)
    peak = "" if found.peak_gb is None else f"{found.peak_gb:.2f}"
    return f"{name:20}{way:10}{patch:>12}{batch:6}{found.rate:10.3g}{found.rate * batch:11.3g}{shares}{peak:>9}"


def main() -> int:
    """Measure, print the table and the JSON line. Returns 0 if every target is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help="model files")
    parser.add_argument("--patch", nargs=3, type=int, metavar=("Z", "Y", "X"), help="voxels")
    parser.add_argument("--batch", type=int, help="patches per step")
    parser.add_argument("--steps", type=int, default=30 if DEVICE.type == "cuda" else 3, help="steps that count")
    parser.add_argument("--compile", action="store_true", help="compile on the CPU, too")
    parser.add_argument("--quick", action="store_true", help="two networks, three steps")
    options = parser.parse_args()
    if options.quick:
        options.models, options.steps = [PLAIN, "unet_2d"], 3
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if DEVICE.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    else:
        torch.set_num_threads(1)

    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU, one thread, reduced patches"
    print(f"{device}\n{'network':30}{'patch':>12}{'batch':>6}{'steps/s':>10}{'patches/s':>11}", end="")
    print("".join(f"{part:>10}" for part in PARTS) + f"{'peak GB':>9}")
    ways = ["eager", "compiled"] if DEVICE.type == "cuda" or options.compile else ["eager"]
    speeds: dict[str, dict[str, float]] = {}
    loss_shares: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        pairs = shifted(crop_pair(STORE_EDGE[DEVICE.type]), 2)
        store = Store(write_store(Path(folder), ATOMS, pairs))
        for name in options.models:
            speeds[name] = {}
            for way in [*ways, *(["plain"] if name == PLAIN else [])]:
                try:
                    settings = settings_of(name, options)
                    found = measure(store, settings, way, options.steps)
                except (CellmapError, torch.OutOfMemoryError) as error:
                    logger.info("%s, %s: left out, %s", name, way, error)
                    continue
                print(line(name, way, settings, found), flush=True)
                speeds[name][way] = found.rate * settings["batch"]
                if found.shares:
                    loss_shares[name] = min(found.shares["loss"], loss_shares.get(name, 1.0))

    ratios = {
        name: found["compiled"] / found["eager"] for name, found in speeds.items() if {"compiled", "eager"} <= {*found}
    }
    if "plain" in speeds.get(PLAIN, {}):
        *ours, plain = speeds[PLAIN].values()
        ratios["plain"] = max(ours) / plain
    targets = TARGETS if DEVICE.type == "cuda" and PLAIN in options.models and not options.patch else {}
    ok = not targets or (ratios.get("plain", 0) >= targets["plain"] and loss_shares[PLAIN] <= targets["loss_share"])
    result = {
        "name": "train_step",
        "device": device,
        "patches_per_s": {name: {way: float(f"{v:.4g}") for way, v in found.items()} for name, found in speeds.items()},
        "loss_share": {name: round(share, 4) for name, share in loss_shares.items()},
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "targets": targets,
        "ok": ok,
    }
    print(json.dumps(result))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
