"""``bench last-step``: the loss on the last step alone, beside a loss on every step.

Gradients that travel far become subnormal numbers, on which many processors are slow.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from bench import arguments, machine, table
from bench.operations import OPERATIONS
from bench.operations.operation import OURS, Case, Contestant, Work

# Operation -> which of its default cases, and the peer.
MEASURED = {"lstm": (0, "torch"), "rel-lstm": (-1, "torch"), "relevancy": (2, "sdpa")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench last-step``."""
    parser.description = __doc__
    parser.add_argument("--quick", action="store_true", help="on very few elements")
    parser.add_argument("--threads", type=arguments.positive, help="(as torch has them)")
    parser.add_argument("--repeats", type=arguments.positive, default=5, help="rounds (5)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure all operations and print one table; returns 0."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print("\n".join([*machine.header(), ""]), flush=True)
    rows = []
    for op, (number, peer) in MEASURED.items():
        case = OPERATIONS[op].default[number]
        rows += measure(case.tiny() if args.quick else case, peer, args.repeats)
    lines = [
        [row["op"], row["case"], row["contestant"], table.digits(row["every_ms"])]
        + [table.digits(row["last_ms"]), f"{row['over_ours']:.2f}"]
        for row in rows
    ]
    header = ["operation", "case", "contestant", "every step, ms", "last step, ms", "/ ours"]
    print(table.markdown(lines, header))
    if args.csv is not None:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(args.csv, index=False)
        print(f"\nrows: {args.csv}")
    return 0


def measure(case: Case, peer: str, repeats: int) -> list[dict[str, Any]]:
    """Rows of ours and of a peer, as it is and flushing subnormals; the three alternate.

    The first round does not count. ``over_ours`` is that of the last step.
    """
    operation = OPERATIONS[case.op]
    label = operation.peers[peer].label
    contestants = {
        OURS: (operation.work(Contestant(OURS, "cpu"), case), False),
        label: (operation.work(Contestant(peer), case), False),
        f"{label}, torch.set_flush_denormal(True)": (operation.work(Contestant(peer), case), True),
    }
    rounds = [
        {
            (name, last): milliseconds(work, last=last, flush=flush)
            for name, (work, flush) in contestants.items()
            for last in (False, True)
        }
        for _ in range(repeats + 1)
    ]
    times = pd.DataFrame(rounds[1:])
    return [
        {
            "op": case.op,
            "case": str(case),
            "contestant": name,
            "threads": torch.get_num_threads(),
            "every_ms": times[name, False].median(),
            "last_ms": times[name, True].median(),
            "last_over_every": (times[name, True] / times[name, False]).median(),
            "over_ours": (times[name, True] / times[OURS, True]).median(),
            "machine": machine.name(),
            "torch": torch.__version__,
            "command": machine.command_line(),
        }
        for name in contestants
    ]


def milliseconds(work: Work, *, last: bool, flush: bool) -> float:
    """One iteration, with the loss on the last step alone or on every step."""
    torch.set_flush_denormal(flush)
    try:
        start = time.perf_counter()
        output, grad = work.call()["output"], work.output_grad
        if last:
            output, grad = _last(output), _last(grad)
        torch.autograd.grad(output, list(work.leaves.values()), grad)
        return (time.perf_counter() - start) * 1e3
    finally:
        torch.set_flush_denormal(False)


def _last(sequence: Tensor) -> Tensor:
    """Of ``[T, B, H]`` or ``[B, heads, T, D]``."""
    return sequence[-1] if sequence.dim() == 3 else sequence[:, :, -1]
