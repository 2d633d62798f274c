"""``bench report``: one page of plots and tables from the CSV files of any benchmarks.

The page is one file that needs neither a server nor a network. Tables sort by a click on a head,
and a search box filters them (DataTables, by itables). bench/README.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from itables import javascript, to_html_datatable

from bench import plot, table
from bench.errors import UsageError

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>throughtime benchmark</title>
<style>
body {{ margin: 0 auto; padding: 1rem 2rem 4rem; max-width: 92rem; font: 15px/1.5 sans-serif; }}
svg {{ max-width: 100%; height: auto; }}
td, th {{ white-space: nowrap; }}
</style>
<h1>throughtime benchmark</h1>
{library}
{sections}
</html>
"""
MAIN = ("impl", "median_ms", "ratio")
HIDDEN = ["q1_ms", "q3_ms", "date"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="CSV", help="what --csv of a benchmark has written")
    add("--out", type=Path, default=Path("benchmark.html"), metavar="FILE", help="(%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    text = page({str(path): table.read_csv(path) for path in args.files})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(f"page: {args.out}")
    return 0


def page(files: Mapping[str, pd.DataFrame]) -> str:
    """The page as HTML, from name -> rows.

    Raises:
        UsageError: if there is no row.
    """
    sections = [_section(name, own) for name, own in files.items() if len(own)]
    if not sections:
        raise UsageError(f"{', '.join(files)}: no measurement to report: measure some with --csv")
    bundle = Path(str(javascript.__file__)).parent / "html" / "dt_bundle.js"
    library = javascript.generate_init_offline_itables_html(bundle)
    return PAGE.format(library=library, sections="\n".join(sections))


def _section(name: str, own: pd.DataFrame) -> str:
    """Plots and table of one file; rows without a time say why in their note."""
    shown = own.drop(columns=HIDDEN)
    shared = [key for key in shown if key not in MAIN and shown[key].nunique(dropna=False) == 1]
    values = {key: shown[key].iloc[0] for key in shared}
    words = [f"{key} {value}" for key, value in values.items() if pd.notna(value) and value != ""]
    words.append(f"date {own['date'].min()} to {own['date'].max()}")
    shown = shown.drop(columns=shared)
    for key in shown.select_dtypes("float64"):
        shown[key] = [float(f"{value:.3g}") for value in shown[key]]
    rows = to_html_datatable(
        shown, connected=False, paging=False, showIndex=False, maxBytes=0, classes="compact",
        display_logo_when_loading=False,
    )  # fmt: skip
    images = [_image(canvas) for canvas in plot.pictures(own).values()]
    head = f"<h2>{escape(name)}</h2>\n<p>All rows: {escape(', '.join(words))}</p>"
    return "\n".join([head, *images, rows])


def _image(canvas: Any) -> str:
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # a third of the size
        canvas.savefig(written, format="svg", metadata={"Date": None})
    plt.close(canvas)
    return written.getvalue().partition("<svg")[2].join(["<figure><svg", "</figure>"])
