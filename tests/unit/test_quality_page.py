"""The quality page shows every crop where it is worth looking at, says what is wrong, and needs nothing but itself."""

import base64
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cellmap_pipe.colours import colour_of
from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import describe_file
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare import nifti
from cellmap_pipe.prepare.labels import ABSENT, PRESENT, UNKNOWN
from cellmap_pipe.prepare.state_table import encode_table
from cellmap_pipe.report.canvas import OPACITY, rgb
from cellmap_pipe.report.quality import CAUSES, cause_of, write_quality_page

ROOT = Path(__file__).parents[2]
CLASSES = ["pm", "mito_mem"]
LATTICE = Lattice((8, 8, 8), (104, 204, 304), (6, 40, 60))
KNOWN, PM, MITO, UNKNOWN_ROW = 0, 1, 2, 255
VOCABULARY = (
    "blank EM",
    "EM not downloaded",
    "resolution mismatch: no EM level",
    "outside EM",
    "unannotated",
    "too large for the memory budget: 3 GB",
    "misregistered: labels are off by (+3, +0, +0) voxels (z, y, x)",
    "low contrast",
    "unreadable: no .zattrs",
    "nothing known",
    "dropped by quality.drop",
    "kept by quality.keep in spite of: low contrast",
)


def block(shape, seed=0):
    return np.random.default_rng(seed).integers(60, 200, shape, dtype=np.uint8)


def record(folder, crop, labels, lattice=LATTICE, image=None, **more):
    """Return the record of a crop whose NIfTI pair is written under `folder`."""
    table = np.full((256, 2), UNKNOWN, np.uint8)
    table[KNOWN], table[PM], table[MITO] = (ABSENT, ABSENT), (PRESENT, ABSENT), (ABSENT, PRESENT)
    stem = crop.replace("/", "_")
    paths = {"image": folder / f"images/{stem}_0000.nii.gz", "label": folder / f"labels/{stem}.nii.gz"}
    nifti.write_nifti(paths["image"], block(lattice.shape) if image is None else image, lattice)
    nifti.write_nifti(paths["label"], labels, lattice)
    return {
        "crop": crop,
        "status": "ok",
        "lattice": lattice.to_dict(),
        "classes": CLASSES,
        "annotated": CLASSES,
        "counts": {name: {"present": 9, "absent": 9, "unknown": 0} for name in CLASSES},
        "em_level": {"path": "s1", "voxel_nm": [8.0, 8.0, 8.0], "factors": [1.0, 1.0, 1.0]},
        "em_stats": {"mean": 130.0, "std": 40.0},
        "table": encode_table(table, [KNOWN, PM, MITO, UNKNOWN_ROW]),
        "files": {kind: describe_file(path, folder) for kind, path in paths.items()},
        **more,
    }


def stripes(shape=LATTICE.shape):
    labels = np.zeros(shape, np.uint8)
    labels[:, 10:30, 10:50], labels[:, 32:38, 10:50] = PM, MITO
    return labels


