"""Which patches a training sees: every sample is a function of (seed, step, index), so there is no state to lose.

A step's samples are numbered over all ranks and passes; each rank copies its own share of the numbers. Any number of
ranks therefore sees the same patches, no patch is drawn by two of them, and a resumed training goes on exactly.
"""

import itertools
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellmap_pipe.errors import TrainingError
from cellmap_pipe.geometry import Shape3, shape3, vec3
from cellmap_pipe.prepare.labels import UNKNOWN
from cellmap_pipe.prepare.layout import BLOCKED, Volume
from cellmap_pipe.prepare.nifti import slab_ranges
from cellmap_pipe.prepare.state_table import UNKNOWN_ROW
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.training.augment import isotropic

# What a sample's random numbers are drawn for: each purpose has a stream of its own.
POSITION, AUGMENTATION, PARTNER, PARTNER_AUGMENTATION, MIXUP = range(5)

# Patches are centred on the drawn voxel up to this share of the patch size, so that it is not always in the middle.
JITTER = 0.25

# As many voxels of a crop are looked up where the store's sampled positions hold none that the model knows.
MOST_POSITIONS = 4096

# A label map is scanned in slabs of as many voxels at most.
SLAB_VOXELS = 2**22


def generator(seed: int, step: int, index: int, purpose: int) -> np.random.Generator:
    """Return the random numbers of one sample for one purpose: a counter-based stream (Philox) of its own.

    The lowest counter word is left to the draws; were the index there, neighbouring samples would share numbers.
    """
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, index, purpose, 0]))


class _Stream(threading.local):
    """A generator per thread, set to the stream that is asked for: making one takes seven times as long."""

    def __init__(self) -> None:
        self.generator = generator(0, 0, 0, 0)
        self.state = dict(self.generator.bit_generator.state)


_STREAM = _Stream()


def uniforms(seed: int, step: int, index: int, purpose: int, count: int) -> list[float]:
    """Return the first `count` numbers in [0, 1) of a sample's stream for one purpose, see `generator`."""
    _STREAM.state["state"] = {"counter": (0, index, purpose, 0), "key": (seed, step)}
    _STREAM.generator.bit_generator.state = _STREAM.state
    numbers: list[float] = _STREAM.generator.random(count).tolist()
    return numbers


@dataclass(frozen=True)
class Patch:
    """A box of a crop's stored arrays: lowest corner (z, y, x), which may lie outside them.

    axis: the stored axis that is the patch's first; the other two follow it in their stored order. It is 0, z, but for
    slices across another axis: one across y shows rows along z and columns along x, one across x z and y.
    anchor: the voxel of the patch, on its own axes and counted from that corner, that it was drawn for and that is
    known; of a validation patch the first that it scores.
    """

    crop: int
    origin: Shape3
    anchor: Shape3
    axis: int = 0


class Patches:
    """The crops that a training or validation reads, and copies of boxes of them.

    store: the training store. crops: names. classes: the model's classes, some or all of the store's.
    patch: (z, y, x) voxels. `boxes` holds the boxes in stored order of patches whose first axis is z, y or x; `tables`
    the crops' state tables, uint8 (crops, classes, rows), columns as `classes`; `shapes` and `voxels` (nm) those of the
    crops' stored arrays, (z, y, x).
    """

    def __init__(self, store: Store, crops: Sequence[str], classes: Sequence[str], patch: Sequence[int]) -> None:
        self.store = store
        self.crops = list(crops)
        self.classes = list(classes)
        self.patch = shape3(patch)
        length, height, width = self.patch
        self.boxes: tuple[Shape3, ...] = (self.patch, (height, length, width), (height, width, length))
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
        records = [store.crops[crop] for crop in self.crops]
        self.datasets = [record["dataset"] for record in records]
        self.shapes = [store.shape(crop) for crop in self.crops]
        self.voxels = [vec3(record["lattice"]["voxel_nm"]) for record in records]
        self.blocked = any(record["layout"] == BLOCKED for record in records)

    def counts(self, crop: int, name: str) -> tuple[int, int]:
        """Return how many voxels of the crop are known, and how many are positive, for a class."""
        counts = self.store.crops[self.crops[crop]]["counts"][name]
        return counts["present"] + counts["absent"], counts["present"]

    def copy(self, patch: Patch, image: npt.NDArray[np.uint8], label: npt.NDArray[np.integer]) -> None:
        """Copy the patch into `image` and `label` of its shape. Outside the arrays EM is mirrored, labels are unknown.

        Raises ValueError for a patch that leaves the arrays along an axis without holding all of it.
        """
        image_volume, label_volume = self._volumes(patch.crop)
        start, inside = self._inside(patch)
        if patch.axis:  # views in stored order
            image, label = np.moveaxis(image, 0, patch.axis), np.moveaxis(label, 0, patch.axis)
        if start == patch.origin and image[inside].shape == image.shape:
            image_volume.copy(start, image)
            label_volume.copy(start, label)
            return
        for part, length, size in zip(inside, image.shape, self.shapes[patch.crop], strict=True):
            if not part.stop - part.start == size and not part == slice(0, length):
                raise ValueError(f"{patch} of {self.patch} voxels: an axis of crop {self.crops[patch.crop]} is cut off")
        image_volume.copy(start, image[inside])
        label_volume.copy(start, label[inside])
        for axis in (2, 1, 0):  # the axes before it are filled inside only as yet, those after it all along
            first, last = inside[axis].start, inside[axis].stop
            _mirror(np.moveaxis(image[inside[:axis]], axis, 0), first, last)
            known = np.moveaxis(label[inside[:axis]], axis, 0)
            known[:first] = known[last:] = UNKNOWN_ROW

    def prefetch(self, patch: Patch) -> None:
        """Have what the patch will copy read ahead, where the crop is stored in blocks."""
        start, inside = self._inside(patch)
        for volume in self._volumes(patch.crop):
            volume.prefetch(start, shape3([part.stop - part.start for part in inside]))

    def _volumes(self, crop: int) -> tuple[Volume, Volume]:
        return self.store.volume(self.crops[crop], "image"), self.store.volume(self.crops[crop], "label")

    def _inside(self, patch: Patch) -> tuple[Shape3, tuple[slice, slice, slice]]:
        """Return where in the stored arrays the patch's part inside them begins, and which part of it that is."""
        (z, y, x), (depth, height, width) = patch.origin, self.boxes[patch.axis]
        planes, rows, columns = self.shapes[patch.crop]
        part = (
            slice(max(-z, 0), min(depth, planes - z)),
            slice(max(-y, 0), min(height, rows - y)),
            slice(max(-x, 0), min(width, columns - x)),
        )
        return (max(z, 0), max(y, 0), max(x, 0)), part


