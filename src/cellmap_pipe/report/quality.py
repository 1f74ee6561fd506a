"""The quality page: every crop of a grid with three planes of it, its verdict, the cause, and what to do about it."""

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from PIL import Image

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.colours import REGISTRATIONS, VERDICTS, colour_of
from cellmap_pipe.files import check_file, read_json, write_text
from cellmap_pipe.prepare.labels import PRESENT, UNKNOWN
from cellmap_pipe.prepare.nifti import nifti_slabs
from cellmap_pipe.prepare.quality import memory_figures, needed_memory
from cellmap_pipe.prepare.state_table import decode_table
from cellmap_pipe.report.audit import convert_records, registration_shift
from cellmap_pipe.report.canvas import DIMMED, OPACITY, grey, grey_limits, painting_order, rgb, round_length
from cellmap_pipe.report.pages import Cell, Column, Content, heading, page, paragraph, table
from cellmap_pipe.report.tables import read_csv

Path = str | os.PathLike[str]
Planes = tuple[np.ndarray, np.ndarray, np.ndarray]

# Pixels along the longest side of a crop's box; the three planes of a crop share one scale.
_PIXELS = 160

# Lossy, because EM noise is most of the bytes: the first quality is taken with which a plane has at most so many
# bytes, or else the last. 289 crops then stay below 12 MB.
_QUALITIES = (62, 45, 30, 15)
_EM_BYTES, _LABEL_BYTES = 6500, 3200

_AXES = "zyx"


@dataclass(frozen=True)
class Cause:
    """What a cause of the quality check means, and what helps."""

    meaning: str
    remedy: str


# By the words with which a cause in crops.csv begins.
CAUSES: Mapping[str, Cause] = {
    "EM not downloaded": Cause(
        "less than quality.min_em_fraction of the label box has EM on disk",
        "fetch the EM of this crop (snakemake fetch), then run again",
    ),
    "outside EM": Cause(
        "the label box lies mostly beyond the EM volume", "check the translations of the crop and of the EM"
    ),
    "blank EM": Cause(
        "almost every voxel of the EM has one and the same grey value",
        "look at the EM here; fetch it again if it is not blank at its source",
    ),
    "resolution mismatch": Cause(
        "the grid would upsample EM or labels more than max_upsample times",
        "fetch a finer level, use a coarser grid or raise max_upsample",
    ),
    "unannotated": Cause(
        "there is no array of any class, or labels.empty takes all of them as unknown",
        "fetch its label arrays if the source has any; the other crops go on without it",
    ),
    "nothing known": Cause(
        "every voxel is unknown for every configured class",
        "add the classes that it annotates to classes; the other crops go on without it",
    ),
    "too large for the memory budget": Cause(
        "it needs more host memory in training or prediction than quality.max_train_gb or quality.max_predict_gb",
        "raise the bound, or use a coarser grid",
    ),
    "misregistered": Cause(
        "the labels are off by the voxels named: moved back, they fit the image clearly better",
        "compare boundaries in the planes; list the crop in quality.keep if it is right",
    ),
    "low contrast": Cause(
        "the EM varies by less than quality.min_std grey values",
        "look at it; list the crop in quality.keep if it is right",
    ),
    "unreadable": Cause(
        "files are damaged or not what they should be, as named", "fetch the crop again, then run again"
    ),
    "dropped by quality.drop": Cause(
        "the configuration says not to use it", "remove the crop from quality.drop to use it again"
    ),
    "kept by quality.keep": Cause(
        "the configuration says to use it in spite of the cause named",
        "remove the crop from quality.keep to leave it out",
    ),
}

# The same word on a flagged crop: voxel sizes as stated can be served, but do not seem to be true.
_RESCALED = Cause(
    "labels and image agree clearly better at half or twice the scale: one of the voxel sizes seems to be wrong",
    "check the voxel sizes in the metadata of crop and EM; list the crop in quality.keep if they are right",
)

