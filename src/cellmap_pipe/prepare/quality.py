"""The verdict on every crop of a grid: keep, flag (looks wrong; not used unless asked for) or reject, and why."""

import csv
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellmap_pipe.errors import ConfigError, ContractError
from cellmap_pipe.files import read_json, replacing, write_json
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prediction.plan import estimate_bytes, make_plans
from cellmap_pipe.prediction.store import CHUNK
from cellmap_pipe.prediction.volumes import READ_PLANES
from cellmap_pipe.prepare.crops import read_crops
from cellmap_pipe.prepare.plan import grown_box
from cellmap_pipe.prepare.statistics import summarise

KEEP, FLAG, REJECT = "keep", "flag", "reject"

COLUMNS = (
    "crop verdict cause dataset voxel_nm shape annotated present_classes known_fraction supervised_pairs "
    "em_inside_fraction em_valid_fraction em_mean em_std registration shift scale margin train_mb predict_mb "
    "overlaps contradictions instances warnings"
).split()

# EM is blank if this share of its valid voxels has one and the same grey value: resin has noise, fill values have none.
BLANK_SHARE = 0.99

CONVERT_REMEDY = "make it again with `snakemake -R convert`"

# What is read of every record, and of the certificate of a converted crop.
_KEYS = (
    "crop dataset status cause lattice annotated classes counts overlaps contradictions instances warnings "
    "em_inside_fraction em_valid_fraction em_stats label_dtype registration"
).split()
_KEYS_REGISTRATION = ("verdict", "shift", "scale", "margin")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Memory:
    """Host memory in bytes that a crop needs: its pair in the training store, and its prediction by `model`.

    predict is that of the most demanding model, beside the network itself; without a model it is 0 and `model` is "".
    """

    train: int
    predict: int
    model: str

    def excess(self, limits: Mapping[str, Any]) -> str:
        """Return in words what needs more than `max_train_gb` or `max_predict_gb` of `limits`, "" if nothing does.

        The limits are in 10^9 bytes, None for no limit.
        """
        needs = (
            (self.train, "max_train_gb", "in training"),
            (self.predict, "max_predict_gb", f"in prediction with {self.model}"),
        )
        over = [
            f"{need / 1e9:.3g} GB {where} (quality.{key} is {limits[key]:g})"
            for need, key, where in needs
            if limits[key] is not None and need > limits[key] * 1e9
        ]
        return f"needs {' and '.join(over)}" if over else ""


def needed_memory(record: Record, models: Sequence[Mapping[str, Any]], context_nm: float) -> Memory:
    """Return the host memory that a converted crop will need at most, however far the EM reaches beyond it.

    context_nm: EM round the label box that the training store keeps. models: of this grid, each {name, patch (z, y, x;
    voxels), overlap, batch, classes (their number)} and, where they are not the plainest, planes, output and tta; where
    its predictions are held to one, memory_gb.
    """
    box = Lattice.from_dict(record["lattice"])
    stored, _ = grown_box(box, None, context_nm)
    predict = {model["name"]: _prediction_bytes(box, model) for model in models}
    largest = max(predict, key=lambda name: predict[name], default="")
    train = stored.voxels * (1 + np.dtype(record["label_dtype"]).itemsize)
    return Memory(train, predict.get(largest, 0), largest)


def memory_figures(memory: Memory | None) -> dict[str, str]:
    """Return the columns train_mb and predict_mb (10^6 bytes) of a crop, "" for what is not known."""
    return {
        "train_mb": _decimals(memory.train / 1e6 if memory else None, 1),
        "predict_mb": _decimals(memory.predict / 1e6 if memory and memory.model else None, 1),
    }


