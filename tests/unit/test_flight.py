import json
import shutil
import stat
import sys
import time
import zipfile
from pathlib import Path

import cc3d
import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from submission_case import (
    SHAPE,
    TRANSLATION,
    VOXEL,
    rewrite,
    set_attributes,
    set_meta,
    volumes_of,
    write,
    write_manifest,
    zipped,
)

from cellmap_pipe.evaluation import flight
from cellmap_pipe.evaluation.chunk_components import component_sizes
from cellmap_pipe.evaluation.container import open_container
from cellmap_pipe.evaluation.flight import unanswered, validate
from cellmap_pipe.evaluation.flight_content import scan
from cellmap_pipe.evaluation.manifest import read_manifest


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("submission")
    for crop in (1, 2):
        for label, values in volumes_of(crop).items():
            write(path / "good.zarr", f"crop{crop}/{label}", values)
    write_manifest(path / "manifest.csv")
    return path


@pytest.fixture
def good(template, tmp_path):
    """A faultless submission of two crops, and its manifest."""
    return shutil.copytree(template, tmp_path / "submission")


def ids(n):
    """Return n objects of one voxel each, ids wrapped into uint8."""
    values = np.zeros(int(np.prod(SHAPE)), np.uint32)
    values[: 2 * n : 2] = np.arange(1, n + 1)
    return values.reshape(SHAPE).astype(np.uint8)


def speckle():
    values = np.zeros(SHAPE, np.uint16)
    values[::2, ::2, ::2] = 1
    return values


def as_group(root):
    shutil.rmtree(root / "crop1/er")
    write(root, "crop1/er/s0", volumes_of(1)["er"])
    (root / "crop1/er/.zgroup").write_text('{"zarr_format": 2}')


def as_v3(root):
    shutil.rmtree(root / "crop1/er")
    write(root, "crop1/er", volumes_of(1)["er"], zarr_format=3)


def damage(root):
    chunk = next(path for path in sorted((root / "crop1/er").rglob("*")) if path.name[0].isdigit() and path.is_file())
    chunk.write_bytes(b"\x00broken")


def cut_short(root):
    """Write a chunk of fewer voxels than the array's chunks have."""
    values = np.ones((6, 12, 12), np.uint8)
    codec = numcodecs.get_codec(json.loads((root / "crop1/er/.zarray").read_text())["compressor"])
    (root / "crop1/er/0.0.0").write_bytes(bytes(codec.encode(values)))


def rename_separator(root):
    for chunk in sorted((root / "crop1/er").glob("[0-9]*")):
        z, y, x = chunk.name.split(".")
        (root / "crop1/er" / z / y).mkdir(parents=True, exist_ok=True)
        chunk.rename(root / "crop1/er" / z / y / x)


def below_a_folder(root):
    (root / "upload").mkdir()
    for crop in ("crop1", "crop2"):
        (root / crop).rename(root / "upload" / crop)


def shrink(root):
    """Leave a chunk behind that the array, made smaller, has no place for."""
    (root / "crop1/er/9.0.0").write_bytes((root / "crop1/er/0.0.0").read_bytes())


