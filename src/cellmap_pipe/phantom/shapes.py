"""Shapes of organelles as signed distances in nm: negative inside, zero on the surface.

Positions are world coordinates (z, y, x) in nm. A distance is evaluated on broadcastable coordinate arrays, so a shape
can be sampled on any lattice. Distances are exact for tubes; those of the other shapes are right near their surface, to
a few per cent, which is all that a membrane a few tens of nanometres thick needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cellmap_pipe.geometry import Lattice, Vec3

Floats = NDArray[np.float32]
Coordinates = tuple[Floats, Floats, Floats]


class Shape(Protocol):
    """Something with an inside."""

    @property
    def box_nm(self) -> tuple[Vec3, Vec3]:
        """Lower and upper corner (z, y, x) in nm of a box that holds the shape."""
        ...

    def distance(self, at: Coordinates) -> Floats:
        """Return the signed distance in nm at the positions `at`, negative inside."""
        ...


def coordinates(lattice: Lattice) -> Coordinates:
    """Return the world positions in nm of the lattice's voxel centres, as three arrays that broadcast to its shape."""
    z, y, x = (
        np.asarray(t + np.arange(n) * v, np.float32)
        for t, n, v in zip(lattice.translation_nm, lattice.shape, lattice.voxel_nm, strict=True)
    )
    return z[:, None, None], y[None, :, None], x[None, None, :]


def window_of(lattice: Lattice, box_nm: tuple[Vec3, Vec3], margin_nm: float) -> tuple[slice, slice, slice] | None:
    """Return the slices of `lattice` that hold the box grown by `margin_nm`; None where they do not meet."""
    slices = []
    for lo, hi, edge, voxel, n in zip(*box_nm, lattice.lower_nm, lattice.voxel_nm, lattice.shape, strict=True):
        start = max(0, int(np.floor((lo - margin_nm - edge) / voxel)))
        stop = min(n, int(np.ceil((hi + margin_nm - edge) / voxel)))
        if start >= stop:
            return None
        slices.append(slice(start, stop))
    return slices[0], slices[1], slices[2]


def part(at: Coordinates, window: tuple[slice, slice, slice]) -> Coordinates:
    """Return the coordinates of a window of the lattice that `at` belongs to."""
    return at[0][window[0]], at[1][:, window[1]], at[2][:, :, window[2]]


def _grown(points: NDArray[np.float64], margin: float) -> tuple[Vec3, Vec3]:
    lower, upper = points.min(axis=0) - margin, points.max(axis=0) + margin
    return (lower[0], lower[1], lower[2]), (upper[0], upper[1], upper[2])


@dataclass(frozen=True)
class Waves:
    """A smooth bumpiness: the sum of plane waves, added to a distance.

    amplitude_nm: of each wave. wave_vectors: (n, 3), radians per nm, (z, y, x). phases: (n,), radians.
    """

    amplitude_nm: float
    wave_vectors: NDArray[np.float64]
    phases: NDArray[np.float64]

    @classmethod
    def random(cls, rng: np.random.Generator, amplitude_nm: float, wavelength_nm: float, n: int = 4) -> "Waves":
        """Return `n` waves of random directions and phases, of `wavelength_nm` each."""
        directions = rng.normal(size=(n, 3))
        directions *= 2 * np.pi / wavelength_nm / np.linalg.norm(directions, axis=1, keepdims=True)
        return cls(amplitude_nm, directions, rng.uniform(0, 2 * np.pi, n))

    def at(self, at: Coordinates) -> Floats:
        """Return the height in nm at the positions `at`."""
        height = np.zeros(np.broadcast_shapes(*(axis.shape for axis in at)), np.float32)
        for (kz, ky, kx), phase in zip(self.wave_vectors.astype(np.float32), self.phases, strict=True):
            height += np.sin(kz * at[0] + ky * at[1] + (kx * at[2] + np.float32(phase)))
        return np.float32(self.amplitude_nm) * height


