"""How long the search for an instance class's processing takes on one crop: 200 settings, the best 20 with distances.

    python benchmarks/instance_search.py [--quick] [--workers 2]

The yardstick, in the same run, is 200 times one segmentation (the most divided one) and its full score. A 256^3 crop
(--quick: 128^3) of about 100 touching objects is searched, at most 15 % foreground. The last line is one JSON object:
name, seconds, ratio, targets, ok.
"""

import argparse
import json
import logging
import resource
import sys
import time

import numpy as np
from scipy.ndimage import gaussian_filter

from cellmap_pipe.prediction.instance_search import candidates, full_records, rank, search_table
from cellmap_pipe.prediction.processing import Processing

logger = logging.getLogger("instance_search")

VOXEL_NM = (4.0, 4.0, 4.0)
RULES = "csc-2026.06"
OBJECTS = 100
BEST = 20
TARGET_SECONDS = 90.0


def crop(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return 255 p (uint8), truth ids and the known mask (n, n, n): balls in clusters, most of which touch another."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((n,) * 3, np.uint16)
    radius = (0.13 * n**3 / OBJECTS * 3 / (4 * np.pi)) ** (1 / 3)
    axes = np.ogrid[:n, :n, :n]
    centre = rng.uniform(0, n, 3)
    for i in range(OBJECTS):
        if i % 4:  # beside the last one
            step = rng.standard_normal(3)
            centre = np.clip(centre + 1.9 * radius * step / np.linalg.norm(step), 0, n - 1)
        else:
            centre = rng.uniform(radius, n - radius, 3)
        r = radius * rng.uniform(0.8, 1.15)
        low = np.maximum(0, np.floor(centre - r)).astype(int)
        high = np.minimum(n, np.ceil(centre + r) + 1).astype(int)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        ball = sum((axes[k].take(range(low[k], high[k]), k) - centre[k]) ** 2 for k in range(3)) <= r**2
        truth[box][ball & (truth[box] == 0)] = i + 1
    p = gaussian_filter((truth > 0).astype(np.float32), 1.5)
    p += 0.1 * gaussian_filter(rng.standard_normal(p.shape).astype(np.float32), 2) / 0.06
    known = np.ones(p.shape, bool)
    known[:, : n // 16] = False
    return np.rint(255 * np.clip(0.1 + 0.8 * p, 0, 1)).astype(np.uint8), truth, known


def main() -> int:
    """Run the search, log its parts, print the JSON line. Returns 0 if the target is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a 128^3 crop")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    p, truth, known = crop(128 if arguments.quick else 256)
    count = len(np.unique(truth)) - 1
    smallest = float(np.median(np.bincount(truth.ravel())[1:]) * np.prod(VOXEL_NM) / 8)
    settings = candidates(Processing(min_size_nm3=smallest), VOXEL_NM)
    watersheds = len({(how.threshold, how.hole_nm3, how.split_nm) for how in settings})
    shares = [float((p > 255 * t).mean()) for t in (0.3, 0.5, 0.7)]
    logger.info("%s voxels, %d objects, foreground %s at 0.3, 0.5, 0.7", p.shape, count, np.round(shares, 3).tolist())
    logger.info("%d settings, %d segmentations", len(settings), watersheds)

    more = {"workers": arguments.workers}
    begin = time.perf_counter()
    table = search_table(p, truth, known, VOXEL_NM, settings, RULES, **more)
    counted = time.perf_counter() - begin
    best = [settings[i] for i in rank({"crop": table}, ["crop"])[:BEST]]
    records = full_records(p, truth, known, VOXEL_NM, best, RULES, **more)
    seconds = time.perf_counter() - begin
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in used)

    one = max(settings, key=lambda how: (how.split_nm > 0, -how.threshold, -how.split_nm))
    begin = time.perf_counter()
    full_records(p, truth, known, VOXEL_NM, [one], RULES)
    single = time.perf_counter() - begin
    ratio = seconds / (len(settings) * single)
    logger.info("best: %s %s", best[0], records[0])
    logger.info("counts %.1f s, distances of the best %d %.1f s", counted, BEST, seconds - counted)
    logger.info(
        "all %.1f s on %d processes (target < %g), %.0f s of CPU", seconds, arguments.workers, TARGET_SECONDS, cpu
    )
    logger.info("one segmentation and score %.2f s; the search takes %.3f of %d of them", single, ratio, len(settings))
    ok = seconds < TARGET_SECONDS
    result = {"name": "instance_search", "ratios": {"seconds": round(seconds, 1), "ratio": round(ratio, 4)}}
    print(json.dumps({**result, "targets": {"seconds": TARGET_SECONDS}, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
