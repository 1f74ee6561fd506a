"""The sliding window: exact blending, bounded memory, edges, columns, and what it refuses."""

import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import cellmap_pipe.prediction
from cellmap_pipe.errors import ConfigError, DataError
from cellmap_pipe.prediction.plan import Box, axis_windows, columns, estimate_bytes, make_plan, planes_needed
from cellmap_pipe.prediction.sliding_window import ArraySource, PredictionError, chunk_shape, predict_array, stream

torch.set_num_threads(1)


def image_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


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


Network = Callable[[torch.Tensor], torch.Tensor]


def new_zarr(path: Path, shape: tuple[int, ...], chunks: tuple[int, ...]) -> zarr.Array:
    return zarr.create_array(str(path), shape=shape, chunks=chunks, dtype="uint8", zarr_format=2)


def direct_sum(
    network: Network, image: np.ndarray, patch: tuple[int, ...], overlap: float, blending: str
) -> np.ndarray:
    """The definition: sum over windows of weight times probability over the sum of weights, in float64, unquantised."""
    starts = [axis_windows(n, p, overlap, blending).starts for n, p in zip(image.shape, patch, strict=True)]
    pad = [(max(0, -s[0]), max(0, s[-1] + p - n)) for s, p, n in zip(starts, patch, image.shape, strict=True)]
    padded = np.pad(image, pad, mode="reflect")
    profile = [np.exp(-0.5 * ((np.arange(p) - (p - 1) / 2) / (p / 8)) ** 2) for p in patch]
    if blending == "constant":
        profile = [np.ones(p) for p in patch]
    weight = profile[0][:, None, None] * profile[1][:, None] * profile[2]
    total, result = np.zeros(padded.shape), None
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                box = tuple(
                    slice(s + before, s + before + p) for s, (before, _), p in zip((z, y, x), pad, patch, strict=True)
                )
                with torch.no_grad():
                    logits = network(torch.from_numpy(padded[box].astype(np.float32) / np.float32(255))[None, None])
                p = torch.sigmoid(logits[0].double()).numpy()
                if result is None:
                    result = np.zeros((len(p), *padded.shape))
                result[(slice(None), *box)] += p * weight
                total[box] += weight
    inner = tuple(slice(before, before + n) for (before, _), n in zip(pad, image.shape, strict=True))
    assert result is not None
    return (result[(slice(None), *inner)] / total[inner]) * 255


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
    assert np.abs(out - direct_sum(network, image, patch, overlap, blending)).max() <= 1.0


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
    plan = make_plan(image.shape, (16, 16, 16), 0.5)
    whole = np.zeros((2, 40, 40, 40), np.uint8)
    predict_array(network, image, patch=(16, 16, 16), out=whole)
    cut = np.full_like(whole, 255)
    table = (np.arange(256) / 255).astype(np.float32)
    source, device = ArraySource(image), torch.device("cpu")
    lower = [(0, 0, 0), (8, 0, 0), (8, 0, 8), (8, 24, 0)]
    upper = [(8, 40, 40), (40, 24, 8), (40, 24, 40), (40, 40, 40)]
    for box in zip(lower, upper, strict=True):
        (_, y0, x0), (_, y1, x1) = box
        for first, last, piece in stream(
            network, source, plan, box, channels=[0, 1], depth=8, normalise=table, device=device
        ):
            assert first % 8 == 0 and (last % 8 == 0 or last == 40)
            cut[:, first:last, y0:y1, x0:x1] = piece
    np.testing.assert_array_equal(cut, whole)


def test_memory_limit_cuts_columns_without_changing_the_result(tmp_path: Path) -> None:
    image, network = image_of((24, 64, 64)), Position((16, 16, 16), 3)
    whole = np.zeros((3, 24, 64, 64), np.uint8)
    predict_array(network, image, patch=(16, 16, 16), out=whole)
    out = new_zarr(tmp_path / "out", whole.shape, (1, 8, 16, 16))
    plan = make_plan(image.shape, (16, 16, 16), 0.5)
    limit = 0.75 * estimate_bytes(plan, ((0, 0, 0), image.shape), 3, 8, 1) / 1e9
    boxes = columns(plan, 3, 8, 1, (16, 16), limit)
    assert len(boxes) > 1
    assert all(corner % 16 == 0 for box in boxes for corner in box[0])
    assert sum((b[1] - a[1]) * (b[2] - a[2]) for a, b in boxes) == 64 * 64
    predict_array(network, image, patch=(16, 16, 16), out=out, memory_gb=limit)
    np.testing.assert_array_equal(out[:], whole)


