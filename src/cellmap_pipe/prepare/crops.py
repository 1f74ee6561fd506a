"""The crops on disk: where they lie, what is annotated in them, and a listing that notices when one is added.

Layout: `{root}/{dataset}/{dataset}.zarr/{labels_path}/crop{N}/{class}/s0`, EM in `{dataset}.zarr/{em_path}`.
"""

import csv
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.errors import ConfigError, DataError, GeometryError
from cellmap_pipe.files import digest, replacing
from cellmap_pipe.geometry import Lattice, shape3, vec3
from cellmap_pipe.prepare.labels import read_label

COLUMNS = "crop dataset em labels annotated listed masks voxel_nm translation_nm shape problem".split()

UNKNOWN = "unknown"  # dataset of a crop that a table lists without one and that is not on disk

# Of a table of crops or volumes: the box of a row, as in the challenge's manifests.
GEOMETRY = ("voxel_size", "translation", "shape")

# Underscores separate dataset and crop in file names, so a crop's name has none.
_CROP = re.compile(r"crop[0-9A-Za-z-]+")


@dataclass(frozen=True)
class CropSource:
    """One crop: its dataset, its name (`crop101`), the folder of its class arrays, and its EM group."""

    dataset: str
    name: str
    path: Path
    em_path: Path

    @property
    def id(self) -> str:
        return f"{self.dataset}/{self.name}"


def find_crops(data: Mapping[str, Any]) -> list[CropSource]:
    """Return the crops under `data.root`, or those that the table `data.crops` lists, by dataset and number.

    data: the config's `data` section: root, labels_path, em_path, and crops (a CSV with a column `crop`, or `dataset`
    and `crop_name` as in the challenge's manifest) or null. A listed crop that is not on disk is returned all the same.
    Raises ConfigError if the root is missing or holds no crop, or if the table cannot be read.
    """
    root = Path(data["root"])
    if not root.is_dir():
        raise ConfigError(
            f"data.root {root} does not exist; set data.root to the folder of {{dataset}}/{{dataset}}.zarr"
        )
    found = {crop.id: crop for crop in _scan(root, data)}
    if not data.get("crops"):
        if not found:
            raise ConfigError(
                f"data.root {root} holds no crop under {{dataset}}/{{dataset}}.zarr/{data['labels_path']}; "
                "set data.root or data.labels_path"
            )
        return _sorted(found.values())
    by_name: dict[str, list[str]] = {}
    for crop in found.values():
        by_name.setdefault(crop.name, []).append(crop.dataset)
    listed = {}
    for dataset, name in listed_crops(data["crops"]):
        for owner in [dataset] if dataset else by_name.get(name, [UNKNOWN]):
            crop = _crop(root, owner, name, data)
            listed[crop.id] = crop
    return _sorted(listed.values())


def data_listing(data: Mapping[str, Any]) -> str:
    """Return a short digest of the names of all crop and class folders (and of the table `data.crops`); never raises.

    It changes when a crop or a class array is added or removed. A missing root is digested like an empty one.
    """
    names: list[str] = []
    try:
        for crop in _scan(Path(data["root"]), data):
            names += [f"{crop.id}/{name}" for name in _folders(crop.path)] or [crop.id]
    except (OSError, KeyError, TypeError):
        names.append("unreadable")
    table = ""
    try:
        if data.get("crops"):
            table = hashlib.sha256(Path(data["crops"]).read_bytes()).hexdigest()
    except (OSError, TypeError, AttributeError):
        table = "unreadable"
    return digest([sorted(names), table])[:16]


def annotated_classes(path: Path) -> list[str]:
    """Return the challenge's classes that have an array in the crop folder `path`, in the order of their ids."""
    present = set(_folders(path))
    return [name for name in CLASSES if name in present]


