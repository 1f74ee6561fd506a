"""The sliding window: exact blending, bounded memory, edges, columns, and what it refuses."""

import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import cellmap_pipe.prediction
from cellmap_pipe.errors import ConfigError, DataError
from cellmap_pipe.geometry import Shape3, shape3, vec3
from cellmap_pipe.prediction.plan import (
    OUTPUTS,
    Box,
    Plan,
    axis_windows,
    columns,
    count_windows,
    estimate_bytes,
    make_plan,
    make_plans,
    planes_needed,
)
from cellmap_pipe.prediction.sliding_window import ArraySource, PredictionError, chunk_shape, predict_array, predict_box
from cellmap_pipe.prediction.symmetries import Symmetry, symmetries

torch.set_num_threads(1)

Network = Callable[[torch.Tensor], torch.Tensor]


def image_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def plans_of(shape: tuple[int, ...], patch: tuple[int, ...]) -> tuple[Plan, ...]:
    return make_plans(shape, patch, 0.5, voxel_nm=(8, 8, 8))


def run_box(network: Network, source: Any, plans: tuple[Plan, ...], box: Box, **options: Any) -> np.ndarray:
    """Predict a box in this thread's sight: pieces must follow each other and end at multiples of the depth."""
    pieces: list[np.ndarray] = []
    depth, planes, delay = options.setdefault("depth", 64), [box[0][0]], options.pop("delay", 0.0)

    def write(first: int, last: int, piece: np.ndarray) -> None:
        time.sleep(delay)
        assert first == planes[-1] and (last % depth == 0 or last == box[1][0])
        planes.append(last)
        pieces.append(piece.copy())

    table = (np.arange(256) / 255).astype(np.float32)
    device = torch.device("cpu")
    predict_box(network, source, plans, box, write, **{"normalise": table, "device": device, **options})
    assert planes[-1] == box[1][0]
    return np.concatenate(pieces, axis=1)


def voxelwise(x: torch.Tensor) -> torch.Tensor:
    """Two channels that depend on the voxel alone: the intensity as a probability, and its complement."""
    p = x.clamp(1e-4, 1 - 1e-4)
    return torch.logit(torch.cat([p, 1 - p], 1))


class Position(torch.nn.Module):
    """A network whose answer depends on the place in the window and on the image, as a real one's does."""

    def __init__(self, patch: tuple[int, ...], channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.field = torch.nn.Parameter(torch.randn((1, channels, *patch), generator=generator) * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.field + 3 * (x - 0.5)


def new_zarr(path: Path, shape: tuple[int, ...], chunks: tuple[int, ...]) -> zarr.Array:
    return zarr.create_array(str(path), shape=shape, chunks=chunks, dtype="uint8", zarr_format=2)


def direct_sum(
    network: Network,
    image: np.ndarray,
    patch: tuple[int, ...],
    overlap: float,
    blending: str,
    views: Sequence[Symmetry] = (Symmetry(),),
    thin: int = 0,
) -> np.ndarray:
    """The definition: sum over windows of weight times probability over the sum of weights, in float64, unquantised.

    thin: the axis of the windows that is the network's first.
    """
    starts = [axis.starts for axis in make_plan(image.shape, patch, overlap, blending)]
    pad = [(max(0, -s[0]), max(0, s[-1] + p - n)) for s, p, n in zip(starts, patch, image.shape, strict=True)]
    padded = np.pad(image, pad, mode="reflect")
    profile = [np.exp(-0.5 * ((np.arange(p) - (p - 1) / 2) / (p / 8)) ** 2) for p in patch]
    if blending == "constant":
        profile = [np.ones(p) for p in patch]
    weight = profile[0][:, None, None] * profile[1][:, None] * profile[2]
    total, result = np.zeros(padded.shape), None
    for corner in product(*starts):
        box = tuple(slice(s + before, s + before + p) for s, (before, _), p in zip(corner, pad, patch, strict=True))
        shown = torch.from_numpy(padded[box].astype(np.float32) / np.float32(255)).movedim(thin, 0)[None, None]
        with torch.no_grad():
            answers = [view.undo(network(view.apply(shown))[0]).double() for view in views]
        p = torch.stack([torch.sigmoid(answer) for answer in answers]).mean(0).movedim(1, 1 + thin).numpy()
        if result is None:
            result = np.zeros((len(p), *padded.shape))
        result[(slice(None), *box)] += p * weight
        total[box] += weight
    inner = tuple(slice(before, before + n) for (before, _), n in zip(pad, image.shape, strict=True))
    assert result is not None
    return np.asarray(result[(slice(None), *inner)] / total[inner])


def direct_planes(network: Network, image: np.ndarray, h: int, w: int, views: Sequence[Symmetry]) -> np.ndarray:
    """The mean of what a 2D network gives across each axis."""
    sums = [
        direct_sum(network, image, patch, 0.5, "gaussian", views, thin)
        for thin, patch in enumerate([(1, h, w), (h, 1, w), (h, w, 1)])
    ]
    return np.asarray(np.mean(sums, axis=0))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.tuples(*[st.integers(5, 30)] * 3),
    st.tuples(st.sampled_from([1, 4, 8]), st.sampled_from([6, 8]), st.sampled_from([8, 12])),
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.85]),
    st.sampled_from(["gaussian", "constant"]),
    st.integers(1, 3),
)
def test_blending_equals_a_direct_sum_in_float64(
    shape: tuple[int, ...], patch: tuple[int, ...], overlap: float, blending: str, batch: int
) -> None:
    image, network = image_of(shape), Position(patch, 3)
    out = np.zeros((3, *shape), np.uint8)
    predict_array(network, image, patch=patch, overlap=overlap, out=out, blending=blending, batch=batch)
    assert np.abs(out - 255 * direct_sum(network, image, patch, overlap, blending)).max() <= 1.0


