"""The two layouts of a stored volume: whatever the box, both give the voxels that were written, or say why not."""

import hashlib
import os
import re
import resource
import weakref
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import chain, pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.errors import CellmapError, ContractError
from cellmap_pipe.prepare import layout
from cellmap_pipe.prepare.layout import BLOCKED, MAPPED, map_array, open_volume, write_array, write_volume

LAYOUTS = [MAPPED, BLOCKED]
EDGE = 4


def voxels(shape, dtype="uint8", seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def write(kind, path, array, cuts=(), **options):
    """Write an array in slabs that are separated at the planes `cuts`."""
    slabs = [array[first:last] for first, last in pairwise([0, *cuts, len(array)])]
    return write_volume(kind, path, array.dtype, array.shape, slabs, block=EDGE, **options)


@pytest.fixture(params=LAYOUTS)
def stored(request, tmp_path):
    """A volume in each layout and the array that it holds."""
    array = voxels((9, 10, 11))
    write(request.param, tmp_path / "a.npy", array)
    return open_volume(request.param, tmp_path / "a.npy", array.shape), array


@st.composite
def cases(draw):
    """Return an array, the planes where its slabs are separated, and a box (origin, lengths) inside."""
    shape = draw(st.tuples(*[st.integers(1, 11)] * 3))
    array = voxels(shape, draw(st.sampled_from(["uint8", "uint16"])), draw(st.integers(0, 9)))
    cuts = sorted(draw(st.sets(st.integers(1, shape[0]))) - {shape[0]})
    origin = [draw(st.integers(0, size - 1)) for size in shape]
    lengths = [draw(st.integers(1, size - start)) for start, size in zip(origin, shape, strict=True)]
    return array, cuts, origin, lengths


@settings(max_examples=50, deadline=None, derandomize=True)
@given(cases())
def test_any_box_and_any_voxel_are_those_that_were_written(tmp_path_factory, case):
    array, cuts, origin, lengths = case
    folder = tmp_path_factory.mktemp("layout")
    box = tuple(slice(start, start + n) for start, n in zip(origin, lengths, strict=True))
    points = np.argwhere(np.ones(array.shape, bool))[:: max(1, array.size // 20)][::-1].astype(np.int32)
    contents = set()
    for kind in LAYOUTS:
        contents.add(write(kind, folder / f"{kind}.npy", array, cuts, fill=255))
        volume = open_volume(kind, folder / f"{kind}.npy", array.shape)
        assert (volume.shape, volume.dtype) == (array.shape, array.dtype)
        volume.prefetch(origin, lengths)
        frame = np.zeros([n + 2 for n in lengths], array.dtype)
        volume.copy(origin, frame[1:-1, 1:-1, 1:-1])
        np.testing.assert_array_equal(frame, np.pad(array[box], 1))
        np.testing.assert_array_equal(volume.at(points), array[tuple(points.T)])
        assert volume.at(points[:0]).shape == (0,)
    whole = write(MAPPED, folder / "whole.npy", array)
    assert contents == {whole}
    assert whole == hashlib.sha256(array.tobytes()).hexdigest()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_writing_holds_no_more_than_a_slab(tmp_path, kind):
    yielded = []

    def slabs():
        for _ in range(20):
            assert all(slab() is None for slab in yielded[:-1])
            slab = voxels((1, 5, 5))
            yielded.append(weakref.ref(slab))
            yield slab

    write_volume(kind, tmp_path / "a.npy", np.dtype(np.uint8), (20, 5, 5), slabs(), block=EDGE)


def test_other_voxels_or_another_order_of_them_have_another_digest(tmp_path):
    array = voxels((4, 5, 6))
    digests = {write(MAPPED, tmp_path / "a.npy", part) for part in (array, array ^ 1, array[::-1])}
    assert len(digests) == 3


def test_padding_of_blocks_is_the_fill(tmp_path):
    array = voxels((5, 4, 4))
    write(BLOCKED, tmp_path / "a.npy", array, fill=255)
    blocks = np.load(tmp_path / "a.npy")
    assert blocks.shape == (2, 1, 1, EDGE, EDGE, EDGE)
    np.testing.assert_array_equal(blocks[0, 0, 0], array[:4])
    assert (blocks[1, 0, 0, 1:] == 255).all()


def test_blocks_have_64_voxels_along_each_edge(tmp_path):
    write_volume(BLOCKED, tmp_path / "a.npy", np.dtype(np.uint8), (65, 3, 3), [voxels((65, 3, 3))])
    assert np.load(tmp_path / "a.npy", mmap_mode="r").shape == (2, 1, 1, 64, 64, 64)


def test_voxels_go_into_a_buffer_of_a_wider_type(stored):
    volume, array = stored
    out = np.zeros(array.shape, np.int16)
    volume.copy((0, 0, 0), out)
    np.testing.assert_array_equal(out, array)


@pytest.mark.parametrize(
    ("origin", "lengths"), [((-1, 0, 0), (2, 2, 2)), ((8, 0, 0), (2, 1, 1)), ((0, 0, 11), (1, 1, 1))]
)
def test_box_that_reaches_beyond_the_volume_is_refused(stored, origin, lengths):
    volume, _ = stored
    with pytest.raises(ValueError, match="is not inside"):
        volume.copy(origin, np.empty(lengths, np.uint8))


def test_threads_that_copy_at_once_do_not_disturb_each_other(stored):
    volume, array = stored
    origins = np.random.default_rng(1).integers(0, 5, (300, 3)).tolist()

    def copied(origin):
        out = np.empty((5, 5, 5), np.uint8)
        volume.copy(origin, out)
        return out

    with ThreadPoolExecutor(8) as pool:
        boxes = list(pool.map(copied, origins))
    for (z, y, x), box in zip(origins, boxes, strict=True):
        np.testing.assert_array_equal(box, array[z : z + 5, y : y + 5, x : x + 5])


def test_open_volumes_hold_no_file_descriptors(tmp_path):
    array = voxels((5, 5, 5))
    for kind in LAYOUTS:
        write(kind, tmp_path / f"{kind}.npy", array)
    before = len(list(Path("/proc/self/fd").iterdir()))
    volumes = [open_volume(kind, tmp_path / f"{kind}.npy", array.shape) for kind in LAYOUTS * 20]
    for volume in volumes:
        volume.copy((0, 0, 0), np.empty((5, 5, 5), np.uint8))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_map_is_released_with_the_last_array_that_shows_it(tmp_path):
    def maps():
        return sum("once.npy" in line for line in Path("/proc/self/maps").read_text().splitlines())

    write_array(tmp_path / "once.npy", np.arange(10))
    part = map_array(tmp_path / "once.npy")[3:]
    assert maps() == 1
    assert part.tolist() == list(range(3, 10))
    del part
    assert maps() == 0


@pytest.mark.parametrize("array", [np.zeros((0, 4), np.int32), np.arange(24, dtype=np.int32).reshape(6, 4)])
def test_mapped_arrays_are_those_that_were_written_and_read_only(tmp_path, array):
    write_array(tmp_path / "a.npy", array)
    mapped = map_array(tmp_path / "a.npy")
    assert mapped.dtype == np.int32
    np.testing.assert_array_equal(mapped, array)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)
    assert not mapped.flags.writeable


@pytest.mark.parametrize("kind", LAYOUTS)
def test_slabs_that_are_not_those_of_the_volume_are_refused(tmp_path, kind):
    array = voxels((6, 5, 4))
    for slabs in ([array[:5]], [array, array[:1]], [array[:, :4]], [array.astype(np.uint16)]):
        with pytest.raises(ContractError, match=r"a\.npy: .*-R convert"):
            write_volume(kind, tmp_path / "a.npy", array.dtype, array.shape, slabs, block=EDGE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_file_of_another_shape_or_no_file_of_voxels_is_named(tmp_path, kind):
    path = tmp_path / "a.npy"
    write(kind, path, voxels((6, 5, 4)))
    with pytest.raises(ContractError, match=r"a\.npy: .*\(6, 5, 9\).*-R chunk"):
        open_volume(kind, path, (6, 5, 9))
    content = path.read_bytes()
    for damaged in (content[:-1], content + b"0", b"\0" * len(content), b""):
        path.write_bytes(damaged)
        with pytest.raises(ContractError, match=r"a\.npy: cannot be read.*-R chunk"):
            open_volume(kind, path, (6, 5, 4))
    path.unlink()
    with pytest.raises(ContractError, match=r"a\.npy: cannot be read.*No such file.*-R chunk"):
        open_volume(kind, path, (6, 5, 4))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_damaged_header_is_named_or_makes_no_difference(tmp_path, kind):
    path, array, out = tmp_path / "a.npy", voxels((6, 5, 4)), np.empty((6, 5, 4), np.uint8)
    write(kind, path, array)
    content = path.read_bytes()
    for position in range(128):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1 << position % 7]) + content[position + 1 :])
        try:
            open_volume(kind, path, array.shape).copy((0, 0, 0), out)
        except ContractError as error:
            assert re.search(r"a\.npy: .*-R chunk", str(error))
        else:
            np.testing.assert_array_equal(out, array)


