"""What the documentation names exists: linked files, configuration keys, targets of the workflow."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = yaml.safe_load((ROOT / "config/config.yaml").read_text())


def keys(section, prefix=""):
    for name, value in section.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_configuration_keys_exist(page):
    named = re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)`", page.read_text())
    of_config = [key for key in named if key.split(".")[0] in SECTIONS]
    assert set(of_config) <= set(keys(SECTIONS))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_configuration_files_exist(page):
    paths = re.findall(r"`((?:config|profiles|workflow|src)/[\w./+-]+)`", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []
