"""How much memory loader processes take together on one store, and whether they grow.

    python benchmarks/memory.py [--quick]

1, 2, 4 and 8 processes, as the ranks of a training, deliver batches of the same store and have touched every voxel of
it. Their proportional set sizes (PSS: shared pages count in equal parts) are summed while all are alive. The limits:
the store once, and 250 MB and the ring of batches per process; for one process alone the figure is for comparison, as
it bears all of what the libraries' files take. Anonymous memory is that of the process alone, ring
included. Growth is the slope of it over the batches of one process, by least squares, after the first tenth. For
comparison, one process with MONAI's cache of 14-channel targets of one crop of the same size. The
last line is one JSON object: name, ratios, targets, ok; ratios are of values to their limits.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from volumes import ATOMS, crop_pair, open_loader, shifted, write_store

from cellmap_pipe.training.loader import AHEAD, Loader

PATCH, SMALL_PATCH = 128, 48
COUNTS = (1, 2, 4, 8)
MB = 10**6

# Batches of two patches that a loader with one worker keeps.
RING_MB = (1 + 1 + AHEAD) * 2 * 2 * PATCH**3 / MB

# Of a process, besides store and ring; of its anonymous memory; of its growth per batch.
PROCESS_MB, ANONYMOUS_MB, GROWTH_MB = 250.0, 250.0, 0.1


def memory_mb(process: int | str, key: str) -> float:
    """Return an entry of a process's smaps_rollup in MB, such as Pss, Rss or Anonymous."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / MB
    raise RuntimeError(f"/proc/{process}/smaps_rollup has no {key}")


def touch(index: Path) -> Loader:
    """Return a loader at work, after some of its batches and every voxel of the store have been read."""
    loader = open_loader(index, PATCH)
    batches = iter(loader)
    for _ in range(20):
        next(batches)
    store = loader.sampler.patches.store
    for crop in store.crops:
        for kind in ("image", "label"):
            volume = store.volume(crop, kind)
            slab = np.empty((16, *volume.shape[1:]), volume.dtype)
            for z in range(0, volume.shape[0], len(slab)):
                volume.copy((z, 0, 0), slab[: volume.shape[0] - z])
    return loader


def growth(index: Path, batches: int) -> float:
    """Return by how many MB of anonymous memory each batch makes this process grow."""
    sizes = [
        (number, memory_mb("self", "Anonymous"))
        for number, _ in enumerate(open_loader(index, SMALL_PATCH, last=batches))
        if number % 10 == 0 and number >= batches // 10
    ]
    return float(np.polyfit(*np.array(sizes).T, 1)[0])


def cache_targets(folder: Path, n: int) -> object:
    """Return MONAI's cache of float32 targets of a crop of `n` voxels per axis, after an item of it."""
    from loader import cached_targets, monai_item  # its libraries are to weigh on this process alone

    dataset = cached_targets(monai_item(folder / "crop", *crop_pair(n)))
    dataset[0]
    return dataset


class Rank:
    """Another process, which does `role` with `arguments`, and then stays as it is until it is closed."""

    def __init__(self, role: str, *arguments: object) -> None:
        self.role = role
        command = [sys.executable, __file__, "--role", role, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def result(self) -> float:
        """Return what the role found, once it is done."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"process {self.role}: ended with status {self.process.wait()}")
        return float(line)

    def mb(self, key: str) -> float:
        """Return an entry of the process's smaps_rollup in MB."""
        return memory_mb(self.process.pid, key)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def play(role: str, arguments: Sequence[str]) -> None:
    """Do what a process of a role does: print what it found, and wait until the standard input is closed."""
    kept, found = None, 0.0
    if role == "touch":
        kept = touch(Path(arguments[0]))
    elif role == "grow":
        found = growth(Path(arguments[0]), int(arguments[1]))
    else:
        kept = cache_targets(Path(arguments[0]), int(arguments[1]))
    print(found, flush=True)
    sys.stdin.read()
    del kept


def main() -> int:
    """Measure, print the table and the JSON line. Returns 0 if every limit is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller crops, fewer batches")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        play(options.role[0], options.role[1:])
        return 0

    n, crops, batches = (256, 3, 500) if options.quick else (400, 6, 2000)
    store_mb = crops * 2 * n**3 / MB
    ratios, ranks = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = write_store(folder, ATOMS, shifted(crop_pair(n), crops))
        print(f"store {store_mb:.0f} MB, ring of each process {RING_MB:.0f} MB")
        print("processes  RSS/process  PSS/process  anonymous  sum of PSS  limit (MB)")
        for count in COUNTS:
            ranks += [Rank("touch", index) for _ in range(count - len(ranks))]
            for rank in ranks[count // 2 :]:
                rank.result()
            sizes = {key: [rank.mb(key) for rank in ranks] for key in ("Rss", "Pss", "Anonymous")}
            total, limit = sum(sizes["Pss"]), store_mb + count * (PROCESS_MB + RING_MB)
            rss, pss = (max(sizes[key]) for key in ("Rss", "Pss"))
            anonymous = max(sizes["Anonymous"])
            print(f"{count:9}{rss:13.0f}{pss:13.0f}{anonymous:11.0f}{total:12.0f}{limit:7.0f}", flush=True)
            ratios[f"pss {count}"], ratios[f"anonymous {count}"] = total / limit, anonymous / ANONYMOUS_MB
        for rank in ranks:
            rank.close()
        for role, arguments in (("grow", (index, batches)), ("cache", (folder, n))):
            rank = Rank(role, *arguments)
            found = rank.result()
            if role == "grow":
                print(f"growth {found:.4f} MB per batch over {batches} batches")
                ratios["growth"] = found / GROWTH_MB
            else:
                print(
                    f"MONAI's cache of 14 float32 channels of one crop: {rank.mb('Rss'):.0f} MB of RSS in each process"
                )
            rank.close()

    # the files of torch itself, shared by the others, are on the account of a process that is alone
    targets = dict.fromkeys((name for name in ratios if name != f"pss {COUNTS[0]}"), 1.0)
    ok = all(ratios[name] <= target for name, target in targets.items())
    rounded = {name: round(value, 3) for name, value in ratios.items()}
    print(json.dumps({"name": "memory", "ratios": rounded, "targets": targets, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
