"""Objects of a class: pockets filled, components found, touching ones parted, small ones removed.

A volume that does not fit into memory is worked on in slabs along z. Each slab is labelled by itself; labels that meet
at the planes between slabs are joined, which gives the components of the whole volume. Labels are not kept: labelling
is cheap and deterministic, so a slab is labelled anew from the mask, one bit per voxel, whenever its ids are asked for.
Only objects that are parted need all of their voxels at once.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Self

import cc3d
import edt
import numpy as np
from skimage.segmentation import watershed

from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation.components import Connectivity, join_nodes, label, links
from cellmap_pipe.geometry import Lattice, Shape3
from cellmap_pipe.prediction.processing import Processing

logger = logging.getLogger(__name__)

# Gives the planes [first, last) of a mask, bool (z, y, x); may be asked more than once for the same planes
Mask = Callable[[int, int], np.ndarray]

# Bytes of working memory per voxel of a slab, and per voxel of the box of an object that is parted (measured)
SLAB_BYTES = 12
PARTED_BYTES = 50
# An object in a box of more voxels (10 GB) is left whole: what is parted must not depend on the memory of a job.
LARGEST_PARTED = 200_000_000
# Planes of the mask that are asked for at a time: one layer of chunks
MASK_PLANES = 64

# Neighbours that connect background and foreground
BACKGROUND: Literal[6] = 6
FOREGROUND: Literal[26] = 26


def smallest_object(size_nm3: float, voxel_nm: Sequence[float]) -> int:
    """Return the least number of voxels, at least 1, that are no smaller than `size_nm3`."""
    return max(1, math.ceil(size_nm3 / math.prod(voxel_nm) - 1e-6))


def find_objects(
    mask: Mask,
    lattice: Lattice,
    how: Processing,
    *,
    instance: bool = True,
    memory_gb: float | None = None,
    scratch: str | Path | None = None,
) -> "Objects":
    """Return the objects of a thresholded class, numbered 1, 2, ... in the order of their first voxels (z, y, x).

    In this order: pockets of background (6-connected, away from the volume's faces) smaller than hole_nm3 are filled;
    the 26-connected components are found; with `instance`, each is parted by a watershed on the distance to the
    background from the seeds that are deeper than split_nm, if it has two or more; objects smaller than min_size_nm3
    are removed. Beyond the volume's faces is no background. how.threshold is not used: `mask` is thresholded already.
    memory_gb: beyond it the volume is worked on in slabs, with a bit per voxel in a file without name in the folder
    `scratch`, to the same result; None = all in memory. An object in a box of more than LARGEST_PARTED voxels is
    left whole, and named in a warning. The number of components is not bounded: each takes some 100 bytes.
    Raises DataError for an object to be parted whose box does not fit into the memory.
    """
    return Objects(mask, lattice, how, instance, math.inf if memory_gb is None else memory_gb * 1e9, scratch)


class Objects:
    """What `find_objects` found; a context manager that removes the scratch file.

    count: number of objects. dtype: of the ids, uint16 if they fit, else uint32.
    """

    def __init__(
        self, mask: Mask, lattice: Lattice, how: Processing, instance: bool, memory: float, scratch: str | Path | None
    ) -> None:
        self._shape, self._voxel_nm = lattice.shape, lattice.voxel_nm
        planes = memory / (SLAB_BYTES * self._shape[1] * self._shape[2])
        self._planes = max(1, int(min(planes, self._shape[0])))
        self._bits = _Bits(self._shape, self._planes < self._shape[0], scratch)
        # What was made of one slab last; of a volume in memory that is all there is to make
        self._labelled: tuple[int, int, np.ndarray] | None = None
        self._numbered: tuple[int, np.ndarray] | None = None
        try:
            step = min(self._planes, MASK_PLANES)
            for first in range(0, self._shape[0], step):
                last = min(first + step, self._shape[0])
                self._bits.write(first, mask(first, last))
            self._fill(smallest_object(how.hole_nm3, self._voxel_nm))
            components = self._components()
            self._parted = (
                self._part(components, how.split_nm, memory - self._bits.held) if instance and how.split_nm > 0 else []
            )
            self._number(components, smallest_object(how.min_size_nm3, self._voxel_nm))
        except BaseException:
            self._bits.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bits.close()

    def ids(self, first: int, last: int) -> np.ndarray:
        """Return the ids on the planes [first, last), (z, y, x): 0 is background, objects are 1 .. count."""
        parts = []
        for index, (begin, end) in enumerate(self._slabs()):
            if begin < last and first < end:
                parts.append(self._ids_of(index, begin, end)[max(first - begin, 0) : last - begin])
        return np.concatenate(parts)

    def mask(self, first: int, last: int) -> np.ndarray:
        """Return where objects are on the planes [first, last), bool (z, y, x)."""
        return self._bits.read(first, last) if self._all_kept else self.ids(first, last) > 0

    def _slabs(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self._shape[0], self._planes):
            yield first, min(first + self._planes, self._shape[0])

    def _labels(self, first: int, last: int, connectivity: Connectivity) -> np.ndarray:
        """Return the components of a slab's mask, or of its background, uint32, numbered as their first voxels are."""
        if self._labelled is not None and self._labelled[:2] == (first, connectivity):
            return self._labelled[2]
        self._labelled = None
        mask = self._bits.read(first, last)
        labels = label(mask if connectivity == FOREGROUND else ~mask, connectivity)
        self._labelled = (first, connectivity, labels)
        return labels

    def _fill(self, smallest: int) -> None:
        """Add the pockets of fewer than `smallest` voxels to the mask."""
        if smallest <= 1:
            return
        nodes = _Nodes(self._shape)
        for first, last in self._slabs():
            nodes.add(first, self._labels(first, last, BACKGROUND), BACKGROUND)
        pockets = nodes.join()
        inside = (pockets.lower > 0).all(1) & (pockets.upper < self._shape).all(1)
        filled = (inside & (pockets.size < smallest))[pockets.of_node]
        filled[nodes.none] = False
        for index, (first, last) in enumerate(self._slabs()):
            chosen = filled[nodes.begin[index] : nodes.begin[index + 1]]
            if chosen.any():
                pocket = chosen[self._labels(first, last, BACKGROUND)]
                self._bits.write(first, self._bits.read(first, last) | pocket)
        self._labelled = None

    def _components(self) -> "_Components":
        nodes = _Nodes(self._shape)
        for first, last in self._slabs():
            nodes.add(first, self._labels(first, last, FOREGROUND), FOREGROUND)
        components = nodes.join()
        # Component 0 takes the labels 0 of all slabs
        self._component_of = components.of_node
        self._node_begin = nodes.begin
        return components

    def _part(self, components: "_Components", split_nm: float, memory: float) -> list["_Parted"]:
        """Return the components that have two seeds or more, in parts."""
        self._labelled = None  # the boxes take the memory
        parted = []
        lower, upper = components.lower, components.upper
        at_face = (lower == 0) | (upper == self._shape)
        # A seed is farther than split_nm from the background on both of its sides, unless the volume ends there, and
        # two seeds are two voxels apart on some axis
        n, voxel_nm = upper - lower, np.asarray(self._voxel_nm)
        deep = (at_face | ((n + 1) * voxel_nm > 2 * split_nm)).all(1)
        wide = (at_face | ((n - 1) * voxel_nm > 2 * split_nm)).any(1)
        deep[0] = False
        for i in np.flatnonzero(deep & wide).tolist():
            voxels = math.prod((n[i] + 2).tolist())
            name = f"the object of {components.size[i]} voxels in the box {lower[i].tolist()} to {upper[i].tolist()}"
            if voxels > LARGEST_PARTED:
                logger.warning("%s (z, y, x) is not parted: its box has more than %d voxels", name, LARGEST_PARTED)
                continue
            if PARTED_BYTES * voxels > memory:
                raise DataError(
                    f"{name} (z, y, x) takes {PARTED_BYTES * voxels / 1e9:.3g} GB to be parted, more than the "
                    f"{memory / 1e9:.3g} GB that are left; give the job more memory "
                    "(--set-resources segment:mem_mb=...)"
                )
            inside = self._component(components.first[i], lower[i], upper[i])
            parts = part_component(inside, lower[i] == 0, upper[i] == self._shape, self._voxel_nm, split_nm)
            if parts is not None:
                parted.append(_Parted.of(i, inside, parts, lower[i], self._shape, self._bits))
        return parted

    def _component(self, first: int, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """Return in its box the component whose first voxel has the flat index `first`, bool (z, y, x)."""
        # All of the component lies in its box, so it is one component there as well
        labels = label(self._bits.box(lower, upper), FOREGROUND)
        start = np.asarray(np.unravel_index(first, self._shape)) - lower
        return np.asarray(labels == labels[tuple(start)])

    def _number(self, components: "_Components", smallest: int) -> None:
        """Give numbers to what is large enough, by first voxels."""
        size = components.size.copy()
        size[[0, *(parted.component for parted in self._parted)]] = 0
        sizes = np.concatenate([size, *(parted.size for parted in self._parted)])
        firsts = np.concatenate([components.first, *(parted.first for parted in self._parted)])
        kept = np.flatnonzero(sizes >= smallest)
        kept = kept[np.argsort(firsts[kept])]
        self.count = len(kept)
        self.dtype = np.dtype(np.uint16 if self.count <= np.iinfo(np.uint16).max else np.uint32)
        self._all_kept = self.count == np.count_nonzero(sizes)
        numbers = np.zeros(len(sizes), self.dtype)
        numbers[kept] = np.arange(1, self.count + 1)
        self._number_of, *of_parts = np.split(
            numbers, np.cumsum([len(size), *(len(parted.size) for parted in self._parted)])[:-1]
        )
        for parted, of_part in zip(self._parted, of_parts, strict=True):
            parted.number = of_part

    def _ids_of(self, index: int, first: int, last: int) -> np.ndarray:
        """Return the ids of a slab."""
        if self._numbered is not None and self._numbered[0] == index:
            return self._numbered[1]
        self._numbered = None
        component_of = self._component_of[self._node_begin[index] : self._node_begin[index + 1]]
        labels = self._labels(first, last, FOREGROUND)
        ids = self._number_of[component_of][labels]
        for parted in self._parted:
            parted.write(ids, labels, component_of, first, last, self._bits)
        self._labelled = None
        self._numbered = (index, ids)
        return ids


def part_component(
    inside: np.ndarray, at_lower: Sequence[bool], at_upper: Sequence[bool], voxel_nm: Sequence[float], split_nm: float
) -> np.ndarray | None:
    """Return the parts of a component, 1, 2, ... and 0 outside it, int32 (z, y, x); None if it has fewer than two.

    inside: the component in its tight box, bool. at_lower, at_upper: on which sides the volume ends at the box; on the
    others background is next to it. The nearest voxel outside a 26-connected component is never one of another
    component (the neighbour one step towards it would be nearer), so the box tells the distance to the background.
    """
    margins = [(int(not lower), int(not upper)) for lower, upper in zip(at_lower, at_upper, strict=True)]
    padded = np.pad(inside, margins)
    depth = edt.edt(padded, anisotropy=tuple(voxel_nm), black_border=False, parallel=1)
    seeds = label(depth > split_nm, FOREGROUND)
    if seeds.max() < 2:
        return None
    parts = watershed(np.negative(depth, out=depth), seeds.view(np.int32), connectivity=3, mask=padded)
    return parts[tuple(slice(lower, n - upper) for (lower, upper), n in zip(margins, parts.shape, strict=True))]


@dataclass(frozen=True)
class _Components:
    """The components of the whole volume by number, 0 being none.

    of_node: component of each node. size in voxels; lower, upper (exclusive): box (n, 3); first: flat index of the
    first voxel.
    """

    of_node: np.ndarray
    size: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    first: np.ndarray


class _Nodes:
    """The labels of all slabs: label k of slab i is node begin[i] + k, its label 0 the node none[i]."""

    def __init__(self, shape: Shape3) -> None:
        self._shape = shape
        self.begin = [0]
        self._size: list[np.ndarray] = []
        self._lower: list[np.ndarray] = []
        self._upper: list[np.ndarray] = []
        self._first: list[np.ndarray] = []
        self._links: list[np.ndarray] = []
        self._plane = np.zeros((0, 0), np.int64)

    @property
    def none(self) -> list[int]:
        return self.begin[:-1]

    def add(self, first: int, labels: np.ndarray, connectivity: Connectivity) -> None:
        """Add the labels of the next slab, which begins at the plane `first`."""
        found = cc3d.statistics(labels, no_slice_conversion=True)
        box = found["bounding_boxes"].astype(np.int64)
        offset = (first, 0, 0)
        self._size.append(found["voxel_counts"].astype(np.int64))
        self._lower.append(box[:, ::2] + offset)
        self._upper.append(box[:, 1::2] + 1 + offset)
        self._first.append(_first_voxels(labels, len(box)) + first * self._shape[1] * self._shape[2])
        begin = self.begin[-1]
        if first:
            nodes = np.stack([self._plane, _nodes(labels[0], begin)])
            self._links.append(links(nodes, label(nodes > 0, connectivity)))
            self._links.append(np.array([[0, begin]]))
        self._plane = _nodes(labels[-1], begin)
        self.begin.append(begin + len(box))

    def join(self) -> _Components:
        """Return the components, numbered in the order of their first voxels."""
        of_node = join_nodes(self.begin[-1], self._links)
        by_component = np.argsort(of_node, kind="stable")
        begin = np.searchsorted(of_node[by_component], np.arange(of_node.max() + 1))
        size = np.add.reduceat(np.concatenate(self._size)[by_component], begin)
        size[0] = 0
        return _Components(
            of_node.astype(np.uint32),
            size,
            np.minimum.reduceat(np.concatenate(self._lower)[by_component], begin, axis=0),
            np.maximum.reduceat(np.concatenate(self._upper)[by_component], begin, axis=0),
            np.concatenate(self._first)[by_component[begin]],
        )


def _nodes(plane: np.ndarray, begin: int) -> np.ndarray:
    """Return the nodes of a plane of labels, int64, 0 where there is none."""
    return np.where(plane > 0, plane.astype(np.int64) + begin, 0)


def _first_voxels(labels: np.ndarray, n: int) -> np.ndarray:
    """Return the flat index of the first voxel of each of the labels 0 .. n - 1."""
    first = np.zeros(n, np.int64)
    plane = labels[0].size
    for z in range(len(labels) - 1, -1, -1):
        values = labels[z].reshape(-1)
        starts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))[::-1]
        # Of equal indices the last assignment holds: that of the first voxel
        first[values[starts]] = starts + z * plane
    return first


