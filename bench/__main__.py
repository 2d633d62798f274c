"""``python -m throughtime.bench COMMAND``: the same as ``python -m throughtime bench COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from throughtime.bench import command, compare, last_step, page, plot, profile, rows, scaling
from throughtime.bench.errors import UsageError
from throughtime.bench.rooms import OPERATIONS

# Command -> (what it does, what adds its options and sets ``run``).
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "compare": ("tell whether the working tree has become slower", compare.add_arguments),
    "last-step": ("measure a loss on the last step alone", last_step.add_arguments),
    "plot": ("draw stored measurements", plot.add_arguments),
    "profile": ("tell where the time of the kernels goes", profile.add_arguments),
    "report": ("make a page of tables and plots from CSV files", page.add_arguments),
    "scaling": ("fit the powers with which time and memory grow", scaling.add_arguments),
    "schema": ("print the columns of the CSV files", rows.add_arguments),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmarks and what is made of them, one subcommand each."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, operation in OPERATIONS.items():
        text = f"measure {name}"
        command.add_arguments(commands.add_parser(name, help=text, description=text), operation)
    for name, (text, add) in COMMANDS.items():
        add(commands.add_parser(name, help=text, description=text))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser("python -m throughtime.bench", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
