"""EM-like images of the synthetic world: dark membranes, grey and textured lumens, blur, grain and noise."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from cellmap_pipe.geometry import Lattice
from cellmap_pipe.phantom.cell import MEMBRANE_NM, PM_NM, Cell, Organelle
from cellmap_pipe.phantom.shapes import Coordinates, Floats, coordinates, part, window_of

# Grey levels before an instrument's contrast: 0 is fully stained, 255 not at all.
MEMBRANE, PLASMA_MEMBRANE, RIBOSOME = 62.0, 56.0, 52.0
OUTSIDE, CYTOPLASM, NUCLEOPLASM, PERINUCLEAR = 204.0, 160.0, 138.0, 190.0
LUMEN = {"mito": 124.0, "golgi": 178.0, "ves": 122.0, "endo": 196.0, "er": 190.0}
ENVELOPE_NM = (30.0, 58.0, 88.0)  # depths at which outer membrane, perinuclear space and inner membrane end
CRISTA_PITCH_NM = 95.0


@dataclass(frozen=True)
class Instrument:
    """How a microscope sees the world: value = offset + gain * grey (in 0..255), blurred by a Gaussian, with noise.

    psf_nm: standard deviation of the blur. noise: standard deviation of the white noise, in output counts.
    """

    gain: float = 0.9
    offset: float = 10.0
    psf_nm: float = 9.0
    noise: float = 8.0


@dataclass(frozen=True)
class _Textures:
    """Random fields of zero mean and unit variance on the image's lattice: grain of 12 nm, speckle 28, cloud 60."""

    grain: Floats
    speckle: Floats
    cloud: Floats


def _field(lattice: Lattice, scale_nm: float, rng: np.random.Generator) -> Floats:
    noise = rng.standard_normal(lattice.shape, dtype=np.float32)
    smooth = gaussian_filter(noise, [scale_nm / v for v in lattice.voxel_nm], mode="wrap", truncate=3)
    return smooth / smooth.std()


def _blend(image: Floats, depth: Floats, value: NDArray[np.floating[Any]] | float, edge_nm: float) -> None:
    """Paint `value` where `depth` is positive, with the share of the voxel that lies inside at its border."""
    share = np.clip(0.5 + depth / np.float32(edge_nm), 0, 1)
    image += share * (value - image)


def render(cell: Cell, lattice: Lattice, instrument: Instrument, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return the image (z, y, x) of `cell` on `lattice`."""
    at = coordinates(lattice)
    edge = float(np.mean(lattice.voxel_nm))
    textures = _Textures(*(_field(lattice, scale_nm, rng) for scale_nm in (12.0, 28.0, 60.0)))
    image = OUTSIDE + 3 * textures.cloud
    depth = -cell.border.distance(at)
    _blend(image, depth, PLASMA_MEMBRANE, edge)
    _blend(image, depth - PM_NM, _cytoplasm(textures), edge)
    _paint_nucleus(image, -cell.nucleus.distance(at), textures, edge)
    for organelle in cell.organelles:
        _paint_organelle(image, organelle, lattice, at, textures, edge)
    blurred = gaussian_filter(image, [instrument.psf_nm / v for v in lattice.voxel_nm], mode="nearest")
    counts = instrument.offset + instrument.gain * blurred
    counts += instrument.noise * rng.standard_normal(lattice.shape, dtype=np.float32)
    # 0 is kept for what was never written to disk
    return np.clip(np.rint(counts), 1, 255).astype(np.uint8)


def _cytoplasm(textures: _Textures) -> Floats:
    # grainy, with stained specks (free ribosomes and the like) in the upper tail of the grain
    return CYTOPLASM + 9 * textures.grain - 30 * np.clip(textures.grain - 1.2, 0, 1.5)


def _paint_nucleus(image: Floats, depth: Floats, textures: _Textures, edge: float) -> None:
    outer, space, inner = ENVELOPE_NM
    chromatin = NUCLEOPLASM - 42 * np.tanh(1.6 * textures.speckle + 0.8 * textures.cloud)
    for start, value in ((0.0, MEMBRANE), (outer, PERINUCLEAR), (space, MEMBRANE), (inner, chromatin)):
        _blend(image, depth - start, value, edge)


def _paint_organelle(
    image: Floats, organelle: Organelle, lattice: Lattice, at: Coordinates, textures: _Textures, edge: float
) -> None:
    window = window_of(lattice, organelle.shape.box_nm, edge)
    if window is None:
        return
    here = part(at, window)
    grain, speckle, cloud = (texture[window] for texture in (textures.grain, textures.speckle, textures.cloud))
    depth = -organelle.shape.distance(here)
    kind = organelle.kind
    lumen: Floats = np.float32(LUMEN[kind]) + 5 * grain
    if kind == "mito":
        lumen = lumen - _cristae(organelle, here, cloud)
    elif kind == "ves":
        lumen = lumen + 8 * grain
    elif kind == "endo":
        lumen = lumen - 45 * np.clip(speckle - 0.8, 0, 1.2)
    _blend(image[window], depth, MEMBRANE, edge)
    _blend(image[window], depth - MEMBRANE_NM[kind], lumen, edge)
    for ribosome in organelle.ribosomes:
        spot = window_of(lattice, ribosome.box_nm, edge)
        if spot is not None:
            _blend(image[spot], -ribosome.distance(part(at, spot)), RIBOSOME, edge)


def _cristae(organelle: Organelle, at: Coordinates, cloud: Floats) -> Floats:
    """Return the darkness of wavy sheets across the mitochondrion's long axis."""
    along = sum((axis * np.float32(a) for axis, a in zip(at, organelle.axis, strict=True)), np.float32(0))
    phase = np.sin(np.float32(2 * np.pi / CRISTA_PITCH_NM) * along + 0.6 * cloud)
    return 30 * np.exp(-((phase / 0.45) ** 2)) - 8
