"""What all figures share: their style, deterministic files, class overlays on EM, and scale bars."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cellmap_pipe.classes import get_class
from cellmap_pipe.colours import colour_of
from cellmap_pipe.files import replacing

# Share of the class's colour in an overlaid voxel; the rest is EM, so that structure stays visible under the label.
OPACITY = 0.55

# Brightness left to voxels of which no class's state is known.
DIMMED = 0.45

_STYLE: Mapping[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.grid": False,
    "legend.frameon": False,
    "svg.hashsalt": "cellmap_pipe",
    "svg.fonttype": "path",
    "image.interpolation": "nearest",
}


@contextmanager
def drawing(out: str | os.PathLike[str], size_inch: tuple[float, float], dpi: int = 110) -> Iterator[Figure]:
    """Yield an empty figure that is written to `out` (.png or .svg) atomically when the block succeeds.

    The same drawing gives the same bytes: no date, no version, no random identifiers.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the files
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=size_inch, layout="constrained", facecolor="white")
        yield figure
        with replacing(out) as partial:
            metadata = {"Date": None} if partial.suffix == ".svg" else {"Software": None}
            figure.savefig(partial, dpi=dpi, metadata=metadata)


def write_message(out: str | os.PathLike[str], text: str) -> None:
    """Write a figure that says why there is nothing to draw."""
    with drawing(out, (7.0, 1.2)) as figure:
        figure.text(0.5, 0.5, text, ha="center", va="center", wrap=True)


def grey_limits(values: np.ndarray) -> tuple[float, float]:
    """Return the 0.5 and 99.5 percentiles of EM, which are drawn as black and white.

    EM of one single value gets its type's own range, so that blank EM looks blank; so does an empty array.
    """
    lo, hi = np.percentile(values, (0.5, 99.5)) if values.size else (0.0, 0.0)
    return (float(lo), float(hi)) if hi - lo >= 1 else (0.0, 255.0)


def grey(plane: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Return an EM plane (y, x) as float32 in 0..1, stretched between `limits`, or else between its own."""
    lo, hi = limits or grey_limits(plane)
    return np.clip((plane.astype(np.float32) - lo) / (hi - lo), 0, 1)


def rgb(colour: str) -> np.ndarray:
    """Return "#RRGGBB" as three floats in 0..1."""
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float32) / 255


def painting_order(classes: Sequence[str]) -> list[str]:
    """Return the classes with the largest groups first: later ones are painted over them."""
    return sorted(classes, key=lambda name: (-len(get_class(name).atoms), get_class(name).id))


def overlaid(image: np.ndarray, masks: Mapping[str, np.ndarray], known: np.ndarray | None = None) -> np.ndarray:
    """Return EM (y, x) in 0..1 as RGB (y, x, 3) with every class's mask (y, x) in its colour.

    known: (y, x), False where nothing is known of any class; those voxels are dimmed.
    """
    picture = np.repeat(image[..., None], 3, axis=2).astype(np.float32)
    if known is not None:
        picture[~known] *= DIMMED
    for name in painting_order(list(masks)):
        mask = masks[name]
        picture[mask] = (1 - OPACITY) * image[mask][:, None] + OPACITY * rgb(colour_of(name))
    return np.clip(picture, 0, 1)


def visible(masks: Mapping[str, np.ndarray]) -> set[str]:
    """Return the classes of which `overlaid` shows at least one voxel."""
    seen: set[str] = set()
    covered: np.ndarray | bool = False
    for name in reversed(painting_order(list(masks))):
        if (masks[name] & ~np.asarray(covered)).any():
            seen.add(name)
        covered = covered | masks[name]
    return seen


def thinned(size: int, most: int) -> int:
    """Return the step that brings `size` samples down to at most `most`."""
    return max(1, -(-size // most))


def show_plane(axes: Axes, picture: np.ndarray, voxel_nm: Sequence[float]) -> None:
    """Draw a plane (y, x[, 3]) with its true proportions and a scale bar. voxel_nm: (y, x) of the plane's voxels."""
    height, width = picture.shape[:2]
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, aspect=voxel_nm[0] / voxel_nm[1], interpolation="antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_anchor("NW")
    length_nm = round_length(0.35 * width * voxel_nm[1])
    text = f"{length_nm / 1000:g} µm" if length_nm >= 1000 else f"{length_nm:g} nm"
    # dark edges keep bar and text readable on bright EM
    ends = (0.04, 0.04 + length_nm / voxel_nm[1] / width)
    for colour, thickness in (("black", 4.0), ("white", 2.4)):
        line = Line2D(ends, (0.04, 0.04), transform=axes.transAxes, color=colour, lw=thickness, solid_capstyle="butt")
        axes.add_line(line)
    shade = {"boxstyle": "square,pad=0.12", "facecolor": "black", "alpha": 0.6, "linewidth": 0}
    axes.annotate(
        text, (0.04, 0.04), (1, 5), "axes fraction", "offset points", color="white", fontsize=6, va="bottom", bbox=shade
    )
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def round_length(most_nm: float) -> float:
    """Return the greatest of 1, 2, 5 x a power of ten that is at most `most_nm`."""
    power = 10.0 ** np.floor(np.log10(most_nm))
    return float(max(step * power for step in (1, 2, 5) if step * power <= most_nm * (1 + 1e-9)))


def class_legend(figure: Figure, classes: Sequence[str]) -> None:
    """Name the classes' colours under the figure, in as many rows as its width asks for."""
    if not classes:
        return
    handles = [Patch(facecolor=colour_of(name), edgecolor="#555555", linewidth=0.5, label=name) for name in classes]
    columns = min(len(classes), max(1, int(figure.get_figwidth() / 1.3)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8)