def page_of(folder, records, rows, nifti_dir):
    """Write the page of these records and return its text. rows: dicts of crops.csv."""
    shard, table = folder / "shard0.json", folder / "crops.csv"
    shard.write_text(json.dumps({"grid": "8nm", "classes": CLASSES, "records": records}))
    columns = list(dict.fromkeys(["crop", "verdict", "cause", *(key for row in rows for key in row)]))
    with open(table, "w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    write_quality_page(table, [shard], folder / "quality.html", nifti_dir=nifti_dir)
    return (folder / "quality.html").read_text()


def row(crop, verdict="keep", cause="", **figures):
    return {"crop": crop, "verdict": verdict, "cause": cause, **figures}


def cards(text):
    """Return the HTML of each crop's card."""
    return dict(re.findall(r'<article class="crop" data-crop="([^"]+)"(.*?)</article>', text, re.DOTALL))


def pictures(card):
    """Return the images of a card as RGBA arrays: EM and labels of the planes z, y and x in turn."""
    sources = re.findall(r'<img src="data:image/webp;base64,([^"]+)"', card)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")) for data in sources]


@pytest.fixture
def three(tmp_path):
    """A crop to keep, one that is flagged and partly unknown, and one without files."""
    folder = tmp_path / "nifti"
    placed = {"verdict": "in place", "scale": 1, "shift": [0, 0, 1], "shift_nm": [0.0, 0.0, 8.0], "margin": 1.25}
    partly = stripes()
    partly[:, :, 30:] = UNKNOWN_ROW
    records = [
        record(folder, "d/crop1", stripes(), registration={**placed, "best": 0.5, "identity": 0.4, "classes": ["pm"]}),
        record(folder, "d/crop2", partly, warnings=["odd <translation>"], contradictions=["pm: 3 voxels", "b"]),
        {"crop": "d/crop3", "status": "failed", "cause": "no .zattrs", "counts": {}, "annotated": []},
    ]
    rows = [
        row("d/crop1", train_mb="310.0", predict_mb="1240.0", em_valid_fraction="0.9130", known_fraction="0.5"),
        row("d/crop2", "flag", "low contrast"),
        row("d/crop3", "reject", "unreadable: no <.zattrs>", em_valid_fraction="0.0000"),
    ]
    return tmp_path, records, rows, folder


def test_every_crop_has_a_card_with_verdict_cause_and_remedy(three):
    found = cards(page_of(*three))
    assert list(found) == ["d/crop1", "d/crop2", "d/crop3"]
    assert 'data-verdict="flag"' in found["d/crop2"]
    assert "low contrast" in found["d/crop2"]
    assert CAUSES["low contrast"].remedy in found["d/crop2"]
    assert "What helps" not in found["d/crop1"]
    assert found["d/crop3"].count("unreadable: no &lt;.zattrs&gt;") >= 2  # as cause and in place of the planes
    assert not pictures(found["d/crop3"])


def test_figures_of_a_crop_stand_in_its_card_and_missing_ones_are_dashes(three):
    found = cards(page_of(*three))
    for figure in ("6 × 40 × 60 voxels of 8 nm", "91.3 % on disk", "training 310 MB, prediction 1.2 GB", "50 %"):
        assert figure in found["d/crop1"]
    place = "in place; best with labels moved by (0, 0, +1) voxels = (0, 0, +8) nm; margin 1.25; by pm"
    assert place in found["d/crop1"]
    assert "2 contradictions" in found["d/crop2"]
    assert "odd &lt;translation&gt;" in found["d/crop2"]
    assert found["d/crop3"].count("&ndash;") == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "in place; nothing fits better; margin 1; by pm, mito"),
        (
            {"verdict": "displaced", "shift": [6, -9, 6], "shift_nm": [96.0, -144.0, 96.0], "margin": 10.66},
            "displaced; best with labels moved by (+6, -9, +6) voxels = (+96, -144, +96) nm; margin 10.7; by pm, mito",
        ),
        ({"verdict": "rescaled", "scale": 2.0, "margin": 13.9}, "rescaled; best at scale 2; margin 13.9; by pm, mito"),
        ({"verdict": "not assessable", "margin": 0.0, "classes": []}, "not assessable"),
    ],
)
def test_the_certificate_says_where_labels_fit_best(tmp_path, changes, words):
    place = {"verdict": "in place", "scale": 1.0, "shift": [0, 0, 0], "shift_nm": [0.0, 0.0, 0.0], "margin": 1.0}
    entry = record(tmp_path, "d/crop1", stripes(), registration=place | {"classes": ["pm", "mito"]} | changes)
    card = cards(page_of(tmp_path, [entry], [row("d/crop1")], tmp_path))["d/crop1"]
    assert f"</span>{words}</dd>" in card


