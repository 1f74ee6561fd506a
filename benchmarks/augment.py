"""How fast a batch becomes a network's input and targets, augmented, as ratios to MONAI and batchgeneratorsv2.

    python benchmarks/augment.py [--quick]

Patches of 128^3 voxels with 14 classes, two to a batch, on one CPU thread, by turns in the same run; CPU milliseconds
per patch are compared, means over as many draws for each, since a draw may take ten times as long as another.
- ours: uint8 image and label map to float32 image, bool targets and bool known-masks, all kinds at their default
  probabilities; labels take the nearest voxel's.
- MONAI: dictionary transforms of the same list at the same probabilities, on an integer label that becomes one-hot
  last; labels take the nearest voxel's. A known-mask is not made.
- batchgeneratorsv2: the list that nnU-Net trains with by default. Labels are interpolated one by one, linearly, and
  the highest wins, its default; mirroring only; blur and low resolution at half of the probability stated for them,
  because they skip half of the channels. Labels stay integers, no mask is made.
Both are handed float32 images that are normalised already. The last line is one JSON object: name, ratios, targets, ok.
"""

import argparse
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable
from statistics import mean, stdev

import monai.transforms as mt
import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from scipy import ndimage
from torch import Tensor

from cellmap_pipe.prepare.labels import UNKNOWN
from cellmap_pipe.training.augment import Augmentation
from cellmap_pipe.training.expand import Expander
from cellmap_pipe.training.transform import varied

logger = logging.getLogger("augment")

SIZE, CLASSES, BATCH = 128, 14, 2
PATCH = (SIZE,) * 3
NOISE = 0.05
RIGHT_ANGLE_PLANES = [(0, 1), (0, 2), (1, 2)]

# Least ratio of CPU time to ours.
TARGETS = {"monai": 3.0, "batchgeneratorsv2": 6.0}

SETTINGS = {
    "flips": True,
    "rotations": True,
    "affine": True,
    "brightness": True,
    "contrast": True,
    "gamma": True,
    "blur": True,
    "low_resolution": True,
    "noise": NOISE,
}


