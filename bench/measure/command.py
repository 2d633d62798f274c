"""The command of every benchmark: options, the run, table and files."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import fields

import torch

from bench import arguments, machine, plot, table
from bench.measure.engine import Bench
from bench.measure.timing import Plan
from bench.operations import OPERATIONS
from bench.operations.operation import DEVICES, DTYPES, MODES, Case, Operation
from throughtime.backends import NAMES


def add_shapes(parser: argparse.ArgumentParser, operation: Operation) -> None:
    add = parser.add_argument_group("shapes (all combinations)").add_argument
    for size, text in operation.sizes.items():
        kind = arguments.natural if size == "top_k" else arguments.positive
        typical = getattr(operation.typical, size) or "same as H"
        add(f"--{size.replace('_', '-')}", type=kind, nargs="+", help=f"{text} ({typical})")
    if operation.scores:
        add("--score", choices=operation.scores, default=operation.scores[0], help="(%(default)s)")


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    operation = OPERATIONS[name]
    add_shapes(parser, operation)
    add = parser.add_argument_group("what is measured").add_argument
    peers = "; ".join(f"{name}: {peer.label}" for name, peer in operation.peers.items())
    default = list(operation.default_peers)
    add("--peers", choices=operation.peers, nargs="*", default=default, help=peers)
    text = "kernels of ours; ratios are to the first that can run (auto reference)"
    add("--backends", choices=NAMES, nargs="+", default=["auto", "reference"], help=text)
    add("--dtype", dest="dtypes", choices=DTYPES, nargs="+", default=["float32"], help="(float32)")
    add("--modes", choices=MODES, nargs="+", default=MODES[:1], help="(forward+backward)")
    add("--device", dest="devices", choices=DEVICES, nargs="+", default=["cpu"], help="(cpu)")
    if operation.ps is not None:
        text = f"detached fraction of the steps ({' '.join(f'{p:g}' for p in operation.ps)})"
        add(
            "--p", dest="ps", type=arguments.probability, nargs="+", default=operation.ps, help=text
        )
        add("--input-grad", action="store_true", help="the input needs a gradient too")
    arguments.add_threads(parser)
    add("--no-memory", action="store_true", help="leave out peak memory")
    add(
        "--repeats", type=arguments.positive, help="number of rounds (at least 5 and 0.5 s of each)"
    )
    add("--quick", action="store_true", help="fewer shapes, shorter, no memory: under 30 s")
    arguments.add_files(parser)
    parser.set_defaults(run=functools.partial(run, operation))


def run(operation: Operation, args: argparse.Namespace) -> int:
    """Run the benchmark; 1 if one of ours computed something wrong, failed, or could not run."""
    torch.set_num_threads(args.threads)
    chosen = choose_cases(operation, args)
    bench = _make_bench(operation, args)
    print("\n".join(machine.header(args.devices[-1])))
    found = bench.rows(chosen)
    print(f"\n{table.report(found)}\n")
    plot.write(found, args)
    if found.loc[found["backend"] != "", "median_ms"].isna().all():
        print("error: nothing of ours was measured: the notes say why", file=sys.stderr)
        return 1
    return 1 if bench.red else 0


def choose_cases(operation: Operation, args: argparse.Namespace) -> Sequence[Case]:
    given = {name: getattr(args, name) for name in operation.sizes if getattr(args, name)}
    score = getattr(args, "score", None)
    if given or score != (operation.scores or (None,))[0]:
        return operation.combinations(given, score)
    return operation.quick if args.quick else operation.default


def _make_bench(operation: Operation, args: argparse.Namespace) -> Bench:
    """Each field of ``Bench`` that an option has."""
    plan = Plan(3, 0.15) if args.quick else Plan()
    if args.repeats is not None:
        plan = Plan(args.repeats, 0)
    given = {one.name: getattr(args, one.name) for one in fields(Bench) if hasattr(args, one.name)}
    return Bench(operation, **given, memory=not (args.no_memory or args.quick), plan=plan)
