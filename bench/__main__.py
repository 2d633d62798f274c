"""``python -m bench COMMAND`` in a checkout: measure, compare, profile, train, show."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench.arguments import INTERRUPTED, UsageError, require

# Command -> what it does, and the module whose ``add_arguments`` adds its options and sets ``run``.
COMMANDS = {
    "lstm": ("measure an LSTM layer beside nn.LSTM and others", "bench.measure.command"),
    "rel-lstm": ("measure a RelLSTM layer beside its authors' loop", "bench.measure.command"),
    "relevancy": ("measure relevancy attention beside full attention", "bench.measure.command"),
    "rl": ("measure rows of episodes, a PPO loss and rollouts", "bench.rl"),
    "scaling": ("fit the power of T with which time and memory grow", "bench.scaling"),
    "compare": ("say whether the working tree is slower than a revision", "bench.compare.command"),
    "profile": ("say where the time of the kernels goes", "bench.profile"),
    "plot": ("print and draw stored measurements", "bench.plot"),
    "train": ("train on pixels, copying, denoise, text or series", "bench.train.command"),
    "sweep": ("train once for each combination of values, resumable", "bench.train.sweep"),
    "reproduce": ("measure the claims of both papers again", "bench.reproduce.command"),
    "demo": ("show all of it in a few minutes", "bench.train.demo"),
}
MEASURED = ("lstm", "rel-lstm", "relevancy")


def make_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands; only the module of the chosen one is imported."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (text, module) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name in words[:1]:
            more = [name] if name in MEASURED else []
            require(module).add_arguments(sub, *more)
    return parser


def main(command_line: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 if a check or a training failed; 2 if the options are wrong; 130 after Ctrl-C.
    """
    words = sys.argv[1:] if command_line is None else list(command_line)
    try:
        args = make_parser(words).parse_args(words, argparse.Namespace(command_line=words))
        return int(args.run(args))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
