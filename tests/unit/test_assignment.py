"""Which grid answers for which class of which volume, and the plan that says so beforehand."""

import csv
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellmap_pipe.classes import contains, get_class
from cellmap_pipe.errors import ConfigError
from cellmap_pipe.geometry import Lattice, Shape3
from cellmap_pipe.prediction.assignment import Service, grids_of, oversampling, served_by, service, write_plan
from cellmap_pipe.prediction.store import chunk_of, shares
from cellmap_pipe.prediction.volumes import grid_lattice

EM = "recon-1/em/fibsem-uint8"
HEADER = "crop_name,dataset,class_label,voxel_size,translation,shape"
Writer = Callable[..., Path]


def cube(voxel: float, size: int = 40) -> Lattice:
    return Lattice((voxel,) * 3, (voxel / 2,) * 3, (size,) * 3)


def volume(voxel: float, grid: float, classes: list[str] | None = None, **more: Any) -> dict[str, Any]:
    target = cube(voxel)
    lattice = grid_lattice(target, (grid,) * 3)
    return {"target": target.to_dict(), "lattice": lattice.to_dict(), "classes": classes, **more}


def grids(**classes: list[str]) -> dict[str, Any]:
    """Return what is served, by grids called g8, g32 ... after their voxels in nm."""
    return {name: {"voxel_nm": [float(name[1:])] * 3, "classes": of} for name, of in classes.items()}


def test_the_nearest_grid_serves_a_volume() -> None:
    both = grids(g8=["pm"], g32=["pm"])
    assert service(volume(4, 8), "g8", ["pm"], both, 8, False).classes == ["pm"]
    refused = service(volume(4, 32), "g32", ["pm"], both, 8, False)
    assert (refused.classes, refused.cause) == ([], "served by grid g8, the nearest to its voxels")
    assert service(volume(16, 8), "g8", ["pm"], both, 8, False).classes == ["pm"]
    native: dict[str, Any] = {"native": {"voxel_nm": "native", "classes": ["pm"]}, **both}
    assert service(volume(4, 4), "native", ["pm"], native, 8, False).classes == ["pm"]


def test_a_grid_too_fine_for_what_is_asked_is_refused_unless_allowed() -> None:
    only = grids(g8=["pm"])
    refused = service(volume(32, 8), "g8", ["pm"], only, 8, False)
    assert not refused.classes and "64 times the voxels" in refused.cause
    assert service(volume(16, 8), "g8", ["pm"], only, 8, False).classes == ["pm"]
    assert service(volume(32, 8), "g8", ["pm"], only, 8, True).classes == ["pm"]


def test_only_grids_whose_models_predict_the_class_count() -> None:
    served = grids(g4=["pm"], g8=["nuc"])
    assert service(volume(4, 8, ["nuc", "pm"]), "g8", ["nuc"], served, 8, False).classes == ["nuc"]
    assert service(volume(4, 4, ["nuc", "pm"]), "g4", ["pm"], served, 8, False).classes == ["pm"]
    assert service(volume(4, 4, ["ecs"]), "g4", ["pm"], served, 8, False).cause == (
        "this model predicts none of its classes"
    )


def test_each_class_goes_by_the_voxels_it_is_asked_for_on() -> None:
    served = grids(g8=["pm", "nuc"], g32=["pm", "nuc"])
    asked = {"pm": cube(8).to_dict(), "nuc": cube(32).to_dict()}
    both = volume(8, 8, ["pm", "nuc"], asked=asked)
    assert service(both, "g8", ["nuc", "pm"], served, 8, False).classes == ["pm"]
    assert service(both, "g32", ["nuc", "pm"], served, 8, False).classes == ["nuc"]


def test_what_is_left_to_another_grid_is_listed() -> None:
    served = grids(g8=["pm", "nuc"], g32=["pm"])
    near = volume(32, 8)
    assert service(near, "g8", ["pm", "nuc"], served, 64, False) == Service(["nuc"], "", ["pm"])
    assert service(near, "g32", ["pm"], served, 64, False) == Service(["pm"], "", ["nuc"])  # as no model of g32 has it
    assert service(near, "g8", ["pm"], served, 64, False).elsewhere == ["pm"]
    # what is refused, or asked of no model, is left to nobody
    assert service(near, "g8", ["pm", "nuc"], grids(g8=["pm", "nuc"]), 8, False).elsewhere == []
    assert service(volume(8, 8, ["pm", "ecs"]), "g8", ["pm", "nuc"], served, 8, False).elsewhere == []


def test_a_group_is_left_to_another_grid_only_with_a_part_of_it() -> None:
    parts = ["mito_mem", "mito_lum", "mito_ribo"]
    asked = volume(32, 8, ["mito", *parts])
    # the other grid answers mito, but each part is asked of this one: it has mito whole all the same
    assert service(asked, "g8", parts, grids(g8=parts, g32=["mito"]), 64, False) == Service(parts, "", [])
    fewer = service(asked, "g8", parts, grids(g8=parts, g32=["mito", "mito_mem"]), 64, False)
    assert fewer == Service(["mito_lum", "mito_ribo"], "", ["mito", "mito_mem"])


