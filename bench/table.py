"""The one table of all benchmarks: written to CSV, read again, shown as Markdown.

README.md says what every column means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from bench.arguments import UsageError
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
    **dict.fromkeys(("share_of_bandwidth", "us_per_query", "peak_mb"), _NUMBER),
    **dict.fromkeys(("error", "rms_error"), _NUMBER),
    **dict.fromkeys(("note", "machine", "torch", "version", "date", "command"), _TEXT),
}
NEVER_EMPTY = ["op", "T", "B", "dtype", "mode", "device", "impl", "threads"]
ADDED = ("screen_every",)  # files lack these where no row has them
NO_DETACH = "no h-detach: timed at p = 0"


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a table with all columns; texts that are not given are empty."""
    found = pd.DataFrame(list(rows), columns=list(COLUMNS)).astype(dict(COLUMNS))
    texts = [name for name, kind in COLUMNS.items() if kind == _TEXT]
    return found.fillna(dict.fromkeys(texts, ""))


def write_csv(path: Path, found: pd.DataFrame) -> None:
    """Write one line per row; numbers have six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = found.drop(columns=[name for name in ADDED if found[name].isna().all()])
    found.to_csv(path, index=False, float_format="%.6g")


def read_csv(path: Path) -> pd.DataFrame:
    """The rows of a file of ``write_csv``; anything else is a ``UsageError``."""
    try:
        found = pd.read_csv(path, dtype=dict(COLUMNS), keep_default_na=False, na_values=[""])
        for name in set(ADDED) - set(found.columns):
            found.insert(list(COLUMNS).index(name), name, pd.NA)
        if list(found.columns) != list(COLUMNS):
            different = ", ".join(sorted(set(found.columns) ^ set(COLUMNS)))
            raise ValueError(f"lacks or adds {different or 'nothing, but in another order'}")
        empty = [name for name in NEVER_EMPTY if found[name].isna().any()]
        if empty:
            raise ValueError(f"{', '.join(empty)} is empty somewhere")
        return frame(found.to_dict("records"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: {reason}: measure again by the command that wrote it") from error


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


# Columns of the printed table after the time; what is empty everywhere is left out.
_NUMBERS = {
    "reference_ratio": digits,
    "best_peer_ratio": digits,
    "gflops": digits,
    "share_of_matmul": "{:.0%}".format,
    "gbs": digits,
    "share_of_bandwidth": "{:.0%}".format,
    "us_per_query": digits,
    "peak_mb": digits,
    "error": "{:.1e}".format,
    "rms_error": "{:.1e}".format,
    "note": str,
}


def report(found: pd.DataFrame) -> str:
    """The measurements of one operation as Markdown, under a line of what all rows share."""
    shown = pd.DataFrame({OPERATIONS[found["op"].iloc[0]].heading: found.apply(sizes_text, axis=1)})
    shared = []
    for name in ("op", "mode", "p", "dtype", "device"):
        if found[name].nunique(dropna=False) > 1:
            shown[name] = found[name]
        elif found[name].notna().any():
            shared.append(f"{name} {found[name].iloc[0]}")
    shown["implementation"] = found.apply(contestant, axis=1)
    rows = list(found.itertuples())
    shown["ms (quartiles; runs)"] = [
        f"{digits(row.median_ms)} ({digits(row.q1_ms)}-{digits(row.q3_ms)}; {row.runs})"
        for row in rows
    ]
    shown["/ ours (quartiles)"] = [
        f"{digits(row.ratio)} ({digits(row.ratio_q1)}-{digits(row.ratio_q3)})" for row in rows
    ]
    for name, form in _NUMBERS.items():
        if found[name].replace("", None).notna().any():
            shown[name] = ["-" if pd.isna(value) else form(value) for value in found[name]]
    return (
        f"{', '.join(shared)}\n\n{markdown(shown.astype(str).to_numpy().tolist(), shown.columns)}"
    )
