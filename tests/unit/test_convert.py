import hashlib
import json
import shutil
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.errors import CellmapError, ConfigError, ContractError
from cellmap_pipe.files import check_file, digest
from cellmap_pipe.prepare import convert, em, nifti
from cellmap_pipe.prepare import instances as instances_module
from cellmap_pipe.prepare import label_map as label_map_module
from cellmap_pipe.prepare import labels as labels_module
from cellmap_pipe.prepare.convert import bulk_paths, convert_shard, instance_path, scratch_arrays, shard_of
from cellmap_pipe.prepare.crops import write_crops
from cellmap_pipe.prepare.nifti import read_nifti, write_nifti
from cellmap_pipe.prepare.state_table import decode_table
from cellmap_pipe.verify import verify_results

CLASSES = ["pm", "mito", "nuc"]
RNG = np.random.default_rng(3)
EM = RNG.integers(60, 200, (24, 24, 24)).astype(np.uint8)
LABELS = RNG.integers(0, 2, (16, 16, 16)).astype(np.uint8)


@pytest.fixture
def project(tmp_path, ngff):
    """A dataset with EM of 8 nm and three crops of 4 nm labels, and a function that converts it."""
    zarr_root = tmp_path / "data/jrc_a/jrc_a.zarr"
    ngff(zarr_root / "em", EM, (8, 8, 8), (0, 0, 0), levels=2)
    for number, offset in ((1, 0), (2, 64), (3, 0)):
        for name in ("pm", "nuc"):
            volume = LABELS if name == "pm" else np.zeros_like(LABELS)
            ngff(zarr_root / f"gt/crop{number}" / name, volume, (4, 4, 4), [offset - 2] * 3)
    return Project(tmp_path)


class Project:
    def __init__(self, folder):
        self.folder, self.gt, self.nifti = folder, folder / "data/jrc_a/jrc_a.zarr/gt", folder / "nifti"

    def crop(self, number):
        return self.gt / f"crop{number}"

    def convert(self, em_path="em", **changes):
        data = {"root": str(self.folder / "data"), "labels_path": "gt", "em_path": em_path, "crops": None}
        write_crops(data, self.folder / "crops.csv")
        arguments = {
            "data_root": data["root"],
            "shard": 0,
            "shards": 1,
            "grid_name": "8nm",
            "voxel_nm": [8, 8, 8],
            "classes": CLASSES,
            "labels": {"empty": "absent"},
            "max_upsample": 4,
            "nifti_dir": self.nifti,
            "workers": 1,
        } | changes
        convert_shard(self.folder / "crops.csv", self.folder / "shard.json", **arguments)
        contract = json.loads((self.folder / "shard.json").read_text())
        return {record["crop"].split("/")[1]: record for record in contract["records"]}

    def files(self):
        return {str(p.relative_to(self.nifti)): p.read_bytes() for p in sorted(self.nifti.rglob("*")) if p.is_file()}


def test_a_crop_becomes_an_aligned_pair_and_a_record(project):
    record = project.convert()["crop1"]
    assert record["status"] == "ok" and record["em_level"] == {
        "path": "s0",
        "voxel_nm": [8, 8, 8],
        "factors": [1, 1, 1],
    }
    assert record["lattice"] == {"voxel_nm": [8, 8, 8], "translation_nm": [0, 0, 0], "shape": [8, 8, 8]}
    assert record["annotated"] == ["pm", "nuc"] and record["label_dtype"] == "uint8"
    paths = bulk_paths(project.nifti, "jrc_a/crop1")
    assert np.array_equal(read_nifti(paths["image"]), EM[:8, :8, :8])
    table = decode_table(record["table"], 3)
    state = table[read_nifti(paths["label"])]
    half = LABELS.reshape(8, 2, 8, 2, 8, 2).mean(axis=(1, 3, 5)) >= 0.5
    assert np.array_equal(state[..., 0], half.astype(np.uint8))
    assert np.array_equal(state[..., 1], np.where(half, 0, 2)) and not state[..., 2].any()
    n = int(half.sum())
    assert record["counts"]["mito"] == {"present": 0, "absent": n, "unknown": 512 - n}
    assert record["source_counts"]["pm"] == {
        "present": int(LABELS.sum()),
        "absent": int((1 - LABELS).sum()),
        "unknown": 0,
    }
    assert sum(record["em_stats"]["histogram"]) == 512 and record["em_valid_fraction"] == 1
    assert record["em_stats"]["mean"] == pytest.approx(EM[:8, :8, :8].mean(), abs=1e-4)
    assert json.loads(paths["record"].read_text()) == record


