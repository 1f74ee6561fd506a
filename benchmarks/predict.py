"""What streaming prediction costs besides the network, and how much memory it takes, against MONAI's sliding window.

    python benchmarks/predict.py [--quick] [--giant]

Every case runs in a process of its own, on one thread, with patches of 128 voxels per axis that overlap by half, 14
classes, input and output zarr arrays on disk, the output in the chunks and the compression of the pipeline. The null
network returns a fresh clone of a smooth field of logits; what it takes (CPU-seconds of its thread) counts as network
and is subtracted. Memory is the process's peak (VmHWM) over that of the interpreter with all libraries loaded; that
fresh clone is in it.
- stitch: CPU-seconds of our prediction over those of MONAI's `sliding_window_inference` (same network, input read from
  the same array), conversion to uint8 and the same write. Both blend probabilities: the sigmoid of every window counts
  as stitching on both sides. "stitch ... logits" is for comparison: MONAI blends logits there, which is another result,
  with one sigmoid at the end; it has no target.
- unet: share of the CPU time that is not the network's, for MONAI's UNet (16, 32, 64, 128).
- growth: of the peak with depth, 256 x 256 x D. memory: of 400^3, without a bound and with memory_gb 1.
- windows: of the plan of the largest training crop, both ways round, over those of one column.
- giant (only with --giant: 10 GB of output): the peak of a slice of that crop over what the plan says.
The last line is one JSON object: name, ratios (of values to their limits, but stitch: to MONAI), targets, ok.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import torch
import zarr
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet
from torch import Tensor, nn
from volumes import smooth

from cellmap_pipe.prediction import predict_array
from cellmap_pipe.prediction.plan import columns, count_windows, estimate_bytes, make_plans

PATCH, CLASSES = 128, 14
CHUNK = (1, 64, 128, 128)
CUBIC = (8.0, 8.0, 8.0)

# The largest training crop (z, y, x), the slice of it that is run, and the memory it is held to.
GIANTS = ((1796, 1500, 2400), (2400, 1796, 1500))
GIANT_SLICE = (256, 1796, 1500)
GIANT_GB = (8, 4)

STITCH = {256: 1.0, 400: 0.85}
UNET_SHARE, GROWTH_MB, MORE_WINDOWS, PLAN_ERROR = 0.10, 50.0, 1.20, 0.15
MEMORY_GB = {None: 1.5, 1.0: 1.0}


class Null(nn.Module):
    """A network that returns a fresh clone of a field of logits; `seconds`: the CPU time of its thread."""

    def __init__(self) -> None:
        super().__init__()
        field = torch.from_numpy(smooth(np.random.default_rng(0), PATCH, 8)).mul_(2)
        self.field = nn.Parameter(field.expand(1, CLASSES, *field.shape), requires_grad=False)
        self.seconds = 0.0

    def forward(self, images: Tensor) -> Tensor:
        begin = time.thread_time()
        logits = self.field.clone(memory_format=torch.contiguous_format)
        self.seconds += time.thread_time() - begin
        return logits


class Timed(nn.Module):
    """MONAI's UNet; `seconds`: the CPU time of its thread."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = UNet(3, 1, CLASSES, (16, 32, 64, 128), (2, 2, 2))
        self.seconds = 0.0

    def forward(self, images: Tensor) -> Tensor:
        begin = time.thread_time()
        logits: Tensor = self.network(images)
        self.seconds += time.thread_time() - begin
        return logits