def test_a_group_comes_from_one_grid_if_one_makes_it_up() -> None:
    parts = ["mito_mem", "mito_lum", "mito_ribo"]
    assert grids_of("mito", cube(8), grids(g8=["mito_mem"], g32=["pm", *parts])) == {"g32": parts}
    assert grids_of("mito", cube(8), grids(g8=["mito_mem"], g32=["mito"])) == {"g32": ["mito"]}
    assert grids_of("mito", cube(8), grids(g8=["mito_mem"], g32=["mito_lum"])) == {
        "g8": ["mito_mem"],
        "g32": ["mito_lum"],
    }
    assert grids_of("mito", cube(8), grids(g8=["pm"])) == {}


NAMES = ["pm", "mito", "mito_mem", "mito_lum", "mito_ribo", "er", "er_mem", "nuc", "cell", "hchrom"]


@given(
    st.dictionaries(st.sampled_from([2, 4, 8, 16, 32]), st.sets(st.sampled_from(NAMES), min_size=1), min_size=1),
    st.sampled_from(NAMES),
    st.sampled_from([3.0, 4.0, 8.0, 11.0, 40.0]),
)
def test_a_class_is_answered_once_and_from_the_nearest_grid_that_can(
    classes: dict[int, set[str]], name: str, voxel: float
) -> None:
    served = grids(**{f"g{size}": sorted(of) for size, of in classes.items()})
    target = cube(voxel)
    found = grids_of(name, target, served)

    def distance(grid: str) -> float:
        return abs(math.log(oversampling(served[grid]["voxel_nm"], target)))

    def relevant(grid: str) -> set[str]:
        return {part for part in served[grid]["classes"] if part == name or contains(name, part)}

    def whole(grid: str) -> bool:
        atoms = frozenset().union(*(get_class(part).atoms for part in relevant(grid)))
        return name in relevant(grid) or atoms == get_class(name).atoms

    able = [grid for grid in served if whole(grid)]
    if able:
        ((grid, parts),) = found.items()
        assert grid in able and distance(grid) <= min(map(distance, able)) + 1e-6
        assert set(parts) == relevant(grid)
        return
    answered = [part for parts in found.values() for part in parts]
    assert len(answered) == len(set(answered))
    assert set(answered) == set().union(*map(relevant, served))
    for grid, parts in found.items():
        for part in parts:
            having = [other for other in served if part in served[other]["classes"]]
            assert distance(grid) <= min(map(distance, having)) + 1e-6


shapes = st.lists(st.tuples(*[st.integers(1, 400), st.integers(1, 60), st.integers(1, 60)]), min_size=1, max_size=6)


@given(shapes, st.integers(1, 9))
def test_shares_are_contiguous_whole_layers_of_nearly_equal_size(volumes: list[Shape3], shards: int) -> None:
    layers = [
        (number, first, min(first + chunk_of(shape)[0], shape[0]))
        for number, shape in enumerate(volumes)
        for first in range(0, shape[0], chunk_of(shape)[0])
    ]

    def voxels(layer: tuple[int, int, int]) -> int:
        _, height, width = volumes[layer[0]]
        return (layer[2] - layer[1]) * height * width

    mine = [
        [layer for layer in layers for first, last in [spans[layer[0]]] if first <= layer[1] < last]
        for spans in (shares(volumes, shard, shards) for shard in range(shards))
    ]
    assert [layer for share in mine for layer in share] == layers
    fair = sum(map(voxels, layers)) / shards
    assert all(abs(sum(map(voxels, share)) - fair) <= max(map(voxels, layers)) for share in mine)


MODEL = {
    "patch": [16, 16, 16],
    "overlap": 0.5,
    "blending": "gaussian",
    "batch": 1,
    "memory_gb": None,
    "tta": 4,
    "planes": "all",
    "output": "uint8",
    "spatial_dims": 3,
    "max_oversampling": 8,
    "allow_oversampling": False,
}


def model(voxel: float, classes: list[str], **more: Any) -> dict[str, Any]:
    return {**MODEL, "grid": f"g{voxel:g}", "voxel_nm": [voxel] * 3, "classes": classes, **more}


@pytest.fixture
def plan(tmp_path: Path, ngff: Writer) -> Callable[..., list[list[dict[str, str]]]]:
    """Write the plan of a table of volumes, given by rows, for models; return both tables."""
    image = np.zeros((40, 40, 40), np.uint8)
    ngff(tmp_path / "jrc_x/jrc_x.zarr" / EM, image, (8, 8, 8), (4, 4, 4), chunks=(20,) * 3)

    def run(rows: list[str], **models: dict[str, Any]) -> list[list[dict[str, str]]]:
        (tmp_path / "volumes.csv").write_text("\n".join([HEADER, *rows]) + "\n")
        outs = tmp_path / "plan.csv", tmp_path / "models.csv"
        write_plan(
            tmp_path / "volumes.csv",
            *outs,
            data_root=tmp_path,
            em_path=EM,
            max_upsample=4,
            classes=["pm", "mito_mem", "mito_lum", "nuc"],
            derive=["mito"],
            models=models,
        )
        tables = []
        for out in outs:
            with open(out, newline="") as stream:
                tables.append(list(csv.DictReader(stream)))
        return tables

    return run


