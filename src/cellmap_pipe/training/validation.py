"""How good a network is on the fold's validation crops: over known voxels, on fixed tiles, the same each time."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cellmap_pipe.errors import TrainingError
from cellmap_pipe.evaluation import aggregate
from cellmap_pipe.evaluation.alignment import is_instance
from cellmap_pipe.prepare.labels import UNKNOWN
from cellmap_pipe.prepare.state_table import UNKNOWN_ROW
from cellmap_pipe.training.expand import Expander
from cellmap_pipe.training.sampling import Patches, tiles

# crops, EM and label maps of a batch
Shown = tuple[list[int], Tensor, Tensor]


@dataclass(frozen=True)
class Scores:
    """Dice by class, pooled over the validation crops; None where no known voxel is positive.

    challenge: the challenge's overall semantic score, the mean intersection over union of the classes that it scores
    by voxel; None if none of them is annotated. (Those that it scores by instance cannot be scored tile by tile.)
    """

    dice: dict[str, float | None]
    challenge: float | None = None

    @property
    def mean_dice(self) -> float | None:
        """The mean over the classes that have a Dice."""
        found = [value for value in self.dice.values() if value is not None]
        return sum(found) / len(found) if found else None


def check_validation(patches: Patches) -> None:
    """Raise TrainingError if the validation crops have no positive voxel: no weights could be chosen by them."""
    counts = [patches.counts(crop, name) for crop in range(len(patches.crops)) for name in patches.classes]
    if not any(positive for _, positive in counts):
        what = "positive" if any(known for known, _ in counts) else "known"
        raise TrainingError(
            f"{patches.store.path}: none of the {len(patches.crops)} validation crops has a {what} voxel of "
            f"{', '.join(patches.classes)}, so that no weights can be chosen; take another of folds.run, or fold all"
        )


class Validation:
    """The validation of one fold. Ranks share the tiles; counts are integers, so any number of ranks agrees.

    Batches are all of one size, so that a tile's answer does not depend on the tiles beside it.
    """

    def __init__(
        self, patches: Patches, expander: Expander, *, batch: int, device: torch.device, rank: int, world: int
    ) -> None:
        self.patches = patches
        self.expander = expander
        self.batch = batch
        self.device = device
        self.tiles = tiles(patches)[rank::world]
        self.world = world
        self.known_rows = [(table != UNKNOWN).any(axis=0) for table in patches.tables]

    @torch.no_grad()
    def evaluate(
        self, network: nn.Module, *, bf16: bool = False, stopped: Callable[[], bool] = lambda: False
    ) -> Scores | None:
        """Return the scores of `network`, probabilities thresholded at 1/2. It is left in the mode it was in.

        stopped: asked before every batch; once it says yes on any rank, there is no result on all of them.
        """
        training = network.training
        network.eval()
        # a row more for whether this rank stopped
        counts = torch.zeros((5, len(self.patches.classes)), dtype=torch.int64, device=self.device)
        for shown in self._batches():
            if stopped():
                counts[4] = 1
                break
            counts[:4] += self._counts(network, shown, bf16)
        network.train(training)
        if self.world > 1:
            dist.all_reduce(counts)
        *found, interrupted = counts.tolist()
        return None if any(interrupted) else scores_of(self.patches.classes, found)

    def _batches(self) -> Iterator[Shown]:
        """Yield the batches; while one is in use the next is copied."""
        filled = self._filled()
        with ThreadPoolExecutor(1) as thread:
            following = thread.submit(next, filled, None)
            while (shown := following.result()) is not None:
                following = thread.submit(next, filled, None)
                yield shown

    def _filled(self) -> Iterator[Shown]:
        """Yield the batches of the tiles that score a known voxel; what no tile is left for is unknown."""
        patches, shape = self.patches, (self.batch, *self.patches.patch)
        crops: list[int] = []
        for number, tile in enumerate(self.tiles):
            if patches.blocked:
                for ahead in self.tiles[number + 1 : number + 2]:
                    patches.prefetch(ahead.patch)
            if not crops:
                image, label = np.zeros(shape, np.uint8), np.full(shape, UNKNOWN_ROW, patches.label_dtype)
            row = len(crops)
            everything = np.empty(patches.patch, patches.label_dtype)
            patches.copy(tile.patch, image[row], everything)
            owned = everything[tile.owned]
            if not self.known_rows[tile.patch.crop][owned].any():
                continue  # the next one takes its row
            label[row][tile.owned] = owned
            crops.append(tile.patch.crop)
            if len(crops) == self.batch:
                yield crops, torch.from_numpy(image), torch.from_numpy(label)
                crops = []
        if crops:
            yield crops + crops[:1] * (self.batch - len(crops)), torch.from_numpy(image), torch.from_numpy(label)

    def _counts(self, network: nn.Module, shown: Shown, bf16: bool) -> Tensor:
        """Return true positives, predicted, positive and known voxels by class, (4, C) int64, all of known voxels."""
        crops, image, label = shown
        image, label = image.to(self.device), label.to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            logits = network(self.expander.image(image, crops))
        target, known = self.expander.states(label, crops)
        answer = (logits > 0) & known
        axes = (0, 2, 3, 4)
        return torch.stack([(answer & target).sum(axes), answer.sum(axes), (target & known).sum(axes), known.sum(axes)])


def scores_of(classes: list[str], counts: list[list[int]]) -> Scores:
    """Return the scores from true positives, predicted, positive and known voxels by class, each over all crops."""
    columns = list(zip(classes, *counts, strict=True))
    dice = {name: 2 * hit / (found + present) if present else None for name, hit, found, present, _ in columns}
    records = [
        {"label": name, "tp": hit, "fp": found - hit, "fn": present - hit, "status": "scored"}
        for name, hit, found, present, known in columns
        if known and not is_instance(name)
    ]
    return Scores(dice, aggregate(records)["overall_semantic_score"] if records else None)
