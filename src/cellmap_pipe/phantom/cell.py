"""The synthetic world: one cell in its surroundings, made of shapes in nm, with a known class at every position.

A cell border (pm) parts the outside (ecs) from the cytoplasm, which holds a nucleus (nuc), mitochondria (mem, lum,
ribo), Golgi stacks, endoplasmic reticulum, endosomes and vesicles (mem, lum). The world is continuous: `sample` gives
its truth on any lattice. It is filled octant by octant, so that a crop of one octant holds what its `Contents` say.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import edt
import numpy as np
from numpy.typing import NDArray

from cellmap_pipe.classes import get_class
from cellmap_pipe.geometry import Lattice, Vec3, vec3
from cellmap_pipe.phantom.shapes import Blob, Disc, Shape, Tube, Waves, coordinates, part, window_of

# Codes of the truth volume: the challenge's class ids. The nucleus has no parts here, so its group's id stands for it.
CODE = {
    name: get_class(name).id
    for name in (
        "ecs pm mito_mem mito_lum mito_ribo golgi_mem golgi_lum ves_mem ves_lum "
        "endo_mem endo_lum er_mem er_lum nuc cyto"
    ).split()
}

PM_NM = 34.0
MEMBRANE_NM = {"mito": 32.0, "golgi": 28.0, "ves": 30.0, "endo": 32.0, "er": 30.0}
# The least distance in nm from an organelle's centre to its outside: no centre is tried that has less room.
ROOM_NM = {"golgi": 170.0, "mito": 112.0, "endo": 85.0, "er": 64.0, "ves": 66.0}
RIBOSOMES = 48  # wanted in each mitochondrion
Octant = tuple[int, int, int]


@dataclass(frozen=True)
class Organelle:
    """One closed membrane and what it holds.

    kind: mito, golgi, ves, endo or er. number: from 1, of its kind (all cisternae of a Golgi stack share one).
    shape: to the membrane's outside. axis: long axis (z, y, x), a unit vector. ribosomes: only in mitochondria.
    """

    kind: str
    number: int
    shape: Shape
    axis: NDArray[np.float64]
    ribosomes: tuple[Tube, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A cell: its border and nucleus (outer surfaces) and the organelles between them, none touching another."""

    border: Blob
    nucleus: Blob
    organelles: tuple[Organelle, ...]


@dataclass(frozen=True)
class Truth:
    """What is where, on one lattice, (z, y, x).

    classes: uint8, codes of `CODE`. objects: uint16, the organelle's number within its kind, 0 elsewhere.
    """

    classes: NDArray[np.uint8]
    objects: NDArray[np.uint16]

    def mask(self, name: str) -> NDArray[np.bool_]:
        """Return where class `name` is present: an atom, `nuc`, or a group of atoms."""
        if name in CODE:
            return self.classes == CODE[name]
        return np.isin(self.classes, sorted(get_class(name).atoms))

    def instances(self, name: str) -> NDArray[np.uint16]:
        """Return the objects of class `name`, numbered 1, 2, .. in the order of their own numbers; 0 is background."""
        numbers = np.where(self.mask(name), self.objects, np.uint16(0))
        present = np.unique(numbers)
        return np.searchsorted(present[present > 0], numbers, side="left").astype(np.uint16) + (numbers > 0)


def sample(cell: Cell, lattice: Lattice) -> Truth:
    """Return the truth at the voxel centres of `lattice`, which may lie anywhere."""
    at = coordinates(lattice)
    depth = -cell.border.distance(at)
    classes = np.full(lattice.shape, CODE["ecs"], np.uint8)
    classes[depth > 0] = CODE["pm"]
    classes[depth > PM_NM] = CODE["cyto"]
    objects = np.zeros(lattice.shape, np.uint16)
    inside = cell.nucleus.distance(at) < 0
    classes[inside] = CODE["nuc"]
    objects[inside] = 1
    for organelle in cell.organelles:
        window = window_of(lattice, organelle.shape.box_nm, 0)
        if window is None:
            continue
        depth = -organelle.shape.distance(part(at, window))
        lumen = depth > MEMBRANE_NM[organelle.kind]
        classes[window][depth > 0] = CODE[f"{organelle.kind}_mem"]
        classes[window][lumen] = CODE[f"{organelle.kind}_lum"]
        for ribosome in organelle.ribosomes:
            spot = window_of(lattice, ribosome.box_nm, 0)
            if spot is not None:
                classes[spot][ribosome.distance(part(at, spot)) < 0] = CODE["mito_ribo"]
        objects[window][depth > 0] = organelle.number
    return Truth(classes, objects)