def test_converting_again_gives_the_same_bytes_by_any_number_of_workers(project):
    project.convert()
    first, contract = project.files(), (project.folder / "shard.json").read_bytes()
    assert contract.count(b"time") == 0
    shutil.rmtree(project.nifti)
    project.convert(workers=2)
    assert project.files() == first and (project.folder / "shard.json").read_bytes() == contract


def test_the_results_of_this_version_are_pinned(project):
    """Library code triggers no rerun: whoever changes a result raises its version and pins the new digest."""
    record = project.convert()["crop2"]
    paths = bulk_paths(project.nifti, "jrc_a/crop2")
    content = read_nifti(paths["image"]).tobytes() + read_nifti(paths["label"]).tobytes()
    pinned = {3: "bc03f758d168b383"}
    assert (
        digest([hashlib.sha256(content).hexdigest(), record["table"], record["counts"]])[:16]
        == pinned[RESULT_VERSIONS["convert"]]
    )


def test_only_what_is_missing_or_changed_is_converted(project, ngff, monkeypatch):
    project.convert()
    converted = []
    original = convert.build_label_map
    monkeypatch.setattr(
        convert,
        "build_label_map",
        lambda labels, *a, **k: converted.append(labels[0].level.path) or original(labels, *a, **k),
    )
    project.convert()
    assert converted == []
    bulk_paths(project.nifti, "jrc_a/crop1")["label"].unlink()
    ngff(project.crop(2) / "mito", LABELS[::-1].copy(), (4, 4, 4), [62] * 3)
    (project.crop(3) / "pm/s0/0/0/0").write_bytes((project.crop(3) / "pm/s0/1/0/0").read_bytes())
    project.convert()
    assert sorted(path.split("/")[-3] for path in converted) == ["crop1", "crop2", "crop3"]
    converted.clear()
    project.convert(max_upsample=3)
    assert len(converted) == 3


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def wrong_dtype(path, ngff):
    shutil.rmtree(path)
    ngff(path, LABELS.astype(np.float32), (4, 4, 4), (0, 0, 0))


