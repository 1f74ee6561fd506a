"""The audit of the labels: what is known of each class, what contradicts itself, and the figures of every crop."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cellmap_pipe.colours import REGISTRATIONS, VERDICTS, colour_of
from cellmap_pipe.files import read_json, write_text
from cellmap_pipe.prepare.statistics import is_true_negative
from cellmap_pipe.report.pages import Cell, Column, Content, heading, page, paragraph, table
from cellmap_pipe.report.tables import read_csv

Path = str | os.PathLike[str]
Record = Mapping[str, Any]

# A crop's name stays in sight while its figures are scrolled.
_STYLE = """
th.number { min-width: 4.2rem; }
#crops :is(th, td):first-child { position: sticky; left: 0; background: #fff; border-right: 1px solid #ddd; }
#crops th:first-child { background: #f3f3f3; z-index: 1; }
"""

AUDIT_COLUMNS: tuple[Column, ...] = (
    Column("class"),
    Column("crops annotated", "d", "crops that hold an array of the class"),
    Column("crops present", "d", "crops with at least one voxel of the class"),
    Column("crops absent", "d", "true negatives: no voxel is of the class, which is annotated or known in every voxel"),
    Column("present (voxels)", ",d", "voxels on the grid known to be of the class"),
    Column("absent (voxels)", ",d", "voxels known not to be of the class"),
    Column("unknown (voxels)", ",d", "voxels of which nothing is known; they give no gradient and no score"),
    Column("supervised pairs", ",d", "pairs of voxel and class whose state is known: present and absent"),
    Column("inferred (%)", ".1f", "share of the pairs that lie in crops without an array of the class"),
    Column("present / known (%)", ".3f", "share of the known voxels that are of the class"),
    Column("known (%)", ".1f", "share of all voxels whose state is known"),
)

CROP_COLUMNS: tuple[Column, ...] = (
    Column("crop"),
    Column("verdict", hint="keep; flag: looks wrong, used only if quality.keep lists it; reject"),
    Column("cause", hint="why it is flagged or rejected, or kept in spite of what"),
    Column("label voxel (z y x, nm)", hint="voxel size of the class arrays as stored"),
    Column("EM level", hint="the resolution level that was read, chosen by its voxel size in nm"),
    Column("annotated", "d", "classes with an array in this crop"),
    Column("EM on disk (%)", ".1f", "share of the label box with EM on disk"),
    Column("registration", hint="where labels and image agree best: in place, displaced, rescaled, or not assessable"),
    Column("scale", "g", "0.5 or 2: the labels agree best with half or twice the image's field of view"),
    Column("move labels (voxels)", hint="z, y, x: how far for the best agreement, in voxels of the grid"),
    Column("move labels (nm)", hint="the same in nm"),
    Column("best agreement", ".2f", "highest agreement of labels and image, in multiples of the chance level"),
    Column("agreement in place", ".2f", "agreement where the labels lie, in the same multiples"),
    Column("margin", ".2f", "best agreement / agreement in place; 1: nothing is better than in place"),
    Column("compared", hint="classes whose boundaries were compared with the image"),
    Column("overlaps (voxels)", ",d", "voxels of the source that two disjoint classes both claim"),
    Column("contradictions", "d", "their number; they are named above"),
    Column("warnings", hint="what is odd in the metadata or the arrays, without consequence for the verdict"),
)


def convert_records(convert_jsons: Iterable[Path]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the class list and the records, sorted by crop, of all shards of one grid."""
    classes: list[str] = []
    records: list[dict[str, Any]] = []
    for path in convert_jsons:
        shard = read_json(path, "run `snakemake -R convert`")
        classes = list(shard["classes"])
        records += shard["records"]
    return classes, sorted(records, key=lambda record: str(record["crop"]))


def write_audit(quality_csv: Path, convert_jsons: Sequence[Path], out_html: Path) -> None:
    """Write the audit of one grid's labels as HTML: states per class, overlaps, contradictions, and every crop.

    quality_csv: `quality/{grid}/crops.csv`. The states are counted over the crops that are used (verdict keep);
    overlaps, contradictions and figures are those of all crops.
    """
    classes, records = convert_records(convert_jsons)
    verdicts = {row["crop"]: row for row in read_csv(quality_csv)}
    used = [record for record in records if verdicts.get(record["crop"], {}).get("verdict") == "keep"]
    tally = ", ".join(
        f"{sum(row.get('verdict') == verdict for row in verdicts.values())} {verdict}" for verdict in VERDICTS
    )
    parts = [
        paragraph(
            f"{len(records)} crops: {tally}. A voxel's state is known for a class where the crop annotates the class, "
            "or where an annotated class excludes it. Everything else is unknown: never background. The row 'all' "
            "counts crops that have some class annotated, present or absent, and sums the voxels."
        ),
        heading("States per class (kept crops)"),
        table(AUDIT_COLUMNS, _class_rows(classes, used), totals=_totals(classes, used), name="states"),
        heading("Overlaps of classes that exclude each other (all crops)"),
        *_overlaps(records),
        heading("Contradictions (all crops)"),
        *_contradictions(records, verdicts),
        heading("Crops"),
        table(CROP_COLUMNS, [_crop_row(record, verdicts.get(record["crop"], {})) for record in records], name="crops"),
    ]
    grid = read_json(convert_jsons[0])["grid"] if convert_jsons else ""
    write_text(out_html, page(f"Audit of the labels, grid {grid}", parts, style=_STYLE))


