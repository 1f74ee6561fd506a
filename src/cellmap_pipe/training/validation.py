"""How good a network is on the fold's validation crops: Dice over known voxels, on fixed tiles, the same each time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cellmap_pipe.prepare.labels import UNKNOWN
from cellmap_pipe.prepare.state_table import UNKNOWN_ROW
from cellmap_pipe.training.expand import Expander
from cellmap_pipe.training.sampling import Patches, Tile, tiles


@dataclass(frozen=True)
class Scores:
    """Dice by class, pooled over the validation crops; None where no known voxel is positive."""

    dice: dict[str, float | None]

    @property
    def mean_dice(self) -> float | None:
        """The mean over the classes that have a Dice."""
        found = [value for value in self.dice.values() if value is not None]
        return sum(found) / len(found) if found else None


class Validation:
    """The validation of one fold. Ranks share the tiles; counts are integers, so any number of ranks agrees."""

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
    def evaluate(self, network: nn.Module, *, bf16: bool = False) -> Scores:
        """Return the scores of `network`, probabilities thresholded at 1/2. It is left in the mode it was in."""
        training = network.training
        network.eval()
        # per class: true positives, predicted, positive; over known voxels
        counts = torch.zeros((3, len(self.patches.classes)), dtype=torch.int64, device=self.device)
        waiting: list[tuple[Tile, np.ndarray, np.ndarray]] = []
        for tile in self.tiles:
            image = np.empty(self.patches.patch, dtype=np.uint8)
            label = np.empty(self.patches.patch, dtype=self.patches.label_dtype)
            self.patches.copy(tile.patch, image, label)
            owned = np.full_like(label, UNKNOWN_ROW)
            owned[tile.owned] = label[tile.owned]
            if self.known_rows[tile.patch.crop][owned].any():
                waiting.append((tile, image, owned))
            if len(waiting) == self.batch:
                counts += self._counts(network, waiting, bf16)
                waiting = []
        if waiting:
            counts += self._counts(network, waiting, bf16)
        network.train(training)
        if self.world > 1:
            dist.all_reduce(counts)
        true_positive, predicted, positive = counts.tolist()
        return Scores(
            {
                name: 2 * hit / (found + present) if present else None
                for name, hit, found, present in zip(
                    self.patches.classes, true_positive, predicted, positive, strict=True
                )
            }
        )

    def _counts(self, network: nn.Module, batch: Sequence[tuple[Tile, np.ndarray, np.ndarray]], bf16: bool) -> Tensor:
        crops = [tile.patch.crop for tile, _, _ in batch]
        image = torch.from_numpy(np.stack([image for _, image, _ in batch])).to(self.device)
        label = torch.from_numpy(np.stack([label for _, _, label in batch])).to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            logits = network(self.expander.image(image, crops))
        target, known = self.expander.states(label, crops)
        answer = (logits > 0) & known
        axes = (0, 2, 3, 4)
        return torch.stack([(answer & target).sum(axes), answer.sum(axes), (target & known).sum(axes)])
