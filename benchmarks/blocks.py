"""How fast patches come from disk out of a store that is larger than memory: in blocks, as a ratio to memory maps.

    python benchmarks/blocks.py [--quick] [--folder FOLDER]

Crops of 400^3 voxels, EM and label map, are written in both layouts by the store's own writers. Patches of 128^3 voxels
at arbitrary positions, each in another crop, are read by turns from memory maps with the machine's own readahead, and
from blocks with the hint for the next sample. Before each turn all files are dropped from the page cache, and no map
is open by then: a live one would keep its pages. Wall time counts, and the bytes that the kernel really
read for this process; medians over the rounds are compared. Both layouts must give the same voxels.
FOLDER: where the files go for as long as this runs, 2.5 GB; on the disk to be measured. The last line is one JSON
object: name, ratios, targets, ok.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from cellmap_pipe.geometry import Shape3
from cellmap_pipe.prepare.layout import BLOCKED, MAPPED, open_volume, write_volume

logger = logging.getLogger("blocks")

CROP: Shape3 = (400, 400, 400)
PATCH: Shape3 = (128, 128, 128)
KINDS = ("image", "label")
SLAB = 50

# Least ratio of wall time, map to blocks; most MB read from disk for a patch out of blocks.
TARGETS = {"wall": 1.7, "mb_per_patch": 16.0}

Sample = tuple[int, Shape3]


def write_crops(folder: Path, crops: int) -> None:
    """Write the crops in both layouts. What their voxels are does not matter to a disk."""
    rng = np.random.default_rng(0)
    for crop in range(crops):
        for kind in KINDS:
            voxels = np.frombuffer(rng.bytes(int(np.prod(CROP))), np.uint8).reshape(CROP)
            slabs = [voxels[first : first + SLAB] for first in range(0, CROP[0], SLAB)]
            for layout in (MAPPED, BLOCKED):
                write_volume(layout, path_of(folder, layout, crop, kind), voxels.dtype, CROP, slabs)


def path_of(folder: Path, layout: str, crop: int, kind: str) -> Path:
    """Return the file of a volume."""
    return folder / f"{layout}_{crop}_{kind}.npy"


def evict(folder: Path) -> None:
    """Drop all files in `folder` from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bytes_read() -> int:
    """Return the bytes that this process has had read from disk so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def read_patches(folder: Path, layout: str, samples: list[Sample], out: np.ndarray) -> tuple[float, float, list[int]]:
    """Return patches per second of wall time, MB (10^6 bytes) read from disk per patch, and a checksum of each patch.

    out: uint8 (2, z, y, x), which takes one patch after the other.
    """
    volumes = [
        [open_volume(layout, path_of(folder, layout, crop, kind), CROP) for kind in KINDS] for crop, _ in samples
    ]

    def prefetch(number: int) -> None:
        for volume in volumes[number]:
            volume.prefetch(samples[number][1], PATCH)

    checksums, before, begin = [], bytes_read(), time.perf_counter()
    prefetch(0)
    for number, (_, origin) in enumerate(samples):
        if number + 1 < len(samples):
            prefetch(number + 1)
        for volume, patch in zip(volumes[number], out, strict=True):
            volume.copy(origin, patch)
        checksums.append(int(out.view(np.uint64).sum()))
    seconds = time.perf_counter() - begin
    return len(samples) / seconds, (bytes_read() - before) / 1e6 / len(samples), checksums


def main() -> int:
    """Run the rounds, log one line each, print the JSON line. Returns 0 if every target is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer crops, fewer rounds")
    parser.add_argument("--folder", type=Path, help="where the files go; if not given, where temporary ones do")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    crops, rounds = (4, 9) if options.quick else (8, 21)
    out = np.empty((len(KINDS), *PATCH), np.uint8)
    speeds: dict[str, list[float]] = {MAPPED: [], BLOCKED: []}
    megabytes: dict[str, list[float]] = {MAPPED: [], BLOCKED: []}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_crops(folder, crops)
        for number in range(rounds):
            rng = np.random.default_rng(number)
            origins = rng.integers(0, np.subtract(CROP, PATCH) + 1, (crops, 3)).tolist()
            samples = [(int(crop), (z, y, x)) for crop, (z, y, x) in zip(rng.permutation(crops), origins, strict=True)]
            checksums = {}
            for layout in (MAPPED, BLOCKED) if number % 2 == 0 else (BLOCKED, MAPPED):
                evict(folder)
                speed, megabyte, checksums[layout] = read_patches(folder, layout, samples, out)
                speeds[layout].append(speed)
                megabytes[layout].append(megabyte)
            if checksums[MAPPED] != checksums[BLOCKED]:
                raise RuntimeError("the layouts do not give the same voxels")
            logger.info(
                "round %d: %.1f patches/s and %.1f MB per patch from maps, %.1f and %.1f from blocks",
                number + 1,
                *(values[layout][-1] for layout in (MAPPED, BLOCKED) for values in (speeds, megabytes)),
            )
    ratios = {
        "wall": median(speeds[BLOCKED]) / median(speeds[MAPPED]),
        "mb_per_patch": median(megabytes[BLOCKED]),
        "mb_per_patch_of_maps": median(megabytes[MAPPED]),
    }
    if not ratios["mb_per_patch"]:
        raise RuntimeError("nothing was read from disk; give a --folder that is not kept in memory")
    ok = ratios["wall"] >= TARGETS["wall"] and ratios["mb_per_patch"] <= TARGETS["mb_per_patch"]
    rounded = {key: round(value, 3) for key, value in ratios.items()}
    print(json.dumps({"name": "blocks", "ratios": rounded, "targets": TARGETS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
