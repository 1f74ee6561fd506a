"""Which differences between models the validation crops show: paired bootstrap intervals, and groups of ties.

All sources answered the same crops, so every draw of crops scores all of them, and what makes a crop hard for all
cancels in the differences: an interval of a difference is far narrower than those of the two scores beside each other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from cellmap_pipe.evaluation.bootstrap import PERCENTILES, Resampled, leave_one_out, overall, resample
from cellmap_pipe.evaluation.challenge import aggregate

Record = Mapping[str, Any]

# Share of the bootstrap's draws of which the intervals of all pairs hold at once.
CONFIDENCE = 0.95

# With fewer units even a source that is better in every one of them is so by chance in more than 5 % of cases: a
# two-sided sign test of n units cannot fall below 2 / 2^n, which is 6 % for five.
FEWEST_UNITS = 6

SHOWN = "shown"
SHOWN_ALONE = "shown alone"
NOT_SHOWN = "no difference shown"
TOO_FEW = "too few to tell"


@dataclass(frozen=True)
class Score:
    """A source's score, with its 95 % bootstrap interval."""

    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The score of `first` less that of `second` on the same crops, with intervals.

    low, high: the 95 % interval of this pair by itself. low_all, high_all: wider, so that all pairs at once lie in
    theirs in 95 % of cases: among many pairs that do not differ, one in twenty would seem to by chance. units: how many
    of what is drawn there are.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    low_all: float
    high_all: float
    units: int

    @property
    def verdict(self) -> str:
        """SHOWN if the difference holds among all pairs, SHOWN_ALONE if only for this one, NOT_SHOWN, or TOO_FEW.

        NOT_SHOWN is no proof that both are the same: these crops cannot tell them apart.
        """
        if self.units < FEWEST_UNITS:
            return TOO_FEW
        if self.low <= 0 <= self.high:
            return NOT_SHOWN
        return SHOWN_ALONE if self.low_all <= 0 <= self.high_all else SHOWN


@dataclass(frozen=True)
class Comparison:
    """Sources on the labels of crops that all of them were scored on.

    scores: by source. differences: of every pair, the better source first, beginning with the best. labels: (crop,
    class) in common; left_out: those that only some have. crops, units: how many crops, and of what is drawn. kinds: of
    which classes occur, instance, semantic or both; the score of one kind alone is the mean over its classes.
    """

    scores: dict[str, Score]
    differences: list[Difference]
    labels: int
    left_out: int
    crops: int
    units: int
    kinds: tuple[str, ...]
    resamples: int

    @property
    def order(self) -> list[str]:
        """The sources, the best first; equal scores by name."""
        return _order({source: entry.score for source, entry in self.scores.items()})

    def shown(self) -> set[tuple[str, str]]:
        """Return the pairs (better, worse) whose difference holds among all pairs."""
        return {(each.first, each.second) for each in self.differences if each.verdict == SHOWN}

    def ranks(self) -> dict[str, tuple[int, int]]:
        """Return the best and the worst rank that each source can have, by the differences that are shown."""
        shown = self.shown()
        total = len(self.scores)
        return {
            source: (
                1 + sum(worse == source for _, worse in shown),
                total - sum(better == source for better, _ in shown),
            )
            for source in self.order
        }

    def groups(self) -> dict[str, str]:
        """Return letters for each source: two sources share a letter where no difference between them is shown."""
        return tie_groups(self.order, self.shown())


def shared_records(records: Mapping[str, Iterable[Record]]) -> dict[str, list[Record]]:
    """Return the records of those labels of crops that every source has, by source and in the same order.

    One that failed for any source is left out for all.
    """
    used = {
        # sorted, so that sums do not depend on the order of files
        source: sorted((entry for entry in records[source] if entry.get("status") != "failed"), key=_name)
        for source in sorted(records)
    }
    common = set.intersection(*({_name(entry) for entry in found} for found in used.values())) if used else set()
    return {source: [entry for entry in found if _name(entry) in common] for source, found in used.items()}


