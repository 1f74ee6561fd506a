"""The synthetic challenge: its world, its images and its layout on disk."""

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.classes import get_class
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.phantom import write_challenge
from cellmap_pipe.phantom.cell import CODE, Cell, Contents, build_cell, sample
from cellmap_pipe.phantom.challenge import (
    CLASSES,
    DATASETS,
    EVERYTHING,
    MANIFEST,
    RESIN,
    TRUTH,
    Crop,
    Dataset,
    describe_tree,
    write_dataset,
)
from cellmap_pipe.phantom.layout import EM_PATH, LABELS_PATH, halved
from cellmap_pipe.phantom.shapes import Tube, coordinates

SEED = 0
CROPS = [(dataset, crop) for dataset in DATASETS for crop in dataset.crops]
TROUBLE = {  # what a quality check must not let through
    "blank EM",
    "EM not downloaded",
    "unannotated",
    "labels displaced",
    "labels show twice the field of view",
}


@pytest.fixture(scope="session")
def challenge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantom")
    write_challenge(root, seed=SEED, out_json=root / "phantom.json")
    return root


@pytest.fixture(scope="session")
def cell() -> Cell:
    """A cell with one filled octant, whose box begins at 0."""
    return build_cell((0.0,) * 3, (2560.0,) * 3, np.random.default_rng(3), {(0, 0, 0): Contents()})


def _zarr_path(root: Path, dataset: Dataset) -> Path:
    return root / dataset.name / f"{dataset.name}.zarr"


def _em(root: Path, dataset: Dataset, level: str = "s0") -> np.ndarray:
    return np.asarray(zarr.open_array(str(_zarr_path(root, dataset) / EM_PATH / level), mode="r")[...])


def _label(root: Path, dataset: Dataset, crop: Crop, name: str) -> np.ndarray:
    path = _zarr_path(root, dataset) / LABELS_PATH / crop.name / name / "s0"
    return np.asarray(zarr.open_array(str(path), mode="r")[...])


def _attributes(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((path / ".zattrs").read_text())
    return value


def _em_under(em: np.ndarray, dataset: Dataset, crop: Crop) -> tuple[np.ndarray, np.ndarray]:
    """Return the EM voxel nearest each label voxel, and whether the EM reaches there."""
    lattice = crop.lattice(dataset.em)
    index = [
        np.rint((t + np.arange(n) * v - t_em) / v_em).astype(int)
        for t, n, v, t_em, v_em in zip(
            lattice.translation_nm,
            lattice.shape,
            lattice.voxel_nm,
            dataset.em.translation_nm,
            dataset.em.voxel_nm,
            strict=True,
        )
    ]
    inside = [(i >= 0) & (i < n) for i, n in zip(index, em.shape, strict=True)]
    clipped = [np.clip(i, 0, n - 1) for i, n in zip(index, em.shape, strict=True)]
    return em[np.ix_(*clipped)], np.asarray(inside[0][:, None, None] & inside[1][:, None] & inside[2])


# The world


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.tuples(*[st.integers(-40, 40)] * 3), min_size=1, max_size=4, unique=True), st.integers(5, 30))
def test_distance_to_a_tube_is_that_to_the_nearest_point_of_its_line(
    points: list[tuple[int, int, int]], radius: int
) -> None:
    line = np.array(points, float)
    lattice = Lattice((17.0, 13.0, 11.0), (-60.0, -50.0, -45.0), (7, 8, 9))
    found = Tube(line, float(radius)).distance(coordinates(lattice))
    dense = np.concatenate([line[:1], *(np.linspace(a, b, 400) for a, b in pairwise(line))])
    for index in [(0, 0, 0), (3, 4, 4), (6, 7, 8), (2, 6, 1)]:
        expected = np.linalg.norm(dense - lattice.world_of(index), axis=1).min() - radius
        assert found[index] == pytest.approx(expected, abs=0.2)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.tuples(*[st.integers(-4, 60)] * 3), st.tuples(*[st.integers(1, 30)] * 3))
