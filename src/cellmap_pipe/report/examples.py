"""The best and the worst validation crops of one source, and the worst crop of each class: EM, truth, prediction."""

import base64
import io
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path as FilePath
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.colours import colour_of
from cellmap_pipe.errors import CellmapError
from cellmap_pipe.evaluation.challenge import aggregate
from cellmap_pipe.evaluation.paired import kinds_score
from cellmap_pipe.files import read_json, write_text
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.report.canvas import overlaid, round_length, thinned, visible
from cellmap_pipe.report.pages import Cell, Column, Content, heading, page, paragraph, table
from cellmap_pipe.report.slices import answer_plane, em_plane, segmented, truth_plane
from cellmap_pipe.report.tables import Scores, read_csv, read_scores
from cellmap_pipe.report.versions import rules_sentences

Path = str | os.PathLike[str]
Record = Mapping[str, Any]
Masks = dict[str, np.ndarray]

# Pixels along the longer side of one panel, for whole crops and for single classes.
_CROP_PIXELS, _CLASS_PIXELS = 320, 200

# Where unknown: stripes of this many pixels, as bright as this, as far apart as this.
_STRIPE, _STRIPE_GREY, _STRIPE_EVERY = 2, 150, 9

# Depths at which a plane is looked for, as shares of the crop; the middle is taken where nothing speaks against it.
_DEPTHS = (1 / 2, 1 / 4, 3 / 4, 1 / 8, 3 / 8, 5 / 8, 7 / 8)

_WEBP_QUALITY = 72

CROP_COLUMNS: tuple[Column, ...] = (
    Column("rank", "d", "1 is the best crop"),
    Column("crop"),
    Column("fold"),
    Column("voxel (z y x, nm)", hint="voxels of the labels, on which predictions are scored"),
    Column("classes", "d", "classes that the crop annotates and that were scored"),
    Column("score", ".3f", "the challenge's score of this crop alone"),
    Column("score_clean", ".3f", "the same by the rules 'clean', without the official evaluator's artefacts"),
    Column("mean_dice", ".3f", "mean Dice over the classes that occur"),
    Column("worst class", hint="the class that scores least, of those that occur"),
)

CLASS_COLUMNS: tuple[Column, ...] = (
    Column("class"),
    Column("crops", "d", "validation crops in which the class occurs"),
    Column("best crop"),
    Column("best", ".3f", "score of the class in that crop alone"),
    Column("worst crop"),
    Column("worst", ".3f", "score of the class in that crop alone"),
)

UNDRAWN_COLUMNS: tuple[Column, ...] = (
    Column("fold"),
    Column("crop"),
    Column("score", ".3f", "the challenge's score of this crop alone"),
    Column("cause"),
)

_STYLE = """
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: .6rem 0; padding: 0; list-style: none; }
.unknown { background: repeating-linear-gradient(135deg, #969696 0 2px, #444 2px 7px); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 41rem), 1fr)); gap: 1rem;
  margin: .6rem 0 1rem; }
.cards.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 63rem), 1fr)); }
.example { border: 1px solid #ccc; border-radius: 4px; padding: .6rem .8rem .7rem; min-width: 0; break-inside: avoid;
  overflow-wrap: anywhere; }
.example h3 { font-size: 1rem; margin: 0; display: flex; flex-wrap: wrap; justify-content: space-between;
  gap: 0 1rem; }
.example p { margin: .2rem 0; }
.planes { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0 .2rem; align-items: flex-start; }
.planes figure { margin: 0; max-width: 100%; } .planes img { display: block; max-width: 100%; height: auto; }
.planes figcaption, .scale { font-size: .85rem; color: #333; }
.scale span { display: inline-block; height: 4px; background: #1b1b1b; margin-right: .5em; vertical-align: .2em; }
.chip { display: inline-block; margin-right: .9em; white-space: nowrap; }
.empty { background: #f0f0f0; color: #333; padding: 1rem; margin: .5rem 0; }
@media print { body { margin: 0; font-size: 11px; } }
"""


