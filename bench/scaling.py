"""``bench scaling``: with which powers of T, B and H time and memory grow, and whether T's is 1.

Cost per step must not depend on the length: along T the exponents of time and peak memory must be
1, that is, at most 1.15 plus the half-width of their 95 % interval. Full attention is measured
beside it, to show that the check would see a quadratic cost. One thread, time on the processor.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch

import throughtime
from bench import arguments, machine, plots, table
from bench.errors import require
from bench.measure import engine, memory, timing
from bench.operations import OPERATIONS
from bench.operations.operation import OURS, Contestant

AXES = ("T", "B", "H")
CONTROL = Contestant("full")  # full attention with its scores written out: quadratic in T
NOTE = "time on the processor, of one thread"
COSTS = {"time": "median_ms", "memory": "peak_mb"}
CONFIDENCE = 0.95
FIXED_SHARE = 0.2  # of a cost, at most, that may be there at any size
LEAST_POINTS = 3
LINEAR = 1.15  # a cache that a size outgrows adds some hundredths to a true 1
WIDEST = 0.25  # half-width beyond which 1 and 1.5 look alike
ATTEMPTS = 2  # what scatter hides is measured again
PLAN, QUICK_PLAN = timing.Plan(9, 2.0), timing.Plan(5, 0.5)
QUICK_SIZES = 4
RULE = (
    "Exponents with their 95 % intervals, by least squares over the sizes in brackets: those at "
    f"which the fixed cost of a call is at most {FIXED_SHARE:.0%} (it is measured at size 1, of D "
    f"at 16). Along T, {LINEAR} plus the half-width at most is linear."
)
_FEW, _MANY = {"window_size": 8, "top_k": 8}, {"window_size": 16, "top_k": 16}
_LONG, _WIDE = (1, 512, 1024, 2048, 4096, 8192), (1, 128, 256, 384, 512, 768)
# Operation and axis -> the size that grows, its values, the first almost only the fixed cost, and
# the sizes that stay. T of relevancy begins long after the retained set is full: until then the
# keys per query grow.
RANGES: Mapping[tuple[str, str], tuple[str, Sequence[int], Mapping[str, int]]] = {
    ("lstm", "T"): ("T", _LONG, {"B": 16, "I": 32, "H": 64}),
    ("lstm", "B"): ("B", (1, 32, 64, 128, 256, 512), {"T": 64, "I": 32, "H": 64}),
    ("lstm", "H"): ("H", (1, 128, 256, 512, 768, 1024), {"T": 32, "B": 16, "I": 32}),
    ("rel-lstm", "T"): ("T", _LONG, {"B": 4, "I": 16, "H": 64} | _FEW),
    ("rel-lstm", "B"): ("B", (1, 32, 64, 128, 192, 256), {"T": 64, "I": 16, "H": 64} | _FEW),
    ("rel-lstm", "H"): ("H", _WIDE, {"T": 64, "B": 4, "I": 16} | _FEW),
    ("relevancy", "T"): ("T", (1, *_LONG[2:], 16384), {"B": 1, "heads": 2, "D": 32} | _MANY),
    ("relevancy", "B"): ("B", (1, 8, 16, 32, 48, 64), {"T": 1024, "heads": 1, "D": 32} | _MANY),
    ("relevancy", "H"): (
        "D", (16, 256, 384, 512, 768, 1024), {"T": 1024, "B": 1, "heads": 1} | _MANY
    ),
    ("full", "T"): ("T", (1, 512, 768, 1024, 1536, 2048), {"B": 1, "heads": 4, "D": 32} | _MANY),
}  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """cost = factor * size ** exponent, between the sizes ``low`` and ``high``.

    The true exponent lies within ``exponent`` +- ``half_width`` with a confidence of 95 %, if the
    cost is a power of the size and its scatter is normal in the logarithm.
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


def fit(costs: Mapping[float, float], fixed: float = 0.0) -> Fit | None:
    """Least squares in the logarithms of size and cost; None if fewer than three sizes count.

    A size counts if the fixed cost, which is there at any size, is at most a fifth of its cost:
    below, the exponent is that of calling, not of computing.
    """
    stats = require("scipy.stats")
    used = {size: cost for size, cost in costs.items() if cost > 0 and cost * FIXED_SHARE >= fixed}
    if len(used) < LEAST_POINTS:
        return None
    line = stats.linregress([math.log(x) for x in used], [math.log(y) for y in used.values()])
    half_width = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(used) - 2) * line.stderr)
    return Fit(float(line.slope), half_width, math.exp(line.intercept), min(used), max(used))