HALF = [TRANSLATION[0] - VOXEL[0] / 2, *TRANSLATION[1:]]
FAULTS = {
    "missing crop": lambda r: shutil.rmtree(r / "crop2"),
    "extra crop": lambda r: write(r, "crop9/er", volumes_of(1)["er"]),
    "missing label": lambda r: shutil.rmtree(r / "crop1/er"),
    "extra label": lambda r: write(r, "crop1/pm", volumes_of(1)["er"]),
    "duplicated crop": lambda r: shutil.copytree(r / "crop1", r / "1"),
    "crop under another name": lambda r: (r / "crop1").rename(r / "1"),
    "group instead of array": as_group,
    "not zarr v2": as_v3,
    "wrong voxel size": lambda r: set_attributes(r, "crop1/er", voxel_size=[5, 8, 8]),
    "wrong resolution level": lambda r: set_attributes(r, "crop1/er", voxel_size=[8, 16, 16]),
    "voxel size in the order (x, y, z)": lambda r: set_attributes(r, "crop1/er", voxel_size=VOXEL[::-1]),
    "no voxel size": lambda r: set_attributes(r, "crop1/er", voxel_size=None),
    "wrong shape": lambda r: rewrite(r, "crop1/er", np.ones((24, 20, 21), np.uint8)),
    "shape in the order (x, y, z)": lambda r: rewrite(r, "crop1/er", np.ones(SHAPE[::-1], np.uint8)),
    "not three-dimensional": lambda r: rewrite(r, "crop1/er", np.ones((24, 20), np.uint8)),
    "wrong translation": lambda r: set_attributes(r, "crop1/er", translation=[14.0, 100.5, 200.0]),
    "translation off by half a voxel": lambda r: set_attributes(r, "crop1/er", translation=HALF),
    "translation in the order (x, y, z)": lambda r: set_attributes(r, "crop1/er", translation=TRANSLATION[::-1]),
    "no translation": lambda r: set_attributes(r, "crop1/er", translation=None),
    "attribute shape differs": lambda r: set_attributes(r, "crop1/er", shape=[1, 2, 3]),
    "unreadable attributes": lambda r: set_attributes(r, "crop1/er", voxel_size=7),
    "unreadable array": lambda r: (r / "crop1/er/.zarray").write_text("{"),
    "dtype that wraps ids": lambda r: rewrite(r, "crop1/mito", ids(300)),
    "float probabilities": lambda r: rewrite(r, "crop1/er", np.full(SHAPE, 0.3, np.float32)),
    "float labels": lambda r: rewrite(r, "crop1/er", np.ones(SHAPE, np.float32)),
    "mask of 0 and 255": lambda r: rewrite(r, "crop1/er", volumes_of(1)["er"] * 255),
    "ids in a semantic class": lambda r: rewrite(r, "crop1/er", volumes_of(1)["mito"]),
    "NaN or infinity": lambda r: rewrite(r, "crop1/er", np.full(SHAPE, np.nan, np.float32)),
    "negative values": lambda r: rewrite(r, "crop1/mito", -volumes_of(1)["mito"].astype(np.int16)),
    "unusable dtype": lambda r: rewrite(r, "crop1/er", np.ones(SHAPE, complex)),
    "fill value is not 0": lambda r: set_meta(r, "crop1/er", fill_value=1),
    "damaged chunk": damage,
    "chunks of another separator": rename_separator,
    "files that are no chunks": shrink,
    "crops inside a folder": below_a_folder,
    "attributes that disagree": lambda r: set_attributes(r, "crop1/er", resolution=[8, 8, 8]),
    "ids above 2^32": lambda r: rewrite(r, "crop1/mito", volumes_of(1)["mito"].astype(np.uint64) << 32),
    "empty group of classes": lambda r: rewrite(r, "crop1/mito", np.zeros(SHAPE, np.uint16)),
    "too many instances": lambda r: rewrite(r, "crop1/nuc", speckle()),
    "one blob": lambda r: rewrite(r, "crop1/mito", np.ones(SHAPE, np.uint16)),
    "all empty": lambda r: rewrite(r, "crop1/er", np.zeros(SHAPE, np.uint8)),
    "leaf outside its group": lambda r: rewrite(r, "crop1/mito", np.roll(volumes_of(1)["mito"], 4, 2)),
}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"voxel_size": [0, 0, 0]}, "wrong voxel size"),
        ({"voxel_size": [float("nan"), 8, 8]}, "wrong voxel size"),
        ({"voxel_size": [-8, -16, -16]}, "wrong voxel size"),
        ({"translation": [float("nan")] * 3}, "wrong translation"),
        ({"voxel_size": [10**400, 8, 8]}, "unreadable attributes"),
        ({"shape": 4}, "attribute shape differs"),
        ([1, 2], "unreadable array"),
    ],
)
def test_attributes_of_any_kind_are_a_problem_of_their_array_alone(good, changes, fault):
    path = good / "good.zarr/crop1/er/.zattrs"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes if isinstance(changes, dict) else changes))
    assert [(p.array, p.fault) for p in validate(good / "good.zarr", good / "manifest.csv")] == [("crop1/er", fault)]


