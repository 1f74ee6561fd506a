"""Which patches a training sees: every sample is a function of (seed, step, index), so there is no state to lose.

A step's samples are numbered over all ranks and passes; each rank copies its own share of the numbers. Any number of
ranks therefore sees the same patches, no patch is drawn by two of them, and a resumed training goes on exactly.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellmap_pipe.errors import TrainingError
from cellmap_pipe.geometry import Shape3, shape3
from cellmap_pipe.prepare.labels import UNKNOWN
from cellmap_pipe.prepare.state_table import UNKNOWN_ROW
from cellmap_pipe.prepare.store import Store

# What a sample's random numbers are drawn for: each purpose has a stream of its own.
POSITION, AUGMENTATION, PARTNER, PARTNER_AUGMENTATION = range(4)

# Patches are centred on the drawn voxel up to this share of the patch size, so that it is not always in the middle.
JITTER = 0.25

# As many voxels of a crop are looked up where the store's sampled positions hold none that the model knows.
MOST_POSITIONS = 4096


def generator(seed: int, step: int, index: int, purpose: int) -> np.random.Generator:
    """Return the random numbers of one sample for one purpose: a counter-based stream (Philox) of its own.

    The lowest counter word is left to the draws; were the index there, neighbouring samples would share numbers.
    """
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, index, purpose, 0]))


@dataclass(frozen=True)
class Patch:
    """A box of a crop's stored arrays: lowest corner (z, y, x), which may lie outside them."""

    crop: int
    origin: Shape3


class Patches:
    """The crops that a training or validation reads, and copies of boxes of them.

    store: the training store. crops: names. classes: the model's classes, some or all of the store's.
    patch: (z, y, x) voxels. `tables` holds the crops' state tables, uint8 (crops, classes, rows), columns as `classes`.
    """

    def __init__(self, store: Store, crops: Sequence[str], classes: Sequence[str], patch: Sequence[int]) -> None:
        self.store = store
        self.crops = list(crops)
        self.classes = list(classes)
        self.patch = shape3(patch)
        missing = [name for name in classes if name not in store.classes]
        if missing:
            raise TrainingError(
                f"{store.path}: the store lacks the model's class '{missing[0]}'; run `snakemake -R chunk`"
            )
        self.columns = [store.classes.index(name) for name in classes]
        tables = [store.table(crop)[:, self.columns].T for crop in self.crops]
        rows = max((table.shape[1] for table in tables), default=UNKNOWN_ROW + 1)
        self.tables = np.full((len(tables), len(self.columns), rows), UNKNOWN, dtype=np.uint8)
        for filled, table in zip(self.tables, tables, strict=True):
            filled[:, : table.shape[1]] = table
        # torch indexes by signed integers; a table of more than 256 rows needs two bytes
        self.label_dtype: type[np.uint8] | type[np.int16] = np.uint8 if rows <= 256 else np.int16
        self.datasets = [store.crops[crop]["dataset"] for crop in self.crops]

    def counts(self, crop: int, name: str) -> tuple[int, int]:
        """Return how many voxels of the crop are known, and how many are positive, for a class."""
        counts = self.store.crops[self.crops[crop]]["counts"][name]
        return counts["present"] + counts["absent"], counts["present"]

    def copy(self, patch: Patch, image: npt.NDArray[np.uint8], label: npt.NDArray[np.integer]) -> None:
        """Copy the patch into `image` and `label` (z, y, x). Outside the arrays EM is mirrored, labels are unknown."""
        name = self.crops[patch.crop]
        stored_image, stored_label = self.store.image(name), self.store.label(name)
        inside = tuple(
            slice(max(start, 0), min(start + length, size))
            for start, length, size in zip(patch.origin, image.shape, stored_image.shape, strict=True)
        )
        target = tuple(
            slice(box.start - start, box.stop - start) for box, start in zip(inside, patch.origin, strict=True)
        )
        if image[target].shape == image.shape:
            image[...] = stored_image[inside]
            label[...] = stored_label[inside]
            return
        mirrored = [
            reflected(start, length, size)
            for start, length, size in zip(patch.origin, image.shape, stored_image.shape, strict=True)
        ]
        image[...] = stored_image[np.ix_(*mirrored)]
        label[...] = UNKNOWN_ROW
        label[target] = stored_label[inside]


def reflected(start: int, length: int, size: int) -> npt.NDArray[np.intp]:
    """Return the indices start .. start + length - 1 of an axis of `size` voxels, mirrored at its end voxels."""
    if size == 1:
        return np.zeros(length, dtype=np.intp)
    period = 2 * (size - 1)
    folded = np.arange(start, start + length) % period
    return np.minimum(folded, period - folded)


