"""``bench scaling``: with which power of T time and memory grow, and whether it is 1.

Cost per step must not depend on the length: the exponents of time and peak memory must be 1, that
is, at most 1.15 plus the half-width of their 95 % interval. Full attention is measured beside ours,
to show that the check would see a quadratic cost. One thread, time on the processor.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm import tqdm

import throughtime
from bench import arguments, machine, plot, table
from bench.measure import engine, memory, timing
from bench.operations import OPERATIONS
from bench.operations.operation import OURS, Contestant

CONTROL = "full"  # full attention with its scores written out: quadratic in T
NOTE = "time on the processor, of one thread"
COSTS = ("median_ms", "peak_mb")
CONFIDENCE = 0.95
FIXED_SHARE = 0.2  # of a cost, at most, that may be there at any size
LEAST_POINTS = 3
LINEAR = 1.15  # a cache that a size outgrows adds some hundredths to a true 1
WIDEST = 0.25  # half-width beyond which 1 and 1.5 look alike
ATTEMPTS = 2  # what scatter hides is measured again
PLAN, QUICK_PLAN = timing.Plan(9, 0.3), timing.Plan(5, 0.1)
QUICK_SIZES = 4
RULE = (
    "Exponents of T with their 95 % intervals, by least squares over the T in brackets: those at "
    f"which the fixed cost of a call is at most {FIXED_SHARE:.0%} (it is measured at T = 1). "
    f"{LINEAR} plus the half-width at most is linear."
)
_LONG = (1, 512, 1024, 2048, 4096, 8192)
_ATTENTION = {"B": 1, "heads": 4, "D": 32, "window_size": 16, "top_k": 16}
# Operation or control -> values of T, the first almost only the fixed cost, and the sizes that
# stay. T of relevancy begins long after the retained set is full: until then the keys per query
# grow.
RANGES: Mapping[str, tuple[Sequence[int], Mapping[str, int]]] = {
    "lstm": (_LONG, {"B": 16, "I": 32, "H": 64}),
    "rel-lstm": (_LONG, {"B": 4, "I": 16, "H": 64, "window_size": 8, "top_k": 8}),
    "relevancy": ((1, *_LONG[2:], 16384), _ATTENTION),
    CONTROL: ((1, 512, 768, 1024, 1536, 2048), _ATTENTION),
}


@dataclass(frozen=True)
class Fit:
    """A cost that grows with a power of T, between the lengths ``low`` and ``high``.

    The true exponent lies within ``exponent`` +- ``half_width`` with a confidence of 95 %, if the
    cost is a power of T and its scatter is normal in the logarithm.
    """

    exponent: float
    half_width: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.exponent:.2f} +- {self.half_width:.2f} ({self.low:g}-{self.high:g})"

    @property
    def verdict(self) -> str:
        """``linear``, ``more than linear``, or ``unclear`` where the scatter hides it."""
        if self.exponent > LINEAR + self.half_width:
            return "more than linear"
        return "linear" if self.half_width <= WIDEST else "unclear"


def fit(costs: pd.Series) -> Fit | None:
    """Least squares in the logarithms of T, the index, and cost; None if fewer than three T count.

    The first cost is the fixed one, which is there at any T. A T counts if that is at most a fifth
    of its cost: below, the exponent is that of calling, not of computing.
    """
    used = costs.iloc[1:]
    used = used[(used > 0) & (used * FIXED_SHARE >= costs.iloc[0])]
    if len(used) < LEAST_POINTS:
        return None
    line = stats.linregress(np.log(used.index.to_numpy(float)), np.log(used.to_numpy(float)))
    half_width = stats.t.ppf((1 + CONFIDENCE) / 2, len(used) - 2) * line.stderr
    return Fit(float(line.slope), float(half_width), used.index.min(), used.index.max())


@dataclass(frozen=True)
class Series:
    """The rows of a key of ``RANGES``, the fixed cost first."""

    name: str
    rows: pd.DataFrame

    @property
    def fits(self) -> list[Fit | None]:
        """How time and memory grow."""
        return [fit(self.rows.set_index("T")[cost]) for cost in COSTS]

    @property
    def verdict(self) -> str:
        """What the fits say; too few T are unclear."""
        time, memory = (one.verdict if one else "unclear" for one in self.fits)
        return time if time == memory else f"time {time}, memory {memory}"

    @property
    def failure(self) -> str | None:
        """A sentence if ours is not linear in T, or if the control is not more than that."""
        wanted = "more than linear" if self.name == CONTROL else "linear"
        if self.verdict == wanted:
            return None
        return f"FAILED: {self.name}: {self.verdict} in T, wanted {wanted}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    add = parser.add_argument
    add("--ops", choices=OPERATIONS, nargs="+", default=list(OPERATIONS), help="(all)")
    add("--quick", action="store_true", help="fewer sizes, shorter: about 10 s")
    arguments.add_files(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns 1 if a cost is not linear in T, or if the check cannot tell."""
    print("\n".join(machine.header()))
    found = measure(args.ops, quick=args.quick)
    failures = [one.failure for one in found if one.failure]
    print("\n".join(["", report(found), "", RULE, *failures]))
    plot.write(pd.concat([one.rows for one in found]), args)
    return 1 if failures else 0


def measure(ops: Sequence[str], *, quick: bool) -> list[Series]:
    """The series of the operations and of the control, with a progress bar on stderr."""
    found = []
    names = dict.fromkeys([*ops, CONTROL])
    for name in tqdm(names, unit="series", file=sys.stderr, disable=None):
        for _ in range(ATTEMPTS):
            one = Series(name, measure_one(name, quick=quick))
            if "unclear" not in one.verdict:
                break
        found.append(one)
    return found


def measure_one(name: str, *, quick: bool) -> pd.DataFrame:
    """The rows of one series, on one thread.

    The lengths are timed in turns, so that a slow spell of the machine hits all of them. Time on
    the processor leaves out what other programs take. More threads would add the power with which
    the work spreads over them.
    """
    lengths, others = RANGES[name]
    operation = OPERATIONS["relevancy" if name == CONTROL else name]
    kernel = throughtime.explain(operation.kernel, hidden_size=64).chosen
    contestant = Contestant(CONTROL) if name == CONTROL else Contestant(OURS, kernel)
    p = 0.0 if operation.ps is not None else None
    lengths = lengths[: 1 + QUICK_SIZES] if quick else lengths
    cases = [operation.case(T=length, p=p, **others) for length in lengths]
    runs = {case: partial(operation.work(contestant, case).iterate, case.mode) for case in cases}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        samples = timing.alternate(runs, QUICK_PLAN if quick else PLAN, _processor_time)
        return table.frame(
            engine.row(contestant, case, note=NOTE, peak_mb=memory.peak_mb(contestant, case))
            | engine.times(samples[case], case)
            for case in cases
        )
    finally:
        torch.set_num_threads(threads)


def _processor_time(run: timing.Run, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return time.process_time() - start


def report(found: Sequence[Series]) -> str:
    lines = [[one.name, *(str(f or "too few T") for f in one.fits), one.verdict] for one in found]
    return table.markdown(lines, ["operation", "time exponent", "memory exponent", "in T"])