def test_voxelwise_network_gives_itself(tmp_path: Path) -> None:
    image = new_zarr(tmp_path / "in.zarr", (40, 33, 21), (16, 16, 16))
    image[:] = image_of((40, 33, 21))
    out = new_zarr(tmp_path / "out.zarr", (2, 40, 33, 21), (1, 16, 16, 16))
    predict_array(voxelwise, image, patch=(16, 16, 16), out=out)
    expected = image[:].astype(int)
    assert np.abs(out[0].astype(int) - expected).max() <= 1
    assert np.abs(out[1].astype(int) - (255 - expected)).max() <= 1


def test_package_offers_predict_array() -> None:
    assert cellmap_pipe.prediction.predict_array is predict_array


def test_a_plan_is_made_without_torch() -> None:
    code = "import sys, cellmap_pipe.prediction.plan, cellmap_pipe.prepare.quality; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_the_classes_asked_for_are_kept_in_their_order() -> None:
    image, network = image_of((12, 12, 12)), Position((8, 8, 8), 4)
    image.flags.writeable = False
    whole, some = np.zeros((4, 12, 12, 12), np.uint8), np.zeros((2, 12, 12, 12), np.uint8)
    predict_array(network, image, patch=(8, 8, 8), out=whole)
    predict_array(network, image, patch=(8, 8, 8), out=some, classes=[3, 1])
    np.testing.assert_array_equal(some, whole[[3, 1]])


def test_any_cut_gives_the_same_bits() -> None:
    image, network = image_of((40, 40, 40)), Position((16, 16, 16), 2)
    plans = plans_of(image.shape, (16, 16, 16))
    whole = np.zeros((2, 40, 40, 40), np.uint8)
    predict_array(network, image, patch=(16, 16, 16), out=whole)
    cut = np.full_like(whole, 255)
    lower = [(0, 0, 0), (8, 0, 0), (8, 0, 8), (8, 24, 0)]
    upper = [(8, 40, 40), (40, 24, 8), (40, 24, 40), (40, 40, 40)]
    for box in zip(lower, upper, strict=True):
        (z0, y0, x0), (z1, y1, x1) = box
        piece = run_box(network, ArraySource(image), plans, box, channels=[0, 1], depth=8)
        cut[:, z0:z1, y0:y1, x0:x1] = piece
    np.testing.assert_array_equal(cut, whole)