def registration_shift(registration: Mapping[str, Any], key: str) -> str:
    """Return a certificate's `shift` (voxels) or `shift_nm` as "+z, +y, +x", "" where there is none."""
    return ", ".join(f"{part:+.4g}" if part else "0" for part in registration.get(key) or ())


def _class_rows(classes: Sequence[str], used: Sequence[Record]) -> list[list[Content]]:
    return [
        [
            Cell(name, colour_of(name)),
            sum(name in record["annotated"] for record in used),
            sum(_count(record, name, "present") > 0 for record in used),
            sum(is_true_negative(record, name) for record in used),
            *_voxel_figures([name], used),
        ]
        for name in classes
    ]


def _totals(classes: Sequence[str], used: Sequence[Record]) -> list[Content]:
    """Return the last row: crops in which any class is annotated, present, or absent; sums over the classes."""
    return [
        "all",
        sum(any(name in record["annotated"] for name in classes) for record in used),
        sum(any(_count(record, name, "present") for name in classes) for record in used),
        sum(any(is_true_negative(record, name) for name in classes) for record in used),
        *_voxel_figures(classes, used),
    ]


def _voxel_figures(classes: Sequence[str], used: Sequence[Record]) -> list[Content]:
    """Return voxels present, absent, unknown; supervised pairs; and the shares inferred, present and known (%)."""
    present, absent, unknown = (
        sum(_count(record, name, state) for record in used for name in classes)
        for state in ("present", "absent", "unknown")
    )
    known = present + absent
    inferred = sum(
        _count(record, name, state)
        for record in used
        for name in classes
        if name not in record["annotated"]
        for state in ("present", "absent")
    )
    return [
        present,
        absent,
        unknown,
        known,
        100 * inferred / known if known else None,
        100 * present / known if known else None,
        100 * known / (known + unknown) if known + unknown else None,
    ]


def _count(record: Record, name: str, state: str) -> int:
    return int(record["counts"][name][state])


def _overlaps(records: Sequence[Record]) -> list[str]:
    found: dict[str, list[tuple[int, str]]] = {}
    for record in records:
        for pair, voxels in (record.get("overlaps") or {}).items():
            if voxels:
                found.setdefault(pair, []).append((int(voxels), str(record["crop"])))
    if not found:
        return [paragraph("None: no voxel of the source is marked as two classes that share no atom.")]
    columns = [
        Column("classes"),
        Column("crops", "d"),
        Column("voxels", ",d", "of the source arrays"),
        Column("by crop", hint="voxels in each crop, the largest first"),
    ]
    rows: list[list[Content]] = [
        [
            pair.replace("+", " and "),
            len(places),
            sum(voxels for voxels, _ in places),
            ", ".join(
                f"{crop} ({voxels:,})" for voxels, crop in sorted(places, key=lambda place: (-place[0], place[1]))
            ),
        ]
        for pair, places in sorted(found.items())
    ]
    return [
        paragraph("Both classes stay present in these voxels, as in the source: an array of a class always wins."),
        table(columns, rows, name="overlaps"),
    ]


def _contradictions(records: Sequence[Record], verdicts: Mapping[str, Mapping[str, str]]) -> list[str]:
    rows: list[list[Content]] = []
    for record in records:
        verdict = verdicts.get(record["crop"], {}).get("verdict", "")
        crop: list[Content] = [str(record["crop"]), Cell(verdict, VERDICTS.get(verdict))]
        rows += [[*crop, str(sentence)] for sentence in record.get("contradictions") or []]
    if not rows:
        return [paragraph("None: no array says what another one of the same crop denies.")]
    return [table([Column("crop"), Column("verdict"), Column("contradiction")], rows, name="contradictions")]


def _crop_row(record: Record, quality: Mapping[str, str]) -> list[Content]:
    verdict = quality.get("verdict", "")
    measured = record.get("status") != "failed"
    lattice = record.get("label_lattice") or {}
    level = record.get("em_level") or {}
    registration = record.get("registration") or {}
    fraction = record.get("em_valid_fraction") if measured else None
    placed = str(registration.get("verdict", ""))
    assessed = placed not in ("", "not assessable")
    return [
        str(record["crop"]),
        Cell(verdict, VERDICTS.get(verdict)),
        quality.get("cause", ""),
        " x ".join(f"{size:g}" for size in lattice.get("voxel_nm", [])),
        str(level.get("path", "")),
        len(record["annotated"]) if measured else None,
        None if fraction is None else 100 * float(fraction),
        Cell(placed, REGISTRATIONS.get(placed)),
        registration.get("scale") if assessed else None,
        registration_shift(registration, "shift") if assessed else None,
        registration_shift(registration, "shift_nm") if assessed else None,
        registration.get("best"),
        registration.get("identity"),
        registration.get("margin") if assessed else None,
        ", ".join(registration.get("classes") or []),
        sum((record.get("overlaps") or {}).values()) if measured else None,
        len(record.get("contradictions") or []) if measured else None,
        "; ".join(record.get("warnings") or []),
    ]
