"""The browser of the tests in this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from browser import browser  # noqa: F401  # a fixture
