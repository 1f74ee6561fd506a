import json

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.errors import DataError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.ngff import (
    NM_PER_UNIT,
    array_attributes,
    chunk_files,
    chunk_shape,
    chunk_tiles,
    chunks_on_disk,
    is_array,
    open_level,
    plain_level,
    read_box,
    read_image,
)

VOLUME = np.arange(20 * 18 * 17, dtype=np.uint16).reshape(20, 18, 17)
FORMATS = [(2, "/"), (2, "."), (3, "/"), (3, ".")]


@pytest.mark.parametrize("zarr_format,separator", FORMATS)
def test_both_formats_and_separators_are_read(tmp_path, ngff, zarr_format, separator):
    path = ngff(
        tmp_path / "em", VOLUME, (4, 2, 1), (10, 20, 30), zarr_format=zarr_format, separator=separator, levels=2
    )
    image = read_image(path)
    assert [level.path for level in image.levels] == [str(path / "s0"), str(path / "s1")]
    assert image.levels[0].lattice == Lattice((4, 2, 1), (10, 20, 30), (20, 18, 17))
    assert image.levels[1].lattice == Lattice((8, 4, 2), (12, 21, 30.5), (10, 9, 8))
    level = image.levels[0]
    assert level.dtype == "uint16" and chunk_shape(level) == (8, 8, 8)
    box = read_box(open_level(level), level, (3, 2, 1), (11, 9, 17))
    assert np.array_equal(box, VOLUME[3:11, 2:9, 1:17])


@pytest.mark.parametrize("zarr_format,separator", FORMATS)
def test_chunks_that_were_not_downloaded_are_noticed(tmp_path, ngff, zarr_format, separator):
    path = ngff(tmp_path / "em", VOLUME, (4, 4, 4), (0, 0, 0), zarr_format=zarr_format, separator=separator)
    level = read_image(path).levels[0]
    prefix = "c" + separator if zarr_format == 3 else ""
    (path / "s0" / f"{prefix}{separator.join('101')}").unlink()
    everything = chunks_on_disk(level, (0, 0, 0), (20, 18, 17))
    assert everything.shape == (3, 3, 3) and np.argwhere(~everything).tolist() == [[1, 0, 1]]
    part = chunks_on_disk(level, (8, 0, 3), (9, 8, 17))  # chunk (1, 0, 0) to (1, 0, 2)
    assert part.tolist() == [[[True, False, True]]]
    assert len(chunk_files(level, (8, 0, 3), (9, 8, 17))) == 2


def edit(path, change):
    content = json.loads((path / ".zattrs").read_text())
    change(content)
    (path / ".zattrs").write_text(json.dumps(content))


def test_the_order_of_transformations_and_a_global_one_do_not_matter(tmp_path, ngff):
    path = ngff(tmp_path / "em", VOLUME, (4, 2, 1), (10, 20, 30))

    def change(content):
        multiscale = content["multiscales"][0]
        multiscale["datasets"][0]["coordinateTransformations"].reverse()
        multiscale["coordinateTransformations"] = [{"type": "scale", "scale": [2, 2, 2]}]

    edit(path, change)
    assert read_image(path).levels[0].lattice == Lattice((8, 4, 2), (20, 40, 60), (20, 18, 17))


SIZES = st.sampled_from([1.62, 1.74, 2.0, 2.62, 4.0, 5.24, 13.92, 64.0])
AT = st.floats(-1e6, 1e6).map(lambda v: round(v, 2))
UNITS = st.sampled_from([None, *sorted(NM_PER_UNIT)])


def triples(values):
    return st.tuples(values, values, values)


