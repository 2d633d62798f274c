"""The correctness gate: no speed is reported for an implementation that computes something else."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from throughtime.bench.cases import Case, gflop
from throughtime.bench.workload import Workload
from torch import Tensor

GATE_STEPS = 16
GATE_GFLOP = 10.0
SCREENED_STEPS = 32
MOST_STEPS = 1024
ROUNDING_UNITS = 32


@dataclass(frozen=True)
class Errors:
    """Errors of one implementation against the float64 reference, one per result.

    ``relative`` maps ``output``, ``h_n``, ``c_n``, ``inference`` and every gradient to
    max |got - wanted| / max |wanted|; ``limit`` is the most that the gate lets pass.
    """

    relative: dict[str, float]
    limit: float

    @property
    def worst(self) -> str:
        """The result with the largest error; NaN counts as the largest."""
        return max(self.relative, key=lambda name: _nan_as_inf(self.relative[name]))

    @property
    def largest(self) -> float:
        """The largest error."""
        return self.relative[self.worst]

    @property
    def passed(self) -> bool:
        """Whether every error is within the limit; NaN is not."""
        return _nan_as_inf(self.largest) <= self.limit


def _nan_as_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value


def reduced(case: Case) -> Case:
    """The case with T cut so that the float64 reference takes seconds at most.

    Example:
        >>> reduced(Case(784, 100, 1, 128)).steps
        16
    """
    steps = min(case.steps, GATE_STEPS)
    while (
        steps > 2 and gflop(dataclasses.replace(case, steps=steps), "forward+backward") > GATE_GFLOP
    ):
        steps -= 1
    return dataclasses.replace(case, steps=steps)


def screening_steps(steps: int, window_size: int, top_k: int) -> int:
    """T of the gate of relevancy screening: long enough that retained states are replaced.

    That takes more than ``window_size + top_k`` steps; ``MOST_STEPS`` bounds the reference's time.

    Example:
        >>> screening_steps(16384, 64, 64), screening_steps(20, 64, 64)
        (160, 20)
    """
    return min(steps, window_size + top_k + SCREENED_STEPS, MOST_STEPS)


def allowed(plain: dict[str, float], dtype: torch.dtype) -> float:
    """The largest error that passes, from those of plain PyTorch in the same dtype."""
    return 2 * max(plain.values()) + ROUNDING_UNITS * torch.finfo(dtype).eps


def check(impl: str, case: Case, p: float, dtype: torch.dtype, *, backend: str = "auto") -> Errors:
    """Compares values and all gradients of one iteration with the float64 reference.

    The limit is twice the error of the plain Python loop in the same dtype, plus
    ``ROUNDING_UNITS`` roundings: an implementation may round otherwise than PyTorch does, but
    must not be less accurate. T is cut as ``reduced`` says; B, I and H are the case's own, as
    they decide which kernel runs.

    Args:
        impl: a key of ``peers.PEERS``.
        case: the shape.
        p: fraction of detached steps; an implementation without h-detach is compared at p = 0.
        dtype: what the implementation computes in.
        backend: which kernels ``throughtime`` uses.
    """
    small = reduced(case)
    work = Workload.make(impl, small, p, dtype, backend=backend, input_grad=True)
    p = 0.0 if work.mask is None else p
    wanted = _results(
        Workload.make("throughtime", small, p, torch.float64, backend="reference", input_grad=True)
    )
    loop = relative_errors(
        _results(Workload.make("loop", small, p, dtype, input_grad=True)), wanted
    )
    return Errors(relative_errors(_results(work), wanted), allowed(loop, dtype))


def _results(work: Workload) -> dict[str, Tensor]:
    output, (h_n, c_n) = work.run()
    ones = [torch.ones_like(h_n), torch.ones_like(c_n)]
    torch.autograd.backward([output, h_n, c_n], [work.output_grad, *ones])
    with torch.inference_mode():
        inferred = work.run()[0]
    results: dict[str, Tensor | None] = {"output": output, "h_n": h_n, "c_n": c_n}
    results |= {"inference": inferred, "d input": work.input.grad}
    for name, parameter in work.layer.named_parameters():
        results["d " + name.removesuffix("_l0")] = parameter.grad
    return {
        name: torch.zeros(()) if value is None else value.detach().double()
        for name, value in results.items()
    }


def relative_errors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """The largest |got - wanted| over the largest |wanted|, of every named result."""
    return {
        name: float((got[name] - value).abs().max() / value.abs().max())
        for name, value in wanted.items()
    }
