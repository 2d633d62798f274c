"""The one table that every benchmark writes and every plot, page and comparison reads.

A row is one measurement: one contestant (``impl``, ``backend``) in one cell (sizes, ``dtype``,
``p``, ``mode``, ``device``, ``threads``) on one machine. The CSV has one line per row and one
column per field of ``Row``; an empty field means "not measured" or "this operation has no such
size", and where a row has no time at all, ``note`` says why. ``SCHEMA`` is the list of the columns
with their meaning; ``python -m bench schema`` prints it.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from bench.errors import UsageError


def _required(meaning: str) -> Any:
    return field(metadata={"meaning": meaning})


def _optional(meaning: str, default: Any = None) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement, one line of the CSV; None stands for an empty field.

    Example:
        >>> row = Row(
        ...     op="lstm", T=5, B=3, dtype="float32", mode="forward", device="cpu",
        ...     impl="torch", threads=2,
        ... )
        >>> row.median_ms is None, row.ours
        (True, False)
    """

    op: str = _required("operation: lstm, rel-lstm or relevancy")
    T: int = _required("steps")
    B: int = _required("batch")
    I: int | None = _optional("features per step (lstm, rel-lstm)")  # noqa: E741
    H: int | None = _optional("units (lstm, rel-lstm)")
    heads: int | None = _optional("attention heads (relevancy)")
    D: int | None = _optional("features per head (relevancy)")
    window_size: int | None = _optional("each query's latest keys, attended (rel-lstm, relevancy)")
    top_k: int | None = _optional("and at most this many retained ones (rel-lstm, relevancy)")
    score: str | None = _optional("score of the attention: dot or additive (rel-lstm, relevancy)")
    dtype: str = _required("of input and weights: float32, float64, bfloat16 or float16")
    p: float | None = _optional("detached fraction of the steps, 0 to 1 (lstm, rel-lstm)")
    mode: str = _required("forward+backward; forward (keeping what backward needs); or inference")
    device: str = _required("cpu or cuda")
    impl: str = _required("who computed: throughtime (ours) or the name of a peer")
    backend: str | None = _optional("which of our kernels ran; empty for a peer")
    threads: int = _required("threads of the CPU that torch may use")
    median_ms: float | None = _optional("median time of one iteration, milliseconds")
    q1_ms: float | None = _optional("lower quartile of it")
    q3_ms: float | None = _optional("upper quartile of it")
    runs: int | None = _optional("rounds that the median is taken over; contestants alternate")
    ratio: float | None = _optional(
        "this row's time / ours, median over the rounds that both ran in; ours is throughtime "
        "with the first of the backends that could run, so that there it is 1"
    )
    ratio_q1: float | None = _optional("lower quartile of ratio")
    ratio_q3: float | None = _optional("upper quartile of ratio")
    reference_ratio: float | None = _optional(
        "time of our plain PyTorch reference / this row's, median over common rounds"
    )
    best_peer_ratio: float | None = _optional(
        "only for ours: time of the fastest peer / this row's, median over common rounds"
    )
    gflops: float | None = _optional(
        "10^9 operations per second; counted are the products that nobody can avoid"
    )
    share_of_matmul: float | None = _optional(
        "gflops / rate of a large matrix product, measured in between (on a CPU in float32, or "
        "float64; on a GPU in the row's dtype, by its tensor cores if it has them for that)"
    )
    gbs: float | None = _optional(
        "10^9 bytes per second; counted is the traffic that nobody can avoid: inputs, weights, "
        "outputs and their gradients, each once per pass"
    )
    share_of_bandwidth: float | None = _optional(
        "gbs / memory bandwidth of a large copy, measured in between"
    )
    us_per_query: float | None = _optional(
        "median in microseconds / number of queries (B * heads * T) or of states (B * T)"
    )
    peak_mb: float | None = _optional(
        "growth of memory from before one iteration to its peak, 2^20 bytes, in a new process: "
        "the resident set, or what torch allocated on the GPU"
    )
    error: float | None = _optional(
        "largest relative error of any value or gradient against float64 at a shorter T: against "
        "the reference, or, for a peer that computes another function, against itself"
    )
    note: str = _optional("why there is no time, or what a reader must know", "")
    machine: str = _optional("processor or GPU, cores and operating system", "")
    torch: str = _optional("version of torch", "")
    version: str = _optional("version of throughtime", "")
    date: str = _optional("when, ISO 8601 with the zone", "")
    command: str = _optional("the command that measured", "")

    @property
    def ours(self) -> bool:
        """Whether this package computed."""
        return self.impl == "throughtime"

    @property
    def contestant(self) -> str:
        """``impl``, and for ours the backend: ``"throughtime (cpu)"``."""
        return f"{self.impl} ({self.backend})" if self.backend else self.impl

    @property
    def cell(self) -> tuple[object, ...]:
        """What rows have in common that were measured against each other; compares and hashes."""
        return tuple(getattr(self, name) for name in CELL)


