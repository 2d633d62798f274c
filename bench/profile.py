"""``bench profile``: where the time of the kernels goes, phase by phase."""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

import throughtime
from bench import arguments, cuda, machine, profile_gpu, profile_work, report
from bench.cell import DEVICES, DTYPES
from bench.errors import UsageError
from bench.profile_work import Amount, Job
from throughtime import _ext

# T, B, I, H
LSTM = (
    (784, 100, 1, 128),
    (120, 100, 1, 128),
    (100, 64, 256, 256),
    (100, 64, 512, 512),
    (100, 16, 1024, 1024),
    (300, 1, 128, 128),
    (10, 8, 512, 512),
)
NO_PHASE = ("calls", "workers", "allocate", "whole")
MULTIPLY_ADDS = 100_000
COPIED = 1 << 27


@dataclass(frozen=True)
class Row:
    """One phase of one pass, in milliseconds of one iteration.

    ``share`` is that of the iteration; ``of_multiply_adds`` and ``of_copying`` compare the rate
    with the machine's own, of multiply-adds in registers and of copying large arrays.
    """

    op: str
    shape: str
    threads: int
    where: str
    phase: str
    ms: float
    share: float
    gflops: float | None
    of_multiply_adds: float | None
    gbytes: float | None
    of_copying: float | None
    machine: str
    torch: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench profile``, one subcommand per operation."""
    operations = parser.add_subparsers(title="operations", required=True, metavar="OPERATION")

    def operation(name: str, text: str, sizes: Mapping[str, int]) -> argparse.ArgumentParser:
        sub = operations.add_parser(name, help=text, description=__doc__)
        for size, default in sizes.items():
            shown = f"({default}; without any size a list of shapes)" if name == "lstm" else ""
            sub.add_argument(
                f"--{size}", type=arguments.positive, nargs="+", help=shown or f"({default})"
            )
        sub.add_argument("--threads", type=arguments.positive, help="(as torch has them)")
        sub.add_argument(
            "--repeats",
            type=arguments.positive,
            default=9,
            help="iterations, the fastest counts (9)",
        )
        sub.add_argument("--csv", type=Path, metavar="FILE", help="write every phase")
        sub.set_defaults(run=run, operation=name, sizes=sizes)
        return sub

    shape = {"T": 100, "B": 64, "I": 256, "H": 256}
    add = operation("lstm", "one LSTM layer", shape).add_argument
    add("--p", type=arguments.probability, default=0.0, help="detached fraction of the steps (0)")
    add("--device", choices=DEVICES, default="cpu", help="(cpu)")
    add("--dtype", choices=DTYPES, default="float32", help="on a GPU (float32)")
    shape = {"T": 120, "B": 64, "I": 10, "H": 128, "window": 10, "top-k": 15}
    operation("rel-lstm", "one RelLSTM layer", shape)
    shape = {"T": 2048, "B": 2, "heads": 4, "D": 64, "window": 64, "top-k": 64}
    add = operation("relevancy", "relevancy attention", shape).add_argument
    add("--score", choices=("dot", "additive"), default="dot")


def run(args: argparse.Namespace) -> int:
    """Profiles every combination of the sizes and prints one table."""
    if getattr(args, "device", "cpu") == "cuda":
        return _run_on_gpu(args)
    if getattr(args, "dtype", "float32") != "float32":
        raise UsageError(
            f"--dtype {args.dtype}: the CPU kernels are profiled in float32, others on a GPU"
        )
    kernels = _ext.extension
    if kernels is None:
        raise UsageError(f"bench profile needs the compiled CPU kernels: {_ext.why_missing()}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    for line in machine.header():
        print(line)
    warning = machine.busy()
    if warning:
        print(f"warning: {warning}")
    rates = measure_rates(kernels)
    print(
        f"multiply-adds in registers: {rates.gflops:.0f} GFLOP/s; "
        f"copying large arrays: {rates.gbytes:.0f} GB/s\n",
        flush=True,
    )
    rows = [row for job in _jobs(args) for row in profile(kernels, job, rates, args.repeats)]
    return _show(rows, args.csv)


def _show(rows: Sequence[Row], path: Path | None) -> int:
    print(table(rows))
    if path is not None:
        write_csv(path, rows)
        print(f"\nphases: {path}")
    return 0


def _run_on_gpu(args: argparse.Namespace) -> int:
    reason = cuda.why_not()
    if reason is not None:
        raise UsageError(f"--device cuda: {reason}")
    for line in machine.header(["cuda"]):
        print(line)
    rows = []
    for shape in _shapes(args):
        dtype = DTYPES[args.dtype]
        explained = throughtime.explain("lstm", hidden_size=shape[3], dtype=dtype, device="cuda")
        kernels: Any = "cuda" if explained.chosen == "cuda" else "triton"
        made = profile_gpu.parts(shape, args.p, dtype, kernels, "cuda")
        rows += gpu_rows(made, shape, cuda.EventTimer(), args.repeats, kernels)
    return _show(rows, args.csv)


def gpu_rows(
    made: Sequence[profile_gpu.Part],
    shape: tuple[int, ...],
    timer: profile_gpu.Timer,
    repeats: int,
    kernels: str,
) -> list[Row]:
    """Rows of parts that were timed one by one; the last of them is the whole.

    Args:
        made: by :func:`profile_gpu.parts`.
        shape: T, B, I, H.
        timer: seconds of so many runs.
        repeats: runs, of which the fastest counts.
        kernels: their name, which stands beside the shape.
    """
    taken = [profile_gpu.seconds(part, timer, repeats) for part in made]
    return [
        Row(
            op="lstm",
            shape=f"{', '.join(map(str, shape))} ({kernels})",
            threads=torch.get_num_threads(),
            where=part.where,
            phase=part.phase,
            ms=spent * 1e3,
            share=spent / taken[-1],
            gflops=part.operations / spent * 1e-9 if part.operations else None,
            of_multiply_adds=None,
            gbytes=None,
            of_copying=None,
            machine=machine.name("cuda"),
            torch=torch.__version__,
        )
        for part, spent in zip(made, taken, strict=True)
    ]


def _shapes(args: argparse.Namespace) -> list[tuple[int, ...]]:
    given = {size: getattr(args, size.replace("-", "_")) for size in args.sizes}
    if args.operation == "lstm" and not any(given.values()):
        return list(LSTM)
    return list(itertools.product(*(given[k] or [args.sizes[k]] for k in args.sizes)))


def _jobs(args: argparse.Namespace) -> list[Job]:
    shapes = _shapes(args)
    if args.operation == "lstm":
        return [profile_work.lstm(*shape, p=args.p) for shape in shapes]
    if args.operation == "rel-lstm":
        return [profile_work.rel_lstm(*shape) for shape in shapes]
    return [profile_work.relevancy(*shape, score=args.score) for shape in shapes]


@dataclass(frozen=True)
class Rates:
    """What the machine can do: arithmetic, memory, and ticks per second of the kernels' clock."""

    gflops: float
    gbytes: float
    ticks: float


