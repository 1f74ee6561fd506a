"""The training store as it is written: same voxels as the NIfTI, EM context, positions, and nothing lost silently."""

import csv
import json
import logging
import resource
import shutil
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cellmap_pipe.errors import CellmapError, ContractError, DataError
from cellmap_pipe.files import describe_file
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare import chunks
from cellmap_pipe.prepare.chunks import choose_layout, chunk_shard, sample_positions, write_index
from cellmap_pipe.prepare.convert import convert_shard
from cellmap_pipe.prepare.crops import read_crops, write_crops
from cellmap_pipe.prepare.layout import BLOCKED, MAPPED, open_volume, write_volume
from cellmap_pipe.prepare.nifti import read_nifti, write_nifti
from cellmap_pipe.prepare.quality import write_quality
from cellmap_pipe.prepare.state_table import encode_table
from cellmap_pipe.prepare.store import FORMAT_VERSION, Store, verify_store

CLASSES = ["pm", "mito", "nuc"]
EM_PATH, LABELS_PATH = "recon-1/em/fibsem-uint8", "recon-1/labels/groundtruth"
VOXEL = 8.0
# first voxel in the EM and shape of each crop
CROPS = {"crop1": ((10, 12, 14), (16, 14, 12)), "crop2": ((24, 30, 40), (16, 16, 16))}

# what each crop takes by the quality table, and memory_gb with which the store of both is mapped, or cut into blocks
TRAIN_MB, ENOUGH_GB, TOO_LITTLE_GB = 100.0, 0.2, 0.199