def test_unknown_layout_is_named(tmp_path):
    with pytest.raises(ContractError, match=r"a\.npy: layout 'tiled', this version reads mapped and blocked"):
        open_volume("tiled", tmp_path / "a.npy", (1, 1, 1))


def test_blocks_that_were_written_anew_or_truncated_are_not_read(tmp_path):
    path, array = tmp_path / "a.npy", voxels((9, 9, 9))
    write(BLOCKED, path, array)
    volume = open_volume(BLOCKED, path, array.shape)
    write(BLOCKED, path, array ^ 1)
    for read in (
        lambda: volume.copy((0, 0, 0), np.empty((9, 9, 9), np.uint8)),
        lambda: volume.at(np.zeros((1, 3), int)),
        lambda: volume.prefetch((0, 0, 0), (2, 2, 2)),
    ):
        with pytest.raises(ContractError, match=r"a\.npy: was written anew"):
            read()
    path.unlink()
    with pytest.raises(ContractError, match=r"a\.npy: cannot be read.*No such file"):
        volume.copy((0, 0, 0), np.empty((9, 9, 9), np.uint8))


def test_short_reads_are_continued_and_an_early_end_is_named(tmp_path, monkeypatch):
    path, array = tmp_path / "a.npy", voxels((9, 9, 9))
    write(BLOCKED, path, array)
    volume = open_volume(BLOCKED, path, array.shape)
    out = np.empty_like(array)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:7]], offset))
    volume.copy((0, 0, 0), out)
    np.testing.assert_array_equal(out, array)
    end = path.stat().st_size // 2
    # the file loses its end between the look at its size and the reading
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][: max(0, end - at)]], at))
    with pytest.raises(ContractError, match=rf"a\.npy: ends after {end} bytes; .*-R chunk"):
        volume.copy((0, 0, 0), out)


