"""Trained networks, loaded for use."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import file_digest
from cellmap_pipe.training.checkpoint import read_model
from cellmap_pipe.training.networks import SegmentationNetwork, build_network

FORMAT = 2
REMEDY = "make it again with `snakemake -R train`; if that does not help, train anew (README.md says how)"


@dataclass(frozen=True)
class Trained:
    """A trained network and what is needed to use it.

    network: in evaluation mode, maps float (B, 1, *patch) to logits (B, C, *patch). patch: (z, y, x) voxels.
    voxel_nm: of its grid (z, y, x), or "native". normalisation: (lo, hi) intensities by dataset (see intensity).
    digest: SHA-256 of the file. contents: everything else that the file holds, `settings` of the training among it.
    """

    network: SegmentationNetwork
    classes: tuple[str, ...]
    grid: str
    voxel_nm: Any
    patch: tuple[int, int, int]
    normalisation: dict[str, tuple[float, float]]
    digest: str
    contents: dict[str, Any]


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Trained:
    """Return the network of a `model.pt` on `device`. Raises ContractError for a missing, damaged or foreign file."""
    contents = read_model(path, REMEDY)
    if contents.get("format") != FORMAT:
        raise ContractError(f"{path}: model format {contents.get('format')}, this version reads {FORMAT}; {REMEDY}")
    settings = contents["settings"]
    network = build_network(
        settings["network"],
        settings["arguments"],
        patch=contents["patch"],
        n_classes=len(contents["classes"]),
        spatial_dims=settings["spatial_dims"],
    )
    try:
        network.load_state_dict(contents.pop("state_dict"))
    except RuntimeError as error:
        cause = " ".join(str(error).split())[:200]
        raise ContractError(f"{path}: its weights do not fit its settings ({cause}); {REMEDY}") from error
    return Trained(
        network=network.to(device).eval(),
        classes=tuple(contents["classes"]),
        grid=contents["grid"],
        voxel_nm=contents["voxel_nm"],
        patch=tuple(contents["patch"]),
        normalisation={name: (lo, hi) for name, (lo, hi) in contents["normalisation"].items()},
        digest=file_digest(path),
        contents=contents,
    )
