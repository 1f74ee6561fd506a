"""From shipped bytes to a network's input and targets, batched on the training device, with random variation.

Batches travel as uint8 EM and label maps. Symmetries act on both before anything else, so image and labels cannot part.
Every parameter is drawn from the sample's own random stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cellmap_pipe.geometry import Shape3
from cellmap_pipe.intensity import lookup_table
from cellmap_pipe.prepare.labels import PRESENT, UNKNOWN

# Probabilities and ranges follow nnU-Net's default list (Isensee et al. 2021, supplement 4), for intensities in 0..1.
CONTRAST = (0.15, 0.75, 1.25)
BRIGHTNESS = (0.15, 0.75, 1.25)
GAMMA = (0.3, 0.7, 1.5)
NOISE_PROBABILITY = 0.1


@dataclass(frozen=True)
class Variation:
    """The augmentation of one sample: axes are permuted, then flipped; the rest acts on the normalised intensities."""

    permutation: Shape3 = (0, 1, 2)
    flipped: tuple[int, ...] = ()
    gamma: float = 1.0
    contrast: float = 1.0
    brightness: float = 1.0
    noise: float = 0.0
    noise_seed: int = 0


def exchangeable_axes(voxel_nm: Sequence[float] | None, patch: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of axes that a quarter turn may exchange: equal in voxel size (to 1 %) and in patch size.

    voxel_nm: (z, y, x); None if the crops' voxel sizes differ, when only y and x are taken as equal.
    """
    pairs = [(0, 1), (0, 2), (1, 2)]
    size = (2.0, 1.0, 1.0) if voxel_nm is None else tuple(voxel_nm)
    return [(a, b) for a, b in pairs if patch[a] == patch[b] and abs(size[a] / size[b] - 1) < 0.01]


def permutations(pairs: Sequence[tuple[int, int]]) -> list[Shape3]:
    """Return the axis orders that exchanging `pairs` can reach, the identity first."""
    found: list[Shape3] = [(0, 1, 2)]
    for order in found:
        for a, b in pairs:
            swapped = list(order)
            swapped[a], swapped[b] = swapped[b], swapped[a]
            candidate = (swapped[0], swapped[1], swapped[2])
            if candidate not in found:
                found.append(candidate)
    return found


def draw_variation(random: np.random.Generator, settings: Mapping[str, Any], orders: Sequence[Shape3]) -> Variation:
    """Return the augmentation of one sample.

    settings: the `augment` section: flips, rotations, intensity (bool), noise (largest standard deviation).
    orders: allowed axis orders. As many numbers are drawn whatever is switched on.
    """
    order = orders[int(random.integers(len(orders)))]
    flips = random.random(3) < 0.5
    gamma, contrast, brightness = (
        float(random.uniform(low, high)) if random.random() < probability else 1.0
        for probability, low, high in (GAMMA, CONTRAST, BRIGHTNESS)
    )
    noise = float(random.random()) if random.random() < NOISE_PROBABILITY else 0.0
    noise_seed = int(random.integers(2**62))
    intensity = settings["intensity"]
    return Variation(
        permutation=order if settings["rotations"] else (0, 1, 2),
        flipped=tuple(int(axis) for axis in np.flatnonzero(flips)) if settings["flips"] else (),
        gamma=gamma if intensity else 1.0,
        contrast=contrast if intensity else 1.0,
        brightness=brightness if intensity else 1.0,
        noise=noise * settings["noise"],
        noise_seed=noise_seed,
    )


def turned(volumes: Tensor, variations: Sequence[Variation]) -> Tensor:
    """Return the volumes (B, z, y, x) with each sample's symmetry of the cube applied."""
    if all(v.permutation == (0, 1, 2) and not v.flipped for v in variations):
        return volumes
    return torch.stack(
        [
            volume.permute(variation.permutation).flip(variation.flipped)
            for volume, variation in zip(volumes, variations, strict=True)
        ]
    )


def vary_intensity(image: Tensor, variations: Sequence[Variation]) -> Tensor:
    """Return normalised images (B, 1, z, y, x) after each sample's gamma, contrast, brightness and noise, in place."""
    for sample, variation in zip(image, variations, strict=True):
        if variation.gamma != 1.0:
            sample.clamp_(min=0).pow_(variation.gamma)
        if variation.contrast != 1.0:
            mean = sample.mean()
            sample.sub_(mean).mul_(variation.contrast).add_(mean)
        if variation.brightness != 1.0:
            sample.mul_(variation.brightness)
        if variation.noise > 0.0:
            source = torch.Generator(sample.device).manual_seed(variation.noise_seed)
            sample.add_(torch.randn(sample.shape, generator=source, device=sample.device), alpha=variation.noise)
    return image


class Expander:
    """Turns uint8 EM and label maps on the device into the network's input, targets and known-masks.

    tables: state tables, uint8 (crops, classes, rows). ranges: (lo, hi) intensity of each crop's dataset, (crops, 2).
    """

    def __init__(
        self, tables: npt.NDArray[np.uint8], ranges: Sequence[tuple[float, float]], device: torch.device
    ) -> None:
        self.tables = torch.from_numpy(tables).to(device)
        lookups = np.stack([lookup_table(lo, hi) for lo, hi in ranges])
        self.lookups = torch.from_numpy(lookups).to(device)

    def image(self, stored: Tensor, crops: Sequence[int]) -> Tensor:
        """Return float32 (B, 1, z, y, x) from uint8 (B, z, y, x) by the crops' normalisation."""
        return torch.stack(
            [
                self.lookups[crop].index_select(0, volume.flatten().int()).view(1, *volume.shape)
                for volume, crop in zip(stored, crops, strict=True)
            ]
        )

    def states(self, label: Tensor, crops: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return target and known-mask, bool (B, C, z, y, x), from label maps (B, z, y, x)."""
        states = torch.stack(
            [
                self.tables[crop].index_select(1, volume.flatten().int()).view(-1, *volume.shape)
                for volume, crop in zip(label, crops, strict=True)
            ]
        )
        return states == PRESENT, states != UNKNOWN
