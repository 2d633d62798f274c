"""``bench profile``: where the time of the CPU kernels goes, phase by phase.

The compiled kernels count the ticks of their phases, in float32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch

from bench import arguments, machine, table
from bench.errors import UsageError
from bench.measure.command import add_shapes, choose_cases
from bench.operations import OPERATIONS
from bench.operations.operation import MODES, OURS, Case, Contestant, fixed_mask
from throughtime import _ext

COLUMNS = [
    "op", "shape", "threads", "where", "phase", "ms", "share", "gflops", "of_multiply_adds",
    "gbytes", "of_copying", "machine", "torch", "command",
]  # fmt: skip
PASSES = ("forward", "backward")
NO_PHASE = ("calls", "workers", "allocate", "whole")
MULTIPLY_ADDS = 100_000
COPIED = 1 << 27
BYTES = 4  # of a float32
SAVED_UNITS = 16  # what the forward pass saves is padded to whole vectors of this many elements
SAVED = 5  # i, f, g, o, c


# By pass and phase: operations (a multiply-add is two) and bytes of one iteration.
Amounts = Mapping[tuple[str, str], tuple[float, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    operations = parser.add_subparsers(title="operations", required=True, metavar="OPERATION")
    for name, operation in OPERATIONS.items():
        sub = operations.add_parser(name, help=f"phases of {name}", description=__doc__)
        add_shapes(sub, operation)
        add = sub.add_argument
        if operation.ps is not None:
            add("--p", type=arguments.probability, default=0.0, help="detached fraction (0)")
        arguments.add_threads(sub)
        text = "iterations, the fastest counts (9)"
        add("--repeats", type=arguments.positive, default=9, help=text)
        arguments.add_files(sub, plot=False)
        sub.set_defaults(run=partial(run, name), quick=False)


def run(op: str, args: argparse.Namespace) -> int:
    kernels = _ext.extension
    if kernels is None:
        raise UsageError(f"bench profile needs the compiled CPU kernels: {_ext.why_missing()}")
    torch.set_num_threads(args.threads)
    print("\n".join(machine.header()))
    rates = measure_rates(kernels)
    print(
        f"multiply-adds in registers: {rates.gflops:.0f} GFLOP/s; "
        f"copying large arrays: {rates.gbytes:.0f} GB/s\n",
        flush=True,
    )
    cases = [
        replace(case, p=getattr(args, "p", None)) for case in choose_cases(OPERATIONS[op], args)
    ]
    found = pd.concat([profile(kernels, case, rates, args.repeats) for case in cases])
    print(report(found))
    if args.csv is not None:
        found.to_csv(args.csv, index=False, float_format="%.6g")
        print(f"\nphases: {args.csv}")
    return 0


@dataclass(frozen=True)
class Rates:
    """What the machine can do: arithmetic, memory, and ticks per second of the kernels' clock."""

    gflops: float
    gbytes: float
    ticks: float