@st.composite
def transformations(draw, *, scaled):
    """Return (scale, translation, transformations that say so, in any order, without what may be left out)."""
    scale, translation = draw(triples(SIZES)), draw(triples(AT))
    listed = [{"type": "scale", "scale": list(scale)}, {"type": "translation", "translation": list(translation)}]
    if not scaled and draw(st.booleans()):
        scale, listed = (1, 1, 1), listed[1:]
    if draw(st.booleans()):
        translation, listed = (0, 0, 0), [entry for entry in listed if entry["type"] == "scale"]
    if not scaled and draw(st.booleans()):
        listed.append({"type": "identity"})
    return np.array(scale), np.array(translation), draw(st.permutations(listed))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(transformations(scaled=True), min_size=1, max_size=3),
    transformations(scaled=False),
    triples(UNITS),
    st.sampled_from([2, 3]),
    st.sampled_from(["0.4", "0.5"]),
)
def test_nanometres_in_are_nanometres_out(tmp_path_factory, levels, outer, units, zarr_format, version):
    path, shape = tmp_path_factory.mktemp("image"), [30, 20, 10]
    axes = [{"name": n, "type": "space"} | ({"unit": u} if u else {}) for n, u in zip("zyx", units, strict=True)]
    datasets = [{"path": f"s{i}", "coordinateTransformations": listed} for i, (_, _, listed) in enumerate(levels)]
    content = {"multiscales": [{"axes": axes, "datasets": datasets}]}
    if outer[2]:
        content["multiscales"][0]["coordinateTransformations"] = outer[2]
    content = {"ome": content | {"version": version}} if version == "0.5" else content
    if zarr_format == 2:
        (path / ".zattrs").write_text(json.dumps(content))
    else:
        (path / "zarr.json").write_text(
            json.dumps({"zarr_format": 3, "node_type": "group", "attributes": content}),
        )
    for i in range(len(levels)):
        zarr.create_array(str(path / f"s{i}"), shape=shape, chunks=(8, 8, 8), dtype="u1", zarr_format=zarr_format)
    nm = np.array([NM_PER_UNIT[unit or "nm"] for unit in units])
    expected = [
        np.concatenate([scale * outer[0] * nm, (translation * outer[0] + outer[1]) * nm])
        for scale, translation, _ in levels
    ]
    found = [level.lattice for level in read_image(path).levels]
    got = [np.array([*lattice.voxel_nm, *lattice.translation_nm]) for lattice in found]
    for these, those in ((got, expected), (expected, got)):
        assert all(any(np.allclose(a, b, rtol=1e-9, atol=1e-9) for b in those) for a in these)
    for lattice in found:
        assert lattice.shape == (30, 20, 10)
        assert lattice.lower_nm == pytest.approx(np.array(lattice.translation_nm) - np.array(lattice.voxel_nm) / 2)
    sizes = [np.prod(lattice.voxel_nm) for lattice in found]
    assert sizes == sorted(sizes)


def test_an_array_without_multiscales_takes_a_lattice_of_its_shape(tmp_path):
    lattice = Lattice((4, 2, 1), (10, 20, 30), VOLUME.shape)
    for zarr_format in (2, 3):
        path = tmp_path / f"v{zarr_format}"
        array = zarr.create_array(str(path), shape=VOLUME.shape, chunks=(8, 8, 8), dtype="u2", zarr_format=zarr_format)
        array[...] = VOLUME
        level = plain_level(path, lattice)
        assert is_array(path) and (level.lattice, level.dtype) == (lattice, "uint16")
        assert np.array_equal(read_box(open_level(level), level, (0, 0, 0), VOLUME.shape), VOLUME)
        with pytest.raises(DataError, match=r"shape \[20, 18, 17\]; \[20, 18, 16\] is expected"):
            plain_level(path, lattice.window((0, 0, 0), (20, 18, 16)))
    zarr.create_group(str(tmp_path / "group"), zarr_format=3)
    assert not is_array(tmp_path / "group") and not is_array(tmp_path / "nowhere")


def test_micrometres_become_nanometres(tmp_path, ngff):
    path = ngff(tmp_path / "em", VOLUME, (0.004, 0.002, 0.001), (0, 0, 1))
    edit(path, lambda c: [axis.update(unit="micrometer") for axis in c["multiscales"][0]["axes"]])
    lattice = read_image(path).levels[0].lattice
    assert lattice.voxel_nm == pytest.approx((4, 2, 1)) and lattice.translation_nm == pytest.approx((0, 0, 1000))


