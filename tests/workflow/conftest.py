"""One run of the demo for all tests of its results, and a browser for its report."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

from browser import browser  # noqa: F401  # a fixture
from demo_run import child_seconds, snakemake


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a finished demo; CELLMAP_DEMO names one to use instead of running it."""
    if os.environ.get("CELLMAP_DEMO"):
        return Path(os.environ["CELLMAP_DEMO"])
    folder = tmp_path_factory.mktemp("demo")
    begun = child_seconds()
    snakemake(folder, "all", "--report", "report.html", "--report-after-run")
    spent = child_seconds() - begun
    (folder / "cpu_seconds.txt").write_text(f"{spent:.0f}")
    return folder
