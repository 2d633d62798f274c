"""Verification: an implementation that computes something else gets no speed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from bench.operations.operation import DTYPES, MODES, REFERENCE, Case, Contestant, Operation

# Roundings beyond twice the error of plain PyTorch. In 16 bits values are rounded once, at the
# end, so that few are needed; 32 of them (25 % in bfloat16) would let a missing mask pass.
ROUNDING_UNITS = {"float32": 32, "float64": 32, "bfloat16": 2, "float16": 2}
LOOP = Contestant("loop")
RIGHT_IN_FLOAT64 = 1e-9
CHOICE = "last"  # of keys, whole numbers: no rounding excuses a difference there


@dataclass(frozen=True)
class Errors:
    """max |got - wanted| / max |wanted| of every result and gradient (``d ...``) of one contestant.

    ``limit`` is the largest error that passes.
    """

    relative: Mapping[str, float]
    limit: float

    @property
    def worst(self) -> str:
        """The result with the largest error."""
        return max(self.relative, key=lambda name: self.relative[name])

    @property
    def largest(self) -> float:
        return self.relative[self.worst]

    @property
    def passed(self) -> bool:
        """Whether every error is within the limit."""
        return self.largest <= self.limit

    def __str__(self) -> str:
        return (
            f"error of {self.worst} is {self.largest:.1e} against the float64 reference, "
            f"allowed {self.limit:.1e}"
        )


class Verifier:
    """Compares values and all gradients of one iteration with the float64 reference.

    The limit is twice the error of plain PyTorch in the same dtype (the reference; in 16 bits also
    the Python loop, where there is one), plus ``ROUNDING_UNITS``: an implementation may round
    otherwise than PyTorch does, but must not be less accurate. T is that of
    ``Operation.shortened``; the other sizes stay, as they decide which kernel runs. A peer that
    computes another function is compared with itself in float64 and never fails.

    What the contestants of a case are compared with is computed once.
    """

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._truth = lru_cache(maxsize=2)(self._find_truth)

    def check(self, contestant: Contestant, case: Case) -> Errors:
        case = replace(self._operation.shortened(case), mode=MODES[0], input_grad=True)
        exact, limit = (
            self._truth(case)
            if self._operation.same_function(contestant.impl)
            else (self._exact(contestant, case), math.inf)
        )
        return Errors(relative_errors(self._results(contestant, case), exact), limit)

    def _find_truth(self, case: Case) -> tuple[dict[str, Tensor], float]:
        exact = self._exact(REFERENCE, case)
        plain = [REFERENCE, *([LOOP] if self._loop_rounds_more(case, exact) else [])]
        found = [relative_errors(self._results(contestant, case), exact) for contestant in plain]
        largest = max(e for errors in found for name, e in errors.items() if name != CHOICE)
        eps = torch.finfo(DTYPES[case.dtype]).eps
        return exact, 2 * largest + ROUNDING_UNITS[case.dtype] * eps

    def _loop_rounds_more(self, case: Case, exact: Mapping[str, Tensor]) -> bool:
        """In 16 bits the reference rounds once, a loop at every step: what people have today.

        Only a loop that is right in float64 may widen the limit.
        """
        if case.itemsize > 2 or LOOP.impl not in self._operation.peers:
            return False
        return max(relative_errors(self._exact(LOOP, case), exact).values()) < RIGHT_IN_FLOAT64

    def _results(self, contestant: Contestant, case: Case) -> dict[str, Tensor]:
        return self._operation.work(contestant, case).results()

    def _exact(self, contestant: Contestant, case: Case) -> dict[str, Tensor]:
        return self._operation.work(contestant, replace(case, device="cpu"), exact=True).results()


def relative_errors(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest |got - wanted| over the largest |wanted|, of every result of ``got``.

    Where all that is wanted is zero, any difference is infinitely large, and so is NaN.
    """
    errors = {}
    for name, value in got.items():
        difference = float((value - wanted[name]).abs().max())
        size = float(wanted[name].abs().max())
        error = difference / size if size else (math.inf if difference else 0.0)
        errors[name] = math.inf if math.isnan(error) else error
    return errors
