"""Types of command line options; what argparse cannot accept becomes a sentence that says why."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """A whole number of 1 or more.

    Example:
        >>> positive("3")
        3
    """
    return _at_least(text, 1)


def natural(text: str) -> int:
    """A whole number of 0 or more."""
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    wanted = f"wanted a whole number of {least} or more, got {text!r}"
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(wanted) from None
    if value < least:
        raise argparse.ArgumentTypeError(wanted)
    return value


def probability(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"wanted a number from 0 to 1, got {text!r}")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"wanted a number above 0, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a number, got {text!r}") from None