def test_a_resolution_mismatch_is_explained_by_its_verdict(tmp_path):
    entries = [record(tmp_path, f"d/crop{n}", stripes()) for n in (1, 2)]
    said = "resolution mismatch: labels show twice the image's field of view (they fit best at scale 2)"
    rows = [row("d/crop1", "flag", said), row("d/crop2", "reject", "resolution mismatch: 8 times")]
    text = page_of(tmp_path, entries, rows, tmp_path)
    assert "check the voxel sizes" in cards(text)["d/crop1"] and "raise max_upsample" in cards(text)["d/crop2"]
    assert "raise max_upsample" not in cards(text)["d/crop1"]
    assert text.count('<td class="number" data-value="1">1</td>') == 2


def test_crops_are_counted_by_verdict_and_cause(three):
    text = page_of(*three)
    assert "keep (1)" in text and "flag (1)" in text and "reject (1)" in text
    rows = [re.sub("<[^>]+>", "|", line) for line in text.splitlines() if line.startswith("<tr>")]
    assert any("reject" in line and "unreadable" in line and CAUSES["unreadable"].meaning in line for line in rows)


def test_page_needs_nothing_but_itself_and_is_the_same_bytes_each_time(three):
    text = page_of(*three)
    assert "http" not in text
    assert set(re.findall(r'(?:src|href)="([^,"]+)', text)) == {"data:image/webp;base64"}
    assert page_of(*three) == text


def test_planes_do_not_depend_on_how_the_files_are_cut_into_slabs(three, monkeypatch):
    text = page_of(*three)
    monkeypatch.setattr(nifti, "SLAB_VOXELS", 1)
    assert page_of(*three) == text


def test_labels_lie_over_the_em_in_the_colours_of_their_classes_and_unknown_is_dimmed(three):
    found = cards(page_of(*three))
    em, labels = pictures(found["d/crop2"])[:2]  # 40 x 60 voxels on 107 x 160 pixels
    assert em[..., :3].std() > 20
    assert abs(int(labels[53, 53, 3]) - 255 * OPACITY) <= 1
    assert np.abs(labels[53, 53, :3] - 255 * rgb(colour_of("pm"))).max() < 16
    assert np.abs(labels[93, 53, :3] - 255 * rgb(colour_of("mito_mem"))).max() < 16
    assert labels[5, 5, 3] == 0
    assert labels[53, 120, 3] > 100 and labels[53, 120, :3].max() < 16
    assert all(f">{name}<" in found["d/crop2"] for name in CLASSES)


def test_planes_have_the_proportions_of_the_tissue(tmp_path):
    lattice = Lattice((40, 8, 8), (0, 0, 0), (10, 100, 50))
    labels = np.full(lattice.shape, PM, np.uint8)
    records = [record(tmp_path / "nifti", "d/crop1", labels, lattice)]
    card = cards(page_of(tmp_path, records, [row("d/crop1")], tmp_path / "nifti"))["d/crop1"]
    assert [picture.shape[:2] for picture in pictures(card)[::2]] == [(160, 80), (80, 80), (80, 160)]
    assert re.findall(r"width:(\d+)px;height:(\d+)px", card) == [("80", "160"), ("80", "80"), ("160", "80")]
    assert ">200 nm<" in card and 'style="width:40px"' in card  # 5 nm per pixel