def compare_sources(
    records: Mapping[str, Iterable[Record]],
    unit_of: Mapping[str, str] | None = None,
    n: int = 4000,
    seed: int = 0,
) -> Comparison:
    """Return how the overall scores of the sources differ: paired bootstrap over crops, or over groups of crops.

    records: by source, with `crop` and `label`; those that failed for any source are left out for all. unit_of: what is
    drawn in place of each crop, the specimen it is of, for example; crops without an entry stand for themselves.
    Each of n draws takes as many units as there are, with replacement, the same ones for every source. A class that is
    in none of the drawn crops is left out of that draw's means, as in `aggregate`.
    The intervals of all pairs at once are those of the largest studentised difference: single-step max-t (Hothorn,
    Bretz and Westfall 2008, doi:10.1002/bimj.200810425) with the bootstrap's distribution in place of the normal one.
    Where few crops decide a difference, because they are large or the only ones of a class, both are made wider: see
    `_effective_units` and `_widening`.
    """
    shared = shared_records(records)
    common = {_name(entry) for found in shared.values() for entry in found}
    every = {_name(entry) for found in records.values() for entry in found if entry.get("status") != "failed"}
    crops = {crop for crop, _ in common}
    units = {(unit_of or {}).get(crop, crop) for crop in crops}
    if not common:
        return Comparison({}, [], 0, len(every), 0, 0, (), 0)
    drawn: dict[str, np.ndarray] = {}
    without: dict[str, np.ndarray] = {}
    kinds: set[str] = set()
    for source, found in shared.items():
        drawn_as = [{**entry, "crop": (unit_of or {}).get(entry["crop"], entry["crop"])} for entry in found]
        resampled = resample(drawn_as, n, seed)
        kinds |= {"instance" if label in resampled.instance else "semantic" for label in resampled.draws}
        drawn[source] = _overall(resampled, n)
        if len(units) > 1:
            without[source] = _overall(leave_one_out(drawn_as), len(units))
    points = {source: kinds_score(found) or 0.0 for source, found in shared.items()}
    scores = {
        source: Score(points[source], *(float(end) for end in np.percentile(drawn[source], PERCENTILES)))
        for source in points
    }
    return Comparison(
        scores,
        _differences(points, drawn, without, len(units)),
        len(common),
        len(every) - len(common),
        len(crops),
        len(units),
        tuple(sorted(kinds)),
        n,
    )


def kinds_score(records: Iterable[Record]) -> float | None:
    """Return the overall score of the records: over both kinds of classes, or over the only one that occurs.

    By `aggregate` a pool without any class of a kind scores 0, whatever is in it; a single crop, or a short class list,
    often has no more. None without a record that counts.
    """
    values: dict[str, list[float]] = {"combined_score": [], "iou": []}
    for entry in aggregate(records)["label_scores"].values():
        key = "combined_score" if "combined_score" in entry else "iou"
        values[key].append(float(entry[key]))
    means = [float(np.mean(found)) for found in values.values() if found]
    return float(np.prod(means) ** (1 / len(means))) if means else None


def class_differences(
    first: Iterable[Record], second: Iterable[Record], n: int = 4000, seed: int = 0
) -> dict[str, Difference]:
    """Return the score of each class by `first` less that by `second`, over the crops of both, by class.

    Paired as in `compare_sources`, each class by itself: among twenty classes one may seem to differ by chance.
    """
    pools = [
        sorted((entry for entry in found if entry.get("status") != "failed"), key=_name) for found in (first, second)
    ]
    common = set.intersection(*({_name(entry) for entry in pool} for pool in pools))
    shared = [[entry for entry in pool if _name(entry) in common] for pool in pools]
    if not common:
        return {}
    scores = [aggregate(pool)["label_scores"] for pool in shared]
    drawn = [resample(pool, n, seed) for pool in shared]
    several = len({entry["crop"] for entry in shared[0]}) > 1
    without = [leave_one_out(pool).draws for pool in shared] if several else []
    result = {}
    for label in sorted(scores[0]):
        key = "combined_score" if label in drawn[0].instance else "iou"
        points = {"first": float(scores[0][label][key]), "second": float(scores[1][label][key])}
        seen = ~np.isnan(drawn[0].draws[label])
        if seen.any():
            values = drawn[0].draws[label][seen] - drawn[1].draws[label][seen]
            units = drawn[0].n_crops[label]
            difference = points["first"] - points["second"]
            left = without[0][label] - without[1][label] if without else np.zeros(0)
            left = left[~np.isnan(left)]
            spread = _widening(left, values), min(_effective_units(left), units)
            low, high = (float(end) for end in _interval(difference, values, *spread))
            result[label] = Difference("first", "second", difference, low, high, low, high, units)
    return result


