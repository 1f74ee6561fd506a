"""The verdict on every crop of a grid: keep, flag (looks wrong; not used unless asked for) or reject, and why."""

import csv
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.files import read_json, replacing, write_json
from cellmap_pipe.prepare.crops import read_crops
from cellmap_pipe.prepare.statistics import summarise

KEEP, FLAG, REJECT = "keep", "flag", "reject"

COLUMNS = (
    "crop verdict cause dataset voxel_nm shape annotated present_classes known_fraction em_valid_fraction em_mean "
    "em_std overlaps warnings"
).split()

# EM is blank if this share of its valid voxels has one and the same grey value: resin has noise, fill values have none.
BLANK_SHARE = 0.99

Record = Mapping[str, Any]


def judge(record: Record, settings: Mapping[str, float]) -> tuple[str, str]:
    """Return the verdict on one converted crop and its cause in words, "" for `keep`.

    record: of prepare.convert. settings: min_em_fraction, the least share of the label box with EM on disk, and
    min_std, the least standard deviation of its valid voxels in grey values.
    """
    if record["status"] != "ok":
        cause = record["cause"]
        return REJECT, cause if cause == "nothing annotated" else f"unreadable: {cause}"
    least = settings["min_em_fraction"]
    if record["em_inside_fraction"] < least:
        return REJECT, "outside EM"
    if record["em_valid_fraction"] < least:
        return REJECT, "EM not on disk"
    histogram = record["em_stats"]["histogram"]
    if max(histogram) >= BLANK_SHARE * sum(histogram):
        return REJECT, "blank EM"
    if not record["annotated"]:
        return REJECT, "nothing annotated"
    if not any(count["present"] + count["absent"] for count in record["counts"].values()):
        return REJECT, "nothing known"
    if record["em_stats"]["std"] < settings["min_std"]:
        return FLAG, "low contrast"
    if record["registration"]["verdict"] == "displaced":
        shift = ", ".join(f"{-part:+d}" for part in record["registration"]["shift"])
        return FLAG, f"misregistered: labels are off by ({shift}) voxels (z, y, x)"
    return KEEP, ""


def write_quality(
    shard_jsons: Sequence[str | os.PathLike[str]],
    crops_out: str | os.PathLike[str],
    statistics_out: str | os.PathLike[str],
    *,
    settings: Mapping[str, float],
    keep: Sequence[str],
    drop: Sequence[str],
) -> None:
    """Write the verdicts of a grid's crops (CSV with COLUMNS) and the statistics of those that are kept (JSON).

    keep, drop: crops (`dataset/cropN`) to use, or not to use, whatever their figures say; a crop that could not be
    converted cannot be kept. Raises ConfigError for an entry that is no crop, or is in both lists.
    """
    shards = [read_json(path, "make it again with `snakemake -R convert`") for path in shard_jsons]
    records = sorted((record for shard in shards for record in shard["records"]), key=lambda record: record["crop"])
    _check_overrides([record["crop"] for record in records], keep, drop)
    verdicts = {record["crop"]: _overridden(record, judge(record, settings), keep, drop) for record in records}
    kept = [record for record in records if verdicts[record["crop"]][0] == KEEP]
    with replacing(crops_out) as partial, open(partial, "w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_row(record, *verdicts[record["crop"]]) for record in records)
    write_json(statistics_out, summarise(shards[0]["grid"], kept, shards[0]["classes"]))


def read_verdicts(quality_csv: str | os.PathLike[str]) -> dict[str, str]:
    """Return the verdict of each crop in a quality table."""
    return {row["crop"]: row["verdict"] for row in read_crops(str(quality_csv))}


def _overridden(record: Record, judged: tuple[str, str], keep: Sequence[str], drop: Sequence[str]) -> tuple[str, str]:
    crop, (verdict, cause) = record["crop"], judged
    if crop in drop:
        return REJECT, "dropped by quality.drop"
    if crop not in keep or verdict == KEEP:
        return judged
    if record["status"] != "ok" or record["em_valid_fraction"] == 0:
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


def _row(record: Record, verdict: str, cause: str) -> dict[str, Any]:
    lattice, em = record["lattice"] or {}, record["em_stats"] or {}
    counts = record["counts"]
    voxels = sum(sum(count.values()) for count in counts.values())
    known = sum(count["present"] + count["absent"] for count in counts.values())
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
        "em_valid_fraction": f"{record['em_valid_fraction']:.4f}",
        "em_mean": f"{em['mean']:.2f}" if em else "",
        "em_std": f"{em['std']:.2f}" if em else "",
        "overlaps": ";".join(f"{pair}:{n}" for pair, n in sorted(record["overlaps"].items()) if n),
        "warnings": " | ".join(record["warnings"]),
    }