def test_an_array_that_cannot_be_checked_does_not_stop_the_others(good):
    set_meta(good / "good.zarr", "crop1/mito", chunks=[0, 4, 4])
    set_attributes(good / "good.zarr", "crop2/er", shape=[1])
    problems = validate(good / "good.zarr", good / "manifest.csv")
    assert {(p.array, p.fault) for p in problems} >= {
        ("crop1/mito", "unreadable array"),
        ("crop2/er", "attribute shape differs"),
    }


def test_a_faultless_submission_has_no_problem(good):
    assert validate(good / "good.zarr", good / "manifest.csv") == []


def test_each_fault_says_what_to_do_in_one_line(good):
    """All faults at once that can be together in one submission."""
    root = good / "good.zarr"
    for fault in ("damaged chunk", "extra label", "missing crop", "dtype that wraps ids", "attributes that disagree"):
        FAULTS[fault](root)
    problems = validate(root, good / "manifest.csv")
    assert {p.severity for p in problems} == {"error", "warning"}
    assert [p.severity for p in problems] == sorted(p.severity for p in problems)
    for problem in problems:
        assert str(problem) == f"{problem.array}: {problem.fault}: {problem.detail}; {problem.remedy}"
        assert "\n" not in str(problem)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ({"order": "F"}, "<u2"),
        ({"filters": [numcodecs.Delta(dtype="<u2")]}, "<u2"),
        ({"filters": [numcodecs.Shuffle(2)], "compressors": None}, "<u2"),
        ({"compressors": numcodecs.GZip()}, ">u2"),
        ({"compressors": numcodecs.Blosc("lz4"), "chunk_key_encoding": {"name": "v2", "separator": "/"}}, "<u4"),
        ({"chunks": (1, 20, 22)}, "<i8"),
    ],
)
def test_layouts_of_zarr_v2_are_read_rightly(good, layout, dtype):
    root, values = good / "good.zarr", volumes_of(1)["mito"]
    shutil.rmtree(root / "crop1/mito")
    settings = {"chunks": (10, 12, 14), "fill_value": 0, "zarr_format": 2} | layout
    array = zarr.create_array(root / "crop1/mito", shape=values.shape, dtype=np.dtype(dtype), **settings)
    array[:] = values
    array.attrs.update({"voxel_size": VOXEL, "translation": TRANSLATION})
    assert np.array_equal(open_container(root).array("crop1", "mito")[:], values)
    assert validate(root, good / "manifest.csv") == []


def test_chunks_of_a_wrong_size_are_damaged(good):
    cut_short(good / "good.zarr")
    problems = validate(good / "good.zarr", good / "manifest.csv")
    assert [(p.array, p.fault) for p in problems] == [("crop1/er", "damaged chunk")]
    assert "crop1/er/0.0.0" in problems[0].detail


@pytest.mark.parametrize("meta", [{"zarr_format": 3}, {"order": "K"}, {"chunks": [4, 4]}, {"dimension_separator": "-"}])
def test_metadata_of_no_zarr_v2_are_named(good, meta):
    set_meta(good / "good.zarr", "crop1/er", **meta)
    (problem,) = validate(good / "good.zarr", good / "manifest.csv")
    assert (problem.array, problem.fault) == ("crop1/er", "unreadable array")
    assert "crop1/er/.zarray" in problem.detail


def test_an_empty_class_is_a_warning_only_where_most_validation_crops_have_it(good):
    root = good / "good.zarr"
    FAULTS["all empty"](root)
    (known,) = validate(root, good / "manifest.csv", presence={"er": (24, 30)})
    assert (known.severity, known.fault) == ("warning", "all empty") and "24 of 30 validation crops" in known.detail
    (rare,) = validate(root, good / "manifest.csv", presence={"er": (3, 30)})
    assert rare.severity == "note"
    (unknown,) = validate(root, good / "manifest.csv", presence={"mito": (1, 30)})
    assert unknown.severity == "warning"