def peak_mb() -> float:
    """Return the peak of this process's memory in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status has no VmHWM")


def new_input(path: Path, shape: tuple[int, ...]) -> "zarr.Array[Any]":
    """Write an image of noise, slab by slab, and return it."""
    image = zarr.create_array(str(path), shape=shape, chunks=(64, 128, 128), dtype="uint8", zarr_format=2)
    rng = np.random.default_rng(0)
    for first in range(0, shape[0], 64):
        image[first : first + 64] = rng.integers(0, 256, (min(64, shape[0] - first), *shape[1:]), np.uint8)
    return image


def new_output(path: Path, shape: tuple[int, ...]) -> "zarr.Array[Any]":
    """Return an empty array for probabilities, as the pipeline stores them."""
    return zarr.create_array(
        str(path),
        shape=(CLASSES, *shape),
        chunks=CHUNK,
        dtype="uint8",
        compressors=numcodecs.Blosc("lz4", 1, numcodecs.Blosc.NOSHUFFLE),
        zarr_format=2,
        chunk_key_encoding={"name": "v2", "separator": "/"},
        config={"write_empty_chunks": True},
    )


def by_monai(network: nn.Module, image: "zarr.Array[Any]", out: "zarr.Array[Any]", *, logits: bool) -> None:
    """Predict with MONAI, then convert in place and write. logits: blend them, not probabilities."""

    def predictor(images: Tensor) -> Tensor:
        answer: Tensor = network(images)
        return answer if logits else answer.sigmoid_()

    whole = torch.from_numpy(image[:].astype(np.float32))[None, None].div_(255)
    with torch.inference_mode():
        blended = sliding_window_inference(whole, (PATCH,) * 3, 1, predictor, overlap=0.5, mode="gaussian")
        for first in range(0, image.shape[0], CHUNK[1]):
            part = blended[0, :, first : first + CHUNK[1]]
            part = part.sigmoid_() if logits else part
            out[:, first : first + CHUNK[1]] = part.mul_(255).add_(0.5).to(torch.uint8).numpy()


def play(case: dict[str, Any]) -> dict[str, float]:
    """Run one case in this process; return its CPU-seconds, those of the network and the peak memory in MB."""
    torch.set_num_threads(1)
    shape = tuple(case["shape"])
    base = peak_mb()
    with tempfile.TemporaryDirectory() as name:
        image, out = new_input(Path(name) / "in.zarr", shape), new_output(Path(name) / "out.zarr", shape)
        network: Any = Timed() if case["network"] == "unet" else Null()
        begin = time.process_time(), time.perf_counter()
        if case["by"] == "monai":
            by_monai(network, image, out, logits=case.get("logits", False))
        else:
            predict_array(network, image, patch=(PATCH,) * 3, out=out, memory_gb=case.get("memory_gb"))
        cpu, wall = time.process_time() - begin[0], time.perf_counter() - begin[1]
    return {"cpu_s": cpu, "network_s": network.seconds, "wall_s": wall, "peak_mb": peak_mb() - base}


def measure(by: str, shape: tuple[int, ...], network: str = "null", **options: Any) -> dict[str, float]:
    """Run a case in a fresh process, print and return what it measured."""
    case = {"by": by, "shape": shape, "network": network, **options}
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    what = " ".join([f"{by:6}", "x".join(map(str, shape)), network, *(f"{k}={v}" for k, v in options.items())])
    print(
        f"{what:40} CPU {found['cpu_s']:6.1f} s, network {found['network_s']:6.1f}; wall {found['wall_s']:6.1f} s; "
        f"peak {found['peak_mb']:6.0f} MB",
        flush=True,
    )
    return found


def besides(found: dict[str, float]) -> float:
    return found["cpu_s"] - found["network_s"]


def plan_ratios() -> dict[str, float]:
    """Return how many more windows the largest training crop takes in columns, by memory, over the limit."""
    ratios = {}
    for shape in GIANTS:
        plans = make_plans(shape, (PATCH,) * 3, 0.5, voxel_nm=CUBIC)
        windows = count_windows(plans, ((0, 0, 0), shape))
        for memory_gb in GIANT_GB:
            boxes = columns(plans, CLASSES, CHUNK[1], 1, (CHUNK[2], CHUNK[3]), memory_gb)
            more = sum(count_windows(plans, box) for box in boxes) / windows
            need = max(estimate_bytes(plans, box, CLASSES, CHUNK[1], 1) for box in boxes) / 1e9
            print(f"plan of {shape}, memory_gb {memory_gb}: {len(boxes)} columns, {need:.2f} GB, {more:.3f} x windows")
            ratios[f"windows {'x'.join(map(str, shape))} {memory_gb} GB"] = more / MORE_WINDOWS
    return ratios


def giant_ratios() -> dict[str, float]:
    """Return by how much the peak of the slice differs from the plan, by memory, over the limit."""
    ratios = {}
    plans = make_plans(GIANT_SLICE, (PATCH,) * 3, 0.5, voxel_nm=CUBIC)
    for memory_gb in GIANT_GB:
        boxes = columns(plans, CLASSES, CHUNK[1], 1, (CHUNK[2], CHUNK[3]), memory_gb)
        need = max(estimate_bytes(plans, box, CLASSES, CHUNK[1], 1) for box in boxes) / 1e6
        peak = measure("ours", GIANT_SLICE, memory_gb=memory_gb)["peak_mb"]
        print(f"slice with memory_gb {memory_gb}: planned {need:.0f} MB, measured {peak:.0f} MB")
        ratios[f"giant {memory_gb} GB"] = abs(peak / need - 1) / PLAN_ERROR
    return ratios


def main() -> int:
    """Measure, print the table and the JSON line. Returns 0 if every limit is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller volumes; no 400^3 by MONAI")
    parser.add_argument("--giant", action="store_true", help="also a slice of the largest training crop")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(play(options.case)))
        return 0

    ratios = plan_ratios()
    targets = dict.fromkeys(ratios, 1.0)
    for n in (256,) if options.quick else (256, 400):
        ours, monai = (measure(by, (n, n, n)) for by in ("ours", "monai"))
        ratios[f"stitch {n}"], targets[f"stitch {n}"] = besides(ours) / besides(monai), STITCH[n]
        ratios[f"stitch {n} logits"] = besides(ours) / besides(measure("monai", (n, n, n), logits=True))
        targets[f"stitch {n} logits"] = math.inf
        if n == 400:
            ratios["memory 400"] = ours["peak_mb"] / 1e3 / MEMORY_GB[None]
    if not options.quick:
        bounded = measure("ours", (400, 400, 400), memory_gb=1.0)
        ratios["memory 400 memory_gb 1"] = bounded["peak_mb"] / 1e3 / MEMORY_GB[1.0]
    depths = (256, 1024 if options.quick else 4096)
    shallow, deep = (measure("ours", (depth, 256, 256)) for depth in depths)
    ratios["growth"] = (deep["peak_mb"] - shallow["peak_mb"]) / GROWTH_MB
    edge = 160 if options.quick else 256
    unet = measure("ours", (edge, edge, edge), "unet")
    ratios["unet"] = besides(unet) / unet["cpu_s"] / UNET_SHARE
    if options.giant:
        ratios |= giant_ratios()
    targets |= {name: 1.0 for name in ratios if name not in targets}
    ok = all(ratios[name] <= target for name, target in targets.items())
    rounded = {name: round(value, 3) for name, value in ratios.items()}
    limits = {name: target for name, target in targets.items() if target < math.inf}
    print(json.dumps({"name": "predict", "ratios": rounded, "targets": limits, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
