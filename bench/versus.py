"""One operation against its peers: gate, alternated timing, memory, table, CSV. For any operation.

``bench lstm`` has its own command, because it also varies the detach probability.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from throughtime.bench import arguments, machine, measure, memory, report
from throughtime.bench.cases import MODES
from throughtime.bench.errors import UsageError, require
from throughtime.bench.gate import Errors

import throughtime

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Case(Protocol):
    """Sizes of one measurement; ``str()`` of it heads a line of the table."""

    def columns(self) -> dict[str, int | str]:
        """Its columns of the CSV."""

    @property
    def queries(self) -> int:
        """How often something is computed per iteration: the time per query is reported."""


class Operation(Protocol):
    """What the engine needs to know of an operation; ``throughtime`` is among ``labels``."""

    name: str
    heading: str  # of the column of cases

    @property
    def labels(self) -> Mapping[str, str]:
        """Implementation -> name for people, ours first."""

    def why_not(self, impl: str, case: Any) -> str | None:
        """Why an implementation is not measured at a case, or None."""

    def work(
        self, impl: str, case: Any, dtype: torch.dtype, backend: str
    ) -> Callable[[str], object]:
        """One iteration of a mode of ``cases.MODES``."""

    def errors(self, impl: str, case: Any, dtype: torch.dtype, backend: str) -> Errors | None:
        """Errors against the float64 reference; None if it computes another function."""

    def memory_arguments(self, case: Any) -> list[str]:
        """From which ``python -m throughtime.bench.<name>`` makes the case again."""


@dataclass(frozen=True)
class Row:
    """One measurement, one line of the CSV; None stands for "not measured" (an empty field).

    Sizes that an operation does not have are empty. ``ratio`` is the median over rounds of this
    implementation's time / ours, with its quartiles; ``us_per_query`` is the median divided by the
    number of queries (B * heads * T) or rows (B * T); ``error`` is the largest relative error
    against the float64 reference, empty for a peer that computes another function; ``note`` says
    why something was not measured.
    """

    op: str
    T: int
    B: int
    heads: int | None
    D: int | None
    I: int | None  # noqa: E741
    H: int | None
    window_size: int
    top_k: int
    score: str
    dtype: str
    mode: str
    impl: str
    threads: int
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    runs: int | None = None
    ratio: float | None = None
    ratio_q1: float | None = None
    ratio_q3: float | None = None
    us_per_query: float | None = None
    peak_mb: float | None = None
    error: float | None = None
    note: str = ""
    machine: str = ""
    torch: str = ""
    version: str = ""
    date: str = ""
    command: str = ""


def add_arguments(parser: argparse.ArgumentParser, operation: Operation) -> None:
    """The options that every operation has."""
    peers = [impl for impl in operation.labels if impl != "throughtime"]
    add = parser.add_argument_group("what is measured").add_argument
    add("--dtype", choices=DTYPES, default="float32", help="(float32)")
    add("--modes", choices=MODES, nargs="+", default=MODES[:1], help="(forward+backward)")
    add("--peers", choices=peers, nargs="*", default=peers, help=f"({' '.join(peers)})")
    add("--backend", default="auto", help="which kernels throughtime uses (auto)")
    add("--threads", type=arguments.positive, help="threads of each (as torch has them)")
    add("--no-memory", action="store_true", help="leave out peak memory")
    add("--repeats", type=arguments.positive, help="number of rounds (at least 5 and 1.5 s)")
    add("--quick", action="store_true", help="fewer shapes, shorter, no memory: under 30 s")
    add = parser.add_argument_group("files").add_argument
    add("--csv", type=Path, metavar="FILE", help="write every measurement")
    add("--plot", type=Path, metavar="FILE", help="draw them (svg, png, pdf)")


def run(args: argparse.Namespace, operation: Operation, chosen: Sequence[Any]) -> int:
    """Measures the cases; returns 1 if a gated implementation computed something wrong."""
    for module in ("tqdm", *(["matplotlib"] if args.plot is not None else [])):
        require(module)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    for line in machine.header():
        print(line)
    print(flush=True)
    warning = machine.busy()
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    rows: list[Row] = []
    with require("tqdm").tqdm(
        total=len(chosen) * len(args.modes), unit="cell", file=sys.stderr, disable=None
    ) as bar:
        for case in chosen:
            for mode in args.modes:
                bar.set_postfix_str(f"{case}, {mode}")
                rows += _cell(args, operation, case, mode)
                bar.update()
    print(table(rows, operation, chosen))
    for row in rows:
        if row.note:
            print(f"\n{operation.labels[row.impl]}, T = {row.T}, B = {row.B}: {row.note}")
    for impl in dict.fromkeys(r.impl for r in rows if r.median_ms is not None and r.error is None):
        print(f"\n{operation.labels[impl]} computes another function: a peer in speed only")
    if args.csv is not None:
        write_csv(args.csv, rows)
        print(f"\nmeasurements: {args.csv}")
    if args.plot is not None:
        from throughtime.bench import plots

        plots.save(plots.versus(rows, operation.labels), args.plot)
        print(f"plot: {args.plot}")
    return 1 if any(row.note.startswith("WRONG") for row in rows) else 0


def _cell(args: argparse.Namespace, operation: Operation, case: Any, mode: str) -> list[Row]:
    dtype = DTYPES[args.dtype]
    rows: dict[str, Row] = {}
    runs: dict[str, Callable[[], object]] = {}
    for impl in ("throughtime", *args.peers):
        note = operation.why_not(impl, case) or ""
        errors = None
        if not note:
            try:
                errors = operation.errors(impl, case, dtype, args.backend)
            except (RuntimeError, ValueError) as error:
                if impl == "throughtime":
                    raise UsageError(f"{case}: {str(error).splitlines()[0]}") from error
                note = f"cannot run: {str(error).splitlines()[0]}"
        if errors is not None and not errors.passed:
            note = (
                f"WRONG RESULTS, no speed reported: error of {errors.worst} is "
                f"{errors.largest:.1e} against the float64 reference, allowed {errors.limit:.1e}"
            )
        rows[impl] = _row(args, operation, case, mode, impl, errors, note)
        if not note:
            iterate = operation.work(impl, case, dtype, args.backend)
            runs[impl] = functools.partial(iterate, mode)
    if not runs:
        return list(rows.values())
    plan = measure.Plan(seconds=0.5 if args.quick else 1.5)
    if args.repeats is not None:
        plan = measure.Plan(rounds=args.repeats, exactly=True)
    samples = measure.alternate(runs, plan)
    ours = samples.get("throughtime")
    return [
        _measured(args, operation, case, row, samples[impl], ours) if impl in samples else row
        for impl, row in rows.items()
    ]


def _row(
    args: argparse.Namespace,
    operation: Operation,
    case: Any,
    mode: str,
    impl: str,
    errors: Errors | None,
    note: str,
) -> Row:
    sizes = dict.fromkeys(("heads", "D", "I", "H"), None) | case.columns()
    return Row(
        op=operation.name,
        **sizes,
        dtype=args.dtype,
        mode=mode,
        impl=impl,
        threads=torch.get_num_threads(),
        error=None if errors is None else errors.largest,
        note=note,
        machine=machine.name(),
        torch=torch.__version__,
        version=throughtime.__version__,
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        command=shlex.join(sys.argv),
    )


def _measured(
    args: argparse.Namespace,
    operation: Operation,
    case: Any,
    row: Row,
    taken: measure.Samples,
    ours: measure.Samples | None,
) -> Row:
    q1, median, q3 = taken.quartiles_ms()
    ratio_q1, ratio, ratio_q3 = taken.ratio_to(ours) if ours else (None, None, None)
    peak = None
    if row.mode == "forward+backward" and not (args.no_memory or args.quick):
        module = f"throughtime.bench.{operation.name.replace('-', '_')}"
        options = [row.impl, *operation.memory_arguments(case), args.dtype, args.backend]
        peak = memory.in_new_process(module, options)
    return Row(
        **{
            **asdict(row),
            "median_ms": median,
            "q1_ms": q1,
            "q3_ms": q3,
            "runs": len(taken.seconds),
            "ratio": ratio,
            "ratio_q1": ratio_q1,
            "ratio_q3": ratio_q3,
            "us_per_query": median * 1e3 / case.queries,
            "peak_mb": peak,
        }
    )


def print_growth(operation: Operation, tiny: Any, case: Any, rest: Sequence[str]) -> None:
    """What a new process does to measure memory; ``rest`` is impl, dtype, backend, threads."""
    impl, dtype, backend, threads = rest
    torch.set_num_threads(int(threads))
    operation.work(impl, tiny, DTYPES[dtype], backend)("forward+backward")
    iterate = operation.work(impl, case, DTYPES[dtype], backend)
    print(memory.growth_mb(lambda: iterate("forward+backward")))


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows, one measurement per line, with a header line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            plain = asdict(row).items()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in plain})


def table(rows: Sequence[Row], operation: Operation, chosen: Sequence[Any]) -> str:
    """One line per case and mode: ours, then every peer with its time divided by ours."""
    impls = list(dict.fromkeys(row.impl for row in rows))
    header = [operation.heading, "mode", "throughtime ms (quartiles; runs)", "us per query", "MB"]
    for impl in impls[1:]:
        header += [f"{operation.labels[impl]} ms", "/ ours (quartiles)", "MB"]
    lines = []
    for case in chosen:
        for mode in dict.fromkeys(row.mode for row in rows):
            sizes = case.columns()
            cell = {
                row.impl: row
                for row in rows
                if row.mode == mode and all(getattr(row, k) == v for k, v in sizes.items())
            }
            ours = cell["throughtime"]
            quartiles = f"({report.ms(ours.q1_ms)}-{report.ms(ours.q3_ms)}; {ours.runs})"
            line = [str(case), mode, f"{report.ms(ours.median_ms)} {quartiles}"]
            line += [_or_dash(ours.us_per_query, "{:.3g}"), _or_dash(ours.peak_mb, "{:.0f}")]
            for impl in impls[1:]:
                peer = cell[impl]
                line += [report.ms(peer.median_ms), _ratio(peer), _or_dash(peer.peak_mb, "{:.0f}")]
            lines.append(line)
    return report.markdown(header, lines)


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return "-"
    return f"{row.ratio:.3g} ({row.ratio_q1:.3g}-{row.ratio_q3:.3g})"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