def test_memory_limit_cuts_columns_without_changing_the_result(tmp_path: Path) -> None:
    image, network = image_of((24, 64, 64)), Position((16, 16, 16), 3)
    whole = np.zeros((3, 24, 64, 64), np.uint8)
    predict_array(network, image, patch=(16, 16, 16), out=whole)
    out = new_zarr(tmp_path / "out", whole.shape, (1, 8, 16, 16))
    plans = plans_of(image.shape, (16, 16, 16))
    limit = 0.75 * estimate_bytes(plans, ((0, 0, 0), image.shape), 3, 8, 1) / 1e9
    boxes = columns(plans, 3, 8, 1, (16, 16), limit)
    assert len(boxes) > 1
    assert all(corner % 16 == 0 for box in boxes for corner in box[0])
    assert sum((b[1] - a[1]) * (b[2] - a[2]) for a, b in boxes) == 64 * 64
    predict_array(network, image, patch=(16, 16, 16), out=out, memory_gb=limit)
    np.testing.assert_array_equal(out[:], whole)


def test_an_array_without_chunks_is_cut_quickly_and_without_changing_the_result() -> None:
    image = image_of((4, 512, 512))
    whole, cut = np.zeros((2, 4, 512, 512), np.uint8), np.zeros((2, 4, 512, 512), np.uint8)
    predict_array(voxelwise, image, patch=(4, 64, 64), out=whole)
    plans = plans_of(image.shape, (4, 64, 64))
    limit = 0.5 * estimate_bytes(plans, ((0, 0, 0), image.shape), 2, 64, 1) / 1e9
    assert len(columns(plans, 2, 64, 1, (chunk_shape(cut)[1], chunk_shape(cut)[2]), limit)) > 1
    begin = time.perf_counter()
    columns(plans_of((4096, 4096, 4096), (128, 128, 128)), 14, 64, 1, (64, 64), 2)
    assert time.perf_counter() - begin < 2
    predict_array(voxelwise, image, patch=(4, 64, 64), out=cut, memory_gb=limit)
    assert np.abs(cut.astype(int) - whole).max() <= 1