def judge(record: Record, settings: Mapping[str, Any], memory: Memory | None = None) -> tuple[str, str]:
    """Return the verdict on one crop and its cause in words, "" for `keep`.

    record: of prepare.convert. settings: min_em_fraction, the least share of the label box with EM on disk; min_std,
    the least standard deviation of its valid voxels in grey values; max_train_gb and max_predict_gb, what one crop may
    need (10^9 bytes; None = no limit). memory: what it needs, None for a crop that was not converted.
    """
    if record["status"] != "ok":
        kind = str(record["kind"])
        return REJECT, kind if kind == "unannotated" else f"{kind}: {record['cause']}"
    least = settings["min_em_fraction"]
    if record["em_inside_fraction"] < least or not record["em_inside_fraction"]:
        return REJECT, "outside EM"
    if record["em_valid_fraction"] < least or not record["em_valid_fraction"]:
        return REJECT, "EM not downloaded"
    histogram = record["em_stats"]["histogram"]
    if max(histogram) >= BLANK_SHARE * sum(histogram):
        return REJECT, "blank EM"
    if not record["annotated"]:
        return REJECT, "unannotated"
    if not supervised_pairs(record):
        return REJECT, "nothing known"
    excess = memory.excess(settings) if memory else ""
    if excess:
        return REJECT, f"too large for the memory budget: {excess}"
    if record["em_stats"]["std"] < settings["min_std"]:
        return FLAG, "low contrast"
    cause = _misplaced(record["registration"])
    return (FLAG, cause) if cause else (KEEP, "")


def supervised_pairs(record: Record) -> int:
    """Return how many pairs of voxel and class of a crop are known, present or absent."""
    return sum(count["present"] + count["absent"] for count in record["counts"].values())


