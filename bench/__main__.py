"""``python -m throughtime.bench lstm``: the same as ``python -m throughtime bench lstm``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from throughtime.bench import lstm
from throughtime.bench.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmarks, one subcommand each."""
    operations = parser.add_subparsers(title="operations", required=True, metavar="OPERATION")
    lstm.add_arguments(
        operations.add_parser("lstm", help="one LSTM layer", description=lstm.__doc__)
    )


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
