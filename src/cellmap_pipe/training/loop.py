"""The training loop of one process: steps, validations, checkpoints; several processes form one training.

Exact resume rests on three things: what a step sees and draws is a function of its number, everything else that changes
is in the checkpoint, and the order of additions is the same after every start.
"""

import contextlib
import copy
import functools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cellmap_pipe.errors import TrainingError
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.training import checkpoint, tracking
from cellmap_pipe.training.alarms import LOOK_EVERY, Alarms
from cellmap_pipe.training.compiling import compiled, compiler_faults
from cellmap_pipe.training.expand import Expander
from cellmap_pipe.training.fingerprint import INERT_SETTINGS
from cellmap_pipe.training.inference import FORMAT
from cellmap_pipe.training.loader import Batch, Loader
from cellmap_pipe.training.losses import build_loss
from cellmap_pipe.training.networks import (
    backward_of_nothing,
    freeze_unused,
    network_of,
    parameter_count,
    unchanged_buffers,
)
from cellmap_pipe.training.optimisation import build_optimizer, learning_rate, update_average
from cellmap_pipe.training.record import Journal, Meter, Progress
from cellmap_pipe.training.results import best_path
from cellmap_pipe.training.sampling import Patches, Sampler, known_fraction
from cellmap_pipe.training.starting import begin_with, channels_of, prevalence
from cellmap_pipe.training.transform import varied
from cellmap_pipe.training.usage import UsageLog
from cellmap_pipe.training.validation import Scores, Validation, check_validation

logger = logging.getLogger(__name__)

# Ranks compare notes (losses, requests to stop) about this often; a stop takes as long to be noticed.
CHECK_SECONDS = 1.0
SPARSE_KNOWN_FRACTION = 0.25


@dataclass(frozen=True)
class Process:
    """Where this process stands among those of the training, when it is to stop, and its threads that copy patches.

    usage: where the first one notes what the training takes.
    """

    rank: int
    world: int
    device: torch.device
    stop_requested: "StopRequest"
    deadline: float | None = None  # seconds of time.monotonic()
    workers: int = 1
    usage: UsageLog | None = None


@dataclass
class StopRequest:
    """Set by a signal handler: the name of the signal."""

    signal: str | None = None


class StoppedError(TrainingError):
    """The training was asked to stop, has saved its state and goes on when it is started again."""


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
        if settings["mlflow"]:
            tracking.check_installed()
        classes, patch = settings["classes"], settings["patch"]

        # groups are no outputs of the network: what is known of them teaches their parts
        patches = Patches(store, training, [*classes, *settings["groups"]], patch)
        self.sampler = Sampler(
            patches,
            seed=settings["seed"],
            centred_fraction=settings["centred_fraction"],
            class_power=settings["class_power"],
            planes=settings["planes"],
        )
        self.expander = self._expander(patches)
        self.datasets = set(patches.datasets)
        self.validation: Validation | None = None
        if validation:
            shown = Patches(store, validation, classes, patch)
            check_validation(shown)
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
        self.network = network_of(settings)
        if settings["init_from"] and state is None:
            begin_with(self.network, settings["init_from"])
        self.network.to(process.device)
        self.average = copy.deepcopy(self.network) if settings["ema"] else None
        self.loss = build_loss(
            settings,
            len(classes),
            groups=channels_of(settings["groups"], classes),
            prevalence=prevalence(patches)[: len(classes)],
        ).to(process.device)
        # all parameters, frozen ones too: the optimiser's state is the same for any number of processes
        self.optimizer = build_optimizer(self.network.parameters(), settings)
        self.progress = Progress(positives=[0] * len(classes))
        if state is not None:
            self._restore(state)
        self.progress.skipped = sorted({*self.progress.skipped, *skipped})
        self.alarms = Alarms(self.progress.alarms, quiet=process.rank > 0)
        # what is validated and kept
        self.evaluated = self.network if self.average is None else self.average
        self.trained = self._prepared()
        self.parameters = parameter_count(self.network.parameters())
        self._upload = torch.cuda.Stream() if process.device.type == "cuda" else None
        self._pending: list[Tensor] = []
        self._positives = torch.zeros(len(classes), dtype=torch.float64, device=process.device)
        self._saved_at = time.monotonic()
        self._best: dict[str, Any] | None = None  # model of the best weights, until it is on the disk
        self._best_before = self.progress.best_step  # as the last checkpoint has it

    def run(self) -> None:
        """Train to the end.

        Raises TrainingError for a loss or gradient that is not finite and a network that cannot be compiled,
        StoppedError if asked to stop.
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
        meter = Meter(self._patches_per_step(), process.device)
        next_check = progress.step  # a stop that was asked for while the store was read is seen before the first step
        self.network.train()
        with contextlib.ExitStack() as held:
            held.callback(loader.close)
            self._tell(meter)  # of the start
            held.callback(self._tell, meter)
            journal = None if process.rank else held.enter_context(Journal(self.run_dir, settings, progress))
            while True:
                # before a validation, which may outlast what is left of the walltime
                if self._epoch_ended() or progress.step >= next_check:
                    stop = self._agree()
                    if stop or self._checkpoint_due():
                        self._save()
                    if stop:
                        raise StoppedError(f"stopped by {stop} after step {progress.step}; start it again to go on")
                    next_check = progress.step + self._steps_until_check(meter)
                if self._epoch_ended() and progress.recorded < progress.step:
                    self._tell(meter)  # apart from the validation, which makes no step
                    self._record_epoch(journal)
                    self._tell(meter)
                    if progress.recorded < progress.step:
                        continue  # to where the request that cut the validation short is seen
                if progress.finished:
                    break
                meter.begin()
                with compiler_faults(settings["network"]):
                    self._step(batches, meter)
                together = progress.step >= next_check or self._epoch_ended() or self._to_be_kept()
                if together:
                    self._collect()  # waits for the device, which is part of its steps' time
                meter.end()
                if together and self._to_be_kept():
                    self._save()
                if together and meter.due():  # on all ranks: what is measured is dropped with each line
                    self.alarms.waiting(meter.waiting())
                    self._tell(meter)
                    logger.info("%s", meter.line(progress, settings))
            self._save(needed=True)

    def _step(self, batches: Iterator[Batch], meter: Meter) -> None:
        """Make one optimisation step over `accumulate` passes, whose losses add up to that of their joint batch."""
        settings, progress = self.settings, self.progress
        lr = learning_rate(progress.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # dropout and the like draw from torch's generator: a function of seed, step and rank
        torch.manual_seed((settings["seed"] * 1_000_003 + progress.step) * 1_009 + self.process.rank)
        turns = settings["accumulate"]
        total = torch.zeros((), device=self.process.device)
        passes = [self._shown(meter.fetch(batches)) for _ in range(turns)]
        self._count(passes)
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

    def _count(self, passes: list[tuple[Batch, Tensor, Tensor]]) -> None:
        """Show the loss what its prior rests on, the step's positive and known voxels by class on all ranks.

        Positive ones are counted now and then in any case, for the alarm of a class that has none.
        """
        looked_at = self.progress.step % LOOK_EVERY == 0
        if not (self.loss.adjusted or looked_at):
            return
        parts = []
        for batch, _, label in passes:
            target, known, _ = self._answers(batch, *self.expander.states(label, batch.crops))
            parts.append(self.loss.counts(target, known))
        counts = torch.stack(parts).sum(0)
        if self.process.world > 1:
            dist.all_reduce(counts)
        if looked_at:
            self._positives += counts[0]
            self.progress.looked_at += self._patches_per_step()
        if self.loss.adjusted:
            self.loss.observe(counts)

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

    def _answers(self, batch: Batch, target: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return target, known-mask and weight of what the outputs are compared with.

        A mixed sample answers for both of its labels, each with its own known-mask: the union of the masks would teach
        that what is unknown in one of them is absent.
        """
        # on all ranks and in all passes, mixed or not: sums over them are of one type
        weight = torch.ones(len(target), device=target.device)
        for row, partner, share in batch.mixed:
            weight[row], weight[partner] = share, 1 - share
        return target, known, weight

    def _loss(self, batch: Batch, image: Tensor, label: Tensor, totals: Tensor | None) -> Tensor:
        target, known = self.expander.states(label, batch.crops)
        for row, partner, share in batch.mixed:
            image[row].mul_(share).add_(image[partner], alpha=1 - share)
        with self._autocast():
            outputs = self.trained(image[: batch.size])
        if batch.mixed:  # slices: the copy of a list of rows to a GPU would wait for all that is queued there
            rows = [slice(batch.size), *[slice(row, row + 1) for row, _, _ in batch.mixed]]
            outputs = [torch.cat([output[part] for part in rows]) for output in outputs]
        return self.loss(outputs, *self._answers(batch, target, known), totals)

    def _expander(self, patches: Patches) -> Expander:
        ranges = [self.store.intensity_range(name, self.settings["normalisation"]) for name in patches.datasets]
        return Expander(patches.tables, ranges, self.process.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.process.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def _prepared(self) -> nn.Module:
        """Return the network as it is called in training: itself, or compiled, or wrapped for several processes."""
        trained: nn.Module = self.network
        device = self.process.device
        example = torch.zeros((1, 1, *self.settings["patch"]), device=device)
        self.network.train()
        # as in training: without it these passes may need more memory than any step
        with self._autocast():
            freeze_unused(self.network, example)  # for one process too: any number of them trains the same parameters
            if self.process.world > 1:
                trained = DistributedDataParallel(
                    self.network, device_ids=[device.index] if device.type == "cuda" else None
                )
                # It sorts its gradient buckets anew after the first backward pass, and with them the order of
                # additions: a pass without effect puts a resumed training into the order of an uninterrupted one.
                with unchanged_buffers(self.network):
                    backward_of_nothing(trained, example)
                self.network.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if self.settings["compile"] and device.type == "cuda":
            trained = compiled(trained, device, self.alarms, self.process.world)
        return trained

    # -- what happens between steps ---------------------------------------------------------------------------------

    def _tell(self, meter: Meter) -> None:
        """Note what the training took since it was last told of."""
        if self.process.usage is not None:
            with contextlib.suppress(RuntimeError):  # at the end: a GPU that failed answers nothing more
                meter.tell(self.process.usage, self.progress.step)

    def _epoch_ended(self) -> bool:
        step = self.progress.step
        return step % self.settings["steps_per_epoch"] == 0 or step >= self.settings["max_steps"]

    def _to_be_kept(self) -> bool:
        """Return whether the checkpoint of this step is kept for good."""
        every = self.settings["keep_every"]
        return every is not None and self.progress.step % every == 0

    def _patches_per_step(self) -> int:
        return int(self.settings["batch"] * self.settings["accumulate"] * self.process.world)

    def _collect(self) -> None:
        """Add the pending losses, averaged over ranks, and the counted voxels to the progress.

        Raises TrainingError if a loss is not finite. A gradient that is not finite made its step's loss nan.
        """
        if not self._pending:
            return
        losses = mean_over_ranks(torch.stack(self._pending), self.process.world)
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
        counted = self._positives.tolist()
        self._positives.zero_()
        self.progress.positives = [old + int(new) for old, new in zip(self.progress.positives, counted, strict=True)]

    def _record_epoch(self, journal: Journal | None) -> None:
        """Validate if it is time, keep the best weights, add a row to the history, decide whether this is the end.

        A validation that a request to stop cuts short is made anew by the training that goes on.
        """
        progress, settings = self.progress, self.settings
        at_end = progress.step >= settings["max_steps"]
        epoch = progress.step // settings["steps_per_epoch"]
        scores: Scores | None = Scores(dict.fromkeys(settings["classes"]))
        if self.validation is not None and (progress.step == 0 or at_end or epoch % settings["validate_every"] == 0):
            if self.process.world > 1:
                # a rank's batch-norm statistics are of its own patches; those of the first are saved
                for buffer in self.evaluated.buffers():
                    if buffer.is_floating_point():
                        dist.broadcast(buffer, 0)
            scores = self.validation.evaluate(self.evaluated, bf16=self.bf16, stopped=self._asked_to_stop)
        if scores is None:
            return
        progress.recorded = progress.step
        # here and not where they are counted: when that is depends on the clock
        self.alarms.never_seen(settings["classes"], progress.positives, progress.looked_at)
        mean = scores.mean_dice
        if progress.step == 0:
            progress.untrained = mean
            return
        kept = mean is not None and progress.judge(mean, settings["smoothing"])
        if settings["patience"] is not None and progress.since_best >= settings["patience"]:
            at_end = True
        if at_end and progress.best is None:  # a fold without validation: the last weights it is
            progress.best_step = progress.step
            kept = True
        progress.finished = at_end
        row = {
            "step": progress.step,
            "loss": progress.loss_sum / max(progress.loss_steps, 1),
            "lr": learning_rate(progress.step - 1, settings),
            "mean_dice": mean,
            "smoothed_dice": None if mean is None else progress.smoothed,
            "challenge_score": scores.challenge,
            "dice": scores.dice,
        }
        progress.history.append(row)
        progress.loss_sum, progress.loss_steps = 0.0, 0
        if kept:
            self._keep_best(scores)
            self._save()  # a training that resumes before these weights might never make them again
        if journal is not None:
            journal.write(row, progress, epoch)

    def _keep_best(self, scores: Scores) -> None:
        """Keep the weights for the next checkpoint that can be written; without them it would be of no use."""
        if self.process.rank:
            return
        settings = self.settings
        self._best = {
            "format": FORMAT,
            "state_dict": _on_cpu(self.evaluated.state_dict()),
            "settings": {key: value for key, value in settings.items() if key not in INERT_SETTINGS},
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
            "validation": {
                "mean_dice": scores.mean_dice,
                "smoothed_dice": self.progress.best,
                "challenge_score": scores.challenge,
                "dice": scores.dice,
            },
        }

    def _out_of_time(self) -> bool:
        return self.process.deadline is not None and time.monotonic() > self.process.deadline

    def _asked_to_stop(self) -> bool:
        return self.process.stop_requested.signal is not None or self._out_of_time()

    def _agree(self) -> str | None:
        """Return why the ranks stop now, or None: a signal to any of them, or the walltime of any."""
        code = 1 if self._out_of_time() else 0
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

    def _steps_until_check(self, meter: Meter) -> int:
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
        """Write a checkpoint (first rank). A full disk costs this checkpoint, not the training, unless `needed`.

        The best weights come first, those of the checkpoint before stay: whichever checkpoint is gone on from has its.
        """
        self._saved_at = time.monotonic()
        if self.process.rank:
            return
        state = {
            "fingerprint": self.fingerprint,
            "world": self.process.world,
            "threads": torch.get_num_threads(),
            "parameters": self.parameters,
            "progress": asdict(self.progress),
            "network": _on_cpu(self.network.state_dict()),
            "average": _on_cpu(self.average.state_dict()) if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "loss": _on_cpu(self.loss.state_dict()),
        }
        best = best_path(self.run_dir, self.progress.best_step)
        try:
            if self._best is not None:
                checkpoint.write_model(best, self._best)
                self._best = None
            path = checkpoint.save(self.run_dir, self.progress.step, state, keep_every=self.settings["keep_every"])
        except OSError as error:
            if needed:
                raise TrainingError(
                    f"{self.run_dir}: the checkpoint could not be written ({error}); free space"
                ) from error
            logger.warning("no checkpoint at step %d (%s); the last good one is kept", self.progress.step, error)
        else:
            logger.info("checkpoint %s", path.name)
            for old in set(self.run_dir.glob("best*.pt")) - {best, best_path(self.run_dir, self._best_before)}:
                old.unlink(missing_ok=True)
            self._best_before = self.progress.best_step

    def _restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss.load_state_dict(state["loss"])
        self.progress = Progress(**state["progress"])
        if not self.process.rank:
            logger.info("resumed after step %d", self.progress.step)
            if state["world"] != self.process.world:
                logger.warning(
                    "the training ran on %d processes and goes on with %d: the patches per step change in proportion",
                    *(state["world"], self.process.world),
                )
            if self.process.device.type == "cpu" and state["threads"] != torch.get_num_threads():
                logger.warning(
                    "the training ran on %d threads and goes on with %d: it ends with other last digits than one that "
                    "kept them",
                    *(state["threads"], torch.get_num_threads()),
                )

    def _announce(self) -> None:
        settings = self.settings
        self.alarms.without_positives(self.sampler.patches, settings["classes"])
        if self.process.rank:
            return
        share = known_fraction(self.sampler)
        logger.info(
            "%s, %d weights, on %d x %s (%d threads); patch %s, %d patches per step, %d training crops, %.0f %% of a "
            "patch's labels known on average",
            *(settings["network"], self.parameters, self.process.world, self.process.device.type),
            *(
                torch.get_num_threads(),
                settings["patch"],
                self._patches_per_step(),
                len(self.sampler.patches.crops),
                100 * share,
            ),
        )
        if self.validation is None:
            logger.info(
                "no validation: the weights after step %d are kept; the number is train.max_steps, as for the folds",
                settings["max_steps"],
            )
        if share < SPARSE_KNOWN_FRACTION:
            logger.warning(
                "only %.0f %% of what a patch shows is annotated: smaller patches or fewer classes would learn faster",
                100 * share,
            )


def mean_over_ranks(values: Tensor, world: int) -> Tensor:
    """Return the mean of each of the values over the ranks, whatever stands beside it in the vector.

    An all-reduce adds the ranks in an order that depends on an element's place, and how many losses are collected
    together depends on the clock.
    """
    if world == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(parts, values)
    return functools.reduce(torch.add, parts) / world


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # contiguous and no views: equal weights are saved as equal bytes
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
