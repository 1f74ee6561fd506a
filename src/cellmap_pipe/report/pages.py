"""Self-contained HTML pages with sortable tables: no network, no library, the same bytes for the same content."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Value = str | int | float | None

_STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.45 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1b1b1b; background: #fff;
  margin: 1.5rem; }
h1 { font-size: 1.4rem; margin: 0 0 .4rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .3rem; }
p { max-width: 62rem; margin: .3rem 0 .6rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } .scroll + .scroll { margin-top: .8rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
th { position: sticky; top: 0; background: #f3f3f3; cursor: pointer; border-bottom: 2px solid #888; user-select: none;
  white-space: normal; vertical-align: bottom; }
th:focus-visible { outline: 2px solid #0072B2; }
th[aria-sort=ascending]::after { content: " \\25B2"; } th[aria-sort=descending]::after { content: " \\25BC"; }
td.number, th.number { text-align: right; }
td.long { white-space: normal; min-width: 20rem; overflow-wrap: anywhere; }
tr.strong td { font-weight: 600; background: #f7fafc; }
tfoot td { border-top: 2px solid #888; }
tbody tr:hover td { background: #fdf6e3; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .45em; border: 1px solid #777;
  vertical-align: -.05em; }
.none { color: #6a6a6a; }
summary { cursor: pointer; margin: .6rem 0 .3rem; }
summary:focus-visible { outline: 2px solid #0072B2; }
.bar { display: block; position: relative; width: 14rem; height: 1em; background: #eee; }
.bar i { position: absolute; top: .1em; bottom: .1em; left: 0; background: #9ccbe6; }
.bar b { position: absolute; top: .42em; height: .16em; min-width: 2px; background: #1b1b1b; }
@media (max-width: 45rem) { body { margin: .7rem; } th, td { padding: .22rem .35rem; } td.long { min-width: 12rem; }
  #facts td { white-space: normal; } .bar { width: 7rem; } }
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, i) => { const cell = row.cells[i]; const text = cell.dataset.value ?? cell.textContent;
    return cell.classList.contains("number") && text !== "" ? Number(text) : text; };
  const sort = (head, i) => {
    const down = head.getAttribute("aria-sort") === "ascending" ||
      (!head.hasAttribute("aria-sort") && head.classList.contains("number"));
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => { const x = key(a, i), y = key(b, i);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return down ? -order : order; });
    table.tBodies[0].append(...rows);
  };
  heads.forEach((head, i) => {
    head.addEventListener("click", () => sort(head, i));
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(head, i); } });
  });
}
"""


@dataclass(frozen=True)
class Column:
    """A column: its `name` as shown, the `format` of its numbers (as in `format()`), a `hint` shown on hovering."""

    name: str
    format: str = ""
    hint: str = ""

    @property
    def numeric(self) -> bool:
        return bool(self.format)


@dataclass(frozen=True)
class Cell:
    """A value with a colour swatch before it."""

    value: Value
    colour: str | None = None


@dataclass(frozen=True)
class Bar:
    """A share between 0 and 1 drawn as a bar, with its interval, if it has one, as a line over it."""

    value: float
    low: float | None = None
    high: float | None = None


Content = Value | Cell | Bar

# Longer texts are broken into lines.
_LONG = 45


def _bar(bar: Bar) -> str:
    interval = ""
    if bar.low is not None and bar.high is not None:
        interval = f'<b style="left:{100 * bar.low:.1f}%;width:{100 * (bar.high - bar.low):.1f}%"></b>'
    return (
        f'<td class="number" data-value="{bar.value!r}"><span class="bar"><i style="width:{100 * bar.value:.1f}%"></i>'
        f"{interval}</span></td>"
    )


def _cell(content: Content, column: Column) -> str:
    if isinstance(content, Bar):
        return _bar(content)
    cell = content if isinstance(content, Cell) else Cell(content)
    swatch = f'<span class="swatch" style="background:{cell.colour}"></span>' if cell.colour else ""
    kind = ' class="number"' if column.numeric else ""
    if cell.value is None or cell.value == "":
        return f'<td{kind} data-value="">{swatch}<span class="none">&ndash;</span></td>'
    if isinstance(cell.value, int | float) and column.numeric:
        return f'<td{kind} data-value="{cell.value!r}">{swatch}{format(cell.value, column.format)}</td>'
    kind = ' class="long"' if len(str(cell.value)) > _LONG else kind
    return f"<td{kind}>{swatch}{escape(str(cell.value))}</td>"


def _row(columns: Sequence[Column], contents: Sequence[Content], *, strong: bool) -> str:
    cells = "".join(_cell(content, column) for content, column in zip(contents, columns, strict=True))
    return ('<tr class="strong">' if strong else "<tr>") + cells + "</tr>"


def _breakable(name: str) -> str:
    """Return a name as HTML that may be broken into lines after each underscore."""
    return escape(name).replace("_", "_<wbr>")


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[Content]],
    *,
    strong: Sequence[int] = (),
    totals: Sequence[Content] = (),
    name: str = "table",
) -> str:
    """Return an HTML table whose rows sort by a click on a column's head; rows with an index in `strong` stand out.

    totals: a last row that stays last.
    """
    heads = "".join(
        f'<th scope="col" tabindex="0"{" class=number" if column.numeric else ""}'
        f' title="{escape(column.hint or "click to sort", quote=True)}">{_breakable(column.name)}</th>'
        for column in columns
    )
    marked = set(strong)
    body = "\n".join(_row(columns, row, strong=index in marked) for index, row in enumerate(rows))
    foot = f"\n<tfoot>\n{_row(columns, totals, strong=True)}\n</tfoot>" if totals else ""
    return (
        f'<div class="scroll"><table id="{escape(name, quote=True)}"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>{foot}</table></div>"
    )


def page(title: str, parts: Sequence[str], *, style: str = "", script: str = "") -> str:
    """Return a whole HTML document with the `parts`, which are HTML already, under the `title`.

    style, script: CSS and JavaScript of this page, after those of all pages.
    """
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{body}\n<script>{_SCRIPT}{script}</script>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """Return a second-level heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def folded(summary: str, parts: Sequence[str]) -> str:
    """Return `parts`, which are HTML already, behind a line of text that shows them when it is clicked."""
    body = "\n".join(parts)
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"