def test_an_array_without_chunks_is_cut_quickly_and_without_changing_the_result() -> None:
    image = image_of((4, 512, 512))
    whole, cut = np.zeros((2, 4, 512, 512), np.uint8), np.zeros((2, 4, 512, 512), np.uint8)
    predict_array(voxelwise, image, patch=(4, 64, 64), out=whole)
    plan = make_plan(image.shape, (4, 64, 64), 0.5)
    limit = 0.5 * estimate_bytes(plan, ((0, 0, 0), image.shape), 2, 64, 1) / 1e9
    assert len(columns(plan, 2, 64, 1, (chunk_shape(cut)[1], chunk_shape(cut)[2]), limit)) > 1
    begin = time.perf_counter()
    columns(make_plan((4096, 4096, 4096), (128, 128, 128), 0.5), 14, 64, 1, (64, 64), 2)
    assert time.perf_counter() - begin < 2
    predict_array(voxelwise, image, patch=(4, 64, 64), out=cut, memory_gb=limit)
    assert np.abs(cut.astype(int) - whole).max() <= 1


@pytest.mark.parametrize("share", [0.15, 0.3, 0.6, 0.9])
def test_columns_are_the_cut_with_the_fewest_windows_that_fits(share: float) -> None:
    plan = make_plan((40, 150, 210), (16, 16, 24), 0.5)

    def need(box: Box) -> int:
        return estimate_bytes(plan, box, 3, 16, 1)

    def windows(boxes: list[Box]) -> int:
        return sum(len(plan[1].touching(a[1], b[1])) * len(plan[2].touching(a[2], b[2])) for a, b in boxes)

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
    chosen = columns(plan, 3, 16, 1, (16, 16), limit / 1e9)
    assert max(map(need, chosen)) <= limit
    assert windows(chosen) == min(fitting)


def test_what_the_source_holds_counts_as_memory() -> None:
    plan = make_plan((64, 64, 64), (16, 16, 16), 0.5)
    box: Box = ((0, 0, 0), (64, 64, 64))
    held = estimate_bytes(plan, box, 1, 64, 1, held=64) - estimate_bytes(plan, box, 1, 64, 1)
    assert held == 2 * 64 * 64 * 64


def test_a_resumed_run_gives_the_same_bits() -> None:
    """Three rows over a voxel in the rest of the axis, four in all of it: the carry must be of one type."""
    image, network = image_of((213, 8, 8)), Position((128, 8, 8), 1)
    plan = make_plan(image.shape, (128, 8, 8), 0.5)
    table = (np.arange(256) / 255).astype(np.float32)

    def run(lower: int) -> np.ndarray:
        pieces = stream(
            network,
            ArraySource(image),
            plan,
            ((lower, 0, 0), (213, 8, 8)),
            channels=[0],
            normalise=table,
            device=torch.device("cpu"),
        )
        return np.concatenate([piece.copy() for _, _, piece in pieces], axis=1)

    np.testing.assert_array_equal(run(128), run(0)[:, 128:])
    rows = plan[0].touching(128, 213)
    assert planes_needed(plan[0], rows, 85, 64).carry_type == planes_needed(plan[0], [0, 1, 2], 213, 64).carry_type


def test_bfloat16_logits_are_not_rounded_once_more() -> None:
    image, out = image_of((8, 8, 8)), np.zeros((1, 8, 8, 8), np.uint8)

    def network(x: torch.Tensor) -> torch.Tensor:
        return (8 * x - 4).bfloat16()

    predict_array(network, image, patch=(8, 8, 8), out=out)
    expected = torch.sigmoid(network(torch.from_numpy(image / np.float32(255))).float()).numpy() * 255
    assert np.abs(out[0] - expected).max() <= 0.51


def test_too_little_memory_says_how_much_would_do() -> None:
    with pytest.raises(ConfigError, match=r"predict.memory_gb 1e-05 is too little .* at least [\d.]+ GB"):
        columns(make_plan((64, 64, 64), (16, 16, 16), 0.5), 3, 64, 1, (64, 64), 1e-5)


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
    plans = [make_plan((n, 32, 32), (16, 16, 16), 0.5) for n in (64, 512)]
    needs = [estimate_bytes(plan, ((0, 0, 0), (plan[0].size, 32, 32)), 2, 32, 1) for plan in plans]
    assert needs[0] == needs[1]


def test_context_is_used_instead_of_reflection() -> None:
    """Windows of a small volume reach into the image around it; the answer then depends on what really lies there."""
    big = image_of((24, 24, 24))

    class Shifted:
        def read(self, lower: tuple[int, ...], upper: tuple[int, ...]) -> tuple[np.ndarray, None]:
            return big[tuple(slice(a + 8, b + 8) for a, b in zip(lower, upper, strict=True))], None

    plan = make_plan((8, 8, 8), (16, 16, 16), 0.5, context=((8, 8),) * 3)
    assert [axis.starts for axis in plan] == [(-4,)] * 3
    mean = torch.nn.AvgPool3d(5, stride=1, padding=2)
    pieces = stream(
        lambda x: torch.logit(mean(x).clamp(1e-4, 1 - 1e-4)),
        Shifted(),
        plan,
        ((0, 0, 0), (8, 8, 8)),
        channels=[0],
        normalise=(np.arange(256) / 255).astype(np.float32),
        device=torch.device("cpu"),
    )
    (first, last, out) = next(pieces)
    assert (first, last) == (0, 8)
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
    assert np.abs(out - direct_sum(network, image, (1, 16, 16), 0.5, "gaussian")).max() <= 1


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