@dataclass(frozen=True)
class Series:
    """The rows of one contestant along one axis, the fixed cost first."""

    op: str
    axis: str
    contestant: str
    name: str  # of the size that grows: H stands for D in relevancy
    rows: pd.DataFrame

    def costs(self, cost: str) -> dict[float, float]:
        """Size -> cost, without the fixed one."""
        own = self.rows.iloc[1:]
        return dict(zip(own[self.name].astype(float), own[COSTS[cost]], strict=True))

    def fit(self, cost: str) -> Fit | None:
        """How ``time`` or ``memory`` grows."""
        return fit(self.costs(cost), float(self.rows[COSTS[cost]].iloc[0]))

    @property
    def verdict(self) -> str:
        """What the fits say; too few sizes are unclear. Nothing for an axis that is not judged."""
        if self.axis != "T":
            return ""
        fits = {cost: self.fit(cost) for cost in COSTS}
        words = {cost: one.verdict if one else "unclear" for cost, one in fits.items()}
        same = len(set(words.values())) == 1
        return words["time"] if same else ", ".join(f"{c} {v}" for c, v in words.items())

    @property
    def failure(self) -> str | None:
        """A sentence if ours is not linear in T, or if the control is not more than that."""
        wanted = "more than linear" if self.contestant == str(CONTROL) else "linear"
        if self.verdict in ("", wanted):
            return None
        return f"FAILED: {self.op} by {self.contestant}: {self.verdict} in T, wanted {wanted}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench scaling``."""
    parser.description = __doc__
    add = parser.add_argument
    add("--ops", choices=OPERATIONS, nargs="+", default=list(OPERATIONS), help="(all)")
    add("--axis", choices=AXES, nargs="+", default=AXES, help="sizes that grow (T B H)")
    add("--quick", action="store_true", help="fewer sizes, shorter: about 20 s")
    arguments.add_files(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns 1 if a cost is not linear in T, or if the check cannot tell."""
    for module in ("tqdm", "scipy.stats", *(["matplotlib"] if args.plot is not None else [])):
        require(module)
    print("\n".join(machine.header()))
    found = measure(args.ops, args.axis, quick=args.quick)
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


def measure(ops: Sequence[str], axes: Sequence[str], *, quick: bool) -> list[Series]:
    """All series with a progress bar on stderr, and the control if T is among the axes."""
    wanted = [(op, axis) for axis in dict.fromkeys(axes) for op in dict.fromkeys(ops)]
    found = []
    bar = require("tqdm").tqdm(
        [*wanted, *([("full", "T")] if "T" in axes else [])],
        unit="series", file=sys.stderr, disable=None,
    )  # fmt: skip
    for op, axis in bar:
        bar.set_postfix_str(f"{op}, {axis}")
        for _ in range(ATTEMPTS):
            (one,) = series(measure_one(op, axis, quick=quick))
            if "unclear" not in one.verdict:
                break
        found.append(one)
    return found


def measure_one(op: str, axis: str, *, quick: bool) -> pd.DataFrame:
    """The rows of one series, on one thread.

    The sizes are timed in turns, so that a slow spell of the machine hits all of them. Time on the
    processor leaves out what other programs take. More threads would add the power with which the
    work spreads over them.
    """
    name, values, others = RANGES[op, axis]
    operation = OPERATIONS["relevancy" if op == "full" else op]
    kernel = throughtime.explain(operation.kernel, hidden_size=64).chosen
    contestant = CONTROL if op == "full" else Contestant(OURS, kernel)
    sizes = values[: 1 + QUICK_SIZES] if quick else values
    p = 0.0 if operation.ps is not None else None
    cases = [operation.case(**{**others, name: value, "p": p}) for value in sizes]
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
    """The series that rows, measured now or stored, consist of."""
    for (op, axis), (name, values, others) in RANGES.items():
        own = rows[(rows["op"] == "relevancy") & (rows["impl"] == "full")]
        if op != "full":
            own = rows[(rows["op"] == op) & (rows["impl"] == OURS)]
        for other, value in others.items():
            own = own[own[other] == value]
        own = own[own[name].isin(values)]
        if len(own) > LEAST_POINTS:
            yield Series(str(own["op"].iloc[0]), axis, table.contestant(own.iloc[0]), name, own)


def report(found: Sequence[Series]) -> str:
    """One line per series."""
    lines = []
    for one in found:
        fits = [one.fit(cost) for cost in COSTS]
        texts = [f"{f} ({f.low:g}-{f.high:g})" if f else "too few sizes" for f in fits]
        lines.append([one.op, one.contestant, one.name, *texts, one.verdict])
    header = ["operation", "contestant", "size", "time exponent (sizes)"]
    return table.markdown(lines, [*header, "memory exponent (sizes)", "in T"])


def draw(rows: pd.DataFrame) -> Any:
    """A column of panels per size, time above and memory below; points, fits, and slope 1."""
    found = list(series(rows))
    axes = list(dict.fromkeys(one.axis for one in found))
    canvas, panels = plots.figure(len(axes), [3.6] * len(COSTS))
    labels = {"time": "ms per iteration", "memory": "peak memory, MB"}
    for panel, (cost, axis) in zip(panels, [(c, a) for c in COSTS for a in axes], strict=True):
        own = [one for one in found if one.axis == axis]
        for k, one in enumerate(own):
            look = {"color": plots.COLOURS[k], "marker": plots.MARKERS[k]}
            fitted = one.fit(cost)
            name = one.contestant if one.contestant == str(CONTROL) else one.op
            costs = {size: value for size, value in one.costs(cost).items() if value > 0}
            text = f"{name}: {fitted}" if fitted else name
            panel.plot(list(costs), list(costs.values()), linestyle="none", label=text, **look)
            if fitted is not None:
                ends = [fitted.low, fitted.high]
                powers = [fitted.factor * end**fitted.exponent for end in ends]
                panel.plot(ends, powers, color=look["color"], linewidth=1)
        plots.linear_guide(panel)
        panel.set(xlabel=" or ".join(dict.fromkeys(one.name for one in own)), ylabel=labels[cost])
        plots.plain_log(panel, "x")
        plots.plain_log(panel)
        panel.legend(frameon=False, fontsize="x-small", title="exponent", title_fontsize=7)
    first = rows.iloc[0]
    canvas.suptitle(f"{first.machine}, 1 thread, torch {first.torch}", fontsize=8)
    return canvas
