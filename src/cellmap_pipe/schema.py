"""Whether a value is what a JSON schema says, told in lines that a user can act on.

The subset of JSON Schema (2020-12) that the project's schemas use: type, properties, required, additionalProperties,
propertyNames.pattern, items, minItems, maxItems, uniqueItems, enum, const, anyOf, minimum, maximum, exclusiveMinimum,
exclusiveMaximum, minLength, pattern, and `$ref` to a place in another file of the same folder. A schema with any other
keyword is refused. General validators print the whole schema; these messages name the key, the nearest known key and
the allowed values.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cellmap_pipe.errors import ConfigError

Key = tuple[str, ...]

_NOTES = {"$schema", "title", "description"}
_KEYWORDS = _NOTES | set(
    "$ref type properties required additionalProperties propertyNames items minItems maxItems uniqueItems enum const "
    "anyOf minimum maximum exclusiveMinimum exclusiveMaximum minLength pattern".split()
)
_TYPES: dict[str, str] = {
    "object": "a mapping",
    "array": "a list",
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}
# YAML 1.1 reads 1e-4, without a decimal point, as a text.
_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: at which key (path of names), and in words."""

    key: Key
    message: str


def load_yaml(path: Path) -> Any:
    """Return the value of a YAML file (an empty file is an empty mapping). Raises ConfigError with file and line."""
    try:
        # the C parser takes a tenth of the time
        value = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}: line {line}: is not YAML: {error.problem}") from error
    return {} if value is None else value


# Parts of a schema file refer to each other: it is read once.
_load_schema = cache(load_yaml)