def test_classes_without_a_voxel_in_any_crop_are_unanswered(good):
    root, rows = good / "good.zarr", read_manifest(good / "manifest.csv")
    rewrite(root, "crop1/er", np.zeros(SHAPE, np.uint8))
    shutil.rmtree(root / "crop1/nuc")
    assert unanswered(validate(root, good / "manifest.csv"), rows) == []
    rewrite(root, "crop2/er", np.zeros(SHAPE, np.uint8))
    assert unanswered(validate(root, good / "manifest.csv", presence={"er": (1, 30)}), rows) == ["er"]
    shutil.rmtree(root / "crop2")
    assert unanswered(validate(root, good / "manifest.csv"), rows) == ["er", "nuc"]
    (root / "crop1").rename(root / "1")
    assert unanswered(validate(root, good / "manifest.csv"), rows) == ["er", "nuc"]


def test_a_group_without_a_voxel_is_named_with_the_classes_that_are_in_it(good):
    FAULTS["empty group of classes"](good / "good.zarr")
    found = {p.fault: p for p in validate(good / "good.zarr", good / "manifest.csv")}
    assert set(found) == {"all empty", "empty group of classes"}
    problem = found["empty group of classes"]
    assert problem.array == "crop1/mito" and "mito_mem" in problem.detail


def test_classes_are_compared_with_groups_of_other_chunks(good):
    root = good / "good.zarr"
    mito = volumes_of(1)["mito"]
    for shift, faults in ((0, []), (4, ["leaf outside its group"])):
        shutil.rmtree(root / "crop1/mito")
        attributes = {"voxel_size": VOXEL, "translation": TRANSLATION}
        array = zarr.create_array(
            root / "crop1/mito", shape=SHAPE, chunks=(24, 5, 22), dtype="uint16", zarr_format=2, attributes=attributes
        )
        array[:] = np.roll(mito, shift, 2)
        assert [p.fault for p in validate(root, good / "manifest.csv")] == faults