_STYLE = """
.bar { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center;
  background: #fff; padding: .5rem 0; border-bottom: 1px solid #bbb; }
.bar fieldset { border: 0; margin: 0; padding: 0; display: flex; gap: .9rem; flex-wrap: wrap; }
.bar legend { float: left; margin-right: .6rem; padding: 0; }
.bar input[type=search] { font: inherit; padding: .15rem .4rem; width: 12rem; max-width: 100%; }
.bar select { font: inherit; }
:is(input, select, summary):focus-visible { outline: 2px solid #0072B2; outline-offset: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: .6rem 0; padding: 0; list-style: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 35rem), 1fr)); gap: 1rem;
  margin: 1rem 0; }
.crop { border: 1px solid #ccc; border-left: 6px solid #999; border-radius: 4px; padding: .6rem .8rem .7rem;
  min-width: 0; break-inside: avoid; overflow-wrap: anywhere; }
.crop[hidden] { display: none; }
.crop h3 { font-size: 1rem; margin: 0; display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; }
.crop p { margin: .15rem 0; } .cause { font-weight: 600; } .remedy { color: #444; }
.planes { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0 .2rem; align-items: flex-start; }
.planes figure { margin: 0; } .planes figcaption, .scale { font-size: .8rem; color: #444; }
.plane { position: relative; background: #000; } .plane img { position: absolute; inset: 0; width: 100%; height: 100%; }
.unlabelled .plane img + img { display: none; }
.scale span { display: inline-block; height: 4px; background: #1b1b1b; margin-right: .5em; vertical-align: .2em; }
.empty { background: #f0f0f0; color: #444; min-height: 5rem; display: flex; align-items: center;
  justify-content: center; margin: .5rem 0; padding: .5rem; text-align: center; }
.crop dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 .8rem; margin: .4rem 0 .2rem; }
.crop dt { color: #555; } .crop dd { margin: 0; font-variant-numeric: tabular-nums; }
.class { display: inline-block; margin-right: .8em; white-space: nowrap; }
details ul { margin: .2rem 0; padding-left: 1.2rem; }
@media (max-width: 45rem) { .bar { position: static; } }
@media print { .bar { display: none; } body { margin: 0; font-size: 11px; } }
"""

_SCRIPT = """
const cards = [...document.querySelectorAll(".crop")];
const texts = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
const control = (name) => document.getElementById(name);
const boxes = [...document.querySelectorAll("input[name=verdict]")];
const select = () => {
  const shown = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
  const words = control("words").value.toLowerCase().split(/\\s+/).filter(Boolean);
  let count = 0;
  for (const card of cards) {
    card.hidden = !(shown.has(card.dataset.verdict) && words.every((word) => texts.get(card).includes(word)));
    count += !card.hidden; }
  control("count").textContent = `${count} of ${cards.length} crops shown`;
};
const arrange = () => {
  const [name, sign] = control("order").value.split(" ");
  const value = (card) => card.dataset[name] ?? "";
  const order = (a, b) => {
    const x = value(a), y = value(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign ? Number(sign) * (Number(x) - Number(y)) : x.localeCompare(y, "en", { numeric: true }); };
  cards.sort((a, b) => order(a, b) || a.dataset.crop.localeCompare(b.dataset.crop, "en", { numeric: true }));
  document.querySelector(".cards").append(...cards);
};
for (const box of boxes) box.addEventListener("change", select);
control("words").addEventListener("input", select);
control("order").addEventListener("change", arrange);
control("labels").addEventListener("change", (event) =>
  document.body.classList.toggle("unlabelled", !event.target.checked));
select();
"""

# Ways to sort: the value is the card's data attribute, and for numbers whether ascending (1) or descending (-1).
_ORDERS: Mapping[str, str] = {
    "crop": "name",
    "rank": "verdict, worst first",
    "cause": "cause",
    "em 1": "EM on disk, least first",
    "known 1": "known voxels, fewest first",
    "margin -1": "margin, largest first",
    "memory -1": "memory, most first",
}


@dataclass(frozen=True)
class _Picture:
    """Three planes through `point` (z, y, x): EM and labels as data addresses, `sizes` (height, width) in pixels."""

    point: tuple[int, int, int]
    images: tuple[str, ...]
    labels: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    nm_per_pixel: float
    seen: frozenset[str]


