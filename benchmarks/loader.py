"""How many training patches a second of CPU time yields, as ratios to MONAI's and nnU-Net's ways of loading.

    python benchmarks/loader.py [--quick]

A patch is 128^3 voxels of EM and of labels of 14 disjoint classes, at an arbitrary position of a crop of 400^3 voxels
that lies in the page cache or in memory. All ways are measured in one process, by turns, first in one order and then in
the other; medians over the rounds are compared. CPU time is that of all threads; every library has one. MONAI delivers
float32 EM, through its DataLoader without worker processes, which saves it their transport; four patches per item and
no positions by class, as the cheapest of its random crops does it. The 14-channel targets are those of 4/5 of one crop,
so that cache and deep copy take 6.1 GB: less to copy than a whole crop. "First batch" is the time from opening a store
of 289 small crops with 48 classes, after imports, to the first batch in hand. --quick: crops of 256^3 voxels; what a
deep copy of a crop costs is then less, and so is the target. The last line is one JSON object: name, ratios, targets,
ok; ratios are ours (through the loader with two workers) to the other's, and seconds for the first batch.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, cycle, islice
from pathlib import Path
from statistics import median

# read when the libraries are imported
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["BLOSC_NTHREADS"] = "1"

import blosc2
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader, Dataset, PersistentDataset
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    Lambdad,
    LoadImaged,
    RandSpatialCropSamplesd,
    ScaleIntensityRanged,
    Transform,
)
from volumes import ATOMS, MANY, Pair, crop_pair, open_loader, shifted, write_store

from cellmap_pipe.training.loader import AHEAD

logger = logging.getLogger("loader")

PATCH = 128
TURNS = 5  # of our ways and the copies in a round: they take turns as fast as the machine's other work changes
SAMPLES = 4  # patches per item of MONAI's datasets
KEYS = ("image", "label")
WORKERS = 2
OURS = f"loader, {WORKERS} workers"
COPIED = "MONAI cache, 14 channels, copied"

FIRST_BATCH_SECONDS = 2.0
# Least ratio of patches per CPU-second: the loader with two workers to another way; in-process to the numpy copy.
TARGETS = {
    COPIED: 400.0,
    "MONAI cache, 14 channels": 60.0,
    "MONAI cache, integer labels": 2.0,
    "blosc2": 20.0,
    "numpy copy": 0.75,
    "in-process / numpy copy": 0.90,
}


@dataclass
class Way:
    """A way to get patches: `run` gets `patches` of them, `reads` says what that takes."""

    patches: int
    run: Callable[[], object]
    reads: str
    rates: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """Add the patches per CPU-second of one run."""
        begin = time.process_time()
        self.run()
        self.rates.append(self.patches / (time.process_time() - begin))


def one_hot(label: torch.Tensor) -> torch.Tensor:
    """Return float32 targets (14, z, y, x) of a label map (1, z, y, x)."""
    targets = torch.empty((len(ATOMS), *label.shape[1:]))
    for number, target in enumerate(targets, start=1):
        target.copy_(label[0] == number)
    return targets


def monai_transforms(*, channels: bool = False, last: tuple[Transform, ...] = ()) -> Compose:
    """Return the usual steps: load, normalise, here targets if `channels`, and four random crops, then `last`."""
    return Compose(
        [
            LoadImaged(KEYS, dtype=None),
            EnsureChannelFirstd(KEYS, channel_dim="no_channel"),
            ScaleIntensityRanged("image", 0, 255, 0, 1),
            *([Lambdad("label", one_hot)] if channels else []),
            EnsureTyped(KEYS),
            RandSpatialCropSamplesd(KEYS, roi_size=(PATCH,) * 3, num_samples=SAMPLES, random_size=False),
            *last,
        ]
    )


def monai_item(folder: Path, image: np.ndarray, label: np.ndarray) -> dict[str, str]:
    """Write a crop as two `.npy` files and return its entry in a datalist."""
    folder.mkdir()
    for key, volume in zip(KEYS, (image, label), strict=True):
        np.save(folder / f"{key}.npy", volume)
    return {key: str(folder / f"{key}.npy") for key in KEYS}


def cached_targets(item: dict[str, str]) -> CacheDataset:
    """Return MONAI's cache of a crop with float32 targets of 14 channels."""
    return CacheDataset([item], monai_transforms(channels=True), progress=False)


