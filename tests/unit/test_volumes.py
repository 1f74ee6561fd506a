"""Which volumes are predicted, on which grid, and what EM they read."""

import shutil
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr

from cellmap_pipe.errors import ConfigError, ContractError, DataError
from cellmap_pipe.files import write_json
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prediction import volumes
from cellmap_pipe.prediction.volumes import EMVolume, check_survey, grid_lattice, reach_of

EM = "recon-1/em/fibsem-uint8"
Writer = Callable[..., Path]
HEADER = "crop_name,dataset,class_label,voxel_size,translation,shape"


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, shape, dtype=np.uint8)


def table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


def test_validation_volumes_are_the_kept_crops_of_the_fold(tmp_path: Path) -> None:
    native = Lattice((4, 4, 4), (2, 2, 2), (20, 20, 20))
    grid = Lattice((8, 8, 8), (4, 4, 4), (10, 10, 10))
    crops = ["a/crop1", "a/crop2", "b/crop3", "b/crop10"]
    pd.DataFrame({"crop": crops, "verdict": ["keep", "reject", "keep", "keep"]}).to_csv(tmp_path / "q.csv", index=False)
    pd.DataFrame({"crop": crops, "group": crops, "fold": [0, 0, 1, 0]}).to_csv(tmp_path / "f.csv", index=False)
    records: list[dict[str, Any]] = [
        {
            "crop": crop,
            "dataset": crop[0],
            "em": f"{crop[0]}/em",
            "lattice": grid.to_dict(),
            "label_lattice": native.to_dict(),
        }
        for crop in crops
    ]
    write_json(tmp_path / "0.json", {"records": records[:2]})
    write_json(tmp_path / "1.json", {"records": records[2:]})
    found = volumes.validation_volumes(
        tmp_path / "q.csv", tmp_path / "f.csv", [tmp_path / "0.json", tmp_path / "1.json"], "0"
    )
    assert [volume["name"] for volume in found] == ["a/crop1", "b/crop10"]
    assert found[0] == {
        "name": "a/crop1",
        "dataset": "a",
        "em": "a/em",
        "lattice": grid.to_dict(),
        "target": native.to_dict(),
        "classes": None,
    }
    with pytest.raises(ContractError, match=r"b/crop10: in .*no conversion has a record"):
        volumes.validation_volumes(tmp_path / "q.csv", tmp_path / "f.csv", [tmp_path / "0.json"], 0)


def test_test_volumes_are_the_union_of_their_rows(tmp_path: Path) -> None:
    path = table(
        tmp_path / "t.csv",
        "12,jrc_x,pm,[4.0;4.0;4.0],[102.0;2.0;2.0],[10;20;30]",
        "12,jrc_x,nuc,[4.0;4.0;4.0],[98.0;2.0;2.0],[12;20;20]",
        "mine,jrc_y,,[2.62;2;2],[0;0;0],[8;8;8]",
    )
    found = volumes.test_volumes(path, tmp_path, EM, (8, 8, 8))
    assert [volume["name"] for volume in found] == ["jrc_x/crop12", "jrc_y/mine"]
    assert found[0]["classes"] == ["pm", "nuc"] and found[1]["classes"] is None
    assert list(found[0]["asked"]) == ["pm", "nuc"] and found[1]["asked"] == {}
    assert Lattice.from_dict(found[0]["asked"]["pm"]) == Lattice((4, 4, 4), (102, 2, 2), (10, 20, 30))
    assert found[0]["em"] == f"jrc_x/jrc_x.zarr/{EM}"
    assert Lattice.from_dict(found[0]["target"]) == Lattice((4, 4, 4), (98, 2, 2), (12, 20, 30))
    assert Lattice.from_dict(found[0]["lattice"]) == Lattice((8, 8, 8), (100, 4, 4), (6, 10, 15))
    native = volumes.test_volumes(path, tmp_path, EM, "native")
    assert native[1]["lattice"] == native[1]["target"]