@pytest.mark.parametrize(
    ("share", "patch", "overlap"),
    [
        (0.15, (16, 16, 24), 0.5),
        (0.3, (16, 16, 24), 0.5),
        (0.9, (16, 16, 24), 0.5),
        (0.2, (16, 24, 32), 0.0),  # more parts, but fewer windows across their edges
    ],
)
def test_columns_are_the_cut_with_the_fewest_windows_that_fits(share: float, patch: Shape3, overlap: float) -> None:
    plans = make_plans((40, 150, 210), patch, overlap, voxel_nm=(8, 8, 8))

    def need(box: Box) -> int:
        return estimate_bytes(plans, box, 3, 16, 1)

    def windows(boxes: list[Box]) -> int:
        return sum(count_windows(plans, box) for box in boxes)

    limit = share * need(((0, 0, 0), (40, 150, 210)))
    fitting = []
    for ny in range(1, 11):
        for nx in range(1, 15):
            cuts = [
                list(pairwise([min(n, 16 * (-(-n // 16) * i // parts)) for i in range(parts + 1)]))
                for n, parts in ((150, ny), (210, nx))
            ]
            boxes: list[Box] = [((0, a, c), (40, b, d)) for a, b in cuts[0] for c, d in cuts[1]]
            if max(map(need, boxes)) <= limit:
                fitting.append(windows(boxes))
    chosen = columns(plans, 3, 16, 1, (16, 16), limit / 1e9)
    assert max(map(need, chosen)) <= limit
    assert windows(chosen) == min(fitting)


def test_what_the_source_holds_counts_as_memory() -> None:
    plans = plans_of((64, 64, 64), (16, 16, 16))
    box: Box = ((0, 0, 0), (64, 64, 64))
    held = estimate_bytes(plans, box, 1, 64, 1, held=64) - estimate_bytes(plans, box, 1, 64, 1)
    assert held == 2 * 64 * 64 * 64


def test_a_resumed_run_gives_the_same_bits() -> None:
    """Three rows over a voxel in the rest of the axis, four in all of it: the carry must be of one type."""
    image, network = image_of((213, 8, 8)), Position((128, 8, 8), 1)
    plans = plans_of(image.shape, (128, 8, 8))

    def run(lower: int) -> np.ndarray:
        return run_box(network, ArraySource(image), plans, ((lower, 0, 0), (213, 8, 8)), channels=[0])

    np.testing.assert_array_equal(run(128), run(0)[:, 128:])
    assert planes_needed(plans, 128, 213, 64).carry_type == planes_needed(plans, 0, 213, 64).carry_type


def test_bfloat16_logits_are_not_rounded_once_more() -> None:
    image, out = image_of((8, 8, 8)), np.zeros((1, 8, 8, 8), np.uint8)

    def network(x: torch.Tensor) -> torch.Tensor:
        return (8 * x - 4).bfloat16()

    predict_array(network, image, patch=(8, 8, 8), out=out)
    expected = torch.sigmoid(network(torch.from_numpy(image / np.float32(255))).float()).numpy() * 255
    assert np.abs(out[0] - expected).max() <= 0.51


def test_too_little_memory_says_how_much_would_do() -> None:
    with pytest.raises(ConfigError, match=r"predict.memory_gb 1e-05 is too little .* at least [\d.]+ GB"):
        columns(plans_of((64, 64, 64), (16, 16, 16)), 3, 64, 1, (64, 64), 1e-5)


@pytest.mark.parametrize(
    ("patch", "options"),
    [
        ((32, 32, 32), {}),
        ((32, 32, 32), {"share": 0.7}),
        ((32, 32, 32), {"output": "float16", "tta": 4}),
        ((1, 16, 16), {"planes": "all"}),
    ],
)
def test_memory_is_what_the_plan_says(tmp_path: Path, patch: tuple[int, ...], options: dict[str, Any]) -> None:
    """numpy's share by tracemalloc, in which the buffers are; what only torch holds is the network's and small here."""
    shape = (48, 48, 48) if patch[0] == 1 else (96, 96, 96)
    image = new_zarr(tmp_path / "in", shape, (32, 32, 32))
    image[:] = image_of(shape)
    output = options.pop("output", "uint8")
    out = zarr.create_array(str(tmp_path / "out"), shape=(4, *shape), chunks=(1, 16, 32, 32), dtype=output)
    field = torch.zeros((1, 4, *patch))
    plans = make_plans(shape, patch, 0.5, planes=options.get("planes", "z"), voxel_nm=(1, 1, 1))
    counted: dict[str, Any] = {"output": output, "symmetries": options.get("tta", 1)}
    if "share" in options:
        whole = estimate_bytes(plans, ((0, 0, 0), shape3(shape)), 4, 16, 1, **counted)
        options = {"memory_gb": options["share"] * whole / 1e9}
    boxes = columns(plans, 4, 16, 1, (32, 32), options.get("memory_gb"), **counted)
    need = max(estimate_bytes(plans, box, 4, 16, 1, **counted) for box in boxes)
    assert (len(boxes) > 1) == ("memory_gb" in options)
    tracemalloc.start()
    predict_array(lambda x: field, image, patch=patch, out=out, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.6 * need < peak < 1.1 * need + 1_000_000


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """numpy's share by tracemalloc; torch's buffers depend on the plan alone, which `estimate_bytes` states."""
    peaks = []
    for depth in (64, 512):
        image = new_zarr(tmp_path / f"in{depth}", (depth, 32, 32), (32, 32, 32))
        image[:] = image_of((depth, 32, 32))
        out = new_zarr(tmp_path / f"out{depth}", (2, depth, 32, 32), (1, 32, 32, 32))
        tracemalloc.start()
        predict_array(voxelwise, image, patch=(16, 16, 16), out=out)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert np.abs(out[0].astype(int) - image[:]).max() <= 1
    assert peaks[1] < 1.5 * peaks[0] + 200_000
    needs = [estimate_bytes(plans_of((n, 32, 32), (16, 16, 16)), ((0, 0, 0), (n, 32, 32)), 2, 32, 1) for n in (64, 512)]
    assert needs[0] == needs[1]


def test_context_is_used_instead_of_reflection() -> None:
    """Windows of a small volume reach into the image around it; the answer then depends on what really lies there."""
    big = image_of((24, 24, 24))

    class Shifted:
        def read(self, lower: tuple[int, ...], upper: tuple[int, ...]) -> tuple[np.ndarray, None]:
            return big[tuple(slice(a + 8, b + 8) for a, b in zip(lower, upper, strict=True))], None

    plans = make_plans((8, 8, 8), (16, 16, 16), 0.5, context=((8, 8),) * 3, voxel_nm=(8, 8, 8))
    assert [axis.starts for axis in plans[0]] == [(-4,)] * 3
    mean = torch.nn.AvgPool3d(5, stride=1, padding=2)

    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.logit(mean(x).clamp(1e-4, 1 - 1e-4))

    out = run_box(network, Shifted(), plans, ((0, 0, 0), (8, 8, 8)), channels=[0])
    expected = mean(torch.from_numpy(big.astype(np.float32))[None])[0, 8:16, 8:16, 8:16].numpy()
    assert np.abs(out[0] - expected).max() <= 1


@pytest.mark.parametrize(("before", "after", "starts"), [(0, 0, (0, 8, 14)), (9, 0, (-2, 6, 14)), (9, 9, (-1, 7, 15))])
def test_windows_reach_into_context_without_becoming_more(before: int, after: int, starts: tuple[int, ...]) -> None:
    windows = axis_windows(30, 16, 0.5, "gaussian", before, after)
    assert len(windows.starts) == 3
    assert windows.starts[0] == starts[0] and windows.starts[-1] == starts[-1]
    sums = np.zeros(60)
    for start, weight in zip(windows.starts, windows.weights, strict=True):
        sums[start + 10 : start + 26] += weight
    np.testing.assert_allclose(sums[10:40], 1, atol=1e-6)
    assert not sums[:10].any() and not sums[40:].any()


def test_invalid_voxels_are_zero_and_their_windows_are_not_run() -> None:
    image, valid = image_of((16, 16, 32)), np.zeros((16, 16, 32), bool)
    valid[:, :, :10] = True
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return voxelwise(x)

    out = np.full((2, 16, 16, 32), 7, np.uint8)
    predict_array(network, image, patch=(16, 16, 8), overlap=0.0, out=out, valid=valid)
    assert sum(seen) == 2
    assert not out[:, :, :, 10:].any()
    assert np.abs(out[0, :, :, :10].astype(int) - image[:, :, :10]).max() <= 1


def test_a_2d_network_predicts_plane_by_plane() -> None:
    convolution = torch.nn.Conv2d(1, 2, 3, padding=1)

    def network(x: torch.Tensor) -> torch.Tensor:
        return convolution(x[:, :, 0])[:, :, None]

    image = image_of((5, 20, 16))
    out = np.zeros((2, 5, 20, 16), np.uint8)
    predict_array(network, image, patch=(1, 16, 16), out=out, batch=4)
    assert np.abs(out - 255 * direct_sum(network, image, (1, 16, 16), 0.5, "gaussian")).max() <= 1


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.tuples(*[st.integers(5, 20)] * 3),
    st.sampled_from([(6, 6), (8, 12)]),
    st.sampled_from([1, 4, 8]),
    st.sampled_from(["uint8", "float16"]),
)
def test_three_planes_are_averaged_without_rounding_in_between(
    shape: tuple[int, ...], hw: tuple[int, int], tta: int, dtype: str
) -> None:
    tta = tta if hw[0] == hw[1] else min(tta, 4)
    image, network, out = image_of(shape), Position((1, *hw), 2), np.zeros((2, *shape), dtype)
    options: dict[str, Any] = {"planes": "all", "voxel_nm": (8, 8, 8), "tta": tta, "batch": 3}
    predict_array(network, image, patch=(1, *hw), out=out, **options)
    expected = direct_planes(network, image, *hw, symmetries(tta, (1, *hw), (8, 8, 8)))
    error = np.abs(out / 255 - expected) if dtype == "uint8" else np.abs(out - expected)
    assert error.max() <= (0.51 / 255 if dtype == "uint8" else 2.6e-4)


def test_planes_of_voxels_that_are_not_isotropic_are_those_across_z() -> None:
    assert len(make_plans((9, 9, 9), (1, 4, 4), 0.5, planes="all", voxel_nm=(20, 8, 8))) == 1
    assert len(make_plans((9, 9, 9), (2, 4, 4), 0.5, planes="all", voxel_nm=(8, 8, 8))) == 1
    plans = make_plans((9, 9, 9), (1, 4, 5), 0.5, planes="all", voxel_nm=(8, 8, 8))
    assert [tuple(axis.patch for axis in plan) for plan in plans] == [(1, 4, 5), (4, 1, 5), (4, 5, 1)]


def test_three_planes_give_the_same_bits_in_any_cut() -> None:
    image, network = image_of((21, 18, 20)), Position((1, 6, 8), 2)
    plans = make_plans(image.shape, (1, 6, 8), 0.6, planes="all", voxel_nm=(8, 8, 8))
    options: dict[str, Any] = {"channels": [0, 1], "depth": 4, "output": "float16"}
    whole = run_box(network, ArraySource(image), plans, ((0, 0, 0), (21, 18, 20)), **options)
    boxes: list[Box] = [((4, 0, 0), (21, 9, 20)), ((8, 9, 4), (12, 18, 11)), ((20, 0, 0), (21, 18, 20))]
    for box in boxes:
        part = run_box(network, ArraySource(image), plans, box, **options)
        np.testing.assert_array_equal(part, whole[(slice(None), *(slice(a, b) for a, b in zip(*box, strict=True)))])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.tuples(*[st.integers(5, 20)] * 3),
    st.sampled_from([((8, 8, 8), (8, 8, 8), 48), ((4, 8, 8), (20, 8, 8), 16), ((4, 6, 8), (8, 8, 8), 8)]),
    st.sampled_from([0.0, 0.5, 0.75]),
)
def test_symmetries_and_outputs_equal_a_direct_sum(
    shape: tuple[int, ...], case: tuple[tuple[int, ...], tuple[int, ...], int], overlap: float
) -> None:
    patch, voxel_nm, tta = case
    image, network = image_of(shape), Position(patch, 2)
    views = symmetries(tta, shape3(patch), vec3(voxel_nm))
    expected = direct_sum(network, image, patch, overlap, "gaussian", views)
    thresholds = [0.5, 0.3]
    outs = {name: np.zeros((2, *shape), dtype) for name, dtype in OUTPUTS.items()}
    for name, out in outs.items():
        options: dict[str, Any] = {"tta": tta, "voxel_nm": voxel_nm, "overlap": overlap, "patch": patch}
        predict_array(network, image, out=out, thresholds=thresholds if name == "mask" else None, **options)
    assert np.abs(outs["uint8"] / 255 - expected).max() <= 1 / 255
    assert np.abs(outs["float16"] - expected).max() <= 1e-3
    margin = expected - np.reshape(thresholds, (2, 1, 1, 1))
    assert np.isin(outs["mask"], [0, 255]).all()
    assert (np.abs(margin[(outs["mask"] > 0) != (margin > 0)]) <= 1e-3).all()


@pytest.mark.parametrize("tta", [4, 48])
@pytest.mark.parametrize("planes", ["z", "all"])
def test_a_voxelwise_network_gives_itself_in_every_view(tta: int, planes: str) -> None:
    image = image_of((13, 11, 17))
    patch, tta = ((1, 8, 8), min(tta, 8)) if planes == "all" else ((8, 8, 8), tta)
    for dtype, scale in (("uint8", 255), ("float16", 1)):
        out = np.zeros((2, *image.shape), dtype)
        predict_array(voxelwise, image, patch=patch, out=out, tta=tta, planes=planes)
        assert np.abs(out[0].astype(float) / scale - image / 255).max() <= 1 / 255


def test_the_threads_timing_does_not_matter() -> None:
    image, network = image_of((40, 24, 24)), Position((8, 8, 8), 2)
    rng = np.random.default_rng(0)

    class Slow(ArraySource):
        def read(self, lower: Shape3, upper: Shape3) -> tuple[np.ndarray, np.ndarray | None]:
            time.sleep(rng.uniform(0, 0.01))
            return super().read(lower, upper)

    plans, box = plans_of(image.shape, (8, 8, 8)), ((0, 0, 0), (40, 24, 24))
    options: dict[str, Any] = {"channels": [0, 1], "depth": 4}
    whole = run_box(network, ArraySource(image), plans, box, **options)
    slow = run_box(network, Slow(image), plans, box, delay=0.02, **options)
    np.testing.assert_array_equal(slow, whole)


@pytest.mark.parametrize("fault", ["read", "write", "network"])
def test_an_error_in_any_thread_comes_out_and_ends_all(fault: str) -> None:
    image, written = image_of((400, 8, 8)), []

    class Damaged(ArraySource):
        def read(self, lower: Shape3, upper: Shape3) -> tuple[np.ndarray, np.ndarray | None]:
            if fault == "read" and upper[0] > 100:
                raise OSError("damaged chunk")
            return super().read(lower, upper)

    def write(first: int, last: int, piece: np.ndarray) -> None:
        if fault == "write" and first >= 96:
            raise OSError("no space left")
        written.append(first)

    windows = []

    def network(x: torch.Tensor) -> torch.Tensor:
        windows.append(len(x))
        if fault == "network" and len(windows) == 30:
            raise OSError("out of memory")
        return voxelwise(x)

    with pytest.raises(OSError, match=r"damaged chunk|no space left|out of memory"):
        predict_box(
            network,
            Damaged(image),
            plans_of(image.shape, (8, 8, 8)),
            ((0, 0, 0), image.shape),
            write,
            channels=[0],
            depth=8,
            normalise=np.zeros(256, np.float32),
            device=torch.device("cpu"),
        )
    assert written == list(range(0, 96 if fault == "write" else 400, 8))[: len(written)] and len(windows) < 50
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("reader", "writer"))]


def test_logits_of_one_view_are_gone_before_the_next_view_is_run() -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        assert not [logits for logits in made if logits() is not None]
        logits = np.zeros((len(x), 2, *x.shape[2:]), np.float32)
        made.append(weakref.ref(logits))
        return torch.from_numpy(logits)

    predict_array(network, image_of((8, 8, 8)), patch=(8, 8, 8), out=np.zeros((2, 8, 8, 8), np.uint8), tta=4)
    assert len(made) == 4


def test_nothing_of_a_row_with_nan_is_written() -> None:
    image, written = image_of((64, 8, 8)), []

    def network(x: torch.Tensor) -> torch.Tensor:
        return voxelwise(x) + (float("nan") if len(seen) == 4 else seen.append(0) or 0)

    seen: list[int] = []
    with pytest.raises(PredictionError, match=r"NaN in the window at voxel \(16, 0, 0\)"):
        predict_box(
            network,
            ArraySource(image),
            plans_of(image.shape, (8, 8, 8)),
            ((0, 0, 0), image.shape),
            lambda first, last, piece: written.append(last),
            channels=[0],
            depth=4,
            normalise=np.zeros(256, np.float32),
            device=torch.device("cpu"),
        )
    assert max(written) <= 16


def test_normalisation_table_is_applied() -> None:
    image, table = image_of((8, 8, 8)), np.linspace(1, 0, 256, dtype=np.float32)
    out = np.zeros((2, 8, 8, 8), np.uint8)
    predict_array(voxelwise, image, patch=(8, 8, 8), out=out, normalise=table)
    assert np.abs(out[1].astype(int) - image).max() <= 1


def test_module_is_evaluated_and_left_as_it_was() -> None:
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1), torch.nn.Dropout(0.9)).train()
    out = [np.zeros((2, 8, 8, 8), np.uint8) for _ in range(2)]
    for array in out:
        predict_array(network, image_of((8, 8, 8)), patch=(8, 8, 8), out=array)
    np.testing.assert_array_equal(*out)
    assert network.training


def test_nan_names_the_window() -> None:
    def network(x: torch.Tensor) -> torch.Tensor:
        return voxelwise(x).masked_fill(x.expand(-1, 2, -1, -1, -1) > 0.99, float("nan"))

    image = np.zeros((8, 8, 24), np.uint8)
    image[4, 4, 20] = 255
    with pytest.raises(PredictionError, match=r"NaN in the window at voxel \(0, 0, 16\)"):
        predict_array(network, image, patch=(8, 8, 8), overlap=0.0, out=np.zeros((2, 8, 8, 24), np.uint8))


def test_faults_are_named() -> None:
    image, out = image_of((8, 8, 8)), np.zeros((2, 8, 8, 8), np.uint8)
    with pytest.raises(DataError, match="the image is float32, expected uint8"):
        predict_array(voxelwise, image.astype(np.float32), patch=(8, 8, 8), out=out)
    with pytest.raises(DataError, match=r"the image has shape \(8, 8\), expected \(z, y, x\)"):
        predict_array(voxelwise, image[0], patch=(8, 8, 8), out=out)
    with pytest.raises(DataError, match=r"the image has shape \(0, 8, 8\), expected"):
        predict_array(voxelwise, image[:0], patch=(8, 8, 8), out=out[:, :0])
    with pytest.raises(DataError, match=r"valid has shape \(8, 8, 1\), the image \(8, 8, 8\)"):
        predict_array(voxelwise, image, patch=(8, 8, 8), out=out, valid=np.ones((8, 8, 1), bool))
    with pytest.raises(ConfigError, match=r"predict\.planes: unknown 'x'; allowed: z, all"):
        predict_array(voxelwise, image, patch=(1, 8, 8), out=out, planes="x")
    for patch in [(8, 8), (8, 0, 8), (8, 8, -1)]:
        with pytest.raises(ConfigError, match=r"must be three sizes \(z, y, x\), each at least 1"):
            predict_array(voxelwise, image, patch=patch, out=out)
    with pytest.raises(ConfigError, match=r"predict.batch 0 must be at least 1"):
        predict_array(voxelwise, image, patch=(8, 8, 8), out=out, batch=0)
    with pytest.raises(ConfigError, match=r"classes \[0, -1\] must be numbers of the network's channels"):
        predict_array(voxelwise, image, patch=(8, 8, 8), out=out, classes=[0, -1])
    with pytest.raises(ConfigError, match=r"classes \[\] must be numbers"):
        predict_array(voxelwise, image, patch=(8, 8, 8), out=out[:0])
    with pytest.raises(PredictionError, match="gave 2 channels, expected at least 3"):
        predict_array(voxelwise, image, patch=(8, 8, 8), out=out, classes=[0, 2])
    with pytest.raises(ConfigError, match=r"expected uint8 \(classes, 8, 8, 8\)"):
        predict_array(voxelwise, image, patch=(8, 8, 8), out=out[:, :4])
    with pytest.raises(PredictionError, match="gave 2 channels, expected 3"):
        predict_array(voxelwise, image, patch=(8, 8, 8), out=np.zeros((3, 8, 8, 8), np.uint8))
    with pytest.raises(PredictionError, match=r"expected \(B, C, z, y, x\)"):
        predict_array(lambda x: x[..., ::2], image, patch=(8, 8, 8), out=out)
    with pytest.raises(ConfigError, match=r"predict.overlap 1\.0"):
        predict_array(voxelwise, image, patch=(8, 8, 8), overlap=1.0, out=out)
    with pytest.raises(ConfigError, match="allowed: gaussian, constant"):
        predict_array(voxelwise, image, patch=(8, 8, 8), out=out, blending="linear")


@pytest.mark.parametrize("context", [0, 5, 64])
@pytest.mark.parametrize("shape", [(1796, 1500, 2400), (2400, 1796, 1500)])
def test_columns_cost_few_windows_also_where_there_is_image_around(shape: tuple[int, ...], context: int) -> None:
    plans = make_plans(shape, (128,) * 3, 0.5, context=[(context, context)] * 3, voxel_nm=(8, 8, 8))
    whole = count_windows(plans, ((0, 0, 0), shape3(shape)))
    for memory_gb, more in ((8, 1.06), (4, 1.13)):
        boxes = columns(plans, 14, 64, 1, (128, 128), memory_gb, 64)
        assert all(estimate_bytes(plans, box, 14, 64, 1, 64) <= memory_gb * 1e9 for box in boxes)
        assert sum(count_windows(plans, box) for box in boxes) <= more * whole
