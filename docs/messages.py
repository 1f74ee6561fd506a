"""Makes docs/messages.md: every error that the library can raise, and what to do about it.

    python docs/messages.py

Most messages end with their remedy, and the page repeats it. What to do about the others stands in docs/remedies.yaml:
a message that has neither stops this program, and the tests.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from cellmap_pipe import errors
from cellmap_pipe.files import write_text

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
SRC = ROOT / "src" / "cellmap_pipe"
PAGE = FOLDER / "messages.md"
REMEDIES = FOLDER / "remedies.yaml"
GAP = "…"
# Fewer letters than these, and a message only passes another one on
LEAST_LETTERS = 7
PARTS = {
    "": "Anywhere",
    "config.py": "Configuration",
    "schema.py": "Configuration",
    "classes.py": "Configuration",
    "cli.py": "Command line",
    "fetch": "Fetching",
    "prepare": "Crops, conversion, folds, training store",
    "training": "Networks and training",
    "prediction": "Prediction, ensemble, segmentation",
    "evaluation": "Scores and submission",
    "report": "Report",
    "cluster": "Slurm",
    "workflow": "Targets of the workflow",
}
# Words with which a clause begins that says what to do
VERBS = """
    add align allow ask begin change check choose convert correct cut delete divide download downsample edit end
    fetch free give index install keep leave list lower make mend move name number pack pass pip put raise remedy
    remove rename renumber repair restart run see set show start submit take train try use wait write
""".split()
SURE = "convert free give pip run set try use".split()
JOINED = r"(?:(?:then|so|or|and|only|to) )?"
CLAUSES = (
    re.compile(rf"(?<=[;.] ){JOINED}(?:{'|'.join(VERBS)})\b.*$", re.IGNORECASE),
    re.compile(rf"(?<=[,:(] ){JOINED}(?:{'|'.join(SURE)})\b.*$"),
)
STATED = re.compile(r"\b(?:must|needed|expected|allowed|known)\b|did you mean")
AS_STATED = "correct it; the line says what is allowed"


@dataclass(frozen=True)
class Message:
    """A message as the source has it: `text` with gaps where values stand, `part` where it comes from."""

    part: str
    text: str
    place: str

    @property
    def key(self) -> str:
        """The text without what varies at its ends."""
        return self.text.strip(f" {GAP}:;/.`'")


def error_names(trees: Mapping[Path, ast.Module]) -> set[str]:
    """Return the names of CellmapError and of every class that is derived from it."""
    known = [value for value in vars(errors).values() if isinstance(value, type)]
    found = {value.__name__ for value in known if issubclass(value, errors.CellmapError)}
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    while more := {name for name, parents in bases.items() if parents & found} - found:
        found |= more
    return found


def constants(trees: Mapping[Path, ast.Module]) -> dict[Path, dict[str, str]]:
    """Return the texts of constants by module, those that it imports included."""
    by_module: dict[Path, dict[str, str]] = {}
    for path, tree in trees.items():
        own = by_module.setdefault(path, {})
        for node in tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                    own[name] = text
    for path, tree in trees.items():
        for node in tree.body:
            match node:
                case ast.ImportFrom(module=str(module), names=names):
                    source = SRC.parent / (module.replace(".", "/") + ".py")
                    for alias in names:
                        if alias.name in by_module.get(source, {}):
                            by_module[path].setdefault(alias.asname or alias.name, by_module[source][alias.name])
    return by_module


def template(node: ast.expr, known: Mapping[str, str]) -> str:
    """Return a text with gaps for what is only known when it is raised."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(template(value, known) for value in values)
        case ast.FormattedValue(value=value):
            return template(value, known)
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return template(left, known) + template(right, known)
    return GAP


def tidy(text: str) -> str:
    """Return a text on one line, neighbouring gaps as one."""
    return re.sub(rf"{GAP}(?: ?{GAP})+", GAP, " ".join(text.split()))