class Sampler:
    """Draws the training patches: a class, a crop that annotates it, then a voxel of it or any annotated one.

    centred_fraction: the probability of the former. A class's weight is (number of crops annotating it)^(-1/2): rarely
    annotated ones come up more often than their share of crops, but less than equally.
    Raises TrainingError if no crop has a known voxel of the model's classes.
    """

    def __init__(self, patches: Patches, *, seed: int, centred_fraction: float) -> None:
        self.patches = patches
        self.seed = seed
        self.centred_fraction = centred_fraction
        self.annotating = [
            [crop for crop in range(len(patches.crops)) if patches.counts(crop, name)[0]] for name in patches.classes
        ]
        weights = np.array([len(crops) ** -0.5 if crops else 0.0 for crops in self.annotating])
        if not weights.any():
            raise TrainingError(
                f"{patches.store.path}: none of the {len(patches.crops)} training crops has a known voxel of "
                f"{', '.join(patches.classes)}; check results/quality and the model's classes"
            )
        self.cumulative = np.cumsum(weights / weights.sum())
        self._positions: dict[int, dict[int, npt.NDArray[np.int32]]] = {}

    def draw(self, step: int, index: int, purpose: int = POSITION) -> Patch:
        """Return sample `index` of step `step`; it contains a known voxel of one of the model's classes."""
        random = generator(self.seed, step, index, purpose)
        column = min(int(np.searchsorted(self.cumulative, random.random(), side="right")), len(self.cumulative) - 1)
        while not self.annotating[column]:  # only rounding of the last cumulative weight leads here
            column -= 1
        crop = self.annotating[column][random.integers(len(self.annotating[column]))]
        positions = self._crop_positions(crop)
        centred = random.random() < self.centred_fraction
        voxels = positions[column] if centred and column in positions else positions[-1]
        voxel = voxels[random.integers(len(voxels))]
        shape = self.patches.store.image(self.patches.crops[crop]).shape
        origin = []
        for centre, length, size in zip(voxel, self.patches.patch, shape, strict=True):
            reach = int(JITTER * length)
            start = int(centre) - length // 2 + int(random.integers(-reach, reach + 1))
            # inside the stored array where that is larger than the patch; around all of it where smaller
            origin.append(int(np.clip(start, min(0, size - length), max(0, size - length))))
        return Patch(crop, shape3(origin))

    def _crop_positions(self, crop: int) -> dict[int, npt.NDArray[np.int32]]:
        """Return sampled voxels (n, 3) of a crop by class column of the model; -1: known for any of its classes."""
        if crop not in self._positions:
            name = self.patches.crops[crop]
            stored = self.patches.store.positions(name)
            known = stored[stored[:, 0] == -1, 1:]
            some = len(self.patches.columns) < len(self.patches.store.classes)
            if some:  # known for some class of the store is not yet known for one of the model's
                known = self._known_to_model(crop, stored[:, 1:])
            found = {
                column: stored[stored[:, 0] == stored_column, 1:]
                for column, stored_column in enumerate(self.patches.columns)
            }
            found = {column: voxels for column, voxels in found.items() if len(voxels)}
            found[-1] = known if some else np.concatenate([known, *found.values()])
            if not len(found[-1]):
                raise TrainingError(
                    f"{self.patches.store.path}: crop {name} has known voxels but no sampled position of them; "
                    "run `snakemake -R chunk`"
                )
            self._positions[crop] = found
        return self._positions[crop]

    def _known_to_model(self, crop: int, sampled: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return those of the sampled voxels (n, 3) that are known for a class of the model.

        If there are none, up to MOST_POSITIONS voxels at equal intervals in the order of all such voxels of the crop.
        """
        label = self.patches.store.label(self.patches.crops[crop])
        known_rows = (self.patches.tables[crop] != UNKNOWN).any(axis=0)
        found = sampled[known_rows[label[tuple(sampled.T)]]]
        if len(found):
            return found
        every = np.flatnonzero(known_rows[label])
        some = every[np.linspace(0, len(every) - 1, min(len(every), MOST_POSITIONS)).astype(np.intp)]
        return np.stack(np.unravel_index(some, label.shape), axis=1).astype(np.int32)


@dataclass(frozen=True)
class Tile:
    """A validation patch: where it lies, and which box of it (start, stop per axis) no other tile scores."""

    patch: Patch
    owned: tuple[slice, slice, slice]


def tiles(patches: Patches) -> list[Tile]:
    """Return fixed patches that cover the label box of every crop once; voxels seen twice belong to one of them."""
    found = []
    for crop, name in enumerate(patches.crops):
        record = patches.store.crops[name]
        stored = patches.store.image(name).shape
        axes = [
            _axis_tiles(int(offset), int(length), int(size), step)
            for offset, length, size, step in zip(
                record["label_offset"], record["label_shape"], stored, patches.patch, strict=True
            )
        ]
        for z in axes[0]:
            for y in axes[1]:
                for x in axes[2]:
                    found.append(Tile(Patch(crop, (z[0], y[0], x[0])), (z[1], y[1], x[1])))  # noqa: PERF401
    return found


def _axis_tiles(offset: int, length: int, size: int, step: int) -> list[tuple[int, slice]]:
    """Return (start, owned part) of the tiles along one axis: equal parts of the label box, centred in their tiles.

    Tiles stay inside the stored array of `size` voxels where it is large enough: its EM context serves them.
    """
    count = -(-length // step)
    edges = [offset + length * part // count for part in range(count + 1)]
    found = []
    for lower, upper in itertools.pairwise(edges):
        start = lower - (step - (upper - lower)) // 2
        start = min(max(start, min(0, size - step)), max(0, size - step))
        found.append((start, slice(lower - start, upper - start)))
    return found


def known_fraction(sampler: Sampler, draws: int = 16) -> float:
    """Return the mean share of known (voxel, class) pairs in the first `draws` patches of a training."""
    patches = sampler.patches
    image, label = np.empty(patches.patch, np.uint8), np.empty(patches.patch, patches.label_dtype)
    shares = []
    for index in range(draws):
        patch = sampler.draw(0, index)
        patches.copy(patch, image, label)
        shares.append((patches.tables[patch.crop] != UNKNOWN).mean(axis=0)[label].mean())
    return float(np.mean(shares))
