import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from label_case import annotation, blob, plain_array, write_crop

from cellmap_pipe.errors import DataError
from cellmap_pipe.prepare.label_map import build_label_map
from cellmap_pipe.prepare.labels import (
    ABSENT,
    PRESENT,
    UNKNOWN,
    LabelReader,
    empty_means,
    is_empty,
    label_states,
    read_label,
)

# --- states of stored values


def test_semantic_values_are_absent_present_or_unknown():
    states, counts = label_states(np.array([0, 1, 255, 7], np.uint8), annotation("semantic"))
    assert states.tolist() == [ABSENT, PRESENT, UNKNOWN, PRESENT]
    assert counts == {"present": 2, "absent": 1, "unknown": 1}


@pytest.mark.parametrize("unknown,state", [(0, PRESENT), (3, UNKNOWN)])
def test_255_is_an_ordinary_id_unless_some_voxels_are_said_to_be_unknown(unknown, state):
    values = np.array([0, 1, 255, 256], np.uint16)
    states, _ = label_states(values, annotation("instance", "mito", absent=1, unknown=unknown))
    assert states.tolist() == [ABSENT, PRESENT, state, PRESENT]


def test_missing_metadata_leave_the_kind_to_the_class():
    values = np.array([0, 255], np.uint8)
    assert label_states(values, annotation(name="pm"))[0].tolist() == [ABSENT, UNKNOWN]
    assert label_states(values, annotation(name="mito"))[0].tolist() == [ABSENT, PRESENT]
    assert label_states(values, {})[0].tolist() == [ABSENT, UNKNOWN]


def test_a_semantic_array_of_an_instance_class_keeps_255_for_unknown():
    assert label_states(np.array([2, 255], np.uint8), annotation("semantic", "mito"))[0].tolist() == [PRESENT, UNKNOWN]
    assert label_states(np.array([2, 255], np.uint8), annotation("instance", "pm"))[0].tolist() == [PRESENT, PRESENT]


def test_counts_and_encoding_may_stand_at_the_array_or_at_its_group(tmp_path, ngff):
    values = np.array([0, 1, 255, 256], np.uint16).reshape(1, 1, 4)
    stated = annotation("instance", "vim", absent=1, unknown=1)["cellmap"]["annotation"]
    ngff(tmp_path / "vim", values, (4, 4, 4), (0, 0, 0), annotation=stated)
    assert label_states(values, read_label(tmp_path / "vim").attributes)[0].ravel().tolist() == [0, 1, 2, 1]
    (tmp_path / "vim" / "s0" / ".zattrs").unlink()  # as in crop247
    assert label_states(values, read_label(tmp_path / "vim").attributes)[0].ravel().tolist() == [0, 1, 2, 1]
    array = read_label(ngff(tmp_path / "array" / "vim", values, (4, 4, 4), (0, 0, 0), annotation=stated))
    (tmp_path / "array/vim/.zattrs").write_text((tmp_path / "vim/.zattrs").read_text().replace("cellmap", "other"))
    assert read_label(tmp_path / "array/vim").attributes == array.attributes
    del stated["complement_counts"]
    ngff(tmp_path / "without" / "vim", values, (4, 4, 4), (0, 0, 0), annotation=stated)
    assert label_states(values, read_label(tmp_path / "without/vim").attributes)[0].ravel().tolist() == [0, 1, 1, 1]


def test_another_unknown_value_is_taken_from_the_encoding():
    attributes = annotation("semantic")
    attributes["cellmap"]["annotation"]["annotation_type"]["encoding"]["unknown"] = 2
    assert label_states(np.array([2, 255, 1], np.uint8), attributes)[0].tolist() == [UNKNOWN, PRESENT, PRESENT]


@pytest.mark.parametrize(
    "content",
    [
        {"annotation_type": "semantic_segmentation"},
        {"annotation_type": {"encoding": ["absent"]}},
        {"annotation_type": {"type": "instance_segmentation"}, "complement_counts": [1, 2]},
    ],
)
def test_metadata_of_the_wrong_kind_are_passed_over(content):
    states, _ = label_states(np.array([0, 1], np.uint8), {"cellmap": {"annotation": content}})
    assert states.tolist() == [ABSENT, PRESENT]


def test_an_unknown_value_that_is_no_number_is_named():
    attributes = annotation("semantic")
    attributes["cellmap"]["annotation"]["annotation_type"]["encoding"]["unknown"] = "none"
    with pytest.raises(DataError, match=r"encoding\.unknown 'none' is not a number"):
        label_states(np.zeros(1, np.uint8), attributes)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int64, np.uint64])
