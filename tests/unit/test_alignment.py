import numpy as np
import pytest

from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation import alignment, match_geometry


def ball(n, ids=1):
    z, y, x = np.ogrid[:n, :n, :n]
    return (((z - n / 2) ** 2 + (y - n / 2) ** 2 + (x - n / 2) ** 2) < (n / 3) ** 2).astype(np.uint8) * ids


def test_same_geometry_is_returned_as_it_is():
    pred = np.random.default_rng(0).random((6, 6, 6)).astype(np.float32)
    result = match_geometry(pred, "er", (4, 4, 4), (10, 10, 10), (4, 4, 4), (6, 6, 6), (10, 10, 10))
    assert result is pred
    clean = match_geometry(pred, "er", (4, 4, 4), (10, 10, 10), (4, 4, 4), (6, 6, 6), (10, 10, 10), rules="clean")
    assert np.array_equal(clean, pred > 0.5)


def test_official_shift_is_one_short_for_targets_off_the_grid_and_clean_is_not():
    pred = np.ones((4, 4, 4), np.uint8)
    target = ((4, 4, 4), (6, 4, 4), (103.5, 0, 0))
    official = match_geometry(pred, "er", (4, 4, 4), (107.5, 0, 0), *target)
    clean = match_geometry(pred, "er", (4, 4, 4), (107.5, 0, 0), *target, rules="clean")
    assert np.flatnonzero(official.any((1, 2))).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(clean.any((1, 2))).tolist() == [1, 2, 3, 4]


def test_negative_offsets_crop_and_far_ones_give_background():
    pred = np.arange(1, 28, dtype=np.uint8).reshape(3, 3, 3)
    moved = match_geometry(pred, "mito", (2, 2, 2), (-2, 0, 2), (2, 2, 2), (3, 3, 3), (0, 0, 0))
    assert np.array_equal(moved[:2, :, 1:], pred[1:, :, :2])
    assert not moved[2].any() and not moved[:, :, 0].any()
    far = match_geometry(pred, "mito", (2, 2, 2), (90, 0, 0), (2, 2, 2), (3, 3, 3), (0, 0, 0))
    assert not far.any()


def test_unknown_voxel_size_is_centred_with_the_odd_voxel_above():
    pred = np.ones((3, 2, 6), np.uint8)
    result = match_geometry(pred, "er", None, None, (4, 4, 4), (4, 5, 3), (0, 0, 0))
    assert np.flatnonzero(result.any((1, 2))).tolist() == [0, 1, 2]
    assert np.flatnonzero(result.any((0, 2))).tolist() == [1, 2]
    assert result.shape == (4, 5, 3) and result[0, 1].all()


def test_clean_resampling_keeps_what_touches_the_border_and_aligns_edges():
    coarse = np.ones((4, 4, 4), np.uint8)
    coarse[1:3, 1:3, 1:3] = 0
    target = ((4, 4, 4), (8, 8, 8), (-2, -2, -2))
    official = match_geometry(coarse, "er", (8, 8, 8), (0, 0, 0), *target)
    clean = match_geometry(coarse, "er", (8, 8, 8), (0, 0, 0), *target, rules="clean")
    assert clean[0, 0, 0] and clean[7, 7, 7]
    assert not official[0, 0, 0] and not official[7, 7, 7]


def test_instance_ids_survive_resampling():
    pred = ball(12).astype(np.uint16)
    pred[:6] *= 300
    result = match_geometry(pred, "mito", (4, 4, 4), (0, 0, 0), (2, 2, 2), (24, 24, 24), (-1, -1, -1), rules="clean")
    assert result.dtype == np.uint16
    assert np.array_equal(result, pred.repeat(2, 0).repeat(2, 1).repeat(2, 2))


def test_large_official_volumes_get_seams_and_clean_ones_do_not(monkeypatch):
    monkeypatch.setattr(alignment, "BLOCKWISE_VOXELS", 1000)
    monkeypatch.setattr(alignment, "BLOCK", 9)  # odd, as 297 is: every block loses half a voxel
    pred = np.ones((20, 20, 20), np.uint8)
    target = ((4, 4, 4), (10, 10, 10), (1, 1, 1))
    official = match_geometry(pred, "mito", (2, 2, 2), (0, 0, 0), *target)
    clean = match_geometry(pred, "mito", (2, 2, 2), (0, 0, 0), *target, rules="clean")
    assert np.flatnonzero(~official.any((1, 2))).tolist() == [8]
    assert clean.all()


@pytest.mark.parametrize(
    ("pred", "fault"),
    [
        (np.zeros((4, 4), np.uint8), "three axes"),
        (np.zeros((0, 4, 4), np.uint8), "none empty"),
        (np.zeros((40, 40, 40), np.uint8), "4096"),
    ],
)
def test_predictions_that_cannot_be_aligned_are_refused(pred, fault):
    with pytest.raises(DataError, match=fault):
        match_geometry(pred, "er", (1, 1, 1), (0, 0, 0), (16, 16, 16), (2, 2, 2), (0, 0, 0))
