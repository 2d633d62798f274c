"""``bench profile``: where the time of the CPU kernels goes, phase by phase.

The compiled kernels count the ticks of their phases.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch

from bench import arguments, machine, table
from bench.arguments import UsageError
from bench.measure.command import add_shapes, choose_cases
from bench.operations import OPERATIONS
from bench.operations.operation import (
    AUTOCAST,
    MODES,
    OURS,
    PRECISIONS,
    Case,
    Contestant,
    fixed_mask,
)
from throughtime import _ext
from throughtime.ops import cpu_plan
from throughtime.ops.precision import multiplies_bfloat16

COLUMNS = [
    "op", "shape", "dtype", "threads", "where", "phase", "ms", "share", "gflops",
    "of_multiply_adds", "machine", "torch", "command",
]  # fmt: skip
PASSES = ("forward", "backward")
NO_PHASE = ("calls", "workers", "allocate", "whole")
MULTIPLY_ADDS = 100_000
PROFILED = ("float32", *PRECISIONS, "bfloat16", AUTOCAST)


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
        add("--dtype", choices=PROFILED, default=PROFILED[0], help="(%(default)s)")
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
    rates: dict[int, Rates] = {}
    tables = []
    for chosen in choose_cases(OPERATIONS[op], args):
        case = replace(chosen, p=getattr(args, "p", None), dtype=args.dtype)
        with case.precision():
            parts = parts_of(case)
            if parts not in rates:
                rates[parts] = measure_rates(kernels, parts)
                text = f"in {parts} bfloat16 parts" if parts else "by vectors"
                print(f"multiply-adds {text}: {rates[parts].gflops:.0f} GFLOP/s\n", flush=True)
            tables.append(profile(kernels, case, rates[parts], args.repeats))
    found = pd.concat(tables)
    print(report(found))
    if args.csv is not None:
        found.to_csv(args.csv, index=False, float_format="%.6g")
        print(f"\nphases: {args.csv}")
    return 0


@dataclass(frozen=True)
class Rates:
    """What the machine can do: arithmetic, and ticks per second of the kernels' clock."""

    gflops: float
    ticks: float


def parts_of(case: Case) -> int:
    """bfloat16 numbers that an operand of a case's products is made of; 0: vectors multiply."""
    if case.op != "lstm":
        multiplied = case.op == "rel-lstm" or case.score == "dot"
        return int(multiplied and case.operands == torch.bfloat16 and multiplies_bfloat16())
    inputs, units = case.I or 1, case.H or 1
    return cpu_plan.parts_of(case.operands, (case.T, case.B, inputs, units, units))


def measure_rates(kernels: Any, parts: int, *, repeats: int = 5) -> Rates:
    """The best of several measurements with torch's number of threads, of such operands."""
    start, ticks = time.perf_counter(), kernels.ticks()
    rates = []
    for _ in range(repeats):
        begin = time.perf_counter()
        operations = 2 * kernels.multiply_adds(MULTIPLY_ADDS, parts)
        rates.append(operations / (time.perf_counter() - begin))
    per_second = (kernels.ticks() - ticks) / (time.perf_counter() - start)
    return Rates(max(rates) * 1e-9, per_second)


def operations(case: Case) -> Mapping[tuple[str, str], float]:
    """Operations of an iteration by pass and phase, where known; a multiply-add is two."""
    if case.op == "relevancy":
        return {}
    rows, inputs, hidden = case.T * case.B, case.I, case.H
    if case.op == "rel-lstm":
        recurrent = 12.0 * rows * hidden * hidden  # gates, query and key
        return {
            ("forward", "input"): 8.0 * rows * hidden * inputs,
            ("forward", "recurrent"): recurrent,
            ("backward", "recurrent"): recurrent,
            ("backward", "weights"): rows * hidden * (12.0 * hidden + 8.0 * (inputs + 1)),
        }
    mask = fixed_mask(case.T, case.p)
    detached = 0 if mask is None else int(mask[1:].sum())  # at step 0 there is no product to save
    steps = case.T - 1 - detached  # what the first step passes to the initial state is in "other"
    product = 8.0 * rows * hidden
    return {
        ("forward", "input"): product * inputs,
        ("forward", "recurrent"): product * hidden,
        ("backward", "recurrent"): 8.0 * case.B * hidden * hidden * steps,
        ("backward", "weights"): product * (inputs + hidden + 1),
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
    known = operations(case)
    shape = str(case) + (f", p {case.p:g}" if case.p else "")
    rows = []
    for where, phase, n in found:
        row: dict[str, Any] = {"op": case.op, "shape": shape, "dtype": case.dtype}
        row |= {"where": where, "phase": phase}
        row |= {"ms": n / rates.ticks * 1e3, "share": n / whole} | machine.columns()
        if n and (where, phase) in known:
            row["gflops"] = known[where, phase] / row["ms"] * 1e-6
            row["of_multiply_adds"] = row["gflops"] / rates.gflops
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def report(found: pd.DataFrame) -> str:
    """A Markdown table, one line per phase; phases below 0.1 % are left out."""
    lines = []
    for row in found[found["share"] >= 0.001].itertuples():
        line = [row.shape, row.where, row.phase, table.digits(row.ms), f"{row.share:.1%}"]
        known = not pd.isna(row.gflops)
        line += [table.digits(row.gflops), f"{row.of_multiply_adds:.0%}"] if known else ["", ""]
        lines.append(line)
    return table.markdown(lines, ["shape", "where", "phase", "ms", "share", "GFLOP/s", "of it"])
