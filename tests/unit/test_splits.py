"""Folds: no group on both sides, every crop once, each class on both sides where that is possible."""

import csv
import itertools
import logging
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.crops import read_crops
from cellmap_pipe.prepare.specimens import SPECIMENS, specimens_of
from cellmap_pipe.prepare.splits import (
    Crop,
    assign_folds,
    describe_folds,
    group_crops,
    near,
    read_folds,
    write_folds,
)

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
REAL = Path(__file__).parents[3] / "shared" / "data" / "real-em"


def box(lower, shape=(10, 10, 10), voxel=(10.0, 10.0, 10.0)):
    return Lattice(voxel, tuple(lo + v / 2 for lo, v in zip(lower, voxel, strict=True)), shape)


def write_crops_csv(path, crops):
    with path.open("w", newline="") as stream:
        columns = "crop dataset em labels annotated listed voxel_nm translation_nm shape problem".split()
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        for crop in crops:
            row = {"crop": crop.name, "dataset": crop.dataset, "annotated": ";".join(crop.annotated)}
            row["listed"] = ";".join(crop.listed)
            if crop.box:
                for key in ("voxel_nm", "translation_nm", "shape"):
                    row[key] = ";".join(f"{v:.10g}" for v in getattr(crop.box, key))
            writer.writerow(row)
    return path


crop_lists = st.lists(
    st.tuples(
        st.sampled_from(["a", "b"]),
        st.tuples(*[st.integers(0, 12)] * 3),
        st.sets(st.sampled_from(["pm", "mito", "nuc", "er"]), max_size=4),
    ),
    min_size=4,
    max_size=14,
).map(
    lambda rows: [
        Crop(f"{dataset}/crop{i}", dataset, tuple(sorted(classes)), box([40.0 * p for p in place]))
        for i, (dataset, place, classes) in enumerate(rows)
    ]
)


@SETTINGS
@given(crop_lists, st.floats(0, 300))
def test_groups_are_the_chains_of_crops_closer_than_the_margin(crops, margin_nm):
    groups = group_crops(crops, "crop", margin_nm)
    # reference: grow each crop's group until nothing is added any more
    for crop in crops:
        reached = {crop.name}
        while True:
            more = {
                other.name
                for one, other in itertools.product(crops, crops)
                if one.name in reached and one.dataset == other.dataset and one.name != other.name
                and all(
                    max(a, b) - min(c, d) < margin_nm - 1e-3
                    for a, b, c, d in zip(
                        one.box.lower_nm, other.box.lower_nm, one.box.upper_nm, other.box.upper_nm, strict=True
                    )
                )
            } | reached  # fmt: skip
            if more == reached:
                break
            reached = more
        assert {name for name, group in groups.items() if group == groups[crop.name]} == reached


def one_sided(folds, groups, annotated):
    """Return the classes that are in several groups but in one fold only."""
    found = set()
    for name in {c for classes in annotated.values() for c in classes}:
        holders = [crop for crop, classes in annotated.items() if name in classes]
        if len({groups[crop] for crop in holders}) > 1 and len({folds[crop] for crop in holders}) < 2:
            found.add(name)
    return found


@SETTINGS
@given(crop_lists, st.integers(2, 4), st.integers(0, 3), st.randoms(use_true_random=False))
def test_folds_keep_groups_together_and_do_not_depend_on_the_order_of_rows(crops, n, seed, shuffler):
    groups = group_crops(crops, "crop", 100.0)
    annotated = {crop.name: crop.annotated for crop in crops}
    if len(set(groups.values())) < n:
        with pytest.raises(ConfigError, match=f"folds.n is {n}"):
            assign_folds(annotated, groups, n=n, seed=seed)
        return
    folds = assign_folds(annotated, groups, n=n, seed=seed)
    assert set(folds) == set(annotated)
    assert all(0 <= fold < n for fold in folds.values())
    for group in set(groups.values()):
        assert len({folds[crop] for crop in folds if groups[crop] == group}) == 1
    shuffled = list(crops)
    shuffler.shuffle(shuffled)
    assert folds == assign_folds(
        {crop.name: crop.annotated for crop in shuffled},
        group_crops(shuffled, "crop", 100.0),
        n=n,
        seed=seed,
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.sets(st.sampled_from(["pm", "mito", "nuc", "er"]), max_size=3), min_size=3, max_size=6),
    st.integers(2, 3),
    st.integers(0, 5),
)
def test_every_class_is_on_both_sides_where_any_division_manages_that(contents, n, seed):
    annotated = {f"a/crop{i}": tuple(sorted(classes)) for i, classes in enumerate(contents)}
    groups = {crop: crop for crop in annotated}
    folds = assign_folds(annotated, groups, n=n, seed=seed)
    best = min(
        len(one_sided(dict(zip(annotated, choice, strict=True)), groups, annotated))
        for choice in itertools.product(range(n), repeat=len(annotated))
    )
    assert len(one_sided(folds, groups, annotated)) == best


