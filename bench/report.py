"""What a person reads of a benchmark: Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bench.rows import Row


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns.

    Example:
        >>> print(markdown(["a", "b"], [["1", "22"]]))
        | a | b  |
        |---|----|
        | 1 | 22 |
    """
    table = [list(header), *(list(line) for line in lines)]
    widths = [max(len(line[k]) for line in table) for k in range(len(header))]

    def joined(cells: Iterable[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([joined(table[0]), rule, *(joined(line) for line in table[1:])])


def ms(value: float | None) -> str:
    """Milliseconds with three significant digits.

    Example:
        >>> ms(123.456), ms(1.23456), ms(None)
        ('123', '1.23', '-')
    """
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def sizes(row: Row) -> str:
    """The sizes of a row as the heading of its operation names them.

    Example:
        >>> sizes(Row(op="lstm", T=5, B=3, I=2, H=4, dtype="float32", mode="forward",
        ...           device="cpu", impl="torch", threads=1))
        '5, 3, 2, 4'
    """
    names = ("T", "B", "I", "H", "heads", "D", "window_size", "top_k")
    known = [str(getattr(row, name)) for name in names if getattr(row, name) is not None]
    if row.score is not None and row.op == "relevancy" and row.score != "dot":
        known.append(row.score)
    return ", ".join(known)


def table(rows: Sequence[Row], heading: str) -> str:
    """One line per row; a column that is the same everywhere or empty is left out.

    Args:
        rows: the measurements of one operation.
        heading: of the column of sizes.
    """
    always: dict[str, Callable[[Row], str]] = {
        heading: sizes,
        "implementation": lambda row: row.contestant,
        "ms (quartiles; runs)": _time,
        "/ ours (quartiles)": _ratio,
    }
    where: dict[str, Callable[[Row], str]] = {
        "mode": lambda row: row.mode,
        "p": lambda row: _or_dash(row.p, "{:g}"),
        "dtype": lambda row: row.dtype,
        "device": lambda row: row.device,
    }
    known: dict[str, Callable[[Row], str]] = {
        "reference /": lambda row: _or_dash(row.reference_ratio, "{:.3g}"),
        "best peer /": lambda row: _or_dash(row.best_peer_ratio, "{:.3g}"),
        "GFLOP/s": lambda row: _or_dash(row.gflops, "{:.3g}"),
        "of matmul": lambda row: _or_dash(row.share_of_matmul, "{:.0%}"),
        "GB/s": lambda row: _or_dash(row.gbs, "{:.3g}"),
        "of bandwidth": lambda row: _or_dash(row.share_of_bandwidth, "{:.0%}"),
        "us/query": lambda row: _or_dash(row.us_per_query, "{:.3g}"),
        "peak MB": lambda row: _or_dash(row.peak_mb, "{:.0f}"),
        "error": lambda row: _or_dash(row.error, "{:.1e}"),
        "note": lambda row: row.note,
    }
    varying = {n: f for n, f in where.items() if len({f(row) for row in rows}) > 1}
    filled = {n: f for n, f in known.items() if {f(row) for row in rows} - {"-", ""}}
    sizes_first, *rest = always.items()
    columns = dict([sizes_first, *varying.items(), *rest, *filled.items()])
    return markdown(list(columns), [[form(row) for form in columns.values()] for row in rows])


def setting(rows: Sequence[Row]) -> str:
    """What the table leaves out because it is the same everywhere.

    Example:
        >>> row = Row(op="lstm", T=5, B=3, dtype="float32", mode="forward", device="cpu",
        ...           impl="torch", threads=1, p=0.5)
        >>> setting([row])
        'lstm, forward, p = 0.5, float32, cpu'
    """
    forms = {"op": "{}", "mode": "{}", "p": "p = {:g}", "dtype": "{}", "device": "{}"}
    values = {name: {getattr(row, name) for row in rows} for name in forms}
    return ", ".join(
        form.format(*values[name])
        for name, form in forms.items()
        if len(values[name]) == 1 and values[name] != {None}
    )


def _time(row: Row) -> str:
    if row.median_ms is None:
        return "-"
    return f"{ms(row.median_ms)} ({ms(row.q1_ms)}-{ms(row.q3_ms)}; {row.runs})"


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return "-"
    return f"{row.ratio:.3g} ({row.ratio_q1:.3g}-{row.ratio_q3:.3g})"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
