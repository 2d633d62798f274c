"""``bench plot``: draws stored measurements."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from bench import plots, scaling, speed_plots, table
from bench.errors import UsageError, require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench plot``."""
    parser.add_argument("csv", type=Path, nargs="+", metavar="CSV", help="of `bench OP --csv`")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="writes FILE.svg, FILE.png and the same with -roofline; of several operations, each "
        "with its name",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw; returns 0."""
    require("matplotlib")
    for path in draw(pd.concat([table.read_csv(path) for path in args.csv]), args.out):
        print(f"plot: {path}")
    return 0


def draw(found: pd.DataFrame, out: Path) -> list[Path]:
    """Write the pictures of every operation, and return the files.

    ``.svg`` or ``.png`` at the end of ``out`` makes no difference.

    Raises:
        UsageError: if no row has a time.
    """
    measured = found[found["median_ms"].notna()].reset_index(drop=True)
    if measured.empty:
        raise UsageError(
            f"nothing to draw: none of the {len(found)} rows has a time (see its note)"
        )
    stem = out.with_suffix("") if out.suffix in (".svg", ".png") else out
    files = []
    scaled = measured["note"] == scaling.NOTE
    if scaled.any():
        files += plots.save_both(scaling.draw(measured[scaled]), stem)
        measured = measured[~scaled]
    for operation, own in measured.groupby("op", sort=False):
        name = f"{stem.name}-{operation}" if measured["op"].nunique() > 1 else stem.name
        files += plots.save_both(speed_plots.speed(own), stem.with_name(name))
        roofline = speed_plots.roofline(own)
        files += plots.save_both(roofline, stem.with_name(f"{name}-roofline"))
    return files
