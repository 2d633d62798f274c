"""The one table of all benchmarks: written to CSV, read again, shown as Markdown.

README.md says what every column means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from bench.errors import UsageError
from bench.operations import OPERATIONS
from bench.operations.operation import SIZES, sizes_text

_TEXT, _WHOLE, _NUMBER = "object", "Int64", "float64"
COLUMNS: Mapping[str, str] = {
    "op": _TEXT,
    **dict.fromkeys(SIZES, _WHOLE),
    "score": _TEXT,
    "dtype": _TEXT,
    "p": _NUMBER,
    **dict.fromkeys(("mode", "device", "impl", "backend"), _TEXT),
    "threads": _WHOLE,
    **dict.fromkeys(("median_ms", "q1_ms", "q3_ms"), _NUMBER),
    "runs": _WHOLE,
    **dict.fromkeys(("ratio", "ratio_q1", "ratio_q3", "reference_ratio"), _NUMBER),
    **dict.fromkeys(("best_peer_ratio", "gflops", "share_of_matmul", "gbs"), _NUMBER),
    **dict.fromkeys(("share_of_bandwidth", "us_per_query", "peak_mb", "error"), _NUMBER),
    **dict.fromkeys(("note", "machine", "torch", "version", "date", "command"), _TEXT),
}
NEVER_EMPTY = ["op", "T", "B", "dtype", "mode", "device", "impl", "threads"]
NO_DETACH = "no h-detach: timed at p = 0"


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a table with all columns; texts that are not given are empty."""
    return _typed(pd.DataFrame(list(rows), columns=list(COLUMNS)))


def _typed(found: pd.DataFrame) -> pd.DataFrame:
    texts = [name for name, kind in COLUMNS.items() if kind == _TEXT]
    found = found.astype(dict(COLUMNS))
    found[texts] = found[texts].fillna("")
    return found


def write_csv(path: Path, found: pd.DataFrame) -> None:
    """Write one line per row; numbers have six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found.to_csv(path, index=False, float_format="%.6g")


def read_csv(path: Path) -> pd.DataFrame:
    """The rows of a file of ``write_csv``; anything else is a ``UsageError``."""
    try:
        found = pd.read_csv(path, dtype="object", keep_default_na=False, na_values=[""])
        if list(found.columns) != list(COLUMNS):
            raise ValueError(_difference(list(found.columns)))
        for name, kind in COLUMNS.items():
            if kind != _TEXT:
                found[name] = _numbers(found[name])
        empty = [name for name in NEVER_EMPTY if found[name].isna().any()]
        if empty:
            raise ValueError(f"{', '.join(empty)} is empty somewhere")
        return _typed(found)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: {reason}: measure again by the command that wrote it") from error


def _numbers(column: pd.Series) -> pd.Series:
    try:
        return pd.to_numeric(column)
    except ValueError as error:
        raise ValueError(f"{column.name}: {error}") from error


def _difference(found: list[str]) -> str:
    lacking = [name for name in COLUMNS if name not in found]
    unknown = [name for name in found if name not in COLUMNS]
    parts = [f"lacks {', '.join(lacking)}"] if lacking else []
    parts += [f"has {', '.join(unknown)}"] if unknown else []
    return " and ".join(parts) or "has the columns in another order"


def contestant(row: Any) -> str:
    """``impl``, and for ours the backend: ``"throughtime (cpu)"``."""
    return f"{row.impl} ({row.backend})" if row.backend else str(row.impl)


def markdown(rows: Iterable[Iterable[str]], header: Iterable[str]) -> str:
    return str(tabulate(rows, list(header), tablefmt="github", disable_numparse=True))


def digits(value: float) -> str:
    """Three significant digits, and an empty value as a dash."""
    if pd.isna(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


# Heads of the printed table -> how the text of a row is made; what is empty everywhere is left out.
_WHERE = ("mode", "p", "dtype", "device")
_NUMBERS = {
    "reference /": ("reference_ratio", digits),
    "best peer /": ("best_peer_ratio", digits),
    "GFLOP/s": ("gflops", digits),
    "of matmul": ("share_of_matmul", "{:.0%}".format),
    "GB/s": ("gbs", digits),
    "of bandwidth": ("share_of_bandwidth", "{:.0%}".format),
    "us/query": ("us_per_query", digits),
    "peak MB": ("peak_mb", digits),
    "error": ("error", "{:.1e}".format),
}


def report(found: pd.DataFrame) -> str:
    """The measurements of one operation as Markdown, under a line of what all rows share."""
    shared = [name for name in ("op", *_WHERE) if found[name].nunique(dropna=False) == 1]
    values = found.iloc[0]
    setting = [f"p = {values.p:g}" if name == "p" else values[name] for name in shared]
    if "p" in shared and pd.isna(values.p):
        setting.pop(shared.index("p"))
    shown = pd.DataFrame({OPERATIONS[values.op].heading: found.apply(sizes_text, axis=1)})
    for name in _WHERE:
        if name not in shared:
            shown[name] = found[name].map("{:g}".format if name == "p" else str)
    shown["implementation"] = found.apply(contestant, axis=1)
    shown["ms (quartiles; runs)"] = found.apply(_time, axis=1)
    shown["/ ours (quartiles)"] = found.apply(_ratio, axis=1)
    for head, (name, form) in _NUMBERS.items():
        if found[name].notna().any():
            shown[head] = ["-" if pd.isna(value) else form(value) for value in found[name]]
    if found["note"].any():
        shown["note"] = found["note"]
    return f"{', '.join(setting)}\n\n{markdown(shown.to_numpy().tolist(), shown.columns)}"


def _time(row: Any) -> str:
    if pd.isna(row.median_ms):
        return "-"
    return f"{digits(row.median_ms)} ({digits(row.q1_ms)}-{digits(row.q3_ms)}; {row.runs})"


def _ratio(row: Any) -> str:
    if pd.isna(row.ratio):
        return "-"
    return f"{digits(row.ratio)} ({digits(row.ratio_q1)}-{digits(row.ratio_q3)})"