def items(dataset: Dataset, count: int) -> None:
    """Have MONAI's loader deliver `count` items of a data set of one crop."""
    loader = DataLoader(dataset, batch_size=1)
    for _ in range(count):
        for _ in loader:
            pass


def monai_ways(folder: Path, image: np.ndarray, label: np.ndarray) -> dict[str, Way]:
    """Return MONAI's ways to read a crop, with what they cache."""
    planes = 4 * len(image) // 5
    item = monai_item(folder / "whole", image, label)
    part = monai_item(folder / "part", image[:planes], label[:planes])
    integers = CacheDataset([item], monai_transforms(), copy_cache=False, progress=False)
    to_channels = AsDiscreted("label", to_onehot=len(ATOMS) + 1)
    persistent = PersistentDataset([item], monai_transforms(last=(to_channels,)), cache_dir=folder / "persistent")
    targets = cached_targets(part)

    def run_targets(count: int, *, copied: bool) -> None:
        targets.copy_cache = copied
        items(targets, count)

    return {
        COPIED: Way(
            SAMPLES, lambda: run_targets(1, copied=True), "memory, 60 B/voxel; the whole crop is copied for 4 patches"
        ),
        "MONAI cache, 14 channels": Way(
            2 * SAMPLES, lambda: run_targets(2, copied=False), "memory, 60 B/voxel; copy_cache=False"
        ),
        "MONAI cache, integer labels": Way(
            20 * SAMPLES, lambda: items(integers, 20), "memory, 5 B/voxel; copy_cache=False, no one-hot"
        ),
        "MONAI persistent": Way(
            SAMPLES, lambda: items(persistent, 1), "a file, 5 B/voxel, whole for 4 patches; one-hot of each patch"
        ),
    }


def blosc2_way(folder: Path, image: np.ndarray, label: np.ndarray) -> Way:
    """Return nnU-Net's way to read a crop: float32 EM and int8 labels in compressed blocks, opened for each patch."""
    paths = [str(folder / f"{key}.b2nd") for key in KEYS]
    volumes = [((image - image.mean()) / image.std()).astype(np.float32), label.astype(np.int8)]
    grids = [((128, 128, 96), (32, 32, 32)), ((192, 192, 160), (64, 64, 32))]  # nnU-Net's choices for 400^3 voxels
    for path, volume, (chunks, blocks) in zip(paths, volumes, grids, strict=True):
        blosc2.asarray(
            volume[None],
            urlpath=path,
            chunks=(1, *chunks),
            blocks=(1, *blocks),
            cparams={"codec": blosc2.Codec.ZSTD, "clevel": 8, "nthreads": 1},
        )
    rng = np.random.default_rng(0)
    out = [np.empty((1, *(PATCH,) * 3), volume.dtype) for volume in volumes]

    def read(count: int) -> None:
        for begin in rng.integers(0, len(image) - PATCH + 1, (count, 3)):
            box = (slice(None), *(slice(start, start + PATCH) for start in begin))
            for path, patch in zip(paths, out, strict=True):
                patch[...] = blosc2.open(path, mode="r", mmap_mode="r", dparams={"nthreads": 1})[box]

    return Way(12, lambda: read(12), "mapped files, float32 + int8, zstd 8 in blocks; opened for each patch")