def test_every_integer_dtype_and_bool_is_read(dtype):
    assert label_states(np.array([0, 1], dtype), {})[0].tolist() == [ABSENT, PRESENT]


def test_other_dtypes_and_negative_values_are_refused():
    with pytest.raises(DataError, match="dtype float32"):
        label_states(np.zeros(3, np.float32), {})
    with pytest.raises(DataError, match="negative value -4"):
        label_states(np.array([0, -4], np.int16), {})


# --- masks


@pytest.mark.parametrize("form", ["group", 2, 3])
def test_a_class_is_unknown_where_its_mask_is_0(tmp_path, ngff, form):
    volume, mask = blob((9, 10, 11), (0, 0, 0), (9, 10, 5)), blob((9, 10, 11), (0, 0, 3), (9, 10, 8))
    if form == "group":
        ngff(tmp_path / "pm_mask", mask, (4, 4, 4), (0, 0, 0), levels=2)
    else:
        plain_array(tmp_path / "pm_mask", mask.astype(bool), form)
    pm, ecs = write_crop(ngff, tmp_path, {"pm": volume, "ecs": np.zeros_like(volume)})
    assert sorted(pm.levels) == ["pm", "pm_mask"] and list(ecs.levels) == ["ecs"] and ecs.mask is None
    values, states = LabelReader(pm).read((0, 0, 0), (9, 10, 11))
    assert states[4, 4].tolist() == [UNKNOWN] * 3 + [PRESENT] * 2 + [ABSENT] * 3 + [UNKNOWN] * 3
    assert values[4, 4].tolist() == [0] * 3 + [1] * 2 + [0] * 6
    result = build_label_map([pm, ecs], pm.level.lattice, ["pm", "ecs"], valid=None, max_upsample=1)
    assert np.array_equal(result.table[result.rows][..., 0], states)
    assert result.source_counts["pm"] == {"present": 180, "absent": 270, "unknown": 540}


def test_an_array_with_nothing_outside_its_mask_is_empty(tmp_path, ngff):
    volume = blob((9, 9, 9), (8, 8, 8), (9, 9, 9))
    assert not is_empty(*write_crop(ngff, tmp_path, {"pm": volume}))
    plain_array(tmp_path / "pm_mask", 1 - volume)
    assert is_empty(read_label(tmp_path / "pm"))


def test_a_mask_on_other_voxels_or_of_another_kind_is_refused_by_name(tmp_path, ngff):
    write_crop(ngff, tmp_path, dict.fromkeys(["pm", "ecs", "nuc", "er"], np.ones((4, 4, 4), np.uint8)))
    plain_array(tmp_path / "pm_mask", np.ones((4, 4, 5), np.uint8))
    with pytest.raises(DataError, match=r"pm_mask: shape \[4, 4, 5\]; \[4, 4, 4\] is expected") as error:
        read_label(tmp_path / "pm")
    assert str(tmp_path / "pm" / "s0") in str(error.value)
    ngff(tmp_path / "ecs_mask", np.ones((4, 4, 4), np.uint8), (8, 8, 8), (0, 0, 0))
    with pytest.raises(DataError, match=r"ecs_mask/s0: the mask has .* of 8 x 8 x 8 nm .*ecs/s0 .* of 4 x 4 x 4 nm"):
        read_label(tmp_path / "ecs")
    ngff(tmp_path / "nuc_mask", np.ones((4, 4, 4), np.uint8), (4, 4, 4), (0, 0, 4))
    with pytest.raises(DataError, match="from 0 x 0 x 4 nm"):
        read_label(tmp_path / "nuc")
    plain_array(tmp_path / "er_mask", np.ones((4, 4, 4), np.float32))
    with pytest.raises(DataError, match="a mask of dtype float32"):
        read_label(tmp_path / "er")


# --- empty arrays


def test_what_an_empty_array_means_is_set_for_the_crop_before_the_class_before_all():
    labels = {"empty": "absent", "empty_by_class": {"nuc": "unknown"}, "empty_by_crop": {"a/crop1": "absent"}}
    assert empty_means(labels, "a/crop2", "pm") == "absent"
    assert empty_means(labels, "a/crop2", "nuc") == "unknown"
    assert empty_means(labels, "a/crop1", "nuc") == "absent"
    assert empty_means({"empty": "unknown", "empty_by_crop": {"crop1": "absent"}}, "a/crop1", "pm") == "absent"


def test_empty_arrays_are_recognised(tmp_path, ngff):
    crop = write_crop(
        ngff, tmp_path, {"pm": blob((9, 9, 9), (8, 8, 8), (9, 9, 9)), "ecs": np.zeros((9, 9, 9), np.uint8)}
    )
    assert [is_empty(label) for label in crop] == [False, True]
