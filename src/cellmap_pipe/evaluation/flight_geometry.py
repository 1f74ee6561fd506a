"""The flight check of an array's place: its axes, voxel size, translation and shape against the manifest's."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from cellmap_pipe.errors import DataError
from cellmap_pipe.evaluation.container import TRANSLATION_NAMES, VOXEL_SIZE_NAMES, ChunkedArray
from cellmap_pipe.evaluation.manifest import ManifestRow
from cellmap_pipe.evaluation.problem import Problem
from cellmap_pipe.geometry import TOLERANCE_NM


def check_geometry(array: ChunkedArray, row: ManifestRow) -> list[Problem]:
    """Return how the array's voxels differ from the manifest's."""
    name, target = array.name, row.lattice
    if array.ndim != 3:
        detail = f"{array.ndim} axes, shape {list(array.shape)}; it stops the whole evaluation"
        return [Problem(name, "not three-dimensional", detail, "write (z, y, x)")]
    problems = []
    write = "write it on the manifest's voxels"
    try:
        voxel, translation = array.voxel_size, array.translation
    except DataError as error:
        return [Problem(name, "unreadable attributes", str(error), "write three numbers (z, y, x) in nm")]
    wrong_voxel = voxel is None or len(voxel) != 3 or not np.allclose(voxel, target.voxel_nm)
    if voxel is None:
        detail = f"attribute voxel_size is missing, {list(target.voxel_nm)} nm expected"
        problems.append(Problem(name, "no voxel size", detail, "write it in nm, (z, y, x)"))
    elif wrong_voxel:
        detail = f"{list(voxel)} nm, {list(target.voxel_nm)} nm expected"
        fault = "wrong voxel size"
        if len(voxel) == 3 and all(math.isfinite(v) and v > 0 for v in voxel):
            ratio = np.asarray(voxel) / np.asarray(target.voxel_nm)
            powers = np.log2(ratio)
            if np.allclose(ratio, ratio[0], rtol=1e-3) and np.isclose(powers[0], round(powers[0]), atol=1e-3):
                fault = "wrong resolution level"
            elif np.allclose(voxel[::-1], target.voxel_nm):
                fault = "voxel size in the order (x, y, z)"
        problems.append(Problem(name, fault, detail, write))
    if array.shape != target.shape:
        swapped = array.shape[::-1] == target.shape
        detail = f"{list(array.shape)}, {list(target.shape)} expected"
        problems.append(Problem(name, "shape in the order (x, y, z)" if swapped else "wrong shape", detail, write))
    if translation is None:
        detail = f"attribute translation is missing, {list(target.translation_nm)} nm expected"
        problems.append(Problem(name, "no translation", detail, "write it in nm, (z, y, x): centre of voxel 0"))
    elif len(translation) != 3 or not np.allclose(translation, target.translation_nm, rtol=0, atol=TOLERANCE_NM):
        problems.append(_translation_problem(name, translation, row, write))
    problems += _check_aliases(array)
    stated = array.attributes.get("shape")
    if stated is not None and (not isinstance(stated, list) or stated != list(array.shape)):
        detail = f"{stated}, the array has {list(array.shape)}"
        problems.append(Problem(name, "attribute shape differs", detail, "write the array's own shape", "warning"))
    return problems


def _check_aliases(array: ChunkedArray) -> list[Problem]:
    """Return names of one attribute, as the evaluator knows several, that say different things."""
    problems = []
    for names in (VOXEL_SIZE_NAMES, TRANSLATION_NAMES):
        given = {name: array.attributes[name] for name in names if array.attributes.get(name) is not None}
        if any(first != second for first, second in pairwise(given.values())):
            detail = ", ".join(f"{name} {value}" for name, value in given.items())
            remedy = f"write {names[0]} alone"
            problems.append(Problem(array.name, "attributes that disagree", detail, remedy, "warning"))
    return problems


def _translation_problem(name: str, translation: Sequence[float], row: ManifestRow, remedy: str) -> Problem:
    target = row.lattice
    detail = f"{list(translation)} nm, {list(target.translation_nm)} nm expected"
    fault = "wrong translation"
    if len(translation) == 3 and all(map(math.isfinite, translation)):
        shift = (np.asarray(translation) - np.asarray(target.translation_nm)) / np.asarray(target.voxel_nm)
        if np.allclose(translation[::-1], target.translation_nm, rtol=0, atol=TOLERANCE_NM):
            fault = "translation in the order (x, y, z)"
        elif np.allclose(np.abs(shift[np.abs(shift) > 1e-3]), 0.5, atol=1e-3):
            fault = "translation off by half a voxel"
            detail += " (the centre of voxel 0, not its edge)"
    return Problem(name, fault, detail, remedy)
