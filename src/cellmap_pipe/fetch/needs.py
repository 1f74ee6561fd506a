"""What a run needs: the crops and volumes of its tables, and the boxes of which EM levels its grids will read."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cellmap_pipe.classes import get_class
from cellmap_pipe.errors import ConfigError, GeometryError
from cellmap_pipe.geometry import Lattice, Vec3, nearest_grid, shape3, vec3
from cellmap_pipe.prepare.crops import listed_lattice, read_table
from cellmap_pipe.prepare.ngff import Image
from cellmap_pipe.prepare.plan import Box, check_budget, plan_crop, target_lattice

# How far metadata may differ from the table before it is another place: tables round to two decimals.
VOXEL_TOLERANCE = 0.005  # of the voxel size
PLACE_TOLERANCE = 0.1  # of a voxel

VoxelSize = Sequence[float] | str  # (z, y, x) in nm, or "native": the labels' own


@dataclass
class Wanted:
    """A crop or volume to fetch.

    listed: the lattice of every class that the table names, None where it gives no geometry; empty = all classes that
    the source has. is_volume: EM alone is wanted, over the box of the rows; without any geometry the whole EM.
    """

    dataset: str
    crop: str
    is_volume: bool
    listed: dict[str, Lattice | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.crop}"

    @property
    def box(self) -> Lattice | None:
        """The union of the listed lattices: least voxel size and translation, largest shape. None if none is given."""
        lattices = [lattice for lattice in self.listed.values() if lattice]
        if not lattices:
            return None
        return Lattice(
            vec3([min(lattice.voxel_nm[i] for lattice in lattices) for i in range(3)]),
            vec3([min(lattice.translation_nm[i] for lattice in lattices) for i in range(3)]),
            shape3([max(lattice.shape[i] for lattice in lattices) for i in range(3)]),
        )


def read_wanted(
    path: str | os.PathLike[str], *, is_volume: bool, classes: Sequence[str] | None = None, key: str = "data.crops"
) -> list[Wanted]:
    """Return the crops (or volumes) that a table lists, in its order.

    Columns as in the challenge's manifests: `crop_name` and `dataset`, or `crop` as dataset/crop234; class_label,
    voxel_size, translation and shape ([z;y;x], nm and voxels) may be left out. classes: only these (a crop that names
    none of them is left out); None = all.
    Raises ConfigError naming `key`, the file, the line and what is wrong there.
    """
    table, columns = read_table(path, key)
    if table and not {"crop", "crop_name"}.intersection(columns):
        raise ConfigError(
            f"{key} {path}: has columns {', '.join(columns)}; a column crop, or dataset and crop_name, is needed, with "
            "commas between columns"
        )
    wanted: dict[str, Wanted] = {}
    for line, row in enumerate(table, start=2):
        try:
            entry = _wanted(row, is_volume)
            label = (row.get("class_label") or "").strip()
            if label:
                get_class(label)
            lattice = listed_lattice(row)
        except (ConfigError, GeometryError, ValueError) as error:
            raise ConfigError(f"{key} {path}: line {line}: {error}") from None
        entry = wanted.setdefault(entry.name, entry)
        if label or is_volume:
            entry.listed[label] = lattice
    if not wanted:
        raise ConfigError(f"{key} {path}: lists nothing; it needs a column crop, or dataset and crop_name, and rows")
    if classes is None or is_volume:
        return list(wanted.values())
    chosen = []
    for entry in wanted.values():
        named = bool(entry.listed)
        entry.listed = {name: entry.listed[name] for name in classes if name in entry.listed}
        if entry.listed or not named:
            chosen.append(entry)
    return chosen


def disagreements(found: Lattice, listed: Lattice | None) -> list[str]:
    """Return how an array's lattice differs from the one that the table lists, in words; [] if it does not."""
    if listed is None:
        return []
    result = []
    if any(abs(a - b) > VOXEL_TOLERANCE * b for a, b in zip(found.voxel_nm, listed.voxel_nm, strict=True)):
        result.append(f"voxel size {list(found.voxel_nm)} nm at the source, {list(listed.voxel_nm)} in the table")
    places = zip(found.translation_nm, listed.translation_nm, listed.voxel_nm, strict=True)
    if any(abs(a - b) > PLACE_TOLERANCE * voxel for a, b, voxel in places):
        result.append(
            f"translation {list(found.translation_nm)} nm at the source, {list(listed.translation_nm)} in the table"
        )
    if found.shape != listed.shape:
        result.append(f"shape {list(found.shape)} at the source, {list(listed.shape)} in the table")
    return result


def em_boxes(
    image: Image,
    target: Lattice,
    grids: Mapping[str, VoxelSize],
    *,
    is_volume: bool,
    max_upsample: float,
    context_nm: Mapping[str, float],
    train_context_nm: Mapping[str, float],
    max_train_gb: float | None,
) -> tuple[dict[str, Box], list[str]]:
    """Return the voxels of EM levels that are read for `target`, by the level's path, and why a grid needs none.

    image: all levels at the source. target: the labels' lattice, or the volume's. grids: voxel sizes by name; a crop is
    brought to each of them, a volume to the nearest alone. context_nm: EM wanted on every side of the box's edges, by
    grid. max_train_gb: a crop that takes more on a grid, with its train_context_nm of EM round it, is not converted to
    it, so its EM is not fetched for it.
    """
    sizes: dict[str, Vec3] = {
        name: target.voxel_nm if isinstance(size, str) else vec3(size) for name, size in grids.items()
    }
    served = [nearest_grid(sizes, target.voxel_nm)] if is_volume else list(sizes)
    levels = [level.lattice for level in image.levels]
    boxes: dict[str, Box] = {}
    reasons = []
    for grid in served:
        voxel_nm = None if isinstance(grids[grid], str) else sizes[grid]
        try:
            if not is_volume:
                check_budget(target_lattice(target, voxel_nm), train_context_nm[grid], max_train_gb)
            plan = plan_crop(levels, target, voxel_nm, max_upsample=max_upsample, context_nm=context_nm[grid])
        except GeometryError as error:
            reasons.append(f"no EM for grid {grid}: {str(error).replace('on disk', 'at the source')}")
            continue
        path = image.levels[plan.level].path
        lower, upper = boxes.get(path, plan.em_box)
        boxes[path] = (
            shape3([min(pair) for pair in zip(lower, plan.em_box[0], strict=True)]),
            shape3([max(pair) for pair in zip(upper, plan.em_box[1], strict=True)]),
        )
    return boxes, reasons


def _wanted(row: Mapping[str, str | None], is_volume: bool) -> Wanted:
    text = (row.get("crop") or row.get("crop_name") or "").strip()
    dataset, _, crop = text.rpartition("/")
    dataset = dataset or (row.get("dataset") or "").strip()
    crop = f"crop{crop}" if crop.isdigit() else crop
    for part in (dataset, crop):
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", part):
            raise ConfigError(f"'{text}' of dataset '{dataset}' names no crop; give dataset and crop_name, as 234")
    return Wanted(dataset, crop, is_volume)
