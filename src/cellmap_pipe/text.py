"""Tables as plain text, for terminals and logs."""

from collections.abc import Mapping, Sequence


def aligned(rows: Sequence[Mapping[str, str]], header: Sequence[str]) -> str:
    """Return a table as text, its columns padded to the widest entry."""
    lines = [list(header), *([row[name] for name in header] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
