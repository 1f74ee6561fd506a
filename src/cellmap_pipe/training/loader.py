"""Training batches, copied from the store into a ring of reused buffers by threads while the network computes."""

import functools
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellmap_pipe.training.augment import Augmentation, Variation
from cellmap_pipe.training.sampling import (
    AUGMENTATION,
    MIXUP,
    PARTNER,
    PARTNER_AUGMENTATION,
    POSITION,
    Patch,
    Patches,
    Sampler,
    generator,
    uniforms,
)

# Batches that are ready while one is in use and every worker fills another.
AHEAD = 1

# Batches whose samples are drawn at once. After every copy the processor's caches hold voxels only: drawing batch by
# batch takes three times as long.
DRAWN = 8


# The patches of a batch with their variations, and which of them are mixed, see `Batch`.
Samples = tuple[list[tuple[Patch, Variation]], list[tuple[int, int, float]]]


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


class Buffers:
    """Memory of one batch: its rows (z, y, x) as numpy sees them, and the first n of them as a batch shows them.

    All views are made at once: making one after a copy, which leaves nothing else in the processor's caches, takes as
    long as a tenth of the copy.
    """

    def __init__(self, image: Tensor, label: Tensor) -> None:
        self.rows = list(zip(image.numpy(), label.numpy(), strict=True))
        self.shown = [(image[:count], label[:count]) for count in range(len(self.rows) + 1)]


def ring(count: int, rows: int, patches: Patches, *, pinned: bool) -> list[Buffers]:
    """Return memory for `count` batches of `rows` patches each, in two pieces: numpy asks for huge pages for them."""
    shape = (count, rows, *patches.patch)
    images, labels = (torch.from_numpy(np.empty(shape, dtype)) for dtype in (np.uint8, patches.label_dtype))
    if pinned:
        images, labels = images.pin_memory(), labels.pin_memory()
    return [Buffers(image, label) for image, label in zip(images, labels, strict=True)]


class Loader:
    """Iterates over the batches of steps `first` .. `last` - 1, `accumulate` of them per step, in order.

    settings: the resolved `train` section. rank, world: this process among all. pinned: memory for copies to a GPU.
    workers: threads that copy; batches do not depend on their number. Iterate once; `close` ends the threads. Without
    workers nothing is delivered: `fill` copies where it is called.
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
        workers: int = 1,
    ) -> None:
        self.sampler = sampler
        self.settings = settings
        self.rank, self.world = rank, world
        self.first = first
        self.batches = max(last - first, 0) * settings["accumulate"]
        self.augmentation = Augmentation(settings["augment"], sampler.patches.patch, sampler.patches.voxels)
        self._changed = threading.Condition()
        self._rows = settings["batch"] * (2 if settings["mixup"]["probability"] > 0 else 1)
        self._free = ring(workers + 1 + AHEAD, self._rows, sampler.patches, pinned=pinned)
        self._drawing = threading.Lock()
        self._block = functools.lru_cache(maxsize=workers + 2)(self._draw_block)
        self._taken = 0
        self._ready: dict[int, tuple[Batch, Buffers] | BaseException] = {}
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"loader-{number}", daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.batches):
            with self._changed:
                while not self._closed and number not in self._ready:
                    self._changed.wait()
                if self._closed:
                    return
                filled = self._ready.pop(number)
            if isinstance(filled, BaseException):
                raise filled
            batch, buffers = filled
            yield batch
            with self._changed:
                self._free.append(buffers)
                self._changed.notify_all()

    def close(self) -> None:
        """End the threads, after the batches that they are copying."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def buffers(self) -> Buffers:
        """Return memory of one batch, for `fill`."""
        return ring(1, self._rows, self.sampler.patches, pinned=False)[0]

    def fill(self, number: int, buffers: Buffers) -> Batch:
        """Return batch `number` of this process, counted from 0, copied into `buffers`."""
        patches = self.sampler.patches
        following = number + len(self._threads)
        if patches.blocked and following < self.batches:
            # the disk is at work on this thread's next batch while it copies
            for patch, _ in self._samples(following)[0]:
                patches.prefetch(patch)
        samples, mixed = self._samples(number)
        for (patch, _), (image, label) in zip(samples, buffers.rows, strict=False):
            patches.copy(patch, image, label)
        image_rows, label_rows = buffers.shown[len(samples)]
        return Batch(
            step=self._step(number),
            size=self.settings["batch"],
            image=image_rows,
            label=label_rows,
            crops=[patch.crop for patch, _ in samples],
            variations=[variation for _, variation in samples],
            mixed=mixed,
        )

    def _work(self) -> None:
        while True:
            with self._changed:
                # a number is taken with its buffers at hand: the batch that is awaited never lacks any
                self._changed.wait_for(lambda: self._closed or self._taken == self.batches or self._free)
                if self._closed or self._taken == self.batches:
                    return
                number, buffers = self._taken, self._free.pop()
                self._taken += 1
            filled: tuple[Batch, Buffers] | BaseException
            try:
                filled = self.fill(number, buffers), buffers
            except BaseException as error:  # raised where the batch is awaited
                filled = error
            with self._changed:
                self._ready[number] = filled
                self._changed.notify_all()

    def _step(self, number: int) -> int:
        return self.first + number // self.settings["accumulate"]

    def _samples(self, number: int) -> Samples:
        with self._drawing:
            return self._block(number // DRAWN)[number % DRAWN]

    def _draw_block(self, block: int) -> list[Samples]:
        return [self._draw(number) for number in range(block * DRAWN, min((block + 1) * DRAWN, self.batches))]

    def _draw(self, number: int) -> Samples:
        step, turn = self._step(number), number % self.settings["accumulate"]
        size, mixup = self.settings["batch"], self.settings["mixup"]
        first = (turn * self.world + self.rank) * size
        samples = [self._sample(step, first + row, POSITION, AUGMENTATION) for row in range(size)]
        mixed = []
        for row in range(size) if mixup["probability"] > 0 else ():
            random = generator(self.sampler.seed, step, first + row, MIXUP)
            if random.random() < mixup["probability"]:
                mixed.append((row, len(samples), float(random.beta(mixup["alpha"], mixup["alpha"]))))
                samples.append(self._sample(step, first + row, PARTNER, PARTNER_AUGMENTATION))
        return samples, mixed

    def _sample(self, step: int, index: int, position: int, augmentation: int) -> tuple[Patch, Variation]:
        patch = self.sampler.draw(step, index, position)
        numbers = uniforms(self.sampler.seed, step, index, augmentation, Augmentation.NUMBERS)
        return patch, self.augmentation.draw(numbers, patch.crop, patch.anchor)
