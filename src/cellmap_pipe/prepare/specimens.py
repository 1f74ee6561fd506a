"""The biological specimen that each of the challenge's datasets is of: what `folds.group: specimen` keeps together.

Volumes of one cell culture, or of one animal, share preparation, staining and contrast, so a network validated on a
second volume of a specimen it was trained on looks better than it is. What is published of a dataset (its name, its
title at OpenOrganelle, its record at figshare) rarely says from which animal or dish it was taken. Where it leaves that
open, datasets of the same cell line or tissue in the same condition count as one specimen: grouping too much costs a
little balance, grouping too little a biased estimate. A dataset without an entry is its own specimen.
"""

import difflib
from collections.abc import Iterable, Mapping

from cellmap_pipe.errors import ConfigError

SPECIMENS: dict[str, str] = {
    # Two volumes, a and b, of one acquisition: wild-type interphase COS-7 (ATCC CRL-1651). Known from name and title.
    "jrc_cos7-1a": "jrc_cos7-1",
    "jrc_cos7-1b": "jrc_cos7-1",
    # Two cells, wild-type interphase HeLa (ATCC CCL-2), prepared by the same persons in the same way; the acquisition
    # of hela-3 is named "Cell3" of its preparation. Known: the cell line. Assumed: one dish.
    "jrc_hela-2": "jrc_hela",
    "jrc_hela-3": "jrc_hela",
    # Known: both are SUM159 breast cancer cells. Assumed: one culture.
    "jrc_sum159-1": "jrc_sum159",
    "jrc_sum159-4": "jrc_sum159",
    # Both are titled "Mouse liver acinus". Assumed: one animal. jrc_mus-liver is of another study and stands alone.
    "jrc_mus-liver-zon-1": "jrc_mus-liver-zon",
    "jrc_mus-liver-zon-2": "jrc_mus-liver-zon",
    # Three organs of wild-type mice of postnatal day 7. Known: the age. Assumed: one animal.
    "jrc_mus-heart-1": "jrc_mus-p7",
    "jrc_mus-kidney-3": "jrc_mus-p7",
    "jrc_mus-liver-3": "jrc_mus-p7",
    # Known: kidneys of mice, without a stated age. Assumed: one animal.
    "jrc_mus-kidney": "jrc_mus-kidney",
    "jrc_mus-kidney-glomerulus-2": "jrc_mus-kidney",
}


def specimens_of(datasets: Iterable[str], overrides: Mapping[str, str]) -> dict[str, str]:
    """Return the specimen of each dataset: of `overrides` (folds.specimens), else of SPECIMENS, else its own name.

    Raises ConfigError, with the nearest known name, for an override of a dataset that is in neither place.
    """
    found = list(dict.fromkeys(datasets))
    known = sorted({*found, *SPECIMENS})
    for dataset in overrides:
        if dataset not in known:
            near = difflib.get_close_matches(dataset, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"datasets found: {', '.join(sorted(found))}"
            raise ConfigError(f"folds.specimens: there is no dataset '{dataset}'; {hint}")
    return {dataset: overrides.get(dataset, SPECIMENS.get(dataset, dataset)) for dataset in found}
