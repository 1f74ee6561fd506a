"""What a submission will score, by the validation crops: the challenge's score with an interval, class by class."""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellmap_pipe.errors import ConfigError, ContractError
from cellmap_pipe.evaluation.alignment import is_instance
from cellmap_pipe.evaluation.bootstrap import PERCENTILES, overall, resample
from cellmap_pipe.evaluation.challenge import aggregate
from cellmap_pipe.evaluation.rules import CLEAN, get_rules
from cellmap_pipe.files import read_json

Forecast = dict[str, Any]


def forecast(
    records: Sequence[Mapping[str, Any]],
    labels: Collection[str],
    unanswered: Collection[str] = (),
    n: int = 2000,
    seed: int = 0,
) -> Forecast:
    """Return the score that a submission of these labels can expect, with its 95 % bootstrap interval over crops.

    records: of validation crops, with `crop` and `label`; failed ones are left out. labels: the classes of the
    manifest: each of them counts, as in the challenge (CHALLENGE section 4.7: plain means over classes, root of the
    product). unanswered: those that the submission does not answer anywhere. They score 0, and so do those that no
    record tells anything about. Crops are drawn with replacement, n times; a class that is in none of the drawn crops
    is left out of that draw's means.
    The interval is that of the validation score. It knows nothing of how far the test crops differ from validation
    crops as a kind.
    Result: score, low, high, overall_instance_score, overall_semantic_score, crops, resamples, label_scores {label:
    {score, low, high, crops}} of every label, unanswered and unvalidated (labels, sorted).
    """
    wanted = sorted(set(labels))
    missing = sorted(set(wanted) & set(unanswered))
    used = [
        record
        for record in records
        if record.get("status") != "failed" and record["label"] in wanted and record["label"] not in missing
    ]
    scores = aggregate(used)["label_scores"]
    unvalidated = [label for label in wanted if label not in scores and label not in missing]
    nothing = {"score": 0.0, "low": 0.0, "high": 0.0, "crops": 0}
    label_scores: dict[str, dict[str, float]] = {label: dict(nothing) for label in wanted}
    of_kind: dict[bool, list[np.ndarray]] = {True: [], False: []}
    if used:
        resampled = resample(used, n, seed)
        for label in wanted:
            values = resampled.draws.get(label)
            of_kind[is_instance(label)].append(np.zeros(n) if values is None else values)
            if values is None:
                continue
            score = scores[label]["combined_score" if "combined_score" in scores[label] else "iou"]
            low, high = np.nanpercentile(values, PERCENTILES) if not np.isnan(values).all() else (score, score)
            label_scores[label] = {
                "score": score,
                "low": float(low),
                "high": float(high),
                "crops": resampled.n_crops[label],
            }
    low, high = np.percentile(overall(of_kind[True], of_kind[False], n), PERCENTILES) if used else (0.0, 0.0)
    instance, semantic = (
        _mean([label_scores[x]["score"] for x in wanted if is_instance(x) is k]) for k in (True, False)
    )
    return {
        "score": math.sqrt(instance * semantic),
        "low": float(low),
        "high": float(high),
        "overall_instance_score": instance,
        "overall_semantic_score": semantic,
        "crops": len({record["crop"] for record in used}),
        "resamples": n if used else 0,
        "label_scores": label_scores,
        "unanswered": missing,
        "unvalidated": unvalidated,
    }


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0


def presence(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Return in how many of the crops with a record of the label its truth has it, and of how many: {label: (n, of)}.

    records: of validation crops, with `label`; failed ones are left out. The truth has a label where tp + fn > 0.
    """
    result: dict[str, tuple[int, int]] = {}
    for record in records:
        if record.get("status") != "failed":
            # Of a missing label the voxels of the crop are counted, whatever its truth holds
            voxels = record.get("voxels", record)
            n, of = result.get(record["label"], (0, 0))
            result[record["label"]] = (n + (voxels["tp"] + voxels["fn"] > 0), of + 1)
    return result


@dataclass(frozen=True)
class Validation:
    """Validation scores of one `source`, a model or the ensemble, over all its folds.

    records, clean: those of every crop and label, by the version `rules` and by the rules `clean`.
    """

    source: str
    rules: str
    records: Sequence[Mapping[str, Any]]
    clean: Sequence[Mapping[str, Any]]

    def presence(self) -> dict[str, tuple[int, int]]:
        """Return `presence` of the crops."""
        return presence(self.records)

    def forecast(self, labels: Collection[str], unanswered: Collection[str]) -> Forecast:
        """Return `forecast` by both rules: that by `clean` under this key; source, rules, provisional and note too."""
        version = get_rules(self.rules)
        return {
            **forecast(self.records, labels, unanswered),
            CLEAN: forecast(self.clean, labels, unanswered),
            "source": self.source,
            "rules": self.rules,
            "provisional": version.provisional,
            "note": version.note,
        }


def read_validation(paths: Sequence[str | os.PathLike[str]]) -> Validation:
    """Return the validation scores of one model or ensemble.

    paths: `results/scores/{source}/fold*.json`. Raises ConfigError if they are of several sources or rules, or hold a
    crop's label twice; ContractError for a file that holds no validation scores.
    """
    if not paths:
        raise ConfigError("no validation scores are given; give results/scores/{source}/fold*.json")
    remedy = "give results/scores/{source}/fold*.json"
    records: list[dict[str, Any]] = []
    clean: list[dict[str, Any]] = []
    first: tuple[str, str] | None = None
    origin: dict[tuple[str, str], str] = {}
    for path in map(str, paths):
        content = read_json(path, remedy)
        try:
            source, rules, of_fold = str(content["model"]), str(content["rules"]), list(content["records"])
            names = [(record["crop"], record["label"]) for record in of_fold]
            differing = {(record["crop"], record["label"]): record for record in content["clean_records"]}
        except (KeyError, TypeError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise ContractError(f"{path}: holds no validation scores ({cause}); {remedy}") from error
        if first is None:
            first = source, rules
        for kind, here, there in zip(("model", "rules"), (source, rules), first, strict=True):
            if here != there:
                raise ConfigError(f"{path}: {kind} {here}, but {paths[0]} has {there}; give the folds of one {kind}")
        for name in names:
            if name in origin:
                raise ConfigError(f"{path}: {'/'.join(name)} is in {origin[name]} too; give every fold once")
            origin[name] = path
        records += of_fold
        clean += [differing.get(name, record) for name, record in zip(names, of_fold, strict=True)]
    assert first is not None
    return Validation(*first, records, clean)
