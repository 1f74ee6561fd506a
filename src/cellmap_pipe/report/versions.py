"""How pages, tables and figures name the rules that their scores follow."""

from collections.abc import Iterable

from cellmap_pipe.evaluation.rules import get_rules


def rules_name(*names: str) -> str:
    """Return the versions of rules as they are shown beside a score, each once; what is provisional says so.

    Raises ConfigError for a version that is not known.
    """
    shown = (f"{name} (provisional)" if get_rules(name).provisional else name for name in dict.fromkeys(names))
    return ", ".join(shown)


def rules_sentences(names: Iterable[str]) -> str:
    """Return what a page must say about its scores: the rules that they follow, and that the portal may differ."""
    rules = [get_rules(name) for name in dict.fromkeys(names)]
    parts = [f"Scored by the rules {rules_name(each.name)}: {each.description}." for each in rules]
    notes = dict.fromkeys(each.note for each in rules)
    said = [note for note in notes if not any(note in other for other in notes if other != note)]
    return " ".join([*parts, f"Note: {'; '.join(said)}."])
