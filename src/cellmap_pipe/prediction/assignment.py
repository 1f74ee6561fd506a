"""Which model predicts what: each class of a volume goes to the grid nearest the voxels that it is asked for on.

Only grids whose models predict the class count. `write_plan` lays it out before anything is predicted: the grid of
each class of each volume, and what each model's part of it takes.
"""

import csv
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellmap_pipe.classes import CLASSES, contains, derivable, get_class, parts_of
from cellmap_pipe.errors import CellmapError, ConfigError
from cellmap_pipe.files import replacing
from cellmap_pipe.geometry import Lattice, nearest_grid
from cellmap_pipe.prediction.plan import OUTPUTS, columns, count_windows, estimate_bytes, make_plans
from cellmap_pipe.prediction.store import chunk_of
from cellmap_pipe.prediction.volumes import (
    NATIVE,
    READ_PLANES,
    EMVolume,
    Volume,
    VoxelSize,
    grid_lattice,
    reach_of,
    test_volumes,
)
from cellmap_pipe.text import aligned

logger = logging.getLogger(__name__)

Served = Mapping[str, Mapping[str, Any]]  # by grid: voxel_nm (z, y, x; nm, or "native") and classes of its models

# No names of models: it says what is asked and by which grid it is answered, whichever models there are
ASSIGNMENT_COLUMNS = (
    "volume",
    "class",
    "target_nm",
    "target_voxels",
    "grid",
    "grid_nm",
    "grid_voxels",
    "ratio",
    "note",
)
MODEL_COLUMNS = ("volume", "model", "classes", "windows", "columns", "memory_gb", "output_gb", "note")


def asked_of(volume: Volume, served: Served) -> dict[str, Lattice]:
    """Return the voxels that each class of a volume is asked for on; all classes that are predicted if it names none.

    volume: see `volumes`; `asked`, which volumes of a table have, gives the lattice by class.
    """
    target = Lattice.from_dict(volume["target"])
    asked = {name: Lattice.from_dict(lattice) for name, lattice in (volume.get("asked") or {}).items()}
    names = volume["classes"]
    if names is None:
        predicted = {name for grid in served.values() for name in grid["classes"]}
        names = [name for name in CLASSES if name in predicted]
    return {name: asked.get(name, target) for name in names}


def voxel_on(voxel_nm: VoxelSize, target: Lattice) -> Sequence[float]:
    """Return the voxel size (z, y, x) in nm of a grid over `target`: its own where the grid is "native"."""
    return target.voxel_nm if isinstance(voxel_nm, str) else voxel_nm


def oversampling(voxel_nm: VoxelSize, target: Lattice) -> float:
    """Return how many voxels of a grid there are to one of `target`."""
    return math.prod(target.voxel_nm) / math.prod(voxel_on(voxel_nm, target))


def grids_of(name: str, target: Lattice, served: Served) -> dict[str, list[str]]:
    """Return by grid the classes that answer for class `name` asked for on `target`; {} if nothing predicts it.

    It is one grid where any grid's models predict the class, or parts that make it up: the nearest of these, with the
    class and all of its parts there. Otherwise each part that is predicted comes from the nearest grid that does so.
    """

    def nearest(grids: Iterable[str]) -> str:
        return nearest_grid({grid: served[grid]["voxel_nm"] for grid in grids}, target.voxel_nm)

    whole = [grid for grid, of in served.items() if name in of["classes"] or derivable(name, of["classes"])]
    if whole:
        grid = nearest(whole)
        return {grid: [part for part in served[grid]["classes"] if part == name or contains(name, part)]}
    result: dict[str, list[str]] = {}
    for part in CLASSES:
        having = [grid for grid, of in served.items() if contains(name, part) and part in of["classes"]]
        if having:
            result.setdefault(nearest(having), []).append(part)
    return result


@dataclass(frozen=True)
class Service:
    """Those of a model's classes that it predicts of a volume, in its order; if there are none, the cause in words.

    elsewhere: what is asked of the volume and another grid answers, but for groups of which all that the model has is
    predicted here as well. What the models of its own grid answer and this one cannot is not listed: that it lacks.
    """

    classes: list[str]
    cause: str
    elsewhere: list[str]


