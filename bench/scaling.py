"""``bench scaling``: with which powers of T, B and H time and memory grow, and whether T's is 1.

Cost per step must not depend on the length: along T the exponents of time and peak memory must be
1, that is, at most 1.15 plus the half-width of their 95 % interval. Full attention is measured
beside it, to show that the check would see a quadratic cost. One thread, time on the processor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import machine, measure, report, scaling_plot
from bench.errors import UsageError, require
from bench.rows import write_csv
from bench.scaling_fit import FIXED_SHARE, LINEAR, Fit
from bench.scaling_series import AXES, CONTROL, CONTROL_OP, RANGES, Series, ours, series

HEADER = ("operation", "who", "size", "time exponent (sizes)", "memory exponent (sizes)", "in T")
SIZES, QUICK_SIZES = 5, 4
PLAN = measure.Plan(rounds=9, seconds=2.0)
QUICK_PLAN = measure.Plan(rounds=5, seconds=0.5)
RULE = (
    "Exponents with their 95 % intervals, by least squares over the sizes in brackets: those at "
    f"which the fixed cost of a call is at most {FIXED_SHARE:.0%} (it is measured at size 1, of D "
    f"at 16). Along T, {LINEAR} plus the half-width at most is linear."
)
CONTROL_SEEN = "Control: full attention is more than linear, as it must be."
ATTEMPTS = 2  # what scatter hides is measured again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench scaling``."""
    parser.description = __doc__
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help=f"{', '.join(RANGES)} (all)")
    add("--axis", choices=AXES, nargs="+", default=AXES, help="sizes that grow (T B H)")
    add("--quick", action="store_true", help="fewer sizes, shorter: about 20 s")
    add("--csv", type=Path, metavar="FILE", help="write every measurement")
    add("--plot", type=Path, metavar="FILE", help="draw them with their fits, as svg and png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns 1 if a cost is not linear in T, or if the check cannot tell."""
    unknown = [op for op in args.ops if op not in RANGES]
    if unknown:
        raise UsageError(f"OP wants {', '.join(RANGES)}, got {unknown[0]!r}")
    for module in ("tqdm", "scipy.stats", *(["matplotlib"] if args.plot is not None else [])):
        require(module)
    for line in machine.header(["cpu"]):
        print(line)
    found = measure_all(args.ops or list(RANGES), args.axis, quick=args.quick)
    print(f"\n{table(found)}\n")
    for line in conclusions(found):
        print(line)
    if args.csv is not None:
        write_csv(args.csv, [row for one in found for row in one.rows])
        print(f"\nmeasurements: {args.csv}")
    if args.plot is not None:
        for path in scaling_plot.draw(found, args.plot):
            print(f"plot: {path}")
    return 0 if passed(found) else 1


def measure_all(ops: Sequence[str], axes: Sequence[str], *, quick: bool) -> list[Series]:
    """All series with a progress bar on stderr, and the control if T is among the axes.

    A series along T whose scatter hides the answer is measured once more.
    """
    plan, sizes = (QUICK_PLAN, QUICK_SIZES) if quick else (PLAN, SIZES)
    wanted = [(op, axis, ours(op)) for axis in dict.fromkeys(axes) for op in dict.fromkeys(ops)]
    if "T" in axes:
        wanted.append((CONTROL_OP, "T", CONTROL))
    found = []
    bar = require("tqdm").tqdm(wanted, unit="series", file=sys.stderr, disable=None)
    for op, axis, contestant in bar:
        bar.set_postfix_str(f"{op}, {contestant}, {axis}")
        for _ in range(ATTEMPTS):
            one = series(op, axis, contestant, plan, sizes)
            if axis != "T" or "unclear" not in _verdicts(one).values():
                break
        found.append(one)
    return found


def _verdicts(one: Series) -> dict[str, str]:
    fits = {"time": one.time, "memory": one.memory}
    return {cost: "unclear" if found is None else found.verdict for cost, found in fits.items()}


def passed(found: Sequence[Series]) -> bool:
    """Whether all of ours are linear in T, and the control is not.

    Args:
        found: series along any axis; without one along T there is nothing to check.
    """
    checked = [one for one in found if one.axis == "T"]
    return all(
        set(_verdicts(one).values())
        == {"more than linear" if one.contestant == CONTROL else "linear"}
        for one in checked
    )


def table(found: Sequence[Series]) -> str:
    """One line per series."""
    lines = [
        [one.op, str(one.contestant), one.name, _text(one.time), _text(one.memory), _said(one)]
        for one in found
    ]
    return report.markdown(HEADER, lines)


def _text(found: Fit | None) -> str:
    if found is None:
        return "fixed cost or too few sizes"
    return f"{found} ({found.low:g}-{found.high:g})"


def _said(one: Series) -> str:
    if one.axis != "T":
        return ""
    verdicts = _verdicts(one)
    same = len(set(verdicts.values())) == 1
    return verdicts["time"] if same else ", ".join(f"{c} {v}" for c, v in verdicts.items())


def conclusions(found: Sequence[Series]) -> list[str]:
    """What the table means, in sentences."""
    lines = [RULE]
    for one in found:
        if one.axis != "T":
            continue
        verdicts = _verdicts(one)
        if one.contestant == CONTROL:
            seen = set(verdicts.values()) == {"more than linear"}
            failed = f"CONTROL FAILED: full attention is quadratic, but here {_said(one)}."
            lines.append(
                "Control: full attention is more than linear, as it must be." if seen else failed
            )
            continue
        for cost, verdict in verdicts.items():
            if verdict == "more than linear":
                lines.append(f"NOT LINEAR: {cost} of {one.op} grows faster than T.")
            elif verdict == "unclear":
                lines.append(f"UNCLEAR: {cost} of {one.op} scatters too much: measure again.")
    return lines