def test_the_plan_names_grid_model_and_cost(
    plan: Callable[..., list[list[dict[str, str]]]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rows = [
        f"1,jrc_x,{name},[{voxel};{voxel};{voxel}],[4;4;4],[{n};{n};{n}]"
        for name, voxel, n in (("pm", 8, 40), ("nuc", 32, 10), ("mito", 8, 40), ("ecs", 8, 40))
    ]
    fine, coarse = model(8, ["pm", "mito_mem", "mito_lum", "nuc"]), model(32, ["nuc"])
    assigned, parts = plan(rows, a=fine, b=fine, c=coarse)
    by_class = {row["class"]: row for row in assigned}
    pm, nuc = by_class["pm"], by_class["nuc"]
    assert (pm["target_nm"], pm["target_voxels"], pm["grid"], pm["grid_voxels"]) == ("8x8x8", "64000", "g8", "64000")
    assert (pm["ratio"], pm["note"]) == ("1", "")
    assert (nuc["target_nm"], nuc["target_voxels"], nuc["grid"]) == ("32x32x32", "1000", "g32")
    assert by_class["mito"]["note"] == "from mito_mem, mito_lum; approximate: without mito_ribo"
    assert (by_class["ecs"]["grid"], by_class["ecs"]["note"]) == ("", "no model predicts it: zeros")
    cost = {row["model"]: row for row in parts}
    assert (cost["a"]["classes"], cost["a"]["windows"], cost["a"]["columns"]) == ("3", str(4 * 4**3), "1")
    assert (cost["c"]["classes"], cost["c"]["windows"]) == ("1", "4")
    assert float(cost["a"]["output_gb"]) == pytest.approx(3 * 64000 / 1e9)
    assert float(cost["a"]["memory_gb"]) > 0
    header, first = next(text for text in caplog.messages if "target_nm" in text).splitlines()[1:3]
    assert header.index("target_nm") == first.index("8x8x8")


def test_a_group_that_is_not_formed_is_no_answer(plan: Callable[..., list[list[dict[str, str]]]]) -> None:
    assigned, _ = plan(["1,jrc_x,cell,[32;32;32],[16;16;16],[10;10;10]"], a=model(8, ["pm", "nuc"]))
    assert [(row["class"], row["grid"], row["note"]) for row in assigned] == [
        ("cell", "", "no model predicts it, and it is not in segment.derive: zeros")
    ]


def test_too_many_voxels_are_refused_with_volumes_and_factors(
    plan: Callable[..., list[list[dict[str, str]]]], tmp_path: Path
) -> None:
    rows = [f"{crop},jrc_x,pm,[32;32;32],[16;16;16],[10;10;10]" for crop in (1, 2)]
    with pytest.raises(ConfigError) as caught:
        plan(rows, a=model(8, ["pm"]))
    message = str(caught.value)
    assert "jrc_x/crop1 by grid g8 64 times (pm); jrc_x/crop2 by grid g8 64 times (pm)" in message
    assert "predict.allow_oversampling" in message and not (tmp_path / "plan.csv").exists()
    assigned, parts = plan(rows, a=model(8, ["pm"], allow_oversampling=True))
    assert [row["ratio"] for row in assigned] == ["64", "64"] and len(parts) == 2


def test_a_class_that_no_model_of_the_grid_for_such_voxels_predicts_is_zeros_and_named(
    plan: Callable[..., list[list[dict[str, str]]]],
) -> None:
    rows = [f"1,jrc_x,{name},[32;32;32],[16;16;16],[10;10;10]" for name in ("pm", "nuc")]
    assigned, parts = plan(rows, a=model(8, ["pm", "nuc"]), b=model(32, ["nuc"]))
    notes = {row["class"]: (row["grid"], row["note"]) for row in assigned}
    assert notes == {"pm": ("g8", "only grid g8 predicts it, on 64 times the voxels: zeros"), "nuc": ("g32", "")}
    assert [(row["model"], row["classes"]) for row in parts] == [("b", "1")]


def test_em_that_cannot_be_read_is_a_row_with_its_cause(plan: Callable[..., list[list[dict[str, str]]]]) -> None:
    rows = [f"1,{dataset},pm,[8;8;8],[4;4;4],[8;8;8]" for dataset in ("jrc_gone", "jrc_x")]
    assigned, parts = plan(rows, a=model(8, ["pm"]))
    assert [row["grid"] for row in assigned] == ["g8", "g8"]
    assert "there is no such image group" in parts[0]["note"] and parts[0]["windows"] == ""
    assert parts[1]["windows"] == "4"


def test_served_is_the_union_of_the_models_of_a_grid() -> None:
    models = {"a": model(8, ["pm", "nuc"]), "b": model(8, ["nuc", "ecs"]), "c": model(32, ["nuc"])}
    assert served_by(models) == grids(g8=["pm", "nuc", "ecs"], g32=["nuc"])
