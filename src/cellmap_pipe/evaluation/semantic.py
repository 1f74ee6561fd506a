"""Voxel counts of one semantic label (CHALLENGE section 4.4)."""

from math import lcm
from typing import Any

import numpy as np

from cellmap_pipe.evaluation.inputs import as_array, check_pred, check_shapes, check_truth, slabs


def score_semantic(pred: Any, truth: Any, mask: Any = None) -> dict[str, Any]:
    """Return the official raw record of a semantic label: tp, fp, fn (voxels) and status.

    pred, truth, mask: arrays (z, y, x), numpy or zarr, read slab by slab, or nested lists. A voxel belongs to the label
    where it is above 0; `mask` multiplies both. Raises DataError for arrays that cannot be compared.
    """
    pred, truth, mask = as_array(pred), as_array(truth), as_array(mask)
    check_shapes(pred, truth, mask)
    # One slab holds whole chunks of every array, so that no chunk is decoded twice
    depths = [array.chunks[0] for array in (pred, truth, mask) if hasattr(array, "chunks")]
    depth = lcm(*depths) if depths else 1
    tp = n_pred = n_truth = 0
    for part in slabs(truth.shape, depth if depth <= truth.shape[0] else 1):
        p, t = np.asarray(pred[part]), np.asarray(truth[part])
        check_pred(p)
        check_truth(t)
        p, t = p > 0, t > 0
        if mask is not None:
            known = np.asarray(mask[part]) > 0
            p &= known
            t &= known
        n_pred += int(np.count_nonzero(p))
        n_truth += int(np.count_nonzero(t))
        tp += int(np.count_nonzero(p & t))
    return {"tp": tp, "fp": n_pred - tp, "fn": n_truth - tp, "status": "scored"}
