"""``python -m throughtime``: what is installed, and which backend would run a layer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

import throughtime
from throughtime import env
from throughtime.backends import NAMES
from throughtime.backends.gpus import GPUS

DTYPES = ("float32", "float64", "bfloat16", "float16")


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    summary = (throughtime.__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser("python -m throughtime", description=summary)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    env_parser = commands.add_parser("env", help="versions, machine, backends and why not")
    env_parser.set_defaults(run=_env)

    explain_parser = commands.add_parser("explain", help="which backend would run a layer")
    for name, default in (("I", 1), ("H", 128), ("T", 1024), ("B", 16)):
        explain_parser.add_argument(
            f"--{name}", type=_positive, default=default, help=f"({default})"
        )
    explain_parser.add_argument("--bidirectional", action="store_true", help="both directions")
    explain_parser.add_argument(
        "--gpu", choices=GPUS, help="plan the CUDA kernels for this GPU, which need not be here"
    )
    explain_parser.add_argument(
        "--threads", type=_positive, help="plan the CPU kernels for so many threads"
    )
    explain_parser.add_argument("--proj", type=_natural, default=0, help="proj_size (0)")
    explain_parser.add_argument("--dtype", choices=DTYPES, default="float32")
    explain_parser.add_argument("--device", default="cpu")
    explain_parser.add_argument("--backend", choices=NAMES)
    explain_parser.set_defaults(run=_explain)

    return parser


def _env(args: argparse.Namespace) -> int:
    print(env.report())
    return 0


def _explain(args: argparse.Namespace) -> int:
    try:
        table = throughtime.explain(
            throughtime.LSTM(args.I, args.H, bidirectional=args.bidirectional, device="meta"),
            proj_size=args.proj,
            dtype=getattr(torch, args.dtype),
            device=torch.device(args.device),
            backend=args.backend,
            steps=args.T,
            batch_size=args.B,
            gpu=args.gpu,
            threads=args.threads,
        )
    except (RuntimeError, ValueError) as error:  # unknown device, unknown THROUGHTIME_BACKEND
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(table)
    return 0


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _natural(text: str) -> int:
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    value = int(text) if text.isdecimal() else -1
    if value < least:
        raise argparse.ArgumentTypeError(f"wanted a whole number of {least} or more, got {text!r}")
    return value


def main(command_line: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 2 if the options are wrong.
    """
    args = make_parser().parse_args(command_line)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