def _mirror(planes: npt.NDArray[np.uint8], first: int, last: int) -> None:
    """Fill the planes outside first .. last - 1 by mirroring these at the end ones, as numpy's padding by "reflect"."""
    reach = last - first - 1
    if not reach:
        planes[:] = planes[first]
        return
    while first > 0:
        count = min(first, reach)
        planes[first - count : first] = planes[first + 1 : first + 1 + count][::-1]
        first -= count
    while last < len(planes):
        count = min(len(planes) - last, reach)
        planes[last : last + count] = planes[last - 1 - count : last - 1][::-1]
        last += count


@dataclass(frozen=True)
class _Voxels:
    """Sampled voxels of a crop, (n, 3) each.

    of_classes: those that are positive for a class, class by class; first, last: whose they are, by the model's class.
    known: those that are known for any of the model's classes.
    """

    of_classes: npt.NDArray[np.int32]
    first: list[int]
    last: list[int]
    known: npt.NDArray[np.int32]


class Sampler:
    """Draws the training patches: a class, a crop that shows it, then a voxel of it or any annotated one.

    A crop shows a class if voxels of it are annotated there; a class that none shows is drawn from the crops that know
    it to be absent. (All crops know where most classes are absent: there, where another class is.)
    centred_fraction: the probability of the former voxel. A class's weight is (number of its crops)^class_power:
    1 draws classes by their share of crops, 0 all equally often, a negative one prefers the rarely annotated ones.
    planes: what patches of one slice are slices across: "z", or "all" axes, equally often, of crops whose voxels are
    isotropic. Raises TrainingError if no crop has a known voxel of the model's classes.
    """

    def __init__(
        self, patches: Patches, *, seed: int, centred_fraction: float, class_power: float, planes: str = "z"
    ) -> None:
        self.patches = patches
        self.seed = seed
        self.centred_fraction = centred_fraction
        turned = planes == "all" and patches.patch[0] == 1
        #: of each crop, how many axes may be a patch's first
        self.axes = [3 if turned and isotropic(voxel_nm) else 1 for voxel_nm in patches.voxels]
        #: what can be drawn first: (column of the class, its crops)
        self.classes = []
        for column, name in enumerate(patches.classes):
            counts = [patches.counts(crop, name) for crop in range(len(patches.crops))]
            crops = [crop for crop, (_, present) in enumerate(counts) if present]
            crops = crops or [crop for crop, (known, _) in enumerate(counts) if known]
            if crops:
                self.classes.append((column, crops))
        if not self.classes:
            raise TrainingError(
                f"{patches.store.path}: none of the {len(patches.crops)} training crops has a known voxel of "
                f"{', '.join(patches.classes)}; check results/quality and the model's classes"
            )
        self.cumulative = list(itertools.accumulate(len(crops) ** class_power for _, crops in self.classes))
        self._voxels: dict[int, _Voxels] = {}

    def draw(self, step: int, index: int, purpose: int = POSITION) -> Patch:
        """Return sample `index` of step `step`; its anchor is known for one of the model's classes."""
        which, where, centring, number, *jitter, across = uniforms(self.seed, step, index, purpose, 8)
        entry = bisect_right(self.cumulative, which * self.cumulative[-1], hi=len(self.cumulative) - 1)
        column, crops = self.classes[entry]
        crop = crops[int(where * len(crops))]
        voxels = self._voxels.get(crop) or self._crop_voxels(crop)
        first, last = voxels.first[column], voxels.last[column]
        if centring < self.centred_fraction and first < last:
            voxel = voxels.of_classes[first + int(number * (last - first))].tolist()
        else:
            voxel = voxels.known[int(number * len(voxels.known))].tolist()
        axis = int(across * self.axes[crop])
        origin = []
        for centre, length, size, shift in zip(
            voxel, self.patches.boxes[axis], self.patches.shapes[crop], jitter, strict=True
        ):
            reach = int(JITTER * length)
            start = centre - length // 2 + int(shift * (2 * reach + 1)) - reach
            # inside the stored array where that is larger than the patch; around all of it where smaller
            origin.append(min(max(start, min(0, size - length)), max(0, size - length)))
        (z, y, x), (top, left, front) = voxel, origin
        anchor = (z - top, y - left, x - front)
        if axis:
            anchor = shape3([anchor[axis], *anchor[:axis], *anchor[axis + 1 :]])
        return Patch(crop, (top, left, front), anchor, axis)

    def _crop_voxels(self, crop: int) -> _Voxels:
        """Return the sampled voxels of a crop. What the store lists stays in its memory map."""
        patches = self.patches
        name = patches.crops[crop]
        stored = patches.store.positions(name)
        columns = np.arange(-1, len(patches.store.classes) + 1, dtype=stored.dtype)
        start = np.searchsorted(stored[:, 0], columns).tolist()  # of column -1, any known voxel, then of every class
        listed, states = stored[:, 1:], patches.store.table(name)
        known = listed[start[0] : start[1]]
        known_rows = (patches.tables[crop] != UNKNOWN).any(axis=0)
        if not known_rows[: len(states)][(states != UNKNOWN).any(axis=1)].all():
            known = self._known_to_model(crop, known, known_rows)
        if not len(known):
            raise TrainingError(
                f"{patches.store.path}: crop {name} has known voxels but no sampled position of them; "
                "run `snakemake -R chunk`"
            )
        first, last = ([start[column + more] for column in patches.columns] for more in (1, 2))
        voxels = self._voxels[crop] = _Voxels(listed, first, last, known)
        return voxels

    def _known_to_model(
        self, crop: int, sampled: npt.NDArray[np.int32], known_rows: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int32]:
        """Return those of the sampled voxels (n, 3) whose row is known for a class of the model.

        If there are none, up to MOST_POSITIONS voxels at equal intervals in the order of all such voxels of the crop.
        """
        label = self.patches.store.volume(self.patches.crops[crop], "label")
        found = sampled[known_rows[label.at(sampled)]]
        if len(found):
            return found
        every = []
        for first, last in slab_ranges(label.shape, SLAB_VOXELS):
            slab = np.empty((last - first, *label.shape[1:]), label.dtype)
            label.copy((first, 0, 0), slab)
            every.append(np.flatnonzero(known_rows[slab]) + first * label.shape[1] * label.shape[2])
        voxels = np.concatenate(every)
        some = voxels[np.linspace(0, len(voxels) - 1, min(len(voxels), MOST_POSITIONS)).astype(np.intp)]
        return np.stack(np.unravel_index(some, label.shape), axis=1).astype(np.int32)


