"""Runs the programs of ``programs.py`` with ``nn.LSTM`` as it is, accelerated, and replaced.

    python tests/clients [--out TABLE] [--only WORDS]

Each run is a process of its own. A row is written as soon as it is known, and a row of the same
versions and the same commit of ours is not run again: an interrupted run goes on where it was.
``make test-clients`` makes an environment first, and runs the tests in this folder too. The page
``python/docs/compatibility.rst`` shows the table.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from programs import PROGRAMS

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "python" / "docs" / "programs.csv"
COLUMNS = ("program", "version", "torch", "accelerate", "replace", "what to do", "commit")
SOURCES = ("csrc", "python/throughtime", "python/throughtime_autoload", "tests/clients")
TESTS = ("pytest>=8.4", "pytest-timeout")  # for the adapters' tests, beside the programs' packages
WAYS = ("stock", "accelerate", "replace")
SECONDS = 900
ROUNDING = 1e-3  # relative, after some steps of training in float32

Row = dict[str, str]


def run(title: str, way: str) -> None:
    """One program in one way; prints its numbers, and what ran them."""
    import torch

    import throughtime

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    told = ""
    if way == "accelerate":
        with throughtime.accelerate() as handle:
            numbers = PROGRAMS[title].run(lambda model: None)
        ours = sum(n for key, n in handle.calls.items() if not key.startswith("original"))
        told = f"{ours} of {handle.calls.total()} calls on ours"
    elif way == "replace":
        reports: list[throughtime.Replacement] = []
        numbers = PROGRAMS[title].run(lambda model: reports.append(throughtime.replace(model)))
        count = sum(len(report.replaced) for report in reports)
        skipped = [reason for report in reports for reason in report.skipped.values()]
        told = f"{count} replaced" + "".join(f"; skipped: {reason}" for reason in skipped)
    else:
        numbers = PROGRAMS[title].run(lambda model: None)
    print("\n" + json.dumps({"numbers": numbers, "told": told}))


def outcome(title: str, way: str) -> tuple[list[float], str]:
    """The numbers of a run in a process of its own, and what it told; no numbers if it failed."""
    command = [sys.executable, str(Path(__file__).parent), "--one", title, way]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return [], f"no end after {SECONDS} s"
    if done.returncode != 0:
        return [], (done.stderr.strip().splitlines() or ["no word"])[-1][:160]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found["numbers"], found["told"]


def row(title: str) -> Row:
    """The whole row of a program."""
    found = {"program": title, **versions(title)}
    plain, told = outcome(title, "stock")
    for way in WAYS[1:]:
        if not plain:
            found[way] = f"not tried: nn.LSTM itself fails: {told}"
            continue
        numbers, told = outcome(title, way)
        if not numbers:
            found[way] = f"fails: {told}"
        elif len(numbers) == len(plain) and all(
            abs(one - other) <= ROUNDING * max(1.0, abs(other))
            for one, other in zip(numbers, plain, strict=True)
        ):
            found[way] = f"equal; {told}"
        else:
            found[way] = f"other numbers: {numbers[:3]}, nn.LSTM has {plain[:3]}"
    return found


def versions(title: str) -> Row:
    """Of the program, of torch and of ours; "" where it is not installed."""
    found = {"commit": commit()}
    for column, package in (("version", PROGRAMS[title].packages[0]), ("torch", "torch")):
        try:
            found[column] = version(package.partition("[")[0])
        except PackageNotFoundError:
            found[column] = ""
    return found


@functools.cache
def commit() -> str:
    """The last one that changed what is tried here, and whether more was changed since."""
    git = ["git", "-C", str(ROOT)]
    log = [*git, "log", "-1", "--format=%h", "--", *SOURCES]
    last = subprocess.run(log, capture_output=True, text=True, check=True)
    more = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *SOURCES], check=False)
    return last.stdout.strip() + ("" if more.returncode == 0 else ", changed")


def read(table: Path) -> dict[str, Row]:
    if not table.is_file():
        return {}
    with table.open(encoding="utf-8", newline="") as file:
        return {row["program"]: row for row in csv.DictReader(file)}


def write(table: Path, rows: dict[str, Row]) -> None:
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[title] for title in PROGRAMS if title in rows)


def settled(row: Row | None, now: Row) -> bool:
    """Whether a row is of these versions and need not be tried again."""
    same = row is not None and all(row.get(name) == now[name] for name in now)
    return same and good(row) and not commit().endswith("changed")


def good(row: Row) -> bool:
    """Whether accelerate gives what nn.LSTM gives."""
    return row["accelerate"].startswith("equal")


def main() -> int:
    """Runs what the table lacks; 1 if accelerate gives other numbers anywhere."""
    parser = argparse.ArgumentParser("clients", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="the table (%(default)s)")
    parser.add_argument("--only", default="", help="programs whose title holds this")
    parser.add_argument("--one", nargs=2, metavar=("PROGRAM", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--packages", action="store_true", help="print what pip should install")
    args = parser.parse_args()
    if args.packages:
        packages = (name for program in PROGRAMS.values() for name in program.packages)
        print(*dict.fromkeys((*packages, *TESTS)))
        return 0
    if args.one:
        run(*args.one)
        return 0
    rows = read(args.out)
    for title in PROGRAMS:
        if args.only not in title:
            continue
        now = versions(title)
        if not now["version"]:
            rows[title] = dict.fromkeys(COLUMNS, "") | now | {
                "program": title, "accelerate": "not tried", "replace": "not tried"
            }  # fmt: skip
        elif not settled(rows.get(title), now):
            rows[title] = row(title)
        rows[title]["what to do"] = PROGRAMS[title].advice
        write(args.out, rows)
        print(" | ".join(rows[title][name] for name in COLUMNS), flush=True)
    return int(not all(good(row) or not row["version"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
