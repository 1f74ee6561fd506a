"""Writers of tiny images in the challenge's layout, shared by the tests of reading and conversion."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr


def block_mean(volume: np.ndarray) -> np.ndarray:
    """Return the means of blocks of 2x2x2 voxels, rounded to the dtype; odd last planes are left out."""
    z, y, x = (n // 2 for n in volume.shape)
    blocks = volume[: 2 * z, : 2 * y, : 2 * x].reshape(z, 2, y, 2, x, 2)
    return np.rint(blocks.mean(axis=(1, 3, 5))).astype(volume.dtype)


def write_ngff(
    path: Path,
    volume: np.ndarray,
    voxel_nm: Sequence[float],
    translation_nm: Sequence[float],
    *,
    chunks: Sequence[int] = (8, 8, 8),
    separator: str = "/",
    zarr_format: int = 2,
    annotation: dict[str, Any] | None = None,
    levels: int = 1,
) -> Path:
    """Write `volume` as level s0 of an OME-NGFF group at `path`, coarser levels by block means, and return `path`."""
    datasets: list[dict[str, Any]] = []
    part = volume
    for k in range(levels):
        part = volume if k == 0 else block_mean(part)
        encoding: dict[str, Any] = {"name": "v2", "separator": separator}
        if zarr_format == 3:
            encoding = {"name": "default", "separator": separator}
        array = zarr.create_array(
            str(path / f"s{k}"),
            shape=part.shape,
            chunks=tuple(chunks),
            dtype=part.dtype,
            zarr_format=zarr_format,
            chunk_key_encoding=encoding,
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        array[...] = part
        scale = [v * 2**k for v in voxel_nm]
        offset = [t + (s - v) / 2 for t, s, v in zip(translation_nm, scale, voxel_nm, strict=True)]
        transforms = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": offset}]
        datasets.append({"path": f"s{k}", "coordinateTransformations": transforms})
    axes = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    content: dict[str, Any] = {"multiscales": [{"version": "0.4", "axes": axes, "datasets": datasets}]}
    if zarr_format == 3:
        attributes = {"ome": {"version": "0.5", **content}}
        group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        (path / "zarr.json").write_text(json.dumps(group))
        return path
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    if annotation is not None:
        content["cellmap"] = {"annotation": annotation}
        (path / "s0" / ".zattrs").write_text(json.dumps({"cellmap": {"annotation": annotation}}))
    (path / ".zattrs").write_text(json.dumps(content))
    return path


@pytest.fixture(scope="session")
def ngff() -> Callable[..., Path]:
    return write_ngff