def test_hints_are_of_the_bytes_that_a_copy_reads_a_few_at_a_time(tmp_path, monkeypatch):
    write(BLOCKED, tmp_path / "a.npy", voxels((9, 10, 11)))
    volume = open_volume(BLOCKED, tmp_path / "a.npy", (9, 10, 11))
    hinted, read, preadv = [], [], os.preadv

    def note_hint(descriptor, start, length, advice):
        if advice == os.POSIX_FADV_WILLNEED:
            hinted.append(range(start, start + length))

    def note_read(descriptor, views, start):
        read.append(range(start, start + len(views[0])))
        return preadv(descriptor, views, start)

    monkeypatch.setattr(os, "posix_fadvise", note_hint)
    monkeypatch.setattr(os, "preadv", note_read)
    monkeypatch.setattr(layout, "_HINT_BYTES", 50)
    volume.prefetch((1, 2, 3), (7, 6, 5))
    assert not read
    volume.copy((1, 2, 3), np.empty((7, 6, 5), np.uint8))
    assert sorted(chain(*hinted)) == sorted(chain(*read))
    assert max(map(len, hinted)) == 50


def write_within(limit, kind, path):
    """Write a volume of 8000 voxels in a process whose files cannot grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    array = voxels((20, 20, 20))
    if kind:
        write(kind, path, array, [7])
    else:
        write_array(path, array)


@pytest.mark.parametrize("kind", [*LAYOUTS, None])
def test_full_disk_is_an_error_that_names_the_file_and_leaves_what_was_there(tmp_path, kind):
    path = tmp_path / "a.npy"
    path.write_bytes(b"older")
    message = r"a\.npy: cannot be written \(File too large\): it takes 8e-06 GB, .* GB are free; free space"
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool, pytest.raises(CellmapError, match=message):
        pool.submit(write_within, 5000, kind, path).result()
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"older"]
