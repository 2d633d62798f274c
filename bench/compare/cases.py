"""The cases of ``bench compare``, written as text: ``lstm:T=120,B=100,I=1,H=128,p=0.5``."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from typing import Any

from bench import arguments
from bench.errors import UsageError
from bench.operations.operation import DTYPES

# The sizes of every operation, and those of a case that does not name them.
SIZES: Mapping[str, Mapping[str, Any]] = {
    "lstm": {"T": 100, "B": 64, "I": 64, "H": 256, "p": 0.0},
    "rel-lstm": {"T": 120, "B": 10, "I": 10, "H": 128, "window_size": 10, "top_k": 15},
    "relevancy": {"T": 2048, "B": 2, "heads": 4, "D": 64, "window_size": 64, "top_k": 64},
}
QUICK = (
    "lstm:T=120,B=100,I=1,H=128",
    "lstm:T=120,B=100,I=1,H=128,p=0.5",
    "lstm:T=50,B=64,I=256,H=256",
    "lstm:T=300,B=1,I=128,H=128",
    "lstm:T=4,B=1,I=16,H=32",
    "rel-lstm:T=120,B=10,I=10,H=128",
    "relevancy:T=512",
)
DEFAULT = (
    *QUICK,
    "lstm:T=300,B=1,I=128,H=128,p=0.5",
    "lstm:T=784,B=100,I=1,H=128",
    "lstm:T=100,B=64,I=512,H=512",
    "rel-lstm:T=320,B=10,I=10,H=128",
    "relevancy:T=2048",
    "relevancy:T=8192",
)


def chosen(texts: Sequence[str], group: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is measured: the text of each case -> ``op`` and sizes, as the worker takes it.

    An operation alone stands for all cases that the group has of it, no text for the group.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts or group:
        own = [case for case in group if case.partition(":")[0] == text] or [text]
        found |= {case: _parse(case) for case in own}
    return found


def _parse(text: str) -> dict[str, Any]:
    op, _, given = text.partition(":")
    if op not in SIZES:
        raise UsageError(f"--cases wants one of {', '.join(SIZES)} before a colon, got {text!r}")
    sizes = {"op": op, "dtype": "float32", **SIZES[op]}
    for part in given.split(",") if given else []:
        name, _, value = part.partition("=")
        if name not in (*SIZES[op], "dtype"):
            raise UsageError(
                f"--cases {text}: {op} has the sizes {', '.join(SIZES[op])}, dtype, got {part!r}: "
                f"write it as in {QUICK[1]}"
            )
        try:
            sizes[name] = _value(name, value)
        except ArgumentTypeError as error:
            raise UsageError(f"--cases {text}: {name}: {error}") from error
    return sizes


def _value(name: str, value: str) -> Any:
    if name == "dtype":
        if value in DTYPES:
            return value
        raise ArgumentTypeError(f"wanted one of {', '.join(DTYPES)}, got {value!r}")
    kinds = {"p": arguments.probability, "top_k": arguments.natural}
    return kinds.get(name, arguments.positive)(value)
