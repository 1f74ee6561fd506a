"""Search for an architecture of DiNTS: paths and operations of a lattice that has all of them get weights of their own.

As MONAI does it (He et al. 2021, arXiv:2103.15954): first the convolutions alone are learnt, then in turns the
convolutions, on one half of the training crops, and the weights of paths and operations, on the other half. To the loss
of the latter comes, with a share w that rises from 0 to 1,
    entropy of paths + entropy of operations + |memory - cost / cost of everything| + 0.001 topology
which drives every choice to a decision, the network to the memory aimed at, and paths to those that meet at their ends.
The likeliest network that is connected throughout is the result.
"""

import contextlib
import io
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import dints
from torch import Tensor, nn
from torch.nn import functional

from cellmap_pipe.errors import TrainingError
from cellmap_pipe.files import read_json
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.training.architecture import write_architecture
from cellmap_pipe.training.expand import Expander
from cellmap_pipe.training.loader import Loader
from cellmap_pipe.training.losses import build_loss
from cellmap_pipe.training.networks import SegmentationNetwork
from cellmap_pipe.training.optimisation import build_optimizer, learning_rate
from cellmap_pipe.training.sampling import Patches, Sampler, generator
from cellmap_pipe.training.transform import varied
from cellmap_pipe.training.zoo import check_patch

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 30.0

# MONAI's search: optimiser of the convolutions, betas of the architecture's, share of the topology term.
CONVOLUTIONS = {"optimizer": "sgd", "weight_decay": 4e-5, "momentum": 0.9, "schedule": "poly", "warmup": 0.0}
BETAS = (0.5, 0.999)
TOPOLOGY = 0.001

# Choosing an architecture is no place for weights and adjustments of the loss.
LOSS = {"loss": "dice_bce", "loss_options": {}, "class_weights": "none", "deep_supervision": [1.0], "groups": []}


class Half:
    """One half of the training crops: its batches, expanded on the device."""

    def __init__(
        self,
        store: Store,
        crops: Sequence[str],
        settings: Mapping[str, Any],
        *,
        seed: int,
        steps: range,
        device: torch.device,
    ) -> None:
        patches = Patches(store, crops, settings["classes"], settings["patch"])
        ranges = [store.intensity_range(name, settings["normalisation"]) for name in patches.datasets]
        self.expander = Expander(patches.tables, ranges, device)
        self.device = device
        sampler = Sampler(
            patches,
            seed=seed,
            centred_fraction=settings["centred_fraction"],
            class_power=settings["class_power"],
            planes=settings["planes"],
        )
        plain = {**settings, "accumulate": 1, "mixup": {"probability": 0.0, "alpha": 1.0}}
        self.loader = Loader(
            sampler, plain, rank=0, world=1, first=steps.start, last=steps.stop, pinned=device.type == "cuda"
        )
        self.batches = iter(self.loader)

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next batch: image, target and known-mask, valid until the next call."""
        batch = next(self.batches)
        image, label = batch.image.to(self.device), batch.label.to(self.device)
        image, label = varied(image, label, batch.crops, batch.variations, self.expander)
        return (image, *self.expander.states(label, batch.crops))


class Search:
    """A search on the training crops of a store.

    settings: those of a model that training.architecture.SEARCH_SETTINGS names. plan: max_steps, warmup
    (share of the steps before the architecture is learnt), channel_mul, num_blocks, num_depths, lr, architecture_lr,
    memory (aimed at, of that of the network with everything). The result is a function of these, the crops and the
    number of threads. Raises TrainingError for fewer than two crops, or for a loss that is not finite.
    """

    def __init__(
        self,
        store: Store,
        crops: Sequence[str],
        settings: Mapping[str, Any],
        plan: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        if len(crops) < 2:
            raise TrainingError(
                f"{store.path}: a search needs two training crops, one for the convolutions and one for the "
                f"architecture; the fold has {len(crops)}"
            )
        self.settings, self.plan, self.device = settings, plan, device
        dims = settings["spatial_dims"]
        check_patch("DiNTS", {"architecture": plan}, settings["patch"], dims)
        torch.manual_seed(settings["seed"])
        self.space = _search_space(plan, dims, device)
        searched = dints.DiNTS(
            dints_space=self.space, in_channels=1, num_classes=len(settings["classes"]), spatial_dims=dims
        )
        self.network = SegmentationNetwork(searched, dims).to(device)
        self.network.train()
        self.architecture = [self.space.log_alpha_a, self.space.log_alpha_c]
        own = {id(parameter) for parameter in self.architecture}
        self.convolutions = [parameter for parameter in self.network.parameters() if id(parameter) not in own]
        self.loss = build_loss(LOSS, len(settings["classes"])).to(device)
        self.schedule = {**CONVOLUTIONS, "lr": plan["lr"], "max_steps": plan["max_steps"]}
        self.optimizer = build_optimizer(self.convolutions, self.schedule)
        self.chooser = torch.optim.Adam(self.architecture, lr=plan["architecture_lr"], betas=BETAS)
        self.warmup = round(plan["warmup"] * plan["max_steps"])
        seed, last = settings["seed"], plan["max_steps"]
        learning, choosing = halves(crops, seed)
        self.learning = Half(store, learning, settings, seed=seed, steps=range(last), device=device)
        self.choosing = Half(
            store, choosing, settings, seed=seed + 1, steps=range(min(self.warmup, last), last), device=device
        )

    def run(self) -> dict[str, Any]:
        """Return the architecture found, with the keys of training.architecture.CODES."""
        plan, shown = self.plan, time.monotonic()
        try:
            for step in range(plan["max_steps"]):
                loss = self._learn(step)
                cost = self._choose(step) if step >= self.warmup else None
                if time.monotonic() - shown > PROGRESS_SECONDS or step + 1 == plan["max_steps"]:
                    shown = time.monotonic()
                    logger.info(
                        "step %d/%d: loss %.4f%s",
                        *(step + 1, plan["max_steps"], loss),
                        f", {cost:.2f} of the full network's memory" if cost is not None else "",
                    )
        finally:
            self.learning.loader.close()
            self.choosing.loader.close()
        nodes, paths, operations, _ = self.space.decode()
        codes = {"node_a": nodes, "arch_code_a": paths, "arch_code_c": operations}
        return {
            "spatial_dims": self.settings["spatial_dims"],
            "num_blocks": plan["num_blocks"],
            "num_depths": plan["num_depths"],
            **{name: code.astype(int).tolist() for name, code in codes.items()},
        }

    def _learn(self, step: int) -> float:
        """Move the convolutions, and return the loss."""
        _train_only(self.convolutions, self.architecture)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.schedule)
        loss = self._segmentation_loss(*self.learning.next())
        _require_finite(loss, step, "lr")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _choose(self, step: int) -> float:
        """Move the weights of paths and operations, and return the network's share of the full memory."""
        _train_only(self.architecture, self.convolutions)
        image, target, known = self.choosing.next()
        share = (step - self.warmup) / max(self.plan["max_steps"] - self.warmup, 1)
        cost, penalty = architecture_penalty(self.space, image.shape, self.plan["memory"])
        loss = self._segmentation_loss(image, target, known) + share * penalty
        _require_finite(loss, step, "architecture_lr")
        loss.backward()
        self.chooser.step()
        self.chooser.zero_grad(set_to_none=True)
        return float(cost.detach())

    def _segmentation_loss(self, image: Tensor, target: Tensor, known: Tensor) -> Tensor:
        bf16 = self.device.type == "cuda" and self.settings["amp"] == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            outputs = self.network(image)
        loss: Tensor = self.loss(outputs, target, known)
        return loss