def service(
    volume: Volume, grid: str, classes: Sequence[str], served: Served, max_oversampling: float, allow: bool
) -> Service:
    """Return what a model of `grid` that predicts `classes` predicts of a volume.

    served: the grids of all models in use. A class for which the grid has more than `max_oversampling` times the voxels
    asked for is left out unless this is allowed.
    """
    chosen: set[str] = set()
    others: set[str] = set()
    wanted: dict[str, set[str]] = {}
    factors = []
    for name, target in asked_of(volume, served).items():
        mine = [part for part in classes if part == name or contains(name, part)]
        by_grid = grids_of(name, target, served)
        parts = [part for part in mine if part in by_grid.get(grid, [])]
        if mine and len(parts) < len(mine):
            others |= set(by_grid) - {grid}
        if len(parts) < len(mine) or (by_grid and grid not in by_grid):
            wanted[name] = set(mine)
        if not parts:
            continue
        factor = oversampling(served[grid]["voxel_nm"], target)
        if factor > max_oversampling * (1 + 1e-6) and not allow:
            factors.append(factor)
        else:
            chosen |= set(parts)
    # of a group that another grid answers, each part may still be asked of this one by itself
    elsewhere = [name for name, mine in wanted.items() if not mine or not mine <= chosen]
    if chosen:
        return Service([name for name in classes if name in chosen], "", elsewhere)
    if factors:
        return Service(
            [],
            f"grid {grid} has {max(factors):.3g} times the voxels asked for, more than predict.max_oversampling "
            f"({max_oversampling:g}); add a coarser grid or set predict.allow_oversampling",
            elsewhere,
        )
    if others:
        return Service([], f"served by grid {', '.join(sorted(others))}, the nearest to its voxels", elsewhere)
    return Service([], "this model predicts none of its classes", elsewhere)


