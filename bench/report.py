"""``bench report``: one page of tables and plots from the CSV files of any benchmarks.

The page is one file that needs neither a server nor a network. Tables sort by a click on a head,
and a search box filters them (DataTables, by itables).
"""

from __future__ import annotations

import argparse
import base64
import io
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from bench import plot, table
from bench.errors import UsageError, require

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>throughtime benchmark</title>
<style>
body {{ margin: 0 auto; padding: 1rem 2rem 4rem; max-width: 92rem; font: 15px/1.5 sans-serif; }}
img {{ max-width: 100%; }}
code {{ overflow-wrap: anywhere; }}
td, th {{ white-space: nowrap; }}
</style>
</head>
<body>
<h1>throughtime benchmark</h1>
<ol>{files}</ol>
{library}
{sections}
<h2>What the columns mean</h2>
<dl>{meanings}</dl>
</body>
</html>
"""
MAIN = ("impl", "median_ms", "ratio")
HIDDEN = ("machine", "torch", "version", "date", "command", "q1_ms", "q3_ms")  # listed per file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench report``."""
    parser.description = __doc__
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="CSV", help="what --csv of a benchmark has written")
    add("--out", type=Path, default=Path("benchmark.html"), metavar="FILE", help="(%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read the files and write the page; returns 0."""
    for module in ("itables", "matplotlib"):
        require(module)
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
    tables = [own.assign(file=number) for number, own in enumerate(files.values(), 1) if len(own)]
    if not tables:
        raise UsageError(f"{', '.join(files)}: no measurement to report: measure some with --csv")
    found = pd.concat(tables, ignore_index=True)
    javascript = require("itables.javascript")
    bundle = Path(str(javascript.__file__)).parent / "html" / "dt_bundle.js"
    return PAGE.format(
        files="".join(_file(name, own) for name, own in files.items()),
        library=javascript.generate_init_offline_itables_html(bundle),
        sections="\n".join(_section(str(op), own) for op, own in found.groupby("op", sort=False)),
        meanings="".join(
            f"<dt><code>{name}</code></dt><dd>{escape(text)}</dd>"
            for name, text in meanings().items()
        ),
    )


def meanings() -> dict[str, str]:
    """What every column means, from README.md."""
    text = Path(__file__).with_name("README.md").read_text("utf-8")
    found = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    return {name: meaning for name, meaning in found if name in table.COLUMNS}


def _file(name: str, own: pd.DataFrame) -> str:
    """Machine, versions, dates and commands of a file."""
    facts = [
        f"{head}{escape(' and '.join(own[column].unique()))}"
        for head, column in (("", "machine"), ("torch ", "torch"), ("throughtime ", "version"))
    ]
    if len(own):
        facts.append(f"{own['date'].min()} to {own['date'].max()}")
    commands = "".join(f"<br><code>{escape(command)}</code>" for command in own["command"].unique())
    return (
        f"<li><strong>{escape(name)}</strong>, {len(own)} rows<br>{'; '.join(facts)}{commands}</li>"
    )


def _section(op: str, own: pd.DataFrame) -> str:
    """Plots and table of one operation; rows without a time say why in their note."""
    parts = [f"<h2>{escape(op)}</h2>"]
    for number, measured in own[own["median_ms"].notna()].groupby("file"):
        for end, canvas in plot.pictures(measured).items():
            parts.append(_image(canvas, f"{op}{end}, file {number}"))
    shown = own.drop(columns=list(HIDDEN))
    shared = [name for name in shown if name not in MAIN and shown[name].nunique(dropna=False) == 1]
    values = {name: shown[name].iloc[0] for name in shared if name not in ("op", "file")}
    text = ", ".join(f"{n} {x}" for n, x in values.items() if pd.notna(x) and x != "")
    parts.append(f"<p>All rows: {escape(text)}</p>")
    shown = shown.drop(columns=shared)
    for name in shown.select_dtypes("float64"):
        shown[name] = [float(f"{value:.3g}") for value in shown[name]]
    parts.append(
        require("itables").to_html_datatable(
            shown, connected=False, paging=False, showIndex=False, maxBytes=0, classes="compact",
            display_logo_when_loading=False,
        )
    )  # fmt: skip
    return "\n".join(parts)


def _image(canvas: Any, alt: str) -> str:
    written = io.BytesIO()
    with require("matplotlib").rc_context({"svg.fonttype": "none"}):  # a third of the size
        canvas.savefig(written, format="svg", metadata={"Date": None})
    require("matplotlib.pyplot").close(canvas)
    code = base64.b64encode(written.getvalue()).decode()
    return f'<figure><img alt="{escape(alt)}" src="data:image/svg+xml;base64,{code}"></figure>'