@dataclass(frozen=True)
class Tube:
    """All points within `radius_nm` of a line of straight pieces: a ball (one point), a capsule (two) or a tubule.

    points_nm: (n, 3), (z, y, x).
    """

    points_nm: NDArray[np.float64]
    radius_nm: float

    @property
    def box_nm(self) -> tuple[Vec3, Vec3]:
        return _grown(self.points_nm, self.radius_nm)

    def distance(self, at: Coordinates) -> Floats:
        points = self.points_nm.astype(np.float32)
        if len(points) == 1:
            squared = _squared([axis - p for axis, p in zip(at, points[0], strict=True)])
            return np.sqrt(squared) - np.float32(self.radius_nm)
        nearest: Floats | None = None
        for start, stop in pairwise(points):
            along = stop - start
            offset = [axis - p for axis, p in zip(at, start, strict=True)]
            share = sum((o * (a / (along @ along)) for o, a in zip(offset, along, strict=True)), np.float32(0))
            share = np.clip(share, 0, 1)
            squared = _squared([o - share * a for o, a in zip(offset, along, strict=True)])
            nearest = squared if nearest is None else np.minimum(nearest, squared)
        assert nearest is not None
        return np.sqrt(nearest) - np.float32(self.radius_nm)


def _squared(offset: Sequence[Floats]) -> Floats:
    return offset[0] * offset[0] + offset[1] * offset[1] + offset[2] * offset[2]


@dataclass(frozen=True)
class Disc:
    """A flat round sac with rounded rim, bent like a bowl.

    centre_nm: (z, y, x). axis: unit normal. radius_nm: to the rim's outside. half_nm: half its thickness.
    bend: height in nm gained at the rim (quadratic in the distance from the axis).
    """

    centre_nm: NDArray[np.float64]
    axis: NDArray[np.float64]
    radius_nm: float
    half_nm: float
    bend_nm: float

    @property
    def box_nm(self) -> tuple[Vec3, Vec3]:
        return _grown(self.centre_nm[None], self.radius_nm + self.half_nm + abs(self.bend_nm))

    def distance(self, at: Coordinates) -> Floats:
        offset = [axis - np.float32(p) for axis, p in zip(at, self.centre_nm, strict=True)]
        height = sum((o * np.float32(a) for o, a in zip(offset, self.axis, strict=True)), np.float32(0))
        across = np.maximum(_squared(offset) - height * height, 0)
        height = height - np.float32(self.bend_nm / self.radius_nm**2) * across
        beyond = np.maximum(np.sqrt(across) - np.float32(self.radius_nm - self.half_nm), 0)
        return np.sqrt(beyond * beyond + height * height) - np.float32(self.half_nm)


@dataclass(frozen=True)
class Blob:
    """A bumpy superellipsoid: sum(|offset / radii|^4) <= 1 is boxy (a cell in tissue), ^2 an ellipsoid.

    centre_nm, radii_nm: (z, y, x). power: 2 or 4. waves: bumps, None for a smooth surface.
    """

    centre_nm: NDArray[np.float64]
    radii_nm: NDArray[np.float64]
    power: int
    waves: Waves | None

    @property
    def box_nm(self) -> tuple[Vec3, Vec3]:
        bumps = 0.0 if self.waves is None else self.waves.amplitude_nm * len(self.waves.phases)
        margin = self.radii_nm + bumps
        return _grown(np.stack([self.centre_nm - margin, self.centre_nm + margin]), 0.0)

    def distance(self, at: Coordinates) -> Floats:
        # first-order distance f/|grad f| of f = (sum u^p)^(1/p) - 1, u = |offset / radius|
        total, slope = np.float32(1e-12), np.float32(1e-12)
        for axis, centre, radius in zip(at, self.centre_nm, self.radii_nm, strict=True):
            u = np.abs(axis - np.float32(centre)) / np.float32(radius)
            powered = u ** (self.power - 1)
            total = total + powered * u
            slope = slope + (powered / np.float32(radius)) ** 2
        root = total ** np.float32(1 / self.power)
        distance = (root - 1) * root ** np.float32(self.power - 1) / np.sqrt(slope)
        return distance if self.waves is None else distance + self.waves.at(at)