def test_a_volume_without_a_box_is_the_whole_em(tmp_path: Path, ngff: Writer) -> None:
    lattice = Lattice((8, 8, 8), (4, 4, 4), (16, 16, 16))
    ngff(
        tmp_path / "jrc_x/jrc_x.zarr" / EM,
        noise((16, 16, 16)),
        lattice.voxel_nm,
        lattice.translation_nm,
        chunks=(16,) * 3,
    )
    (volume,) = volumes.test_volumes(table(tmp_path / "t.csv", "all,jrc_x,,,,"), tmp_path, EM, (16, 16, 16))
    assert Lattice.from_dict(volume["target"]) == lattice
    assert volume["lattice"]["shape"] == [8, 8, 8]
    with pytest.raises(ConfigError, match=r"whole EM, but .*jrc_z"):
        volumes.test_volumes(table(tmp_path / "t.csv", "all,jrc_z,,,,"), tmp_path, EM, (16, 16, 16))


def test_faults_of_the_table_are_named(tmp_path: Path) -> None:
    (tmp_path / "lacking.csv").write_text("crop_name,dataset\n1,jrc_x\n")
    with pytest.raises(ConfigError, match=r"lacking.csv: column 'class_label' is missing"):
        volumes.test_volumes(tmp_path / "lacking.csv", tmp_path, EM, (8, 8, 8))
    path = table(tmp_path / "bad.csv", "1,jrc_x,pm,[4;4;4],[0;0;0],[8;8;8]", "1,jrc_x,nuc,[4;4],[0;0;0],[8;8;8]")
    with pytest.raises(ConfigError, match=r"bad.csv: voxel_size in line 3 is '\[4;4\]'"):
        volumes.test_volumes(path, tmp_path, EM, (8, 8, 8))
    path = table(
        tmp_path / "typo.csv", "1,jrc_x,pm,[4;4;4],[0;0;0],[8;8;8]", "1,jrc_x,mito_men,[4;4;4],[0;0;0],[8;8;8]"
    )
    with pytest.raises(ConfigError, match=r"typo.csv: class_label in line 3: .*'mito_men'; did you mean 'mito_mem'"):
        volumes.test_volumes(path, tmp_path, EM, (8, 8, 8))
    path = table(tmp_path / "boxes.csv", "1,jrc_x,pm,[4;4;4],[2;2;2],[9;9;9]", "1,jrc_x,nuc,[8;8;8],[4;4;4],[9;9;9]")
    with pytest.raises(ConfigError, match=r"boxes.csv: jrc_x/crop1: the box of nuc reaches beyond"):
        volumes.test_volumes(path, tmp_path, EM, (8, 8, 8))
    with pytest.raises(ConfigError, match="lists no volume"):
        volumes.test_volumes(table(tmp_path / "none.csv"), tmp_path, EM, (8, 8, 8))


def test_em_is_read_with_its_surroundings(tmp_path: Path, ngff: Writer) -> None:
    image = noise((40, 48, 48))
    em = Lattice((8, 8, 8), (0, 0, 0), image.shape)
    ngff(tmp_path / "em", image, em.voxel_nm, em.translation_nm, chunks=(16,) * 3)
    volume = EMVolume(tmp_path / "em", em.window((10, 16, 0), (20, 20, 40)), max_upsample=2, reach=(16, 16, 16))
    assert volume.context == ((10, 10), (16, 12), (0, 8))
    read, valid = volume.read((-10, -16, 0), (30, 32, 48))
    assert valid is None
    np.testing.assert_array_equal(read, image[:, :, :])


def test_context_ends_where_chunks_are_missing(tmp_path: Path, ngff: Writer) -> None:
    image = noise((64, 32, 32))
    em = Lattice((8, 8, 8), (0, 0, 0), image.shape)
    ngff(tmp_path / "em", image, em.voxel_nm, em.translation_nm, chunks=(16,) * 3)
    shutil.rmtree(tmp_path / "em/s0/0")
    volume = EMVolume(tmp_path / "em", em.window((24, 0, 0), (20, 32, 32)), max_upsample=2, reach=(16, 16, 16))
    before, after = volume.context[0]
    assert after == 16 and 6 <= before <= 8
    _, valid = volume.read((-before, 0, 0), (20, 32, 32))
    assert valid is None or valid.all()


