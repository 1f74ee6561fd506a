"""The audit counts what the records say, names what contradicts itself, and lists every crop with its figures."""

import csv
import json
import re

import pytest

from cellmap_pipe.prepare.statistics import summarise
from cellmap_pipe.report.audit import AUDIT_COLUMNS, CROP_COLUMNS, write_audit

CLASSES = ["pm", "nuc"]
DISPLACED = {
    "verdict": "displaced",
    "scale": 1,
    "shift": [-3, 0, 10],
    "shift_nm": [-24.0, 0.0, 80.0],
    "best": 0.5,
    "identity": 0.25,
    "margin": 2.0,
    "classes": ["pm"],
}
NOT_ASSESSABLE = {**DISPLACED, "verdict": "not assessable", "shift": [0, 0, 0], "margin": None, "classes": []}


def record(crop, pm, nuc=(0, 0, 60), **more):
    """Return the record of a converted crop. pm, nuc: voxels present, absent, unknown."""
    states = ("present", "absent", "unknown")
    return {
        "crop": crop,
        "status": "ok",
        "counts": {"pm": dict(zip(states, pm, strict=True)), "nuc": dict(zip(states, nuc, strict=True))},
        "annotated": ["pm"],
        "label_lattice": {"voxel_nm": [4.0, 4.0, 4.0]},
        "em_level": {"path": "s1"},
        "em_valid_fraction": 0.5,
        "overlaps": {},
        "contradictions": [],
        "warnings": ["odd translation"],
        **more,
    }


FAILED = {
    "crop": "d/crop3",
    "status": "failed",
    "cause": "no .zattrs",
    "counts": {},
    "annotated": [],
    "em_valid_fraction": 0.0,
    "overlaps": {},
}


