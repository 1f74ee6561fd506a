"""Where voxels lie in the world: lattices in nanometres, their boxes, and the choice of a resolution level.

Axis order is (z, y, x) everywhere. The world position of index i is translation + i * voxel: `translation_nm` is the
**centre** of voxel 0, as in OME-NGFF and in the challenge's data, so boxes are compared by their edges, half a voxel
further out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cellmap_pipe.errors import GeometryError

Vec3 = tuple[float, float, float]
Shape3 = tuple[int, int, int]

# Nanometres that two edges may differ and still count as the same: metadata are decimal numbers in floating point.
TOLERANCE_NM = 1e-3


def vec3(values: Sequence[float]) -> Vec3:
    """Return three floats (z, y, x). Raises GeometryError for another length."""
    if len(values) != 3:
        raise GeometryError(f"expected three numbers (z, y, x), got {list(values)}")
    return float(values[0]), float(values[1]), float(values[2])


def shape3(values: Sequence[int]) -> Shape3:
    """Return three integers (z, y, x). Raises GeometryError for another length."""
    if len(values) != 3:
        raise GeometryError(f"expected three sizes (z, y, x), got {list(values)}")
    return int(values[0]), int(values[1]), int(values[2])


@dataclass(frozen=True)
class Lattice:
    """A box of voxels in the world: voxel size and centre of voxel 0 in nm, shape in voxels, all (z, y, x)."""

    voxel_nm: Vec3
    translation_nm: Vec3
    shape: Shape3

    def __post_init__(self) -> None:
        object.__setattr__(self, "voxel_nm", vec3(self.voxel_nm))
        object.__setattr__(self, "translation_nm", vec3(self.translation_nm))
        object.__setattr__(self, "shape", shape3(self.shape))
        if not all(math.isfinite(v) and v > 0 for v in self.voxel_nm):
            raise GeometryError(f"voxel size {self.voxel_nm} nm must be positive on every axis")
        if not all(map(math.isfinite, self.translation_nm)):
            raise GeometryError(f"translation {self.translation_nm} nm must be finite")
        if not all(n > 0 for n in self.shape):
            raise GeometryError(f"shape {self.shape} must be positive on every axis")

    @property
    def lower_nm(self) -> Vec3:
        """The box's lower edges: half a voxel below the centre of voxel 0."""
        return vec3([t - v / 2 for t, v in zip(self.translation_nm, self.voxel_nm, strict=True)])

    @property
    def upper_nm(self) -> Vec3:
        """The box's upper edges."""
        return vec3([lo + n * v for lo, n, v in zip(self.lower_nm, self.shape, self.voxel_nm, strict=True)])

    @property
    def voxels(self) -> int:
        return math.prod(self.shape)

    @classmethod
    def covering(cls, lower_nm: Sequence[float], upper_nm: Sequence[float], voxel_nm: Sequence[float]) -> "Lattice":
        """Return the lattice of `voxel_nm` that begins at the lower edges and whose size is nearest the box's.

        A last voxel that the box fills by less than half is left out; at least one voxel remains on each axis.
        """
        shape = [
            max(1, math.floor((hi - lo) / v + 0.5 + 1e-6))
            for lo, hi, v in zip(lower_nm, upper_nm, voxel_nm, strict=True)
        ]
        centre = [lo + v / 2 for lo, v in zip(lower_nm, voxel_nm, strict=True)]
        return cls(vec3(voxel_nm), vec3(centre), shape3(shape))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Lattice":
        """Return the lattice that `to_dict` described."""
        return cls(vec3(value["voxel_nm"]), vec3(value["translation_nm"]), shape3(value["shape"]))

    def to_dict(self) -> dict[str, list[float] | list[int]]:
        """Return the lattice as JSON: keys voxel_nm, translation_nm, shape."""
        return {
            "voxel_nm": list(self.voxel_nm),
            "translation_nm": list(self.translation_nm),
            "shape": list(self.shape),
        }

    def window(self, offset: Sequence[int], shape: Sequence[int]) -> "Lattice":
        """Return the part of the lattice that begins at voxel `offset`, which may lie outside it, and has `shape`."""
        start = [t + o * v for t, o, v in zip(self.translation_nm, offset, self.voxel_nm, strict=True)]
        return Lattice(self.voxel_nm, vec3(start), shape3(shape))

    def padded(self, before: Sequence[int], after: Sequence[int]) -> "Lattice":
        """Return the lattice grown by whole voxels on its lower (`before`) and upper (`after`) sides."""
        shape = [n + b + a for n, b, a in zip(self.shape, before, after, strict=True)]
        return self.window([-b for b in before], shape)

    def index_of(self, world_nm: Sequence[float]) -> Vec3:
        """Return the fractional index whose centre lies at the world position (z, y, x) in nm."""
        return vec3([(w - t) / v for w, t, v in zip(world_nm, self.translation_nm, self.voxel_nm, strict=True)])

    def world_of(self, index: Sequence[float]) -> Vec3:
        """Return the world position (z, y, x) in nm of the centre of a (fractional) index."""
        return vec3([t + i * v for i, t, v in zip(index, self.translation_nm, self.voxel_nm, strict=True)])

    def same_as(self, other: "Lattice") -> bool:
        """Return whether both lattices have the same voxels, up to rounding of their metadata."""
        return self.shape == other.shape and all(
            abs(a - b) <= TOLERANCE_NM
            for a, b in zip((*self.lower_nm, *self.upper_nm), (*other.lower_nm, *other.upper_nm), strict=True)
        )

    def overlap_fraction(self, other: "Lattice") -> float:
        """Return the share of this box's volume that lies inside the other's."""
        return math.prod(
            max(0.0, min(hi, other_hi) - max(lo, other_lo)) / (hi - lo)
            for lo, hi, other_lo, other_hi in zip(
                self.lower_nm, self.upper_nm, other.lower_nm, other.upper_nm, strict=True
            )
        )


