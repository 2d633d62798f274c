"""What came of a call, and of which kind that is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fuzz.program import Spec

# Words of implementations, which tell a caller nothing.
_INTERNAL = re.compile(
    r"INTERNAL ASSERT|std::|bad_alloc|ERROR_CODE_CHECK|API call failed|_M_|\bc10::|\bnullptr\b"
)
_ALIASES = {
    "bias_ih": ("bias",), "bias_hh": ("bias",), "hx": ("hidden", "h_0", "c_0", "state"),
    "weights": ("weight", "bias"), "input_size": ("input",),
}  # fmt: skip
# What torch itself says, before any code of ours runs or where memory ends.
_OF_TORCH = re.compile(
    r"Could not run|run on a GPU|allocate|memory|Storage size|overflow|Expected a value of type|"
    r"incompatible function arguments|unexpected type|Overflow"
)

BAD = ("crash", "hang", "internal", "refused", "undocumented")


@dataclass(frozen=True)
class Outcome:
    """What a program came to.

    ``kind``: fine, clean, vague (an error that names no argument), undocumented (of another type
    than those of the docstrings), memory (there was too little), unmade (torch itself did not make
    an argument), or one of BAD.
    """

    kind: str
    text: str = ""


def of_error(error: BaseException, spec: Spec) -> Outcome:
    """The outcome of a call that raised."""
    # torch writes its own stack below the first line.
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, MemoryError):
        return Outcome("memory", text)
    if _INTERNAL.search(text):
        return Outcome("internal", text)
    if not isinstance(error, (RuntimeError, TypeError, ValueError)):
        return Outcome("internal" if spec.target.startswith("raw_") else "undocumented", text)
    if spec.target == "raw_gpu" and _OF_TORCH.search(text):
        return Outcome("clean", text)
    if spec.valid:
        return Outcome("refused", text)
    broken = [wrong.argument for wrong in spec.breaks]
    names = [name for wrong in broken for name in (wrong, *_ALIASES.get(wrong, ()))]
    named = any(name in text for name in names)
    return Outcome("clean" if named or _OF_TORCH.search(text) else "vague", text)