def write_quality_page(
    quality_csv: Path,
    convert_jsons: Sequence[Path],
    out_html: Path,
    *,
    nifti_dir: Path,
    models: Sequence[Mapping[str, Any]] = (),
    context_nm: float = 0,
) -> None:
    """Write a self-contained HTML page with a card per crop of one grid: planes, verdict, cause, remedy and figures.

    quality_csv: `quality/{grid}/crops.csv`; convert_jsons: all shards of the grid; nifti_dir: what the records' file
    paths are relative to. The planes z, y and x go through one point: the middle of the box or, on an axis where that
    shows no class, the plane with the most voxels of any. Voxels of which no class is known are dimmed. A crop
    without files has its cause in place of the planes. Memory does not grow with the crop.
    models, context_nm: see `prepare.quality.needed_memory`; without them the memory that the table names is shown.
    Raises ContractError if a file is missing or damaged.
    """
    rows = sorted(read_csv(quality_csv), key=lambda row: row["crop"])
    classes, records = convert_records(convert_jsons)
    by_crop = {str(record["crop"]): record for record in records}
    seen: set[str] = set()
    cards = []
    for row in rows:
        record = by_crop.get(row["crop"], {})
        if models and record.get("status") == "ok":
            row |= memory_figures(needed_memory(record, models, context_nm))
        picture = _picture(record, classes, FilePath(nifti_dir)) if record.get("files") else None
        seen |= picture.seen if picture else set()
        cards.append(_card(row, record, picture))
    grid = read_json(convert_jsons[0])["grid"] if convert_jsons else ""
    parts = [
        paragraph(
            "Three planes of every crop, EM stretched between its 0.5 and 99.5 percentiles, labels in the classes' "
            "colours; voxels of which no class is known are dimmed. Keep is used; flag looks wrong and is used only "
            "if quality.keep lists the crop; reject is not used."
        ),
        paragraph(
            "Registration: where labels and image agree best. The margin says how many times better that is than in "
            "place. Memory: on the host, for the crop alone; prediction is that of the most demanding model, without "
            "the network. Known: of all pairs of voxel and class."
        ),
        *_summary(rows),
        heading("Crops"),
        _controls(rows),
        _legend(name for name in CLASSES if name in seen),
        f'<div class="cards">\n{"".join(cards)}</div>' if cards else paragraph("No crop was found."),
    ]
    write_text(out_html, page(f"Crops on the grid {grid}", parts, style=_STYLE, script=_SCRIPT))


def cause_of(text: str) -> str:
    """Return the cause of CAUSES with which the cause of a crop begins, "" if with none."""
    return next((name for name in CAUSES if text.startswith(name)), "")


def _explained(verdict: str, cause: str) -> Cause | None:
    """Return what the cause of a crop means with this verdict, None if it has none."""
    name = cause_of(cause)
    return _RESCALED if (verdict, name) == ("flag", "resolution mismatch") else CAUSES.get(name)


def _summary(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the number of crops per verdict and cause, with what each cause means."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        key = row["verdict"], cause_of(row["cause"]) or row["cause"]
        counts[key] = counts.get(key, 0) + 1
    order = {verdict: place for place, verdict in enumerate(VERDICTS)}
    lines: list[list[Content]] = []
    for (verdict, cause), count in sorted(counts.items(), key=lambda item: (order.get(item[0][0], 9), item[0][1])):
        known = _explained(verdict, cause) or Cause("", "")
        lines.append([Cell(verdict, VERDICTS.get(verdict)), cause, count, known.meaning, known.remedy])
    columns = [Column("verdict"), Column("cause"), Column("crops", "d"), Column("meaning"), Column("what helps")]
    return [table(columns, lines, name="summary")] if lines else []


def _controls(rows: Sequence[Mapping[str, str]]) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" name="verdict" value="{verdict}" checked> <span class="swatch" '
        f'style="background:{colour}"></span>{verdict} ({sum(row["verdict"] == verdict for row in rows)})</label>'
        for verdict, colour in VERDICTS.items()
    )
    orders = "".join(f'<option value="{value}">{escape(text)}</option>' for value, text in _ORDERS.items())
    return (
        f'<form class="bar" onsubmit="return false"><fieldset><legend>Show</legend>{boxes}</fieldset>'
        '<label>Text <input id="words" type="search" placeholder="crop, cause, class, ..."></label>'
        f'<label>Sort by <select id="order">{orders}</select></label>'
        '<label><input id="labels" type="checkbox" checked> draw labels</label>'
        '<span id="count" role="status"></span></form>'
    )