@dataclass(frozen=True)
class _Crop:
    """A scored crop of one source: its records, where its arrays are, and how it stands."""

    name: str
    fold: str
    records: Sequence[Record]
    clean: Sequence[Record]
    target: Lattice
    store: FilePath
    em: FilePath
    labels: FilePath

    @cached_property
    def score(self) -> float:
        return kinds_score(self.records) or 0.0

    @cached_property
    def mean_dice(self) -> float | None:
        dice = [float(record["dice"]) for record in self.records if record["dice"] is not None]
        return fmean(dice) if dice else None

    @cached_property
    def class_scores(self) -> dict[str, float]:
        """The challenge's score by class in this crop alone, of all that were scored."""
        scores = aggregate(self.records)["label_scores"]
        return {name: entry.get("iou", entry.get("combined_score")) for name, entry in scores.items()}

    @cached_property
    def occurring(self) -> list[str]:
        """The classes of which the truth has at least one voxel, in the challenge's order."""
        found = {
            str(record["label"])
            for record in self.records
            if record["label"] in self.class_scores and any(record.get("voxels", {}).get(key) for key in ("tp", "fn"))
        }
        return [name for name in CLASSES if name in found]

    @cached_property
    def annotated(self) -> list[str]:
        found = {str(record["label"]) for record in self.records}
        return [name for name in CLASSES if name in found]


@dataclass(frozen=True)
class _Plane:
    """One z plane of a crop, on every `step`-th voxel: EM, the masks of truth and prediction, and what is known."""

    z: int
    step: int
    image: np.ndarray
    truth: Masks
    known: np.ndarray
    answer: Masks


def write_examples(
    score_jsons: Sequence[Path],
    segment_jsons: Sequence[Path],
    crops_csv: Path,
    out_html: Path,
    *,
    data_root: Path,
    examples: int = 3,
) -> None:
    """Write the page of one source's best and worst crops, over all its folds, and of the worst crop of each class.

    score_jsons, segment_jsons: `scores/{source}/fold{k}.json` and the validation segmentations that they scored, in
    the same order. Crops are ranked by `kinds_score`; up to `examples` of either end are shown. Planes are z planes
    at the voxel size of the labels: the middle one, or, where no class is present in it, another one; of a single
    class the one with the most wrong voxels. Crops that were scored without a segmentation are listed with its
    cause. Voxels of which no class is known are striped in the truth: nothing is scored there. An image that cannot
    be read is replaced by its cause. Raises ContractError for an unreadable JSON file.
    """
    scores = read_scores(score_jsons)
    crops = {row["crop"]: row for row in read_csv(crops_csv)}
    ranked: list[_Crop] = []
    for entry, path in zip(scores, segment_jsons, strict=True):
        segments = segmented(path)
        ranked += _crops_of(entry.fold, entry.content, segments, FilePath(path).parent, crops, FilePath(data_root))
    ranked.sort(key=lambda crop: (-crop.score, crop.name))
    source = scores[0].source if scores else ""
    parts = [paragraph(text) for text in _introduction(source, scores, len(ranked))]
    seen: set[str] = set()
    if ranked:
        places = {crop.name: place for place, crop in enumerate(ranked)}
        shown = _ends(ranked, examples)
        cards = {title: [_crop_card(crop, places[crop.name], ranked, seen) for crop in group] for title, group in shown}
        worst = _by_class(ranked)
        class_cards = [_class_card(name, *ends, seen) for name, ends in worst.items()]
        parts.append(_legend(seen))
        for title, group in cards.items():
            parts += [heading(title), _grid(group, "cards large")]
        parts += [
            heading("Each class at its worst"),
            paragraph(
                "Of each class that occurs, the crop in which it scores least, by itself, at the plane with the most "
                "wrong voxels. A class at 1.000 here is answered without fault wherever it occurs."
            ),
            _grid(class_cards, "cards"),
            table(CLASS_COLUMNS, [_class_row(name, *ends) for name, ends in worst.items()], name="classes"),
            heading("All crops"),
            table(CROP_COLUMNS, [_crop_row(crop, places[crop.name]) for crop in ranked], name="crops"),
        ]
    shown_names = {crop.name for crop in ranked}
    undrawn = [
        row for entry, path in zip(scores, segment_jsons, strict=True) for row in _undrawn(entry, path, shown_names)
    ]
    if undrawn:
        parts += [
            heading("Scored without a segmentation"),
            paragraph("There is nothing to draw of these crops: all of their classes count as missed."),
            table(UNDRAWN_COLUMNS, undrawn, name="undrawn"),
        ]
    failed = [[entry.fold, str(line)] for entry in scores for line in entry.content["failed"]]
    if failed:
        parts += [heading("Not scored"), table([Column("fold"), Column("cause")], failed, name="failed")]
    write_text(out_html, page(f"Best and worst crops: {source}", parts, style=_STYLE))


