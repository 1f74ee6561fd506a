"""One Slurm cluster for all tests of this folder; skipped, with the reason, where there can be none."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster: that in the folder SLURM_TEST_CLUSTER, for who works on these tests, or one of their own."""
    if reason := why_not():
        pytest.skip(reason)
    running = os.environ.get("SLURM_TEST_CLUSTER")
    if running:
        yield Cluster(Path(running))
        return
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started
