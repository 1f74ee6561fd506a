"""Versions of the challenge's scoring rules. A new version is one more instance of `Rules` in `RULES`."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cellmap_pipe.errors import ConfigError

# The name of the rules without the evaluator's defects, which every result is given by too
CLEAN = "clean"

PORTAL_NOTE = "the score on the challenge's portal may differ: its evaluator changes without notice"

# (distances in nm, cap in nm, length of the voxel's diagonal in nm) -> scores in [0, 1]
Normalise = Callable[[np.ndarray, float, float], np.ndarray]


def decay(distance_nm: np.ndarray, cap_nm: float, diagonal_nm: float) -> np.ndarray:
    """Return 1.01^(-d / ||voxel||), 0 for an infinite distance (CHALLENGE section 4.3)."""
    return np.power(1.01, -distance_nm.astype(np.float64) / diagonal_nm)


def decay_to_floor(distance_nm: np.ndarray, cap_nm: float, diagonal_nm: float) -> np.ndarray:
    """Return `decay` rescaled linearly so that a match at the cap scores 0.1; infinite distances score 0.

    The evaluator of July 2026 is described so (CHALLENGE section 0); its formula is not public, hence provisional.
    """
    at_cap = 1.01 ** (-cap_nm / diagonal_nm)
    rescaled = 0.1 + 0.9 * (decay(distance_nm, cap_nm, diagonal_nm) - at_cap) / (1.0 - at_cap)
    return np.where(np.isinf(distance_nm), 0.0, rescaled)


def exponential_to_floor(distance_nm: np.ndarray, cap_nm: float, diagonal_nm: float) -> np.ndarray:
    """Return 0.1^(d / cap), which is 0.1 at the cap as well; infinite distances score 0. Provisional too."""
    return np.power(0.1, distance_nm.astype(np.float64) / cap_nm)


@dataclass(frozen=True)
class Rules:
    """One version of the evaluator.

    colliding_ids: an unmatched predicted component keeps its own number and so joins the truth object of that number.
    unmatched_at_cap: unmatched objects score as if at the cap; else they score 0.
    skipped_is_missed: a crop with too many instances counts as all missed; else it drops out of the pool.
    official_alignment: predictions are brought to the truth's voxels with the evaluator's own quirks.
    masks_are_classes: a truth array `<label>_mask` is listed as one more semantic class.
    """

    name: str
    description: str
    provisional: bool = False
    colliding_ids: bool = True
    unmatched_at_cap: bool = True
    skipped_is_missed: bool = False
    official_alignment: bool = True
    masks_are_classes: bool = True
    normalise: Normalise = decay

    @property
    def note(self) -> str:
        """What every result by these rules must say about them."""
        if self.provisional:
            return f"{self.name} is provisional (the official formula is not public); {PORTAL_NOTE}"
        return PORTAL_NOTE


RULES: dict[str, Rules] = {
    rules.name: rules
    for rules in (
        Rules("csc-2026.06", "the official evaluator of 2026-06-30, its defects included"),
        Rules(
            CLEAN,
            "csc-2026.06 without identifier collisions, without crops that drop out, and aligned by voxel edges",
            colliding_ids=False,
            skipped_is_missed=True,
            official_alignment=False,
            masks_are_classes=False,
        ),
        Rules(
            "csc-2026.07",
            "the evaluator of July 2026 as described: unmatched objects score 0, the worst match 0.1 (linear)",
            provisional=True,
            colliding_ids=False,
            unmatched_at_cap=False,
            normalise=decay_to_floor,
        ),
        Rules(
            "csc-2026.07-exponential",
            "csc-2026.07 with 0.1^(d / cap) in place of the linear rescaling",
            provisional=True,
            colliding_ids=False,
            unmatched_at_cap=False,
            normalise=exponential_to_floor,
        ),
    )
}


def get_rules(rules: str | Rules) -> Rules:
    """Return the rules of that version. Raises ConfigError naming the nearest known version."""
    if isinstance(rules, Rules):
        return rules
    try:
        return RULES[rules]
    except KeyError:
        near = difflib.get_close_matches(str(rules), RULES, 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"rules: unknown version '{rules}'; {hint}known: {', '.join(RULES)}") from None
