"""``bench plot``: draws stored measurements."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from bench import plots, scaling, speed_plots, table
from bench.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("csv", type=Path, nargs="+", metavar="CSV", help="of `bench OP --csv`")
    text = "writes FILE.svg, FILE.png and the same with -roofline; of several operations by name"
    add("--out", type=Path, required=True, metavar="FILE", help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for path in draw(pd.concat([table.read_csv(path) for path in args.csv]), args.out):
        print(f"plot: {path}")
    return 0


def pictures(found: pd.DataFrame) -> dict[str, Any]:
    """Figures by the end of their names: of speed, a roofline, and of a scaling run."""
    measured = found[found["median_ms"].notna()].reset_index(drop=True)
    scaled = measured["note"] == scaling.NOTE
    drawn = {"-scaling": scaling.draw(measured[scaled])} if scaled.any() else {}
    measured = measured[~scaled]
    for operation, own in measured.groupby("op", sort=False):
        name = f"-{operation}" if measured["op"].nunique() > 1 else ""
        drawn |= {name: speed_plots.speed(own), f"{name}-roofline": speed_plots.roofline(own)}
    return drawn


def draw(found: pd.DataFrame, out: Path) -> list[Path]:
    """Write the pictures as svg and as png, and return the files.

    Raises:
        UsageError: if no row has a time.
    """
    if found["median_ms"].isna().all():
        raise UsageError(f"nothing to draw: none of the {len(found)} rows has a time (see notes)")
    stem = out.with_suffix("") if out.suffix in (".svg", ".png") else out
    drawn = pictures(found).items()
    return [
        path
        for end, canvas in drawn
        for path in plots.save_both(canvas, stem.with_name(f"{stem.name}{end}"))
    ]
