"""Masks made consistent: parts inside their groups, of classes that exclude each other the one with most margin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_pipe.classes import CLASSES, contains, disjoint
from cellmap_pipe.prediction import hierarchy
from cellmap_pipe.prediction.hierarchy import repair

# Atoms, their groups, groups that overlap (er, nuc), and groups of groups (np, ne, er, cell)
FAMILY = ["ecs", "mito_mem", "mito_lum", "mito", "er_mem", "er", "np_out", "np", "ne", "nuc", "cell"]

names = st.lists(st.sampled_from(FAMILY), min_size=1, max_size=len(FAMILY), unique=True)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    chosen = draw(names)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    steps = draw(st.sampled_from([3, 256]))  # few steps: many ties
    values = {name: rng.integers(0, steps, (3, 4, 5)).astype(np.float32) * (255 / (steps - 1)) for name in chosen}
    return values, {name: draw(st.sampled_from([0.3, 0.5, 0.7])) for name in chosen}


def plain(margins: dict[str, float]) -> set[str]:
    """One voxel, as the docstring of `repair` says."""
    taken: list[str] = []
    for name in sorted((n for n in margins if margins[n] > 0), key=lambda n: -margins[n]):
        lacking = [group for group in margins if contains(group, name) and group not in taken]
        if any(disjoint(name, other) for other in taken) or any(margins[name] <= -margins[g] for g in lacking):
            continue
        taken += [*lacking, name] if name not in taken else lacking
    return set(taken)


def consistent(taken: set[str], predicted: list[str]) -> bool:
    return not any(disjoint(a, b) for a in taken for b in taken) and all(
        group in taken for part in taken for group in predicted if contains(group, part)
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_voxel_is_what_the_plain_reference_says_and_consistent(
    case: tuple[dict[str, np.ndarray], dict[str, float]],
) -> None:
    values, thresholds = case
    masks = repair(values, thresholds)
    assert list(masks) == list(values)
    for index in np.ndindex(3, 4, 5):
        margins = {name: float(array[index] - np.float32(255 * thresholds[name])) for name, array in values.items()}
        taken = {name for name, mask in masks.items() if mask[index]}
        assert taken == plain(margins)
        assert consistent(taken, list(values))
        above = {name for name in margins if margins[name] > 0}
        if consistent(above, list(values)):
            assert taken == above


@settings(max_examples=50, deadline=None)
@given(cases())
def test_repaired_masks_are_not_changed_again(case: tuple[dict[str, np.ndarray], dict[str, float]]) -> None:
    values, thresholds = case
    once = repair(values, thresholds)
    twice = repair({name: mask * np.float32(255) for name, mask in once.items()}, dict.fromkeys(once, 0.5))
    for name, mask in once.items():
        np.testing.assert_array_equal(twice[name], mask)


def one(margins: dict[str, float]) -> set[str]:
    values = {name: np.full((1, 1, 1), 255 * (0.5 + margin), np.float32) for name, margin in margins.items()}
    return {name for name, mask in repair(values, dict.fromkeys(values, 0.5)).items() if mask.item()}


@pytest.mark.parametrize(
    ("margins", "expected"),
    [
        ({"er_mem": 0.1, "mito_mem": 0.2}, {"mito_mem"}),
        ({"mito_mem": 0.2, "mito": 0.1}, {"mito_mem", "mito"}),
        ({"mito_mem": 0.2, "mito": -0.1}, {"mito_mem", "mito"}),
        ({"mito_mem": 0.1, "mito": -0.2}, set()),
        ({"mito": 0.1, "mito_mem": -0.4}, {"mito"}),
        ({"mito_mem": 0.1, "mito": -0.2, "er_mem": 0.05}, {"er_mem"}),
        ({"ne": 0.3, "er": -0.1, "nuc": -0.2, "ecs": 0.2}, {"ne", "er", "nuc"}),
        ({"ne": 0.3, "er": -0.1, "nuc": -0.4, "ecs": 0.2}, {"ecs"}),
    ],
)
def test_the_larger_margin_decides(margins: dict[str, float], expected: set[str]) -> None:
    assert one(margins) == expected


def test_all_classes_at_once_and_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values = {name: rng.integers(0, 256, (4, 5, 6)).astype(np.float32) for name in CLASSES}
    thresholds = dict.fromkeys(CLASSES, 0.6)
    whole = repair(values, thresholds)
    monkeypatch.setattr(hierarchy, "BLOCK", 7)
    blocks = repair(values, thresholds)
    for name in CLASSES:
        np.testing.assert_array_equal(blocks[name], whole[name])
    for index in np.ndindex(4, 5, 6):
        assert consistent({name for name in CLASSES if whole[name][index]}, list(CLASSES))