def test_classes_and_crops_are_spread_evenly():
    generator = random.Random(1)
    names = [f"class{i}" for i in range(12)]
    annotated = {f"a/crop{i}": tuple(names if i % 2 else generator.sample(names, 3)) for i in range(60)}
    folds = assign_folds(annotated, {crop: crop for crop in annotated}, n=5, seed=0)
    sizes = [list(folds.values()).count(fold) for fold in range(5)]
    assert max(sizes) - min(sizes) <= 2
    for name in names:
        held = [sum(name in annotated[crop] for crop in folds if folds[crop] == fold) for fold in range(5)]
        assert max(held) - min(held) <= 2


def test_every_fold_has_a_crop():
    annotated = {f"a/crop{i}": () for i in range(5)}
    folds = assign_folds(annotated, {crop: crop for crop in annotated}, n=5, seed=0)
    assert sorted(folds.values()) == [0, 1, 2, 3, 4]


def test_seed_changes_the_folds():
    annotated = {f"a/crop{i}": ("pm",) for i in range(12)}
    groups = {crop: crop for crop in annotated}
    tables = [assign_folds(annotated, groups, n=3, seed=seed) for seed in range(4)]
    assert any(table != tables[0] for table in tables)


def test_too_few_folds_are_refused():
    with pytest.raises(ConfigError, match="at least 2 folds"):
        assign_folds({"a/crop1": ()}, {"a/crop1": "a/crop1"}, n=1, seed=0)


def test_fold_table_holds_every_crop_also_those_that_cannot_be_read(tmp_path):
    crops = [Crop(f"a/crop{i}", "a", ("pm",), box([0, 0, 2000.0 * i])) for i in range(6)]
    crops.append(Crop("a/crop99", "a", (), None))
    table = write_crops_csv(tmp_path / "crops.csv", crops)
    write_folds(table, tmp_path / "folds.csv", n=3, seed=0, group="crop", margin_nm=100)
    assert set(read_folds(tmp_path / "folds.csv")) == {crop.name for crop in crops}
    first = (tmp_path / "folds.csv").read_bytes()
    write_folds(table, tmp_path / "folds.csv", n=3, seed=0, group="crop", margin_nm=100)
    assert (tmp_path / "folds.csv").read_bytes() == first
    assert first.splitlines()[0] == b"crop,group,fold,grouped_by"
    assert {row["grouped_by"] for row in read_crops(tmp_path / "folds.csv")} == {"crop"}


def table_of_folds(path, crops, margin_nm=0.0, **settings):
    write_folds(write_crops_csv(path / "crops.csv", crops), path / "folds.csv", n=3, margin_nm=margin_nm, **settings)
    return read_folds(path / "folds.csv")