CELL = (
    *("op", "T", "B", "I", "H", "heads", "D", "window_size", "top_k", "score"),
    *("dtype", "p", "mode", "device", "threads", "machine"),
)
SCHEMA: Mapping[str, str] = {column.name: column.metadata["meaning"] for column in fields(Row)}
_TYPES: Mapping[str, type] = {
    name: next(kind for kind in (get_args(hint) or (hint,)) if kind is not type(None))
    for name, hint in get_type_hints(Row).items()
}
_EMPTY_TEXT = tuple(column.name for column in fields(Row) if column.default == "")


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Writes the rows, one line each, under a line with the names of the columns.

    Args:
        path: the file; its folder is made, an old file replaced.
        rows: the measurements.

    Example:
        >>> import tempfile
        >>> row = Row(op="lstm", T=1, B=1, dtype="float32", mode="forward", device="cpu",
        ...           impl="loop", threads=1, median_ms=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_csv(Path(folder, "rows.csv"), [row])
        ...     read_csv(Path(folder, "rows.csv")) == [row]
        True
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(SCHEMA), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _text(value) for name, value in asdict(row).items()})


def read_csv(path: Path) -> list[Row]:
    """The rows of a file of ``write_csv``.

    Args:
        path: the file.

    Returns:
        Its rows in their order; a float has the six digits that were written.

    Raises:
        UsageError: if there is no such file, its columns are not those of ``SCHEMA`` (an older
            version wrote it), or a field is no number where one is wanted.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            _check_columns(path, list(reader.fieldnames or ()))
            return [_row(path, reader.line_num, fields) for fields in reader]
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _check_columns(path: Path, found: list[str]) -> None:
    if found == list(SCHEMA):
        return
    lacking = [name for name in SCHEMA if name not in found]
    unknown = [name for name in found if name not in SCHEMA]
    parts = [f"lacks {', '.join(lacking)}"] if lacking else []
    parts += [f"has {', '.join(unknown)}"] if unknown else []
    raise UsageError(
        f"{path}: wanted the columns of `python -m bench schema`, but it "
        f"{' and '.join(parts) or 'has them in another order'}: measure again by the command that "
        "wrote it (an older version's table cannot be read)"
    )


def _row(path: Path, line: int, texts: Mapping[str, str]) -> Row:
    if None in texts.values() or not texts.keys() <= SCHEMA.keys():  # too few fields, too many
        raise UsageError(f"{path}, line {line}: wanted {len(SCHEMA)} fields: measure again")
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if text == "":
            values[name] = "" if name in _EMPTY_TEXT else None
            continue
        try:
            values[name] = _TYPES[name](text)
        except ValueError:
            wanted = "a whole number" if _TYPES[name] is int else "a number"
            raise UsageError(
                f"{path}, line {line}: {name} wants {wanted}, got {text!r}: measure again"
            ) from None
    missing = [c.name for c in fields(Row) if c.default is not None and values[c.name] is None]
    if missing:
        raise UsageError(f"{path}, line {line}: {', '.join(missing)} is empty: measure again")
    return Row(**values)


def _text(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def schema_text() -> str:
    """The columns with their meaning, for people.

    Example:
        >>> schema_text().splitlines()[0]
        'op                  operation: lstm, rel-lstm or relevancy'
    """
    width = max(map(len, SCHEMA)) + 2
    return "\n".join(f"{name:{width}}{meaning}" for name, meaning in SCHEMA.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``bench schema``, which has no options."""
    parser.set_defaults(run=_print_schema)


def _print_schema(args: argparse.Namespace) -> int:
    print(schema_text())
    return 0