class Schema:
    """A schema file, or a part of one."""

    def __init__(self, path: Path, node: Any = None) -> None:
        self.path = path
        self.node: Mapping[str, Any] = _load_schema(path) if node is None else node
        if "$ref" in self.node:
            name, _, pointer = self.node["$ref"].partition("#")
            self.path = path.parent / name
            self.node = _load_schema(self.path)
            for step in pointer.strip("/").split("/") if pointer else []:
                self.node = self.node[step]
        unknown = set(self.node) - _KEYWORDS
        if unknown:
            raise ConfigError(f"{self.path}: schema keyword {min(unknown)} is not supported")

    def child(self, name: str) -> "Schema | None":
        """Return the schema of the entry `name` of a mapping; None where any value is allowed.

        Raises KeyError where no such entry is allowed.
        """
        properties = self.node.get("properties", {})
        if name in properties:
            return Schema(self.path, properties[name])
        others = self.node.get("additionalProperties", True)
        if others is False:
            raise KeyError(name)
        return None if others is True else Schema(self.path, others)

    @property
    def types(self) -> list[str]:
        kinds = self.node.get("type", [])
        return [kinds] if isinstance(kinds, str) else kinds

    @property
    def items(self) -> "Schema | None":
        return Schema(self.path, self.node["items"]) if "items" in self.node else None

    @property
    def alternatives(self) -> list["Schema"]:
        return [Schema(self.path, node) for node in self.node.get("anyOf", [])]

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        node = self.node
        if "const" in node:
            return str(node["const"])
        if "enum" in node:
            return "one of " + ", ".join(map(str, node["enum"]))
        if "anyOf" in node:
            return " or ".join(schema.allowed for schema in self.alternatives)
        words = " or ".join(_TYPES[kind] for kind in self.types)
        if "array" in self.types and "items" in node:
            words += f" (of {Schema(self.path, node['items']).allowed}"
            words += f", {node['minItems']} of them)" if node.get("minItems") == node.get("maxItems", 0) else ")"
        bounds = [
            f"{sign} {node[name]}"
            for name, sign in (
                ("minimum", ">="),
                ("exclusiveMinimum", ">"),
                ("maximum", "<="),
                ("exclusiveMaximum", "<"),
            )
            if name in node
        ]
        return " ".join([words, *bounds])

    def normalised(self, value: Any) -> Any:
        """Return `value` with null entries removed and texts like 1e-4 as numbers, where the schema wants that."""
        for schema in self.alternatives:
            converted = schema.normalised(value)
            if not list(schema.faults(converted)):
                return converted
        if isinstance(value, Mapping):
            return {str(name): entry for name, entry in self._entries(value)}
        if isinstance(value, list | tuple):
            return [entry if self.items is None else self.items.normalised(entry) for entry in value]
        return _number(value) if not {"number", "integer"}.isdisjoint(self.types) else value

    def _entries(self, value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, entry in value.items():
            try:
                child = self.child(str(name))
            except KeyError:
                yield name, entry  # reported by `faults`
                continue
            if entry is None and (child is None or "null" not in child.types):
                continue
            yield name, _free(entry) if child is None else child.normalised(entry)

    def faults(self, value: Any, *, partial: bool = False, key: Key = ()) -> Iterator[Fault]:
        """Yield everything that is wrong with `value`. partial: entries may be missing."""
        node = self.node
        if "anyOf" in node:
            if all(list(schema.faults(value)) for schema in self.alternatives):
                yield self._mismatch(value, key)
            return
        if not self._listed(value):
            yield self._mismatch(value, key)
        elif isinstance(value, Mapping):
            yield from self._mapping_faults(value, partial, key)
        elif isinstance(value, list):
            yield from self._list_faults(value, partial, key)
        elif isinstance(value, str):
            if len(value) < node.get("minLength", 0):
                yield Fault(key, "must not be empty")
            if "pattern" in node and not re.search(node["pattern"], value):
                yield Fault(key, f"'{value}' does not match {node['pattern']}")
        elif isinstance(value, int | float) and not isinstance(value, bool) and not self._within(value):
            yield self._mismatch(value, key)

    def _mismatch(self, value: Any, key: Key) -> Fault:
        shown = "a mapping" if isinstance(value, Mapping) else f"{value!r}" if value is not None else "null"
        about = self.node.get("description")
        return Fault(key, f"is {shown}; allowed: {self.allowed}" + (f" ({about})" if about else ""))

    def _listed(self, value: Any) -> bool:
        """Return whether the value is of an allowed type and, where values are listed, one of them."""
        node = self.node
        of_type = not self.types or any(_is(value, kind) for kind in self.types)
        return of_type and value == node.get("const", value) and value in node.get("enum", [value])

    def _within(self, value: float) -> bool:
        node = self.node
        return (
            math.isfinite(value)
            and node.get("minimum", -math.inf) <= value <= node.get("maximum", math.inf)
            and node.get("exclusiveMinimum", -math.inf) < value < node.get("exclusiveMaximum", math.inf)
        )

    def _mapping_faults(self, value: Mapping[str, Any], partial: bool, key: Key) -> Iterator[Fault]:
        pattern = self.node.get("propertyNames", {}).get("pattern", "")
        for name, entry in value.items():
            try:
                child = self.child(str(name))
            except KeyError:
                yield Fault((*key, str(name)), _unknown(str(name), self.node["properties"]))
                continue
            if pattern and not re.search(pattern, str(name)):
                yield Fault((*key, str(name)), f"names here match {pattern}")
            elif child is not None:
                yield from child.faults(entry, partial=partial, key=(*key, str(name)))
        for name in self.node.get("required", []):
            if name not in value and not partial:
                yield Fault((*key, name), "is missing")

    def _list_faults(self, value: Sequence[Any], partial: bool, key: Key) -> Iterator[Fault]:
        node = self.node
        if not node.get("minItems", 0) <= len(value) <= node.get("maxItems", math.inf):
            least, most = node.get("minItems", 0), node.get("maxItems")
            wanted = f"{least}" if least == most else f"at least {least}" + (f", at most {most}" if most else "")
            yield Fault(key, f"has {len(value)} entries; allowed: {wanted}")
        if node.get("uniqueItems"):
            for entry in [entry for i, entry in enumerate(value) if entry in value[:i]]:
                yield Fault(key, f"lists {entry!r} twice")
        if self.items is not None:
            for i, entry in enumerate(value):
                yield from self.items.faults(entry, partial=partial, key=(*key, str(i)))


def nearest(name: str, known: Sequence[str]) -> str:
    """Return "did you mean 'x'?" for the nearest of `known`, or the list of them if none is near."""
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def _unknown(name: str, properties: Mapping[str, Any]) -> str:
    return f"is not a known key; {nearest(name, list(properties))}"


def _is(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        return isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
    expected: dict[str, Any] = {"object": Mapping, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return isinstance(value, expected[kind])


def _number(value: Any) -> Any:
    """Return a text in exponent notation as a number, and a whole one as an integer; anything else as it is."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value.strip()):
        value = float(value)
        return int(value) if value.is_integer() else value
    return value


def _free(value: Any) -> Any:
    """Return a value that no schema describes, normalised all the same: numbers read, null entries removed."""
    if isinstance(value, Mapping):
        return {str(name): _free(entry) for name, entry in value.items() if entry is not None}
    return [_free(entry) for entry in value] if isinstance(value, list | tuple) else _number(value)