def _crops_of(
    fold: str,
    content: Mapping[str, Any],
    segments: Mapping[str, Record],
    folder: FilePath,
    crops: Mapping[str, Mapping[str, str]],
    data_root: FilePath,
) -> list[_Crop]:
    """Return the crops of one fold that were scored and can be drawn."""
    by_crop: dict[str, list[Record]] = {}
    for record in content["records"]:
        if record["status"] != "failed":
            by_crop.setdefault(str(record["crop"]), []).append(record)
    clean = {(record["crop"], record["label"]): record for record in content["clean_records"]}
    return [
        _Crop(
            name,
            fold,
            records,
            [clean.get((name, record["label"]), record) for record in records],
            Lattice.from_dict(segments[name]["target"]),
            folder / segments[name]["path"],
            data_root / crops[name]["em"],
            data_root / crops[name]["labels"],
        )
        for name, records in by_crop.items()
        if name in segments and name in crops
    ]


def _undrawn(scores: Scores, segment_json: Path, shown: Collection[str]) -> list[list[Content]]:
    """Return the crops of one fold that were scored and are not shown: fold, name, score, and why."""
    records: dict[str, list[Record]] = {}
    for record in scores.content["records"]:
        if record["status"] != "failed" and record["crop"] not in shown:
            records.setdefault(str(record["crop"]), []).append(record)
    segments = read_json(segment_json, "run `snakemake -R segment`")["records"]
    causes = {str(record["name"]): str(record.get("cause") or record["status"]) for record in segments}
    return [
        [scores.fold, name, kinds_score(found), causes.get(name, "it is not in the list of segmentations")]
        for name, found in sorted(records.items())
    ]


def _introduction(source: str, scores: Sequence[Any], count: int) -> list[str]:
    if not count:
        return ["No validation crop was scored."]
    rules = list(dict.fromkeys(str(entry.content["rules"]) for entry in scores))
    folds = ", ".join(entry.fold for entry in scores)
    return [
        f"{count} validation crops of {source}, fold{'s' * (len(scores) > 1)} {folds}, none of which the network saw "
        "in training. They are ranked by the challenge's score of the crop alone: the geometric mean of its instance "
        "and its semantic classes, or the score of the one kind that it has. A class that a crop annotates as absent "
        "counts 1 where nothing is marked.",
        rules_sentences([*rules, "clean"]),
        "Planes are shown at the voxel size of the labels, EM stretched between its 0.5 and 99.5 percentiles. Only the "
        "classes that the crop annotates are drawn. Stripes in the truth: no class is known there, and nothing scored.",
    ]


def _ends(ranked: Sequence[_Crop], examples: int) -> list[tuple[str, Sequence[_Crop]]]:
    if len(ranked) <= 2 * examples:
        return [("All crops, best first", ranked)]
    return [("Best crops", ranked[:examples]), ("Worst crops, worst first", ranked[: -examples - 1 : -1])]


def _by_class(ranked: Sequence[_Crop]) -> dict[str, tuple[_Crop, _Crop, int]]:
    """Return, for each class that occurs, the crops in which it scores most and least, and in how many it occurs."""
    ends = {}
    for name in CLASSES:
        having = sorted(
            (crop for crop in ranked if name in crop.occurring), key=lambda crop: (-crop.class_scores[name], crop.name)
        )
        if having:
            ends[name] = (having[0], having[-1], len(having))
    return ends


def _crop_row(crop: _Crop, place: int) -> list[Content]:
    worst = min(crop.occurring, key=lambda name: crop.class_scores[name], default="")
    return [
        place + 1,
        crop.name,
        crop.fold,
        _voxel(crop.target),
        len(crop.class_scores),
        crop.score,
        kinds_score(crop.clean),
        crop.mean_dice,
        Cell(f"{worst} ({crop.class_scores[worst]:.3f})", colour_of(worst)) if worst else None,
    ]


def _class_row(name: str, best: _Crop, worst: _Crop, count: int) -> list[Content]:
    scores: list[Content] = [best.name, best.class_scores[name], worst.name, worst.class_scores[name]]
    return [Cell(name, colour_of(name)), count, *scores]


def _voxel(target: Lattice) -> str:
    return " x ".join(f"{value:g}" for value in target.voxel_nm)


def _grid(cards: Sequence[str], kind: str) -> str:
    return f'<div class="{kind}">\n{"".join(cards)}</div>'


def _swatch(colour: str) -> str:
    return f'<span class="swatch" style="background:{colour}"></span>'


def _legend(names: set[str]) -> str:
    items = "".join(f"<li>{_swatch(colour_of(name))}{escape(name)}</li>" for name in CLASSES if name in names)
    unknown = '<li><span class="swatch unknown"></span>unknown</li>'
    return f'<ul class="legend" aria-label="colours of the classes">{items}{unknown}</ul>'


def _crop_card(crop: _Crop, place: int, ranked: Sequence[_Crop], seen: set[str]) -> str:
    """Return one crop as HTML and add the classes that its planes show to `seen`."""
    words = {0: f"best of {len(ranked)}", len(ranked) - 1: f"worst of {len(ranked)}"}
    rank = "the only crop" if len(ranked) == 1 else words.get(place, f"{place + 1} of {len(ranked)}")
    dice = "" if crop.mean_dice is None else f", mean Dice {crop.mean_dice:.3f}"
    chips = "".join(
        f'<span class="chip">{_swatch(colour_of(name))}{escape(name)} {crop.class_scores[name]:.3f}'
        f"{'' if name in crop.occurring else ' (absent)'}</span>"
        for name in CLASSES
        if name in crop.class_scores
    )
    lines = [
        f"Score {crop.score:.3f} (clean: {kinds_score(crop.clean) or 0:.3f}){dice}; fold {escape(crop.fold)}; voxel "
        f"{_voxel(crop.target)} nm",
        f"Score of each class in this crop: {chips}",
    ]
    return _card(crop, f"{escape(crop.name)}</span><span>{rank}", lines, _CROP_PIXELS, _informative(crop), seen)


def _class_card(name: str, best: _Crop, worst: _Crop, count: int, seen: set[str]) -> str:
    """Return the worst crop of one class as HTML, with that class alone."""
    elsewhere = f"; best: {best.class_scores[name]:.3f} in {escape(best.name)}" if count > 1 else "; its only crop"
    alone = replace(worst, records=[record for record in worst.records if record["label"] == name])
    title = (
        f"{_swatch(colour_of(name))}{escape(name)} in {escape(worst.name)}</span><span>{alone.class_scores[name]:.3f}"
    )
    lines = [f"Score {alone.class_scores[name]:.3f} in this crop{elsewhere}; voxel {_voxel(worst.target)} nm"]
    return _card(alone, title, lines, _CLASS_PIXELS, _most_wrong(alone, name), seen)


def _card(
    crop: _Crop, title: str, lines: Sequence[str], pixels: int, plane: Callable[[], _Plane], seen: set[str]
) -> str:
    """Return a card of HTML. title, lines: HTML already. plane: reads what is drawn."""
    try:
        picture = _panels(crop, plane(), pixels, seen)
    except (CellmapError, OSError, ValueError, KeyError) as error:
        picture = f'<div class="empty">no image: {escape(" ".join(str(error).split()))}</div>'
    paragraphs = "".join(f"<p>{line}</p>\n" for line in lines)
    return f'<article class="example">\n<h3><span>{title}</span></h3>\n{picture}\n{paragraphs}</article>\n'


def _planes_at(crop: _Crop) -> list[int]:
    return list(dict.fromkeys(min(int(crop.target.shape[0] * share), crop.target.shape[0] - 1) for share in _DEPTHS))


def _truth(crop: _Crop, z: int, step: int) -> tuple[Masks, np.ndarray]:
    return truth_plane(crop.labels, crop.annotated, _lattice(crop, z), step)


def _lattice(crop: _Crop, z: int) -> Lattice:
    return crop.target.window((z, 0, 0), (1, *crop.target.shape[1:]))


