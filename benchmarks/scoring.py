"""How long and in how much memory the scores are computed, as ratios to one distance transform of the same volume.

    python benchmarks/scoring.py [--quick] [--case KIND,N,OBJECTS] [--big] [--manifest test_crop_manifest.csv]
                                 [--plot FILE]

The yardstick is the CPU time of `scipy.ndimage.distance_transform_edt(truth == 0)` in the same run. Imports and
inputs are not counted; relabelling, overlaps and matching are. The last line is one JSON object: name, ratios,
targets, ok.
--big: also an instance label of 1000^3 voxels in a zarr array, scored by both rules with memory_gb 4 in a process of
its own: what it adds to the memory, and its CPU time. --plot: also how the time grows with objects and their voxels.
"""

import argparse
import ctypes
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numcodecs
import numpy as np
import zarr
from scipy.ndimage import distance_transform_edt

from cellmap_pipe.evaluation.alignment import is_instance
from cellmap_pipe.evaluation.container import open_container
from cellmap_pipe.evaluation.flight import check
from cellmap_pipe.evaluation.instance import score_instance, score_instance_by
from cellmap_pipe.evaluation.manifest import read_manifest
from cellmap_pipe.evaluation.official import score_submission
from cellmap_pipe.evaluation.semantic import score_semantic

logger = logging.getLogger("scoring")

VOXEL_NM = (4.0, 4.0, 4.0)
# (voxels per axis, objects) -> largest ratio of CPU times, by rules
TARGETS = {
    ("blobs", 128, 200): {"csc-2026.06": 1.5, "clean": 1.0},
    ("blobs", 256, 1000): {"csc-2026.06": 1.0, "clean": 0.6},
    ("blobs", 256, 5000): {"csc-2026.06": 1.5, "clean": 1.0},
    ("filaments", 256, 200): {"csc-2026.06": 1.2, "clean": 1.2},
    ("blobs", 400, 1000): {"csc-2026.06": 1.0, "clean": 0.6},
}
QUICK = [("blobs", 128, 200), ("blobs", 256, 1000), ("filaments", 256, 200)]
# (kind, voxels per axis, objects) -> largest number of bytes added per voxel
MEMORY_TARGETS = {("blobs", 256, 1000): 8.0, ("shells", 256, 3): 14.0}
# Voxels per axis, objects, share of the volume that they fill
GROWTH = [(n, objects, fill) for n in (128, 256, 400) for objects in (20, 200, 1000, 5000) for fill in (0.15, 0.02)]
BIG = {"n": 1000, "objects": 2000, "memory_gb": 4.0}
BOTH = "both"


def ellipsoid(shape: tuple[int, ...], centre: np.ndarray, radius: np.ndarray) -> tuple[tuple[slice, ...], np.ndarray]:
    """Return the box of an axis-aligned ellipsoid clipped to the volume, and its mask inside that box."""
    lower = np.clip(np.floor(centre - radius), 0, shape).astype(int)
    upper = np.clip(np.ceil(centre + radius) + 1, 0, shape).astype(int)
    axes = np.ogrid[tuple(slice(lo, hi) for lo, hi in zip(lower, upper, strict=True))]
    inside = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radius, strict=True)) <= 1
    return tuple(slice(lo, hi) for lo, hi in zip(lower, upper, strict=True)), inside


def add(volume: np.ndarray, label: int, centre: np.ndarray, radius: np.ndarray) -> None:
    """Write the ellipsoid where the volume is still background."""
    box, inside = ellipsoid(volume.shape, centre, radius)
    view = volume[box]
    view[inside & (view == 0)] = label


