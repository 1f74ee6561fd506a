"""Every training crop of the challenge as geometry alone: it gets a plan on a grid, or a stated reason why not.

The EM is made up as the challenge's toolbox leaves it after a download: on its own voxel grid, which labels may be off,
with the levels that are coarser than 0.8 times the labels on all axes, and a margin round the label box.
"""

import csv
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from cellmap_pipe.config import load_config
from cellmap_pipe.errors import BudgetError, GeometryError
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.crops import write_crops
from cellmap_pipe.prepare.plan import check_budget, grown_box, plan_crop, target_lattice
from cellmap_pipe.prepare.splits import crops_with_boxes, group_crops, read_folds, write_folds

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / ".." / "shared" / "data" / "manifests" / "train_crop_manifest.csv"
GRIDS = {"8nm": (8, 8, 8), "32nm": (32, 32, 32), "4nm": (4, 4, 4), "native": None}
DEFAULT_GRIDS = ("8nm", "32nm")
MAX_UPSAMPLE = 4
CONTEXT_NM = 512
FOLDERS = {"schemas": ROOT / "workflow/schemas", "models": ROOT / "config/models"}
LEVELS = 6
PADDING = 128  # EM voxels round the label box
FETCHED = 0.8  # least EM voxel / label voxel, on all axes, of the levels that are downloaded

pytestmark = pytest.mark.skipif(not MANIFEST.is_file(), reason=f"{MANIFEST} is not there")


def numbers(text):
    return [Fraction(part) for part in text.strip("[]").split(";")]


@pytest.fixture(scope="module")
def crops():
    """Voxel size, translation and shape of each crop, as exact fractions of nm."""
    found = {}
    with MANIFEST.open(newline="") as stream:
        for row in csv.DictReader(stream):
            geometry = tuple(tuple(numbers(row[key])) for key in ("voxel_size", "translation", "shape"))
            assert found.setdefault((row["dataset"], row["crop_name"]), geometry) == geometry
    return found


def lattice(voxel, translation, shape):
    return Lattice([float(v) for v in voxel], [float(t) for t in translation], [int(n) for n in shape])


