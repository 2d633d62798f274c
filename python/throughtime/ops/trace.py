"""Backward operators with a trace: the gradients of h_t and c_t, which the walk holds anyway."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from throughtime.ops.operation import Operation, define, part_of
from throughtime.ops.precision import sums
from throughtime.ops.record import Field, Real, Size, Sizes


class Trace:
    """The operator ``name_backward_trace``, which C++ implements.

    It takes what the backward operator of ``operation`` takes, and ``trace_every`` = n. Behind the
    gradients it gives the whole ones of h_t (as a projection leaves it) and of c_t (with what it
    gets through h_t): of the last step in the direction of travel and of every n-th before it, zero
    past the end of a sample.

    Args:
        operation: whose backward it is.
        name: of the operation.
        outputs: the size of h_t, as a record spells it.
    """

    def __init__(self, operation: Operation[Any, Any], name: str, outputs: str) -> None:
        self._fields = operation.backward_call._fields
        more = (
            Field("trace_h", "Tensor", Real(f"traced, B, {outputs}", dtype=_sums)),
            Field("trace_c", "Tensor", Real("traced, B, H", dtype=_sums)),
        )
        self._run = define(
            f"{name}_backward_trace",
            (*operation.backward_takes, Field("trace_every", "SymInt", None)),
            (*operation.backward_gives, *more),
            None,
            operation.backward_fake(f"{name}_backward_trace", more, {"traced": traced_steps}),
        )
        part_of(f"{name}_backward_trace", f"{name}_forward")

    def __call__(
        self, given: dict[str, Any], every: int
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The gradients, and those of h_t and c_t; arguments are given by name, None left out."""
        *gradients, dh, dc = self._run(*[given.get(name) for name in self._fields], every)
        return tuple(gradients), dh, dc


def traced_steps(sizes: Sizes, args: Any) -> Size:
    """``traced_steps`` of csrc/recurrence/cpu/trace.h."""
    every: Size = args.trace_every
    return (sizes["T"] + every - 1) // every


def _sums(args: Any) -> torch.dtype:
    return sums(args.input.dtype)
