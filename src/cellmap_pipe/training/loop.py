"""The training loop of one process: steps, validations, checkpoints; several processes form one training.

Exact resume rests on three things: what a step sees and draws is a function of its number, everything else that changes
is in the checkpoint, and the order of additions is the same after every start.
"""

import contextlib
import copy
import logging
import math
import resource
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from cellmap_pipe.errors import TrainingError
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.training import checkpoint
from cellmap_pipe.training.expand import Expander
from cellmap_pipe.training.inference import FORMAT
from cellmap_pipe.training.loader import Batch, Loader
from cellmap_pipe.training.losses import build_loss
from cellmap_pipe.training.networks import (
    backward_of_nothing,
    build_network,
    freeze_unused,
    parameter_count,
    unchanged_buffers,
)
from cellmap_pipe.training.optimisation import build_optimizer, learning_rate, update_average
from cellmap_pipe.training.results import BEST
from cellmap_pipe.training.sampling import Patches, Sampler, known_fraction
from cellmap_pipe.training.transform import varied
from cellmap_pipe.training.validation import Scores, Validation

logger = logging.getLogger(__name__)

# Ranks compare notes (losses, requests to stop) about this often; a stop takes as long to be noticed.
CHECK_SECONDS = 1.0
PROGRESS_SECONDS = 30.0
SPARSE_KNOWN_FRACTION = 0.25


@dataclass(frozen=True)
class Process:
    """Where this process stands among those of the training, when it is to stop, and its threads that copy patches."""

    rank: int
    world: int
    device: torch.device
    stop_requested: "StopRequest"
    deadline: float | None = None  # seconds of time.monotonic()
    workers: int = 1


@dataclass
class StopRequest:
    """Set by a signal handler: the name of the signal."""

    signal: str | None = None


class StoppedError(TrainingError):
    """The training was asked to stop, has saved its state and goes on when it is started again."""


@dataclass
class Progress:
    """What changes while training, besides tensors: numbers and lists only, saved in every checkpoint."""

    step: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    recorded: int = -1  # the last step after which an epoch was recorded
    best: float | None = None
    best_step: int = 0
    since_best: int = 0
    untrained: float | None = None
    skipped: list[str] = field(default_factory=list)  # crops of the fold that were damaged, and left out
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False


