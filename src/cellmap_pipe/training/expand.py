"""From shipped bytes to a network's input and targets, on the training device.

Batches travel as uint8 EM and label maps. Large tensors are reused from batch to batch: new ones would cost more time
in page faults than filling them does.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cellmap_pipe.intensity import lookup_table
from cellmap_pipe.prepare.labels import PRESENT, UNKNOWN
from cellmap_pipe.training.augment import Variation

# Voxels that a CPU treats at once, so that what lies between two operations stays in its cache.
SLAB_VOXELS = 2**18

# Rows of a state table: runs of consecutive ones (first, last), and whether all rows but those are meant.
Rows = tuple[tuple[tuple[int, int], ...], bool]


class Expander:
    """Turns uint8 EM and label maps on the device into the network's input, targets and known-masks.

    tables: state tables, uint8 (crops, classes, rows). ranges: (lo, hi) intensity of each crop's dataset, (crops, 2).
    What a method returns is overwritten by its next call.
    """

    def __init__(
        self, tables: npt.NDArray[np.uint8], ranges: Sequence[tuple[float, float]], device: torch.device
    ) -> None:
        self.tables = tables
        self.lookups = torch.from_numpy(np.stack([lookup_table(lo, hi) for lo, hi in ranges])).to(device)
        self._rows: dict[int, tuple[list[Rows], list[Rows]]] = {}
        self._buffers: dict[str, Tensor] = {}

    def image(self, stored: Tensor, crops: Sequence[int], variations: Sequence[Variation] | None = None) -> Tensor:
        """Return float32 (B, 1, z, y, x) from uint8 (B, z, y, x) by the crops' normalisation.

        variations: whose brightness, contrast and gamma the samples get; nothing else of them is applied.
        """
        image = self.buffer("image", (len(stored), 1, *stored.shape[1:]), torch.float32)
        for row, (volume, crop) in enumerate(zip(stored, crops, strict=True)):
            self.expand(volume, crop, variations[row] if variations else Variation(), image[row, 0])
        return image

    def expand(self, stored: Tensor, crop: int, variation: Variation, out: Tensor) -> None:
        """Write one sample's normalised intensities, after its brightness, contrast and gamma, to `out` (z, y, x)."""
        table = self.lookups[crop]
        if variation.brightness != 1:
            table = (table * variation.brightness).clamp_(max=1)
        if variation.contrast != 1:
            look_up(table, stored, out)
            lowest, highest = out.aminmax()
            mean = out.mean()
            table = ((table - mean) * variation.contrast + mean).clamp_(lowest, highest)
        if variation.inverted_gamma != 1:
            table = 1 - (1 - table) ** variation.inverted_gamma
        if variation.gamma != 1:
            table = table**variation.gamma
        look_up(table, stored, out)

    def states(self, label: Tensor, crops: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return target and known-mask, bool (B, C, z, y, x), from label maps (B, z, y, x) of bytes or int16.

        Comparisons with the few runs of rows that mean a state, a multiple faster than looking up every voxel.
        """
        shape = (len(label), self.tables.shape[1], *label.shape[1:])
        both = self.buffer("target", shape, torch.bool), self.buffer("known", shape, torch.bool)
        for row, (volume, crop) in enumerate(zip(label, crops, strict=True)):
            if crop not in self._rows:
                table = self.tables[crop]
                self._rows[crop] = (_consecutive(table == PRESENT), _consecutive(table != UNKNOWN))
            for slab in slabs(volume.shape, volume.device):
                for states, classes in zip(both, self._rows[crop], strict=True):
                    for column, rows in enumerate(classes):
                        first = classes.index(rows)  # classes of the same rows, as most are in what is known
                        if first < column:
                            states[row, column, slab].copy_(states[row, first, slab])
                        else:
                            self._compare(volume[slab], rows, states[row, column, slab])
        return both

    def _compare(self, label: Tensor, rows: Rows, out: Tensor) -> None:
        """Write to `out`, bool, which voxels of a label map have one of the rows."""
        runs, others = rows
        last = self.tables.shape[2] - 1
        # with bytes as output torch compares bytes many at a time, with bool one by one
        result = out.view(torch.uint8)
        part = self.buffer("part", out.shape, torch.uint8) if len(runs) > 1 else result
        if not runs:
            result.zero_()
        for number, (first, final) in enumerate(runs):
            target = part if number else result
            if first == final:
                torch.eq(label, first, out=target)
            elif first == 0:
                torch.le(label, final, out=target)
            else:
                torch.ge(label, first, out=target)
                if final < last:
                    above = torch.gt(label, final, out=self.buffer("above", out.shape, torch.uint8))
                    target.bitwise_xor_(above)
            if number:
                result.bitwise_or_(part)
        if others:
            result.bitwise_xor_(1)

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor on the device, the same memory for the same name as long as it suffices."""
        size = math.prod(shape)
        held = self._buffers.get(name)
        if held is None or held.dtype != dtype or len(held) < size:
            held = self._buffers[name] = torch.empty(size, dtype=dtype, device=self.lookups.device)
        return held[:size].view(*shape)


def slabs(shape: Sequence[int], device: torch.device) -> list[slice]:
    """Return the slabs of planes in which a volume (z, y, x) is treated: one on a GPU, which wants large pieces."""
    step = max(1, SLAB_VOXELS // math.prod(shape[1:])) if device.type == "cpu" else shape[0]
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def look_up(table: Tensor, stored: Tensor, out: Tensor) -> None:
    """Write table[stored] to `out`. table: float32 (256,); stored: uint8; out: contiguous float32 of its shape."""
    source, target = stored.flatten(), out.view(-1)
    step = SLAB_VOXELS // 4 if source.device.type == "cpu" else len(source)
    for start in range(0, len(source), step):
        part = slice(start, start + step)
        torch.index_select(table, 0, source[part].int(), out=target[part])


def _consecutive(states: npt.NDArray[np.bool_]) -> list[Rows]:
    """Return the rows of each class, from bool (classes, rows), in as few runs as possible."""
    found = []
    for wanted in states:
        runs, others = _runs(wanted), _runs(~wanted)
        found.append((others, True) if len(others) < len(runs) else (runs, False))
    return found


def _runs(wanted: npt.NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False)).tolist()
    return tuple((first, stop - 1) for first, stop in list(pairwise(edges))[::2])
