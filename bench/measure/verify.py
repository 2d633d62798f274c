"""Verification: an implementation that computes something else gets no speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from bench.operations.operation import (
    AUTOCAST,
    MODES,
    PRECISIONS,
    REFERENCE,
    Case,
    Contestant,
    Operation,
)

# Roundings beyond twice the error of plain PyTorch. In 16 bits values are rounded once, at the
# end, so that few are needed; 32 of them (25 % in bfloat16) would let a missing mask pass.
ROUNDING_UNITS = {"float32": 32, "float64": 32, "bfloat16": 2, "float16": 2, AUTOCAST: 2}
ROUNDING_UNITS |= dict.fromkeys(PRECISIONS, 2)
LOOP, TORCH = Contestant("loop"), Contestant("torch")
SCATTER = 2.0  # root mean squares of few numbers scatter: by this / sqrt(H) of their size
RIGHT_IN_FLOAT64 = 1e-9
CHOICE = "last"  # of keys, whole numbers: no rounding excuses a difference there


@dataclass(frozen=True)
class Errors:
    """Errors of every result and gradient (``d ...``) of one contestant, and what passes.

    ``relative`` is max |got - wanted| / max |wanted|, ``rms`` the same of root mean squares.
    """

    relative: Mapping[str, float]
    rms: Mapping[str, float]
    limit: float
    rms_limit: float = math.inf

    @property
    def largest(self) -> float:
        return max(self.relative.values())

    @property
    def largest_rms(self) -> float:
        return max(self.rms.values())

    @property
    def passed(self) -> bool:
        """Whether every error is within its limit."""
        return self.largest <= self.limit and self.largest_rms <= self.rms_limit

    def __str__(self) -> str:
        """The error that is too large, or the largest."""
        kind, errors, limit = "error", self.relative, self.limit
        if self.largest <= self.limit and self.largest_rms > self.rms_limit:
            kind, errors, limit = "root mean square error", self.rms, self.rms_limit
        worst = max(errors, key=lambda name: errors[name])
        return (
            f"{kind} of {worst} is {errors[worst]:.1e} against the float64 reference, "
            f"allowed {limit:.1e}"
        )


class Verifier:
    """Compares values and all gradients of one iteration with the float64 reference.

    The limit is twice the error of plain PyTorch in the same dtype (the reference; in 16 bits also
    the Python loop, where there is one), plus ``ROUNDING_UNITS``: an implementation may round
    otherwise than PyTorch does, but must not be less accurate. On a CPU, the root mean square error
    of ours in 16 bits and under autocast is also at most that of nn.LSTM. T is that of
    ``Operation.shortened``; the other sizes stay, as they decide which kernel runs. A peer that
    computes another function is compared with itself in float64 and never fails.

    What the contestants of a case are compared with is computed once.
    """

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._truth = lru_cache(maxsize=2)(self._find_truth)

    def check(self, contestant: Contestant, case: Case) -> Errors:
        case = replace(self._operation.shortened(case), mode=MODES[0], input_grad=True)
        exact, *limits = (
            self._truth(case)
            if self._operation.same_function(contestant.impl)
            else (self._exact(contestant, case), math.inf, math.inf)
        )
        got = self._results(contestant, case)
        if not contestant.ours:
            limits[1] = math.inf
        return Errors(relative_errors(got, exact), relative_errors(got, exact, rms), *limits)

    def _find_truth(self, case: Case) -> tuple[dict[str, Tensor], float, float]:
        exact = self._exact(REFERENCE, case)
        plain = [REFERENCE, *([LOOP] if self._loop_rounds_more(case, exact) else [])]
        found = [relative_errors(self._results(contestant, case), exact) for contestant in plain]
        largest = max(e for errors in found for name, e in errors.items() if name != CHOICE)
        limit = 2 * largest + ROUNDING_UNITS[case.dtype] * case.rounding
        return exact, limit, self._error_of_torch(case) * (1 + SCATTER / case.width**0.5)

    def _error_of_torch(self, case: Case) -> float:
        """Root mean square, at p = 0: nn.LSTM detaches nothing. Infinite where it sets no limit."""
        peers, impl = self._operation.peers, TORCH.impl
        comparable = impl in peers and peers[impl].same_function
        if case.operands.itemsize > 2 or case.device != "cpu" or not comparable:
            return math.inf
        case = self._operation.timed(impl, case)
        got, exact = self._results(TORCH, case), self._exact(TORCH, case)
        return max(relative_errors(got, exact, rms).values())

    def _loop_rounds_more(self, case: Case, exact: Mapping[str, Tensor]) -> bool:
        """In 16 bits the reference rounds once, a loop at every step: what people have today.

        Only a loop that is right in float64 may widen the limit.
        """
        if case.operands.itemsize > 2 or LOOP.impl not in self._operation.peers:
            return False
        return max(relative_errors(self._exact(LOOP, case), exact).values()) < RIGHT_IN_FLOAT64

    def _results(self, contestant: Contestant, case: Case) -> dict[str, Tensor]:
        return self._operation.work(contestant, case).results()

    def _exact(self, contestant: Contestant, case: Case) -> dict[str, Tensor]:
        return self._operation.work(contestant, replace(case, device="cpu"), exact=True).results()


def largest(x: Tensor) -> Tensor:
    return x.abs().max()


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def relative_errors(
    got: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    size_of: Callable[[Tensor], Tensor] = largest,
) -> dict[str, float]:
    """The size of got - wanted over the size of wanted, of every result of ``got``.

    Where all that is wanted is zero, any difference is infinitely large, and so is NaN.
    """
    errors = {}
    for name, value in got.items():
        difference = float(size_of(value - wanted[name]))
        size = float(size_of(wanted[name]))
        error = difference / size if size else (math.inf if difference else 0.0)
        errors[name] = math.inf if math.isnan(error) else error
    return errors
