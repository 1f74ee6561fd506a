"""Exceptions whose message is the one line that a user reads: what is wrong, where, and what to do about it."""


class CellmapError(Exception):
    """Base of every error that the pipeline raises on purpose."""


class ConfigError(CellmapError):
    """The configuration cannot be used; the message names file, key, allowed values and remedy."""


class GeometryError(CellmapError):
    """Voxel sizes, boxes or levels do not fit together."""


class BudgetError(GeometryError):
    """A crop would take more memory on a grid than the configuration grants it."""


class DataError(CellmapError):
    """One crop or volume cannot be used: unreadable, corrupt, unexpected dtype. Its neighbours go on without it."""


class MissingError(DataError):
    """An image, or every level of it, is not on disk."""


class ContractError(CellmapError):
    """A file on disk is not what its JSON contract says; the message names the rule to run again (`-R rule`)."""


class TrainingError(CellmapError):
    """A training cannot start or cannot go on."""