def write_quality(
    shard_jsons: Sequence[str | os.PathLike[str]],
    crops_out: str | os.PathLike[str],
    statistics_out: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any],
    keep: Sequence[str],
    drop: Sequence[str],
    context_nm: float,
    models: Sequence[Mapping[str, Any]],
) -> None:
    """Write the verdicts of a grid's crops (CSV with COLUMNS) and the statistics of those that are kept (JSON).

    settings: see `judge`. context_nm, models: see `needed_memory`. keep, drop: crops (`dataset/cropN`) to use, or not
    to use, whatever their figures say; a crop that could not be converted cannot be kept. Raises ConfigError for an
    entry that is no crop, or is in both lists, and ContractError for a record that an older version has written.
    """
    shards = [read_json(path, CONVERT_REMEDY) for path in shard_jsons]
    for path, shard in zip(shard_jsons, shards, strict=True):
        for record in shard["records"]:
            _check_record(record, path)
    records = sorted((record for shard in shards for record in shard["records"]), key=lambda record: record["crop"])
    _check_overrides([record["crop"] for record in records], keep, drop)
    kept, rows = [], []
    for record in records:
        memory = needed_memory(record, models, context_nm) if record["status"] == "ok" else None
        verdict, cause = _overridden(record, judge(record, settings, memory), keep, drop)
        rows.append(_row(record, verdict, cause, memory))
        if verdict == KEEP:
            kept.append(record)
    with replacing(crops_out) as partial, open(partial, "w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_json(statistics_out, summarise(shards[0]["grid"], kept, shards[0]["classes"]))


def read_verdicts(quality_csv: str | os.PathLike[str]) -> dict[str, str]:
    """Return the verdict of each crop in a quality table."""
    return {row["crop"]: row["verdict"] for row in read_crops(str(quality_csv))}


def _prediction_bytes(box: Lattice, model: Mapping[str, Any]) -> int:
    """Return the host memory that a prediction of a box takes at most (to 2 %), as `prediction.predict` plans it.

    How much EM lies round the crop is not known here: windows see most of y and x with a patch of it on every side;
    along z they overlap most without any, and finish most planes at once with some.
    """
    reach = max(model["patch"])
    need = 0
    for before_and_after in ((0, 0), (reach, reach)):
        plans = make_plans(
            box.shape,
            model["patch"],
            model["overlap"],
            context=[before_and_after, (reach, reach), (reach, reach)],
            planes=model["planes"],
            voxel_nm=box.voxel_nm,
        )
        bytes_needed = estimate_bytes(
            plans,
            ((0, 0, 0), box.shape),
            model["classes"],
            min(CHUNK[0], box.shape[0]),
            model["batch"],
            READ_PLANES,
            output=model["output"],
            symmetries=model["tta"],
        )
        need = max(need, bytes_needed)
    limit_gb = model["memory_gb"]
    return need if limit_gb is None else min(need, round(limit_gb * 1e9))  # cut into columns that keep to it


def _misplaced(registration: Record) -> str:
    """Return in words where else the labels fit the image better, "" if nowhere or if that cannot be told."""
    if registration["verdict"] == "rescaled":
        scale = registration["scale"]
        view = "twice" if scale > 1 else "half"
        return f"resolution mismatch: labels show {view} the image's field of view (they fit best at scale {scale:g})"
    if registration["verdict"] == "displaced":
        shift = ", ".join(f"{-part:+d}" for part in registration["shift"])
        return f"misregistered: labels are off by ({shift}) voxels (z, y, x)"
    return ""


def _check_record(record: Record, path: str | os.PathLike[str]) -> None:
    """Raise ContractError, naming the crop, if a record lacks what is read of it."""
    ok = record.get("status") == "ok"
    missing = [key for key in (*_KEYS, *([] if ok else ["kind"])) if key not in record]
    if ok and not missing:
        missing = [f"registration.{key}" for key in _KEYS_REGISTRATION if key not in (record["registration"] or {})]
    if missing:
        raise ContractError(
            f"{path}: the record of {record.get('crop')} has no '{missing[0]}', another version has written it; "
            f"{CONVERT_REMEDY}"
        )


def _overridden(record: Record, judged: tuple[str, str], keep: Sequence[str], drop: Sequence[str]) -> tuple[str, str]:
    crop, (verdict, cause) = record["crop"], judged
    if crop in drop:
        return REJECT, "dropped by quality.drop"
    if crop not in keep or verdict == KEEP:
        return judged
    if record["status"] != "ok" or not record["em_valid_fraction"] or not supervised_pairs(record):
        return REJECT, f"{cause} (listed in quality.keep, but there is nothing to use)"
    return KEEP, f"kept by quality.keep in spite of: {cause}"


def _check_overrides(crops: Sequence[str], keep: Sequence[str], drop: Sequence[str]) -> None:
    for key, names in (("keep", keep), ("drop", drop)):
        for name in names:
            if name not in crops:
                near = difflib.get_close_matches(name, crops, 1)
                hint = f"did you mean '{near[0]}'?" if near else "write it as in results/crops.csv, dataset/cropN"
                raise ConfigError(f"quality.{key}: there is no crop '{name}'; {hint}")
    both = sorted(set(keep) & set(drop))
    if both:
        raise ConfigError(f"quality.keep and quality.drop both list '{both[0]}'; remove it from one of them")


def _row(record: Record, verdict: str, cause: str, memory: Memory | None) -> dict[str, Any]:
    lattice, em, registration = record["lattice"] or {}, record["em_stats"] or {}, record["registration"] or {}
    placed = registration if registration.get("verdict") != "not assessable" else {}
    counts = record["counts"]
    voxels = sum(sum(count.values()) for count in counts.values())
    known = supervised_pairs(record)
    return {
        "crop": record["crop"],
        "verdict": verdict,
        "cause": " ".join(cause.split()),
        "dataset": record["dataset"],
        "voxel_nm": ";".join(f"{v:g}" for v in lattice.get("voxel_nm", [])),
        "shape": ";".join(map(str, lattice.get("shape", []))),
        "annotated": len(record["annotated"]),
        "present_classes": ";".join(name for name in record["classes"] if counts.get(name, {}).get("present")),
        "known_fraction": f"{known / voxels:.4f}" if voxels else "",
        "supervised_pairs": known,
        "em_inside_fraction": f"{record['em_inside_fraction']:.4f}",
        "em_valid_fraction": f"{record['em_valid_fraction']:.4f}",
        "em_mean": f"{em['mean']:.2f}" if em else "",
        "em_std": f"{em['std']:.2f}" if em else "",
        "registration": registration.get("verdict", ""),
        "shift": ";".join(map(str, placed.get("shift", []))),
        "scale": f"{placed['scale']:g}" if placed else "",
        "margin": _decimals(placed.get("margin"), 3),
        **memory_figures(memory),
        "overlaps": ";".join(f"{pair}:{n}" for pair, n in sorted(record["overlaps"].items()) if n),
        "contradictions": " | ".join(record["contradictions"]),
        "instances": ";".join(f"{name}:{n}" for name, n in sorted(record["instances"].items())),
        "warnings": " | ".join(record["warnings"]),
    }


def _decimals(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