@dataclass
class _Parted:
    """A component that was parted.

    lower: of its box; begin: per plane of the box, where its values begin among those kept in the scratch at `place`
    (the part, from 0, of each of its voxels in their order). size, first: of each part, in voxels and as flat index.
    number: id of each part.
    """

    component: int
    lower: np.ndarray
    shape: Shape3
    begin: np.ndarray
    place: "_Place"
    size: np.ndarray
    first: np.ndarray
    number: np.ndarray

    @classmethod
    def of(
        cls, component: int, inside: np.ndarray, parts: np.ndarray, lower: np.ndarray, shape: Shape3, bits: "_Bits"
    ) -> "_Parted":
        values = parts[inside] - 1
        n = int(values.max()) + 1
        position = np.flatnonzero(inside)
        first = np.zeros(n, np.int64)
        first[values[::-1]] = position[::-1]
        in_volume = [axis + low for axis, low in zip(np.unravel_index(first, inside.shape), lower, strict=True)]
        return cls(
            component=component,
            lower=lower,
            shape=inside.shape,
            begin=np.append(0, np.cumsum(np.count_nonzero(inside, axis=(1, 2)))),
            place=bits.keep(values.astype(np.min_scalar_type(n))),
            size=np.bincount(values, minlength=n),
            first=np.ravel_multi_index(in_volume, shape),
            number=np.zeros(n, np.uint16),
        )

    def write(
        self, ids: np.ndarray, labels: np.ndarray, component_of: np.ndarray, first: int, last: int, bits: "_Bits"
    ) -> None:
        """Write the ids of the parts into those of the slab [first, last) with these labels."""
        z, y, x = self.lower.tolist()
        lower, upper = max(z, first), min(z + self.shape[0], last)
        if lower >= upper:
            return
        box = (slice(lower - first, upper - first), slice(y, y + self.shape[1]), slice(x, x + self.shape[2]))
        inside = component_of[labels[box]] == self.component
        values = bits.kept(self.place, self.begin[lower - z], self.begin[upper - z])
        ids[box][inside] = self.number[values]