def test_a_level_that_is_not_on_disk_is_left_out(tmp_path, ngff):
    path = ngff(tmp_path / "em", VOLUME, (4, 4, 4), (0, 0, 0), levels=2)
    (path / "s0" / ".zarray").unlink()
    assert [level.path for level in read_image(path).levels] == [str(path / "s1")]
    (path / "s1" / ".zarray").unlink()
    with pytest.raises(DataError, match=r"none of its levels \(s0, s1\)"):
        read_image(path)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c: c.update(other=c.pop("multiscales")), "no OME-NGFF multiscales"),
        (lambda c: c["multiscales"][0].pop("axes"), "no axes"),
        (lambda c: c["multiscales"][0]["axes"].reverse(), r"axes \['x', 'y', 'z'\] are not supported"),
        (lambda c: c["multiscales"][0]["axes"][0].update(unit="parsec"), r"unknown unit \['parsec'\]"),
        (
            lambda c: c["multiscales"][0]["datasets"][0].update(
                coordinateTransformations=[{"type": "scale", "scale": [1, 1, 1]}, {"type": "affine"}]
            ),
            "affine",
        ),
        (lambda c: c["multiscales"][0]["datasets"][0].update(coordinateTransformations=None), "no scale, so the voxel"),
        (
            lambda c: c["multiscales"][0]["datasets"][0].update(
                coordinateTransformations=[{"type": "scale", "scale": [0, 4, 4]}]
            ),
            "must be positive",
        ),
    ],
)
def test_metadata_that_cannot_be_used_are_named(tmp_path, ngff, change, message):
    path = ngff(tmp_path / "em", VOLUME, (4, 4, 4), (0, 0, 0))
    edit(path, change)
    with pytest.raises(DataError, match=message) as error:
        read_image(path)
    assert str(path) in str(error.value)


def test_missing_or_broken_metadata_files_are_named(tmp_path, ngff):
    with pytest.raises(DataError, match="no such image group"):
        read_image(tmp_path / "nowhere")
    path = ngff(tmp_path / "em", VOLUME, (4, 4, 4), (0, 0, 0))
    (path / ".zattrs").write_text("{")
    with pytest.raises(DataError, match=r"\.zattrs: cannot be read as JSON"):
        read_image(path)
    (path / ".zattrs").unlink()
    with pytest.raises(DataError, match=r"no \.zattrs"):
        read_image(path)


def test_an_image_that_is_not_three_dimensional_is_refused(tmp_path, ngff):
    path = ngff(tmp_path / "em", VOLUME, (4, 4, 4), (0, 0, 0))
    meta = json.loads((path / "s0" / ".zarray").read_text())
    meta["shape"], meta["chunks"] = [20, 18], [8, 8]
    (path / "s0" / ".zarray").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="not three-dimensional"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"\x02\x01garbage", None])
def test_a_damaged_chunk_is_named(tmp_path, ngff, content):
    path = ngff(tmp_path / "em", VOLUME, (4, 4, 4), (0, 0, 0))
    chunk = path / "s0" / "1" / "0" / "1"
    chunk.write_bytes(chunk.read_bytes()[:-20] if content is None else content)
    level = read_image(path).levels[0]
    with pytest.raises(DataError, match="s0/1/0/1: damaged chunk"):
        read_box(open_level(level), level, (0, 0, 0), (20, 18, 17))
    assert read_box(open_level(level), level, (0, 0, 0), (8, 18, 17)).shape == (8, 18, 17)


def test_attributes_are_optional(tmp_path):
    zarr.create_array(str(tmp_path / "a"), shape=(1,), dtype="u1", zarr_format=3, attributes={"k": 1})
    assert array_attributes(tmp_path / "a") == {"k": 1}
    assert array_attributes(tmp_path / "nowhere") == {}


@pytest.mark.parametrize("budget", [1, 100, 250, 1000, 10**6])
def test_tiles_are_whole_chunks_that_cover_a_box_once(tmp_path, ngff, budget):
    level = read_image(
        ngff(tmp_path / "a", np.zeros((10, 11, 9), np.uint8), (1, 1, 1), (0, 0, 0), chunks=(4, 3, 5))
    ).levels[0]
    seen = np.zeros((10, 11, 9), int)
    for lower, upper in chunk_tiles(level, (1, 2, 3), (10, 10, 9), budget):
        seen[tuple(map(slice, lower, upper))] += 1
        for axis, step in ((0, 4), (1, 3)):
            assert lower[axis] % step == 0 or lower[axis] == (1, 2)[axis]
            assert upper[axis] % step == 0 or upper[axis] == 10
        assert np.prod(np.subtract(upper, lower)) <= max(budget, 4 * 3 * 6)
    assert (seen[1:, 2:10, 3:] == 1).all() and seen.sum() == 9 * 8 * 6
    assert list(chunk_tiles(level, (3, 0, 0), (3, 11, 9), budget)) == []