def gap_nm(first: Lattice, second: Lattice) -> float:
    """Return the largest gap in nm between two boxes along any axis; negative where they overlap on every axis."""
    return max(
        max(lo - other_hi, other_lo - hi)
        for lo, hi, other_lo, other_hi in zip(
            first.lower_nm, first.upper_nm, second.lower_nm, second.upper_nm, strict=True
        )
    )


def nearest_level(levels: Sequence[Lattice], voxel_nm: Vec3, max_upsample: float) -> int:
    """Return the index of the coarsest level that is at least as fine as `voxel_nm` on every axis.

    levels: the resolution levels of one image, in any order. voxel_nm: target voxel size (z, y, x) in nm.
    Falls back to the finest level if none is fine enough.
    Raises GeometryError, naming the levels, if even that one would be upsampled more than `max_upsample` times.
    """
    if not levels:
        raise GeometryError("the image has no resolution level")
    by_size = sorted(range(len(levels)), key=lambda i: math.prod(levels[i].voxel_nm))
    # 1 % of slack: 2.62 nm is the same voxel as 2.6200000001 nm and serves a grid of 2.6 nm
    fine = [i for i in by_size if all(v <= t * 1.01 for v, t in zip(levels[i].voxel_nm, voxel_nm, strict=True))]
    if fine:
        return fine[-1]
    factor = max(v / t for v, t in zip(levels[by_size[0]].voxel_nm, voxel_nm, strict=True))
    if factor > max_upsample * (1 + 1e-6):
        sizes = "; ".join("x".join(f"{v:g}" for v in levels[i].voxel_nm) for i in by_size)
        raise GeometryError(
            f"the finest level on disk would be upsampled {factor:.2f} times to reach "
            f"{'x'.join(f'{v:g}' for v in voxel_nm)} nm (levels on disk: {sizes} nm); "
            f"raise max_upsample (now {max_upsample:g}) or use a coarser grid"
        )
    return by_size[0]


def nearest_grid(grids: Mapping[str, Sequence[float] | str], voxel_nm: Sequence[float]) -> str:
    """Return the name of the grid whose voxel size is nearest `voxel_nm`, by the logarithm of the voxels' volumes.

    grids: voxel size (z, y, x) in nm by name, or "native", which is `voxel_nm` itself. Of two equally near grids the
    finer one is returned.
    """
    target = math.log(math.prod(voxel_nm))
    volumes = {name: target if isinstance(size, str) else math.log(math.prod(size)) for name, size in grids.items()}
    return min(volumes, key=lambda name: (round(abs(volumes[name] - target), 6), volumes[name], name))
