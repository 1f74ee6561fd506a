"""How fast the masked loss is and what memory it adds, as ratios to its formula in plain autograd.

    python benchmarks/loss.py [--quick]

Two patches of 128^3 voxels with 14 classes on one CPU thread, forward and backward, by turns in the same run. CPU
seconds are compared, medians.
- dense: both are given float32 targets and known-masks, one per voxel and class.
- label map: both begin with one byte per voxel and the state tables of the crops, as training does; the plain one looks
  up every voxel and makes float32 targets and known-masks of it.
Labels are blobs of 14 classes with margins where nothing is known, half of each patch annotated in full and half
without four of the classes. Memory is the highest resident size over that with logits, targets and masks, in a fresh
process each; the gradient, 0.235 GB, is part of it. The last line is one JSON object: name, ratios, targets, ok; the
ratios of memory (GB) and gradient (norm of the difference over the norm) are at most their targets, others at least.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from cellmap_pipe.prepare.labels import PRESENT, UNKNOWN
from cellmap_pipe.training.expand import Expander
from cellmap_pipe.training.losses import build_loss

SIZE, CLASSES, BATCH = 128, 14, 2
UNKNOWN_ROW = 255
GB = 1e9

# Least ratio of CPU time to ours, most memory in GB, largest difference of the gradients.
FASTER = {"dense": 6.0, "label map": 7.0}
TARGETS = {**FASTER, "memory": 0.30, "gradient": 1e-6}


def label_maps() -> Tensor:
    """Return label maps, uint8 (B, z, y, x): rows 0 to 14 in one half of each patch, 15 to 29 in the other."""
    rng = np.random.default_rng(0)
    maps = []
    for _ in range(BATCH):
        field = ndimage.gaussian_filter(rng.standard_normal((SIZE,) * 3, dtype=np.float32), 5)
        label = np.searchsorted(np.quantile(field, np.linspace(0, 1, CLASSES + 2)[1:-1]), field).astype(np.uint8)
        label[:, SIZE // 2 :] += CLASSES + 1
        label[: SIZE // 8] = label[:, :, -SIZE // 5 :] = UNKNOWN_ROW  # beyond the crop
        maps.append(label)
    return torch.from_numpy(np.stack(maps))


def state_table() -> np.ndarray:
    """Return the state table of both crops, uint8 (rows, classes): full annotation, and the same without four each."""
    rng = np.random.default_rng(1)
    table = np.full((256, CLASSES), UNKNOWN, np.uint8)
    table[: CLASSES + 1] = np.eye(CLASSES + 1, CLASSES, -1)
    for row in range(CLASSES + 1):
        table[CLASSES + 1 + row] = table[row]
        table[CLASSES + 1 + row, rng.permutation(CLASSES)[:4]] = UNKNOWN
    return table


def looked_up(label: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return target and known-mask, float32 (B, C, z, y, x), by a look-up of every voxel's row."""
    states = table[label.long()].permute(0, 4, 1, 2, 3)
    return (states == PRESENT).float(), (states != UNKNOWN).float()


def plain(x: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Return masked Dice loss and cross-entropy as one writes them down, float32."""
    axes = (2, 3, 4)
    p = torch.sigmoid(x)
    true_positive = (p * target * known).sum(axes)
    false_positive = (p * (1 - target) * known).sum(axes)
    false_negative = ((1 - p) * target * known).sum(axes)
    dice = 1 - (true_positive + 1) / (true_positive + 0.5 * false_positive + 0.5 * false_negative + 1)
    entropy = functional.binary_cross_entropy_with_logits(x, target, reduction="none")
    voxels = known.sum(axes)
    mean_entropy = (entropy * known).sum(axes) / voxels.clamp(min=1)
    positive, annotated = ((target * known).sum(axes) > 0).float(), (voxels > 0).float()
    return (dice * positive).sum() / positive.sum().clamp(min=1) + (mean_entropy * annotated).sum() / annotated.sum()


def methods(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return what computes each loss of the logits `x`, by "ours" or "plain" and what is given."""
    label, table = label_maps(), state_table()
    loss = build_loss({}, CLASSES)
    expander = Expander(table.T[None].copy(), [(0, 255)], torch.device("cpu"))
    as_tensor = torch.from_numpy(table)
    dense = tuple(states.contiguous() for states in looked_up(label, as_tensor))
    return {
        "ours dense": lambda: loss(x, *dense),
        "plain dense": lambda: plain(x, *dense),
        "ours label map": lambda: loss(x, *expander.states(label, [0] * BATCH)),
        "plain label map": lambda: plain(x, *looked_up(label, as_tensor)),
    }


def logits() -> Tensor:
    """Return random logits (B, C, z, y, x)."""
    return torch.randn(BATCH, CLASSES, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()


def status(key: str) -> int:
    """Return an entry of /proc/self/status in bytes, such as VmRSS or VmHWM (the highest there was)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def memory(name: str) -> float:
    """Return by how many GB forward and backward of a method raise this process's highest resident size."""
    x = logits()
    method = methods(x)[name]
    Path("/proc/self/clear_refs").write_text("5")  # the highest is the present one from here on
    before = status("VmRSS")
    for _ in range(2):
        x.grad = None
        method().backward()
    return (status("VmHWM") - before) / GB


def measure(rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return CPU seconds of each method, by turns, and the difference of our gradient from the plain one's."""
    x = logits()
    seconds: dict[str, list[float]] = {}
    differences = {}
    for number in range(rounds):
        gradients = {}
        for name, method in methods(x).items():
            x.grad = None
            begin = time.process_time()
            method().backward()
            seconds.setdefault(name, []).append(time.process_time() - begin)
            if number == 0:
                gradients[name] = x.grad
        for what in FASTER if number == 0 else ():
            ours, theirs = gradients[f"ours {what}"], gradients[f"plain {what}"]
            assert ours is not None and theirs is not None
            differences[what] = float((ours - theirs).norm() / theirs.norm())
    return seconds, differences


def main() -> int:
    """Measure, print the table and the JSON line. Returns 0 if every target is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rounds instead of seven")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(memory(options.memory))
        return 0

    seconds, differences = measure(3 if options.quick else 7)
    print("                 CPU seconds  memory (GB)")
    added = {}
    for name, taken in seconds.items():
        command = [sys.executable, __file__, "--memory", name]
        added[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{name:17}{median(taken):11.3f}{added[name]:13.3f}", flush=True)
    ratios = {what: median(seconds[f"plain {what}"]) / median(seconds[f"ours {what}"]) for what in FASTER}
    limits = {"memory": added["ours dense"], "gradient": max(differences.values())}
    ok = all(ratios[what] >= TARGETS[what] for what in ratios) and all(limits[what] <= TARGETS[what] for what in limits)
    rounded = {name: float(f"{value:.3g}") for name, value in {**ratios, **limits}.items()}
    print(json.dumps({"name": "loss", "ratios": rounded, "targets": TARGETS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
