"""NIfTI files: what other readers see, what comes back, and that damage is named wherever it happens."""

import gzip

import nibabel
import numpy as np
import pytest

from cellmap_pipe.errors import ContractError, DataError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare import nifti
from cellmap_pipe.prepare.nifti import nifti_slabs, read_nifti, write_nifti, write_nifti_slabs

RNG = np.random.default_rng(3)
EM = RNG.integers(60, 200, (24, 24, 24)).astype(np.uint8)
LABELS = np.repeat(RNG.integers(0, 5, (16, 24, 4)), 8, axis=2)


def lattice(volume):
    return Lattice((8, 8, 8), (0, 0, 0), volume.shape)


def test_nifti_readers_see_x_first_and_nanometres_in_the_affine(tmp_path):
    volume = np.arange(2 * 3 * 4, dtype=np.uint16).reshape(2, 3, 4)
    write_nifti(tmp_path / "a.nii.gz", volume, Lattice((2.62, 2, 4), (23837.13, 7599, 35999), volume.shape))
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert np.array_equal(np.asarray(image.dataobj), volume.T) and image.get_data_dtype() == np.uint16
    expected = np.diag([4, 2, 2.62, 1])
    expected[:3, 3] = [35999, 7599, 23837.13]
    assert image.affine == pytest.approx(expected) and image.header.get_xyzt_units() == ("unknown", "unknown")
    assert b"units nm" in bytes(image.header["descrip"])
    assert np.array_equal(read_nifti(tmp_path / "a.nii.gz"), volume)


@pytest.mark.parametrize("dtype", nifti.DTYPES)
@pytest.mark.parametrize("volume", [EM, LABELS], ids=["noise", "runs"])
def test_members_of_any_threads_are_the_same_file_and_the_same_volume(tmp_path, monkeypatch, dtype, volume):
    monkeypatch.setattr(nifti, "_MEMBER_BYTES", 5000)
    volume = volume.astype(dtype)
    for threads in (1, 3):
        write_nifti(tmp_path / f"{threads}.nii.gz", volume, lattice(volume), threads=threads)
    content = (tmp_path / "1.nii.gz").read_bytes()
    assert content == (tmp_path / "3.nii.gz").read_bytes() and content.count(b"\x1f\x8b\x08\x00\x00\x00\x00\x00") > 1
    assert gzip.decompress(content)[352:] == volume.tobytes()
    assert np.array_equal(read_nifti(tmp_path / "1.nii.gz"), volume)
    assert np.array_equal(np.asarray(nibabel.load(tmp_path / "1.nii.gz").dataobj), volume.T)


def test_labels_take_fewer_bytes_than_in_nibabels_own_files(tmp_path):
    labels = np.kron(RNG.integers(0, 9, (6, 6, 6)), np.ones((16, 16, 16), int)).astype(np.uint8)
    write_nifti(tmp_path / "ours.nii.gz", labels, lattice(labels))
    nibabel.save(nibabel.Nifti1Image(labels.T, np.eye(4)), tmp_path / "theirs.nii.gz")
    ours, theirs = ((tmp_path / f"{name}.nii.gz").stat().st_size for name in ("ours", "theirs"))
    assert ours < 0.75 * theirs


def test_slabs_make_the_volume(tmp_path):
    slabs = [EM[:5], EM[5:6], EM[6:]]
    write_nifti_slabs(tmp_path / "a.nii.gz", iter(slabs), lattice(EM))
    assert np.array_equal(read_nifti(tmp_path / "a.nii.gz"), EM)
    for wrong in ([EM[:5]], [EM[:5], EM[5:].astype(np.uint16)], [EM[:5], EM[5:, 1:]]):
        with pytest.raises(ValueError, match="for a volume of"):
            write_nifti_slabs(tmp_path / "b.nii.gz", wrong, lattice(EM))
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]


def test_an_axis_that_nifti_cannot_say_is_refused(tmp_path):
    volume = np.zeros((1, 1, 40000), np.uint8)
    with pytest.raises(DataError, match=r"a\.nii\.gz: .*32767 per axis.*coarser grid"):
        write_nifti(tmp_path / "a.nii.gz", volume, lattice(volume))


def flip(content):
    harmed = bytearray(content)
    harmed[len(harmed) // 2] ^= 0xFF
    return bytes(harmed)


def other_header(content):
    raw = bytearray(gzip.decompress(content))
    raw[80] ^= 1  # voxel size
    return gzip.compress(bytes(raw))


def other_voxel(content):
    raw = bytearray(gzip.decompress(content))
    raw[-1] ^= 1
    return gzip.compress(bytes(raw))


HARMS = [
    lambda c: c[:-9],
    lambda c: c[:100],
    lambda c: b"",
    lambda c: b"not a gzip file",
    flip,
    lambda c: gzip.compress(gzip.decompress(c)[:-1]),
    lambda c: gzip.compress(gzip.decompress(c) + b"x"),
    lambda c: gzip.compress(b"\0" * 400),
]


@pytest.mark.parametrize("harm", HARMS)
def test_a_corrupt_nifti_is_named_with_the_remedy(tmp_path, harm):
    path = tmp_path / "a.nii.gz"
    write_nifti(path, EM, lattice(EM))
    path.write_bytes(harm(path.read_bytes()))
    for read in (read_nifti, lambda path: list(nifti_slabs(path, EM.shape))):
        with pytest.raises(ContractError, match=r"a\.nii\.gz: .*-R convert"):
            read(path)


@pytest.mark.parametrize("harm", [*HARMS, other_header, other_voxel])
def test_a_file_that_is_not_read_back_as_written_is_no_file(tmp_path, monkeypatch, harm):
    encode = nifti.encode_nifti

    def harmed(path, *arguments, **options):
        result = encode(path, *arguments, **options)
        path.write_bytes(harm(path.read_bytes()))
        return result

    monkeypatch.setattr(nifti, "encode_nifti", harmed)
    with pytest.raises(ContractError, match=r"a\.nii\.gz: was not read back as it was written"):
        write_nifti(tmp_path / "a.nii.gz", EM, lattice(EM))
    assert not list(tmp_path.iterdir())


def test_a_missing_nifti_or_another_dtype_is_named(tmp_path):
    with pytest.raises(ContractError, match="nowhere"):
        read_nifti(tmp_path / "nowhere.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4)), tmp_path / "f.nii.gz")
    with pytest.raises(ContractError, match="dtype float32"):
        read_nifti(tmp_path / "f.nii.gz")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_nifti_slabs_are_the_volume(tmp_path, monkeypatch, dtype):
    volume = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (9, 5, 7)).astype(dtype)
    write_nifti(tmp_path / "v.nii.gz", volume, lattice(volume))
    monkeypatch.setattr(nifti, "SLAB_VOXELS", 80)
    slabs = list(nifti_slabs(tmp_path / "v.nii.gz", volume.shape))
    assert [len(slab) for slab in slabs] == [2, 2, 2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(slabs), volume)
    with pytest.raises(ContractError, match=r"v\.nii\.gz: shape \(9, 5, 7\), expected \(9, 5, 8\)"):
        list(nifti_slabs(tmp_path / "v.nii.gz", (9, 5, 8)))