def messages(root: Path = SRC) -> list[Message]:
    """Return every message of the library and of the workflow's refusals, one of each text in each part."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(root.rglob("*.py"))}
    raised = error_names(trees)
    by_module = constants(trees)
    found: dict[tuple[str, str], Message] = {}
    for path, tree in trees.items():
        inner = path.relative_to(root).parts
        part = PARTS.get(inner[0], PARTS[""])
        for node in ast.walk(tree):
            for argument in _texts(node, raised):
                message = Message(part, tidy(template(argument, by_module[path])), f"{'/'.join(inner)}")
                if sum(map(str.isalpha, message.text)) >= LEAST_LETTERS:
                    found.setdefault((part, message.text), message)
    for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")):
        for call in re.findall(r"refuse\(\s*((?:f?\"[^\"]*\"\s*)+)\)", path.read_text()):
            text = tidy(template(ast.parse(f"({call})", mode="eval").body, {}))
            found.setdefault((PARTS["workflow"], text), Message(PARTS["workflow"], text, path.name))
    return list(found.values())


def _texts(node: ast.AST, raised: set[str]) -> Iterator[ast.expr]:
    """Yield the expressions of messages in a node: of an error, or of a fault of the configuration."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=[text, *_]) if name in raised:
            yield from _ways(text)
        case ast.Call(func=ast.Name(id="Fault"), args=[_, text, *_]):
            yield from _ways(text)


def _ways(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.IfExp):
        yield from (*_ways(node.body), *_ways(node.orelse))
    else:
        yield node


def own_remedy(text: str) -> str:
    """Return the clause at the end of a message that says what to do, or nothing."""
    for clause in CLAUSES:
        if found := clause.search(text):
            return found.group()
    return ""


def read_remedies(path: Path = REMEDIES) -> dict[str, str]:
    """Return what to do, by a piece of the messages."""
    return dict(yaml.safe_load(path.read_text()))


def remedy_of(message: Message, remedies: Mapping[str, str]) -> str:
    """Return what to do about a message: what it says itself, or the written remedy of the longest piece in it."""
    if own := own_remedy(message.text):
        return own
    pieces = [piece for piece in remedies if piece in message.text]
    stated = AS_STATED if STATED.search(message.text) else ""
    return remedies[max(pieces, key=len)] if pieces else stated


def faults(found: Sequence[Message], remedies: Mapping[str, str]) -> list[str]:
    """Return what keeps the page from being complete."""
    lines = [
        f"{message.place}: '{message.text}' says not what to do; say it, or put a piece of it into docs/remedies.yaml"
        for message in found
        if not remedy_of(message, remedies)
    ]
    return lines + [
        f"docs/remedies.yaml: no message has '{piece}' any more; remove it"
        for piece in remedies
        if not any(piece in message.text and not own_remedy(message.text) for message in found)
    ]


HEAD = """\
# Every message

Search this page for a part of the line that you have; `…` stands for names and numbers. The line may begin with
`ERROR <rule> <wildcards>:`. [troubleshooting.md](troubleshooting.md) begins with what is seen, and
[scoring.md](scoring.md#flight-check) has the faults of a submission. This page is made by `python docs/messages.py`.
"""


def render(found: Sequence[Message], remedies: Mapping[str, str]) -> str:
    """Return the page, sorted by the words of the messages in each part."""
    parts = [HEAD]
    for part in dict.fromkeys(PARTS.values()):
        rows = sorted((one for one in found if one.part == part), key=lambda one: (one.key.casefold(), one.text))
        if rows:
            parts += [f"## {part}", "", "| message | what to do |", "|---|---|"]
            parts += [f"| {_cell(_short(one.text))} | {_plain(remedy_of(one, remedies))} |" for one in rows]
            parts.append("")
    return "\n".join(parts)


def _short(text: str) -> str:
    """Return a message without the remedy that the next column repeats."""
    found = CLAUSES[0].search(text)
    kept = text[: found.start()].rstrip(" ;.") if found else ""
    return kept if sum(map(str.isalpha, kept)) >= LEAST_LETTERS else text


def _cell(text: str) -> str:
    fence = "``" if "`" in text else "`"
    padding = " " if "`" in text else ""
    return fence + padding + text.replace("|", "/") + padding + fence


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;").replace("*", "\\*")


def main() -> int:
    """Write the page; returns 1, and names them, if messages have no remedy."""
    found, remedies = messages(), read_remedies()
    if lines := faults(found, remedies):
        sys.stderr.write("\n".join(lines) + f"\n{len(lines)} faults; {PAGE.name} is not written\n")
        return 1
    write_text(PAGE, render(found, remedies))
    return 0


if __name__ == "__main__":
    sys.exit(main())
