"""``python -m throughtime``: what is installed, what would run, train, benchmark, show."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

import throughtime
from throughtime import env
from throughtime.backends import NAMES
from throughtime.backends.gpu_plan import GPUS
from throughtime.bench import __main__ as bench
from throughtime.bench import arguments, demo, train
from throughtime.bench.errors import UsageError

DTYPES = ("float32", "float64", "bfloat16", "float16")
INTERRUPTED = 130  # 128 + SIGINT, what a shell reports


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    summary = (throughtime.__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser("python -m throughtime", description=summary)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    env_parser = commands.add_parser("env", help="versions, machine, backends and why not")
    env_parser.set_defaults(run=_env)

    explain_parser = commands.add_parser("explain", help="which backend would run a layer")
    for name, default in (("H", 128), ("T", 1024), ("B", 16)):
        explain_parser.add_argument(
            f"--{name}", type=arguments.positive, default=default, help=f"({default})"
        )
    explain_parser.add_argument("--bidirectional", action="store_true", help="both directions")
    explain_parser.add_argument(
        "--gpu", choices=GPUS, help="plan the CUDA kernels for this GPU, which need not be here"
    )
    explain_parser.add_argument("--proj", type=arguments.natural, default=0, help="proj_size (0)")
    explain_parser.add_argument("--dtype", choices=DTYPES, default="float32")
    explain_parser.add_argument("--device", default="cpu")
    explain_parser.add_argument("--backend", choices=NAMES)
    explain_parser.set_defaults(run=_explain)

    for name, module, text in (
        ("train", train, "train digits, copying or denoise"),
        ("bench", bench, "measure speed and memory"),
        ("demo", demo, "all of it in a few minutes"),
    ):
        module.add_arguments(commands.add_parser(name, help=text, description=text))
    return parser


def _env(args: argparse.Namespace) -> int:
    print(env.report())
    return 0


def _explain(args: argparse.Namespace) -> int:
    try:
        table = throughtime.explain(
            throughtime.LSTM(1, args.H, bidirectional=args.bidirectional, device="meta"),
            proj_size=args.proj,
            dtype=getattr(torch, args.dtype),
            device=torch.device(args.device),
            backend=args.backend,
            steps=args.T,
            batch_size=args.B,
            gpu=args.gpu,
        )
    except (RuntimeError, ValueError) as error:  # unknown device, unknown THROUGHTIME_BACKEND
        raise UsageError(str(error).splitlines()[0]) from error
    print(table)
    return 0


def main(command_line: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        0; 1 if a check or a training failed; 2 if the options are wrong; 130 after Ctrl-C.
    """
    words = sys.argv[1:] if command_line is None else list(command_line)
    args = make_parser().parse_args(words, argparse.Namespace(command_line=words))
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