def write_image(path, array, voxel_nm, translation_nm, chunk):
    """Write an OME-NGFF 0.4 group with one level."""
    group = zarr.open_group(path, mode="w", zarr_format=2)
    level = group.create_array("s0", shape=array.shape, dtype=array.dtype, chunks=chunk, fill_value=0)
    level[...] = array
    transforms = [{"type": "scale", "scale": voxel_nm}, {"type": "translation", "translation": translation_nm}]
    group.attrs["multiscales"] = [
        {
            "version": "0.4",
            "axes": [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"],
            "datasets": [{"path": "s0", "coordinateTransformations": transforms}],
        }
    ]


class Run:
    """A challenge of one dataset with an EM of 40x48x56 voxels and two crops, and the stages up to the store."""

    def __init__(self, folder):
        self.folder, self.root = folder, folder / "data"
        self.nifti, self.store = folder / "nifti", folder / "chunks/store"
        self.rng = np.random.default_rng(0)
        container = self.root / "fly/fly.zarr"
        self.em = self.rng.integers(1, 256, (40, 48, 56)).astype(np.uint8)
        write_image(container / EM_PATH, self.em, [VOXEL] * 3, [0.0] * 3, (16, 16, 16))
        for name, (offset, shape) in CROPS.items():
            kinds = self.rng.integers(0, 3, shape)
            translation = [o * VOXEL for o in offset]
            for i, label in enumerate(["pm", "mito"], 1):
                path = container / LABELS_PATH / name / label
                write_image(path, (kinds == i).astype(np.uint8), [VOXEL] * 3, translation, (16, 16, 16))

    def prepare(self):
        data = {"root": str(self.root), "em_path": EM_PATH, "labels_path": LABELS_PATH, "crops": None}
        write_crops(data, self.folder / "crops.csv")
        convert_shard(
            self.folder / "crops.csv",
            self.folder / "convert.json",
            data_root=self.root,
            shard=0,
            shards=1,
            grid_name="8nm",
            voxel_nm=[VOXEL] * 3,
            classes=CLASSES,
            labels={"empty": "absent"},
            max_upsample=4,
            nifti_dir=self.nifti,
            workers=1,
        )
        self.judge()
        return self

    def judge(self, drop=()):
        outputs = self.folder / "quality.csv", self.folder / "statistics.json"
        settings = {"min_em_fraction": 0.5, "min_std": 2.0, "max_train_gb": None, "max_predict_gb": None}
        overrides = {"keep": [], "drop": list(drop)}
        write_quality([self.folder / "convert.json"], *outputs, settings=settings, **overrides, context_nm=0, models=[])
        rows = read_crops(outputs[0])
        with open(outputs[0], "w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows({**row, "train_mb": TRAIN_MB} for row in rows)

    def chunk(self, context_nm=32.0, workers=1, memory_gb=None):
        out = self.folder / "chunks/shard0.json"
        chunk_shard(
            self.folder / "quality.csv",
            self.folder / "convert.json",
            out,
            data_root=self.root,
            nifti_dir=self.nifti,
            store_dir=self.store,
            context_nm=context_nm,
            max_upsample=4,
            workers=workers,
            memory_gb=memory_gb,
        )
        return json.loads(out.read_text())

    def index(self):
        path = self.folder / "chunks/index.json"
        write_index([self.folder / "chunks/shard0.json"], self.folder / "statistics.json", path)
        return path


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("chunks")).prepare()


@pytest.fixture
def run(converted, tmp_path):
    """A copy of the converted challenge that a test may change."""
    copy = Run.__new__(Run)
    copy.__dict__.update(converted.__dict__)
    shutil.copytree(converted.folder, tmp_path / "run", dirs_exist_ok=True)
    copy.folder = tmp_path / "run"
    copy.root, copy.nifti, copy.store = (copy.folder / part for part in ("data", "nifti", "chunks/store"))
    return copy


def nifti_of(run, crop):
    return (
        read_nifti(run.nifti / f"images/fly_{crop}_0000.nii.gz"),
        read_nifti(run.nifti / f"labels/fly_{crop}.nii.gz"),
    )


def whole(store, crop, kind):
    """Return all voxels of a stored volume."""
    volume = store.volume(crop, kind)
    out = np.empty(volume.shape, volume.dtype)
    volume.copy((0, 0, 0), out)
    return out


@pytest.mark.parametrize("memory_gb", [ENOUGH_GB, TOO_LITTLE_GB])
def test_store_holds_the_nifti_with_em_context_and_unknown_labels_round_it(run, memory_gb):
    run.chunk(context_nm=30.0, memory_gb=memory_gb)  # 3.75 voxels: rounded up to 4
    store = Store(run.index(), classes=CLASSES, grid="8nm")
    assert list(store.crops) == ["fly/crop1", "fly/crop2"]
    for name, (offset, shape) in CROPS.items():
        record = store.crops[f"fly/{name}"]
        lower = [max(0, o - 4) for o in offset]
        upper = [min(n, o + s + 4) for n, o, s in zip(run.em.shape, offset, shape, strict=True)]
        np.testing.assert_array_equal(
            whole(store, f"fly/{name}", "image"), run.em[tuple(map(slice, lower, upper))], err_msg="context from the EM"
        )
        assert record["label_offset"] == [o - lo for o, lo in zip(offset, lower, strict=True)]
        assert record["label_shape"] == list(shape)
        assert Lattice.from_dict(record["lattice"]).translation_nm == tuple(VOXEL * lo for lo in lower)
        image, label = nifti_of(run, name)
        box = tuple(slice(o, o + n) for o, n in zip(record["label_offset"], shape, strict=True))
        np.testing.assert_array_equal(whole(store, f"fly/{name}", "image")[box], image)
        expected = np.full(store.shape(f"fly/{name}"), 255, np.uint8)
        expected[box] = label
        np.testing.assert_array_equal(whole(store, f"fly/{name}", "label"), expected)
        assert record["has_positive"] == ["pm", "mito"]
    lo, hi = store.intensity_range("fly", "percentile")
    images = np.concatenate([nifti_of(run, name)[0].ravel() for name in CROPS])
    assert (lo, hi) == tuple(np.percentile(images, [0.5, 99.5]))


@pytest.mark.parametrize("memory_gb", [ENOUGH_GB, TOO_LITTLE_GB])
def test_slabs_give_the_same_bytes_as_one_piece(run, monkeypatch, memory_gb):
    run.chunk(memory_gb=memory_gb)
    files = {path.name: path.read_bytes() for path in run.store.glob("*.npy")}
    shutil.rmtree(run.store)
    monkeypatch.setattr(chunks, "EM_SLAB_VOXELS", 1500)
    monkeypatch.setattr(chunks, "LABEL_SLAB_VOXELS", 700)
    run.chunk(memory_gb=memory_gb)
    assert {path.name: path.read_bytes() for path in run.store.glob("*.npy")} == files


@pytest.mark.parametrize(("memory_gb", "layout"), [(ENOUGH_GB, MAPPED), (TOO_LITTLE_GB, BLOCKED)])
def test_store_that_exceeds_the_memory_is_cut_into_blocks(run, caplog, memory_gb, layout):
    caplog.set_level(logging.INFO)
    assert {record["layout"] for record in run.chunk(memory_gb=memory_gb)["records"]} == {layout}
    assert f"grid 8nm: 0.2 GB of crops, {memory_gb} GB may be filled (chunks.memory_gb): {layout}" in caplog.messages


def test_crops_that_are_not_kept_do_not_count_as_memory(run):
    run.judge(drop=["fly/crop2"])
    (record,) = run.chunk(memory_gb=TOO_LITTLE_GB)["records"]
    assert record["layout"] == MAPPED


def test_a_store_may_fill_60_percent_of_the_machine_unless_said_otherwise(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(chunks, "physical_memory", lambda: 100e9)
    assert choose_layout("8nm", 59.9, None) == MAPPED
    assert choose_layout("8nm", 60.1, None) == BLOCKED
    assert "60 GB may be filled (60% of this machine's memory): blocked" in caplog.messages[-1]


def test_another_layout_is_written_anew_with_the_same_content(run):
    mapped = run.chunk(memory_gb=ENOUGH_GB)["records"]
    times = {path.name: path.stat().st_mtime_ns for path in run.store.iterdir()}
    blocked = run.chunk(memory_gb=TOO_LITTLE_GB)["records"]
    assert all(path.stat().st_mtime_ns != times[path.name] for path in run.store.iterdir())
    for before, after in zip(mapped, blocked, strict=True):
        for kind in ("image", "label"):
            assert before["files"][kind]["sha256"] != after["files"][kind]["sha256"]
        assert before["files"]["positions"] == after["files"]["positions"]
        assert before["content"] == after["content"]
        assert sorted(after["content"]) == ["image", "label", "positions"]
    assert verify_store(run.index()) == []
    assert run.chunk(memory_gb=ENOUGH_GB)["records"] == mapped


@pytest.mark.parametrize("memory_gb", [ENOUGH_GB, TOO_LITTLE_GB])
def test_label_maps_of_two_bytes_are_stored_as_such(run, memory_gb):
    """A crop whose state table has more than 256 rows."""
    contract = json.loads((run.folder / "convert.json").read_text())
    record = contract["records"][0]
    path = run.nifti / record["files"]["label"]["path"]
    label = read_nifti(path).astype(np.uint16)
    label[3:5] = 300
    write_nifti(path, label, Lattice.from_dict(record["lattice"]))
    record["files"]["label"] = describe_file(path, run.nifti)
    table = np.full((301, 3), 2, np.uint8)
    table[[0, 1, 2, 300]] = [[0, 0, 2], [1, 0, 2], [0, 1, 2], [2, 2, 1]]
    record |= {"label_dtype": "uint16", "table": encode_table(table, [300])}
    (run.folder / "convert.json").write_text(json.dumps(contract))
    run.chunk(memory_gb=memory_gb)
    store = Store(run.index())
    stored = whole(store, "fly/crop1", "label")
    assert stored.dtype == np.uint16
    offset = store.crops["fly/crop1"]["label_offset"]
    box = tuple(slice(start, start + n) for start, n in zip(offset, label.shape, strict=True))
    np.testing.assert_array_equal(stored[box], label)
    nuc = store.positions("fly/crop1")
    nuc = nuc[nuc[:, 0] == CLASSES.index("nuc"), 1:]
    assert len(nuc) == (label == 300).sum()
    assert (store.volume("fly/crop1", "label").at(nuc) == 300).all()


@pytest.mark.parametrize("older", ["format", "record"])
def test_record_of_an_older_format_is_made_again(run, monkeypatch, older):
    """Format 1 had neither layouts nor digests of the voxels."""
    if older == "format":
        with monkeypatch.context() as patch:
            patch.setattr(chunks, "FORMAT_VERSION", FORMAT_VERSION - 1)
            run.chunk()
            with pytest.raises(ContractError, match=r"shard0\.json: not of store format 2; .*-R chunk"):
                patch.undo()
                run.index()
    else:
        run.chunk()
    for path in run.store.glob("*.json"):
        record = json.loads(path.read_text())
        del record["layout"], record["content"]
        if older == "record":
            del record["input_digest"]
        path.write_text(json.dumps(record))
    times = {path.name: path.stat().st_mtime_ns for path in run.store.iterdir()}
    records = run.chunk()["records"]
    assert all(path.stat().st_mtime_ns != times[path.name] for path in run.store.iterdir())
    assert all(record["layout"] == MAPPED and record["content"] for record in records)
    assert verify_store(run.index()) == []


def test_without_context_the_image_is_the_niftis(run):
    shutil.rmtree(run.root)  # the EM is not needed
    run.chunk(context_nm=0)
    store = Store(run.index())
    for name in CROPS:
        image, label = nifti_of(run, name)
        np.testing.assert_array_equal(whole(store, f"fly/{name}", "image"), image)
        np.testing.assert_array_equal(whole(store, f"fly/{name}", "label"), label)
        assert store.crops[f"fly/{name}"]["label_offset"] == [0, 0, 0]


def test_context_that_is_not_on_disk_is_not_stored(run, caplog):
    """Networks would see zeros where prediction mirrors."""
    shutil.rmtree(run.root / "fly/fly.zarr" / EM_PATH / "s0", ignore_errors=True)
    em = run.em.copy()
    write_image(run.root / "fly/fly.zarr" / EM_PATH, em, [VOXEL] * 3, [0.0] * 3, (8, 8, 8))
    missing = run.root / "fly/fly.zarr" / EM_PATH / "s0"
    (missing / "0.1.2").unlink()  # voxels 0..7, 8..15, 16..23: before crop1, which begins at z 10, y 12, x 14
    run.prepare()
    run.chunk(context_nm=32)
    store = Store(run.index())
    # of four voxels before it in z one is left, for the next may draw on what is missing
    np.testing.assert_array_equal(whole(store, "fly/crop1", "image"), em[9:30, 8:30, 10:30])
    assert store.crops["fly/crop1"]["label_offset"] == [1, 4, 4]
    assert "fly/crop1: of the EM context of 32 nm round it not all is on disk" in caplog.text
    assert "fly/crop2" not in caplog.text


def test_em_that_is_missing_in_the_label_box_ends_the_context_there(run):
    shutil.rmtree(run.root / "fly/fly.zarr" / EM_PATH / "s0", ignore_errors=True)
    em = run.em.copy()
    write_image(run.root / "fly/fly.zarr" / EM_PATH, em, [VOXEL] * 3, [0.0] * 3, (8, 8, 8))
    (run.root / "fly/fly.zarr" / EM_PATH / "s0/1.1.1").unlink()
    em[8:16, 8:16, 8:16] = 0
    run.prepare()
    run.chunk(context_nm=16)
    np.testing.assert_array_equal(whole(Store(run.index()), "fly/crop1", "image"), em[10:28, 12:28, 14:28])


def test_two_workers_write_the_same_store(run):
    alone = run.chunk()
    files = {path.name: path.read_bytes() for path in run.store.iterdir()}
    shutil.rmtree(run.store)
    assert run.chunk(workers=2) == alone
    assert {path.name: path.read_bytes() for path in run.store.iterdir()} == files


def test_files_of_the_same_input_are_left_alone_and_others_made_again(run):
    run.chunk()
    first = {path.name: path.stat().st_mtime_ns for path in run.store.iterdir()}
    run.chunk()
    assert {path.name: path.stat().st_mtime_ns for path in run.store.iterdir()} == first
    label = run.store / "fly_crop1_label.npy"
    whole_file = label.read_bytes()
    for damaged in (b"", bytes([*whole_file[:-1], whole_file[-1] ^ 1])):  # truncated; a flipped bit
        label.write_bytes(damaged)
        run.chunk()
        second = {path.name: path.stat().st_mtime_ns for path in run.store.iterdir()}
        changed = {name for name in first if first[name] != second[name]}
        assert changed == {f"fly_crop1{end}" for end in (".json", "_image.npy", "_label.npy", "_positions.npy")}
        assert label.read_bytes() == whole_file
    shapes = {record["crop"]: record["lattice"]["shape"] for record in run.chunk(context_nm=8)["records"]}
    assert shapes["fly/crop1"] == [18, 16, 14]


def test_em_that_was_fetched_later_is_noticed(run):
    chunk = run.root / "fly/fly.zarr" / EM_PATH / "s0/0.0.0"  # only in the context of crop1
    content = chunk.read_bytes()
    chunk.unlink()
    run.prepare()
    before = run.chunk()["records"][0]
    chunk.write_bytes(content)
    run.prepare()
    after = run.chunk()["records"][0]
    assert before["files"]["image"]["sha256"] != after["files"]["image"]["sha256"]
    np.testing.assert_array_equal(whole(Store(run.index()), "fly/crop1", "image")[:2], run.em[6:8, 8:30, 10:30])


def test_other_em_in_the_context_is_noticed(run):
    run.prepare()
    before = run.chunk()["records"][0]["input_digest"]
    chunk = run.root / "fly/fly.zarr" / EM_PATH / "s0/0.0.0"  # only in the context of crop1
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size, as uncompressed chunks are
    assert run.chunk()["records"][0]["input_digest"] != before


def test_files_that_a_killed_run_left_beside_an_older_record_are_made_again(run, monkeypatch):
    """The arrays of a crop are of the same size whatever they hold."""
    run.chunk()
    files = {path.name: path.read_bytes() for path in run.store.iterdir()}
    level = zarr.open_array(run.root / "fly/fly.zarr" / EM_PATH / "s0")

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    level[...] = 255 - run.em
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chunks, "sample_positions", killed)
        run.chunk()
    level[...] = run.em
    run.chunk()
    assert {path.name: path.read_bytes() for path in run.store.iterdir()} == files


def test_crops_that_are_not_kept_leave_the_store(run):
    run.chunk()
    (run.store / ".partial-0-fly_crop2_image.npy").write_bytes(b"abandoned")
    run.judge(drop=["fly/crop2"])
    assert [record["crop"] for record in run.chunk()["records"]] == ["fly/crop1"]
    assert {path.name.split("_")[1].split(".")[0] for path in run.store.iterdir()} == {"crop1"}


def test_crops_that_are_listed_nowhere_leave_the_store(run):
    run.chunk()
    for name in ("fly_crop7_image.npy", "fly_crop7.json", ".partial-0-fly_crop7_label.npy"):
        (run.store / name).write_bytes(b"old")
    index = run.index()
    assert not list(run.store.glob("*crop7*"))
    assert verify_store(index) == []


@pytest.mark.parametrize("kind", ["images/fly_crop2_0000", "labels/fly_crop2"])
@pytest.mark.parametrize("context_nm", [0, 32])
def test_corrupted_nifti_fails_the_job_but_not_the_other_crops(run, kind, context_nm):
    path = run.nifti / f"{kind}.nii.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(CellmapError, match=rf"fly/crop2: .*{kind}\.nii\.gz: damaged.*-R convert"):
        run.chunk(context_nm=context_nm)
    assert (run.store / "fly_crop1.json").is_file()
    assert not (run.folder / "chunks/shard0.json").exists()
    assert not list(run.store.glob("*crop2*"))


def chunk_within(run, limit, workers):
    """Chunk in a process whose files cannot grow beyond `limit` bytes, as on a disk that fills up."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run.chunk(workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_is_one_clear_error_and_the_rest_is_resumed(run, workers):
    limit = 90_000  # the positions of the smaller crop fit in, those of the larger one do not
    message = (
        r"^fly/crop2: CellmapError: \S+/fly_crop2_positions\.npy: cannot be written \(File too large\): it takes "
        r"0\.\d+ GB, \S+ GB are free; free space or raise the quota, what is finished is kept; .* run again$"
    )
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool, pytest.raises(CellmapError, match=message):
        pool.submit(chunk_within, run, limit, workers).result()
    assert not (run.folder / "chunks/shard0.json").exists()
    assert not list(run.store.glob(".partial*"))
    assert not (run.store / "fly_crop2.json").exists()
    assert not (run.store / "fly_crop2_positions.npy").exists()
    finished = {path: path.stat().st_mtime_ns for path in run.store.glob("fly_crop1*")}
    assert len(finished) == 4
    run.chunk(workers=workers)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert verify_store(run.index()) == []


def test_index_of_no_crops_says_where_to_look(run):
    run.judge(drop=["fly/crop1", "fly/crop2"])
    run.chunk()
    with pytest.raises(DataError, match="no crop passed the quality check"):
        run.index()


def test_statistics_of_another_run_are_refused(run):
    run.chunk()
    (run.folder / "statistics.json").write_text('{"datasets": {}}')
    with pytest.raises(ContractError, match="no statistics of fly"):
        run.index()


# sampled positions

TABLE = np.full((256, 3), 2, np.uint8)
TABLE[:5] = [[0, 0, 2], [1, 0, 0], [0, 1, 0], [2, 2, 1], [1, 1, 2]]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    hnp.arrays(np.uint8, st.tuples(*[st.integers(1, 6)] * 3), elements=st.sampled_from([0, 1, 2, 3, 4, 255])),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_positions_are_distinct_voxels_of_their_class(label, per_class, known):
    positions = sample_positions(label, TABLE, seed=3, per_class=per_class, known=known)
    assert positions.dtype == np.int32
    states = TABLE[label]
    for column in (-1, 0, 1, 2):
        found = positions[positions[:, 0] == column, 1:]
        member = (states != 2).any(axis=-1) if column < 0 else states[..., column] == 1
        assert len(found) == min(known if column < 0 else per_class, member.sum())
        assert len(np.unique(found, axis=0)) == len(found)
        assert member[tuple(found.T)].all()
    np.testing.assert_array_equal(positions, sample_positions(label, TABLE, seed=3, per_class=per_class, known=known))


def test_positions_of_a_stored_volume_are_those_of_the_array(tmp_path):
    label = np.random.default_rng(0).choice(np.array([0, 1, 2, 255], np.uint8), (70, 9, 8))
    every = sample_positions(label, TABLE, seed=3, per_class=label.size, known=label.size)
    np.testing.assert_array_equal(every[every[:, 0] == 0, 1:], np.argwhere(label == 1))
    expected = sample_positions(label, TABLE, seed=3, per_class=50, known=90)
    for layout in (MAPPED, BLOCKED):
        write_volume(layout, tmp_path / "label.npy", label.dtype, label.shape, [label], block=5)
        stored = open_volume(layout, tmp_path / "label.npy", label.shape)
        np.testing.assert_array_equal(sample_positions(stored, TABLE, seed=3, per_class=50, known=90), expected)


def test_positions_are_drawn_with_one_layer_of_blocks_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "LABEL_SLAB_VOXELS", 320 * 320)
    shape, layer = (192, 320, 320), 64 * 320 * 320
    slabs = (np.ones((16, 320, 320), np.uint8) for _ in range(12))
    write_volume(BLOCKED, tmp_path / "label.npy", np.dtype(np.uint8), shape, slabs)
    stored = open_volume(BLOCKED, tmp_path / "label.npy", shape)
    tracemalloc.start()
    try:
        assert len(sample_positions(stored, TABLE, seed=0, per_class=9, known=9)) == 18
        assert tracemalloc.get_traced_memory()[1] < 1.8 * layer
    finally:
        tracemalloc.stop()


def test_positions_are_drawn_evenly_over_the_voxels_of_a_class():
    label = np.zeros((10, 10, 10), np.uint8)
    label[:, :, 5:] = 1
    label[5:] = np.where(label[5:] == 1, 4, label[5:])
    hits = np.zeros(label.shape, int)
    for seed in range(400):
        found = sample_positions(label, TABLE, seed=seed, per_class=50, known=1)
        np.add.at(hits, tuple(found[found[:, 0] == 0, 1:].T), 1)
    drawn = hits[np.isin(label, [1, 4])]
    assert drawn.sum() == 400 * 50
    # 500 voxels, each drawn 40 times on average: binomial, standard deviation 6
    assert 36 < hits[:5][label[:5] == 1].mean() < 44
    assert drawn.min() > 15
    assert drawn.max() < 70


def test_uint16_label_maps_use_rows_beyond_255():
    table = np.full((300, 2), 2, np.uint8)
    table[280] = [1, 0]
    label = np.full((3, 3, 3), 255, np.uint16)
    label[1, 2, 0] = 280
    assert sample_positions(label, table, seed=0).tolist() == [[-1, 1, 2, 0], [0, 1, 2, 0]]