@dataclass(frozen=True)
class Tile:
    """A validation patch: where it lies, and which box of it (start, stop per axis) no other tile scores."""

    patch: Patch
    owned: tuple[slice, slice, slice]


def tiles(patches: Patches) -> list[Tile]:
    """Return fixed patches that cover the label box of every crop once; voxels seen twice belong to one of them.

    Those of networks of slices are slices across z, as in prediction, whatever they are trained on.
    """
    found = []
    for crop, name in enumerate(patches.crops):
        record = patches.store.crops[name]
        axes = [
            _axis_tiles(int(offset), int(length), int(size), step)
            for offset, length, size, step in zip(
                record["label_offset"], record["label_shape"], patches.shapes[crop], patches.patch, strict=True
            )
        ]
        for z in axes[0]:
            for y in axes[1]:
                for x in axes[2]:
                    owned = (z[1], y[1], x[1])
                    anchor = shape3([part.start for part in owned])
                    found.append(Tile(Patch(crop, (z[0], y[0], x[0]), anchor), owned))
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


def known_fraction(sampler: Sampler, draws: int = 32) -> float:
    """Return the mean share of known (voxel, class) pairs in the first `draws` patches of a training."""
    patches = sampler.patches
    image, label = np.empty(patches.patch, np.uint8), np.empty(patches.patch, patches.label_dtype)
    known = (patches.tables != UNKNOWN).mean(axis=1)
    shares = []
    for index in range(draws):
        patch = sampler.draw(0, index)
        patches.copy(patch, image, label)
        rows = np.bincount(label.ravel(), minlength=known.shape[1])
        shares.append(known[patch.crop] @ rows / label.size)
    return float(np.mean(shares))