def write_crops(data: Mapping[str, Any], out_csv: str | Path) -> None:
    """Write one row per crop of `find_crops` to `out_csv`, columns COLUMNS.

    annotated: classes that have an array; listed: those that the table `data.crops` names for the crop, on disk or not;
    masks: annotated ones with a `{class}_mask` beside them. Paths are relative to data.root; voxel size and translation
    in nm, shape in voxels (z;y;x) of the finest label level, or where that cannot be read what the table says, else
    empty. `problem` says what is wrong with a crop; its neighbours are not affected.
    """
    root = Path(data["root"])
    table = listed_crops(data["crops"]) if data.get("crops") else {}
    rows = [
        _row(crop, root, table.get(("", crop.name), {}) | table.get((crop.dataset, crop.name), {}))
        for crop in find_crops(data)
    ]
    with replacing(out_csv) as partial, open(partial, "w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_crops(path: str | Path) -> list[dict[str, str]]:
    """Return the rows of a crops.csv as text by column."""
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def listed_crops(path: str | Path) -> dict[tuple[str, str], dict[str, Lattice | None]]:
    """Return what a table of crops names: the lattice of every class by crop, (dataset or "", crop name).

    Columns: see `find_crops`; class_label, voxel_size, translation and shape ([z;y;x], nm and voxels) may be left out.
    A class without geometry has None; classes that are not the challenge's are left out.
    Raises ConfigError naming the file, and the line where there is one.
    """
    rows, columns = read_table(path, "data.crops")
    column = next((name for name in ("crop", "crop_name") if name in columns), None)
    if column is None:
        raise ConfigError(f"data.crops {path}: has columns {columns}; a column 'crop' or 'crop_name' is needed")
    listed: dict[tuple[str, str], dict[str, Lattice | None]] = {}
    for line, row in enumerate(rows, start=2):
        dataset, _, number = (row[column] or "").strip().rpartition("/")
        name = number if number.startswith("crop") else f"crop{number}"
        if not _CROP.fullmatch(name):
            raise ConfigError(
                f"data.crops {path}: '{row[column]}' is not a crop; write 234, crop234 or dataset/crop234"
            )
        classes = listed.setdefault((dataset or (row.get("dataset") or "").strip(), name), {})
        label = (row.get("class_label") or "").strip()
        if label in CLASSES:
            try:
                classes[label] = listed_lattice(row)
            except (GeometryError, ValueError) as error:
                raise ConfigError(f"data.crops {path}: line {line}: {error}; correct it or leave it empty") from None
    return listed


def read_table(path: str | os.PathLike[str], key: str) -> tuple[list[dict[str, str | None]], Sequence[str]]:
    """Return the rows of a table of crops or volumes, by column, and its columns.

    Raises ConfigError naming `key` and the file.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            return list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{key} {path}: cannot be read ({error}); give a CSV of crops") from error


def listed_lattice(row: Mapping[str, str | None]) -> Lattice | None:
    """Return the geometry of a row of such a table, None if it has none. Raises ValueError or GeometryError."""
    texts = [(row.get(column) or "").strip() for column in GEOMETRY]
    if not any(texts):
        return None
    try:
        voxel, translation, shape = (
            [float(number) for number in re.split(r"[;,\s]+", text.strip("[]()")) if number] for text in texts
        )
    except ValueError:
        raise ValueError(f"geometry {texts} is not understood; vectors are written [z;y;x]") from None
    return Lattice(vec3(voxel), vec3(translation), shape3([int(n) for n in shape]))


def _row(crop: CropSource, root: Path, listed: Mapping[str, Lattice | None]) -> dict[str, str]:
    annotated = annotated_classes(crop.path)
    problem = "" if crop.path.is_dir() else f"{crop.path}: there is no such crop folder"
    lattice = None
    for name in annotated:
        try:
            lattice = read_label(crop.path / name).level.lattice
            break
        except DataError as error:
            problem = problem or str(error)
    if not lattice and crop.dataset != UNKNOWN:  # boxes of unknown datasets have no common frame
        # the first readable class decides on disk, too
        lattice = next((listed[name] for name in CLASSES if listed.get(name)), None)
    if not problem and not crop.em_path.is_dir():
        problem = f"{crop.em_path}: there is no EM group"
    return {
        "crop": crop.id,
        "dataset": crop.dataset,
        "em": os.path.relpath(crop.em_path, root),
        "labels": os.path.relpath(crop.path, root),
        "annotated": ";".join(annotated),
        "listed": ";".join(name for name in CLASSES if name in listed),
        "masks": ";".join(name for name in annotated if (crop.path / f"{name}_mask").is_dir()),
        "voxel_nm": _joined(lattice.voxel_nm) if lattice else "",
        "translation_nm": _joined(lattice.translation_nm) if lattice else "",
        "shape": _joined(lattice.shape) if lattice else "",
        "problem": problem,
    }


def _joined(values: Iterable[float]) -> str:
    return ";".join(f"{value:.10g}" for value in values)


def _scan(root: Path, data: Mapping[str, Any]) -> list[CropSource]:
    return [
        _crop(root, dataset, name, data)
        for dataset in _folders(root)
        for name in _folders(root / dataset / f"{dataset}.zarr" / data["labels_path"])
        if _CROP.fullmatch(name)
    ]


def _crop(root: Path, dataset: str, name: str, data: Mapping[str, Any]) -> CropSource:
    zarr_root = root / dataset / f"{dataset}.zarr"
    return CropSource(dataset, name, zarr_root / data["labels_path"] / name, zarr_root / data["em_path"])


def _folders(path: Path) -> list[str]:
    """Return the names of the folders in `path`, [] if it is none itself."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _sorted(crops: Iterable[CropSource]) -> list[CropSource]:
    """Return the crops by dataset, then by number (crop9 before crop10)."""
    return sorted(crops, key=lambda crop: (crop.dataset, len(crop.name), crop.name))