def fetched_pyramid(voxel, translation, shape, ratio):
    """Return (voxel, translation, shape) of the EM's levels, exact: s0 has `ratio` times the labels' voxel."""
    fine, offset, size = [], [], []
    for v, t, n in zip(voxel, translation, shape, strict=True):
        s = v * ratio
        lower = math.floor((t - v / 2) / s + Fraction(1, 2)) - PADDING  # edges of the EM lie at (k - 1/2) s
        upper = math.ceil((t - v / 2 + n * v) / s + Fraction(1, 2)) + PADDING
        fine.append(s)
        offset.append(lower * s)
        size.append(upper - lower)
    levels = []
    for k in range(LEVELS):
        coarse = [s * 2**k for s in fine]
        if all(s / v > Fraction(str(FETCHED)) for s, v in zip(coarse, voxel, strict=True)):
            start = [t + (c - s) / 2 for t, c, s in zip(offset, coarse, fine, strict=True)]
            levels.append((coarse, start, [n // 2**k for n in size]))
    return levels


def drawn_on(em, stored, target_voxel, axis):
    """Return first and last-plus-one EM voxel under the planned voxels, by exact arithmetic from nanometres."""
    voxel, start = em[0][axis], em[1][axis]
    size, count = target_voxel, stored.shape[axis]
    lower = Fraction(stored.lower_nm[axis]).limit_denominator(10**5)
    if size / voxel < Fraction(999, 1000):  # linear between the centres
        first = (lower + size / 2 - start) / voxel
        last = first + (count - 1) * size / voxel
        return max(0, math.floor(first)), min(em[2][axis], math.ceil(last) + 1)  # edge voxels are repeated
    first = (lower - start) / voxel + Fraction(1, 2)
    return math.floor(first), math.ceil(first + count * size / voxel)


def replay(crops, ratio):
    """Return plan or reason by crop and grid, after checking each plan against its nanometres."""
    outcomes = {}
    for crop, geometry in crops.items():
        label = lattice(*geometry)
        pyramid = fetched_pyramid(*geometry, ratio)
        levels = [lattice(*level) for level in pyramid]
        for grid, voxel in GRIDS.items():
            try:
                plan = plan_crop(levels, label, voxel, max_upsample=MAX_UPSAMPLE, context_nm=CONTEXT_NM)
            except GeometryError as error:
                outcomes[crop, grid] = str(error)
                continue
            outcomes[crop, grid] = plan
            check(plan, voxel or geometry[0], geometry, pyramid)
    return outcomes


def check(plan, voxel, geometry, pyramid):
    level = pyramid[plan.level]
    exact = [Fraction(v) for v in voxel]
    assert plan.em_inside == pytest.approx(1)
    for axis in range(3):
        assert plan.target.lower_nm[axis] == pytest.approx(plan.label.lower_nm[axis], abs=1e-6)
        rest = plan.target.upper_nm[axis] - plan.label.upper_nm[axis]
        assert abs(rest) <= exact[axis] / 2 + Fraction(1, 1000)
        assert plan.em_factors[axis] == pytest.approx(float(exact[axis] / level[0][axis]))
        assert plan.label_factors[axis] == pytest.approx(float(exact[axis] / geometry[0][axis]))
        assert min(plan.em_factors[axis], plan.label_factors[axis]) >= 1 / MAX_UPSAMPLE - 1e-6
        assert (plan.em_box[0][axis], plan.em_box[1][axis]) == drawn_on(level, plan.stored, exact[axis], axis)
        assert 0 <= plan.em_box[0][axis] < plan.em_box[1][axis] <= level[2][axis]
        # a point painted in the world has the index that exact arithmetic gives it, on every lattice
        point = geometry[1][axis] + geometry[2][axis] // 3 * geometry[0][axis]
        lower = geometry[1][axis] - geometry[0][axis] / 2
        for voxels, centre, size in (
            (plan.em, level[1][axis], level[0][axis]),
            (plan.label, geometry[1][axis], geometry[0][axis]),
            (plan.target, lower + exact[axis] / 2, exact[axis]),
        ):
            index = voxels.index_of([float(point)] * 3)[axis]
            assert index == pytest.approx(float((point - centre) / size), abs=1e-6)
            assert voxels.world_of([index] * 3)[axis] == pytest.approx(float(point))
    assert plan.image_bytes == math.prod(plan.stored.shape) >= plan.target.voxels
    coarser = [size for size, _, _ in pyramid[plan.level + 1 :]]  # none of them would have done
    assert not any(all(s <= t for s, t in zip(size, exact, strict=True)) for size in coarser)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (1, {"8nm": 287, "32nm": 289, "4nm": 251, "native": 289}),
        (2, {"8nm": 251, "32nm": 289, "4nm": 245, "native": 289}),
        (Fraction(1, 4), {"8nm": 287, "32nm": 289, "4nm": 251, "native": 289}),
    ],
    ids=["EM as fine as the labels", "EM twice as coarse", "EM four times as fine"],
)
def test_every_crop_gets_a_plan_or_a_reason(crops, ratio, expected):
    assert len(crops) == 289
    outcomes = replay(crops, ratio)
    planned = Counter(grid for (_, grid), outcome in outcomes.items() if not isinstance(outcome, str))
    reasons = Counter(
        (grid, " ".join(outcome.split()[:4])) for (_, grid), outcome in outcomes.items() if isinstance(outcome, str)
    )
    on_default = sum(any(not isinstance(outcomes[crop, grid], str) for grid in DEFAULT_GRIDS) for crop in crops)
    print(f"EM voxel {ratio} x label voxel: {dict(planned)} of 289, {on_default} on a default grid; {dict(reasons)}")
    for grid in GRIDS:
        plans = [o for (_, g), o in outcomes.items() if g == grid and not isinstance(o, str)]
        stored = sum(plan.image_bytes + plan.label_bytes for plan in plans)
        read = sum(plan.em_bytes_read + plan.label_bytes_read for plan in plans)
        print(f"  {grid}: {stored / 1e9:.1f} GB stored with context, {read / 1e9:.1f} GB read for one class")
    assert on_default >= 285
    assert dict(planned) == expected


def test_the_default_budget_leaves_every_crop_a_grid(crops):
    config = load_config(yaml.safe_load((ROOT / "config/config.yaml").read_text()), **FOLDERS)
    budget = config.quality["max_train_gb"]
    kept = Counter()
    stored = Counter()
    for crop, geometry in crops.items():
        fits = 0
        for grid in DEFAULT_GRIDS:
            target = target_lattice(lattice(*geometry), GRIDS[grid])
            try:
                check_budget(target, config.context_nm(grid), budget)
            except BudgetError:
                continue
            fits += 1
            kept[grid] += 1
            stored[grid] += 2 * grown_box(target, None, config.context_nm(grid))[0].voxels
        assert fits, crop
    print(f"{budget} GB per crop: {dict(kept)} of 289, { ({grid: f'{n / 1e9:.0f} GB' for grid, n in stored.items()}) }")
    assert max(stored.values()) < 60e9  # a training's job asks for 96 GB


def test_crops_that_are_only_listed_are_divided_as_if_on_disk_and_keep_their_folds_when_the_list_changes(tmp_path):
    (tmp_path / "data").mkdir()
    data = {"root": str(tmp_path / "data"), "labels_path": "gt", "em_path": "em"}

    def divided(crops_csv, **keep):
        write_crops({**data, "crops": str(crops_csv)}, tmp_path / "crops.csv")
        write_folds(tmp_path / "crops.csv", tmp_path / "folds.csv", n=5, seed=0, group="crop", margin_nm=1000, **keep)
        return read_folds(tmp_path / "folds.csv")

    whole = divided(MANIFEST)
    listed = crops_with_boxes(tmp_path / "crops.csv")
    assert len(whole) == 289 and all(crop.box and crop.listed for crop in listed)
    neighbours = group_crops(listed, "crop", 1000)
    assert len(set(neighbours.values())) < 289
    assert all(whole[crop] == whole[first] for crop, first in neighbours.items())
    lines = MANIFEST.read_text().splitlines(keepends=True)
    shorter = tmp_path / "shorter.csv"
    shorter.write_text("".join(line for line in lines if not line.startswith("234,")))
    assert len(divided(shorter)) == 288
    (tmp_path / "folds.csv").rename(tmp_path / "kept.csv")
    kept = read_folds(tmp_path / "kept.csv")
    again = divided(MANIFEST, keep=tmp_path / "kept.csv")
    assert len(again) == 289 and kept.items() <= again.items()
