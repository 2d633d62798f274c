"""The cases of ``bench compare``, written as text: ``lstm:T=120,B=100,I=1,H=128,p=0.5``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bench.arguments import UsageError
from bench.operations import OPERATIONS
from bench.operations.operation import Case

# The sizes of a case that does not name them.
TYPICAL: Mapping[str, Case] = {
    "lstm": replace(OPERATIONS["lstm"].typical, I=64, p=0.0),
    "rel-lstm": OPERATIONS["rel-lstm"].quick[0],
    "relevancy": OPERATIONS["relevancy"].typical,
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


def chosen(texts: Sequence[str], group: Sequence[str]) -> dict[str, Case]:
    """What is measured, by the text of each case.

    An operation alone stands for all cases that the group has of it, no text for the group.
    """
    found: dict[str, Case] = {}
    for text in texts or group:
        own = [case for case in group if case.partition(":")[0] == text] or [text]
        found |= {case: _parse(case) for case in own}
    return found


def _parse(text: str) -> Case:
    op, _, given = text.partition(":")
    try:
        parts = dict(part.split("=") for part in given.split(",") if part)
        known = {*OPERATIONS[op].sizes, *(["p"] if op == "lstm" else [])}
        sizes = {name: (float if name == "p" else int)(value) for name, value in parts.items()}
        if not known.issuperset(sizes) or any(value < 0 for value in sizes.values()):
            raise ValueError
    except (KeyError, ValueError):
        raise UsageError(
            f"--cases wants one of {', '.join(TYPICAL)}, or one with sizes, as in {QUICK[1]}, "
            f"got {text!r}"
        ) from None
    return replace(TYPICAL[op], **sizes)
