"""``bench report``: its tables, one per operation, from rows of any number of files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from bench.rows import SCHEMA, Row

Key = float | str | None

SIZES = ("T", "B", "I", "H", "heads", "D", "window_size", "top_k", "score", "p")
SETTING = ("dtype", "mode", "device", "threads")
NUMBERS = (
    *("reference_ratio", "best_peer_ratio", "gflops", "share_of_matmul", "gbs"),
    *("share_of_bandwidth", "us_per_query", "peak_mb", "error", "runs"),
)


@dataclass(frozen=True)
class Entry:
    """A row and the number of the file that it comes from, counted from 1."""

    row: Row
    file: int


@dataclass(frozen=True)
class Column:
    """A column of the page: its head, what it means, what a cell shows and what it is sorted by."""

    name: str
    meaning: str
    text: Callable[[Entry], str]
    key: Callable[[Entry], Key]


def columns(entries: Sequence[Entry]) -> tuple[list[Column], list[Column]]:
    """The columns in which the entries differ, and those in which all have the same value.

    Columns that no entry has a value in are left out.

    Args:
        entries: of one operation.

    Returns:
        What the table shows, and what its caption says once.

    Example:
        >>> row = Row(op="lstm", T=5, B=3, dtype="float32", mode="forward", device="cpu",
        ...           impl="torch", threads=2, median_ms=1.0)
        >>> shown, shared = columns([Entry(row, 1)])
        >>> [column.name for column in shown]
        ['impl', 'median_ms']
    """
    wanted = [c for c in _all() if any(c.key(entry) is not None for entry in entries)]
    always = ("impl", "median_ms", "ratio")
    shared = [
        c for c in wanted if c.name not in always and len({c.key(entry) for entry in entries}) == 1
    ]
    return [c for c in wanted if c not in shared], shared


def _all() -> list[Column]:
    found = [_plain(name) for name in (*SIZES, *SETTING)]
    found.append(
        Column(
            "impl",
            f"{SCHEMA['impl']}; in brackets the backend: {SCHEMA['backend']}",
            lambda entry: entry.row.contestant,
            lambda entry: entry.row.contestant,
        )
    )
    found += [_with_quartiles("median_ms", "q1_ms", "q3_ms")]
    found += [_with_quartiles("ratio", "ratio_q1", "ratio_q3")]
    found += [_plain(name) for name in NUMBERS]
    file = Column(
        "file", "number of the file, as listed above", lambda e: str(e.file), lambda e: e.file
    )
    return [*found, file]


def _plain(name: str) -> Column:
    def value(entry: Entry) -> Key:
        found: Key = getattr(entry.row, name)
        return found

    return Column(name, SCHEMA[name], lambda entry: text(name, value(entry)), value)


def _with_quartiles(name: str, low: str, high: str) -> Column:
    def show(entry: Entry) -> str:
        shown = text(name, getattr(entry.row, name))
        ends = [getattr(entry.row, end) for end in (low, high)]
        if None in ends:
            return shown
        return f"{shown} ({text(low, ends[0])} to {text(high, ends[1])})"

    meaning = f"{SCHEMA[name]}; in brackets its quartiles"
    return Column(name, meaning, show, lambda entry: getattr(entry.row, name))


def text(name: str, value: Key) -> str:
    """A value as the page shows it: three digits, shares in per cent, an empty one as a dash.

    Example:
        >>> text("median_ms", 1234.5), text("error", 2.34e-7), text("p", None)
        ('1234', '2.3e-07', '-')
    """
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if name.startswith("share_of"):
        return f"{value:.0%}"
    if name == "error":
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(entries: Sequence[Entry], label: str) -> str:
    """The table as HTML; its heads are buttons, which the page's script makes sort.

    Every body cell carries what it is sorted by, and every line what the filters ask for.

    Args:
        entries: of one operation, one or more.
        label: names the table for those who do not see it.
    """
    shown, shared = columns(entries)
    heads = "".join(
        f'<th scope="col" aria-sort="none"{_kind(c.key(entries[0]))}>'
        f'<button type="button" title="{escape(c.meaning)}">{escape(c.name)}</button></th>'
        for c in shown
    )
    lines = "\n".join(_line(entry, shown) for entry in entries)
    caption = ", ".join(f"{c.name} {c.text(entries[0])}" for c in shared)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">\n<table>\n'
        f"<caption>{'All rows: ' + escape(caption) if caption else ''}</caption>\n"
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>\n</div>"
    )


def _line(entry: Entry, shown: Sequence[Column]) -> str:
    cells = []
    for column in shown:
        key = column.key(entry)
        sortable = "" if key is None else escape(str(key))
        cells.append(f'<td{_kind(key)} data-key="{sortable}">{escape(column.text(entry))}</td>')
    ours = ' class="ours"' if entry.row.ours else ""
    return f"<tr{ours} {attributes(entry.row)}>{''.join(cells)}</tr>"


def _kind(key: Key) -> str:
    return "" if isinstance(key, str) else ' class="number"'


def attributes(row: Row) -> str:
    """What the filters compare, as attributes of an element.

    Example:
        >>> attributes(Row(op="lstm", T=5, B=3, dtype="float32", mode="forward", device="cpu",
        ...                impl="torch", threads=2))
        'data-op="lstm" data-dtype="float32" data-mode="forward"'
    """
    return " ".join(
        f'data-{name}="{escape(getattr(row, name))}"' for name in ("op", "dtype", "mode")
    )