@pytest.mark.parametrize(
    ("background", "there", "point"),
    [
        (KNOWN, (slice(2, 5), slice(15, 25), slice(20, 40)), "3, 20, 30"),
        (KNOWN, (slice(2, 5), slice(15, 25), slice(4, 9)), "3, 20, 4"),
        (KNOWN, (1, slice(2, 5), 7), "1, 2, 7"),
        (UNKNOWN_ROW, (4, 6, slice(2, 5)), "4, 6, 2"),
        (UNKNOWN_ROW, (), "3, 20, 30"),
    ],
    ids=["the middle", "off the middle on one axis", "where a class is", "all else unknown", "all of one class"],
)
def test_planes_go_through_the_middle_or_where_there_is_more_to_see(tmp_path, background, there, point):
    labels = np.full(LATTICE.shape, background, np.uint8)
    labels[there] = PM
    records = [record(tmp_path / "nifti", "d/crop1", labels)]
    card = cards(page_of(tmp_path, records, [row("d/crop1")], tmp_path / "nifti"))["d/crop1"]
    assert ", ".join(re.findall(r"<figcaption>[zyx] = (\d+)<", card)) == point


def test_a_crop_where_nothing_is_present_shows_what_is_known(tmp_path):
    labels = np.full(LATTICE.shape, UNKNOWN_ROW, np.uint8)
    labels[0, 1] = KNOWN
    records = [record(tmp_path / "nifti", "d/crop1", labels)]
    card = cards(page_of(tmp_path, records, [row("d/crop1")], tmp_path / "nifti"))["d/crop1"]
    assert re.findall(r"<figcaption>[zyx] = (\d+)<", card) == ["0", "1", "30"]


def test_em_that_is_not_on_disk_does_not_dull_the_rest(tmp_path):
    labels = stripes()
    labels[:, :, 30:] = UNKNOWN_ROW
    image = block(LATTICE.shape)
    image[:, :, 30:] = 0
    records = [record(tmp_path / "nifti", "d/crop1", labels, image=image)]
    card = cards(page_of(tmp_path, records, [row("d/crop1")], tmp_path / "nifti"))["d/crop1"]
    em = pictures(card)[0]
    assert em[:, :75, 0].std() > 60 and np.percentile(em[:, :75, 0], 5) < 40
    assert em[:, 85:, 0].max() < 10


def test_the_whole_challenge_stays_below_twelve_megabytes(tmp_path):
    lattice = Lattice((8, 8, 8), (0, 0, 0), (160, 160, 160))
    labels = (block((16, 16, 16)) % 3).repeat(10, 0).repeat(10, 1).repeat(10, 2)
    smooth = (block((40, 40, 40), 1) // 2).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    records = [record(tmp_path / "nifti", "d/crop1", labels, lattice, smooth + block(lattice.shape) // 3)]
    text = page_of(tmp_path, records, [row("d/crop1")], tmp_path / "nifti")
    assert 289 * len(cards(text)["d/crop1"]) < 12e6


@pytest.mark.parametrize("cause", VOCABULARY)
def test_every_cause_is_explained(cause):
    assert cause_of(cause)
    assert cause.startswith(cause_of(cause))


def test_keys_that_help_are_in_the_configuration_and_every_cause_in_the_documentation():
    configuration = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    text = " ".join(f"{cause.meaning} {cause.remedy}" for cause in CAUSES.values())
    named = re.findall(r"\b(quality|labels)\.([a-z_]+)", text)
    assert named and all(key in configuration[section] for section, key in named)
    page = " ".join((ROOT / "docs/data.md").read_text().split())
    assert [cause for cause in CAUSES if f"`{cause}" not in page] == []


def test_page_without_crops_says_so(tmp_path):
    assert "No crop was found." in page_of(tmp_path, [], [], tmp_path)


def test_truncated_nifti_is_named_with_the_remedy(three):
    folder, _, _, nifti_dir = three
    path = nifti_dir / "labels/d_crop2.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ContractError, match=r"d_crop2\.nii\.gz.*-R convert"):
        page_of(*three)
    assert not (folder / "quality.html").exists()


def test_corrupt_nifti_of_the_right_size_is_named_with_the_remedy(three):
    path = three[3] / "labels/d_crop2.nii.gz"
    path.write_bytes(b"\x00" * path.stat().st_size)
    with pytest.raises(ContractError, match=r"d_crop2\.nii\.gz: damaged.*-R convert"):
        page_of(*three)