def test_one_blob_may_have_dust_about_it(good):
    values = np.ones(SHAPE, np.uint16)
    values[4:7, 4:7, 4:7] = 0
    values[5, 5, 5] = 1
    rewrite(good / "good.zarr", "crop1/nuc", values)
    assert [p.fault for p in validate(good / "good.zarr", good / "manifest.csv")] == ["one blob"]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_components_of_stored_chunks_are_those_of_the_whole_array(tmp_path_factory, data):
    shape = data.draw(st.tuples(*[st.integers(1, 13)] * 3))
    chunks = data.draw(st.tuples(*[st.integers(1, 6)] * 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    values = rng.integers(1, 3, shape) * (rng.random(shape) < data.draw(st.sampled_from([0.02, 0.1, 0.4])))
    root = tmp_path_factory.mktemp("components")
    array = zarr.create_array(
        root / "a", shape=shape, chunks=chunks, dtype=data.draw(st.sampled_from(["u1", "u2", ">u4"])), zarr_format=2
    )
    array[:] = values
    stored = open_container(root).array("", "a")
    sizes = component_sizes(stored, scan(stored).chunks)
    whole = cc3d.statistics(cc3d.connected_components(values.astype(np.uint32)))["voxel_counts"][1:]
    assert sorted(sizes.tolist()) == sorted(whole.tolist())


def test_progress_counts_the_crops(good):
    told = []
    validate(good / "good.zarr", good / "manifest.csv", progress=lambda *counts: told.append(counts))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_fault_is_found_by_name(good, fault):
    FAULTS[fault](good / "good.zarr")
    problems = validate(good / "good.zarr", good / "manifest.csv", workers=1)
    found = [problem for problem in problems if problem.fault == fault]
    assert found, [str(problem) for problem in problems]
    assert all(problem.array and problem.remedy for problem in problems)


def dust_beside_an_object():
    values = speckle()
    values[:10, :10, :10] = 2
    return values


@pytest.mark.parametrize(
    ("fault", "values", "severity"),
    [
        ("dtype that wraps ids", ids(300), "error"),
        ("dtype that wraps ids", ids(255), "warning"),  # as many as there are ids: there may have been no more
        ("too many instances", dust_beside_an_object(), "error"),
        ("too many instances", speckle(), "warning"),  # all are small: the objects may be
    ],
)
def test_what_may_be_sound_is_a_warning(good, fault, values, severity):
    rewrite(good / "good.zarr", "crop1/nuc", values)
    problems = validate(good / "good.zarr", good / "manifest.csv")
    assert [p.severity for p in problems if (p.array, p.fault) == ("crop1/nuc", fault)] == [severity]


def fake_zip(path, *, extra=None, link=False, root=None):
    zipped(root).rename(path)
    if extra is not None:
        info = zipfile.ZipInfo(extra)
        info.external_attr = ((stat.S_IFLNK if link else stat.S_IFREG) | 0o644) << 16
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(info, "x")
    return path


@pytest.mark.parametrize(
    ("extra", "link", "fault"),
    [
        ("crop1\\er\\.zarray", False, "backslashes in the zip"),
        ("/etc/evil", False, "absolute path in the zip"),
        ("crop1/../../evil", False, "path with '..' in the zip"),
        ("crop1/link", True, "symbolic link in the zip"),
        ("./", False, "member that is the root"),
        ("./crop1/er/.zarray", False, "duplicated member"),
    ],
)
def test_unsafe_zip_members_are_found(good, extra, link, fault):
    path = fake_zip(good / "bad.zip", extra=extra, link=link, root=good / "good.zarr")
    assert fault in {problem.fault for problem in validate(path, good / "manifest.csv")}


def test_a_folder_that_holds_one_zip_is_checked_like_the_zip(good):
    (good / "upload").mkdir()
    fake_zip(good / "upload/bad.zip", extra="crop1/../../evil", root=good / "good.zarr")
    faults = {problem.fault for problem in validate(good / "upload", good / "manifest.csv")}
    assert "path with '..' in the zip" in faults


def test_zip_bombs_and_files_that_are_no_zip_are_found(good, monkeypatch):
    path = fake_zip(good / "good.zip", root=good / "good.zarr")
    assert validate(path, good / "manifest.csv", workers=2) == []
    monkeypatch.setattr(flight, "MAX_UNCOMPRESSED", 1000)
    assert [problem.fault for problem in validate(path, good / "manifest.csv")] == ["zip too large"]
    assert "folder too large" in {problem.fault for problem in validate(good / "good.zarr", good / "manifest.csv")}
    (good / "text.zip").write_text("hello")
    assert [problem.fault for problem in validate(good / "text.zip", good / "manifest.csv")] == [
        "unreadable submission"
    ]


def test_members_of_one_fault_are_counted_in_one_line(good):
    path = good / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(1000):
            archive.writestr(f"/crop1/{i}", "x")
    found = [p for p in validate(path, good / "manifest.csv") if p.fault == "absolute path in the zip"]
    assert len(found) == 1 and "1000 such" in found[0].detail


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_several_zarr_folders_or_zips_are_named(good, kind):
    (good / "upload").mkdir()
    for name in ("a", "b"):
        if kind == "folder":
            shutil.copytree(good / "good.zarr", good / "upload" / f"{name}.zarr")
        else:
            fake_zip(good / "upload" / f"{name}.zip", root=good / "good.zarr")
    (problem,) = validate(good / "upload", good / "manifest.csv")
    assert problem.fault == ("several zarr folders" if kind == "folder" else "several zip files")


def test_a_submission_that_is_not_there_is_one_clear_line(good):
    (problem,) = validate(good / "absent.zip", good / "manifest.csv")
    assert problem.fault == "unreadable submission" and "there is no such submission" in problem.detail


def test_sparse_giants_are_checked_without_making_their_chunks(tmp_path):
    root = tmp_path / "big.zarr"
    shape = [4000, 4000, 4000]
    array = zarr.create_array(
        root / "crop1/er", shape=shape, chunks=(64, 64, 64), dtype="uint8", zarr_format=2, fill_value=0
    )
    array[:64, :64, :64] = 1
    array.attrs.update({"voxel_size": VOXEL, "translation": TRANSLATION})
    write_manifest(tmp_path / "m.csv", ["1"], ["er"], (VOXEL, TRANSLATION, shape))
    begin = time.process_time()
    assert validate(root, tmp_path / "m.csv") == []
    assert time.process_time() - begin < 5
