"""``bench plot``: draws stored measurements."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench import plots, speed_plots
from bench.errors import UsageError, require
from bench.rows import Row, read_csv

SUFFIXES = (".svg", ".png")


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
    """Draws; returns 0."""
    require("matplotlib")
    rows = [row for path in args.csv for row in read_csv(path)]
    for path in draw(rows, args.out):
        print(f"plot: {path}")
    return 0


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Writes the pictures of every operation.

    Args:
        rows: measurements.
        out: name of the files; ``.svg`` or ``.png`` at its end makes no difference.

    Returns:
        The files.

    Raises:
        UsageError: if no row has a time.
    """
    measured = [row for row in rows if row.median_ms is not None]
    if not measured:
        raise UsageError(f"nothing to draw: none of the {len(rows)} rows has a time (see its note)")
    stem = out.with_suffix("") if out.suffix in SUFFIXES else out
    operations = list(dict.fromkeys(row.op for row in measured))
    files = []
    for operation in operations:
        own = [row for row in measured if row.op == operation]
        name = stem.name if len(operations) == 1 else f"{stem.name}-{operation}"
        pictures = {name: speed_plots.speed(own), f"{name}-roofline": speed_plots.roofline(own)}
        for written, canvas in pictures.items():
            files += plots.save_both(canvas, stem.with_name(written))
    return files