def _legend(names: Iterable[str]) -> str:
    items = "".join(f"<li>{_swatch(colour_of(name))}{escape(name)}</li>" for name in names)
    return f'<ul class="legend" aria-label="colours of the classes">{items}</ul>' if items else ""


def _swatch(colour: str) -> str:
    return f'<span class="swatch" style="background:{colour}"></span>'


def _card(row: Mapping[str, str], record: Mapping[str, Any], picture: _Picture | None) -> str:
    """Return one crop as HTML."""
    verdict, cause = row["verdict"], row["cause"]
    margin = (record.get("registration") or {}).get("margin")
    values = {
        "crop": row["crop"],
        "verdict": verdict,
        "rank": {"reject": 0, "flag": 1}.get(verdict, 2),
        "cause": cause,
        "em": row.get("em_valid_fraction", ""),
        "known": row.get("known_fraction", ""),
        "margin": "" if margin is None else margin,
        "memory": max((float(row[key]) for key in _MEMORY if row.get(key)), default=""),
    }
    data = "".join(f' data-{key}="{escape(str(value), quote=True)}"' for key, value in values.items())
    colour = VERDICTS.get(verdict, "#000000")
    known = _explained(verdict, cause)
    lines = [
        f'<article class="crop"{data} style="border-left-color:{colour}">',
        f"<h3><span>{escape(row['crop'])}</span><span>{_swatch(colour)}{escape(verdict)}</span></h3>",
        f'<p class="cause">{escape(cause)}</p>' if cause else "",
        f'<p class="remedy">What helps: {escape(known.remedy)}.</p>' if known else "",
        _planes(row["crop"], picture, record["lattice"]) if picture else _placeholder(cause),
        "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in _figures(row, record)) + "</dl>",
        _list("contradiction", record.get("contradictions") or []),
        _list("warning", record.get("warnings") or []),
        "</article>\n",
    ]
    return "\n".join(line for line in lines if line)


def _placeholder(cause: str) -> str:
    return f'<div class="empty">no image{": " if cause else ""}{escape(cause)}</div>'


def _list(noun: str, sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(str(sentence))}</li>" for sentence in sentences)
    summary = f"{len(sentences)} {noun}{'' if len(sentences) == 1 else 's'}"
    return f"<details><summary>{summary}</summary><ul>{items}</ul></details>"


# Columns of crops.csv with the host memory (10^6 bytes) that the crop needs.
_MEMORY: Mapping[str, str] = {"train_mb": "training", "predict_mb": "prediction"}


