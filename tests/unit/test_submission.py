import csv
import json
import shutil
import stat
import time
import zipfile

import numpy as np
import pytest
import zarr

from cellmap_pipe.errors import ConfigError, ContractError
from cellmap_pipe.evaluation import flight
from cellmap_pipe.evaluation.container import open_container
from cellmap_pipe.evaluation.manifest import read_manifest
from cellmap_pipe.evaluation.official import score_submission
from cellmap_pipe.evaluation.submission import pack, validate

VOXEL = [4.0, 8.0, 8.0]
TRANSLATION = [10.0, 100.5, 200.0]
SHAPE = [24, 20, 22]
LABELS = ["mito", "mito_mem", "nuc", "er"]


def write(root, name, values, zarr_format=2, **attributes):
    values = np.asarray(values)
    array = zarr.create_array(
        root / name,
        shape=values.shape,
        chunks=(12,) * values.ndim,
        dtype=values.dtype,
        zarr_format=zarr_format,
        fill_value=0,
    )
    array[:] = values
    array.attrs.update({"voxel_size": VOXEL, "translation": TRANSLATION, **attributes})


def volumes_of(seed):
    """Return what is segmented: two mitochondria with membrane, a nucleus, some er."""
    rng = np.random.default_rng(seed)
    mito = np.zeros(SHAPE, np.uint16)
    mito[2:9, 2:9, 2:9] = 1
    mito[12:20, 10:18, 3:12] = 2
    membrane = (mito > 0).astype(np.uint8)
    membrane[3:8, 3:8, 3:8] = 0
    nucleus = np.zeros(SHAPE, np.uint16)
    nucleus[15:, 12:, 15:] = 1
    return {"mito": mito, "mito_mem": membrane, "nuc": nucleus, "er": (rng.random(SHAPE) > 0.8).astype(np.uint8)}


def write_manifest(path, crops=("1", "2"), labels=LABELS, geometry=(VOXEL, TRANSLATION, SHAPE)):
    with open(path, "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["crop_name", "dataset", "class_label", "voxel_size", "translation", "shape"])
        texts = ["[" + ";".join(map(str, vector)) + "]" if vector else "" for vector in geometry]
        table.writerows([crop, "jrc_x", label, *texts] for crop in crops for label in labels)
    return path


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


def segmentation(root, crops=(1, 2), labels=LABELS, lattice=(VOXEL, TRANSLATION, SHAPE), status="ok"):
    """Write segmentations as the workflow does and return their JSON."""
    records = []
    for crop in crops:
        record = {
            "name": f"jrc_x/crop{crop}",
            "dataset": "jrc_x",
            "status": status,
            "cause": "" if status == "ok" else "EM",
        }
        record["target"] = dict(zip(("voxel_nm", "translation_nm", "shape"), lattice, strict=True))
        if status == "ok":
            record |= {"path": f"volumes/jrc_x_crop{crop}.zarr", "classes": list(labels)}
            for label in labels:
                write(root / "volumes", f"jrc_x_crop{crop}.zarr/{label}/s0", volumes_of(crop)[label])
        records.append(record)
    path = root / "test.json"
    path.write_text(json.dumps({"model": "ensemble", "fold": "all", "subset": "test", "records": records}))
    return path


def rewrite(root, name, values, **attributes):
    shutil.rmtree(root / name)
    write(root, name, values, **attributes)


def set_attributes(root, name, **changes):
    path = root / name / ".zattrs"
    attributes = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in attributes.items() if value is not None}))


def set_meta(root, name, **changes):
    path = root / name / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
    set_meta(good / "good.zarr", "crop1/mito", fill_value={})
    set_attributes(good / "good.zarr", "crop2/er", shape=[1])
    problems = validate(good / "good.zarr", good / "manifest.csv")
    assert {(p.array, p.fault) for p in problems} >= {
        ("crop1/mito", "unreadable array"),
        ("crop2/er", "attribute shape differs"),
    }


def test_a_faultless_submission_has_no_problem(good):
    assert validate(good / "good.zarr", good / "manifest.csv") == []


@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_fault_is_found_by_name(good, fault):
    FAULTS[fault](good / "good.zarr")
    problems = validate(good / "good.zarr", good / "manifest.csv", workers=1)
    found = [problem for problem in problems if problem.fault == fault]
    assert found, [str(problem) for problem in problems]
    assert all(problem.array and problem.remedy for problem in problems)