def blobs(
    n: int, objects: int, seed: int = 0, fill: float = 0.15, dtype: type = np.uint32
) -> tuple[np.ndarray, np.ndarray]:
    """Return (pred, truth), (n, n, n): ellipsoids on a jittered lattice, in all `fill` of the volume.

    The prediction is shifted and rescaled, with 5 % each of misses, splits and merges, and 5 % false positives.
    """
    rng = np.random.default_rng(seed)
    side = int(np.ceil(objects ** (1 / 3)))
    cell = n / side
    cells = rng.permutation(side**3)[:objects]
    centres = (np.stack(np.unravel_index(cells, (side,) * 3), 1) + 0.5 + rng.uniform(-0.15, 0.15, (objects, 3))) * cell
    typical = max(1.3, min(0.42 * cell, (fill * n**3 / objects * 3 / (4 * np.pi)) ** (1 / 3)))
    radii = typical * rng.uniform(0.75, 1.15, (objects, 3))
    truth, pred = np.zeros((n,) * 3, dtype), np.zeros((n,) * 3, dtype)
    fate = rng.random(objects)
    for i in range(objects):
        add(truth, i + 1, centres[i], radii[i])
        if fate[i] < 0.05:
            continue
        centre = centres[i] + rng.uniform(-1.5, 1.5, 3)
        radius = np.maximum(1.2, radii[i] * rng.uniform(0.85, 1.15, 3))
        add(pred, i + 1, centre, radius)
        z, y, x = np.clip(centre, 0, n - 1).astype(int)
        if fate[i] > 0.95:
            plane = pred[z]
            plane[plane == i + 1] = 0
        elif fate[i] > 0.90:
            pred[max(0, z - 1) : z + 1, max(0, y - 1) : y + 1, x : x + int(cell) + 1] = i + 1
    for j in range(max(1, objects // 20)):
        add(pred, objects + 1 + j, rng.uniform(0, n, 3), np.full(3, max(1.2, typical / 2)))
    return pred, truth


def filaments(n: int, objects: int, seed: int = 0, radius: float = 2.5) -> tuple[np.ndarray, np.ndarray]:
    """Return (pred, truth), uint32 (n, n, n): thin diagonal rods whose boxes are far larger than they are."""
    rng = np.random.default_rng(seed)
    truth, pred = np.zeros((n,) * 3, np.uint32), np.zeros((n,) * 3, np.uint32)
    ball = np.argwhere(((np.indices((7, 7, 7)) - 3) ** 2).sum(0) <= radius**2) - 3
    steps = np.linspace(-0.4 * n, 0.4 * n, 2 * n)[:, None]
    for i in range(objects):
        centre, direction = rng.uniform(0.2 * n, 0.8 * n, 3), rng.standard_normal(3)
        line = centre + steps * direction / np.linalg.norm(direction)
        for volume, shift in ((truth, np.zeros(3)), (pred, rng.uniform(-1, 1, 3))):
            points = ((line + shift)[:, None] + ball[None]).reshape(-1, 3).astype(int)
            points = points[((points >= 0) & (points < n)).all(1)]
            index = tuple(points.T)
            volume[index] = np.where(volume[index] == 0, i + 1, volume[index])
    return pred, truth


def shells(n: int, objects: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (pred, truth), uint32 (n, n, n): nested spherical shells, every box nearly the volume."""
    distance = np.zeros((n,) * 3, np.float32)
    for axis in np.ogrid[:n, :n, :n]:
        distance += (axis - (n - 1) / 2).astype(np.float32) ** 2
    np.sqrt(distance, out=distance)
    truth, pred = np.zeros((n,) * 3, np.uint32), np.zeros((n,) * 3, np.uint32)
    for i in range(objects):
        outer = n / 2 - 8 * i - 1
        truth[(distance < outer) & (distance > outer - 5)] = i + 1
        pred[(distance < outer - 1) & (distance > outer - 6)] = i + 1
    return pred, truth


MAKERS: dict[str, Callable[[int, int], tuple[np.ndarray, np.ndarray]]] = {
    "blobs": blobs,
    "filaments": filaments,
    "shells": shells,
}


def cpu_seconds(function: Callable[[], object], repeats: int) -> float:
    """Return the least CPU time of this process that a call takes: the machine's other work only adds to it."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        times.append(time.process_time() - begin)
    return min(times)


def resident_bytes() -> int:
    """Return the memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def high_water_bytes() -> int:
    """Return the largest resident memory that this process has had since `added_bytes` began to count, or ever."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def added_bytes(function: Callable[[], object]) -> int:
    """Return how far a call raises the resident memory of this process."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed would be used again, and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = resident_bytes()
    function()
    return max(0, high_water_bytes() - before)


def write_sparse(folder: Path, shape: tuple[int, ...], voxels: np.ndarray, share: float, attributes: dict) -> None:
    """Write a zarr v2 array in which that share of the chunks has a file, each of them with the same voxels."""
    codec = numcodecs.Zstd(level=1)
    folder.mkdir(parents=True)
    meta = {"zarr_format": 2, "shape": shape, "chunks": voxels.shape, "dtype": voxels.dtype.str, "fill_value": 0}
    meta |= {"compressor": codec.get_config(), "filters": None, "order": "C", "dimension_separator": "."}
    (folder / ".zarray").write_text(json.dumps(meta))
    (folder / ".zattrs").write_text(json.dumps(attributes))
    data, every = bytes(codec.encode(voxels)), round(1 / share)
    counts = [-(-n // c) for n, c in zip(shape, voxels.shape, strict=True)]
    for i, index in enumerate(np.ndindex(*counts)):
        if i % every == 0:
            (folder / ".".join(map(str, index))).write_bytes(data)


def blob_chunk(n: int, instance: bool) -> np.ndarray:
    """Return a chunk (n, n, n) with a few objects."""
    return blobs(n, 8)[0].astype(np.uint16 if instance else bool).astype(np.uint16 if instance else np.uint8)


def manifest_seconds(manifest: str, workers: int, share: float = 0.05) -> tuple[float, float]:
    """Return how long the flight check and the score (both rules) of a submission of every row take (wall clock).

    share: of the chunks that are there. The truth is the submission, shifted by two voxels within each chunk.
    """
    rows = read_manifest(manifest)
    chunks = {instance: blob_chunk(64, instance) for instance in (False, True)}
    with tempfile.TemporaryDirectory() as folder:
        pred, truth = Path(folder, "pred.zarr"), Path(folder, "truth.zarr")
        for row in rows:
            place = {"voxel_size": row.lattice.voxel_nm, "translation": row.lattice.translation_nm}
            voxels = chunks[is_instance(row.label)]
            for root, shift in ((pred, 0), (truth, 2)):
                shape = row.lattice.shape
                write_sparse(root / row.crop / row.label, shape, np.roll(voxels, shift, 0), share, place)
        begin = time.perf_counter()
        problems = check(pred, rows, workers=workers)
        checked = time.perf_counter()
        logger.info("flight check of %d arrays: %d problems, %.0f s", len(rows), len(problems), checked - begin)
        result = score_submission(pred, truth, workers=workers)
        scored = time.perf_counter()
        logger.info(
            "score of %d arrays: %.3f, %.0f s", result["num_evals_done"], result["overall_score"], scored - checked
        )
        return checked - begin, scored - checked


def streamed_bytes() -> int:
    """Return the memory that scoring one semantic crop of 1000^3 voxels adds."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("pred", "truth"):
            write_sparse(Path(folder) / "crop1" / name, (1000,) * 3, blob_chunk(128, False), 1.0, {})
        crop = open_container(folder)
        arrays = [crop.array("crop1", name) for name in ("pred", "truth")]
        return added_bytes(lambda: score_semantic(*arrays))


def score_stored(folder: str, memory_gb: float) -> None:
    """Score the arrays `pred` and `truth` of a crop, print the bytes added to this process and its CPU time."""
    score_instance_by(*blobs(16, 3), VOXEL_NM)
    crop = open_container(folder)
    pred, truth = (crop.array("crop1", name) for name in ("pred", "truth"))
    begin = time.process_time()
    added = added_bytes(lambda: score_instance_by(pred, truth, VOXEL_NM, memory_gb=memory_gb))
    print(json.dumps({"added": added, "seconds": time.process_time() - begin}))


def big_crop(n: int, objects: int, memory_gb: float) -> tuple[float, float]:
    """Return GB added and CPU seconds of an instance label of n^3 voxels that is read from a zarr array."""
    with tempfile.TemporaryDirectory() as folder:
        for name, volume in zip(("pred", "truth"), blobs(n, objects, dtype=np.uint16), strict=True):
            path = Path(folder) / "crop1" / name
            stored = zarr.create_array(path, shape=volume.shape, chunks=(64,) * 3, dtype=volume.dtype, zarr_format=2)
            stored[:] = volume
        volume = stored = None
        command = [sys.executable, __file__, "--stored", folder, "--memory-gb", str(memory_gb)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    logger.info("%d^3, %d objects, both rules, memory_gb %g: %s", n, objects, memory_gb, found)
    return found["added"] / 1e9, found["seconds"]


def growth(path: str) -> dict[str, float]:
    """Write the CPU time by objects and by their voxels, official rules, as a figure; return the growth's exponents.

    The exponents are those of the fit seconds ~ (voxels of objects)^a objects^b over all cases. A cost of objects x
    volume would have b = 1.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = []
    for n, objects, fill in GROWTH:
        pred, truth = blobs(n, objects, fill=fill)
        seconds = cpu_seconds(lambda p=pred, t=truth: score_instance(p, t, VOXEL_NM), 2)
        cases.append((n, objects, fill, np.count_nonzero(truth), seconds))
        logger.info("growth %d^3, %d objects of %d voxels in all: %.2f s", n, *cases[-1][1::2], seconds)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    series = sorted({(n, fill) for n, _, fill, *_ in cases})
    colours = dict(zip(sorted({n for n, _ in series}), ("#440154", "#21918c", "#e69f00"), strict=True))
    for ax, column, style in ((axes[0], 1, "-"), (axes[1], 3, "")):
        for n, fill in series:
            rows = sorted((case[column], case[4]) for case in cases if (case[0], case[2]) == (n, fill))
            marker, face = ("o", colours[n]) if fill > 0.1 else ("s", "white")
            name = f"{n}³ voxels, {fill:.0%} of them objects"
            x, y = zip(*rows, strict=True)
            ax.loglog(x, y, marker + style, color=colours[n], markerfacecolor=face, label=name)
    least = min(case[4] for case in cases)
    axes[0].loglog([20, 5000], [least, least * 250], ":", color="#555555", label="were it objects x volume")
    axes[0].set(xlabel="truth objects", ylabel="CPU time (s)")
    axes[1].set(xlabel="voxels of truth objects")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(path)
    logs = np.log([[voxels, objects, seconds] for _, objects, _, voxels, seconds in cases])
    terms = np.column_stack([logs[:, :2], np.ones(len(logs))])
    exponents = np.linalg.lstsq(terms, logs[:, 2])[0]
    return {"growth_with_object_voxels": float(exponents[0]), "growth_with_objects": float(exponents[1])}


def main() -> int:
    """Run the cases, log one line each, print the JSON line. Returns 0 if every target is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the three smaller cases, one repeat")
    parser.add_argument("--case", action="append", help="KIND,N,OBJECTS; instead of the standard cases")
    parser.add_argument("--big", action="store_true", help="also an instance label of 1000^3 voxels")
    parser.add_argument("--stored", help=argparse.SUPPRESS)
    parser.add_argument("--memory-gb", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--manifest", help="also check and score a sparse submission of its rows")
    parser.add_argument("--plot", help="write a figure of the growth with objects and volume to this file")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if options.stored:
        score_stored(options.stored, options.memory_gb)
        return 0

    cases = QUICK if options.quick else list(TARGETS)
    if options.case:
        cases = [(kind, int(n), int(m)) for kind, n, m in (case.split(",") for case in options.case)]
    repeats = 1 if options.quick else 2
    ratios: dict[str, float] = {}
    targets: dict[str, float] = {}
    score_instance(*blobs(16, 3), VOXEL_NM)  # first calls load libraries
    for kind, n, objects in cases:
        pred, truth = MAKERS[kind](n, objects)
        yardstick = cpu_seconds(lambda t=truth: distance_transform_edt(t == 0), repeats)
        wanted = TARGETS.get((kind, n, objects), {"csc-2026.06": np.inf, "clean": np.inf})
        for rules, target in {**wanted, BOTH: sum(wanted.values())}.items():
            by = ("csc-2026.06", "clean") if rules == BOTH else (rules,)
            seconds = cpu_seconds(lambda p=pred, t=truth, r=by: score_instance_by(p, t, VOXEL_NM, rules=r), repeats)
            name = f"{kind}_{n}_{objects}_{rules}"
            ratios[name] = round(seconds / yardstick, 3)
            if np.isfinite(target):
                targets[name] = target
            logger.info("%s: %.2f s, yardstick %.2f s, ratio %.2f", name, seconds, yardstick, seconds / yardstick)
    if not options.case:
        for (kind, n, objects), target in MEMORY_TARGETS.items():
            pred, truth = MAKERS[kind](n, objects)
            name = f"{kind}_{n}_{objects}_added_bytes_per_voxel"
            added = added_bytes(lambda p=pred, t=truth: score_instance(p, t, VOXEL_NM))
            ratios[name], targets[name] = round(added / n**3, 2), target
            logger.info("%s: %.2f", name, added / n**3)
        pred, truth = blobs(256, 1000)
        yardstick = cpu_seconds(lambda t=truth: distance_transform_edt(t == 0), 1)
        ratios["semantic_256"] = round(cpu_seconds(lambda p=pred, t=truth: score_semantic(p, t), 1) / yardstick, 3)
        targets["semantic_256"] = 0.1
    if not options.case and not options.quick:
        ratios["semantic_1000_added_gb"], targets["semantic_1000_added_gb"] = round(streamed_bytes() / 1e9, 2), 1.5
    if options.manifest:
        check_seconds, score_seconds = manifest_seconds(options.manifest, 2)
        ratios["check_minutes"], targets["check_minutes"] = round(check_seconds / 60, 2), 2.0
        ratios["score_minutes"] = round(score_seconds / 60, 2)
    if options.big:
        added_gb, seconds = big_crop(**BIG)
        ratios["instance_1000_added_gb"], targets["instance_1000_added_gb"] = round(added_gb, 2), BIG["memory_gb"]
        ratios["instance_1000_cpu_minutes"] = round(seconds / 60, 2)
    if options.plot:
        ratios |= {name: round(exponent, 2) for name, exponent in growth(options.plot).items()}
        targets["growth_with_objects"] = 0.5
    ok = all(ratios[name] <= target for name, target in targets.items())
    print(json.dumps({"name": "scoring", "ratios": ratios, "targets": targets, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