def served_by(models: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return `Served` of models {name: {grid, voxel_nm, classes, ...}}."""
    served: dict[str, dict[str, Any]] = {}
    for model in models.values():
        entry = served.setdefault(model["grid"], {"voxel_nm": model["voxel_nm"], "classes": []})
        entry["classes"] += [name for name in model["classes"] if name not in entry["classes"]]
    return served


@dataclass(frozen=True)
class PredictionPlan:
    """What is to be predicted.

    assignments: a row (ASSIGNMENT_COLUMNS) per volume and class. parts: a row (MODEL_COLUMNS) per volume and model.
    refused: in words, which grids would predict which classes of which volumes on far more voxels than are asked for.
    """

    assignments: list[dict[str, Any]]
    parts: list[dict[str, Any]]
    refused: list[str]


def prediction_plan(
    volumes_csv: str | Path,
    *,
    data_root: str | Path,
    em_path: str,
    max_upsample: float,
    classes: Sequence[str],
    derive: Sequence[str],
    models: Mapping[str, Mapping[str, Any]],
) -> PredictionPlan:
    """Return which model predicts which class of the volumes in a table, on how many voxels, and what that takes.

    models: by name {grid, voxel_nm, classes, patch, overlap, blending, batch, memory_gb, tta, planes, output,
    max_oversampling, allow_oversampling}. classes: those that a volume which names none is asked for. derive: groups
    that are formed of their parts; of others that no model predicts the parts are no answer.
    A class that only a grid with too many voxels predicts is refused, unless some other grid would do: then no model of
    that one predicts the class, and it is zeros. A volume whose EM cannot be read has the cause in its rows.
    Raises ConfigError for a fault of the table.
    """
    served = served_by(models)
    assignments, parts = [], []
    refused: dict[tuple[str, str, float], list[str]] = {}
    for volume in test_volumes(volumes_csv, data_root, em_path, NATIVE):
        name = str(volume["name"])
        if volume["classes"] is None:
            volume = {**volume, "classes": list(classes)}
        for label, target in asked_of(volume, served).items():
            rows = _assignments(name, label, target, served, models, derive)
            assignments += rows
            for row in rows:
                limits = [models[model] for model in row["models"] if not models[model]["allow_oversampling"]]
                least = min((of["max_oversampling"] for of in limits), default=math.inf)
                if not row["ratio"] or row["ratio"] <= least * (1 + 1e-6):
                    continue
                if min(oversampling(grid["voxel_nm"], target) for grid in served.values()) > least * (1 + 1e-6):
                    refused.setdefault((name, row["grid"], row["ratio"]), []).append(label)
                else:  # a grid for such voxels is there, without this class
                    row["note"] = f"only grid {row['grid']} predicts it, on {row['ratio']:.3g} times the voxels: zeros"
        em, target = Path(data_root) / volume["em"], Lattice.from_dict(volume["target"])
        for model, of in models.items():
            mine = service(volume, of["grid"], of["classes"], served, of["max_oversampling"], of["allow_oversampling"])
            if mine.classes:
                lattice = grid_lattice(target, of["voxel_nm"])
                parts.append({"volume": name, "model": model} | _part(em, lattice, mine.classes, of, max_upsample))
    described = [
        f"{name} by grid {grid} {ratio:.3g} times ({', '.join(labels)})"
        for (name, grid, ratio), labels in refused.items()
    ]
    return PredictionPlan(assignments, parts, described)


def _assignments(
    volume: str,
    label: str,
    target: Lattice,
    served: Served,
    models: Mapping[str, Mapping[str, Any]],
    derive: Sequence[str],
) -> list[dict[str, Any]]:
    """Return the rows of one class of one volume: one, or one per grid where its parts come from several."""
    row = {
        "volume": volume,
        "class": label,
        "target_nm": target.voxel_nm,
        "target_voxels": target.voxels,
        "grid": "",
        "grid_nm": None,
        "grid_voxels": None,
        "ratio": None,
        "models": [],
        "note": "no model predicts it: zeros",
    }
    by_grid = grids_of(label, target, served)
    if by_grid and label not in derive and not any(label in grid["classes"] for grid in served.values()):
        return [row | {"note": "no model predicts it, and it is not in segment.derive: zeros"}]
    answered = {part for parts in by_grid.values() for part in parts}
    rows = []
    for grid, parts in by_grid.items():
        lattice = grid_lattice(target, served[grid]["voxel_nm"])
        note = "" if label in parts else f"from {', '.join(parts)}"
        if label not in answered and not derivable(label, answered):
            atoms = frozenset().union(*(get_class(part).atoms for part in answered))
            lacking = [
                name for name in parts_of(label, CLASSES) if CLASSES[name].is_atom and not CLASSES[name].atoms <= atoms
            ]
            note += f"; approximate: without {', '.join(lacking)}"
        rows.append(
            {
                **row,
                "grid": grid,
                "grid_nm": lattice.voxel_nm,
                "grid_voxels": lattice.voxels,
                "ratio": oversampling(served[grid]["voxel_nm"], target),
                "models": [
                    name for name, of in models.items() if of["grid"] == grid and set(parts) & set(of["classes"])
                ],
                "note": note,
            }
        )
    return rows or [row]


def _part(
    path: Path, lattice: Lattice, classes: Sequence[str], model: Mapping[str, Any], max_upsample: float
) -> dict[str, Any]:
    """Return what one model's part of a volume takes, or why that cannot be told."""
    row: dict[str, Any] = {
        "classes": len(classes),
        "windows": None,
        "columns": None,
        "memory_gb": None,
        "output_gb": len(classes) * lattice.voxels * OUTPUTS[model["output"]].itemsize / 1e9,
        "note": "",
    }
    try:
        em = EMVolume(path, lattice, max_upsample=max_upsample, reach=reach_of(model["patch"], model["planes"]))
        plans = make_plans(
            lattice.shape,
            model["patch"],
            model["overlap"],
            model["blending"],
            em.context,
            planes=model["planes"],
            voxel_nm=lattice.voxel_nm,
        )
        depth, *grain = chunk_of(lattice.shape)
        needs: dict[str, Any] = {"held": READ_PLANES, "output": model["output"], "symmetries": model["tta"]}
        boxes = columns(plans, len(classes), depth, model["batch"], (grain[0], grain[1]), model["memory_gb"], **needs)
    except CellmapError as error:
        return row | {"note": " ".join(str(error).split())}
    memory = max(estimate_bytes(plans, box, len(classes), depth, model["batch"], **needs) for box in boxes)
    return row | {
        "windows": sum(count_windows(plans, box) for box in boxes) * model["tta"],
        "columns": len(boxes),
        "memory_gb": memory / 1e9,
    }


def write_plan(
    volumes_csv: str | Path, out_csv: str | Path, out_models_csv: str | Path, *, data_root: str | Path, **settings: Any
) -> None:
    """Write the two tables of `prediction_plan`, which takes the same settings, and log them.

    Raises ConfigError, after they are logged, if a volume would be predicted on many more voxels than are asked for.
    """
    plan = prediction_plan(volumes_csv, data_root=data_root, **settings)
    tables = ((plan.assignments, ASSIGNMENT_COLUMNS, out_csv), (plan.parts, MODEL_COLUMNS, out_models_csv))
    texts = [[{key: _text(value) for key, value in row.items()} for row in rows] for rows, _, _ in tables]
    for rows, (_, header, _) in zip(texts, tables, strict=True):
        logger.info("prediction plan:\n%s", aligned(rows, header))
    if plan.refused:
        shown = "; ".join(plan.refused[:8]) + ("; ..." if len(plan.refused) > 8 else "")
        raise ConfigError(
            f"{volumes_csv}: predicted on many more voxels than are asked for (predict.max_oversampling): {shown}; "
            "give these classes to a model on a coarser grid, take their rows off the table, or set "
            "predict.allow_oversampling"
        )
    for rows, (_, header, path) in zip(texts, tables, strict=True):
        with replacing(path) as partial, open(partial, "w", newline="") as stream:
            writer = csv.DictWriter(stream, header, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _text(value: Any) -> str:
    """Return a value as it stands in a table: lengths as 8x8x8, lists with spaces, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "x".join(f"{number:g}" for number in value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