def tie_groups(order: Sequence[str], shown: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return a compact letter display: two of `order` share a letter exactly where no difference is shown.

    order: the best first. shown: the pairs that differ. Ties are not transitive (a and b, b and c may be ties although
    a and c differ), so one may have several letters. Insert and absorb: Piepho 2004, doi:10.1198/1061860043515.
    """
    columns = [frozenset(order)]
    for pair in sorted(tuple(sorted(each, key=order.index)) for each in shown):
        split = [
            part for column in columns for part in ([column - {x} for x in pair] if set(pair) <= column else [column])
        ]
        columns = [
            part
            for index, part in enumerate(split)
            if not any(part < other or (part == other and index > at) for at, other in enumerate(split) if at != index)
        ]
    ordered = sorted(columns, key=lambda column: sorted(map(order.index, column)))
    return {name: " ".join(_letter(i) for i, column in enumerate(ordered) if name in column) for name in order}


def _letter(index: int) -> str:
    """Return a, b, ... z, aa, ab ..."""
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def _name(entry: Record) -> tuple[str, str]:
    return str(entry["crop"]), str(entry["label"])


def _order(points: Mapping[str, float]) -> list[str]:
    return sorted(points, key=lambda source: (-points[source], source))


def _overall(resampled: Resampled, n: int) -> np.ndarray:
    """Return the overall score of each of n draws; over the only kind of classes where one alone occurs."""
    instance, semantic = (
        [values for label, values in resampled.draws.items() if (label in resampled.instance) is kind]
        for kind in (True, False)
    )
    # the root of the square of a mean where one kind alone occurs
    return overall(instance or semantic, semantic or instance, n)


def _differences(
    points: Mapping[str, float], drawn: Mapping[str, np.ndarray], without: Mapping[str, np.ndarray], units: int
) -> list[Difference]:
    pairs = list(combinations(_order(points), 2))
    if not pairs:
        return []
    found = np.array([points[first] - points[second] for first, second in pairs])
    draws = np.array([drawn[first] - drawn[second] for first, second in pairs])
    left = [without[first] - without[second] if without else np.zeros(0) for first, second in pairs]
    alike = [_effective_units(each) for each in left]
    wider = np.array([_widening(each, values) for each, values in zip(left, draws, strict=True)])
    low, high = np.transpose(
        [_interval(d, values, factor, size) for d, values, factor, size in zip(found, draws, wider, alike, strict=True)]
    )
    low_all, high_all = low, high
    if len(pairs) > 1:
        deviation = _largest_deviation(draws)
        reach = np.array([_expanded(deviation, size) for size in alike]) * wider * draws.std(axis=1)
        # where draws are skewed; what holds for all pairs is never claimed to be surer than what holds for one
        low_all, high_all = np.minimum(found - reach, low), np.maximum(found + reach, high)
    ends = np.stack([found, low, high, low_all, high_all], axis=1).tolist()
    return [Difference(*pair, d, a, b, c, e, units) for pair, (d, a, b, c, e) in zip(pairs, ends, strict=True)]


def _effective_units(without: np.ndarray) -> float:
    """Return how many units of equal weight tell as much of a difference's spread as these do, at most as many.

    without: the difference without each unit in turn (n,). Voxels are pooled, so that a few large crops may decide it;
    their number then says how well the spread is known, not that of all crops. Satterthwaite's degrees of freedom of
    the jackknife's variance, a sum of squares v_i^2: 3 (sum v_i^2)^2 / sum v_i^4, which is n for n normal ones.
    """
    if len(without) < 2 or not np.ptp(without):
        return float(len(without))
    squares = ((without - without.mean()) / np.ptp(without)) ** 2
    return float(min(max(3 * squares.sum() ** 2 / (squares**2).sum(), 2.0), len(without)))


def _widening(without: np.ndarray, draws: np.ndarray) -> float:
    """Return how many times wider than the bootstrap's draws the jackknife finds a difference to spread, at least 1.

    without: the difference without each unit in turn (n,). Where a few units decide, or a class is in very few, the
    bootstrap's variance is too small; the jackknife's is not, on average (Efron and Stein 1981,
    doi:10.1214/aos/1176345462).
    """
    if len(without) < 2 or not draws.std():
        return 1.0
    return max(1.0, float(np.sqrt(len(without) - 1) * without.std() / draws.std()))


def _interval(difference: float, draws: np.ndarray, wider: float, units: float) -> np.ndarray:
    """Return the lower and the upper end of the interval of a difference, of which there are draws (n,)."""
    share = float(norm.cdf(_expanded(float(norm.ppf((1 + CONFIDENCE) / 2)), units)))
    low, high = np.quantile(draws, (1 - share, share))
    return np.array(
        [min(low, difference + wider * (low - difference)), max(high, difference + wider * (high - difference))]
    )


def _largest_deviation(draws: np.ndarray) -> float:
    """Return how many standard deviations reach so far that CONFIDENCE of the draws (pairs, n) hold for all pairs."""
    spread = draws.std(axis=1)
    varying = spread > 0  # sources that answered every crop alike have no spread, and no difference either
    if not varying.any():
        return 0.0
    deviations = np.abs(draws[varying] - draws[varying].mean(axis=1, keepdims=True)) / spread[varying, None]
    return float(np.quantile(deviations.max(axis=0), CONFIDENCE))


def _expanded(deviation: float, units: float) -> float:
    """Return a normal deviate made as much larger as Student's t asks for with this few units.

    Bootstrap intervals of few units are too narrow: the draws' variance is (n - 1) / n of the estimated one, and that
    is itself uncertain. "Expanded percentile interval": Hesterberg 2015, doi:10.1080/00031305.2015.1089789.
    """
    if units < 2:
        return deviation
    return float(student.isf(norm.sf(deviation), units - 1) * np.sqrt(units / (units - 1)))