@pytest.mark.parametrize(("level_nm", "grid_nm"), [(8, 8), (5, 8), (5.24, 8), (8, 5)])
def test_any_cut_reads_the_same_voxels(tmp_path: Path, level_nm: float, grid_nm: float, ngff: Writer) -> None:
    image = noise((150, 20, 20))
    em = Lattice((level_nm,) * 3, (0.5, 3, -7), image.shape)
    ngff(tmp_path / "em", image, em.voxel_nm, em.translation_nm, chunks=(32,) * 3)
    target = grid_lattice(em.window((7, 0, 0), (120, 20, 20)), (grid_nm,) * 3)
    volume = EMVolume(tmp_path / "em", target, max_upsample=4, reach=(16, 16, 16))
    height, (before, after) = target.shape[0], volume.context[0]
    whole, _ = volume.read((-before, 0, 0), (height + after, *target.shape[1:]))
    other = EMVolume(tmp_path / "em", target, max_upsample=4, reach=(16, 16, 16))
    edges = [-before, 5, 13, 50, height + after]
    parts = [other.read((lo, 0, 0), (hi, *target.shape[1:]))[0] for lo, hi in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert volume.survey().digest == other.survey().digest


def test_survey_tells_changed_em_and_counts_valid_voxels(tmp_path: Path, ngff: Writer) -> None:
    image = noise((32, 32, 32))
    em = Lattice((8, 8, 8), (0, 0, 0), image.shape)
    ngff(tmp_path / "em", image, em.voxel_nm, em.translation_nm, chunks=(16,) * 3)
    box = em.window((8, 8, 8), (16, 16, 16))
    first = EMVolume(tmp_path / "em", box, max_upsample=2, reach=(4, 4, 4)).survey()
    np.testing.assert_array_equal(first.histogram, np.bincount(image[8:24, 8:24, 8:24].ravel(), minlength=256))
    array = zarr.open_array(str(tmp_path / "em/s0"), mode="r+")
    array[30, 0, 0] = 255 - image[30, 0, 0]
    assert EMVolume(tmp_path / "em", box, max_upsample=2, reach=(4, 4, 4)).survey().digest == first.digest
    array[25, 10, 10] = 255 - image[25, 10, 10]
    assert EMVolume(tmp_path / "em", box, max_upsample=2, reach=(4, 4, 4)).survey().digest != first.digest
    (tmp_path / "em/s0/0/0/0").unlink()
    histogram = EMVolume(tmp_path / "em", box, max_upsample=2, reach=(4, 4, 4)).survey().histogram
    assert histogram.sum() == 16**3 - 8**3


def test_survey_is_kept_while_the_files_are_the_same(
    tmp_path: Path, ngff: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise((32, 32, 32))
    em = Lattice((8, 8, 8), (0, 0, 0), image.shape)
    ngff(tmp_path / "em", image, em.voxel_nm, em.translation_nm, chunks=(16,) * 3)
    kept, box = tmp_path / "survey.json", em.window((0, 0, 0), (16, 16, 16))
    reads = []
    read_all = EMVolume._read_all
    monkeypatch.setattr(EMVolume, "_read_all", lambda self: reads.append(1) or read_all(self))

    def surveyed(lattice: Lattice = box, reach: Any = (4, 4, 4)) -> volumes.Survey:
        return EMVolume(tmp_path / "em", lattice, max_upsample=2, reach=reach).survey(kept)

    first = surveyed()
    (tmp_path / f".partial-1234-{kept.name}").write_text("half")
    again = surveyed()
    assert (len(reads), again.digest) == (1, first.digest)
    np.testing.assert_array_equal(again.histogram, first.histogram)
    assert not list(tmp_path.glob(".partial-*"))
    (tmp_path / "em/s0/0/0/0").touch()
    assert surveyed().digest == first.digest and len(reads) == 2
    (tmp_path / "em/s0/1/1/1").unlink()  # context
    assert surveyed().digest != first.digest and len(reads) == 3
    assert surveyed(em.window((1, 0, 0), (16, 16, 16))).digest != first.digest and len(reads) == 4
    kept.write_text('{"listing": 3}')
    surveyed()
    assert len(reads) == 5


def test_survey_of_damaged_em_names_it_and_is_not_kept(tmp_path: Path, ngff: Writer) -> None:
    image = noise((80, 16, 16))
    em = Lattice((8, 8, 8), (0, 0, 0), image.shape)
    ngff(tmp_path / "em", image, em.voxel_nm, em.translation_nm, chunks=(16,) * 3)
    (tmp_path / "em/s0/4/0/0").write_bytes(b"damaged")
    volume = EMVolume(tmp_path / "em", em, max_upsample=2, reach=(4, 4, 4))
    survey = volume.survey(tmp_path / "survey.json")
    assert len(survey.damaged) == 1 and "s0/4/0/0: damaged chunk" in survey.damaged[0]
    np.testing.assert_array_equal(survey.histogram, np.bincount(image[:64].ravel(), minlength=256))
    assert not (tmp_path / "survey.json").exists()
    check_survey(survey, volume.path)
    for chunk in (tmp_path / "em/s0").glob("*/0/0"):
        chunk.write_bytes(b"damaged")
    with pytest.raises(DataError, match="damaged chunk"):
        check_survey(volume.survey(), volume.path)


def test_slices_across_all_axes_use_context_on_all_of_them() -> None:
    assert reach_of([1, 64, 32], "all") == (64, 64, 64)
    assert reach_of([1, 64, 32], "z") == (1, 64, 32)
    assert reach_of([16, 64, 32], "all") == (16, 64, 32)


@pytest.mark.parametrize("grid_nm", [8, 12])
def test_tiles_give_what_a_whole_cross_section_does(
    tmp_path: Path, ngff: Writer, monkeypatch: pytest.MonkeyPatch, grid_nm: float
) -> None:
    image = noise((40, 48, 48))
    em = Lattice((8, 8, 8), (0, 0, 0), image.shape)
    ngff(tmp_path / "em", image, em.voxel_nm, em.translation_nm, chunks=(16,) * 3)
    (tmp_path / "em/s0/0/1/2").unlink()
    lattice = grid_lattice(em.window((8, 0, 8), (30, 48, 36)), (grid_nm,) * 3)

    def volume() -> EMVolume:
        return EMVolume(tmp_path / "em", lattice, max_upsample=2, reach=(4, 4, 4))

    expected, counts = volume().read((0, 0, 0), lattice.shape), volume().survey().histogram
    assert expected[1] is not None and 0 < expected[1].mean() < 1
    monkeypatch.setattr(volumes, "READ_PLANES", 16)
    monkeypatch.setattr(volumes, "READ_TILE", 7)
    for found, wanted in zip(volume().read((0, 0, 0), lattice.shape), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(volume().survey().histogram, counts)
    np.testing.assert_array_equal(counts, np.bincount(expected[0][expected[1]], minlength=256))


def test_survey_holds_a_tile_and_no_cross_section(
    tmp_path: Path, ngff: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    em = Lattice((8, 8, 8), (0, 0, 0), (16, 256, 256))
    ngff(tmp_path / "em", noise(em.shape), em.voxel_nm, em.translation_nm, chunks=(16, 32, 32))
    monkeypatch.setattr(volumes, "READ_TILE", 32)
    volume = EMVolume(tmp_path / "em", em, max_upsample=2, reach=(4, 4, 4))
    volume.survey()
    tracemalloc.start()
    volume.survey()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < em.voxels


def test_em_that_cannot_be_segmented_is_named(tmp_path: Path, ngff: Writer) -> None:
    em = Lattice((8, 8, 8), (0, 0, 0), (16, 16, 16))
    ngff(tmp_path / "zero", np.zeros(em.shape, np.uint8), em.voxel_nm, em.translation_nm, chunks=(16,) * 3)
    volume = EMVolume(tmp_path / "zero", em, max_upsample=2, reach=(4, 4, 4))
    with pytest.raises(DataError, match=r"zero: the EM is blank .*every voxel is 0"):
        check_survey(volume.survey(), volume.path)
    (tmp_path / "zero/s0/0/0/0").unlink()
    volume = EMVolume(tmp_path / "zero", em, max_upsample=2, reach=(4, 4, 4))
    with pytest.raises(DataError, match="no EM is on disk under this volume"):
        check_survey(volume.survey(), volume.path)
    shutil.rmtree(tmp_path / "zero/s0")
    with pytest.raises(DataError, match="none of its levels"):
        EMVolume(tmp_path / "zero", em, max_upsample=2, reach=(4, 4, 4))
    (tmp_path / "zero/.zattrs").unlink()
    with pytest.raises(DataError, match=r"no .zattrs"):
        EMVolume(tmp_path / "zero", em, max_upsample=2, reach=(4, 4, 4))
