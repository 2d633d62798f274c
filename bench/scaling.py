"""``bench scaling``: with which power of T time and memory grow, and whether it is 1.

Cost per step must not depend on the length: the exponents of time and peak memory must be 1, that
is, at most 1.15 plus the half-width of their 95 % interval. Full attention is measured beside ours,
to show that the check would see a quadratic cost. One thread, time on the processor.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm import tqdm

import throughtime
from bench import arguments, machine, plots, table
from bench.measure import engine, memory, timing
from bench.operations import OPERATIONS
from bench.operations.operation import OURS, Contestant

CONTROL = "full"  # full attention with its scores written out: quadratic in T
NOTE = "time on the processor, of one thread"
COSTS = {"time": "median_ms", "memory": "peak_mb"}
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
_MANY = {"D": 32, "window_size": 16, "top_k": 16}
_LONG = (1, 512, 1024, 2048, 4096, 8192)
# Operation or control -> values of T, the first almost only the fixed cost, and the sizes that
# stay. T of relevancy begins long after the retained set is full: until then the keys per query
# grow.
RANGES: Mapping[str, tuple[Sequence[int], Mapping[str, int]]] = {
    "lstm": (_LONG, {"B": 16, "I": 32, "H": 64}),
    "rel-lstm": (_LONG, {"B": 4, "I": 16, "H": 64, "window_size": 8, "top_k": 8}),
    "relevancy": ((1, *_LONG[2:], 16384), {"B": 1, "heads": 2} | _MANY),
    CONTROL: ((1, 512, 768, 1024, 1536, 2048), {"B": 1, "heads": 4} | _MANY),
}


@dataclass(frozen=True)
class Fit:
    """cost = factor * T ** exponent, between the lengths ``low`` and ``high``.

    The true exponent lies within ``exponent`` +- ``half_width`` with a confidence of 95 %, if the
    cost is a power of T and its scatter is normal in the logarithm.
    """

    exponent: float
    half_width: float
    factor: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.exponent:.2f} +- {self.half_width:.2f}"

    @property
    def verdict(self) -> str:
        """``linear``, ``more than linear``, or ``unclear`` where the scatter hides it."""
        if self.exponent > LINEAR + self.half_width:
            return "more than linear"
        return "linear" if self.half_width <= WIDEST else "unclear"


def fit(costs: pd.Series, fixed: float = 0.0) -> Fit | None:
    """Least squares in the logarithms of T, the index, and cost; None if fewer than three T count.

    A T counts if the fixed cost, which is there at any T, is at most a fifth of its cost: below,
    the exponent is that of calling, not of computing.
    """
    used = costs[(costs > 0) & (costs * FIXED_SHARE >= fixed)]
    if len(used) < LEAST_POINTS:
        return None
    line = stats.linregress(np.log(used.index.to_numpy(float)), np.log(used.to_numpy(float)))
    half_width = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(used) - 2) * line.stderr)
    factor = float(np.exp(line.intercept))
    return Fit(float(line.slope), half_width, factor, used.index.min(), used.index.max())


@dataclass(frozen=True)
class Series:
    """The rows of a key of ``RANGES``, the fixed cost first."""

    name: str
    rows: pd.DataFrame

    def costs(self, cost: str) -> pd.Series:
        """Of every T, the fixed one first."""
        return self.rows.set_index("T")[COSTS[cost]]

    def fit(self, cost: str) -> Fit | None:
        """How ``time`` or ``memory`` grows."""
        costs = self.costs(cost)
        return fit(costs.iloc[1:], costs.iloc[0])

    @property
    def verdict(self) -> str:
        """What the fits say; too few T are unclear."""
        fits = {cost: self.fit(cost) for cost in COSTS}
        words = {cost: one.verdict if one else "unclear" for cost, one in fits.items()}
        same = len(set(words.values())) == 1
        return words["time"] if same else ", ".join(f"{c} {v}" for c, v in words.items())

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
    rows = pd.concat([one.rows for one in found])
    if args.csv is not None:
        table.write_csv(args.csv, rows)
        print(f"measurements: {args.csv}")
    if args.plot is not None:
        for path in plots.save_both(draw(rows), args.plot.with_suffix("")):
            print(f"plot: {path}")
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
    works = {case: operation.work(contestant, case) for case in cases}
    runs = {case: partial(work.iterate, case.mode) for case, work in works.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plan = QUICK_PLAN if quick else PLAN
        samples = timing.alternate(runs, plan, timer=_processor_time)
        rows = [
            engine.row(contestant, case, note=NOTE)
            | engine.times(samples[case], case)
            | {"peak_mb": memory.peak_mb(contestant, case)}
            for case in cases
        ]
    finally:
        torch.set_num_threads(threads)
    return table.frame(rows)


def _processor_time(run: timing.Run, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return time.process_time() - start


def series(rows: pd.DataFrame) -> Iterator[Series]:
    """The series that stored rows consist of."""
    for name, (lengths, others) in RANGES.items():
        column, impl = ("impl", CONTROL) if name == CONTROL else ("op", OURS)
        own = rows[(rows[column] == name) & (rows["impl"] == impl) & rows["T"].isin(lengths)]
        for other, value in others.items():
            own = own[own[other] == value]
        if len(own) > LEAST_POINTS:
            yield Series(name, own)


def report(found: Sequence[Series]) -> str:
    lines = []
    for one in found:
        fits = [one.fit(cost) for cost in COSTS]
        texts = [f"{f} ({f.low:g}-{f.high:g})" if f else "too few T" for f in fits]
        lines.append([one.name, *texts, one.verdict])
    return table.markdown(lines, ["operation", "time exponent", "memory exponent", "in T"])


def draw(rows: pd.DataFrame) -> Any:
    """Time and memory over T: points, fits, and slope 1."""
    canvas, panels = plots.figure(len(COSTS))
    labels = {"time": "ms per iteration", "memory": "peak memory, MB"}
    for panel, cost in zip(panels, COSTS, strict=True):
        for k, one in enumerate(series(rows)):
            look = plots.look(k) | {"linestyle": "none"}
            fitted = one.fit(cost)
            costs = one.costs(cost).iloc[1:]
            costs = costs[costs > 0]
            text = f"{one.name}: {fitted}" if fitted else one.name
            panel.plot(costs.index, costs, label=text, **look)
            if fitted is not None:
                ends = [fitted.low, fitted.high]
                powers = [fitted.factor * end**fitted.exponent for end in ends]
                panel.plot(ends, powers, color=look["color"], linewidth=1)
        plots.linear_guide(panel)
        panel.set(xlabel="T", ylabel=labels[cost])
        plots.plain_log(panel, "x")
        plots.plain_log(panel)
        panel.legend(frameon=False, fontsize="x-small", title="exponent", title_fontsize=7)
    first = rows.iloc[0]
    canvas.suptitle(f"{first.machine}, 1 thread, torch {first.torch}", fontsize=8)
    return canvas
