"""``bench report``: one page of tables and plots from the CSV files of any benchmarks.

The page is one file that needs neither a server nor a network: columns sort by a click, and the
rows can be filtered by operation, dtype and mode.
"""

from __future__ import annotations

import argparse
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from bench import page_plots
from bench.errors import UsageError, require
from bench.page_table import SIZES, Entry, attributes, table
from bench.rows import SCHEMA, Row, read_csv

MOST_PLACES = 4  # that a note names
FILTERS = {"op": "operation", "dtype": "dtype", "mode": "mode"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench report``."""
    parser.description = __doc__
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="CSV", help="what --csv of a benchmark has written")
    add("--out", type=Path, default=Path("benchmark.html"), metavar="FILE", help="(%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Reads the files and writes the page; returns 0."""
    require("matplotlib")
    text = page({str(path): read_csv(path) for path in args.files})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(f"page: {args.out}")
    return 0


def page(files: Mapping[str, Sequence[Row]]) -> str:
    """The page as HTML.

    Args:
        files: name -> rows; one row or more in all.

    Raises:
        UsageError: if there is no row, or matplotlib is not installed.
    """
    entries = [Entry(row, number) for number, rows in enumerate(files.values(), 1) for row in rows]
    if not entries:
        raise UsageError(f"{', '.join(files)}: no measurement to report: measure some with --csv")
    ops = dict.fromkeys(entry.row.op for entry in entries)
    measured = [entry for entry in entries if entry.row.median_ms is not None]
    parts = {
        "summary": f"{len(measured)} measurements of {', '.join(ops)}; a table sorts by a click on "
        "the head of a column, which also tells what the column means.",
        "files": _files(files),
        "filters": "\n".join(filter(None, (_filter(name, entries) for name in FILTERS))),
        "count": f"{len(measured)} rows",
        "sections": "\n".join(_section(op, [e for e in entries if e.row.op == op]) for op in ops),
        "meaning": _meaning(entries),
    }
    text = importlib.resources.files("bench").joinpath("page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], text)


def _files(files: Mapping[str, Sequence[Row]]) -> str:
    """Who measured what, where and when, one item per file."""
    items = []
    for name, rows in files.items():
        facts = {
            "": _distinct(rows, "machine"),
            "torch ": _distinct(rows, "torch"),
            "throughtime ": _distinct(rows, "version"),
            "measured ": _span([row.date for row in rows]),
        }
        known = "; ".join(head + escape(value) for head, value in facts.items() if value)
        commands = "".join(
            f"<br><code>{escape(command)}</code>"
            for command in dict.fromkeys(row.command for row in rows)
            if command
        )
        items.append(
            f"<li><strong>{escape(name)}</strong>, {len(rows)} rows<br>{known}{commands}</li>"
        )
    return f'<ol class="files">\n{chr(10).join(items)}\n</ol>'


def _distinct(rows: Sequence[Row], name: str) -> str:
    return " and ".join(dict.fromkeys(str(getattr(row, name)) for row in rows))


def _span(dates: Sequence[str]) -> str:
    known = sorted(date for date in dates if date)
    if not known:
        return ""
    return known[0] if known[0] == known[-1] else f"{known[0]} to {known[-1]}"


def _filter(name: str, entries: Sequence[Entry]) -> str:
    """The choice among the values of a column, if there is one."""
    values = dict.fromkeys(getattr(entry.row, name) for entry in entries)
    if len(values) == 1:
        return ""
    options = "".join(f"<option>{escape(value)}</option>" for value in values)
    return (
        f'<label>{FILTERS[name]} <select name="{name}"><option value="">all</option>{options}'
        "</select></label>"
    )


def _section(op: str, entries: Sequence[Entry]) -> str:
    """Plots, table and notes of one operation."""
    measured = [entry for entry in entries if entry.row.median_ms is not None]
    parts = [f'<section data-op="{escape(op)}" aria-labelledby="op-{escape(op)}">']
    parts.append(f'<h2 id="op-{escape(op)}">{escape(op)}</h2>')
    groups: dict[str, list[Entry]] = {}
    for entry in measured:
        groups.setdefault(_setting(entry.row), []).append(entry)
    for k, (title, own) in enumerate(groups.items()):
        parts.append(
            f"<figure {attributes(own[0].row)}><figcaption>{escape(title)}</figcaption>"
            f'<div class="plot">{page_plots.draw(own, title, f"{op}-{k}-")}</div></figure>'
        )
    if measured:
        parts.append(table(measured, f"measurements of {op}"))
    parts += [_notes(entries), "</section>"]
    return "\n".join(parts)


def _setting(row: Row) -> str:
    """What all entries of one plot share."""
    threads = f"{row.threads} thread" + ("s" if row.threads > 1 else "")
    return f"{row.op}, {row.dtype}, {row.mode}, {row.device}, {threads}"


def _notes(entries: Sequence[Entry]) -> str:
    """What was not measured and why, and what a reader must know; equal notes are said once."""
    grouped: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry.row.note:
            grouped.setdefault((entry.row.contestant, entry.row.note), []).append(entry)
    if not grouped:
        return ""
    items = "\n".join(
        f"<li><strong>{escape(contestant)}</strong>: {escape(note)} "
        f'<span class="soft">({escape(_places(own))})</span></li>'
        for (contestant, note), own in grouped.items()
    )
    return f"<h3>Not measured, and notes</h3>\n<ul>\n{items}\n</ul>"


def _places(entries: Sequence[Entry]) -> str:
    found = list(dict.fromkeys(map(_where, entries)))
    rest = len(found) - MOST_PLACES
    return "; ".join(found[:MOST_PLACES]) + (f"; and {rest} more" if rest > 0 else "")


def _where(entry: Entry) -> str:
    values = {name: getattr(entry.row, name) for name in SIZES}
    sizes = [f"{name} {value}" for name, value in values.items() if value is not None]
    return ", ".join([*sizes, entry.row.dtype, entry.row.mode])


def _meaning(entries: Sequence[Entry]) -> str:
    """The columns that have a value somewhere, from the schema."""
    used = [n for n in SCHEMA if any(getattr(e.row, n) not in (None, "") for e in entries)]
    items = "\n".join(f"<dt>{escape(n)}</dt><dd>{escape(SCHEMA[n])}</dd>" for n in used)
    return f"<dl>\n{items}\n</dl>"
