"""Types of command line options, options of several commands, and errors in one sentence."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from throughtime import _install

INTERRUPTED = 130  # 128 + SIGINT, what a shell reports


class UsageError(Exception):
    """Something the person at the keyboard can put right; the message says what and how."""


def require(module: str) -> ModuleType:
    """Import a module that comes with the ``bench`` extra, or raise a ``UsageError``."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = (error.name or module).split(".")[0]
        distribution = "scikit-learn" if name == "sklearn" else name
        raise UsageError(
            f"this command needs {distribution}, which is not installed; "
            f"install it with: pip install {_install.source('[bench]')}"
        ) from error


def _kind(
    wanted: str, convert: Callable[[str], Any], fits: Callable[[Any], bool]
) -> Callable[[str], Any]:
    """The type of an option; what does not fit is a sentence."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"wanted {wanted}, got {text!r}")
        return value

    return parse


def _whole(least: int, most: int = 2**31 - 1) -> Callable[[str], Any]:
    wanted = f"a whole number from {least} to {most}"
    return _kind(wanted, int, lambda value: least <= value <= most)


positive, natural, thread_count = _whole(1), _whole(0), _whole(1, 256)
probability = _kind("a number from 0 to 1", float, lambda value: 0 <= value <= 1)
not_below_zero = _kind("a number from 0 up", float, lambda value: 0 <= value < math.inf)
above_zero = _kind("a number above 0", float, lambda value: 0 < value < math.inf)


def add_threads(parser: argparse.ArgumentParser) -> None:
    import torch

    text = "threads of each contestant (as torch has them)"
    parser.add_argument("--threads", type=thread_count, default=torch.get_num_threads(), help=text)


def _writable(text: str) -> Path:
    """A file whose folder exists from now on, not only after minutes of measuring."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {path}: {error.strerror}") from error
    return path


def add_files(parser: argparse.ArgumentParser, *, plot: bool = True) -> None:
    add = parser.add_argument_group("files").add_argument
    add("--csv", type=_writable, metavar="FILE", help="write every measurement")
    if plot:
        add("--plot", type=_writable, metavar="FILE", help="draw them, as svg and png")
