"""``reproduce``: measures the claims of both papers and writes a page about them.

Rows of a claim are stored as soon as they are measured and are taken as they are from then on.
Training runs resume: Ctrl-C during a sweep stores and shows what it has, and the next run goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import joblib
import pandas as pd

from bench import arguments, machine
from bench.arguments import INTERRUPTED
from bench.reproduce import pictures
from bench.reproduce.claims import CLAIMS, Claim
from bench.reproduce.training import Setup, Unfinished
from bench.train.folder import RunFolder

PAGE = "reproduction.md"
UNFINISHED = "unfinished"  # a column of rows that Ctrl-C cut short: the next run goes on
INTRODUCTION = """# The claims of the papers, measured again

Written by `make reproduce` from the CSV files beside this page. A: h-detach, Kanuparthi et al.,
ICLR 2019, arXiv 1810.03023. B: relevancy screening, Kerg, Kanuparthi et al., NeurIPS 2020, arXiv
2006.09471. The papers' tables are not at hand; [S] is the ReScience replication of A (Didolkar,
2019), read off its plots. Sizes are those of a small machine. A number followed by a range is the
median and the quartiles over seeds. Chance on copying and denoise is 12.5 %.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [claim.name for claim in CLAIMS]
    add = parser.add_argument
    add("--claims", choices=names, nargs="+", metavar="NAME", help=f"of {', '.join(names)}")
    add("--full", action="store_true", help="also the claims that take hours")
    add("--jobs", type=arguments.positive, default=joblib.cpu_count(), help="(%(default)s)")
    add("--out", type=Path, default=Path("runs/reproduction"), metavar="DIR", help="(%(default)s)")
    add("--runs", type=Path, default=Path("runs/reproduction/runs"), metavar="DIR",
        help="where training runs are kept (%(default)s)")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures what is not stored yet; returns 130 after Ctrl-C."""
    setup, code = Setup(args.runs, args.jobs), 0
    with RunFolder(args.out) as folder:
        for claim in CLAIMS:
            path = args.out / f"{claim.name}.csv"
            wanted = claim.name in args.claims if args.claims else args.full or not claim.hours
            if not wanted or finished(path):
                continue
            print(f"{claim.name}: {claim.how}", file=sys.stderr, flush=True)
            start = time.perf_counter()
            try:
                rows = claim.measure(setup)
            except KeyboardInterrupt as stop:
                code = INTERRUPTED
                if not isinstance(stop, Unfinished):
                    break
                rows = stop.rows.assign(**{UNFINISHED: True})
            rows = rows.assign(machine=machine.name())
            folder.write_table(path.name, rows.to_dict("records"))
            print(f"{path}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            if code:
                break
        write(folder)
    return code


def finished(path: Path) -> bool:
    """Whether the rows of a claim are stored, all of them."""
    return path.exists() and UNFINISHED not in pd.read_csv(path, nrows=0).columns


def write(folder: RunFolder) -> None:
    """Writes page and pictures from the stored rows."""
    parts = [INTRODUCTION]
    for claim in CLAIMS:
        path = folder.path / f"{claim.name}.csv"
        if path.exists():
            rows = pd.read_csv(path)
            parts.append(section(claim, rows))
            if claim.name in pictures.PICTURES:
                folder.write_figure(claim.name, pictures.PICTURES[claim.name](rows))
                parts[-1] += f"\n![{claim.name}]({claim.name}.svg)\n"
    page = "\n".join(parts)
    print(page)
    print(f"page: {folder.write(PAGE, page.encode())}")


def section(claim: Claim, rows: pd.DataFrame) -> str:
    """What the page says of one claim."""
    finding = claim.judge(rows)
    table = "" if finding.table is None else f"\n{finding.table.to_markdown(index=False)}\n"
    return f"""## {claim.name}: {finding.verdict}

{claim.paper}: {claim.sentence}

- Published: {claim.published}.
- Here: {claim.how}
- Found{" so far" if UNFINISHED in rows else ""}: {finding.ours}.
- Rows: [{claim.name}.csv]({claim.name}.csv), {rows.machine.iloc[0]}.
{table}"""