def fake_zip(path, *, extra=None, link=False, root=None):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(root))
        if extra is not None:
            info = zipfile.ZipInfo(extra)
            info.external_attr = ((stat.S_IFLNK if link else stat.S_IFREG) | 0o644) << 16
            archive.writestr(info, "x")
    return path


@pytest.mark.parametrize(
    ("extra", "link", "fault"),
    [
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
    (good / "text.zip").write_text("hello")
    assert [problem.fault for problem in validate(good / "text.zip", good / "manifest.csv")] == [
        "unreadable submission"
    ]


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


def test_packed_submission_answers_every_row_and_passes_the_check(tmp_path):
    manifest = write_manifest(tmp_path / "manifest.csv", ["1", "2", "3"], [*LABELS, "pm"])
    pack(segmentation(tmp_path), manifest, tmp_path / "s.zip", tmp_path / "report.json", rules="csc-2026.06", workers=2)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["problems"] == [] and report["warnings"] == []
    assert report["rows"] == 15
    empty = ["crop1/pm", "crop2/pm", *(f"crop3/{label}" for label in sorted([*LABELS, "pm"]))]
    assert report["zero_rows"] == report["not_predicted"] == empty
    container = open_container(tmp_path / "s.zip")
    for crop in (1, 2):
        for label, values in volumes_of(crop).items():
            array = container.array(f"crop{crop}", label)
            assert np.array_equal(array[:], values)
            assert array.attributes == {"voxel_size": VOXEL, "translation": TRANSLATION, "shape": SHAPE}
            assert array.dtype == (np.uint16 if label in ("mito", "nuc") else np.uint8)
    assert not container.array("crop3", "mito")[:].any()


def test_packed_zip_is_plain_zarr_v2_and_scores_like_the_segmentation(tmp_path):
    manifest = write_manifest(tmp_path / "manifest.csv")
    source = segmentation(tmp_path)
    pack(source, manifest, tmp_path / "s.zip", tmp_path / "report.json")
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        archive.extractall(tmp_path / "s.zarr")
    group = zarr.open_group(tmp_path / "s.zarr", mode="r", zarr_format=2)
    assert np.array_equal(group["crop1/mito"][:], volumes_of(1)["mito"])
    truth = tmp_path / "truth.zarr"
    for crop in (1, 2):
        for label, values in volumes_of(crop + 5).items():
            write(truth, f"crop{crop}/{label}", values)
    assert score_submission(tmp_path / "s.zip", truth)["records"] == score_submission(source, truth)["records"]


def test_same_input_gives_the_same_bytes(tmp_path):
    manifest, source = write_manifest(tmp_path / "manifest.csv"), segmentation(tmp_path)
    for name, workers in (("a", 1), ("b", 3)):
        pack(source, manifest, tmp_path / f"{name}.zip", tmp_path / f"{name}.json", workers=workers)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_groups_are_formed_from_their_parts(tmp_path):
    mito = volumes_of(1)["mito"]
    record = {
        "name": "jrc_x/crop1",
        "dataset": "jrc_x",
        "status": "ok",
        "cause": "",
        "path": "v.zarr",
        "classes": ["mito_mem", "mito_lum", "mito_ribo", "golgi_mem", "golgi_lum", "er_mem", "er_mem_all"],
        "approximate": {"er_mem_all": ["eres_mem", "ne_mem"]},
        "target": {"voxel_nm": VOXEL, "translation_nm": TRANSLATION, "shape": SHAPE},
    }
    write(tmp_path, "v.zarr/mito_mem/s0", mito == 1)
    write(tmp_path, "v.zarr/mito_lum/s0", (mito == 2).astype(np.uint8))
    write(tmp_path, "v.zarr/golgi_mem/s0", (mito == 1).astype(np.uint8))
    write(tmp_path, "v.zarr/golgi_lum/s0", (mito == 2).astype(np.uint8))
    for label in ("mito_ribo", "er_mem", "er_mem_all"):
        write(tmp_path, f"v.zarr/{label}/s0", np.zeros(SHAPE, np.uint8))
    (tmp_path / "test.json").write_text(json.dumps({"records": [record]}))
    manifest = write_manifest(tmp_path / "manifest.csv", ["1"], ["mito", "golgi", "er", "er_mem_all"])
    pack(tmp_path / "test.json", manifest, tmp_path / "s.zip", tmp_path / "report.json")
    container = open_container(tmp_path / "s.zip")
    assert np.array_equal(container.array("crop1", "golgi")[:], (mito > 0).astype(np.uint8))
    assert np.array_equal(container.array("crop1", "mito")[:], mito)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["not_predicted"] == ["crop1/er"]
    assert report["approximate"] == {"crop1/er_mem_all": ["eres_mem", "ne_mem"]}


def test_other_voxels_are_resampled_to_the_manifest_once(tmp_path):
    """Twice the voxel, same box: nearest ids and edges aligned."""
    geometry = ([2.0, 4.0, 4.0], [9.0, 98.5, 198.0], [48, 40, 44])
    manifest = write_manifest(tmp_path / "manifest.csv", ["1"], ["mito", "nuc"], geometry)
    pack(segmentation(tmp_path, [1]), manifest, tmp_path / "s.zip", tmp_path / "report.json")
    stored = open_container(tmp_path / "s.zip").array("crop1", "mito")
    assert np.array_equal(stored[:], volumes_of(1)["mito"].repeat(2, 0).repeat(2, 1).repeat(2, 2))
    assert json.loads((tmp_path / "report.json").read_text())["problems"] == []


def test_rows_without_label_or_geometry_take_them_from_the_segmentation(tmp_path):
    manifest = write_manifest(tmp_path / "manifest.csv", ["1"], [""], ("", "", ""))
    pack(segmentation(tmp_path, [1]), manifest, tmp_path / "s.zip", tmp_path / "report.json", classes=["ecs"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["rows"], report["not_predicted"], report["problems"]) == (5, ["crop1/ecs"], [])


def test_failed_volumes_become_zeros_and_broken_contracts_are_named(tmp_path):
    manifest = write_manifest(tmp_path / "manifest.csv", ["1"])
    failed = segmentation(tmp_path, [1], status="failed")
    pack(failed, manifest, tmp_path / "s.zip", tmp_path / "report.json")
    assert len(json.loads((tmp_path / "report.json").read_text())["zero_rows"]) == 4
    source = segmentation(tmp_path, [1])
    shutil.rmtree(tmp_path / "volumes/jrc_x_crop1.zarr/er")
    (tmp_path / "s.zip").unlink()
    with pytest.raises(ContractError, match="er: missing; run again with -R segment"):
        pack(source, manifest, tmp_path / "s.zip", tmp_path / "report.json")
    assert not (tmp_path / "s.zip").exists()


def test_failed_volumes_still_give_their_rows_a_geometry(tmp_path):
    manifest = write_manifest(tmp_path / "manifest.csv", ["1"], ["er"], ("", "", ""))
    source = segmentation(tmp_path, [1], status="failed")
    pack(source, manifest, tmp_path / "s.zip", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["zero_rows"], report["problems"]) == (["crop1/er"], [])
    content = json.loads(source.read_text())
    del content["records"][0]["target"]
    source.write_text(json.dumps(content))
    pack(source, manifest, tmp_path / "s.zip", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"] == 0 and "crop1: no geometry" in report["problems"][0]


def test_ids_beyond_uint16_are_kept(tmp_path):
    source = segmentation(tmp_path, [1])
    big = volumes_of(1)["mito"].astype(np.uint32) * 70_000
    rewrite(tmp_path / "volumes", "jrc_x_crop1.zarr/mito/s0", big)
    pack(source, write_manifest(tmp_path / "m.csv", ["1"]), tmp_path / "s.zip", tmp_path / "r.json")
    array = open_container(tmp_path / "s.zip").array("crop1", "mito")
    assert array.dtype == np.uint32 and np.array_equal(array[:], big)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a,b\n1,2\n", "columns"),
        ("crop_name,class_label,voxel_size,translation,shape\n1,er,[4;4],[0;0;0],[4;4;4]\n", "line 2"),
        ("crop_name,class_label,voxel_size,translation,shape\n1,er,[4;4;x],[0;0;0],[4;4;4]\n", "line 2"),
    ],
)
def test_unusable_manifests_are_refused(tmp_path, text, fault):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ConfigError, match=fault):
        read_manifest(tmp_path / "m.csv")
