"""``python -m bench COMMAND`` in a checkout: measure, compare, profile, train, show."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from bench import (
    command,
    compare,
    last_step,
    page,
    plot,
    profile,
    rows,
    scaling,
)
from bench.errors import UsageError
from bench.rooms import OPERATIONS
from bench.train import command as train
from bench.train import demo

# Command -> (what it does, what adds its options and sets ``run``).
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "compare": ("tell whether the working tree has become slower", compare.add_arguments),
    "demo": ("show all of it in a few minutes", demo.add_arguments),
    "last-step": ("measure a loss on the last step alone", last_step.add_arguments),
    "plot": ("draw stored measurements", plot.add_arguments),
    "profile": ("tell where the time of the kernels goes", profile.add_arguments),
    "report": ("make a page of tables and plots from CSV files", page.add_arguments),
    "scaling": ("fit the powers with which time and memory grow", scaling.add_arguments),
    "train": ("train digits, copying or denoise", train.add_arguments),
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


INTERRUPTED = 130  # 128 + SIGINT, what a shell reports


def main(command_line: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 if a check or a training failed; 2 if the options are wrong; 130 after Ctrl-C.
    """
    words = sys.argv[1:] if command_line is None else list(command_line)
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(words, argparse.Namespace(command_line=words))
    try:
        return int(args.run(args))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
