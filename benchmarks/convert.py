"""How fast EM and labels are compressed into NIfTI, and into how many bytes, as ratios to nibabel's own writer.

    python benchmarks/convert.py [--quick] [--real FOLDER]

Each case is a pair of uint8 image and uint8 label map of one shape. Both writers get the same arrays, by turns, in the
same run; encoding and writing count, reading back does not. Throughput is voxels per second of CPU time, that of all
threads together; the medians are compared. FOLDER: real EM in the challenge's layout; its crops, all
together, are a case too. The last line is one JSON object: name, ratios, targets, ok.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import nibabel
import numpy as np
from volumes import Pair, synthetic

from cellmap_pipe.errors import CellmapError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.crops import find_crops
from cellmap_pipe.prepare.em import read_em
from cellmap_pipe.prepare.label_map import build_label_map
from cellmap_pipe.prepare.labels import read_label
from cellmap_pipe.prepare.ngff import read_image
from cellmap_pipe.prepare.nifti import encode_nifti

logger = logging.getLogger("convert")

REAL = Path(__file__).parents[2] / "shared" / "data" / "real-em"
REAL_LAYOUT = {"em_path": "recon-1/em/fibsem-uint8", "labels_path": "recon-1/labels/groundtruth", "crops": None}
REAL_CLASSES = ["pm", "mito", "cyto", "nuc"]

# Ratio to nibabel's writer: most bytes, least throughput per CPU-second.
TARGETS = {"bytes": 1.02, "throughput": 3.0}


def real(root: Path) -> Iterator[tuple[str, Pair]]:
    """Yield name and pair of every crop that can be used, on its labels' own voxels."""
    for crop in find_crops({"root": str(root), **REAL_LAYOUT}):
        labels = [read_label(path) for path in sorted(crop.path.iterdir()) if path.name in REAL_CLASSES]
        if not labels:
            continue
        target = labels[0].level.lattice
        try:
            em = read_em(read_image(crop.em_path), target, max_upsample=5)
            label_map = build_label_map(labels, target, REAL_CLASSES, valid=em.valid, max_upsample=5)
        except CellmapError as error:
            logger.info("%s: %s", crop.id, error)
            continue
        yield crop.path.name, (em.image, label_map.rows)


def cpu_seconds(function: Callable[[], object]) -> float:
    """Return the CPU time that a call takes, that of all threads of this process."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


@dataclass(frozen=True)
class Cost:
    """CPU seconds and bytes of a writer."""

    seconds: float
    size: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.size + other.size)


def costs(name: str, pair: Pair, repeats: int) -> tuple[Cost, Cost]:
    """Return what our writer and nibabel's need for a pair: median CPU seconds, and bytes."""
    lattice = Lattice((8, 8, 8), (0, 0, 0), pair[0].shape)
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    with tempfile.TemporaryDirectory() as folder:
        ours = [Path(folder) / f"ours{i}.nii.gz" for i in range(2)]
        theirs = [Path(folder) / f"theirs{i}.nii.gz" for i in range(2)]

        def write_ours() -> None:
            for path, volume in zip(ours, pair, strict=True):
                encode_nifti(path, [volume], lattice)

        def write_theirs() -> None:
            for path, volume in zip(theirs, pair, strict=True):
                nibabel.save(nibabel.Nifti1Image(volume.T, affine), path)

        seconds = [(cpu_seconds(write_ours), cpu_seconds(write_theirs)) for _ in range(repeats)]
        for path, volume in zip(ours, pair, strict=True):
            if not np.array_equal(np.asarray(nibabel.load(path).dataobj), volume.T):
                raise RuntimeError(f"{path}: not what was written")
        image_ratio = pair[0].size / theirs[0].stat().st_size
        sizes = [sum(path.stat().st_size for path in paths) for paths in (ours, theirs)]
    mine, baseline = (
        Cost(median(column), size) for column, size in zip(zip(*seconds, strict=True), sizes, strict=True)
    )
    logger.info(
        "%s: %s voxels, image %.2f:1 by nibabel; %.0f against %.0f MB per CPU-second, %.3f times the bytes",
        name,
        "x".join(map(str, pair[0].shape)),
        image_ratio,
        2e-6 * pair[0].size / mine.seconds,
        2e-6 * pair[0].size / baseline.seconds,
        mine.size / baseline.size,
    )
    return mine, baseline


def ratios_of(name: str, mine: Cost, baseline: Cost) -> dict[str, float]:
    """Return bytes and throughput per CPU-second of our writer, as ratios to nibabel's."""
    return {f"{name}_bytes": mine.size / baseline.size, f"{name}_throughput": baseline.seconds / mine.seconds}


def main() -> int:
    """Run the cases, log one line each, print the JSON line. Returns 0 if every target is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller volume, fewer repeats")
    parser.add_argument("--real", type=Path, default=REAL, help="folder with real EM; left out where it is not there")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    n = 192 if options.quick else 256
    ratios = ratios_of("synthetic", *costs("synthetic", synthetic(n), 5))
    if options.real.is_dir():
        mine, baseline = Cost(0, 0), Cost(0, 0)
        for name, pair in real(options.real):
            ours, theirs = costs(name, pair, 1 if options.quick else 3)
            mine, baseline = mine + ours, baseline + theirs
        ratios |= ratios_of("real", mine, baseline)
    targets = {name: TARGETS[name.rsplit("_", 1)[1]] for name in ratios}
    ok = all(
        ratios[name] <= target if name.endswith("bytes") else ratios[name] >= target for name, target in targets.items()
    )
    rounded = {name: round(value, 3) for name, value in ratios.items()}
    print(json.dumps({"name": "convert", "ratios": rounded, "targets": targets, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