def audit(folder, *records, unused=("d/crop3", "d/crop4")):
    """Write the audit of records that two shards hold, and return its text."""
    for index in range(2):
        shard = {"grid": "8nm", "classes": CLASSES, "records": list(records[index::2])}
        (folder / f"shard{index}.json").write_text(json.dumps(shard))
    with open(folder / "crops.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["crop", "verdict", "cause"])
        for crop in sorted(entry["crop"] for entry in records):
            row = ["reject", "unreadable: no .zattrs"] if crop == "d/crop3" else ["flag", "low contrast"]
            writer.writerow([crop, *(row if crop in unused else ["keep", ""])])
    write_audit(folder / "crops.csv", [folder / "shard0.json", folder / "shard1.json"], folder / "audit.html")
    return (folder / "audit.html").read_text()


def rows(text, name):
    """Return the rows of one table of the page by their first cell."""
    body = re.search(rf'<table id="{name}">.*?</table>', text, re.DOTALL).group()
    found = (re.findall(r"<td[^>]*>(.*?)</td>", line) for line in body.splitlines() if line.startswith("<tr"))
    return {row[0]: row for row in ([re.sub("<[^>]+>", "", cell) for cell in cells] for cells in found)}


@pytest.fixture
def four(tmp_path):
    """Two crops in use, one of them without pm, a failed one and a flagged one."""
    return audit(
        tmp_path,
        record("d/crop2", (40, 60, 0), (0, 40, 60)),
        record("d/crop1", (0, 90, 10), overlaps={"pm+nuc": 3}, registration=NOT_ASSESSABLE),
        FAILED,
        record("d/crop4", (9, 9, 9), overlaps={"pm+nuc": 1500}, registration=DISPLACED),
    )


def test_states_are_counted_over_the_crops_in_use(four):
    names = [column.name for column in AUDIT_COLUMNS[1:]]
    pm, nuc = (dict(zip(names, rows(four, "states")[name][1:], strict=True)) for name in CLASSES)
    assert (pm["crops annotated"], pm["crops present"], pm["crops absent"]) == ("2", "1", "1")
    assert (pm["present (voxels)"], pm["absent (voxels)"], pm["unknown (voxels)"]) == ("40", "150", "10")
    assert (pm["supervised pairs"], pm["inferred (%)"], pm["known (%)"]) == ("190", "0.0", "95.0")
    assert pm["present / known (%)"] == "21.053"
    assert (nuc["crops annotated"], nuc["crops present"], nuc["crops absent"]) == ("0", "0", "0")


def test_what_is_known_without_an_array_of_the_class_is_inferred(four):
    nuc = rows(four, "states")["nuc"]
    assert nuc[7:9] == ["40", "100.0"]  # of 40 + 120 voxels, from the exclusion by pm


def test_true_negatives_are_those_of_the_statistics(tmp_path):
    """Annotated and nowhere present, or known everywhere; not where nothing of an annotated class is known."""
    records = [
        record("d/crop1", (0, 40, 60), (0, 100, 0)),  # pm annotated; nuc excluded everywhere
        record("d/crop2", (0, 0, 100), (0, 90, 10)),  # pm annotated, but unknown; nuc excluded in part
        record("d/crop3", (5, 95, 0), (0, 0, 100)),
    ]
    found = rows(audit(tmp_path, *records, unused=()), "states")
    column = [column.name for column in AUDIT_COLUMNS].index("crops absent")
    histogram = {"dataset": "d", "em_stats": {"histogram": [1] * 256}}
    statistics = summarise("8nm", [{**entry, **histogram} for entry in records], CLASSES)["classes"]
    assert {name: int(found[name][column]) for name in CLASSES} == {"pm": 1, "nuc": 1}
    assert {name: statistics[name]["crops_absent"] for name in CLASSES} == {"pm": 1, "nuc": 1}
    assert found["all"][1:4] == ["3", "1", "1"]


def test_totals_are_sums_over_classes_and_stay_last(four):
    total = rows(four, "states")["all"]
    assert total[1:8] == ["2", "1", "1", "40", "190", "130", "230"]
    assert total[8] == "17.4"
    assert four.index("<tfoot>") < four.index(">all<")


def test_a_class_of_which_nothing_is_known_has_dashes_for_shares(tmp_path):
    nuc = rows(audit(tmp_path, record("d/crop1", (1, 1, 0))), "states")["nuc"]
    assert nuc[7:] == ["0", "&ndash;", "&ndash;", "0.0"]


def test_overlaps_are_listed_by_pair_with_their_crops(four):
    assert rows(four, "overlaps")["pm and nuc"][1:] == ["2", "1,503", "d/crop4 (1,500), d/crop1 (3)"]


def test_each_contradiction_is_named_with_its_crop(tmp_path):
    text = audit(
        tmp_path,
        record("d/crop1", (1, 1, 0), contradictions=["nuc: 3 voxels outside <cell>"]),
        record("d/crop4", (1, 1, 0), contradictions=["pm: 2 voxels"]),
    )
    found = rows(text, "contradictions")
    assert found["d/crop1"][1:] == ["keep", "nuc: 3 voxels outside &lt;cell&gt;"]
    assert found["d/crop4"][1:] == ["flag", "pm: 2 voxels"]


def test_none_is_said_where_nothing_overlaps_or_contradicts(tmp_path):
    text = audit(tmp_path, record("d/crop1", (1, 1, 0)))
    assert text.count("<p>None: ") == 2
    assert 'id="overlaps"' not in text and 'id="contradictions"' not in text


def test_every_crop_is_listed_with_its_cause(four):
    assert "4 crops: 2 keep, 1 flag, 1 reject" in four
    assert list(rows(four, "crops")) == ["d/crop1", "d/crop2", "d/crop3", "d/crop4"]
    assert rows(four, "crops")["d/crop3"][1:3] == ["reject", "unreadable: no .zattrs"]


def test_every_crop_has_its_certificate(four):
    names = [column.name for column in CROP_COLUMNS]
    found = {crop: dict(zip(names, row, strict=True)) for crop, row in rows(four, "crops").items()}
    moved, unclear = found["d/crop4"], found["d/crop1"]
    assert (moved["registration"], moved["scale"], moved["margin"]) == ("displaced", "1", "2.00")
    assert (moved["move labels (voxels)"], moved["move labels (nm)"]) == (
        "-3, 0, +10",
        "-24, 0, +80",
    )
    assert (moved["label voxel (z y x, nm)"], moved["EM on disk (%)"]) == ("4 x 4 x 4", "50.0")
    assert (unclear["registration"], unclear["move labels (voxels)"]) == ("not assessable", "&ndash;")
    assert set(list(found["d/crop3"].values())[3:]) == {"&ndash;"}


def test_audit_needs_nothing_but_itself_and_is_the_same_bytes_each_time(tmp_path):
    entry = record("d/crop1", (1, 1, 0), overlaps={"pm+nuc": 3})
    text = audit(tmp_path, entry)
    assert "http" not in text
    assert audit(tmp_path, entry) == text
