"""Training batches, copied from the store by a thread while the network computes."""

import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellmap_pipe.training.augment import Variation, draw_variation, exchangeable_axes, permutations
from cellmap_pipe.training.sampling import (
    AUGMENTATION,
    PARTNER,
    PARTNER_AUGMENTATION,
    POSITION,
    Sampler,
    generator,
)

# Batches that are ready or being filled while one is in use.
PREFETCH = 2


@dataclass
class Batch:
    """One pass of one rank: `size` samples, followed by the partners of those that are mixed.

    image, label: (B + partners, z, y, x), valid until the next batch is asked for. crops, variations: of every row.
    mixed: (row, row of its partner, share of the former).
    """

    step: int
    size: int
    image: Tensor
    label: Tensor
    crops: list[int]
    variations: list[Variation]
    mixed: list[tuple[int, int, float]]


class Loader:
    """Iterates over the batches of steps `first` .. `last` - 1, `accumulate` of them per step, in order.

    settings: the resolved `train` section. rank, world: this process among all. Iterate once; `close` ends the thread.
    """

    def __init__(
        self,
        sampler: Sampler,
        settings: Mapping[str, Any],
        *,
        rank: int,
        world: int,
        first: int,
        last: int,
        pinned: bool,
    ) -> None:
        self.sampler = sampler
        self.settings = settings
        self.rank, self.world = rank, world
        self.steps = range(first, last)
        patches = sampler.patches
        voxel_nm = patches.store.voxel_nm
        exchangeable = exchangeable_axes(None if isinstance(voxel_nm, str) else voxel_nm, patches.patch)
        self.orders = permutations(exchangeable)
        rows = settings["batch"] * (2 if settings["mixup"]["probability"] > 0 else 1)
        self._free: queue.Queue[tuple[Tensor, Tensor]] = queue.Queue()
        self._ready: queue.Queue[tuple[Batch, tuple[Tensor, Tensor]] | BaseException | None] = queue.Queue()
        for _ in range(PREFETCH + 1):
            image = torch.empty((rows, *patches.patch), dtype=torch.uint8, pin_memory=pinned)
            label = torch.empty(
                (rows, *patches.patch),
                dtype=torch.uint8 if patches.label_dtype is np.uint8 else torch.int16,
                pin_memory=pinned,
            )
            self._free.put((image, label))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            item = self._ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            batch, buffers = item
            yield batch
            self._free.put(buffers)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._free.put((torch.empty(0), torch.empty(0)))
        self._thread.join()

    def _fill(self) -> None:
        try:
            for step in self.steps:
                for turn in range(self.settings["accumulate"]):
                    buffers = self._free.get()
                    if self._closed.is_set():
                        return
                    self._ready.put((self._batch(step, turn, *buffers), buffers))
            self._ready.put(None)
        except BaseException as error:  # raised where the batch is awaited
            self._ready.put(error)

    def _batch(self, step: int, turn: int, image: Tensor, label: Tensor) -> Batch:
        size = self.settings["batch"]
        first = (turn * self.world + self.rank) * size
        crops: list[int] = []
        variations: list[Variation] = []
        mixed: list[tuple[int, int, float]] = []

        def add(index: int, position: int, augmentation: int) -> np.random.Generator:
            patch = self.sampler.draw(step, index, position)
            row = len(crops)
            self.sampler.patches.copy(patch, image[row].numpy(), label[row].numpy())
            random = generator(self.sampler.seed, step, index, augmentation)
            crops.append(patch.crop)
            variations.append(draw_variation(random, self.settings["augment"], self.orders))
            return random

        rest = [add(first + sample, POSITION, AUGMENTATION) for sample in range(size)]
        mixup = self.settings["mixup"]
        for sample, random in enumerate(rest):
            if mixup["probability"] > 0 and random.random() < mixup["probability"]:
                mixed.append((sample, len(crops), float(random.beta(mixup["alpha"], mixup["alpha"]))))
                add(first + sample, PARTNER, PARTNER_AUGMENTATION)
        return Batch(step, size, image[: len(crops)], label[: len(crops)], crops, variations, mixed)
