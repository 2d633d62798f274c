"""The command of every benchmark: options, what would run, the run, table and files."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from bench import arguments, machine, measure, report, rows
from bench.cases import MODES, SWEEP_GFLOP
from bench.cell import DEVICES, DTYPES, OURS
from bench.engine import Bench
from bench.errors import UsageError, require
from bench.operation import Operation
from throughtime.backends import NAMES, BackendName


def add_arguments(parser: argparse.ArgumentParser, operation: Operation) -> None:
    """The options of ``bench OP``."""
    add = parser.add_argument_group("shapes (all combinations)").add_argument
    for name, text in operation.sizes.items():
        kind = arguments.natural if name == "top_k" else arguments.positive
        typical = operation.typical.get(name)
        shown = " ".join(map(str, typical)) if typical else "same as H"
        option = f"--{name.replace('_', '-')}"
        add(option, type=kind, nargs="+", metavar="N", help=f"{text} ({shown})")
    if operation.scores:
        add("--score", choices=operation.scores, default=operation.scores[0], help="(%(default)s)")
    if operation.sweep()[0]:
        add("--sweep", action="store_true", help="a grid over T 10-2000, B 1-256, H 8-2048")

    add = parser.add_argument_group("what is measured").add_argument
    peers = list(operation.labels)
    default = list(operation.default_peers)
    add("--peers", choices=peers, nargs="*", default=default, help=f"({' '.join(default)})")
    add(
        "--backends",
        choices=NAMES,
        nargs="+",
        default=["auto", "reference"],
        help="kernels of ours; ratios are to the first that can run (auto reference)",
    )
    add("--dtype", choices=DTYPES, nargs="+", default=["float32"], help="(float32)")
    add("--modes", choices=MODES, nargs="+", default=MODES[:1], help="(forward+backward)")
    add("--device", choices=DEVICES, nargs="+", default=["cpu"], help="(cpu)")
    if operation.default_ps is not None:
        ps = list(operation.default_ps)
        text = f"detached fraction of the steps ({' '.join(f'{p:g}' for p in ps)})"
        add("--p", type=arguments.probability, nargs="+", default=ps, help=text)
        add("--input-grad", action="store_true", help="the input needs a gradient too")
    add("--threads", type=arguments.positive, help="threads of each (as torch has them)")
    add("--no-memory", action="store_true", help="leave out peak memory")
    add("--repeats", type=arguments.positive, help="number of rounds (at least 5 and 1.5 s)")
    add("--quick", action="store_true", help="fewer shapes, shorter, no memory: under 30 s")
    add("--list", action="store_true", help="print shapes, peers and backends, and stop")
    add("--dry-run", action="store_true", help="print what would run and what not, and stop")

    add = parser.add_argument_group("files").add_argument
    add("--csv", type=Path, metavar="FILE", help="write every measurement (see bench schema)")
    add("--plot", type=Path, metavar="FILE", help="draw them, as svg and png (see bench plot)")
    parser.set_defaults(run=functools.partial(run, operation))


def run(operation: Operation, args: argparse.Namespace) -> int:
    """Runs the benchmark.

    Returns:
        0; 1 if a contestant of ours computed something wrong, broke down, or could run nowhere.
    """
    if args.list:
        print(listing(operation))
        return 0
    chosen = _choose_cases(operation, args)
    bench = _make_bench(operation, args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.dry_run:
        print(dry_run(bench, chosen))
        return 0
    for module in ("tqdm", *(["matplotlib"] if args.plot is not None else [])):
        require(module)
    for line in machine.header(args.device):
        print(line)
    if args.csv is not None:
        args.csv.parent.mkdir(parents=True, exist_ok=True)  # before the minutes of measuring
    warning = machine.busy()
    if warning:
        print(f"warning: {warning}", file=sys.stderr)

    found = bench.rows(chosen)
    print(f"\n{report.setting(found)}\n\n{report.table(found, operation.heading)}")
    if args.csv is not None:
        rows.write_csv(args.csv, found)
        print(f"\nmeasurements: {args.csv}")
    if args.plot is not None:
        from bench import plot

        for path in plot.draw(found, args.plot):
            print(f"plot: {path}")
    if not any(row.ours and row.median_ms is not None for row in found):
        print("error: nothing of ours was measured: the notes say why", file=sys.stderr)
        return 1
    return 1 if bench.red else 0


def _choose_cases(operation: Operation, args: argparse.Namespace) -> Sequence[Any]:
    """The shapes that the options ask for, small ones first in a sweep."""
    given = {name: getattr(args, name) for name in operation.sizes}
    given = {name: sizes for name, sizes in given.items() if sizes is not None}
    score = getattr(args, "score", None)
    if getattr(args, "sweep", False):
        if given:
            options = ", ".join(f"--{name}" for name in given)
            raise UsageError(
                f"--sweep has its own shapes, got {options} too: leave one of them out"
            )
        return operation.sweep()[0]
    if given or score != (operation.scores or (None,))[0]:
        return operation.combinations(given, quick=args.quick, score=score)
    return operation.quick() if args.quick else operation.default()


def _make_bench(operation: Operation, args: argparse.Namespace) -> Bench:
    short = args.quick or getattr(args, "sweep", False)
    plan = measure.Plan(rounds=3, seconds=0.5) if short else measure.Plan()
    if args.repeats is not None:
        plan = measure.Plan(rounds=args.repeats, exactly=True)
    return Bench(
        operation,
        backends=args.backends,
        peers=list(dict.fromkeys(args.peers)),
        modes=list(dict.fromkeys(args.modes)),
        ps=sorted(set(getattr(args, "p", [0.0]))),
        dtypes=list(dict.fromkeys(args.dtype)),
        devices=list(dict.fromkeys(args.device)),
        input_grad=getattr(args, "input_grad", False),
        memory=not (args.no_memory or short),
        plan=plan,
    )


def listing(operation: Operation) -> str:
    """Shapes without options, peers, and what of ours and of them can run here in float32."""
    measured, left_out = operation.sweep()
    groups = {"default": operation.default(), "--quick": operation.quick(), "--sweep": measured}
    lines = []
    for title, group in groups.items():
        if group:
            lines += [f"{title}: {operation.heading}", *(f"  {case}" for case in group)]
    if left_out:
        text = f"more than {SWEEP_GFLOP:g} GFLOP each"
        lines.append(f"left out of --sweep ({len(left_out)}): {text}")
    everybody = Bench(operation, backends=get_args(BackendName)[1:], peers=list(operation.labels))
    lines.append("contestants, on the first quick shape in float32 on the CPU:")
    ((entries,),) = everybody.groups(operation.quick()[:1])
    for entry in entries:
        label = operation.labels.get(entry.contestant.impl, OURS)
        lines.append(f"  {entry.contestant}: {label}; {entry.why_not or 'can run'}")
    return "\n".join(lines)


def dry_run(bench: Bench, chosen: Sequence[Any]) -> str:
    """A table of all that would be measured, and why the rest would not."""
    heading = [bench.operation.heading, "dtype", "device", "mode", "p", "implementation", "would"]
    lines = [
        [
            str(entry.cell.case),
            entry.cell.dtype,
            entry.cell.device,
            entry.cell.mode,
            f"{entry.cell.p:g}",
            str(entry.contestant),
            entry.why_not or "run",
        ]
        for group in bench.groups(chosen)
        for entries in group
        for entry in entries
    ]
    running = sum(line[-1] == "run" for line in lines)
    return f"{report.markdown(heading, lines)}\n\n{running} of {len(lines)} would run"
