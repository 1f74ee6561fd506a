"""The folds of the challenge's own crop list: 289 crops of 22 datasets, 48 classes."""

import csv
import itertools
import time
from collections import Counter
from pathlib import Path

import pytest

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.geometry import Lattice, gap_nm
from cellmap_pipe.prepare.crops import COLUMNS, read_crops
from cellmap_pipe.prepare.specimens import SPECIMENS
from cellmap_pipe.prepare.splits import describe_folds, write_folds

MANIFEST = Path(__file__).parents[2] / ".." / "shared" / "data" / "manifests" / "train_crop_manifest.csv"
MARGIN_NM = 1000.0

pytestmark = pytest.mark.skipif(not MANIFEST.is_file(), reason=f"{MANIFEST} is not there")


@pytest.fixture(scope="module")
def crops():
    """Rows of the manifest by crop, `dataset/cropN`."""
    found = {}
    for row in read_crops(MANIFEST):
        found.setdefault(f"{row['dataset']}/crop{row['crop_name']}", []).append(row)
    return found


@pytest.fixture(scope="module")
def boxes(crops):
    def numbers(text):
        return [float(value) for value in text.strip("[]").split(";")]

    return {
        name: Lattice(
            numbers(rows[0]["voxel_size"]), numbers(rows[0]["translation"]), [int(n) for n in numbers(rows[0]["shape"])]
        )
        for name, rows in crops.items()
    }


@pytest.fixture(scope="module")
def table(crops, tmp_path_factory):
    """A crops.csv as the rule `crops` would write it with all data on disk."""
    path = tmp_path_factory.mktemp("folds") / "crops.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="")
        writer.writeheader()
        for name, rows in crops.items():
            writer.writerow(
                {
                    "crop": name,
                    "dataset": rows[0]["dataset"],
                    "annotated": ";".join(row["class_label"] for row in rows),
                    "voxel_nm": rows[0]["voxel_size"].strip("[]"),
                    "translation_nm": rows[0]["translation"].strip("[]"),
                    "shape": ";".join(str(int(float(n))) for n in rows[0]["shape"].strip("[]").split(";")),
                }
            )
    return path


def divide(table, group, n=5, datasplit=None):
    out = table.with_name(f"{group}{n}.csv")
    start = time.process_time()
    write_folds(table, out, n=n, seed=0, group=group, margin_nm=MARGIN_NM, datasplit=datasplit)
    seconds = time.process_time() - start
    rows = read_crops(out)
    print(
        f"\nfolds.group {group}: {describe_folds(out)}; {len({row['group'] for row in rows})} groups, {seconds:.2f} s"
    )
    assert seconds < 5
    return {row["crop"]: int(row["fold"]) for row in rows}, {row["crop"]: row["group"] for row in rows}


@pytest.mark.parametrize("group", ["crop", "dataset", "specimen"])
def test_every_fold_validates_and_trains_all_classes(crops, table, group):
    folds, groups = divide(table, group)
    assert set(folds) == set(crops)
    assert len(crops) == 289
    classes = {row["class_label"] for rows in crops.values() for row in rows}
    assert len(classes) == 48
    for fold in range(5):
        for inside in (True, False):
            side = {
                row["class_label"] for name, rows in crops.items() if (folds[name] == fold) is inside for row in rows
            }
            assert side == classes
    for name in set(groups.values()):
        assert len({folds[crop] for crop in crops if groups[crop] == name}) == 1


def test_crops_of_different_folds_are_further_apart_than_the_margin(crops, boxes, table):
    folds, _ = divide(table, "crop")
    for first, second in itertools.combinations(crops, 2):
        if first.split("/")[0] == second.split("/")[0] and folds[first] != folds[second]:
            assert gap_nm(boxes[first], boxes[second]) >= MARGIN_NM - 1e-3, (first, second)
    sizes = Counter(folds.values())
    assert max(sizes.values()) - min(sizes.values()) <= 2


def test_datasets_of_one_specimen_share_a_fold(crops, table):
    folds, _ = divide(table, "specimen")
    datasets = {name.split("/")[0] for name in crops}
    assert set(SPECIMENS) <= datasets
    of_specimen = {}
    for name in crops:
        dataset = name.split("/")[0]
        of_specimen.setdefault(SPECIMENS.get(dataset, dataset), set()).add(folds[name])
    assert len(of_specimen) == 15
    assert all(len(found) == 1 for found in of_specimen.values())


def test_more_folds_than_specimens_are_refused(table):
    with pytest.raises(ConfigError, match=r"folds\.n is 16, but the crops form only 15 groups"):
        divide(table, "specimen", n=16)


def test_random_partition_of_the_toolbox_that_splits_overlapping_crops_is_refused(crops, table):
    split = table.with_name("datasplit.csv")
    with split.open("w", newline="") as stream:
        for i, name in enumerate(crops):
            dataset, crop = name.split("/")
            side = "validate" if i % 5 == 0 else "train"
            container = f"/data/{dataset}/{dataset}.zarr"
            label = f"recon-1/labels/groundtruth/{crop}/[nuc,mito]"
            csv.writer(stream).writerow([side, container, "recon-1/em/fibsem-uint8", container, label])
    with pytest.raises(ConfigError, match=r"jrc_\S+/crop\d+ \((training|validation)\) and jrc_\S+/crop\d+ .* overlap"):
        divide(table, "crop", datasplit=split)