class Training:
    """One training, built from its settings and the store, fresh or as the last checkpoint left it.

    settings: the resolved `train` section with network, arguments, spatial_dims, classes, grid. training, validation:
    crop names; an empty validation keeps the last weights. skipped: crops of the fold that are left out. state: a
    checkpoint, or None.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        store: Store,
        training: list[str],
        validation: list[str],
        run_dir: Path,
        fingerprint: str,
        process: Process,
        state: dict[str, Any] | None,
        skipped: Iterable[str] = (),
    ) -> None:
        self.settings, self.store, self.run_dir, self.process = settings, store, run_dir, process
        self.fingerprint = fingerprint
        self.bf16 = process.device.type == "cuda" and settings["amp"] == "bf16"
        classes, patch = settings["classes"], settings["patch"]

        patches = Patches(store, training, classes, patch)
        self.sampler = Sampler(
            patches,
            seed=settings["seed"],
            centred_fraction=settings["centred_fraction"],
            class_power=settings["class_power"],
        )
        self.expander = self._expander(patches)
        self.datasets = set(patches.datasets)
        self.validation: Validation | None = None
        if validation:
            shown = Patches(store, validation, classes, patch)
            self.datasets |= set(shown.datasets)
            self.validation = Validation(
                shown,
                self._expander(shown),
                batch=settings["batch"],
                device=process.device,
                rank=process.rank,
                world=process.world,
            )

        torch.manual_seed(settings["seed"])
        self.network = build_network(
            settings["network"],
            settings["arguments"],
            patch=patch,
            n_classes=len(classes),
            spatial_dims=settings["spatial_dims"],
        )
        if settings["init_from"] and state is None:
            begin_with(self.network, settings["init_from"])
        if settings["channels_last"]:
            layout = torch.channels_last if settings["spatial_dims"] == 2 else torch.channels_last_3d
            self.network.to(memory_format=layout)  # type: ignore[call-overload]
        self.network.to(process.device)
        self.average = copy.deepcopy(self.network) if settings["ema"] else None
        self.loss = build_loss(settings, len(classes)).to(process.device)
        # all parameters, frozen ones too: the optimiser's state is the same for any number of processes
        self.optimizer = build_optimizer(self.network.parameters(), settings)
        self.progress = Progress()
        if state is not None:
            self._restore(state)
        self.progress.skipped = sorted({*self.progress.skipped, *skipped})
        # what is validated and kept
        self.evaluated = self.network if self.average is None else self.average
        self.trained = self._distributed()
        self.parameters = parameter_count(self.network.parameters())
        self._upload = torch.cuda.Stream() if process.device.type == "cuda" else None
        self._pending: list[Tensor] = []
        self._saved_at = time.monotonic()

    def run(self) -> None:
        """Train to the end.

        Raises TrainingError for a loss or gradient that is not finite, StoppedError if asked to stop.
        """
        progress, settings, process = self.progress, self.settings, self.process
        self._announce()
        loader = Loader(
            self.sampler,
            settings,
            rank=process.rank,
            world=process.world,
            first=progress.step,
            last=settings["max_steps"],
            pinned=process.device.type == "cuda",
            workers=process.workers,
        )
        batches = iter(loader)
        tensorboard = (
            SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=progress.step) if not process.rank else None
        )
        meter = Meter(settings["batch"] * settings["accumulate"] * process.world)
        next_check = progress.step  # a stop that was asked for while the store was read is seen before the first step
        self.network.train()
        try:
            while True:
                # before a validation, which may outlast what is left of the walltime
                if self._epoch_ended() or progress.step >= next_check:
                    stop = self._agree()
                    if stop or self._checkpoint_due():
                        self._save()
                    if stop:
                        raise StoppedError(
                            f"stopped by {stop} after step {progress.step}; start it again to go on from there"
                        )
                    next_check = progress.step + self._steps_until_check(meter)
                if self._epoch_ended() and progress.recorded < progress.step:
                    self._record_epoch(tensorboard)
                if progress.finished:
                    break
                self._step(batches, meter)
                if progress.step >= next_check or self._epoch_ended():
                    self._collect_losses()
                    if meter.due() and not process.rank:
                        logger.info("%s", meter.line(progress, settings))
        finally:
            loader.close()
            if tensorboard is not None:
                tensorboard.close()
        self._save(needed=True)

    def _step(self, batches: Any, meter: "Meter") -> None:
        """Make one optimisation step over `accumulate` passes, whose losses add up to that of their joint batch."""
        settings, progress = self.settings, self.progress
        step_began, waited = time.perf_counter(), 0.0
        lr = learning_rate(progress.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # dropout and the like draw from torch's generator: a function of seed, step and rank
        torch.manual_seed((settings["seed"] * 1_000_003 + progress.step) * 1_009 + self.process.rank)
        turns = settings["accumulate"]
        total = torch.zeros((), device=self.process.device)
        passes = []
        for _ in range(turns):
            began = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - began
            passes.append(self._shown(batch))
        totals = self._totals(passes) if turns > 1 else None
        for turn, shown in enumerate(passes):
            last = turn == turns - 1
            quiet = contextlib.nullcontext() if last or self.process.world == 1 else self.trained.no_sync()  # type: ignore[operator]
            with quiet:
                loss = self._loss(*shown, totals)
                loss.backward()
            total += loss.detach()
        # without a limit gradients stay as they are and the norm tells whether they are finite
        norm = torch.nn.utils.clip_grad_norm_(
            self.network.parameters(), settings["clip"] if settings["clip"] is not None else math.inf
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        if self.average is not None:
            update_average(self.average, self.network, progress.step)
        self._pending.append(total + 0.0 * norm)
        meter.add(time.perf_counter() - step_began, waited)

    def _shown(self, batch: Batch) -> tuple[Batch, Tensor, Tensor]:
        """Return a batch with what the network is shown, float32 (B, 1, z, y, x), and the label maps, on the device."""
        image, label = (self._uploaded(stored) for stored in (batch.image, batch.label))
        image, label = varied(image, label, batch.crops, batch.variations, self.expander)
        if self.settings["accumulate"] > 1:  # the step's next pass takes the same memory
            image, label = image.clone(), label.clone()
        return batch, image, label

    def _uploaded(self, stored: Tensor) -> Tensor:
        """Return a tensor of the loader's on the device; the loader may have its memory back then."""
        if self._upload is None:
            return stored
        # on a stream of its own: waiting for the copy does not wait for the steps that are queued
        with torch.cuda.stream(self._upload):
            copied = stored.to(self.process.device, non_blocking=True)
        self._upload.synchronize()
        copied.record_stream(torch.cuda.current_stream())
        return copied

    def _totals(self, passes: list[tuple[Batch, Tensor, Tensor]]) -> Tensor:
        """Return the denominators of the loss of the passes' joint batch on all ranks: labels alone determine them."""
        parts = []
        for batch, _, label in passes:
            target, known = self.expander.states(label, batch.crops)
            parts.append(self.loss.totals(*self._answers(batch, target, known)))
        totals = torch.stack(parts).sum(0)
        if self.process.world > 1:
            dist.all_reduce(totals)
        return totals

    def _answers(self, batch: Batch, target: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return target, known-mask and weight of what the outputs are compared with.

        A mixed sample answers for both of its labels, each with its own known-mask: the union of the masks would teach
        that what is unknown in one of them is absent.
        """
        if not batch.mixed:
            return target, known, None
        labels = list(range(batch.size)) + [partner for _, partner, _ in batch.mixed]
        weight = torch.ones(len(labels), device=target.device)
        for number, (row, _, share) in enumerate(batch.mixed):
            weight[row], weight[batch.size + number] = share, 1 - share
        return target[labels], known[labels], weight

    def _loss(self, batch: Batch, image: Tensor, label: Tensor, totals: Tensor | None) -> Tensor:
        target, known = self.expander.states(label, batch.crops)
        for row, partner, share in batch.mixed:
            image[row].mul_(share).add_(image[partner], alpha=1 - share)
        with self._autocast():
            outputs = self.trained(image[: batch.size])
        if batch.mixed:
            rows = list(range(batch.size)) + [row for row, _, _ in batch.mixed]
            outputs = [output[rows] for output in outputs]
        return self.loss(outputs, *self._answers(batch, target, known), totals)

    def _expander(self, patches: Patches) -> Expander:
        ranges = [self.store.intensity_range(name, self.settings["normalisation"]) for name in patches.datasets]
        return Expander(patches.tables, ranges, self.process.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.process.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def _distributed(self) -> nn.Module:
        """Return the network as it is called in training: itself, or compiled, or wrapped for several processes."""
        trained: nn.Module = self.network
        if self.process.world > 1:
            settings, device = self.settings, self.process.device
            example = torch.zeros((settings["batch"], 1, *settings["patch"]), device=device)
            self.network.train()
            with self._autocast():  # as in training: without it these passes may need more memory than any step
                freeze_unused(self.network, example)
            trained = DistributedDataParallel(
                self.network, device_ids=[device.index] if device.type == "cuda" else None
            )
            # It sorts its gradient buckets anew after the first backward pass, and with them the order of additions:
            # a pass without effect puts a resumed training into the same order as an uninterrupted one.
            with unchanged_buffers(self.network), self._autocast():
                backward_of_nothing(trained, example)
            self.network.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if self.settings["compile"] and self.process.device.type == "cuda":
            trained = torch.compile(trained)  # type: ignore[assignment]
        return trained

    # -- what happens between steps ---------------------------------------------------------------------------------

    def _epoch_ended(self) -> bool:
        step = self.progress.step
        return step % self.settings["steps_per_epoch"] == 0 or step >= self.settings["max_steps"]

    def _collect_losses(self) -> None:
        """Add the pending losses, averaged over ranks, to the progress. Raises TrainingError if one is not finite.

        A gradient that is not finite made its step's loss nan.
        """
        if not self._pending:
            return
        losses = torch.stack(self._pending)
        if self.process.world > 1:
            dist.all_reduce(losses)
            losses /= self.process.world
        first = self.progress.step - len(self._pending) + 1
        self._pending = []
        for step, loss in enumerate(losses.tolist(), first):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {step} (nan for a gradient that is not finite, too); "
                    f"the last good checkpoint is kept in {self.run_dir}. Lower train.lr or train.clip and train again"
                )
            self.progress.loss_sum += loss
            self.progress.loss_steps += 1

    def _record_epoch(self, tensorboard: SummaryWriter | None) -> None:
        """Validate if it is time, keep the best weights, add a row to the history, decide whether this is the end."""
        progress, settings = self.progress, self.settings
        at_end = progress.step >= settings["max_steps"]
        epoch = progress.step // settings["steps_per_epoch"]
        scores = Scores(dict.fromkeys(settings["classes"]))
        if self.validation is not None and (progress.step == 0 or at_end or epoch % settings["validate_every"] == 0):
            scores = self.validation.evaluate(self.evaluated, bf16=self.bf16)
        progress.recorded = progress.step
        if progress.step == 0:
            progress.untrained = scores.mean_dice
            return
        mean = scores.mean_dice
        kept = False
        if mean is not None:
            if progress.best is None or mean > progress.best:
                progress.best, progress.best_step, progress.since_best = mean, progress.step, 0
                self._keep_best(scores)
                kept = True
            else:
                progress.since_best += 1
        if settings["patience"] is not None and progress.since_best >= settings["patience"]:
            at_end = True
        if at_end and progress.best is None:  # no validation, or none with positive voxels: the last weights it is
            progress.best_step = progress.step
            self._keep_best(scores)
            kept = True
        progress.finished = at_end
        row = {
            "step": progress.step,
            "loss": progress.loss_sum / max(progress.loss_steps, 1),
            "lr": learning_rate(progress.step - 1, settings),
            "mean_dice": mean,
            "dice": scores.dice,
        }
        progress.history.append(row)
        progress.loss_sum, progress.loss_steps = 0.0, 0
        if kept:  # a training that resumes before these weights might never make them again
            self._save()
        if tensorboard is not None:
            for name in ("loss", "lr", "mean_dice"):
                if row[name] is not None:
                    tensorboard.add_scalar(name, row[name], progress.step)
            for name, dice in scores.dice.items():
                if dice is not None:
                    tensorboard.add_scalar(f"dice/{name}", dice, progress.step)
            tensorboard.flush()
            shown = f", mean Dice {mean:.3f}, best {progress.best:.3f} at step {progress.best_step}" if mean else ""
            logger.info("epoch %d, step %d: loss %.4f%s", epoch, progress.step, row["loss"], shown)

    def _keep_best(self, scores: Scores) -> None:
        if self.process.rank:
            return
        settings = self.settings
        checkpoint.write_model(
            self.run_dir / BEST,
            {
                "format": FORMAT,
                "state_dict": _on_cpu(self.evaluated.state_dict()),
                "settings": dict(settings),
                "classes": list(settings["classes"]),
                "grid": settings["grid"],
                "voxel_nm": self.store.voxel_nm if isinstance(self.store.voxel_nm, str) else list(self.store.voxel_nm),
                "normalisation": {
                    name: list(self.store.intensity_range(name, settings["normalisation"]))
                    for name in sorted(self.datasets)
                },
                "patch": list(settings["patch"]),
                "step": self.progress.step,
                "fingerprint": self.fingerprint,
                "validation": {"mean_dice": scores.mean_dice, "dice": scores.dice},
            },
        )

    def _agree(self) -> str | None:
        """Return why the ranks stop now, or None: a signal to any of them, or the walltime of the first."""
        code = 0
        if self.process.deadline is not None and not self.process.rank and time.monotonic() > self.process.deadline:
            code = 1
        if self.process.stop_requested.signal:
            code = 2
        if self.process.world > 1:
            shared = torch.tensor(code, device=self.process.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            code = int(shared)
        # by the code that all ranks share: a signal that comes only now must not stop this one alone
        if not code:
            return None
        return (self.process.stop_requested.signal or "a signal") if code == 2 else "the end of the walltime"

    def _steps_until_check(self, meter: "Meter") -> int:
        """Return after how many steps the ranks compare notes again: what fits into a second, by the first's clock."""
        steps = min(max(int(CHECK_SECONDS / meter.seconds_per_step), 1), 50)
        if self.process.world > 1:
            shared = torch.tensor(steps, device=self.process.device)
            dist.broadcast(shared, 0)
            steps = int(shared)
        return steps

    def _checkpoint_due(self) -> bool:
        return time.monotonic() - self._saved_at >= 60 * self.settings["checkpoint_minutes"]

    def _save(self, *, needed: bool = False) -> None:
        """Write a checkpoint (first rank). A full disk costs this checkpoint, not the training, unless `needed`."""
        self._saved_at = time.monotonic()
        if self.process.rank:
            return
        state = {
            "fingerprint": self.fingerprint,
            "world": self.process.world,
            "parameters": self.parameters,
            "progress": asdict(self.progress),
            "network": _on_cpu(self.network.state_dict()),
            "average": _on_cpu(self.average.state_dict()) if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
        }
        try:
            path = checkpoint.save(self.run_dir, self.progress.step, state)
        except OSError as error:
            if needed:
                raise TrainingError(
                    f"{self.run_dir}: the checkpoint could not be written ({error}); free space"
                ) from error
            logger.warning("no checkpoint at step %d (%s); the last good one is kept", self.progress.step, error)
        else:
            logger.info("checkpoint %s", path.name)

    def _restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        if not self.process.rank:
            logger.info("resumed after step %d", self.progress.step)
            if state["world"] != self.process.world:
                logger.warning(
                    "the training ran on %d processes and goes on with %d: the patches per step change in proportion",
                    *(state["world"], self.process.world),
                )

    def _announce(self) -> None:
        if self.process.rank:
            return
        settings = self.settings
        share = known_fraction(self.sampler)
        patches_per_step = settings["batch"] * settings["accumulate"] * self.process.world
        logger.info(
            "%s, %d weights, on %d x %s (%d threads); patch %s, %d patches per step, %d training crops, %.0f %% of a "
            "patch's labels known on average",
            *(settings["network"], self.parameters, self.process.world, self.process.device.type),
            *(
                torch.get_num_threads(),
                settings["patch"],
                patches_per_step,
                len(self.sampler.patches.crops),
                100 * share,
            ),
        )
        if share < SPARSE_KNOWN_FRACTION:
            logger.warning(
                "only %.0f %% of what a patch shows is annotated: smaller patches would learn faster", 100 * share
            )


class Meter:
    """Measures the training steps between two lines of the log; nothing of it reaches a result."""

    def __init__(self, patches_per_step: int) -> None:
        self.patches_per_step = patches_per_step
        self.seconds_per_step = CHECK_SECONDS
        self.line_at = time.perf_counter()
        self.seconds = self.waited = 0.0
        self.steps = 0

    def add(self, seconds: float, waited: float) -> None:
        """Account for one step of `seconds`, of which `waited` for data."""
        self.seconds += seconds
        self.waited += waited
        self.steps += 1
        self.seconds_per_step = self.seconds / self.steps

    def due(self) -> bool:
        """Return whether it is time for a line."""
        return time.perf_counter() - self.line_at >= PROGRESS_SECONDS

    def line(self, progress: Progress, settings: Mapping[str, Any]) -> str:
        """Return the progress line and begin a new interval."""
        left = round((settings["max_steps"] - progress.step) * self.seconds_per_step)
        text = (
            f"step {progress.step}/{settings['max_steps']}: "
            f"loss {progress.loss_sum / max(progress.loss_steps, 1):.4f}, "
            f"lr {learning_rate(progress.step - 1, settings):.2e}, "
            f"{self.patches_per_step / self.seconds_per_step:.2f} patches/s, "
            f"waiting for data {100 * self.waited / max(self.seconds, 1e-9):.0f} %, "
            f"{left // 3600} h {left // 60 % 60:02d} min {left % 60:02d} s of steps left, "
            f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
        )
        if torch.cuda.is_available():
            text += f", GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        self.line_at = time.perf_counter()
        self.seconds = self.waited = 0.0
        self.steps = 0
        return text


def begin_with(network: nn.Module, path: str) -> None:
    """Copy the weights of the model file `path` into `network` where name and shape agree, and log what did not."""
    given = checkpoint.read_model(path, "set train.init_from to a model.pt, or to null")["state_dict"]
    own = network.state_dict()
    matched = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    unmatched = sorted(own.keys() - matched.keys())
    if not matched:
        raise TrainingError(f"{path}: none of its weights fits the network; set train.init_from to another file")
    network.load_state_dict(matched, strict=False)
    logger.info("%d of %d tensors begin as in %s", len(matched), len(own), path)
    if unmatched:
        logger.warning("not in %s, hence fresh: %s", path, ", ".join(unmatched))


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # contiguous and no views: equal weights are saved as equal bytes
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
