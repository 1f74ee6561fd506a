from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.schema import Schema, nearest

SCHEMAS = Path(__file__).parents[2] / "workflow" / "schemas"
CONFIG = yaml.safe_load((SCHEMAS.parents[1] / "config" / "config.yaml").read_text())


def reference() -> Draft202012Validator:
    """Return the general validator of the same schema."""
    contents = {name: yaml.safe_load((SCHEMAS / name).read_text()) for name in ("config.yaml", "model.yaml")}
    registry = Registry().with_resources((name, Resource.from_contents(value)) for name, value in contents.items())
    return Draft202012Validator(contents["config.yaml"], registry=registry)


@pytest.mark.parametrize("name", ["config.yaml", "model.yaml"])
def test_schemas_are_json_schemas(name):
    Draft202012Validator.check_schema(yaml.safe_load((SCHEMAS / name).read_text()))


def closed(node, path=""):
    """Yield the places of mappings in a schema that say nothing of entries that they do not list."""
    if isinstance(node, dict):
        if "properties" in node and "additionalProperties" not in node:
            yield path
        for key, value in node.items():
            yield from closed(value, f"{path}/{key}")


@pytest.mark.parametrize("name", ["config.yaml", "model.yaml"])
def test_no_mapping_takes_unknown_entries(name):
    assert list(closed(yaml.safe_load((SCHEMAS / name).read_text()))) == []


def places(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from places(entry, (*path, key))


REPLACEMENTS = [None, True, 0, -1, 3, 2.5, "", "native", "none", "all", [], [1], [8, 8, 8], ["ecs"], {}, {"seed": 1}]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(list(places(CONFIG))[1:]), st.sampled_from(REPLACEMENTS))
def test_verdicts_are_those_of_a_general_validator(path, replacement):
    changed = yaml.safe_load(yaml.safe_dump(CONFIG))
    target = changed
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = replacement
    changed["overrides"] = {}  # partial entries: another rule
    faults = list(Schema(SCHEMAS / "config.yaml").faults(changed))
    assert bool(faults) == (not reference().is_valid(changed)), faults


def test_a_schema_with_an_unknown_keyword_is_refused(tmp_path):
    (tmp_path / "s.yaml").write_text("type: object\nminProperties: 1\n")
    with pytest.raises(ConfigError, match="minProperties is not supported"):
        Schema(tmp_path / "s.yaml")


def test_broken_yaml_is_named_with_its_line(tmp_path):
    (tmp_path / "s.yaml").write_text("a: [1,\nb: 2\n")
    with pytest.raises(ConfigError, match=r"s.yaml: line 3: is not YAML: did not find expected"):
        Schema(tmp_path / "s.yaml")


def test_without_a_near_name_all_are_listed():
    assert nearest("xyzzy", ["ab", "cd"]) == "known: ab, cd"
