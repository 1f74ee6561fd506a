"""Architectures of DiNTS: which paths of its lattice of feature maps are taken, and which operation each applies.

A lattice has `num_blocks` blocks between `num_blocks` + 1 rows of `num_depths` feature maps, each of half the
resolution of the one before. Path i of a block leads from depth (i + 1) // 3 - 1 + (i + 1) % 3 to depth (i + 1) // 3.
An architecture is JSON: node_a (num_blocks + 1, num_depths), which feature maps are in use; arch_code_a (num_blocks,
3 num_depths - 2), which paths are; arch_code_c, of the same shape, the number of each path's operation (He et al. 2021,
arXiv:2103.15954).

Reading one costs milliseconds: configurations are checked wherever Snakemake is called.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.files import write_text

FORMAT = 1

# Operations that a path can apply, by spatial_dims: the identity, then convolutions.
OPERATIONS: Mapping[int, int] = {2: 2, 3: 5}

# What determines the network, and what a file holds besides.
CODES = ("spatial_dims", "num_blocks", "num_depths", "node_a", "arch_code_a", "arch_code_c")
ABOUT = ("format", "source", "search")

# What a search takes from the settings of a model.
SEARCH_SETTINGS = (
    *("spatial_dims", "grid", "classes", "patch", "batch", "normalisation", "augment", "planes"),
    *("class_power", "centred_fraction", "seed", "amp"),
)

# Names of the codes in MONAI's files: those of its tutorial, and those of Auto3DSeg.
PUBLISHED: Mapping[str, tuple[str, ...]] = {
    "node_a": ("node_a",),
    "arch_code_a": ("arch_code_a", "code_a"),
    "arch_code_c": ("arch_code_c", "code_c"),
}


def path_ends(num_depths: int) -> list[tuple[int, int]]:
    """Return the depths (from, to) that each path of a block connects."""
    return [((i + 1) // 3 - 1 + (i + 1) % 3, (i + 1) // 3) for i in range(3 * num_depths - 2)]


def load_architecture(path: str | Path, folders: Sequence[Path] = (Path(),)) -> dict[str, Any]:
    """Return what the JSON file says of the network (the keys CODES): where it comes from changes no weights.

    A relative path is looked for in each of `folders`. Raises ConfigError, naming the file, if it is missing or wrong.
    """
    file = next((folder / path for folder in folders if (folder / path).is_file()), None)
    if file is None:
        looked = " and ".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
        raise ConfigError(
            f"architecture '{path}' does not exist (looked in {looked}); give a file written by "
            "`snakemake search_dints` or `cellmap-pipe import-architecture`"
        )
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: is not readable as JSON ({error}); make it again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("source"), str):
        raise ConfigError(
            f"{file}: is no architecture of format {FORMAT} with its `source`; make one with "
            "`cellmap-pipe import-architecture`"
        )
    codes = {key: value for key, value in content.items() if key not in ABOUT}
    check_architecture(codes, str(file))
    return codes


def check_architecture(codes: Any, where: str) -> None:
    """Raise ConfigError, beginning with `where`, unless `codes` (the keys CODES) describe a network that can be run."""
    if not isinstance(codes, Mapping):
        raise ConfigError(f"{where} is {str(codes)[:60]!r}; it must hold {', '.join(CODES)}")
    for key in codes:
        if key not in CODES:
            near = difflib.get_close_matches(str(key), CODES, n=1)
            raise ConfigError(f"{where}: '{key}' is unknown; {f'did you mean {near[0]}' if near else 'remove it'}")
    for key in CODES:
        if key not in codes:
            raise ConfigError(f"{where}: {key} is missing; an architecture needs {', '.join(CODES)}")
    for key, least in (("spatial_dims", 2), ("num_blocks", 1), ("num_depths", 2)):
        if not _is_int(codes[key]) or codes[key] < least:
            raise ConfigError(f"{where}: {key} is {codes[key]!r}; give an integer from {least} on")
    dims, blocks, depths = codes["spatial_dims"], codes["num_blocks"], codes["num_depths"]
    if dims not in OPERATIONS:
        raise ConfigError(f"{where}: spatial_dims is {dims}; allowed: 2, 3")
    ends = path_ends(depths)
    nodes = _matrix(codes, "node_a", (blocks + 1, depths), 2, where)
    paths = _matrix(codes, "arch_code_a", (blocks, len(ends)), 2, where)
    _matrix(codes, "arch_code_c", (blocks, len(ends)), OPERATIONS[dims], where)
    for block, active in enumerate(paths):
        sources = {ends[i][0] for i, on in enumerate(active) if on}
        targets = {ends[i][1] for i, on in enumerate(active) if on}
        if missing := [depth for depth in sorted(sources) if not nodes[block][depth]]:
            raise ConfigError(
                f"{where}: arch_code_a[{block}] has a path from depth {missing[0]}, which node_a[{block}] says is not "
                "in use; set both to the same"
            )
        if [int(depth in targets) for depth in range(depths)] != list(nodes[block + 1]) or not targets:
            raise ConfigError(
                f"{where}: the paths of arch_code_a[{block}] lead to depths {sorted(targets)}, and node_a[{block + 1}] "
                f"is {list(nodes[block + 1])}; it must be 1 for just those depths, of which there is at least one"
            )


def _matrix(
    codes: Mapping[str, Any], key: str, shape: tuple[int, int], below: int, where: str
) -> Sequence[Sequence[int]]:
    rows: Any = codes[key]
    if (
        not isinstance(rows, list | tuple)
        or len(rows) != shape[0]
        or not all(isinstance(row, list | tuple) and len(row) == shape[1] for row in rows)
    ):
        raise ConfigError(
            f"{where}: {key} must be {shape[0]} lists of {shape[1]} numbers, by num_blocks and num_depths"
        )
    for row, values in enumerate(rows):
        for value in values:
            if not _is_int(value) or not 0 <= value < below:
                raise ConfigError(f"{where}: {key}[{row}] holds {value!r}; allowed: 0 .. {below - 1}")
    checked: Sequence[Sequence[int]] = rows
    return checked


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def write_architecture(path: str | Path, codes: Mapping[str, Any], source: str, search: Mapping[str, Any]) -> None:
    """Write an architecture file. source: a sentence on where it comes from; search: settings that led to it."""
    check_architecture(codes, str(path))
    content = {"format": FORMAT, "source": source, **codes, "search": dict(search)}
    entries = ",\n".join(f" {json.dumps(key)}: {_by_rows(value)}" for key, value in content.items())
    write_text(path, f"{{\n{entries}\n}}\n")


def _by_rows(value: Any) -> str:
    """Return JSON text, of a matrix with one row per line."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
        return f"[\n{rows}\n ]"
    return json.dumps(value)


def import_architecture(published: str | Path, out: str | Path, *, spatial_dims: int = 3) -> dict[str, Any]:
    """Write the architecture of a file saved by MONAI's search (Auto3DSeg's arch_code.pth) as JSON and return it.

    Such files are pickles of numpy arrays. Nothing but arrays of numbers, numbers, text and plain containers is loaded.
    Raises ConfigError for a file that is missing, holds anything else, or lacks a code.
    """
    content = _load_arrays(published)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{published}: holds a {type(content).__name__}; expected the codes {', '.join(PUBLISHED)}")
    codes: dict[str, Any] = {"spatial_dims": spatial_dims}
    found = {}
    for key, names in PUBLISHED.items():
        name = next((name for name in names if name in content), None)
        if name is None:
            raise ConfigError(f"{published}: lacks {' or '.join(names)}; give a file saved by a search of DiNTS")
        found[key] = _whole_numbers(content[name], f"{published}: {name}")
    codes["num_blocks"], codes["num_depths"] = len(found["arch_code_a"]), len(found["node_a"][0])
    codes |= found
    check_architecture(codes, str(published))
    write_architecture(out, codes, f"imported from {Path(published).name}", {})
    return codes


def _whole_numbers(array: Any, where: str) -> list[list[int]]:
    """Return a matrix as lists of integers; MONAI saves 0 and 1 as floats too."""
    import numpy as np

    matrix = np.asarray(array)
    if matrix.ndim != 2 or not matrix.size or matrix.dtype.kind not in "biuf" or (matrix != np.rint(matrix)).any():
        raise ConfigError(f"{where} is no matrix of whole numbers; give a file saved by a search of DiNTS")
    rows: list[list[int]] = matrix.astype(int).tolist()
    return rows


def _load_arrays(path: str | Path) -> Any:
    """Return the contents of a file of torch.save that holds arrays of numbers, and tensors, in plain containers."""
    import numpy as np
    import torch
    from numpy._core import multiarray

    plain: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]
    # old and new names of the module: a file says that of the numpy which wrote it
    renamed = [
        (function, f"numpy.{core}.multiarray.{function.__name__}")
        for core in ("core", "_core")
        for function in (multiarray._reconstruct, multiarray.scalar)
    ]
    try:
        with torch.serialization.safe_globals([*plain, *renamed]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: does not exist; give a file saved by a search of DiNTS") from None
    except Exception as error:  # whatever a damaged or hostile pickle provokes; loading it otherwise could run code
        # torch goes on with how to load it all the same
        message = re.split(
            r" Please use | Check the doc", " ".join(str(error).split()).rpartition("Unpickler error: ")[2]
        )
        raise ConfigError(
            f"{path}: holds more than arrays of numbers, or is damaged, and is not loaded ({message[0][:160]}); give "
            "a file saved by a search of DiNTS"
        ) from error
