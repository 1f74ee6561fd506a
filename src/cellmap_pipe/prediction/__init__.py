"""From a trained network to segmentations: sliding windows, ensembles, post-processing.

`predict_array` is loaded at its first use: it imports torch, which costs seconds that the other stages need not pay.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellmap_pipe.prediction.sliding_window import predict_array

__all__ = ["predict_array"]


def __getattr__(name: str) -> Any:
    if name == "predict_array":
        from cellmap_pipe.prediction.sliding_window import predict_array

        return predict_array
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
