"""Voxel counts of one semantic label (CHALLENGE section 4.4)."""

from typing import Any

import numpy as np

from cellmap_pipe.evaluation.inputs import as_array, check_pred, check_shapes, check_truth, masked, read_slabs


def score_semantic(pred: Any, truth: Any, mask: Any = None) -> dict[str, Any]:
    """Return the official raw record of a semantic label: tp, fp, fn (voxels) and status.

    pred, truth, mask: arrays (z, y, x), numpy, zarr or alike, read slab by slab (`read_slabs`), or nested lists. A
    voxel belongs to the label where it is above 0; `mask` multiplies both. Raises DataError for arrays that cannot be
    compared.
    """
    pred, truth, mask = as_array(pred), as_array(truth), as_array(mask)
    check_shapes(pred, truth, mask)
    tp = n_pred = n_truth = 0
    for p, t, m in read_slabs((pred, truth, mask)):
        assert p is not None and t is not None
        check_pred(p)
        check_truth(t)
        if m is not None:
            p, t = masked(p, m), masked(t, m)
        p, t = p > 0, t > 0
        n_pred += int(np.count_nonzero(p))
        n_truth += int(np.count_nonzero(t))
        tp += int(np.count_nonzero(p & t))
    return {"tp": tp, "fp": n_pred - tp, "fn": n_truth - tp, "status": "scored"}
