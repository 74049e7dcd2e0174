"""The comparison as one HTML page that needs nothing besides itself: no network, no fonts, no libraries."""

from __future__ import annotations

import datetime
import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inlay.compare import figures
from inlay.compare.table import MEANING, Row, cells_of, columns_of, findings, with_spread

if TYPE_CHECKING:
    from inlay.compare.compare import Comparison

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #20242a; --soft: #5d6570; --line: #e1e4e8; --ghost: #c9ced6;
  --band: #f5f6f8; --best: #e5f3ea; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e4e7eb; --soft: #9aa3ae; --line: #30363d;
  --ghost: #464d57; --band: #1d2126; --best: #193325; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .4rem; }
p { max-width: 58rem; margin: .4rem 0; }
.soft, caption, figcaption { color: var(--soft); font-size: .9rem; }
ul { max-width: 58rem; padding-left: 1.2rem; margin: .6rem 0; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .32rem .42rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
th { font-weight: 600; vertical-align: bottom; white-space: normal; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-align: inherit; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tbody tr:hover td { background: var(--band); }
td.best { background: var(--best); }
td.text { white-space: normal; text-align: left; min-width: 12rem; }
code { font-size: .82rem; overflow-wrap: anywhere; }
i.dot { display: inline-block; width: .6rem; height: .6rem; border-radius: 50%; margin-right: .45rem; }
figure { margin: .8rem 0; overflow-x: auto; }
figure svg { width: 100%; height: auto; max-width: 72rem; min-width: 42rem; }
figure svg text { paint-order: stroke; stroke: var(--paper); stroke-width: 2.5px; stroke-linejoin: round; }
"""

TIMES = "Medians. Filled: the adapter beside the base; rings: merged into it, where that is exact."

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable"))
  table.querySelectorAll("thead th").forEach((head, column) => head.querySelector("button").onclick = () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.value;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? order : -order;
    });
    table.tBodies[0].append(...rows);
  });
"""


def page(comparison: Comparison, facts: Mapping[str, Any]) -> str:
    """The whole page."""
    rows = comparison.rows
    sound = [row for row in rows if not row.error]
    parts = [f"<h1>{_text(facts['title'])}</h1>", f'<p class="soft">{_text(facts["what"])}</p>']
    if comparison.plan.note:
        parts.append(f'<p class="soft">{_text(comparison.plan.note)}</p>')
    told = findings(rows)
    if told:
        parts.append("<ul>" + "".join(f"<li>{_text(sentence)}</li>" for sentence in told) + "</ul>")
    if sound:
        parts.append(_figure("Quality against trained parameters", figures.quality(rows),
                             "Bars: standard deviation over seeds. Dashed: full fine-tuning."))  # fmt: skip
    parts += ["<h2>All methods</h2>", _main_table(rows), f'<p class="soft">{_text(MEANING)}</p>']
    failed = [row for row in rows if row.error]
    if failed:
        told = [f"<li><b>{_text(row.label)}</b>: {_text(row.error)}</li>" for row in failed]
        parts.append("<h2>Not possible here</h2><ul>" + "".join(told) + "</ul>")
    if sound:
        parts.append(_figure("Learning curves", figures.curves(rows),
                             "One panel for each method, one line for each seed; the others in grey."))  # fmt: skip
        if low := figures.low_data(rows):
            parts.append(_figure("Little data", low, "Samples are drawn anew for each seed; the held-out rows stay."))
            parts.append(_low_table(sound))
        if times := figures.times(rows):
            parts.append(_figure("Time", times, TIMES))
        parts += ["<h2>Settings</h2>", _settings(sound)]
    today = datetime.date.today().isoformat()
    parts.append(f'<p class="soft">Written by <code>inlay compare</code> on {today}.</p>')
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(facts['title'])}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _text(text: object) -> str:
    return html.escape(str(text))


def _figure(title: str, svg: str, caption: str) -> str:
    return f"<h2>{_text(title)}</h2>\n<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _main_table(rows: Sequence[Row]) -> str:
    columns = columns_of(rows)
    best = next((row for row in rows if not row.error), None)
    body = []
    for row in rows:
        values = _values(row, columns)
        cells = []
        for index, (text, value) in enumerate(zip(cells_of(row, columns), values, strict=True)):
            name = f'<i class="dot" style="background:{figures.family_of(row.key)[1]}"></i>' if index == 0 else ""
            mark = ' class="best"' if index == 1 and row is best else ""
            cells.append(f'<td{mark} data-value="{_text(value)}">{name}{_text(text)}</td>')
        body.append("<tr>" + "".join(cells) + "</tr>")
    return _table(columns, body)


def _values(row: Row, columns: Sequence[str]) -> Sequence[object]:
    """What the cells of a row are sorted by."""
    if row.error:
        return [row.label] + [""] * (len(columns) - 1)
    first = row.first
    values: list[object] = [
        row.label, row.quality, first.trained, first.trained, first.stored, first.bytes,
        "" if row.peak is None else row.peak, row.step, "" if row.time is None else row.time,
    ]  # fmt: skip
    for column in columns[len(values) :]:
        figure, _, mode = column.rpartition(", ")
        values.append(row.inference.get(figure, {}).get(mode, ""))
    return values


def _low_table(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if len(row.low) > 1]
    counts = sorted({count for row in rows for count in row.low})
    body = []
    for row in rows:
        cells = [f'<td data-value="{_text(row.label)}">{_text(row.label)}</td>']
        for count in counts:
            found = row.low.get(count)
            shown = "–" if found is None else with_spread(*found)
            cells.append(f'<td data-value="{"" if found is None else found[0]}">{shown}</td>')
        body.append("<tr>" + "".join(cells) + "</tr>")
    return _table(["method", *(f"{count:,} rows" for count in counts)], body)


def _settings(rows: Sequence[Row]) -> str:
    body = [
        f'<tr><td data-value="{_text(row.label)}">{_text(row.label)}</td>'
        f'<td data-value="{row.first.learning_rate}">{row.first.learning_rate:g}</td>'
        f'<td data-value="{row.first.batch}">{row.first.batch}</td>'
        f'<td data-value="{_text(row.first.source)}">{_text(row.first.source)}</td>'
        f'<td class="text" data-value=""><code>{_text(row.first.method)}</code></td></tr>'
        for row in rows
    ]
    return _table(["method", "learning rate", "rows a step", "source", "configuration"], body)


def _table(columns: Sequence[str], body: Sequence[str]) -> str:
    head = "".join(f'<th scope="col"><button>{_text(column)}</button></th>' for column in columns)
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
