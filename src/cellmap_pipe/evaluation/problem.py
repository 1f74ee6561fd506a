"""A fault of a submission: its name, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass

SEVERITIES = ("error", "warning", "note")
# Faults of an array without which the evaluator finds no voxel of it
NO_ANSWER = frozenset(
    {
        "missing label",
        "group instead of array",
        "not zarr v2",
        "unreadable array",
        "all empty",
        "chunks of another separator",
    }
)
LABEL_DTYPES = "write uint8 for semantic classes, uint16 or uint32 ids"


@dataclass(frozen=True)
class Problem:
    """One fault of a submission.

    severity: "error" costs score or the whole submission, "warning" asks for a look, "note" is as it may be.
    """

    array: str
    fault: str
    detail: str
    remedy: str
    severity: str = "error"

    def __str__(self) -> str:
        return f"{self.array}: {self.fault}: {self.detail}; {self.remedy}"


def more(names: Sequence[str]) -> str:
    return f" ({len(names)} such)" if len(names) > 1 else ""


def lines_of(problems: Sequence[Problem], severity: str) -> list[str]:
    """Return the problems of one severity as lines."""
    return [str(problem) for problem in problems if problem.severity == severity]
