"""What a benchmark leaves behind: rows of a CSV file and a Markdown table."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measurement, one line of the CSV; None stands for "not measured" (an empty field).

    ``ratio_to_torch`` is the median over rounds of nn.LSTM's time / this one's, with its
    quartiles; ``gflops`` counts the arithmetic that the implementation cannot avoid;
    ``share_of_sgemm`` is that rate over the machine's own for a large matrix product; ``error``
    is the largest relative error of any value or gradient against the float64 reference.
    """

    op: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    dtype: str
    p: float
    mode: str
    impl: str
    threads: int
    median_ms: float | None
    q1_ms: float | None
    q3_ms: float | None
    runs: int
    ratio_to_torch: float | None
    ratio_q1: float | None
    ratio_q3: float | None
    gflops: float | None
    share_of_sgemm: float | None
    peak_mb: float | None
    error: float | None
    machine: str
    torch: str
    version: str
    date: str
    command: str


COLUMNS = tuple(field.name for field in fields(Row))


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Writes the rows, one measurement per line, with a header line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _plain(value) for name, value in asdict(row).items()})


def _plain(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


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


def table(rows: Sequence[Row], labels: dict[str, str]) -> str:
    """One line per shape, mode and p of ``throughtime``, with the peers beside it.

    Args:
        rows: the measurements.
        labels: implementation -> heading, ``throughtime`` first.
    """
    peers = [impl for impl in labels if impl != "throughtime"]
    header = [
        "T, B, I, H",
        "mode",
        "p",
        f"{labels['throughtime']} ms (quartiles; runs)",
    ]
    header += [f"{labels[impl]} ms" for impl in peers]
    header += ["nn.LSTM / ours (quartiles)"] if "torch" in peers else []
    header += ["GFLOP/s", "of sgemm", "peak MB: ours, nn.LSTM", "error"]
    lines = []
    for row in rows:
        if row.impl != "throughtime":
            continue
        beside = [_find(rows, row, impl) for impl in peers]
        torch_row = _find(rows, row, "torch")
        line = [f"{row.T}, {row.B}, {row.I}, {row.H}", row.mode, f"{row.p:g}"]
        line.append(f"{ms(row.median_ms)} ({ms(row.q1_ms)}-{ms(row.q3_ms)}; {row.runs})")
        line += ["-" if peer is None else ms(peer.median_ms) for peer in beside]
        line += [_ratio(row)] if "torch" in peers else []
        line += [_or_dash(row.gflops, "{:.0f}"), _or_dash(row.share_of_sgemm, "{:.0%}")]
        memory = [_or_dash(r.peak_mb if r else None, "{:.0f}") for r in (row, torch_row)]
        line += [", ".join(memory), _or_dash(row.error, "{:.1e}")]
        lines.append(line)
    return markdown(header, lines)


def ms(value: float | None) -> str:
    """Milliseconds with three significant digits.

    Example:
        >>> ms(123.456), ms(1.23456), ms(None)
        ('123', '1.23', '-')
    """
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _find(rows: Sequence[Row], row: Row, impl: str) -> Row | None:
    """The peer's measurement of the same cell; an implementation without h-detach has p = 0."""
    same = ("T", "B", "I", "H", "dtype", "mode")
    for p in (row.p, 0.0):
        for other in rows:
            alike = all(getattr(other, name) == getattr(row, name) for name in same)
            if alike and other.impl == impl and other.p == p:
                return other
    return None


def _ratio(row: Row) -> str:
    if row.ratio_to_torch is None:
        return "-"
    return f"{row.ratio_to_torch:.2f} ({row.ratio_q1:.2f}-{row.ratio_q3:.2f})"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
