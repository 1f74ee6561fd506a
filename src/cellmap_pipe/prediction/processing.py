"""How the probabilities of a class become its mask or its objects, and what tuning found about it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import read_json

FORMAT = 1
REMEDY = "make it again with `-R tune`"


@dataclass(frozen=True)
class Processing:
    """What is done to one class, in this order.

    threshold: a voxel belongs to the class where its probability is higher. hole_nm3: pockets of background
    (6-connected) smaller than this are filled. split_nm: objects are parted where a neck between them is thinner than
    twice this length, 0 = never; of no effect on semantic classes. min_size_nm3: objects (26-connected) smaller than
    this are removed.
    """

    threshold: float = 0.5
    hole_nm3: float = 0.0
    split_nm: float = 0.0
    min_size_nm3: float = 0.0

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> "Processing":
        return cls(**{entry.name: float(values[entry.name]) for entry in fields(cls)})


def configured(name: str, settings: Mapping[str, Any]) -> Processing:
    """Return what the configuration says of a class.

    settings: `threshold` and, by class, `thresholds`, `hole_nm3`, `split_nm` and `min_size_nm3`.
    """
    return Processing(
        threshold=float(settings["thresholds"].get(name, settings["threshold"])),
        hole_nm3=float(settings["hole_nm3"].get(name, 0)),
        split_nm=float(settings["split_nm"].get(name, 0)),
        min_size_nm3=float(settings["min_size_nm3"].get(name, 0)),
    )


@dataclass(frozen=True)
class Choice:
    """What was chosen for one set of crops: how each class is processed where that raised the score, and the repair."""

    processing: Mapping[str, Processing] = field(default_factory=dict)
    repair: bool = False


@dataclass(frozen=True)
class Tuned:
    """What tuning found. A validation crop is processed as crops of other groups taught, every other volume as all did.

    groups: group of each crop that was tuned on. by_group: the choice that the crops of the other groups led to.
    overall: the choice that all crops led to.
    """

    groups: Mapping[str, int]
    by_group: Sequence[Choice]
    overall: Choice

    def choice(self, volume: str) -> Choice:
        """Return what a volume is processed by."""
        group = self.groups.get(volume)
        return self.overall if group is None else self.by_group[group]


def read_tuned(path: str | Path) -> Tuned:
    """Return what `tuning.tune` wrote. Raises ContractError for a file that it did not write."""
    content = read_json(path, REMEDY)
    if content.get("format") != FORMAT:
        raise ContractError(f"{path}: format {content.get('format')}, this version reads {FORMAT}; {REMEDY}")
    return Tuned(
        groups={str(crop): int(group) for crop, group in content["groups"].items()},
        by_group=[_choice(entry) for entry in content["by_group"]],
        overall=_choice(content["overall"]),
    )


def _choice(content: Mapping[str, Any]) -> Choice:
    return Choice(
        {name: Processing.from_dict(values) for name, values in content["processing"].items()}, bool(content["repair"])
    )


def choice_to_dict(choice: Choice) -> dict[str, Any]:
    """Return the form in which `read_tuned` finds a choice under `overall` and in the list `by_group`."""
    return {"processing": {name: how.to_dict() for name, how in choice.processing.items()}, "repair": choice.repair}