def test_folds_go_by_what_is_listed_and_not_by_what_of_it_is_on_disk(tmp_path):
    classes = [("pm",), ("nuc",), ("pm", "er"), ("er",), ("nuc", "mito"), ("mito",), ("pm",), ("er", "nuc")]
    crops = [Crop(f"a/crop{i}", "a", c, box([0, 0, 900.0 * (i // 2)]), listed=c) for i, c in enumerate(classes)]
    whole = table_of_folds(tmp_path, crops, seed=0, group="crop", margin_nm=200)
    fetched = [crop._replace(annotated=crop.annotated[: i % 2]) for i, crop in enumerate(crops)]
    assert table_of_folds(tmp_path, fetched, seed=0, group="crop", margin_nm=200) == whole
    unlisted = [crop._replace(listed=()) for crop in fetched]
    assert table_of_folds(tmp_path, unlisted, seed=0, group="crop", margin_nm=200) != whole


@SETTINGS
@given(crop_lists, st.integers(0, 3), st.data())
def test_crops_of_an_earlier_table_keep_their_folds_and_groups_stay_whole(tmp_path_factory, crops, seed, data):
    folder = tmp_path_factory.mktemp("folds")
    names = [crop.name for crop in crops]
    old = data.draw(st.sets(st.sampled_from(names), min_size=3))
    gone = data.draw(st.sets(st.sampled_from(names), max_size=3))
    margin_nm = data.draw(st.sampled_from([0.0, 30.0, 60.0]))
    settings = {"seed": seed, "group": "crop", "margin_nm": margin_nm}
    try:
        earlier = table_of_folds(folder, [crop for crop in crops if crop.name in old], **settings)
        (folder / "folds.csv").rename(folder / "kept.csv")
        now = [crop for crop in crops if crop.name not in gone]
        folds = table_of_folds(folder, now, **settings, keep=folder / "kept.csv")
    except ConfigError as error:  # too few groups, or nothing of the earlier table
        assert "at least 2 folds" in str(error) or "stay together" in str(error) or "names none" in str(error)
        return
    assert {crop: fold for crop, fold in folds.items() if crop in earlier} == {
        crop: fold for crop, fold in earlier.items() if crop not in gone
    }
    for first, second in itertools.combinations([crop for crop in now if crop.name in folds], 2):
        assert not near(first, second, margin_nm) or folds[first.name] == folds[second.name]
    # the table's groups are those of what is in it, and each crop that was left out would join two folds
    inside = [crop for crop in now if crop.name in folds]
    with (folder / "folds.csv").open() as stream:
        assert {row["crop"]: row["group"] for row in csv.DictReader(stream)} == group_crops(inside, "crop", margin_nm)
    for crop in now:
        if crop.name not in folds:
            groups = group_crops([*inside, crop], "crop", margin_nm)
            assert len({folds[name] for name in folds if groups[name] == groups[crop.name]}) > 1


def test_without_an_earlier_table_a_new_crop_moves_others(tmp_path):
    # what folds.keep is for
    numbers = np.random.default_rng(0)
    names = ["pm", "mito", "nuc", "er", "ves"]
    crops = [
        Crop(f"a/crop{i}", "a", tuple(np.array(names)[numbers.random(5) < 0.4]), box([0, 0, 9000.0 * i]))
        for i in range(30)
    ]
    before = table_of_folds(tmp_path, crops[:-1], seed=0, group="crop")
    (tmp_path / "folds.csv").rename(tmp_path / "kept.csv")
    after = table_of_folds(tmp_path, crops, seed=0, group="crop")
    kept = table_of_folds(tmp_path, crops, seed=0, group="crop", keep=tmp_path / "kept.csv")
    moved = [sum(folds[crop] != fold for crop, fold in before.items()) for folds in (after, kept)]
    assert moved[0] > 0 and moved[1] == 0 and len(kept) == 30


def test_a_new_crop_between_crops_of_two_folds_is_left_out_with_a_warning(tmp_path, caplog):
    crops = [Crop(f"a/crop{i}", "a", ("pm",), box([0, 0, 150.0 * i])) for i in range(5)]
    apart = [crops[i] for i in (0, 2, 4)]
    earlier = table_of_folds(tmp_path, apart, margin_nm=100, seed=0, group="crop")
    assert sorted(earlier.values()) == [0, 1, 2]
    (tmp_path / "folds.csv").rename(tmp_path / "kept.csv")
    assert table_of_folds(tmp_path, crops, margin_nm=100, seed=0, group="crop", keep=tmp_path / "kept.csv") == earlier
    assert "2 new crops lie close to crops of different folds and are left out: a/crop1, a/crop3" in caplog.text


def test_a_new_dataset_joins_an_earlier_table_by_dataset_and_specimen(tmp_path):
    crops = [Crop(f"{d}/crop{i}", d, ("pm",), box([0, 0, 9000.0 * i])) for d in "abcde" for i in range(2)]
    for group, specimens in (("dataset", {}), ("specimen", {"d": "mouse", "e": "mouse"}), ("specimen", {"e": "fly"})):
        settings = {"seed": 0, "group": group, "specimens": specimens}
        known = [crop for crop in crops if crop.dataset != "e"]
        used = {name: specimen for name, specimen in specimens.items() if name != "e"}
        earlier = table_of_folds(tmp_path, known, **{**settings, "specimens": used})
        (tmp_path / "folds.csv").rename(tmp_path / "kept.csv")
        folds = table_of_folds(tmp_path, crops, **settings, keep=tmp_path / "kept.csv")
        assert earlier.items() <= folds.items() and len(folds) == 10
        assert folds["e/crop0"] == folds["e/crop1"]
        if "d" in specimens:
            assert folds["e/crop0"] == folds["d/crop0"]


def test_crops_of_an_earlier_table_are_known_by_their_numbers_and_those_that_are_gone_are_told(tmp_path, caplog):
    crops = [Crop(f"a/crop{i}", "a", ("pm",), box([0, 0, 9000.0 * i])) for i in range(1, 7)]
    (tmp_path / "kept.csv").write_text("crop,fold\na/crop001,2\na/crop2,2\na/crop77,0\n")
    folds = table_of_folds(tmp_path, crops, seed=0, group="crop", keep=tmp_path / "kept.csv")
    assert folds["a/crop1"] == folds["a/crop2"] == 2
    assert "kept.csv: 1 of its crops are not among the crops found: a/crop77" in caplog.text


def test_a_chain_of_new_crops_is_taken_up_to_the_one_that_would_join_two_folds(tmp_path, caplog):
    crops = [Crop(f"a/crop{i}", "a", ("pm",), box([0, 0, 150.0 * i])) for i in range(6)]
    (tmp_path / "kept.csv").write_text("crop,fold\na/crop0,0\na/crop5,1\na/crop4,1\n")
    far = Crop("a/crop9", "a", ("pm",), box([0, 0, 9000.0]))
    folds = table_of_folds(tmp_path, [*crops, far], margin_nm=160, seed=0, group="crop", keep=tmp_path / "kept.csv")
    assert folds == {"a/crop0": 0, "a/crop1": 0, "a/crop2": 0, "a/crop4": 1, "a/crop5": 1, "a/crop9": 2}
    assert "1 new crops lie close to crops of different folds and are left out: a/crop3" in caplog.text


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("crop,fold\n" + "".join(f"a/crop{i},{i % 2}\n" for i in range(6)), {}, "leaves fold 2 without a crop; lower"),
        (None, {}, r"folds\.keep .*kept\.csv: is no table of folds"),
        ("crop,group\na/crop0,a\n", {}, r"folds\.keep .*kept\.csv: is no table of folds \(KeyError: 'fold'\)"),
        ("crop,fold\na/crop0,x\n", {}, r"folds\.keep .*kept\.csv: is no table of folds"),
        ("crop,fold\na/crop0,4\n", {}, r"has fold 4, folds\.n is 3; set folds\.n to 5 or more"),
        ("crop,fold\na/crop0,-1\n", {}, r"always in training; set folds\.datasplit to the table"),
        ("crop,fold\nb/crop0,1\n", {}, "names none of the crops found"),
        (
            "crop,fold\na/crop0,1\na/crop1,2\n",
            {"margin_nm": 500},
            r"a/crop0 \(fold 1\) and a/crop1 \(fold 2\) must stay together; take folds\.group, folds\.margin_nm",
        ),
    ],
)
def test_an_earlier_table_that_cannot_be_kept_says_why(tmp_path, text, settings, message):
    crops = [Crop(f"a/crop{i}", "a", ("pm",), box([0, 0, (300.0 if i < 2 else 3000.0) * i])) for i in range(6)]
    if text:
        (tmp_path / "kept.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        table_of_folds(tmp_path, crops, seed=0, group="crop", keep=tmp_path / "kept.csv", **settings)


def test_grouping_by_dataset_keeps_datasets_whole(tmp_path):
    crops = [Crop(f"{d}/crop{i}", d, ("pm",), box([0, 0, 9000.0 * i])) for d in "abc" for i in range(3)]
    table = write_crops_csv(tmp_path / "crops.csv", crops)
    write_folds(table, tmp_path / "folds.csv", n=3, seed=0, group="dataset", margin_nm=0)
    folds = read_folds(tmp_path / "folds.csv")
    assert {frozenset(c for c in folds if folds[c] == k) for k in range(3)} == {
        frozenset(crop.name for crop in crops if crop.dataset == d) for d in "abc"
    }
    with pytest.raises(ConfigError, match=r"folds\.group is 'sample'"):
        write_folds(table, tmp_path / "folds.csv", n=3, seed=0, group="sample", margin_nm=0)


def test_grouping_by_specimen_keeps_the_volumes_of_one_specimen_whole(tmp_path):
    datasets = ["jrc_cos7-1a", "jrc_cos7-1b", "jrc_jurkat-1", "mine-1", "mine-2"]
    crops = [Crop(f"{d}/crop{i}", d, ("pm",), box([0, 0, 9000.0 * i])) for d in datasets for i in range(2)]
    table = write_crops_csv(tmp_path / "crops.csv", crops)

    def groups(**specimens):
        settings = {"n": 3, "seed": 0, "group": "specimen", "margin_nm": 0, "specimens": specimens}
        write_folds(table, tmp_path / "folds.csv", **settings)
        rows = read_crops(tmp_path / "folds.csv")
        assert {row["grouped_by"] for row in rows} == {"specimen"}
        assert len({(row["group"], row["fold"]) for row in rows}) == len({row["group"] for row in rows})
        return {row["crop"].split("/")[0]: row["group"] for row in rows}

    assert groups() == {d: "jrc_cos7-1" if "cos7" in d else d for d in datasets}
    assert groups(**{"mine-1": "mouse-7", "mine-2": "mouse-7", "jrc_cos7-1b": "another"}) == {
        "jrc_cos7-1a": "jrc_cos7-1",
        "jrc_cos7-1b": "another",
        "jrc_jurkat-1": "jrc_jurkat-1",
        "mine-1": "mouse-7",
        "mine-2": "mouse-7",
    }
    # another dataset's own name joins its specimen
    assert groups(**{"mine-2": "mine-1"})["mine-2"] == "mine-1"


def test_specimens_of_unknown_datasets_are_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"folds\.specimens: there is no dataset 'mine-10'; did you mean 'mine-1'"):
        specimens_of(["mine-1"], {"mine-10": "mouse-7"})
    with pytest.raises(ConfigError, match="datasets found: mine-1"):
        specimens_of(["mine-1"], {"xyz": "mouse-7"})
    # the challenge's datasets are known, also where this run has no crop of them
    assert specimens_of(["mine-1"], {"jrc_hela-2": "dish-2"}) == {"mine-1": "mine-1"}


def test_every_built_in_specimen_has_several_datasets():
    assert all(list(SPECIMENS.values()).count(specimen) > 1 for specimen in SPECIMENS.values())


def test_fewer_specimens_than_folds_are_refused_with_the_remedy(tmp_path):
    crops = [Crop(f"{d}/crop1", d, ("pm",), box([0, 0, 0])) for d in ("jrc_hela-2", "jrc_hela-3", "a")]
    table = write_crops_csv(tmp_path / "crops.csv", crops)
    with pytest.raises(ConfigError, match=r"folds.n is 3, but the crops form only 2 groups.*fewer folds \(folds.n\)"):
        write_folds(table, tmp_path / "folds.csv", n=3, seed=0, group="specimen", margin_nm=0)


@pytest.mark.parametrize("group", ["crop", "dataset", "specimen"])
def test_table_and_log_say_what_the_division_estimates(tmp_path, caplog, group):
    crops = [Crop(f"{d}/crop{i}", d, ("pm",), box([0, 0, 9000.0 * i])) for d in "abc" for i in range(2)]
    table = write_crops_csv(tmp_path / "crops.csv", crops)
    with caplog.at_level(logging.INFO):
        write_folds(table, tmp_path / "folds.csv", n=3, seed=0, group=group, margin_nm=0)
    text = describe_folds(tmp_path / "folds.csv")
    assert text.startswith("3 folds of 2, 2, 2 crops; ")
    assert {"crop": "leaderboard", "dataset": "a new dataset", "specimen": "a new specimen"}[group] in text
    assert text in caplog.text


def test_classes_that_cannot_be_on_both_sides_are_named(tmp_path, caplog):
    crops = [Crop(f"a/crop{i}", "a", ("pm", "nuc") if i == 1 else ("pm",), box([0, 0, 900.0 * i])) for i in range(4)]
    table = write_crops_csv(tmp_path / "crops.csv", crops)
    with caplog.at_level(logging.WARNING):
        write_folds(table, tmp_path / "folds.csv", n=2, seed=0, group="crop", margin_nm=0)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("are in one fold, so none is both trained and validated: nuc")


# a partition given by the user


@pytest.fixture
def three(tmp_path):
    crops = [
        Crop("fly-1/crop101", "fly-1", ("pm",), box([0, 0, 0])),
        Crop("fly-1/crop102", "fly-1", ("pm",), box([0, 0, 150])),
        Crop("fly-2/crop103", "fly-2", ("pm",), box([0, 0, 0])),
    ]
    return write_crops_csv(tmp_path / "crops.csv", crops)


def divided(table, text, margin_nm=0.0):
    split, out = table.with_name("datasplit.csv"), table.with_name("folds.csv")
    split.write_text(text)
    write_folds(table, out, n=5, seed=0, group="crop", margin_nm=margin_nm, datasplit=split)
    return read_folds(out)


def toolbox_row(side, dataset, crop, classes="[pm,mito]", root="/data"):
    container = f"{root}/{dataset}/{dataset}.zarr"
    label = f"recon-1/labels/groundtruth/{crop}/{classes}"
    return f'"{side}","{container}","recon-1/em/fibsem-uint8","{container}","{label}"\n'


FORMS = {
    "toolbox": toolbox_row("train", "fly-1", "crop101") + toolbox_row("validate", "fly-1", "crop102"),
    "toolbox, per class": toolbox_row("train", "fly-1", "crop101", "pm")
    + toolbox_row("train", "fly-1", "crop101", "mito")
    + toolbox_row("validate", "fly-1", "crop102", "pm"),
    "toolbox, s3 and n5": toolbox_row("train", "fly-1", "crop101", root="s3://bucket").replace(".zarr", ".n5")
    + toolbox_row("validate", "fly-1", "crop102", root="s3://bucket"),
    "three cells": "train,/data/fly-1/fly-1.zarr/recon-1/labels/groundtruth/crop101\nvalidate,fly-1,crop102\n",
    "header": "split,dataset,crop\ntrain,fly-1,crop101\nvalidate,fly-1,102\n",
    "leading zeros": "split,dataset,crop\ntrain,fly-1,crop0101\nvalidate,fly-1,000102\n , ,\n",
    "container in a container": toolbox_row("train", "fly-1", "crop101", root="/data/all.zarr")
    + toolbox_row("validate", "fly-1", "crop102"),
    "header, full names": "crop,split\nfly-1/crop101,train\n\nfly-1/crop102,validation\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_datasplit_is_read_in_each_form(three, form):
    assert divided(three, FORMS[form]) == {"fly-1/crop101": -1, "fly-1/crop102": 0}


def test_datasplit_rows_on_other_crops_are_left_out_with_a_warning(three, caplog):
    text = FORMS["toolbox"] + toolbox_row("train", "fly-9", "crop7")
    with caplog.at_level(logging.WARNING):
        assert divided(three, text) == {"fly-1/crop101": -1, "fly-1/crop102": 0}
    assert "fly-9/crop7" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FORMS["toolbox"] + toolbox_row("validate", "fly-1", "crop101"), "line 3: fly-1/crop101 is on both sides"),
        ("exclude,fly-1,crop101\n", "line 1: starts with 'exclude'; allowed: train, validate"),
        ("split,dataset,crop\ntrain,fly-1\n", "line 2: has 2 cells, its header 3"),
        ("dataset,split,crop\nfly,1,train,crop101\n", "line 2: has 4 cells, its header 3"),
        ("train,fly-1\n", "line 1: no dataset and crop found"),
        ("split,name\ntrain,crop101\n", "split, dataset and crop are needed"),
        (toolbox_row("train", "fly-1", "crop101"), "no crop on side 'validate'"),
        ("", "no crop on side"),
    ],
)
def test_datasplit_that_cannot_be_used_says_why(three, text, message):
    with pytest.raises(ConfigError, match=message):
        divided(three, text)


def test_missing_datasplit_is_named(three):
    with pytest.raises(ConfigError, match=r"nowhere\.csv: cannot be read"):
        write_folds(three, three.with_name("f.csv"), n=2, seed=0, group="crop", margin_nm=0, datasplit="nowhere.csv")


def test_overlap_across_the_sides_is_refused_naming_the_pair(tmp_path):
    crops = [Crop("a/crop1", "a", (), box([0, 0, 0])), Crop("a/crop2", "a", (), box([0, 0, 90]))]
    table = write_crops_csv(tmp_path / "crops.csv", crops)
    with pytest.raises(ConfigError, match=r"a/crop1 \(training\) and a/crop2 \(validation\) overlap"):
        divided(table, "split,dataset,crop\ntrain,a,1\nvalidate,a,2\n")
    with pytest.raises(ConfigError, match=r"a/crop1 \(training\) and a/crop2 \(validation\) overlap"):
        divided(table, toolbox_row("train", "a", "crop1") + toolbox_row("validate", "a", "crop2"))
    assert not table.with_name("folds.csv").exists()


def test_all_overlaps_across_the_sides_are_counted(tmp_path):
    crops = [Crop(f"a/crop{i}", "a", (), box([0, 0, 90.0 * i])) for i in range(4)]
    table = write_crops_csv(tmp_path / "crops.csv", crops)
    sides = ["train", "validate", "train", "validate"]
    text = "".join(toolbox_row(side, "a", f"crop{i}") for i, side in enumerate(sides))
    pattern = r"crop0 \(training\) and a/crop1 \(validation\) overlap; .*; 2 more: a/crop1 \(validation\) and a/crop2"
    with pytest.raises(ConfigError, match=pattern):
        divided(table, text)


def test_table_of_a_given_partition_says_so(three, caplog):
    with caplog.at_level(logging.INFO):
        divided(three, FORMS["toolbox"])
    text = "1 fold of 1 crops (1 more are always in training); divided as the given datasplit.csv says"
    assert text in caplog.text
    assert {row["grouped_by"] for row in read_crops(three.with_name("folds.csv"))} == {"datasplit"}


def test_closeness_across_the_sides_is_only_warned_of(three, caplog):
    with caplog.at_level(logging.WARNING):
        divided(three, FORMS["toolbox"], margin_nm=200.0)
    assert "fly-1/crop101 (training) and fly-1/crop102 (validation) are 50 nm apart" in caplog.text


def test_touching_real_crops_are_divided_without_complaint(tmp_path, caplog):
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is missing")
    from cellmap_pipe.prepare.crops import write_crops

    listed = tmp_path / "listed.csv"
    listed.write_text("crop\nfly_medulla-2/crop101\nfly_medulla-2/crop102\n")
    data = {
        "root": str(REAL),
        "em_path": "recon-1/em/fibsem-uint8",
        "labels_path": "recon-1/labels/groundtruth",
        "crops": str(listed),
    }
    write_crops(data, tmp_path / "crops.csv")
    text = toolbox_row("train", "fly_medulla-2", "crop101") + toolbox_row("validate", "fly_medulla-2", "crop102")
    with caplog.at_level(logging.WARNING):
        assert divided(tmp_path / "crops.csv", text) == {"fly_medulla-2/crop101": -1, "fly_medulla-2/crop102": 0}
    assert "apart" not in caplog.text
