"""``bench compare``: its cases, written as text: ``lstm:T=120,B=100,I=1,H=128,p=0.5``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from bench.errors import UsageError

# The sizes of every operation, with what a case takes that does not name them.
_SCREENING = {"window_size": 10, "top_k": 15}
_ATTENTION = {"window_size": 64, "top_k": 64}
SIZES: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "lstm": {"T": 100, "B": 64, "I": 64, "H": 256, "p": 0.0, "dtype": "float32"},
    "rel-lstm": {"T": 120, "B": 10, "I": 10, "H": 128, **_SCREENING, "dtype": "float32"},
    "relevancy": {"T": 2048, "B": 2, "heads": 4, "D": 64, **_ATTENTION, "dtype": "float32"},
})  # fmt: skip
DTYPES = ("float32", "float64", "bfloat16", "float16")

QUICK = (
    "lstm:T=120,B=100,I=1,H=128",
    "lstm:T=120,B=100,I=1,H=128,p=0.5",
    "lstm:T=50,B=64,I=256,H=256",
    "lstm:T=300,B=1,I=128,H=128",
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
    """What is measured: the text of each case -> ``op`` and sizes, as ``compare_worker`` takes it.

    Args:
        texts: cases; an operation alone stands for all cases that the group has of it. Empty: the
            group.
        group: ``QUICK`` or ``DEFAULT``.

    Raises:
        UsageError: if a text is no case.

    Example:
        >>> list(chosen(["relevancy", "lstm:T=7"], QUICK))
        ['relevancy:T=512', 'lstm:T=7']
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
    sizes = dict(SIZES[op])
    for part in given.split(",") if given else []:
        name, _, value = part.partition("=")
        if name not in sizes:
            raise UsageError(
                f"--cases {text}: {op} has the sizes {', '.join(sizes)}, got {part!r}: write it as "
                f"in {QUICK[1]}"
            )
        sizes[name] = _value(text, name, value)
    return {"op": op, **sizes}


def _value(text: str, name: str, value: str) -> Any:
    if name == "dtype":
        if value not in DTYPES:
            raise UsageError(f"--cases {text}: dtype is one of {', '.join(DTYPES)}, got {value!r}")
        return value
    low, high = (0, 1) if name == "p" else (0 if name == "top_k" else 1, 10**9)
    try:
        number = float(value) if name == "p" else int(value)
    except ValueError:
        number = -1
    if not low <= number <= high:
        kind = "a number from 0 to 1" if name == "p" else f"a whole number of {low} or more"
        raise UsageError(f"--cases {text}: {name} wants {kind}, got {value!r}")
    return number
