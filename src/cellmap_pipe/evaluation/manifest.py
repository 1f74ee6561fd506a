"""The challenge's list of (crop, label) rows with their geometry: `test_crop_manifest.csv` and tables like it."""

import csv
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cellmap_pipe.errors import ConfigError, GeometryError
from cellmap_pipe.geometry import Lattice, shape3, vec3

GEOMETRY = ("voxel_size", "translation", "shape")
COLUMNS = ("crop_name", "class_label", *GEOMETRY)


@dataclass(frozen=True)
class ManifestRow:
    """One array that a submission must hold. crop: `crop557`; label: class name; lattice: its voxels in nm."""

    crop: str
    dataset: str
    label: str
    lattice: Lattice


def read_manifest(
    path: str | os.PathLike[str], all_labels: Sequence[str] = (), boxes: Mapping[str, Lattice] | None = None
) -> list[ManifestRow]:
    """Return the rows of the manifest, sorted by crop and label.

    A row with an empty class_label stands for `all_labels`; one without geometry takes it from `boxes`, by crop, and is
    left out if its crop is not among them. Vectors are written `[z;y;x]`.
    Raises ConfigError naming the file, the line and what is wrong there.
    """
    rows: dict[tuple[str, str], ManifestRow] = {}
    for line, entry in _entries(path):
        crop = _crop(entry)
        if not crop:
            raise ConfigError(f"{path}: line {line}: crop_name is empty")
        try:
            geometry = _geometry(entry)
            if not any(geometry) and boxes is not None:
                if crop not in boxes:
                    continue
                lattice = boxes[crop]
            else:
                lattice = Lattice(
                    vec3(_vector(geometry[0])),
                    vec3(_vector(geometry[1])),
                    shape3([_whole(n) for n in _vector(geometry[2])]),
                )
        except (ValueError, OverflowError, GeometryError) as error:
            raise ConfigError(f"{path}: line {line}: {error}; vectors are written [z;y;x]") from error
        label = entry["class_label"].strip()
        for each in [label] if label else all_labels:
            row = ManifestRow(crop, entry.get("dataset", "").strip(), each, lattice)
            if rows.setdefault((row.crop, each), row) != row:
                raise ConfigError(f"{path}: line {line}: {row.crop}/{each} is listed twice with different geometry")
    return [rows[key] for key in sorted(rows)]


def crop_name(name: str) -> str:
    """Return the crop's name as the challenge writes it: `crop557`, also where `crop` is left out."""
    number = name.removeprefix("crop")
    return f"crop{int(number)}" if number.isascii() and number.isdigit() else name


def crops_without_geometry(path: str | os.PathLike[str]) -> set[str]:
    """Return the crops that a row of the manifest names without geometry. Raises ConfigError as `read_manifest`."""
    return {_crop(entry) for _, entry in _entries(path) if not any(_geometry(entry))}


def _entries(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, str]]]:
    """Return the rows as {column: text}, each with the number of its line; lines without any text are passed over."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            table = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise ConfigError(f"{path}: the manifest cannot be read ({error})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: is no table of text in UTF-8 ({error}); give test_crop_manifest.csv") from error
    header = [name.strip() for name in table[0][1]] if table else []
    if any(name not in header for name in COLUMNS):
        begins = f"it begins with {','.join(header)[:60]!r}" if table else "it is empty"
        wanted = f"its columns must include {', '.join(COLUMNS)}, with commas between them"
        raise ConfigError(f"{path}: is not a manifest of crops; {wanted}; {begins}")
    if len(table) == 1:
        raise ConfigError(f"{path}: the manifest has no rows, its columns alone; give test_crop_manifest.csv")
    empty = dict.fromkeys(header, "")
    return [(line, {**empty, **dict(zip(header, row, strict=False))}) for line, row in table[1:]]


def _crop(entry: Mapping[str, str]) -> str:
    return crop_name(entry["crop_name"].strip())


def _geometry(entry: Mapping[str, str]) -> list[str]:
    return [entry[column].strip() for column in GEOMETRY]


def _whole(number: float) -> int:
    if number != int(number):
        raise ValueError(f"shape {number} is not a whole number of voxels")
    return int(number)


def _vector(text: str) -> list[float]:
    return [float(number) for number in re.split(r"[;,\s]+", text.strip().strip("[]()")) if number]
