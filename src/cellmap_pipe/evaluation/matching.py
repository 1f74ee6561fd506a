"""The evaluator's assignment of predicted components to truth objects (CHALLENGE section 4.3).

There it is a min-cost flow over the whole overlap graph; the optimum splits into the graph's connected components, most
of which are a single pair or a star. Costs are the same truncated integers.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching

COST_SCALE = 1_000_000
UNMATCHED_COST = COST_SCALE + 1
# Cells of the largest dense cost matrix; larger components of the graph are solved sparsely
DENSE_CELLS = 1_000_000


def match(rows: np.ndarray, columns: np.ndarray, iou: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the matched (truth, component) positions of the assignment that maximises sum(IoU) + 1e-6 matches.

    rows, columns, iou (float32): the overlap edges. Any overlap is worth a match: there is no IoU threshold. Among
    assignments of equal cost an arbitrary one is returned, as by the official solver.
    """
    if not len(rows):
        return rows, columns
    gain = UNMATCHED_COST - ((1.0 - iou.astype(np.float64)) * COST_SCALE).astype(np.int64)
    n_rows, n_columns = int(rows.max()) + 1, int(columns.max()) + 1
    n = n_rows + n_columns
    graph = coo_array((np.ones(len(rows), np.int8), (rows, n_rows + columns)), shape=(n, n))
    component = connected_components(graph, directed=False)[1][rows]

    order = np.lexsort((-gain, component))
    component, rows, columns, gain = component[order], rows[order], columns[order], gain[order]
    first = np.flatnonzero(np.append(True, component[1:] != component[:-1]))
    last = np.append(first[1:], len(rows))
    stars = np.minimum.reduceat(rows, first) == np.maximum.reduceat(rows, first)
    stars |= np.minimum.reduceat(columns, first) == np.maximum.reduceat(columns, first)

    # In a star only one edge can be chosen: the best, which is the first
    matched_rows, matched_columns = [rows[first[stars]]], [columns[first[stars]]]
    for lo, hi in zip(first[~stars].tolist(), last[~stars].tolist(), strict=True):
        chosen = _assign(rows[lo:hi], columns[lo:hi], gain[lo:hi])
        matched_rows.append(chosen[0])
        matched_columns.append(chosen[1])
    return np.concatenate(matched_rows), np.concatenate(matched_columns)


def _assign(rows: np.ndarray, columns: np.ndarray, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the (row, column) pairs of the assignment of highest total gain; all gains are positive."""
    row_ids, r = np.unique(rows, return_inverse=True)
    column_ids, c = np.unique(columns, return_inverse=True)
    if len(row_ids) * len(column_ids) <= DENSE_CELLS:
        table = np.zeros((len(row_ids), len(column_ids)))
        table[r, c] = gain
        chosen_r, chosen_c = linear_sum_assignment(table, maximize=True)
        real = table[chosen_r, chosen_c] > 0
        return row_ids[chosen_r[real]], column_ids[chosen_c[real]]
    # Every row may also take a column of its own, "unmatched"; stored weights must not be 0, hence the +1
    n_rows, n_columns = len(row_ids), len(column_ids)
    cost = np.append(UNMATCHED_COST - gain, np.full(n_rows, UNMATCHED_COST)) + 1
    table_rows = np.append(r, np.arange(n_rows))
    table_columns = np.append(c, n_columns + np.arange(n_rows))
    table = coo_array((cost.astype(np.float64), (table_rows, table_columns)), shape=(n_rows, n_columns + n_rows))
    chosen_r, chosen_c = min_weight_full_bipartite_matching(table.tocsr())
    real = chosen_c < n_columns
    return row_ids[chosen_r[real]], column_ids[chosen_c[real]]