def test_the_truth_at_a_position_does_not_depend_on_the_lattice(
    cell: Cell, offset: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    whole = Lattice((8.0, 8.0, 8.0), (4.0, 4.0, 4.0), (180, 180, 180))
    fine = whole.window([2 * i for i in offset], [2 * n for n in shape])
    coarse = Lattice((16.0, 16.0, 16.0), fine.translation_nm, shape)
    assert np.array_equal(sample(cell, coarse).classes, sample(cell, fine).classes[::2, ::2, ::2])


def test_every_lumen_is_closed_by_its_membrane(cell: Cell) -> None:
    classes = sample(cell, Lattice((8.0, 8.0, 8.0), (4.0, 4.0, 4.0), (144, 144, 144))).classes
    allowed = {
        "mito_lum": {"mito_lum", "mito_mem", "mito_ribo"},
        "mito_ribo": {"mito_lum", "mito_mem", "mito_ribo"},
        **{f"{kind}_lum": {f"{kind}_lum", f"{kind}_mem"} for kind in ("golgi", "ves", "endo", "er")},
        "cyto": set(CODE) - {"ecs"},
        "ecs": {"ecs", "pm"},
    }
    for axis in range(3):
        first, second = (np.take(classes, range(i, 143 + i), axis) for i in (0, 1))
        pairs = np.divmod(np.flatnonzero(np.bincount((first.astype(np.uint16) * 256 + second).ravel())), 256)
        for name, neighbours in allowed.items():
            met = set(pairs[1][pairs[0] == CODE[name]]) | set(pairs[0][pairs[1] == CODE[name]])
            assert met <= {CODE[n] for n in neighbours | {name}}, name


@pytest.mark.parametrize("seed", [1, 2])
def test_a_cell_of_any_seed_holds_every_kind(seed: int) -> None:
    cell = build_cell((0.0,) * 3, (2560.0,) * 3, np.random.default_rng(seed), {(1, 0, 1): Contents()})
    found = {kind: sum(o.kind == kind for o in cell.organelles) for kind in ("golgi", "mito", "endo", "er", "ves")}
    assert found["golgi"] >= 4 and found["mito"] >= 2 and found["endo"] >= 2 and found["er"] >= 4 and found["ves"] >= 18


def test_a_pyramid_level_lies_where_its_eight_voxels_lie() -> None:
    lattice = Lattice((24.0, 16.0, 16.0), (5.0, 7.0, 9.0), (4, 6, 8))
    image = np.random.default_rng(0).integers(0, 256, lattice.shape).astype(np.uint8)
    half, coarse = halved(image, lattice)
    assert coarse.lower_nm == lattice.lower_nm and coarse.upper_nm == lattice.upper_nm
    assert half[1, 2, 3] == np.rint(image[2:4, 4:6, 6:8].astype(np.float32).mean())


# The files


def test_the_same_seed_gives_the_same_bytes(challenge: Path, tmp_path: Path) -> None:
    described = json.loads((challenge / "phantom.json").read_text())
    index = 1
    again, other = tmp_path / "a" / DATASETS[index].name, tmp_path / "b" / DATASETS[index].name
    write_dataset(DATASETS[index], again, np.random.default_rng([SEED, index]))
    assert describe_tree(again) == described["contents"][DATASETS[index].name]
    write_dataset(DATASETS[4], other, np.random.default_rng([SEED + 1, 4]))
    assert describe_tree(other)["sha256"] != described["contents"][DATASETS[4].name]["sha256"]


def test_the_description_lists_every_crop_and_every_file(challenge: Path) -> None:
    described = json.loads((challenge / "phantom.json").read_text())
    names = [entry["crop"] for entry in described["crops"] + described["tests"]]
    assert len({name.rsplit("/", 1)[1] for name in names}) == len(names), "crop numbers repeat"
    files = sum(part["files"] for part in described["contents"].values())
    assert files == sum(path.is_file() for path in challenge.rglob("*")) - 1  # but for phantom.json itself
    assert (challenge / "phantom.json").stat().st_size < 100_000
    assert not list(challenge.rglob(".partial-*"))


def test_every_folder_of_a_dataset_is_a_zarr_v2_group_or_array(challenge: Path) -> None:
    for dataset in DATASETS:
        root = _zarr_path(challenge, dataset)
        em = _attributes(root / EM_PATH)["multiscales"][0]
        assert [level["path"] for level in em["datasets"]] == ["s0", "s1", "s2"]
        for folder in [root, *root.rglob("*")]:
            if folder.is_dir() and not folder.name.isdigit():
                kind = ".zarray" if (folder / ".zarray").exists() else ".zgroup"
                assert json.loads((folder / kind).read_text())["zarr_format"] == 2
                assert (folder / ".zattrs").exists(), folder
        metadata = json.loads((root / EM_PATH / "s0" / ".zarray").read_text())
        assert metadata["dimension_separator"] == "/" and metadata["dtype"] == "|u1"
        assert metadata["compressor"]["id"] == "blosc" and metadata["chunks"] == [64, 64, 64]
        assert (root / "recon-1/labels").exists() == bool(dataset.crops)


def test_levels_and_labels_are_placed_by_the_centre_of_voxel_0(challenge: Path) -> None:
    for dataset in DATASETS:
        em = _attributes(_zarr_path(challenge, dataset) / EM_PATH)["multiscales"][0]
        for k, level in enumerate(em["datasets"]):
            scale, translation = (t[t["type"]] for t in level["coordinateTransformations"])
            lattice = Lattice(scale, translation, _em(challenge, dataset, f"s{k}").shape)
            assert lattice.lower_nm == dataset.em.lower_nm and lattice.upper_nm == dataset.em.upper_nm
        for crop in dataset.crops:
            for name in crop.classes:
                group = _attributes(_zarr_path(challenge, dataset) / LABELS_PATH / crop.name / name)
                transformations = group["multiscales"][0]["datasets"][0]["coordinateTransformations"]
                assert transformations[0]["scale"] == list(crop.voxel_nm)
                assert transformations[1]["translation"] == list(crop.lattice(dataset.em).translation_nm)
                assert _label(challenge, dataset, crop, name).shape == crop.shape


def test_annotation_metadata_agree_with_the_arrays(challenge: Path) -> None:
    for dataset, crop in CROPS:
        folder = _zarr_path(challenge, dataset) / LABELS_PATH / crop.name
        assert _attributes(folder)["cellmap"]["annotation"]["class_names"] == list(crop.classes)
        masks = {f"{name}_mask" for name in crop.masked}
        assert {path.name for path in folder.iterdir() if path.is_dir()} - {"all"} == {*crop.classes, *masks}
        for name in crop.classes:
            values = _label(challenge, dataset, crop, name)
            annotation = _attributes(folder / name / "s0")["cellmap"]["annotation"]
            instance = get_class(name).instance
            assert annotation["annotation_type"]["type"] == f"{'instance' if instance else 'semantic'}_segmentation"
            assert annotation["complement_counts"]["absent"] == (values == 0).sum()
            assert annotation["complement_counts"]["unknown"] == (0 if instance else (values == 255).sum())
            assert (values.max() if instance else 255) <= 255


def test_some_voxels_of_a_semantic_class_are_unknown(challenge: Path) -> None:
    [(dataset, crop)] = [(dataset, crop) for dataset, crop in CROPS if crop.unknown]
    for name in crop.unknown:
        values = _label(challenge, dataset, crop, name)
        assert set(np.unique(values)) == {0, 1, 255}
        assert (values == 255).mean() == pytest.approx(0.25)


def test_instances_are_numbered_from_1_and_do_not_touch(challenge: Path) -> None:
    counts: dict[str, int] = {}
    for dataset, crop in CROPS:
        for name in ("mito", "ves", "endo", "nuc"):
            if name not in crop.classes or crop.voxel_nm[0] > 24:
                continue
            values = _label(challenge, dataset, crop, name)
            ids = np.unique(values)
            assert np.array_equal(ids, np.arange(len(ids)))
            pieces = cc3d.connected_components(values > 0)
            pairs = np.unique(np.stack([pieces[values > 0], values[values > 0]]), axis=1)
            assert len(np.unique(pairs[0])) == pairs.shape[1], f"{crop.name}: two {name} in one piece"
            counts[name] = counts.get(name, 0) + len(ids) - 1
    assert counts["mito"] >= 15 and counts["ves"] >= 100 and counts["endo"] >= 10 and counts["nuc"] >= 5


def test_groups_are_the_union_of_their_parts(challenge: Path) -> None:
    for dataset, crop in CROPS:
        for group, parts in {"mito": "mem lum ribo", "ves": "mem lum", "endo": "mem lum", "golgi": "mem lum"}.items():
            names = [f"{group}_{part}" for part in parts.split()]
            if {group, *names} <= set(crop.classes):
                union = np.any([_label(challenge, dataset, crop, name) == 1 for name in names], axis=0)
                assert np.array_equal(_label(challenge, dataset, crop, group) > 0, union)


def test_a_fully_annotated_crop_holds_every_class(challenge: Path) -> None:
    full = [(dataset, crop) for dataset, crop in CROPS if set(CLASSES) <= set(crop.classes)]
    assert len(full) >= 6
    shares = np.array([[(_label(challenge, d, c, n) - 1 < 254).mean() for n in CLASSES] for d, c in full])
    assert shares.min() > 0.003
    assert shares.mean(axis=0).min() > 0.005


def test_absent_classes_have_empty_arrays(challenge: Path) -> None:
    [(dataset, crop)] = [(dataset, crop) for dataset, crop in CROPS if "absent" in crop.why]
    empty = {name for name in crop.classes if not _label(challenge, dataset, crop, name).any()}
    assert empty == {"golgi_mem", "golgi_lum", "endo_mem", "endo_lum", "endo"}


def test_the_dense_array_holds_class_ids(challenge: Path) -> None:
    dataset, crop = next((dataset, crop) for dataset, crop in CROPS if crop.dense)
    dense = _label(challenge, dataset, crop, "all")
    for name in CLASSES:
        assert np.array_equal(dense == get_class(name).id, _label(challenge, dataset, crop, name) > 0)


def test_trouble_is_there(challenge: Path) -> None:
    by_why = {crop.why: (dataset, crop) for dataset, crop in CROPS}
    dataset, crop = by_why["blank EM"]
    assert set(np.unique(_em_under(_em(challenge, dataset), dataset, crop)[0])) == {RESIN}
    dataset, crop = by_why["EM not downloaded"]
    folder = _zarr_path(challenge, dataset) / EM_PATH
    assert not (folder / "s0/2/2/2").exists() and (folder / "s0/2/2/1").exists()
    assert not (folder / "s1/1/1/1").exists() and (folder / "s1/1/1/0").exists()
    assert not _em_under(_em(challenge, dataset), dataset, crop)[0].any()
    dataset, crop = by_why["unannotated"]
    assert not crop.classes and (_zarr_path(challenge, dataset) / LABELS_PATH / crop.name / ".zattrs").exists()
    dataset, crop = by_why["beyond the EM"]
    assert 0.5 < crop.lattice(dataset.em).overlap_fraction(dataset.em) < 0.9
    dataset, crop = by_why["coarse labels"]
    assert all(v > e for v, e in zip(crop.voxel_nm, dataset.em.voxel_nm, strict=True))
    assert any(all(v * 2 == e for v, e in zip(c.voxel_nm, d.em.voxel_nm, strict=True)) for d, c in CROPS)
    assert len({d.em.voxel_nm for d, _ in CROPS}) >= 2 and len({d.name for d, _ in CROPS}) >= 3
    assert len([crop for _, crop in CROPS if crop.why not in TROUBLE]) >= 8


def test_em_on_disk_is_never_0(challenge: Path) -> None:
    for dataset in DATASETS:
        em = _em(challenge, dataset)
        if dataset.missing is None:
            assert em.min() > 0
        assert em.std() > 10


def test_crops_of_a_dataset_keep_apart() -> None:
    for dataset in DATASETS:
        boxes = [crop.lattice(dataset.em) for crop in dataset.crops]
        for i, first in enumerate(boxes):
            for second in boxes[:i]:
                gaps = [
                    max(a - d, c - b)
                    for a, b, c, d in zip(first.lower_nm, first.upper_nm, second.lower_nm, second.upper_nm, strict=True)
                ]
                assert max(gaps) >= 200


def test_no_single_threshold_finds_the_classes(challenge: Path) -> None:
    present, absent = (dict.fromkeys(CLASSES, np.zeros(256, int)) for _ in range(2))
    for dataset, crop in CROPS:
        if crop.why in TROUBLE:
            continue
        image, inside = _em_under(_em(challenge, dataset), dataset, crop)
        for name in set(CLASSES) & set(crop.classes):
            values = _label(challenge, dataset, crop, name)
            known = inside & (True if get_class(name).instance else values != 255)
            present[name] = present[name] + np.bincount(image[known & (values > 0)], minlength=256)
            absent[name] = absent[name] + np.bincount(image[known & (values == 0)], minlength=256)
    best = {name: _best_threshold_dice(present[name], absent[name]) for name in CLASSES}
    assert sum(dice < 0.5 for dice in best.values()) >= 10, best


def _best_threshold_dice(present: np.ndarray, absent: np.ndarray) -> float:
    """Return the best Dice of "darker than t" and "brighter than t" over t, from histograms of both kinds of voxel."""
    dice = []
    for inside, outside in ((present, absent), (present[::-1], absent[::-1])):
        taken, wrong = np.cumsum(inside), np.cumsum(outside)
        dice.append((2 * taken / (taken + wrong + inside.sum())).max())
    return float(max(dice))


def test_the_manifest_lists_what_the_truth_holds(challenge: Path) -> None:
    with open(challenge / MANIFEST, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * len(EVERYTHING)
    truth = zarr.open_group(str(challenge / TRUTH), mode="r")
    for row in rows:
        voxel, translation = ([float(v) for v in row[key][1:-1].split(";")] for key in ("voxel_size", "translation"))
        shape = [int(v) for v in row["shape"][1:-1].split(";")]
        array = truth[f"crop{row['crop_name']}/{row['class_label']}"]
        assert isinstance(array, zarr.Array) and list(array.shape) == shape
        assert array.attrs["voxel_size"] == voxel and array.attrs["translation"] == translation
        assert np.asarray(array[...]).any(), f"{row['class_label']} does not occur in crop{row['crop_name']}"
        [dataset] = [dataset for dataset in DATASETS if dataset.name == row["dataset"]]
        assert Lattice(voxel, translation, shape).overlap_fraction(dataset.em) == pytest.approx(1)
    assert len({row["voxel_size"] for row in rows}) == 2