@dataclass(frozen=True)
class _Place:
    """Values kept by `_Bits`: in memory, or by their dtype from an offset in the file."""

    values: np.ndarray | None
    dtype: np.dtype
    offset: int


class _Bits:
    """A mask in memory, or as one bit per voxel in a file that has no name and so leaves nothing behind."""

    def __init__(self, shape: Shape3, on_disk: bool, scratch: str | Path | None) -> None:
        self._shape = shape
        # No `with`: it is open for as long as this object, which closes it
        self._file: IO[bytes] | None = tempfile.TemporaryFile(dir=scratch) if on_disk else None  # noqa: SIM115
        self._array = np.empty((0, *shape[1:]) if on_disk else shape, bool)
        self._plane_bytes = -(-shape[1] * shape[2] // 8)
        self._end = self._plane_bytes * shape[0]
        self.held = self._array.nbytes

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, first: int, planes: np.ndarray) -> None:
        if self._file is None:
            self._array[first : first + len(planes)] = planes
        else:
            self._file.seek(first * self._plane_bytes)
            self._file.write(np.packbits(planes.reshape(len(planes), -1), axis=1).tobytes())

    def read(self, first: int, last: int) -> np.ndarray:
        return self.box((first, 0, 0), (last, *self._shape[1:]))

    def box(self, lower: Iterable[int], upper: Iterable[int]) -> np.ndarray:
        """Return a copy of the mask in a box, bool (z, y, x), C-contiguous."""
        (z, y, x), (z1, y1, x1) = lower, upper
        if self._file is None:
            return self._array[z:z1, y:y1, x:x1].copy()
        result = np.empty((z1 - z, y1 - y, x1 - x), bool)
        X = self._shape[2]
        first_byte, last_byte = y * X // 8, -(-y1 * X // 8)
        skipped = y * X - 8 * first_byte
        for plane in range(z, z1):
            self._file.seek(plane * self._plane_bytes + first_byte)
            packed = np.frombuffer(self._file.read(last_byte - first_byte), np.uint8)
            bits = np.unpackbits(packed)[skipped : skipped + (y1 - y) * X]
            result[plane - z] = bits.reshape(y1 - y, X)[:, x:x1]
        return result

    def keep(self, values: np.ndarray) -> _Place:
        """Keep values (1-D) beside the mask."""
        if self._file is None:
            return _Place(values, values.dtype, 0)
        place = _Place(None, values.dtype, self._end)
        self._file.seek(self._end)
        self._file.write(values.tobytes())
        self._end += values.nbytes
        return place

    def kept(self, place: _Place, first: int, last: int) -> np.ndarray:
        """Return the values [first, last) of what was kept."""
        if place.values is not None:
            return place.values[first:last]
        assert self._file is not None
        self._file.seek(place.offset + first * place.dtype.itemsize)
        return np.frombuffer(self._file.read((last - first) * place.dtype.itemsize), place.dtype)
