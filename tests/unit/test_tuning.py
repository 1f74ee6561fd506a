"""What tuning chooses, on which crops, and that no crop is processed by what it taught."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cellmap_pipe.errors import ContractError
from cellmap_pipe.evaluation import aggregate, score_instance, score_semantic
from cellmap_pipe.files import read_json, write_json
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prediction import tuning
from cellmap_pipe.prediction.instances import find_objects
from cellmap_pipe.prediction.processing import Processing, configured, read_tuned
from cellmap_pipe.prediction.store import create_probabilities
from cellmap_pipe.prediction.tuning import LEVELS, counts_above, deal, level_histograms, measure_filters, pooled_score
from cellmap_pipe.prediction.tuning import tune as run_tune

LATTICE = Lattice((8, 8, 8), (104, 204, 304), (12, 14, 16))
SETTINGS: dict[str, Any] = {
    "threshold": 0.5,
    "thresholds": {},
    "hole_nm3": {},
    "split_nm": {},
    "min_size_nm3": {},
    "derive": [],
    "repair": False,
    "revision": 0,
}
Arrays = dict[str, np.ndarray]


class Case:
    """Validation crops: their truth as OME-NGFF, their probabilities (255 p, uint8), and what lists both."""

    def __init__(self, folder: Path, write: Callable[..., Path]) -> None:
        self.folder, self.write = folder, write
        self.rows: list[dict[str, str]] = []
        self.records: list[dict[str, Any]] = []

    def add(self, truth: Arrays, probabilities: Arrays) -> None:
        number = len(self.rows)
        labels = f"jrc_x/jrc_x.zarr/crop{number}"
        for name, values in truth.items():
            self.write(self.folder / "data" / labels / name, values, LATTICE.voxel_nm, LATTICE.translation_nm)
        create_probabilities(
            self.folder / f"volumes/{number}.zarr", f"jrc_x/crop{number}", LATTICE, list(probabilities), {}
        )[:] = np.stack(list(probabilities.values()))
        self.rows.append({"crop": f"jrc_x/crop{number}", "labels": labels, "annotated": ";".join(truth)})
        record = {"name": f"jrc_x/crop{number}", "dataset": "jrc_x", "path": f"volumes/{number}.zarr", "status": "ok"}
        place = {"lattice": LATTICE.to_dict(), "target": LATTICE.to_dict(), "cause": "", "fingerprint": str(number)}
        self.records.append({**record, **place, "classes": list(probabilities)})

    def tune(self, *, settings: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        write_json(self.folder / "p.json", {"model": "m", "fold": "0", "subset": "v", "records": self.records})
        with open(self.folder / "crops.csv", "w", newline="") as stream:
            table = csv.DictWriter(stream, list(self.rows[0]))
            table.writeheader()
            table.writerows(self.rows)
        arguments: dict[str, Any] = {"classes": self.records[0]["classes"], "rules": "csc-2026.06"}
        run_tune(
            [self.folder / "p.json"],
            self.folder / "crops.csv",
            self.folder / "tuned.json",
            data_root=self.folder / "data",
            settings={**SETTINGS, **(settings or {})},
            labels={"empty": "absent"},
            **{**arguments, **more},
        )
        return dict(read_json(self.folder / "tuned.json"))


@pytest.fixture
def case(tmp_path: Path, ngff: Callable[..., Path]) -> Case:
    return Case(tmp_path, ngff)


def faint(seed: int, level: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Truth, and probabilities that are right about it above `level`, with some noise."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(LATTICE.shape, np.uint8)
    truth[2:9, 3:11, 2:13] = 1
    p = np.where(truth > 0, rng.integers(level - 10, 200, LATTICE.shape), rng.integers(0, level + 10, LATTICE.shape))
    return truth, p.astype(np.uint8)


def sharp(mask: np.ndarray) -> np.ndarray:
    return np.where(mask, 255, 0).astype(np.uint8)


@limits(max_examples=50, deadline=None)
@given(
    arrays.arrays(
        np.float32, (3, 4, 5), elements=st.floats(0, 255, width=32) | st.integers(0, 510).map(lambda n: n / 2)
    ),
    arrays.arrays(bool, (3, 4, 5)),
    arrays.arrays(bool, (3, 4, 5)),
)
def test_one_pass_counts_as_every_threshold_would(values: np.ndarray, truth: np.ndarray, known: np.ndarray) -> None:
    truth &= known
    counts = counts_above(level_histograms(values, truth, known))
    for k, threshold in enumerate(LEVELS):
        expected = score_semantic(values > 255 * float(threshold), truth, known)
        assert counts[k].tolist() == [expected["tp"], expected["fp"], expected["fn"], 0, 0]


@limits(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3, st.floats(0, 3), st.integers(0, 3)), min_size=1), st.booleans())
def test_pooled_scores_are_the_challenges(rows: list[tuple[float, ...]], instance: bool) -> None:
    keys = ("tp", "fp", "fn", "hausdorff_norm_sum", "n_hausdorff")[: 5 if instance else 3]
    records = [{"label": "x", "status": "scored", **dict(zip(keys, row, strict=False))} for row in rows]
    expected = aggregate(records)["label_scores"]["x"]["combined_score" if instance else "iou"]
    assert pooled_score(np.sum(rows, axis=0), instance) == pytest.approx(expected)


def test_filters_are_measured_as_the_segmentation_would_be() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, LATTICE.shape).astype(np.float32)
    truth, known = rng.random(LATTICE.shape) > 0.5, rng.random(LATTICE.shape) > 0.2
    settings = [
        Processing(threshold, hole * 512, 0.0, size * 512)
        for threshold in (0.2, 0.5, 0.8)
        for hole in (0, 3, 1000)
        for size in (0, 2, 30)
    ]
    for how, counts in zip(settings, measure_filters(values, truth, known, LATTICE, settings), strict=True):
        mask = values > 255 * how.threshold
        objects = find_objects(lambda first, last, mask=mask: mask[first:last], LATTICE, how, instance=False)
        expected = score_semantic(objects.mask(0, 12), truth & known, known)
        assert counts.tolist() == [expected["tp"], expected["fp"], expected["fn"], 0, 0]


def test_rare_classes_are_dealt_to_different_groups() -> None:
    classes = {f"crop{i}": {"er"} | ({"golgi"} if i in (3, 7) else set()) for i in range(11)}
    groups = deal(classes, {crop: 100 + int(crop[4:]) for crop in classes}, 5)
    assert groups == deal(dict(reversed(classes.items())), {crop: 100 + int(crop[4:]) for crop in classes}, 5)
    assert set(groups.values()) == set(range(5)) and groups["crop3"] != groups["crop7"]
    assert max(list(groups.values()).count(i) for i in range(5)) <= 3
    assert set(deal({"a": {"er"}, "b": {"er"}}, {"a": 1, "b": 1}, 5).values()) == {0, 1}


DEALS = """
import random
from cellmap_pipe.prediction.tuning import deal
for seed in range(300):
    draw = random.Random(seed)
    names = "ecs er golgi lyso mito nuc pm ves".split()
    classes = {f"crop{i:02}": set(draw.sample(names, draw.randint(2, 6))) for i in range(14)}
    print(deal(classes, dict.fromkeys(classes, 1000), 5))