def _read(crop: _Crop, z: int, truth: Masks, known: np.ndarray, step: int) -> _Plane:
    image = em_plane(crop.em, _lattice(crop, z), step)
    return _Plane(z, step, image, truth, known, answer_plane(crop.store, crop.annotated, z, step))


def _informative(crop: _Crop) -> Callable[[], _Plane]:
    """Return what reads the middle plane of a crop or, where no class is present in it, the first that has one."""

    def read() -> _Plane:
        step = thinned(max(crop.target.shape[1:]), _CROP_PIXELS)
        middle, *others = _planes_at(crop)
        z, (truth, known) = middle, _truth(crop, middle, step)
        for other in others:
            if any(mask.any() for mask in truth.values()):
                break
            found = _truth(crop, other, step)
            if any(mask.any() for mask in found[0].values()):
                z, (truth, known) = other, found
        return _read(crop, z, truth, known, step)

    return read


def _most_wrong(crop: _Crop, name: str) -> Callable[[], _Plane]:
    """Return what reads the plane of a crop in which most voxels are wrong: of the class and not marked, or marked."""

    def read() -> _Plane:
        step = thinned(max(crop.target.shape[1:]), _CLASS_PIXELS)
        found: list[tuple[int, int, int, int, Masks, np.ndarray]] = []
        for z in _planes_at(crop):
            truth, known = _truth(crop, z, step)
            answer = answer_plane(crop.store, [name], z, step).get(name, np.zeros(known.shape, bool))
            wrong = int(np.count_nonzero((truth[name] != answer) & known))
            found.append((wrong, int(truth[name].sum()), -len(found), z, truth, known))
        _, _, _, z, truth, known = max(found, key=lambda entry: entry[:3])
        return _read(crop, z, truth, known, step)

    return read


def _panels(crop: _Crop, plane: _Plane, pixels: int, seen: set[str]) -> str:
    """Return the three panels as HTML; adds the classes that can be seen in them to `seen`."""
    height_nm, width_nm = (n * v for n, v in zip(crop.target.shape[1:], crop.target.voxel_nm[1:], strict=True))
    nm_per_pixel = max(height_nm, width_nm) / pixels
    size = max(1, round(height_nm / nm_per_pixel)), max(1, round(width_nm / nm_per_pixel))
    nothing: Masks = {}
    pictures = {
        "EM": _address(overlaid(plane.image, nothing), size),
        "Truth": _address(overlaid(plane.image, plane.truth, plane.known), size, plane.known),
        "Prediction": _address(overlaid(plane.image, plane.answer), size),
    }
    seen |= visible(plane.truth) | visible(plane.answer)
    z_nm = crop.target.world_of((plane.z, 0, 0))[0]
    figures = "".join(
        f'<figure><img src="{address}" width="{size[1]}" height="{size[0]}" '
        f'alt="{name} of {escape(crop.name, quote=True)}, z = {z_nm:,.0f} nm"><figcaption>{name}</figcaption></figure>'
        for name, address in pictures.items()
    )
    bar = round_length(0.5 * width_nm)
    length = f"{bar / 1000:g} µm" if bar >= 1000 else f"{bar:g} nm"
    return (
        f'<div class="planes">{figures}</div>\n'
        f'<div class="scale"><span style="width:{bar / nm_per_pixel:.0f}px"></span>'
        f"{length}; plane z = {z_nm:,.0f} nm ({plane.z + 1} of {crop.target.shape[0]})</div>"
    )


def _address(picture: np.ndarray, size: tuple[int, int], known: np.ndarray | None = None) -> str:
    """Return an RGB picture (y, x, 3) in 0..1, brought to `size` (height, width), as a data address.

    known: (y, x); where it is False, stripes are drawn.
    """
    image = Image.fromarray(np.round(255 * picture).astype(np.uint8))
    smaller = size[0] < image.height or size[1] < image.width
    image = image.resize(size[::-1], Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)
    if known is not None and not known.all():
        unknown = np.asarray(Image.fromarray(~known).resize(size[::-1], Image.Resampling.NEAREST))
        rows, columns = np.indices(size)
        values = np.array(image)
        values[unknown & ((rows + columns) % _STRIPE_EVERY < _STRIPE)] = _STRIPE_GREY
        image = Image.fromarray(values)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=_WEBP_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
