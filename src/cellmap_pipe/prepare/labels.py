"""Label arrays on disk: what is annotated in a crop, and three states per voxel.

A class without an array in a crop is unknown there, not absent. What is known of some classes says something of others:
see `prepare.state_table`. Arrays are (z, y, x).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.errors import DataError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.ngff import (
    Level,
    array_attributes,
    chunk_tiles,
    is_array,
    open_level,
    plain_level,
    read_box,
    read_image,
)

ABSENT, PRESENT, UNKNOWN = 0, 1, 2
STATES = {"absent": ABSENT, "present": PRESENT, "unknown": UNKNOWN}

# The value that means "unknown" unless the array's encoding names another one.
DEFAULT_UNKNOWN_VALUE = 255

# Voxels that are read at once, unless one row of chunks along x is larger.
SLAB_VOXELS = 8 * 1024**2


@dataclass(frozen=True)
class LabelArray:
    """One class's array in a crop: class name, its finest level, and the attributes of group and array, merged.

    mask: level of the sibling array `{class}_mask`, on the same voxels; the class is unknown where it is 0.
    """

    name: str
    level: Level
    attributes: dict[str, Any]
    mask: Level | None = None

    @property
    def levels(self) -> dict[str, Level]:
        """The arrays whose voxels determine the class's states: `{class}`, and `{class}_mask` if there is one."""
        return {self.name: self.level} | ({f"{self.name}_mask": self.mask} if self.mask else {})


class LabelReader:
    """The one way to the voxels of a class array: values as stored, and what they mean."""

    def __init__(self, label: LabelArray) -> None:
        self.label = label
        self._array = open_level(label.level)
        self._mask = open_level(label.mask) if label.mask else None

    def read(self, lower: Sequence[int], upper: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return values and states of the voxels [lower, upper), (z, y, x); masked ones are 0 and unknown.

        Raises DataError, naming the array, for a damaged chunk or values that are no labels.
        """
        values = read_box(self._array, self.label.level, lower, upper)
        try:
            states = label_states(values, self.label.attributes)[0]
        except DataError as error:
            raise DataError(f"{self.label.level.path}: {error}") from None
        if self._mask is not None and self.label.mask is not None:
            masked = read_box(self._mask, self.label.mask, lower, upper) == 0
            values[masked] = 0
            states[masked] = UNKNOWN
        return values, states

    def tiles(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield values and states of the whole array, a few chunks at a time (`ngff.chunk_tiles`)."""
        level = self.label.level
        for lower, upper in chunk_tiles(level, (0, 0, 0), level.lattice.shape, SLAB_VOXELS):
            yield self.read(lower, upper)


def read_label(path: str | Path) -> LabelArray:
    """Return the class array in the group `path` (its name is the class), with its mask, the sibling `{class}_mask`.

    Raises DataError naming what is wrong.
    """
    path = Path(path)
    image = read_image(path)
    level = image.levels[0]
    annotation = {**_annotation(image.attributes), **_annotation(array_attributes(level.path))}
    attributes = {"cellmap": {"annotation": {"class_name": path.name, **annotation}}}
    return LabelArray(path.name, level, attributes, _mask_of(path, level))


def _mask_of(path: Path, level: Level) -> Level | None:
    """Return the mask of the class array `level` in the group `path`, None if there is none.

    It is an OME-NGFF group, or an array without multiscales that is taken to lie on the class's voxels.
    """
    mask = path.with_name(f"{path.name}_mask")
    if not mask.is_dir():
        return None
    try:
        candidates = (plain_level(mask, level.lattice),) if is_array(mask) else read_image(mask).levels
    except DataError as error:
        raise DataError(f"mask of {level.path}: {error}") from None
    for candidate in candidates:
        if candidate.lattice.same_as(level.lattice):
            if np.dtype(candidate.dtype).kind not in "iub":
                raise DataError(f"{candidate.path}: a mask of dtype {candidate.dtype}; integers or bool are expected")
            return candidate
    raise DataError(
        f"{candidates[0].path}: the mask has {_described(candidates[0].lattice)}, "
        f"its class array {level.path} {_described(level.lattice)}; correct the mask or remove it"
    )


def _described(lattice: Lattice) -> str:
    voxel, at = (" x ".join(f"{v:g}" for v in values) for values in (lattice.voxel_nm, lattice.translation_nm))
    return f"{' x '.join(map(str, lattice.shape))} voxels of {voxel} nm from {at} nm"


def label_states(values: np.ndarray, attributes: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, int]]:
    """Return the states of stored label values, uint8 of the same shape, and the voxels per state.

    attributes: of the array (`LabelArray.attributes`), with `cellmap.annotation` if there is one: `annotation_type`
    says semantic or instance (else the class does) and how unknown is encoded (255 unless named). In an instance array
    255 is an ordinary id unless `complement_counts.unknown` is positive (CHALLENGE section 1a).
    Raises DataError for a dtype that is neither integer nor bool, and for negative values.
    """
    if values.dtype == bool:
        values = values.view(np.uint8)
    if values.dtype.kind not in "iu":
        raise DataError(f"labels of dtype {values.dtype}; integers or bool are expected")
    if values.dtype.kind == "i" and values.size and int(values.min()) < 0:
        raise DataError(f"labels hold the negative value {int(values.min())}")
    states = (values != 0).view(np.uint8)
    unknown = unknown_value(attributes)
    n_unknown = 0
    if unknown is not None and unknown <= np.iinfo(values.dtype).max:
        mask = values == unknown
        n_unknown = int(np.count_nonzero(mask))
        states[mask] = UNKNOWN
    absent = int(values.size - np.count_nonzero(states))
    present = int(values.size - absent - n_unknown)
    return states, {"present": present, "absent": absent, "unknown": n_unknown}


def unknown_value(attributes: Mapping[str, Any]) -> int | None:
    """Return the stored value that means unknown, or None if none does. Raises DataError if it is not a number."""
    annotation = _annotation(attributes)
    kind = as_mapping(annotation.get("annotation_type"))
    name = str(annotation.get("class_name"))
    instance = kind["type"] == "instance_segmentation" if "type" in kind else name in CLASSES and CLASSES[name].instance
    value = as_mapping(kind.get("encoding")).get("unknown", DEFAULT_UNKNOWN_VALUE)
    if value is None or (instance and not as_mapping(annotation.get("complement_counts")).get("unknown")):
        return None
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"annotation_type.encoding.unknown {value!r} is not a number; correct its metadata") from None


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return `value` if it is a mapping, else an empty one: metadata written by others may hold anything."""
    return value if isinstance(value, Mapping) else {}


def empty_means(labels: Mapping[str, Any], crop: str, name: str) -> str:
    """Return what an all-zero array means, "absent" or "unknown": as set for the crop, else the class, else all.

    labels: `empty`, `empty_by_class`, `empty_by_crop` as configured. crop: `dataset/cropN`.
    """
    by_crop, by_class = labels.get("empty_by_crop") or {}, labels.get("empty_by_class") or {}
    return str(by_crop.get(crop) or by_crop.get(crop.split("/")[-1]) or by_class.get(name) or labels["empty"])


def is_empty(label: LabelArray) -> bool:
    """Return whether the array holds nothing but zeros where it is not masked."""
    return not any(values.any() for values, _ in LabelReader(label).tiles())


def _annotation(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return dict(as_mapping(as_mapping(attributes.get("cellmap")).get("annotation")))
