"""The challenge's scores: counts per crop and label that pool, and the formulas that turn them into scores.

Importable alone: neither torch nor matplotlib is loaded.
"""

from cellmap_pipe.evaluation.alignment import match_geometry
from cellmap_pipe.evaluation.challenge import aggregate, missing_label
from cellmap_pipe.evaluation.instance import score_instance
from cellmap_pipe.evaluation.semantic import score_semantic

__all__ = ["aggregate", "match_geometry", "missing_label", "score_instance", "score_semantic"]