"""


def test_crops_are_dealt_alike_by_every_process() -> None:
    # equal loads are told apart by sums, which round by the order of their terms; that of a set is the process' own
    found = {
        subprocess.run(
            [sys.executable, "-c", DEALS], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in "012"
    }
    assert len(found) == 1


def test_crops_that_the_folds_keep_together_are_not_parted(case: Case) -> None:
    for seed in range(6):
        truth, p = faint(seed)
        case.add({"er_mem": truth}, {"er_mem": p})
    with open(case.folder / "folds.csv", "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["crop", "group", "fold", "grouped_by"])
        table.writerows([f"jrc_x/crop{i}", f"jrc_x/crop{i // 4}", 0, "crop"] for i in range(7))
    groups = case.tune(folds_csv=case.folder / "folds.csv")["groups"]
    assert [groups[f"jrc_x/crop{i}"] for i in range(6)] == [0, 0, 0, 0, 1, 1]
    together = dict.fromkeys(groups, "one cell")
    assert set(deal({crop: {"er_mem"} for crop in groups}, dict.fromkeys(groups, 1), 5, together).values()) == {0}


def test_a_better_threshold_is_found_and_kept(case: Case) -> None:
    for seed in range(6):
        truth, p = faint(seed)
        case.add({"er_mem": truth, "pm": truth}, {"er_mem": p, "pm": sharp(truth > 0)})
    result = case.tune()
    er, pm = result["report"]["er_mem"], result["report"]["pm"]
    assert er["kept"] and er["n_crops"] == 6 and er["kind"] == "semantic"
    assert 50 < 255 * er["overall"]["threshold"] < 80
    assert er["score_tuned"] > er["score_default"] + 0.2
    pooled = [score_semantic(faint(seed)[1] > 127, faint(seed)[0]) | {"label": "er_mem"} for seed in range(6)]
    assert er["score_default"] == pytest.approx(aggregate(pooled)["label_scores"]["er_mem"]["iou"])
    assert not pm["kept"] and pm["score_default"] == pm["score_tuned"] == 1
    tuned = read_tuned(case.folder / "tuned.json")
    assert set(tuned.overall.processing) == {"er_mem"} and len(tuned.by_group) == 5
    assert tuned.overall.processing["er_mem"].to_dict() == er["overall"]
    assert all(set(choice.processing) == {"er_mem"} for choice in tuned.by_group)
    assert set(tuned.groups) == {f"jrc_x/crop{i}" for i in range(6)}


@pytest.mark.parametrize("group", range(3))
def test_what_a_crop_says_has_no_effect_on_how_it_is_processed(case: Case, group: int) -> None:
    rng = np.random.default_rng(1)
    for seed in range(6):
        truth, p = faint(seed, level=40 + 20 * seed)
        ids = truth.astype(np.uint16)
        ids[10:, :3, :3] = 2
        case.add({"er_mem": truth, "nuc": ids}, {"er_mem": p, "nuc": np.maximum(p, sharp(ids == 2))})
    settings = {"repair": "auto", "min_size_nm3": {"nuc": 512.0}}
    before = case.tune(settings=settings, groups_wanted=3)
    for number, row in enumerate(case.rows):
        if before["groups"][row["crop"]] == group:
            for name in ("er_mem", "nuc"):
                noise = rng.integers(0, 2, LATTICE.shape).astype(np.uint8)
                zarr.open_array(str(case.folder / "data" / row["labels"] / name / "s0"), mode="r+")[:] = noise
            zarr.open_array(str(case.folder / f"volumes/{number}.zarr/s0"), mode="r+")[:] = rng.integers(0, 256)
    after = case.tune(settings=settings, groups_wanted=3)
    assert after["groups"] == before["groups"]
    assert after["by_group"][group] == before["by_group"][group]
    assert after["report"] != before["report"]


def test_what_raises_the_score_only_of_the_crops_it_was_chosen_on_is_not_kept(case: Case) -> None:
    for seed in range(2):
        truth, p = faint(seed)
        case.add({"er_mem": truth}, {"er_mem": p})
        case.add({"er_mem": truth}, {"er_mem": np.where(truth, 255, 100).astype(np.uint8)})
    result = case.tune()["report"]["er_mem"]
    assert not result["kept"] and result["overall"] == Processing().to_dict()
    assert result["score_tuned"] <= result["score_default"]


def test_two_groups_decide_nothing(case: Case) -> None:
    for seed in range(2):
        truth, p = faint(seed)
        case.add({"er_mem": truth}, {"er_mem": p})
    result = case.tune()
    assert result["overall"]["processing"] == {} and not result["report"]["er_mem"]["kept"]
    assert result["report"]["er_mem"]["cause"] == "annotated in 2 of the groups, fewer than 3"


def test_objects_of_large_crops_are_looked_for_in_their_middle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MIDDLE", 8)
    inside = tuple(slice((n - min(n, 8)) // 2, (n + min(n, 8)) // 2) for n in LATTICE.shape)
    expected = []
    for seed in range(3):
        truth, p = faint(seed)
        case.add({"nuc": truth.astype(np.uint16)}, {"nuc": p})
        record = score_instance((p[inside] > 127).astype(np.uint8), truth[inside], LATTICE.voxel_nm)
        expected.append(record | {"label": "nuc"})
    score = case.tune()["report"]["nuc"]["score_default"]
    assert score == pytest.approx(aggregate(expected)["label_scores"]["nuc"]["combined_score"])


def test_a_configured_threshold_stays(case: Case) -> None:
    for seed in range(4):
        truth, p = faint(seed)
        case.add({"er_mem": truth}, {"er_mem": p})
    result = case.tune(settings={"thresholds": {"er_mem": 0.45}})
    assert result["report"]["er_mem"]["overall"]["threshold"] == 0.45


def test_few_objects_decide_nothing(case: Case) -> None:
    for seed in range(4):
        ids = np.zeros(LATTICE.shape, np.uint16)
        ids[2:6, 2:6, 2:6] = 1
        case.add({"nuc": ids}, {"nuc": sharp((ids > 0) | (np.random.default_rng(seed).random(ids.shape) > 0.97))})
    nuc = case.tune()["report"]["nuc"]
    assert not nuc["kept"] and nuc["score_tuned"] == nuc["score_default"]
    assert nuc["cause"] == "4 objects, fewer than 8"


def test_small_debris_of_instances_is_filtered_away(case: Case) -> None:
    rng = np.random.default_rng(0)
    expected = []
    for _ in range(4):
        ids = np.zeros(LATTICE.shape, np.uint16)
        ids[2:6, 2:6, 2:6], ids[2:6, 8:12, 8:14] = 1, 2
        p = sharp((ids > 0) | (rng.random(ids.shape) > 0.97))
        case.add({"nuc": ids}, {"nuc": p})
        expected.append(score_instance((p > 127).astype(np.uint8), ids, LATTICE.voxel_nm) | {"label": "nuc"})
    result = case.tune()
    nuc = result["report"]["nuc"]
    assert nuc["score_default"] == pytest.approx(aggregate(expected)["label_scores"]["nuc"]["combined_score"])
    assert nuc["kind"] == "instance" and nuc["kept"] and nuc["score_tuned"] > nuc["score_default"]
    assert nuc["overall"]["min_size_nm3"] > 512


def test_one_bad_crop_is_named_and_the_others_count(case: Case) -> None:
    for seed in range(5):
        truth, p = faint(seed)
        case.add({"er_mem": truth}, {"er_mem": p})
    chunk = next((case.folder / "data" / case.rows[2]["labels"] / "er_mem/s0").rglob("[0-9]*/[0-9]*/[0-9]*"))
    chunk.write_bytes(b"damaged")
    case.records.append({**case.records[0], "name": "jrc_x/crop9", "status": "failed", "cause": "no EM", "path": None})
    result = case.tune()
    (line,) = result["failed"]
    assert line.startswith("jrc_x/crop2/er_mem: ") and "\n" not in line
    assert result["report"]["er_mem"]["n_crops"] == 4 and result["report"]["er_mem"]["kept"]


def test_one_crop_teaches_nothing(case: Case) -> None:
    truth, p = faint(0)
    case.add({"er_mem": truth}, {"er_mem": p})
    result = case.tune(settings={"repair": "auto"})
    assert result["overall"] == {"processing": {}, "repair": False} and len(result["by_group"]) == 1
    assert "in 1 of the groups" in result["report"]["er_mem"]["cause"]
    assert result["report"]["er_mem"]["score_default"] == result["report"]["er_mem"]["score_tuned"] < 1


def test_a_class_that_no_crop_has_is_left_as_configured(case: Case) -> None:
    rng = np.random.default_rng(0)
    for _ in range(4):
        nothing = np.zeros(LATTICE.shape, np.uint8)
        p = rng.integers(0, 180, LATTICE.shape).astype(np.uint8)
        case.add({"er_mem": nothing, "nuc": nothing}, {"er_mem": p, "nuc": p})
    result = case.tune()
    for name in ("er_mem", "nuc"):
        entry = result["report"][name]
        assert entry["cause"] == "absent from all 4 crops" and not entry["kept"]
        assert entry["score_default"] == entry["score_tuned"] == 0
    assert not any(choice["processing"] for choice in [result["overall"], *result["by_group"]])


def test_crops_without_a_class_do_not_decide_how_the_one_that_has_it_is_processed(case: Case) -> None:
    rng = np.random.default_rng(0)
    for seed in range(4):
        truth, _ = faint(seed)
        p = rng.integers(0, 60 if seed == 2 else 200, LATTICE.shape)
        case.add({"er_mem": truth * (seed == 2)}, {"er_mem": np.where(truth, 150, p).astype(np.uint8)})
    result = case.tune()
    assert result["by_group"][result["groups"]["jrc_x/crop2"]]["processing"] == {}
    entry = result["report"]["er_mem"]
    assert entry["cause"] == "" and entry["score_tuned"] >= entry["score_default"] > 0


def test_a_derived_group_has_a_threshold_of_its_own(case: Case) -> None:
    for seed in range(4):
        truth, p = faint(seed)
        lumen = truth.copy()
        lumen[:, :, 7:] = 0
        membrane = truth - lumen
        parts = {"golgi_mem": np.where(membrane, p, p // 2), "golgi_lum": np.where(lumen, p, p // 2)}
        case.add({"golgi": truth, "golgi_mem": membrane}, parts)
    result = case.tune(settings={"derive": ["golgi"]})
    assert result["report"]["golgi"]["kept"] and result["report"]["golgi"]["overall"]["threshold"] < 0.3
    mixed = case.tune(settings={"derive": ["golgi"], "thresholds": {"golgi_mem": 0.3}})
    assert "golgi" not in mixed["report"]
    for record in case.records:  # of a model that was to leave a part of it to another grid
        record["elsewhere"] = ["golgi_lum"]
    assert "golgi" not in case.tune(settings={"derive": ["golgi"]})["report"]


def test_a_group_that_is_good_already_does_not_follow_its_parts(case: Case) -> None:
    for seed in range(4):
        truth, p = faint(seed)
        parts = {"golgi_mem": p, "golgi_lum": sharp(truth > 0)}
        case.add({"golgi": truth, "golgi_mem": truth}, parts)
    choice = case.tune(settings={"derive": ["golgi"]})["overall"]["processing"]
    assert choice["golgi_mem"]["threshold"] < 0.3
    assert choice["golgi"] == configured("golgi", SETTINGS).to_dict()


def test_the_repair_is_kept_where_it_raises_the_score(case: Case) -> None:
    for seed in range(4):
        truth, _ = faint(seed)
        case.add(
            {"er_mem": truth, "mito_mem": 1 - truth},
            {
                "er_mem": np.where(truth, 240, 160).astype(np.uint8),
                "mito_mem": np.where(truth, 160, 240).astype(np.uint8),
            },
        )
    settings = {"thresholds": {"er_mem": 0.5, "mito_mem": 0.5}}
    result = case.tune(settings={**settings, "repair": "auto"})
    assert result["repair"]["kept"] and result["repair"]["score_tuned"] == 1 > result["repair"]["score_default"]
    assert result["overall"]["repair"] and all(choice["repair"] for choice in result["by_group"])
    for wanted in (True, False):
        result = case.tune(settings={**settings, "repair": wanted})
        assert result["overall"]["repair"] is wanted and result["by_group"][0]["repair"] is wanted


def test_the_repair_of_a_crop_is_decided_by_the_others(case: Case) -> None:
    truth, _ = faint(0)
    corner = np.zeros_like(truth)
    corner[2:5, 3:7, 2:7] = 1
    for gains in (True, False, False):
        if gains:
            er, mito = np.where(truth, 240, 160), np.where(truth, 160, 240)
        else:
            er, mito = np.where(truth, 200, 0), np.where(corner, 210, 0)
        wanted = {"er_mem": truth, "mito_mem": 1 - truth if gains else np.zeros_like(truth)}
        case.add(wanted, {"er_mem": er.astype(np.uint8), "mito_mem": mito.astype(np.uint8)})
    result = case.tune(settings={"thresholds": {"er_mem": 0.5, "mito_mem": 0.5}, "repair": "auto"})
    repaired = {crop: result["by_group"][group]["repair"] for crop, group in result["groups"].items()}
    assert repaired == {"jrc_x/crop0": False, "jrc_x/crop1": True, "jrc_x/crop2": True}
    assert result["overall"]["repair"]


def test_the_repair_is_judged_at_the_thresholds_of_each_crop(case: Case) -> None:
    crops = [faint(seed, level=40 + 20 * seed) for seed in range(4)]
    for truth, p in crops:
        case.add({"er_mem": truth}, {"er_mem": p})
    result = case.tune(settings={"repair": "auto"})
    records = []
    for number, (truth, p) in enumerate(crops):
        choice = result["by_group"][result["groups"][f"jrc_x/crop{number}"]]
        mask = p > 255 * choice["processing"]["er_mem"]["threshold"]
        records.append({"label": "er_mem", **score_semantic(mask, truth)})
    assert result["repair"]["score_default"] == pytest.approx(aggregate(records)["label_scores"]["er_mem"]["iou"])
    assert len({choice["processing"]["er_mem"]["threshold"] for choice in result["by_group"]}) > 1


def test_the_repair_of_a_large_crop_is_judged_by_its_middle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = np.zeros(LATTICE.shape, np.uint8)
    inner[2:10, 3:11, 4:12] = 1
    for _ in range(4):  # the repair is right in the middle of 8 x 8 x 8 and wrong around it, where there is more
        case.add(
            {"er_mem": inner, "mito_mem": 1 - inner},
            {"er_mem": np.full(LATTICE.shape, 240, np.uint8), "mito_mem": np.full(LATTICE.shape, 160, np.uint8)},
        )
    settings = {"thresholds": {"er_mem": 0.5, "mito_mem": 0.5}, "repair": "auto"}
    assert not case.tune(settings=settings)["repair"]["kept"]
    monkeypatch.setattr(tuning, "MIDDLE", 8)
    middle = case.tune(settings=settings)["repair"]
    assert middle["kept"] and middle["score_tuned"] == 1
    monkeypatch.setattr(tuning, "CHUNK", (3, 2, 5))
    monkeypatch.setattr(tuning, "SLAB_VALUES", 2)
    assert case.tune(settings=settings)["repair"] == middle


def test_processes_memory_and_pieces_do_not_change_the_result(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        truth, p = faint(seed)
        case.add({"er_mem": truth, "nuc": truth}, {"er_mem": p, "nuc": p})
    alone = case.tune(settings={"repair": "auto"})
    assert case.tune(settings={"repair": "auto"}, workers=2, memory_gb=1) == alone
    # what a job has leaves no crop out
    assert case.tune(settings={"repair": "auto"}, workers=2, memory_gb=1e-6) == alone
    for voxels in (1, 200, 900):
        monkeypatch.setattr(tuning, "PIECE_VOXELS", voxels)
        assert case.tune(settings={"repair": "auto"}) == alone


def test_crops_that_are_not_listed_are_refused(case: Case) -> None:
    truth, p = faint(0)
    case.add({"er_mem": truth}, {"er_mem": p})
    case.rows[0]["crop"] = "jrc_x/other"
    with pytest.raises(ContractError, match=r"jrc_x/crop0: predicted, but not in .*crops.csv; run again with -R"):
        case.tune()