@dataclass(frozen=True)
class Contents:
    """How many organelles of each kind an octant of the world gets (fewer where they no longer fit)."""

    golgi: int = 1
    mito: int = 3
    endo: int = 4
    er: int = 5
    ves: int = 28


@dataclass
class _Space:
    """What is still free for organelles, on a coarse lattice."""

    lattice: Lattice
    gap_nm: float
    free: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.free = np.ones(self.lattice.shape, bool)
        self.at = coordinates(self.lattice)

    def fits(self, shape: Shape) -> bool:
        window = window_of(self.lattice, shape.box_nm, 0)
        return window is not None and bool(np.all(self.free[window] | (shape.distance(part(self.at, window)) > 0)))

    def roomy(self, distance_nm: float) -> NDArray[np.bool_]:
        """Return the voxels that are at least `distance_nm` from anything taken, less a voxel."""
        clearance: NDArray[np.float32] = edt.edt(self.free, anisotropy=self.lattice.voxel_nm, black_border=True)
        return clearance > distance_nm - max(self.lattice.voxel_nm)

    def choose_in(self, window: tuple[slice, slice, slice], allowed: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Return the free and allowed voxels (n, 3) of a window, as indices of the whole lattice."""
        return np.argwhere(self.free[window] & allowed[window]) + [axis.start for axis in window]

    def take_if_free(self, shape: Shape) -> bool:
        """Return whether the shape fits, after taking its place."""
        if not self.fits(shape):
            return False
        self.take(shape)
        return True

    def take(self, shape: Shape) -> None:
        window = window_of(self.lattice, shape.box_nm, self.gap_nm)
        if window is not None:
            self.free[window] &= shape.distance(part(self.at, window)) > self.gap_nm


def build_cell(lower_nm: Vec3, upper_nm: Vec3, rng: np.random.Generator, octants: Mapping[Octant, Contents]) -> Cell:
    """Return a random cell that fills the box between two corners (z, y, x) but for the outside at its edges.

    octants: what the octant (0 or 1 on each axis, lower or upper half) holds; those not named stay empty cytoplasm.
    """
    lower, upper = np.array(lower_nm), np.array(upper_nm)
    centre, half = (lower + upper) / 2, (upper - lower) / 2
    border = Blob(centre + rng.uniform(-30, 30, 3), half * 1.03, 4, Waves.random(rng, 14.0, 900.0))
    radii = half * rng.uniform(0.62, 0.67, 3)
    nucleus = Blob(centre + rng.uniform(-40, 40, 3), radii, 2, Waves.random(rng, 12.0, 700.0))
    space = _Space(Lattice.covering(lower_nm, upper_nm, (22.0, 22.0, 22.0)), gap_nm=36.0)
    space.free = -border.distance(space.at) > PM_NM + space.gap_nm
    space.take(nucleus)

    apart = 0.1 * half  # crops keep off the planes between the octants; so do the centres of organelles
    organelles: list[Organelle] = []
    # large ones first: vesicles find room in what is left
    for kind in ("golgi", "mito", "endo", "er", "ves"):
        number = 0
        roomy = space.roomy(ROOM_NM[kind])
        for octant, contents in sorted(octants.items()):
            start = lower + np.array(octant) * (half + apart)
            window = window_of(space.lattice, (vec3(start.tolist()), vec3((start + half - apart).tolist())), 0)
            assert window is not None
            for _ in range(getattr(contents, kind)):
                placed = _place(kind, number + 1, space, window, roomy, rng)
                number += bool(placed)
                organelles.extend(placed)
    return Cell(border, nucleus, tuple(organelles))


def _place(
    kind: str,
    number: int,
    space: _Space,
    window: tuple[slice, slice, slice],
    roomy: NDArray[np.bool_],
    rng: np.random.Generator,
    attempts: int = 300,
) -> tuple[Organelle, ...]:
    """Return a new organelle of `kind` in the window, taken out of `space`, or nothing if no attempt fits."""
    free = space.choose_in(window, roomy)
    for attempt in range(attempts if len(free) else 0):
        centre = np.array(space.lattice.world_of(free[rng.integers(len(free))].tolist()))
        # what does not fit is tried ever smaller, down to three quarters of its size
        size = 1 - 0.25 * attempt / attempts
        if placed := _MAKERS[kind](space, centre, size, number, rng):
            return placed
    return ()


def _direction(rng: np.random.Generator) -> NDArray[np.float64]:
    vector = rng.normal(size=3)
    return vector / np.linalg.norm(vector)


# Each maker returns an organelle at `centre`, taken out of `space`, or nothing if it does not fit there.


def _mitochondrion(
    space: _Space, centre: NDArray[np.float64], size: float, number: int, rng: np.random.Generator
) -> tuple[Organelle, ...]:
    axis, bend = _direction(rng), _direction(rng) * 50
    reach = axis * rng.uniform(180, 270) * size
    shape = Tube(np.stack([centre - reach, centre + bend, centre + reach]), rng.uniform(150, 175) * size)
    if not space.take_if_free(shape):
        return ()
    return (Organelle("mito", number, shape, axis, _ribosomes(shape, centre, reach, rng)),)


def _ribosomes(
    hull: Tube, centre: NDArray[np.float64], reach: NDArray[np.float64], rng: np.random.Generator, candidates: int = 900
) -> tuple[Tube, ...]:
    """Return balls in the lumen of the mitochondrion `hull`, which extends by `reach` to both sides, none touching."""
    membrane = MEMBRANE_NM["mito"]
    sideways = rng.normal(size=(candidates, 3))
    sideways *= rng.uniform(0, hull.radius_nm - membrane, (candidates, 1)) / np.linalg.norm(sideways, axis=1)[:, None]
    spots = centre + rng.uniform(-1.6, 1.6, (candidates, 1)) * reach + sideways
    radii = rng.uniform(32, 38, candidates)
    z, y, x = spots.astype(np.float32).T
    inside = hull.distance((z, y, x)) < -(membrane + radii - 6)
    chosen: list[int] = []
    for i in np.flatnonzero(inside):
        apart = np.linalg.norm(spots[chosen] - spots[i], axis=1) > radii[chosen] + radii[i] + 12
        if len(chosen) < RIBOSOMES and apart.all():
            chosen.append(int(i))
    return tuple(Tube(spots[i][None], float(radii[i])) for i in chosen)


def _golgi_stack(
    space: _Space, centre: NDArray[np.float64], size: float, number: int, rng: np.random.Generator
) -> tuple[Organelle, ...]:
    axis = _direction(rng)
    half, pitch, n = 50.0, 132.0, 4
    radius, bend = rng.uniform(215, 250) * size, rng.uniform(20, 50)
    heights = (np.arange(n) - (n - 1) / 2) * pitch
    if not space.take_if_free(Disc(centre, axis, radius + half, float(heights[-1] + half), bend)):
        return ()
    return tuple(
        Organelle("golgi", number, Disc(centre + h * axis, axis, radius * rng.uniform(0.88, 1.0), half, bend), axis)
        for h in heights
    )


def _endosome(
    space: _Space, centre: NDArray[np.float64], size: float, number: int, rng: np.random.Generator
) -> tuple[Organelle, ...]:
    radius = rng.uniform(135, 165) * size
    shape = Blob(centre, radius * rng.uniform(0.85, 1.1, 3), 2, Waves.random(rng, 5.0, 260.0))
    return (Organelle("endo", number, shape, _direction(rng)),) if space.take_if_free(shape) else ()


def _tubule(
    space: _Space, centre: NDArray[np.float64], size: float, number: int, rng: np.random.Generator
) -> tuple[Organelle, ...]:
    """Grows a winding tube piece by piece into free space; one of fewer than four pieces is given up."""
    heading = axis = _direction(rng)
    radius = rng.uniform(64, 72)
    points = [centre]
    for _ in range(40):
        turned = heading + 0.8 * _direction(rng)
        turned /= np.linalg.norm(turned)
        piece = np.stack([points[-1], points[-1] + turned * 120 * size])
        if space.fits(Tube(piece, radius)):
            heading = turned
            points.append(piece[1])
        if len(points) > 7:
            break
    shape = Tube(np.stack(points), radius)
    return (Organelle("er", number, shape, axis),) if len(points) > 4 and space.take_if_free(shape) else ()


def _vesicle(
    space: _Space, centre: NDArray[np.float64], size: float, number: int, rng: np.random.Generator
) -> tuple[Organelle, ...]:
    shape = Tube(centre[None], rng.uniform(76, 92) * (0.5 + 0.5 * size))
    return (Organelle("ves", number, shape, _direction(rng)),) if space.take_if_free(shape) else ()


_MAKERS: dict[str, Callable[[_Space, NDArray[np.float64], float, int, np.random.Generator], tuple[Organelle, ...]]] = {
    "golgi": _golgi_stack,
    "mito": _mitochondrion,
    "endo": _endosome,
    "er": _tubule,
    "ves": _vesicle,
}


def all_octants(contents: Contents, but: Iterable[tuple[Octant, Contents]] = ()) -> dict[Octant, Contents]:
    """Return `contents` for each of the eight octants, except those named in `but`."""
    return {(z, y, x): contents for z in (0, 1) for y in (0, 1) for x in (0, 1)} | dict(but)