@pytest.mark.parametrize(
    "harm,kind,cause",
    [
        (lambda crop, ngff: truncate(crop / "pm/s0/1/0/1"), "unreadable", "crop2/pm/s0/1/0/1: damaged chunk"),
        (lambda crop, ngff: (crop / "pm/.zattrs").unlink(), "unreadable", "crop2/pm: no .zattrs"),
        (lambda crop, ngff: wrong_dtype(crop / "nuc", ngff), "unreadable", "crop2/nuc/s0: labels of dtype float32"),
        (lambda crop, ngff: [shutil.rmtree(crop / name) for name in ("pm", "nuc")], "unannotated", "nothing annotated"),
        (
            lambda crop, ngff: (crop / "nuc/s0/.zarray").write_text("{"),
            "unreadable",
            "nuc/s0/.zarray: cannot be read as JSON",
        ),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_crop_is_recorded_and_the_others_go_on(project, ngff, harm, kind, cause, workers):
    project.convert()  # a good pair is there already: it must not outlive the fault
    harm(project.crop(2), ngff)
    records = project.convert(workers=workers)
    assert {name: record["status"] for name, record in records.items()} == {
        "crop1": "ok",
        "crop2": "failed",
        "crop3": "ok",
    }
    assert cause in records["crop2"]["cause"] and "\n" not in records["crop2"]["cause"]
    assert records["crop2"]["kind"] == kind and records["crop1"]["kind"] == ""
    assert records["crop2"]["files"] == {} and records["crop2"]["instances"] == {}
    left = [name for name in project.files() if "crop2" in name]
    assert left == ["records/jrc_a_crop2.json"] and not any(".partial" in name for name in project.files())


def test_missing_and_damaged_em_fail_their_crops_only(project, tmp_path):
    truncate(tmp_path / "data/jrc_a/jrc_a.zarr/em/s0/1/1/1")
    records = project.convert()
    assert records["crop1"]["status"] == "ok" and "em/s0/1/1/1: damaged chunk" in records["crop2"]["cause"]
    shutil.rmtree(tmp_path / "data/jrc_a/jrc_a.zarr/em")
    records = project.convert()
    assert all("no such image group" in record["cause"] for record in records.values())
    assert {record["kind"] for record in records.values()} == {"EM not downloaded"}
    assert records["crop1"]["label_lattice"]["shape"] == [16, 16, 16]


def test_em_that_was_not_downloaded_leaves_everything_unknown(project, tmp_path):
    for level in ("s0", "s1"):
        shutil.rmtree(tmp_path / f"data/jrc_a/jrc_a.zarr/em/{level}/0")
    record = project.convert()["crop1"]
    assert record["status"] == "ok" and record["em_valid_fraction"] == 0 and record["em_inside_fraction"] == 1
    assert record["counts"]["pm"] == {"present": 0, "absent": 0, "unknown": 512}
    assert record["source_counts"]["pm"]["present"] == int(LABELS.sum())
    assert record["em_stats"]["max"] == 0 and sum(record["em_stats"]["histogram"]) == 0


def test_complement_counts_that_are_no_mapping_are_passed_over(project):
    path = project.crop(1) / "nuc" / ".zattrs"
    attributes = json.loads(path.read_text())
    attributes["cellmap"] = {"annotation": {"complement_counts": [1], "annotation_type": "semantic"}}
    path.write_text(json.dumps(attributes))
    assert project.convert()["crop1"]["status"] == "ok"


def test_a_label_box_beyond_the_em_is_unknown_there(project, ngff):
    ngff(project.crop(4) / "pm", np.ones((16, 16, 16), np.uint8), (4, 4, 4), (-2, -2, 158))
    record = project.convert()["crop4"]
    assert record["em_inside_fraction"] == record["em_valid_fraction"] == 0.5
    assert record["counts"]["pm"] == {"present": 256, "absent": 0, "unknown": 256}


def test_empty_arrays_are_absent_or_unknown_as_set(project):
    assert project.convert()["crop1"]["counts"]["nuc"]["absent"] == 512
    unknown = project.convert(labels={"empty": "absent", "empty_by_crop": {"jrc_a/crop1": "unknown"}})
    assert unknown["crop1"]["annotated"] == ["pm"] and unknown["crop3"]["annotated"] == ["pm", "nuc"]
    assert unknown["crop1"]["source_counts"]["nuc"] == {"present": 0, "absent": 0, "unknown": 4096}
    assert unknown["crop1"]["counts"]["nuc"]["unknown"] > 0
    by_class = project.convert(labels={"empty": "unknown", "empty_by_class": {"nuc": "absent"}})
    assert all(record["annotated"] == ["pm", "nuc"] for record in by_class.values())


def test_a_class_that_is_not_configured_still_excludes(project):
    records = project.convert(classes=["ecs"])
    assert records["crop1"]["annotated"] == ["pm", "nuc"] and records["crop1"]["counts"]["ecs"]["absent"] > 0
    assert set(project.convert(classes=["nuc"])["crop1"]["source_counts"]) == {"nuc"}


def test_the_native_grid_is_the_labels_own(project):
    record = project.convert(grid_name="native", voxel_nm="native")["crop1"]
    assert record["lattice"] == record["label_lattice"] and record["em_level"]["factors"] == [0.5] * 3
    with pytest.raises(ConfigError, match=r"grids\.x\.voxel_nm: 'fine'"):
        project.convert(grid_name="x", voxel_nm="fine")


def test_a_grid_too_fine_for_the_data_fails_with_the_reason(project):
    records = project.convert(voxel_nm=[1, 1, 1])
    assert all("would be upsampled 8.00 times" in record["cause"] for record in records.values())
    assert all(record["kind"] == "resolution mismatch" for record in records.values())


def test_a_crop_over_the_budget_is_not_read_and_leaves_no_file(project, monkeypatch):
    project.convert()
    monkeypatch.setattr(convert, "read_em", None)  # nothing may ask for it
    records = project.convert(max_train_gb=1e-6, context_nm=64)
    assert {record["kind"] for record in records.values()} == {"too large for the memory budget"}
    # 8^3 voxels with 8 of context on every side, image and labels: 2 x 24^3 bytes
    assert "take 2.76e-05 GB with their context, quality.max_train_gb is 1e-06" in records["crop1"]["cause"]
    assert not list((project.nifti / "images").glob("*.nii.gz"))


def test_every_crop_has_one_owner_that_deletes_what_is_no_longer_listed(project):
    shards = 3
    for shard in range(shards):
        project.convert(shard=shard, shards=shards)
    owner = shard_of("jrc_a/crop2", shards)
    assert len([name for name in project.files() if "crop2" in name]) == 3
    shutil.rmtree(project.crop(2))
    stale = project.nifti / "images/.partial-0123abc-jrc_a_crop2_0000.nii.gz"
    stale.write_bytes(b"half")
    project.convert(shard=(owner + 1) % shards, shards=shards)
    assert stale.exists() and len([name for name in project.files() if "crop2" in name]) == 4
    project.convert(shard=owner, shards=shards)
    assert not any("crop2" in name for name in project.files())
    assert len(project.files()) == 6


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_of_the_environment_is_raised_after_the_others_have_finished(project, monkeypatch, workers):
    def full(path, *arguments, **options):
        if "crop1" in str(path):
            raise OSError(28, "No space left on device")
        return write_nifti(path, *arguments, **options)

    monkeypatch.setattr(convert, "write_nifti", full)
    with pytest.raises(CellmapError, match=r"jrc_a/crop1: OSError: .*No space left"):
        project.convert(workers=workers)
    assert not (project.folder / "shard.json").exists()
    assert {name for name in project.files() if name.startswith("records")} == {
        "records/jrc_a_crop2.json",
        "records/jrc_a_crop3.json",
    }


IDS = np.kron(np.array([[[0, 7], [300, 0]], [[7, 0], [0, 70000]]]), np.ones((8, 8, 8), int))


def test_instance_ids_are_kept_on_the_grid(project, ngff):
    ngff(project.crop(1) / "mito", IDS.astype(np.uint32), (4, 4, 4), [-2] * 3)
    ngff(project.crop(2) / "mito", np.minimum(IDS, 300).astype(np.uint16), (4, 4, 4), [62] * 3)
    records = project.convert()
    assert records["crop1"]["instances"] == {"mito": 3} and records["crop3"]["instances"] == {}
    assert list(records["crop1"]["files"]) == ["image", "instances/mito", "label"]
    path = instance_path(project.nifti, "jrc_a/crop1", "mito")
    assert path.relative_to(project.nifti).as_posix() == records["crop1"]["files"]["instances/mito"]["path"]
    ids = read_nifti(path)
    assert ids.dtype == np.uint32 and np.array_equal(ids, IDS[::2, ::2, ::2])
    assert read_nifti(instance_path(project.nifti, "jrc_a/crop2", "mito")).dtype == np.uint16


def test_instance_files_go_with_what_they_were_made_of(project, ngff, tmp_path):
    def instances():
        return [name for name in project.files() if name.startswith("instances/")]

    ngff(project.crop(1) / "mito", IDS.astype(np.uint32), (4, 4, 4), [-2] * 3)
    project.convert()
    assert instances() == ["instances/jrc_a_crop1_mito.nii.gz"]
    project.convert(classes=["pm", "nuc"])
    assert instances() == []
    project.convert()
    (project.nifti / "instances/.partial-0123abc-jrc_a_crop1_mito.nii.gz").write_bytes(b"half")
    truncate(project.crop(1) / "mito/s0/1/1/1")
    assert project.convert()["crop1"]["status"] == "failed" and instances() == []
    shutil.rmtree(project.crop(1) / "mito")
    ngff(project.crop(1) / "mito", IDS.astype(np.uint32), (4, 4, 4), [-2] * 3)
    project.convert()
    shutil.rmtree(project.crop(1))
    project.convert()
    assert not any("crop1" in name for name in project.files())


def test_verification_compares_the_instance_files_too(project, ngff, tmp_path):
    ngff(project.crop(1) / "mito", IDS.astype(np.uint32), (4, 4, 4), [-2] * 3)
    project.nifti = tmp_path / "nifti/8nm"
    project.convert()
    (tmp_path / "convert/8nm").mkdir(parents=True)
    (project.folder / "shard.json").rename(tmp_path / "convert/8nm/shard0.json")
    assert verify_results(tmp_path) == 1
    path = instance_path(project.nifti, "jrc_a/crop1", "mito")
    path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(ContractError, match=r"crop1_mito\.nii\.gz: damaged"):
        verify_results(tmp_path)


def flip(content):
    harmed = bytearray(content)
    harmed[len(harmed) // 2] ^= 0xFF
    return bytes(harmed)


def test_a_mask_that_changes_converts_its_crop_anew(project, ngff):
    before = project.convert()
    ngff(project.crop(1) / "pm_mask", np.zeros_like(LABELS), (4, 4, 4), [-2] * 3)
    after = project.convert()
    assert after["crop1"]["annotated"] == ["pm", "nuc"]
    assert after["crop1"]["counts"]["pm"]["present"] == 0 < before["crop1"]["counts"]["pm"]["present"]
    assert after["crop2"] == before["crop2"]


def test_a_run_that_was_killed_half_way_leaves_no_record_of_the_files_that_were_there(project, monkeypatch):
    before = project.convert()["crop1"]

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "_write_instances", killed)
        with pytest.raises(KeyboardInterrupt):
            project.convert(classes=["nuc", "pm", "mito"])
    label = bulk_paths(project.nifti, "jrc_a/crop1")["label"]
    label.write_bytes(label.read_bytes().ljust(before["files"]["label"]["size"], b"\0"))  # as large as it was
    assert project.convert()["crop1"] == before
    check_file(before["files"]["label"], project.nifti, "", full=True)


def test_a_withdrawn_array_that_is_gone_leaves_the_record(project):
    labels = {"empty": "unknown"}
    assert "nuc" in project.convert(labels=labels)["crop1"]["source_counts"]
    shutil.rmtree(project.crop(1) / "nuc")
    record = project.convert(labels=labels)["crop1"]
    assert "nuc" not in record["source_counts"] and record["warnings"] == []


def test_the_record_names_the_em_that_crops_csv_names(project):
    project.convert()
    root = project.gt.parent
    (root / "em").rename(root / "other")
    assert project.convert(em_path="other")["crop1"]["em"] == "jrc_a/jrc_a.zarr/other"


def test_contradictions_are_no_warnings(project, ngff):
    ngff(project.crop(1) / "mito", np.zeros_like(LABELS), (4, 4, 4), [-2] * 3)
    ngff(project.crop(1) / "mito_mem", LABELS, (4, 4, 4), [-2] * 3)
    record = project.convert(classes=[*CLASSES, "mito_mem"])["crop1"]
    assert any("mito_mem" in text for text in record["contradictions"])
    assert not set(record["contradictions"]) & set(record["warnings"])


def test_crops_in_scratch_files_give_the_same_bytes_and_leave_none(project, monkeypatch):
    project.convert()
    first = project.files()
    shutil.rmtree(project.nifti)
    monkeypatch.setattr(convert, "SCRATCH_BYTES", 0)
    project.convert()
    assert project.files() == first


def test_scratch_arrays_have_no_name(tmp_path, monkeypatch):
    scratch = scratch_arrays(tmp_path / "images", "a.nii.gz")
    assert not isinstance(scratch((2, 3, 4), np.uint16), np.memmap)
    monkeypatch.setattr(convert, "SCRATCH_BYTES", 47)
    volume = scratch((2, 3, 4), np.uint16)
    assert isinstance(volume, np.memmap) and volume.shape == (2, 3, 4) and not volume.any()
    volume[1] = 5
    assert volume.sum() == 60 and list((tmp_path / "images").iterdir()) == []


def test_memory_does_not_grow_with_the_crop(project, ngff, monkeypatch):
    shape = (384, 64, 64)
    labels = np.zeros(shape, np.uint8)
    labels[::7, ::5] = 1
    shutil.rmtree(project.folder / "data/jrc_a/jrc_a.zarr/em")
    ngff(project.folder / "data/jrc_a/jrc_a.zarr/em", labels * 50, (8, 8, 8), (0, 0, 0), chunks=(8, 64, 64))
    for number in (1, 2, 3):
        shutil.rmtree(project.crop(number))
    for name in ("pm", "mito", "nuc"):
        ngff(project.crop(1) / name, labels, (4, 4, 4), (0, 0, 0), chunks=(8, 64, 64))
    for module, name, value in (
        (convert, "SCRATCH_BYTES", 2**16),
        (em, "SLAB_VOXELS", 2**15),
        (labels_module, "SLAB_VOXELS", 2**15),
        (label_map_module, "SLAB_VOXELS", 2**14),
        (instances_module, "SLAB_VOXELS", 2**15),
        (nifti, "_MEMBER_BYTES", 2**16),
        (nifti, "_READ_BYTES", 2**16),
    ):
        monkeypatch.setattr(module, name, value)
    certificate = SimpleNamespace(to_dict=dict)  # it needs memory of its own, whatever the crop's size
    monkeypatch.setattr(convert, "register", lambda *arguments, **options: certificate)
    tracemalloc.start()
    try:
        record = project.convert(voxel_nm=[4, 4, 4])["crop1"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert record["status"] == "ok" and record["counts"]["pm"]["present"] > 0
    assert peak < 0.8 * np.prod(shape)  # image and label map alone would need two bytes per voxel


def fail_late(row, flag):
    if row["crop"] == "a/crop1":
        while not flag.exists():
            time.sleep(0.005)
    flag.touch()
    raise ValueError(f"{row['crop']} is damaged")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_error_names_the_first_of_several_crops_whichever_fails_first(tmp_path, workers):
    crops = ["a/crop1", "a/crop2", "a/crop3"] if workers == 2 else ["a/crop2", "a/crop3"]
    message = rf"{crops[0]}: ValueError: .* is damaged \(and {len(crops) - 1} more, see the log\)"
    with pytest.raises(CellmapError, match=message):
        convert.map_isolated(fail_late, [({"crop": crop}, tmp_path / "flag") for crop in crops], workers)
