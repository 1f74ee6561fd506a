"""One fixed colour per class, the same in every figure and in the metadata of every OME-Zarr.

An organelle has a hue, its membrane a darker and its lumen a lighter shade of it: neighbours differ in lightness and
not in hue alone. The colours of the 14 default classes were spread so that any two of them stay at least 18 apart
(CIE 1976 colour difference) for normal sight and for simulated protanopia, deuteranopia and tritanopia (Machado et al.
2009, doi:10.1109/TVCG.2009.113). The colours of runs are those of Okabe & Ito (2008), https://jfly.uni-koeln.de/color/.
"""

from cellmap_pipe.classes import get_class

# Lines and bars that stand for models, not for classes: Okabe & Ito without yellow, too pale on white, and black.
SERIES: tuple[str, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")

# Verdicts of the quality check.
VERDICTS: dict[str, str] = {"keep": "#009E73", "flag": "#E69F00", "reject": "#D55E00"}

# Verdicts of the registration check.
REGISTRATIONS: dict[str, str] = {
    "in place": "#009E73",
    "displaced": "#E69F00",
    "rescaled": "#E69F00",
    "not assessable": "#BBBBBB",
}

_HUES: dict[str, str] = {
    "mito": "#009E73",
    "golgi": "#E6C800",
    "ves": "#CC79A7",
    "endo": "#F07F00",
    "lyso": "#AA4499",
    "ld": "#999933",
    "er": "#2E86D1",
    "eres": "#4477AA",
    "ne": "#6F4FC6",
    "np": "#9970AB",
    "chrom": "#5E4FA2",
    "mt": "#66CCEE",
    "perox": "#CC6677",
    "isg": "#44AA99",
    "chloroplast": "#117733",
    "vacuole": "#77AADD",
    "cent": "#BB5566",
}

_FIXED: dict[str, str] = {
    "ecs": "#DAFFD2",
    "pm": "#B53D0D",
    "mito_mem": "#0F784F",
    "mito_lum": "#4EC3A9",
    "mito_ribo": "#001700",
    "golgi_mem": "#B19500",
    "golgi_lum": "#FED64A",
    "ves_mem": "#8A6594",
    "ves_lum": "#EAD5FF",
    "endo_mem": "#682900",
    "endo_lum": "#FB9D6D",
    "er_mem": "#123A60",
    "er_lum": "#8AA0E0",
    "nuc": "#51178D",
    "nucpl": "#B39DDB",
    "nucleo": "#3F1F7A",
    "hchrom": "#4A3485",
    "nhchrom": "#7A63B5",
    "echrom": "#9C8ACB",
    "nechrom": "#C4B8E4",
    "cent": "#BB5566",
    "cent_dapp": "#8C2F40",
    "cent_sdapp": "#D98C99",
    "cent_all": "#A04455",
    "ribo": "#2B2B2B",
    "cyto": "#F2D9A6",
    "vim": "#7F5539",
    "glyco": "#B08968",
    "rbc": "#6B0F1A",
    "isg_ins": "#1D5F55",
    "actin": "#DDAA33",
    "tbar": "#004488",
    "bm": "#5C4033",
    "chloroplast_sg": "#D9F0A3",
    "plasmodesmata": "#808000",
    "cell": "#C8C8C8",
    "er_mem_all": "#174E80",
    "ne_mem_all": "#45308A",
}

# Share of black (negative) or white (positive) mixed into the organelle's hue.
_SHADES: dict[str, float] = {"mem": -0.42, "lum": 0.45, "out": -0.35, "in": 0.45}


def _mixed(colour: str, share: float) -> str:
    """Return `colour` mixed with white (`share` > 0) or black (`share` < 0)."""
    end = 255 if share > 0 else 0
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(value + (end - value) * abs(share)):02X}" for value in channels)


def colour_of(class_name: str) -> str:
    """Return the class's colour as "#RRGGBB". Raises ConfigError, with the nearest known name, for an unknown class."""
    get_class(class_name)
    if class_name in _FIXED:
        return _FIXED[class_name]
    if class_name in _HUES:
        return _HUES[class_name]
    organelle, _, part = class_name.rpartition("_")
    return _mixed(_HUES[organelle], _SHADES[part])