def synthetic(seed: int) -> tuple[Tensor, Tensor]:
    """Return a uint8 image and a label map of 14 values, each a class's blobs, of one patch."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal(PATCH, dtype=np.float32), 5)
    label = np.searchsorted(np.quantile(field, np.linspace(0, 1, CLASSES + 1)[1:-1]), field).astype(np.uint8)
    image = 60 + 10 * label + rng.normal(0, 12, PATCH)
    return torch.from_numpy(np.clip(image, 0, 255).astype(np.uint8)), torch.from_numpy(label)


def our_pipeline() -> Callable[[Tensor, Tensor, int], object]:
    """Return what augments and expands a batch (B, z, y, x) of uint8 images and label maps, given the draw's number."""
    table = np.full((1, CLASSES, 256), UNKNOWN, np.uint8)
    table[0, :, : CLASSES + 1] = np.eye(CLASSES, CLASSES + 1, 1)
    table[0, :4, 0] = UNKNOWN  # some classes are not annotated
    expander = Expander(table, [(20, 235)], torch.device("cpu"))
    augmentation = Augmentation(SETTINGS, PATCH, [(8, 8, 8)])
    crops = [0] * BATCH

    def run(image: Tensor, label: Tensor, number: int) -> object:
        rng = np.random.default_rng(number)
        anchors = rng.integers(SIZE // 4, 3 * SIZE // 4, (BATCH, 3)).tolist()
        variations = [augmentation.draw(rng.random(Augmentation.NUMBERS).tolist(), 0, (z, y, x)) for z, y, x in anchors]
        images, labels = varied(image, label, crops, variations, expander)
        return images, *expander.states(labels, crops)

    return run


def monai_pipeline() -> mt.Compose:
    """Return the same list as MONAI's dictionary transforms, in nnU-Net's order."""
    both = ["image", "label"]
    return mt.Compose(
        [
            mt.RandAffined(
                both,
                prob=1 - 0.8**2,
                rotate_range=[math.pi / 6] * 3,
                scale_range=[(-0.3, 0.4)] * 3,
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
            mt.RandGaussianNoised("image", prob=0.1, std=NOISE),
            mt.RandGaussianSmoothd("image", (0.5, 1), (0.5, 1), (0.5, 1), prob=0.2),
            mt.RandScaleIntensityd("image", factors=0.25, prob=0.15),
            mt.RandScaleIntensityFixedMeand("image", factors=0.25, preserve_range=True, prob=0.15),
            mt.RandSimulateLowResolutiond("image", prob=0.25, zoom_range=(0.5, 1)),
            mt.RandAdjustContrastd("image", prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
            mt.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
            *[mt.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)],
            *[mt.RandRotate90d(both, prob=0.75, max_k=3, spatial_axes=plane) for plane in RIGHT_ANGLE_PLANES],
            mt.AsDiscreted("label", to_onehot=CLASSES),
        ]
    )


def nnunet_pipeline() -> tuple[ComposeTransforms, BasicTransform]:
    """Return nnU-Net's default training transforms, and the one among them that measures how to blur when new."""

    def gamma(invert: int) -> GammaTransform:
        return GammaTransform(
            BGContrast((0.7, 1.5)), p_invert_image=invert, synchronize_channels=False, p_per_channel=1, p_retain_stats=1
        )

    blur = GaussianBlurTransform(
        (0.5, 1.0), synchronize_channels=False, synchronize_axes=False, p_per_channel=0.5, benchmark=True
    )
    transforms = [
        SpatialTransform(
            PATCH,
            patch_center_dist_from_border=0,
            random_crop=False,
            p_rotation=0.2,
            rotation=(-math.pi / 6, math.pi / 6),
            p_scaling=0.2,
            scaling=(0.7, 1.4),
            p_synchronize_scaling_across_axes=1,
        ),
        RandomTransform(GaussianNoiseTransform((0, 0.1), p_per_channel=1, synchronize_channels=True), 0.1),
        RandomTransform(blur, 0.2),
        RandomTransform(MultiplicativeBrightnessTransform(BGContrast((0.75, 1.25)), False, p_per_channel=1), 0.15),
        RandomTransform(ContrastTransform(BGContrast((0.75, 1.25)), True, False, p_per_channel=1), 0.15),
        RandomTransform(
            SimulateLowResolutionTransform(
                (0.5, 1), synchronize_channels=False, synchronize_axes=True, ignore_axes=None, p_per_channel=0.5
            ),
            0.25,
        ),
        RandomTransform(gamma(1), 0.1),
        RandomTransform(gamma(0), 0.3),
        MirrorTransform((0, 1, 2)),
        RemoveLabelTansform(-1, 0),
    ]
    return ComposeTransforms(transforms), blur


def cpu_seconds(function: Callable[[], object]) -> float:
    """Return the CPU time that a call takes, that of all threads of this process."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def measure(draws: int, warm: int) -> dict[str, list[float]]:
    """Return CPU seconds per patch of each method's batches: `draws` patches after `warm` that are not counted."""
    pairs = [synthetic(seed) for seed in range(BATCH)]
    image, label = (torch.stack(part) for part in zip(*pairs, strict=True))
    normalised = image.float() / 255
    ours, theirs = our_pipeline(), monai_pipeline()
    nnunet, blur = nnunet_pipeline()
    for _ in range(20):  # until it has measured every kernel length
        blur(image=normalised[:1].clone())

    def monai_batch(number: int) -> float:
        theirs.set_random_state(number)
        samples = [{"image": normalised[i : i + 1].clone(), "label": label[i : i + 1]} for i in range(BATCH)]
        return cpu_seconds(lambda: [theirs(sample) for sample in samples])

    def nnunet_batch(number: int) -> float:
        np.random.seed(number)
        torch.manual_seed(number)
        samples = [
            {"image": normalised[i : i + 1].clone(), "segmentation": label[i : i + 1].short()} for i in range(BATCH)
        ]
        return cpu_seconds(lambda: [nnunet(**sample) for sample in samples])

    methods = {
        "ours": lambda number: cpu_seconds(lambda: ours(image, label, number)),
        "monai": monai_batch,
        "batchgeneratorsv2": nnunet_batch,
    }
    found: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(-warm // BATCH, -(-draws // BATCH)):
        for name in list(methods)[:: 1 if number % 2 else -1]:
            seconds = methods[name](number + warm) / BATCH
            if number >= 0:
                found[name].append(seconds)
    return found


def main() -> int:
    """Run all methods, log one line each, print the JSON line. Returns 0 if every target is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer draws: the means are less certain")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    draws = 40 if options.quick else 240
    found = measure(draws, warm=4 if options.quick else 8)
    for name, seconds in found.items():
        error = stdev(seconds) / math.sqrt(len(seconds))
        logger.info("%-17s %5.1f +- %.1f CPU ms per patch, mean of %d", name, 1e3 * mean(seconds), 1e3 * error, draws)
    ratios = {name: mean(found[name]) / mean(found["ours"]) for name in TARGETS}
    ok = all(ratios[name] >= target for name, target in TARGETS.items())
    rounded = {name: round(value, 2) for name, value in ratios.items()}
    print(json.dumps({"name": "augment", "ratios": rounded, "targets": TARGETS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