def measure_rates(kernels: Any, *, repeats: int = 5) -> Rates:
    """The best of several measurements with torch's number of threads.

    Args:
        kernels: the compiled extension.
        repeats: how many.
    """
    source, target = torch.ones(COPIED // 4), torch.empty(COPIED // 4)
    start, ticks = time.perf_counter(), kernels.ticks()
    multiplying, copying = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        operations = 2 * kernels.multiply_adds(MULTIPLY_ADDS)
        middle = time.perf_counter()
        target.copy_(source)
        end = time.perf_counter()
        multiplying.append(operations / (middle - begin))
        copying.append(2 * COPIED / (end - middle))
    per_second = (kernels.ticks() - ticks) / (time.perf_counter() - start)
    return Rates(max(multiplying) * 1e-9, max(copying) * 1e-9, per_second)


def profile(kernels: Any, job: Job, rates: Rates, repeats: int) -> list[Row]:
    """The phases of the fastest of ``repeats`` iterations.

    Args:
        kernels: the compiled extension.
        job: what runs.
        rates: of this machine.
        repeats: iterations after two that warm up.
    """
    fastest, counts = None, {}
    for _ in range(2):
        job.iterate()
    for _ in range(repeats):
        kernels.set_profile(True)
        start = kernels.ticks()
        try:
            job.iterate()
            ticks = kernels.ticks() - start
        finally:
            kernels.set_profile(False)
        if fastest is None or ticks < fastest:
            fastest, counts = ticks, {op: kernels.profile(op) for op in job.passes}
    assert fastest is not None
    return _rows(job, counts, fastest, rates)


def _rows(job: Job, counts: Mapping[str, Mapping[str, int]], whole: int, rates: Rates) -> list[Row]:
    def row(where: str, phase: str, ticks: float) -> Row:
        seconds = ticks / rates.ticks
        amount = job.amounts.get((where, phase), Amount())
        gflops = amount.operations / seconds * 1e-9 if amount.operations and seconds else None
        gbytes = amount.bytes / seconds * 1e-9 if amount.bytes and seconds else None
        return Row(
            op=job.op,
            shape=job.shape,
            threads=torch.get_num_threads(),
            where=where,
            phase=phase,
            ms=seconds * 1e3,
            share=ticks / whole,
            gflops=gflops,
            of_multiply_adds=gflops / rates.gflops if gflops is not None else None,
            gbytes=gbytes,
            of_copying=gbytes / rates.gbytes if gbytes is not None else None,
            machine=machine.name(),
            torch=torch.__version__,
        )

    rows = []
    outside = whole
    for op, where in job.passes.items():
        count = counts[op]
        outside -= count["whole"]
        # Of a worker's time: the phases of all workers, over the workers of a call.
        workers = count["workers"] / max(1, count["calls"]) or 1
        phases = {name: n / workers for name, n in count.items() if name not in NO_PHASE and n}
        phases["allocate"] = count["allocate"]
        phases["start"] = count["whole"] - sum(phases.values())
        rows += [row(where, phase, ticks) for phase, ticks in phases.items()]
        rows.append(row(where, "whole", count["whole"]))
    rows.append(row("Python, dispatch", "whole", outside))
    rows.append(row("iteration", "whole", whole))
    return rows


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, one line per phase; phases below 0.1 % are left out.

    Args:
        rows: of any number of shapes.
    """
    header = ["shape", "where", "phase", "ms", "share", "GFLOP/s", "of it", "GB/s", "of it"]
    lines = []
    for row in rows:
        if row.share < 0.001:
            continue
        line = [row.shape, row.where, row.phase, report.ms(row.ms), f"{row.share:.1%}"]
        for rate, of in ((row.gflops, row.of_multiply_adds), (row.gbytes, row.of_copying)):
            line += ["" if rate is None else f"{rate:.3g}", "" if of is None else f"{of:.0%}"]
        lines.append(line)
    return report.markdown(header, lines)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line per phase, with a header line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            )