def architecture_penalty(space: dints.TopologySearch, shape: Sequence[int], memory: float) -> tuple[Tensor, Tensor]:
    """Return the network's expected share of the full memory, and the terms that weigh the architecture itself.

    shape: of a batch of images. memory: the share aimed at.
    """
    children, _ = space.get_prob_a(child=True)
    entropy_a = -(children * torch.log(children + 1e-5)).mean()
    operations = functional.log_softmax(space.log_alpha_c, dim=-1)
    entropy_c = -(operations.exp() * operations).mean()
    cost = space.get_ram_cost_usage(shape) / space.get_ram_cost_usage(shape, full=True)
    topology = space.get_topology_entropy(children)
    return cost, entropy_a + entropy_c + (memory - cost).abs() + TOPOLOGY * topology


def halves(crops: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Return the crops in two parts, drawn by the seed whatever their order."""
    ordered = sorted(crops)
    drawn = [ordered[number] for number in generator(seed, 0, 0, 0).permutation(len(ordered))]
    return drawn[::2], drawn[1::2]


def search_architecture(
    index: str | Path,
    datalist: str | Path,
    settings: Mapping[str, Any],
    plan: Mapping[str, Any],
    out: str | Path,
    *,
    device: torch.device,
    threads: int = 1,
    source: str | None = None,
) -> None:
    """Search on the training crops of a fold's datalist and write the architecture found to `out`.

    index: of the training store. settings, plan: see `Search`. source: what the file says of itself.
    """
    torch.set_num_threads(threads)
    crops = [entry["crop"] for entry in read_json(datalist, "make it again with `snakemake -R datalist`")["training"]]
    found = Search(Store(index, grid=settings["grid"]), crops, settings, plan, device).run()
    kept = {key: settings[key] for key in ("grid", "classes", "patch", "batch", "seed")}
    said = source or f"search_dints: {plan['max_steps']} steps on {len(crops)} crops, seed {settings['seed']}"
    write_architecture(out, found, said, {**kept, **plan, "crops": sorted(crops)})
    logger.info("%s: %d of %d paths", out, sum(map(sum, found["arch_code_a"])), sum(map(len, found["arch_code_a"])))


def _search_space(plan: Mapping[str, Any], spatial_dims: int, device: torch.device) -> dints.TopologySearch:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints advice on patch sizes
        return dints.TopologySearch(
            channel_mul=plan["channel_mul"],
            num_blocks=plan["num_blocks"],
            num_depths=plan["num_depths"],
            spatial_dims=spatial_dims,
            device=str(device),
        )


def _require_finite(loss: Tensor, step: int, key: str) -> None:
    if not math.isfinite(value := float(loss.detach())):
        raise TrainingError(f"the loss of the search is {value} at step {step + 1}; lower search.{key}")


def _train_only(chosen: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> None:
    """Have gradients computed for `chosen` only: those of the others would cost time and memory for nothing."""
    for parameter in others:
        parameter.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