def measure_rates(kernels: Any, *, repeats: int = 5) -> Rates:
    """The best of several measurements with torch's number of threads."""
    source, target = torch.ones(COPIED // 4), torch.empty(COPIED // 4)
    start, ticks = time.perf_counter(), kernels.ticks()
    multiplying, copying = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        operations = 2 * kernels.multiply_adds(MULTIPLY_ADDS)
        middle = time.perf_counter()
        target.copy_(source)
        copying.append(2 * COPIED / (time.perf_counter() - middle))
        multiplying.append(operations / (middle - begin))
    per_second = (kernels.ticks() - ticks) / (time.perf_counter() - start)
    return Rates(max(multiplying) * 1e-9, max(copying) * 1e-9, per_second)


def amounts(case: Case) -> Amounts:
    """What the phases compute and have to move, where that is known.

    Bytes are those that a perfect cache would leave: every array once.
    """
    if case.op == "relevancy":
        return {}
    rows, inputs, hidden = case.T * case.B, case.I, case.H
    if case.op == "rel-lstm":
        recurrent = 12.0 * rows * hidden * hidden  # gates, query and key
        return {
            ("forward", "input"): (8.0 * rows * hidden * inputs, 0),
            ("forward", "recurrent"): (recurrent, 0),
            ("backward", "recurrent"): (recurrent, 0),
            ("backward", "weights"): (rows * hidden * (12.0 * hidden + 8.0 * (inputs + 1)), 0),
        }
    mask = fixed_mask(case.T, case.p)
    detached = 0 if mask is None else int(mask[1:].sum())  # at step 0 there is no product to save
    product = 8.0 * rows * hidden
    saved = SAVED * rows * -(-hidden // SAVED_UNITS) * SAVED_UNITS
    weights = 2 * BYTES * 4 * hidden * (inputs + hidden)
    pointwise = (0, BYTES * (saved + rows * hidden))  # and the outputs or their gradients
    steps = case.T - 1 - detached  # what the first step passes to the initial state is in "other"
    return {
        ("forward", "pack"): (0, weights),
        ("forward", "gather"): (0, 2 * BYTES * rows * inputs),
        ("forward", "input"): (product * inputs, 0),
        ("forward", "recurrent"): (product * hidden, 0),
        ("forward", "pointwise"): pointwise,
        ("backward", "pack"): (0, 2 * BYTES * 4 * hidden * hidden),
        ("backward", "gather"): (0, 2 * BYTES * rows * (inputs + hidden)),
        ("backward", "recurrent"): (8.0 * case.B * hidden * hidden * steps, 0),
        ("backward", "pointwise"): pointwise,
        ("backward", "weights"): (product * (inputs + hidden + 1), 0),
        ("backward", "finish"): (0, weights),
    }


def profile(kernels: Any, case: Case, rates: Rates, repeats: int) -> pd.DataFrame:
    """The phases of the fastest of ``repeats`` iterations after two that warm up."""
    work = OPERATIONS[case.op].work(Contestant(OURS, "cpu"), case)
    taken = []
    for _ in range(2 + repeats):
        kernels.set_profile(True)
        start = kernels.ticks()
        try:
            work.iterate(MODES[0])
            ticks = kernels.ticks() - start
        finally:
            kernels.set_profile(False)
        op = case.op.replace("-", "_")
        taken.append((ticks, {where: kernels.profile(f"{op}_{where}") for where in PASSES}))
    ticks, counts = min(taken[2:], key=lambda one: one[0])
    return phases(case, counts, ticks, rates)


def phases(
    case: Case, counts: Mapping[str, Mapping[str, int]], whole: int, rates: Rates
) -> pd.DataFrame:
    """The rows of an iteration of ``whole`` ticks, from the kernels' counts of each pass."""
    found: list[tuple[str, str, float]] = []
    outside = whole
    for where, count in counts.items():
        outside -= count["whole"]
        # Of a worker's time: the phases of all workers, over the workers of a call.
        workers = count["workers"] / max(1, count["calls"]) or 1
        ticks = {name: n / workers for name, n in count.items() if name not in NO_PHASE and n}
        ticks["allocate"] = count["allocate"]
        ticks["start"] = count["whole"] - sum(ticks.values())
        found += [(where, phase, n) for phase, n in ticks.items()]
        found.append((where, "whole", count["whole"]))
    found += [("Python, dispatch", "whole", outside), ("iteration", "whole", whole)]
    known = amounts(case)
    shape = str(case) + (f", p {case.p:g}" if case.p else "")
    rows = []
    for where, phase, n in found:
        row: dict[str, Any] = {"op": case.op, "shape": shape, "where": where, "phase": phase}
        row |= {"ms": n / rates.ticks * 1e3, "share": n / whole} | machine.columns()
        operations, moved = known.get((where, phase), (0, 0))
        if operations and n:
            row["gflops"] = operations / row["ms"] * 1e-6
            row["of_multiply_adds"] = row["gflops"] / rates.gflops
        if moved and n:
            row["gbytes"] = moved / row["ms"] * 1e-6
            row["of_copying"] = row["gbytes"] / rates.gbytes
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def report(found: pd.DataFrame) -> str:
    """A Markdown table, one line per phase; phases below 0.1 % are left out."""
    lines: list[Sequence[str]] = []
    for row in found[found["share"] >= 0.001].itertuples():
        line = [row.shape, row.where, row.phase, table.digits(row.ms), f"{row.share:.1%}"]
        for rate, of in ((row.gflops, row.of_multiply_adds), (row.gbytes, row.of_copying)):
            line += ["", ""] if pd.isna(rate) else [table.digits(rate), f"{of:.0%}"]
        lines.append(line)
    header = ["shape", "where", "phase", "ms", "share", "GFLOP/s", "of it", "GB/s", "of it"]
    return table.markdown(lines, header)
