"""Synthetic EM with labels, and training stores of it, for the benchmarks."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from scipy import ndimage

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.files import canonical_json, describe_file, write_text
from cellmap_pipe.prepare.chunks import sample_positions, store_stem
from cellmap_pipe.prepare.labels import UNKNOWN
from cellmap_pipe.prepare.layout import MAPPED, write_array, write_volume
from cellmap_pipe.prepare.state_table import count_states, encode_table, standard_rows
from cellmap_pipe.prepare.store import FORMAT_VERSION, pack_index

if TYPE_CHECKING:
    from cellmap_pipe.training.loader import Loader

MANY = list(CLASSES)[:48]
# Disjoint classes: one of them at most is present in a voxel.
ATOMS = [entry.name for entry in CLASSES.values() if entry.is_atom][:14]
CONFIG = Path(__file__).parents[1] / "config" / "config.yaml"
TILE = 128

Pair = tuple[np.ndarray, np.ndarray]


def smooth(rng: np.random.Generator, n: int, sigma: float) -> np.ndarray:
    """Return noise of unit variance smoothed by `sigma` voxels, float32 (n, n, n), periodic."""
    volume = ndimage.gaussian_filter(rng.standard_normal((n, n, n), dtype=np.float32), sigma, mode="wrap")
    return volume / volume.std()


def synthetic(n: int, seed: int = 0) -> Pair:
    """Return EM and labels of (n, n, n) voxels: cells with dark membranes, holding round organelles of two classes.

    The image is texture, contrast of the objects, and noise of the detector; gzip makes it about 1.6 times smaller.
    """
    rng = np.random.default_rng(seed)
    cells = np.stack([smooth(rng, n, 16) for _ in range(4)]).argmax(axis=0)
    organelles = smooth(rng, n, 6)
    label = np.where(organelles > 1.5, 3, np.where(organelles > 1.2, 2, 0)).astype(np.uint8)
    walls = np.zeros(label.shape, bool)
    for axis in range(3):
        walls |= np.diff(cells, axis=axis, append=cells.take([-1], axis)) != 0
    label[ndimage.binary_dilation(walls)] = 1
    grey = np.array([150, 128, 122, 138], np.float32)[label]
    grey = ndimage.gaussian_filter(grey, 1) + 4 * smooth(rng, n, 2)
    grey += 2.5 * rng.standard_normal(label.shape, dtype=np.float32)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8), label


def crop_pair(n: int, seed: int = 0) -> Pair:
    """Return EM and label map of (n, n, n) voxels with the classes of ATOMS, 0 where there is none.

    The organelles of `synthetic` become one of six classes each by the region they lie in. Repeats every TILE voxels.
    """
    image, label = synthetic(min(n, TILE), seed)
    region = smooth(np.random.default_rng([seed, 1]), len(label), 24)
    kind = np.digitize(region, [-1.0, -0.4, 0.0, 0.4, 1.0]).astype(np.uint8)
    label = np.where(label >= 2, 6 * label - 10 + kind, np.where((label == 0) & (kind == 5), 14, label))
    repeats = -(-n // len(label))
    inside = (slice(n),) * 3
    return np.tile(image, (repeats,) * 3)[inside], np.tile(label.astype(np.uint8), (repeats,) * 3)[inside]


def shifted(pair: Pair, count: int) -> Iterator[Pair]:
    """Yield `count` crops that differ from a pair, as large as it."""
    image, label = pair
    for shift in range(0, 37 * count, 37):
        yield np.roll(image, shift, (0, 1, 2)), np.roll(label, shift, (0, 1, 2))


def write_store(root: Path, classes: Sequence[str], pairs: Iterable[Pair], *, copies: int = 1) -> Path:
    """Write a training store of images and label maps under `root` and return its index.

    pairs: label v is class v of `classes`, from 1, and every class is annotated. copies: crops per pair, whose files
    are links to one.
    """
    rows = standard_rows(classes, classes)
    table = np.full((256, len(classes)), UNKNOWN, np.uint8)
    table[: len(rows)] = rows
    records = []
    for number, (image, label) in enumerate(pairs):
        folder = root / "store"
        folder.mkdir(parents=True, exist_ok=True)
        volumes = {"image": image, "label": label, "positions": sample_positions(label, table, seed=number)}
        shared = {
            "dataset": "synthetic",
            "lattice": {"voxel_nm": [8, 8, 8], "translation_nm": [0, 0, 0], "shape": list(label.shape)},
            "label_offset": [0, 0, 0],
            "label_shape": list(label.shape),
            "table": encode_table(table, range(len(rows))),
            "classes": list(classes),
            "counts": count_states(label, table, classes),
            "annotated": list(classes),
            "layout": MAPPED,
            "input_digest": str(number),
        }
        for copy in range(copies):
            crop = f"synthetic/crop{number * copies + copy}"
            paths = {kind: folder / f"{store_stem(crop)}_{kind}.npy" for kind in volumes}
            if copy == 0:
                first = paths
                content = {
                    kind: write_volume(MAPPED, paths[kind], volumes[kind].dtype, label.shape, [volumes[kind]])
                    for kind in ("image", "label")
                }
                write_array(paths["positions"], volumes["positions"])
                contracts = {kind: describe_file(path, folder) for kind, path in paths.items()}
                content["positions"] = contracts["positions"]["sha256"]
            else:
                for kind, path in paths.items():
                    os.link(first[kind], path)
            files = {kind: {**contracts[kind], "path": path.name} for kind, path in paths.items()}
            records.append({"crop": crop, **shared, "files": files, "content": content})
    index = {
        "format_version": FORMAT_VERSION,
        "grid": "8nm",
        "voxel_nm": [8, 8, 8],
        "classes": list(classes),
        "store_dir": "store",
        "ranges": {"synthetic": {"percentile": [40, 220], "range": [0, 255]}},
    }
    write_text(root / "index.json", canonical_json(pack_index(index, records)))
    return root / "index.json"


def open_loader(index: Path, patch: int, *, workers: int = 1, last: int = 10**9) -> "Loader":
    """Return a loader of batches of two cubic patches from all crops of a store, with the default configuration."""
    from cellmap_pipe.prepare.store import Store  # torch takes seconds to import, and not every benchmark needs it
    from cellmap_pipe.training.loader import Loader
    from cellmap_pipe.training.sampling import Patches, Sampler

    settings: dict[str, Any] = {**yaml.safe_load(CONFIG.read_text())["train"], "batch": 2}
    store = Store(index)
    patches = Patches(store, list(store.crops), store.classes, (patch,) * 3)
    sampler = Sampler(
        patches,
        seed=settings["seed"],
        centred_fraction=settings["centred_fraction"],
        class_power=settings["class_power"],
    )
    return Loader(sampler, settings, rank=0, world=1, first=0, last=last, pinned=False, workers=workers)