def _figures(row: Mapping[str, str], record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of a crop as pairs of name and HTML; what was not measured is a dash."""
    lattice, level = record.get("lattice") or {}, record.get("em_level") or {}
    memory = [f"{text} {_memory(float(row[key]))}" for key, text in _MEMORY.items() if row.get(key)]
    on_disk = _percent(row.get("em_valid_fraction", "")) if record.get("em_stats") else ""
    em = [f"level {level['path']} of {_nm(level['voxel_nm'])}" if level else "", on_disk and f"{on_disk} on disk"]
    pairs = [
        ("box (z, y, x)", f"{_times(lattice['shape'])} voxels of {_nm(lattice['voxel_nm'])}" if lattice else ""),
        ("EM", ", ".join(part for part in em if part)),
        ("known", _known(row, record)),
        ("memory", ", ".join(memory)),
    ]
    figures = [(name, escape(text) if text else '<span class="none">&ndash;</span>') for name, text in pairs]
    figures.append(("registration", _certificate(record.get("registration") or {})))
    figures.append(("present", _present(record)))
    if record.get("instances"):
        ids = ", ".join(f"{name} {n:,}" for name, n in record["instances"].items())
        figures.append(("instance ids", escape(ids)))
    return figures


def _known(row: Mapping[str, str], record: Mapping[str, Any]) -> str:
    share = _percent(row.get("known_fraction", ""))
    classes, annotated = len(record.get("counts") or {}), len(record.get("annotated") or [])
    return f"{share} of the states of {classes} classes; the crop annotates {annotated}" if share else ""


def _certificate(registration: Mapping[str, Any]) -> str:
    """Return the registration certificate in words."""
    verdict = str(registration.get("verdict", ""))
    if not verdict:
        return '<span class="none">&ndash;</span>'
    words = escape(verdict)
    if verdict != "not assessable":
        moved = f"with labels moved by ({registration_shift(registration, 'shift')}) voxels"
        moved += f" = ({registration_shift(registration, 'shift_nm')}) nm"
        best = [f"at scale {registration['scale']:g}"] if registration["scale"] != 1 else []
        best += [moved] if any(registration["shift"]) else []
        words += f"; best {', '.join(best)}" if best else "; nothing fits better"
        words += f"; margin {registration['margin']:.3g}"
    if registration["classes"]:
        words += f"; by {', '.join(map(escape, registration['classes']))}"
    return _swatch(REGISTRATIONS.get(verdict, "#FFFFFF")) + words


def _present(record: Mapping[str, Any]) -> str:
    counts = record.get("counts") or {}
    names = [name for name in record.get("classes") or counts if counts.get(name, {}).get("present")]
    chips = "".join(f'<span class="class">{_swatch(colour_of(name))}{escape(name)}</span>' for name in names)
    return chips or '<span class="none">&ndash;</span>'


def _nm(voxel_nm: Sequence[float]) -> str:
    """Return a voxel size in words; a cube by its edge."""
    return f"{_times(voxel_nm if len(set(voxel_nm)) > 1 else voxel_nm[:1])} nm"


def _times(sizes: Sequence[float]) -> str:
    return " × ".join(f"{size:.6g}" for size in sizes)


def _memory(megabytes: float) -> str:
    if megabytes < 10:
        return f"{megabytes:.1f} MB"
    return f"{megabytes:,.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:,.1f} GB"


def _percent(fraction: str) -> str:
    return f"{100 * float(fraction):.3g} %" if fraction else ""


def _planes(crop: str, picture: _Picture, lattice: Mapping[str, Any]) -> str:
    """Return the three planes, labels over EM, with a scale bar."""
    figures = []
    for axis, image, label, size in zip(range(3), picture.images, picture.labels, picture.sizes, strict=True):
        place = f"{_AXES[axis]} = {picture.point[axis]}"
        figures.append(
            f'<figure><div class="plane" style="width:{size[1]}px;height:{size[0]}px">'
            f'<img src="{image}" alt="EM of {escape(crop, quote=True)}, plane {place}">'
            f'<img src="{label}" alt="its labels"></div><figcaption>{place}</figcaption></figure>'
        )
    extent = max(n * v for n, v in zip(lattice["shape"], lattice["voxel_nm"], strict=True))
    bar = round_length(0.5 * extent)
    length = f"{bar / 1000:g} µm" if bar >= 1000 else f"{bar:g} nm"
    return (
        f'<div class="planes">{"".join(figures)}</div>'
        f'<div class="scale"><span style="width:{bar / picture.nm_per_pixel:.0f}px"></span>{length}</div>'
    )


def _picture(record: Mapping[str, Any], classes: Sequence[str], nifti_dir: FilePath) -> _Picture:
    """Return the planes of one converted crop."""
    remedy = "run `snakemake -R convert`"
    image, label = (check_file(record["files"][kind], nifti_dir, remedy) for kind in ("image", "label"))
    shape, voxel_nm = record["lattice"]["shape"], record["lattice"]["voxel_nm"]
    states = decode_table(record["table"], len(classes))
    point, labels = _informative(label, shape, states)
    em = _cut(image, shape, point)
    known = (states != UNKNOWN).any(axis=1)
    limits = grey_limits(np.concatenate([p[(p > 0) | known[rows]] for p, rows in zip(em, labels, strict=True)]))
    colours, painted = _palette(states, classes)
    nm_per_pixel = max(n * v for n, v in zip(shape, voxel_nm, strict=True)) / _PIXELS
    pixels = [max(1, round(n * v / nm_per_pixel)) for n, v in zip(shape, voxel_nm, strict=True)]
    sizes = ((pixels[1], pixels[2]), (pixels[0], pixels[2]), (pixels[0], pixels[1]))
    return _Picture(
        point,
        tuple(_webp(_bytes(grey(plane, limits)), size, _EM_BYTES) for plane, size in zip(em, sizes, strict=True)),
        tuple(_webp(colours[plane], size, _LABEL_BYTES) for plane, size in zip(labels, sizes, strict=True)),
        sizes,
        nm_per_pixel,
        frozenset(painted[row] for plane in labels for row in np.unique(plane) if painted[row]),
    )


def _informative(label: FilePath, shape: Sequence[int], states: np.ndarray) -> tuple[tuple[int, int, int], Planes]:
    """Return a point (z, y, x) worth looking at, and the planes of the label map through it.

    On each axis the middle, if any class is present in that plane, or else the plane with the most voxels of any class.
    Where none is present in the whole crop, what counts is that a voxel's state is known.
    """
    middle = shape[0] // 2, shape[1] // 2, shape[2] // 2
    planes = _cut(label, shape, middle)
    present = (states == PRESENT).any(axis=1)
    if all(present[plane].any() for plane in planes):
        return middle, planes
    along = _along_axes(label, shape, present)
    if not along[0].any():
        along = _along_axes(label, shape, (states != UNKNOWN).any(axis=1))
    z, y, x = (m if not n.any() or n[m] else int(n.argmax()) for n, m in zip(along, middle, strict=True))
    return (z, y, x), planes if (z, y, x) == middle else _cut(label, shape, (z, y, x))


def _along_axes(label: FilePath, shape: Sequence[int], counted: np.ndarray) -> list[np.ndarray]:
    """Return how many voxels each plane has along z, y and x whose row of the state table is `counted` (bool)."""
    along = [np.zeros(n, np.int64) for n in shape]
    first = 0
    for slab in nifti_slabs(label, shape):
        voxels = counted[slab]
        along[0][first : first + len(slab)] = np.count_nonzero(voxels, axis=(1, 2))
        along[1] += np.count_nonzero(voxels, axis=(0, 2))
        along[2] += np.count_nonzero(voxels, axis=(0, 1))
        first += len(slab)
    return along


def _cut(path: FilePath, shape: Sequence[int], point: tuple[int, int, int]) -> Planes:
    """Return the planes (y, x), (z, x) and (z, y) through a voxel of a NIfTI file, holding one slab at a time."""
    z_plane = np.empty(0)
    y_rows, x_rows = [], []
    first = 0
    for slab in nifti_slabs(path, shape):
        if first <= point[0] < first + len(slab):
            z_plane = slab[point[0] - first].copy()
        y_rows.append(slab[:, point[1]].copy())
        x_rows.append(slab[:, :, point[2]].copy())
        first += len(slab)
    return z_plane, np.concatenate(y_rows), np.concatenate(x_rows)


def _palette(states: np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return the colour (rows, 4: RGBA) and the class that is painted, "" for none, by row of the state table.

    Laid over EM these colours give what canvas.overlaid draws.
    """
    colours = np.zeros((len(states), 4), np.uint8)
    colours[(states == UNKNOWN).all(axis=1), 3] = round(255 * (1 - DIMMED))
    painted = [""] * len(states)
    for name in painting_order(classes):
        rows = states[:, list(classes).index(name)] == PRESENT
        colours[rows] = [*_bytes(rgb(colour_of(name))), round(255 * OPACITY)]
        for row in np.flatnonzero(rows):
            painted[row] = name
    return colours, painted


def _bytes(values: np.ndarray) -> np.ndarray:
    """Return values in 0..1 as uint8."""
    return np.round(255 * values).astype(np.uint8)


def _webp(pixels: np.ndarray, size: tuple[int, int], most_bytes: int) -> str:
    """Return an image (y, x) or (y, x, 4), brought to `size` (height, width) by means of areas, as a data address."""
    picture = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BOX)
    data = b""
    for quality in _QUALITIES:
        stream = io.BytesIO()
        picture.save(stream, "WEBP", quality=quality, method=4)
        data = stream.getvalue()
        if len(data) <= most_bytes:
            break
    return "data:image/webp;base64," + base64.b64encode(data).decode("ascii")
