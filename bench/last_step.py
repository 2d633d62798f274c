"""``bench last-step``: the loss on the last step alone, beside a loss on every step.

Gradients that travel far become subnormal numbers, on which many processors are slow.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from bench import arguments, machine, report
from bench.cell import OURS, Cell, Contestant, Work
from bench.rooms import OPERATIONS

# Operation -> which of its default cases.
CASES = {"lstm": 0, "rel-lstm": -1, "relevancy": 2}


@dataclass(frozen=True)
class Row:
    """One contestant on one case, medians in milliseconds of forward and backward."""

    op: str
    case: str
    contestant: str
    threads: int
    every_ms: float
    last_ms: float
    last_over_every: float
    over_ours: float  # of the last step; medians of alternated runs
    machine: str
    torch: str
    command: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench last-step``."""
    parser.add_argument("--quick", action="store_true", help="on next to nothing")
    parser.add_argument("--threads", type=arguments.positive, help="(as torch has them)")
    parser.add_argument("--repeats", type=arguments.positive, default=5, help="rounds (5)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures all operations and prints one table."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print("\n".join([*machine.header(), ""]), flush=True)
    rows = [row for op in CASES for row in measure(op, args.repeats, quick=args.quick)]
    header = ["operation", "case", "contestant", "every step, ms", "last step, ms", "/ ours"]
    print(
        report.markdown(
            header,
            [
                (r.op, r.case, r.contestant, *map(report.ms, (r.every_ms, r.last_ms)))
                + (f"{r.over_ours:.2f}",)
                for r in rows
            ],
        )
    )
    if args.csv is not None:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
        print(f"\nrows: {args.csv}")
    return 0


def measure(op: str, repeats: int, *, quick: bool) -> list[Row]:
    """Ours and nn.LSTM (full attention for relevancy), as they are and flushing subnormals.

    Args:
        op: a key of ``CASES``.
        repeats: rounds in which the contestants alternate, after one that does not count.
        quick: take the smallest sizes.
    """
    operation = OPERATIONS[op]
    case = operation.default()[CASES[op]]
    cell = Cell(case.tiny() if quick else case)
    peer = Contestant("sdpa" if op == "relevancy" else "torch")
    label = operation.labels.get(peer.impl, peer.impl)
    contestants = [
        (OURS, operation.work(Contestant(OURS, "cpu"), cell), False),
        (label, operation.work(peer, cell), False),
        (f"{label}, torch.set_flush_denormal(True)", operation.work(peer, cell), True),
    ]
    times: dict[tuple[str, bool], list[float]] = {}
    for _ in range(repeats + 1):
        for name, work, flush in contestants:
            for last_only in (False, True):
                milliseconds = _milliseconds(work, last_only, flush)
                times.setdefault((name, last_only), []).append(milliseconds)
    rows = []
    for name, _, _ in contestants:
        every, last, ours = times[name, False][1:], times[name, True][1:], times[OURS, True][1:]
        rows.append(
            Row(
                op=op,
                case=str(cell.case),
                contestant=name,
                threads=torch.get_num_threads(),
                every_ms=statistics.median(every),
                last_ms=statistics.median(last),
                last_over_every=_ratio(last, every),
                over_ours=_ratio(last, ours),
                machine=machine.name(),
                torch=torch.__version__,
                command=machine.command_line(),
            )
        )
    return rows


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _milliseconds(work: Work, last: bool, flush: bool) -> float:
    if flush:
        torch.set_flush_denormal(True)
    try:
        start = time.perf_counter()
        output, grad = work.call()["output"], work.output_grad
        if last:
            output, grad = _last(output), _last(grad)
        torch.autograd.grad(output, list(work.leaves.values()), grad)
        return (time.perf_counter() - start) * 1e3
    finally:
        if flush:
            torch.set_flush_denormal(False)


def _last(sequence: Tensor) -> Tensor:
    """Of ``[T, B, H]`` or ``[B, heads, T, D]``."""
    return sequence[-1] if sequence.dim() == 3 else sequence[:, :, -1]