def our_ways(index: Path, patches: int) -> dict[str, Way]:
    """Return the project's ways on a store, and copies of as many bytes: of the same boxes, and in one piece."""
    threaded = open_loader(index, PATCH, workers=WORKERS)
    batches = iter(threaded)
    size = threaded.settings["batch"]
    single = open_loader(index, PATCH, workers=0)
    buffers, numbers = single.buffers(), count()

    sampler = threaded.sampler
    store = sampler.patches.store
    arrays = [
        [np.load(store.folder / record["files"][kind]["path"], mmap_mode="r") for kind in KEYS]
        for record in store.crops.values()
    ]
    boxes = cycle([sampler.draw(step, row) for step in range(500) for row in range(size)])
    source = np.ones((64, 2, PATCH**3), np.uint8)
    ring = np.ones(((WORKERS + 1 + AHEAD) * size, 2, *(PATCH,) * 3), np.uint8)
    reused = ring[:size]

    def deliver() -> None:
        for _ in range(patches // size):
            next(batches)
        while len(threaded._ready) < WORKERS + AHEAD:  # what was ready at the beginning is to be so at the end
            time.sleep(0.001)

    def fill() -> None:
        for _ in range(patches // size):
            single.fill(next(numbers), buffers)

    def copy_boxes(buffers: np.ndarray) -> None:
        for number, box in enumerate(islice(boxes, patches)):
            inside = tuple(slice(start, start + PATCH) for start in box.origin)
            for array, out in zip(arrays[box.crop], buffers[number % len(buffers)], strict=True):
                out[...] = array[inside]

    def copy_pieces() -> None:
        flat = reused.reshape(size, 2, -1)
        for number in range(patches):
            np.copyto(flat[number % size], source[number % len(source)])

    return {
        OURS: Way(patches, deliver, "mapped files, 2 B/voxel; sampling, two threads, a ring of buffers"),
        "in-process": Way(patches, fill, "mapped files, 2 B/voxel; sampling, one buffer"),
        "numpy copy": Way(
            patches, lambda: copy_boxes(reused), "mapped files, 2 B/voxel; the same boxes, known beforehand, one buffer"
        ),
        "numpy copy, ring": Way(
            patches, lambda: copy_boxes(ring), "the same into as many buffers as the loader's ring"
        ),
        "memcpy": Way(patches, copy_pieces, "memory, 2 B/voxel in one piece, one buffer"),
    }


def small_pairs(n: int, count: int) -> Iterator[Pair]:
    """Yield pairs of noise and labels of 48 classes in blocks of 8^3 voxels."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        label = rng.integers(0, len(MANY) + 1, (n // 8,) * 3, np.uint8)
        yield rng.integers(0, 256, (n,) * 3, np.uint8), label.repeat(8, 0).repeat(8, 1).repeat(8, 2)


def first_batch(folder: Path) -> float:
    """Return the seconds from opening a store of 289 crops to the first batch, by the wall clock."""
    index = write_store(folder, MANY, small_pairs(64, 17), copies=17)
    begin = time.perf_counter()
    loader = open_loader(index, PATCH, workers=WORKERS)
    next(iter(loader))
    seconds = time.perf_counter() - begin
    loader.close()
    return seconds


def main() -> int:
    """Measure all ways, print the table and the JSON line. Returns 0 if every target is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller crops, fewer rounds")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)

    n, crops, rounds = (256, 3, 3) if options.quick else (400, 6, 5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = first_batch(folder / "small")  # in a fresh process
        image, label = pair = crop_pair(n)
        ours = our_ways(write_store(folder / "large", ATOMS, shifted(pair, crops)), n // 2)
        others = {"blosc2": blosc2_way(folder, image, label), **monai_ways(folder, image, label)}
        ways = ours | others
        for way in ways.values():
            way.run()  # buffers and files are touched for the first time
        turns = [*list(ours.values()) * TURNS, *others.values()]
        for number in range(rounds):
            for way in turns[:: -1 if number % 2 else 1]:
                way.measure()
            logger.info("round %d of %d", number + 1, rounds)

    rates = {name: median(way.rates) for name, way in ways.items()}
    print(f"{'':34}{'patches/CPU-s':>13} {'range':>13} {'ours/it':>8}  reads")
    for name, way in ways.items():
        spread = f"{min(way.rates):.3g}-{max(way.rates):.3g}"
        print(f"{name:34}{rates[name]:13.3g} {spread:>13} {rates[OURS] / rates[name]:8.3g}  {way.reads}")
    print(f"first batch of 289 crops: {seconds:.2f} s")

    ratios = {name: rates[OURS] / rate for name, rate in rates.items() if name != OURS}
    ratios["in-process / numpy copy"] = rates["in-process"] / rates["numpy copy"]
    targets = {**TARGETS, COPIED: TARGETS[COPIED] * (n / 400) ** 3}
    ok = all(ratios[name] >= target for name, target in targets.items()) and seconds <= FIRST_BATCH_SECONDS
    ratios["first batch s"], targets["first batch s"] = seconds, FIRST_BATCH_SECONDS
    result = {
        name: {key: float(f"{value:.3g}") for key, value in part.items()}
        for name, part in (("ratios", ratios), ("targets", targets))
    }
    print(json.dumps({"name": "loader", **result, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
