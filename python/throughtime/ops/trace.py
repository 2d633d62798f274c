"""Backward operators with a trace: the gradients of h_t and c_t, which the walk holds anyway."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from throughtime.ops.operation import Operation, define, part_of
from throughtime.ops.precision import sums
from throughtime.ops.record import Field


class Trace:
    """The operator ``name_backward_trace``, which C++ implements.

    It takes what the backward operator of ``operation`` takes, and ``trace_every`` = n. Behind the
    gradients it gives the whole ones of h_t (as a projection leaves it) and of c_t (with what it
    gets through h_t), ``[steps, B, H or P]`` and ``[steps, B, H]``: of the last step in the
    direction of travel and of every n-th before it, zero past the end of a sample.

    Args:
        operation: whose backward it is; it has the arguments ``input`` and ``weight_hh``.
        name: of the operation.
    """

    def __init__(self, operation: Operation[Any, Any], name: str) -> None:
        self._call: Any = operation.backward_call
        self._gradients = operation.backward_fake(f"{name}_backward_trace")
        self._run = define(
            f"{name}_backward_trace",
            (*operation.backward_takes, Field("trace_every", "SymInt", None)),
            (
                *operation.backward_gives,
                *(Field(x, "Tensor", None) for x in ("trace_h", "trace_c")),
            ),
            None,
            self._fake,
        )
        part_of(f"{name}_backward_trace", f"{name}_forward")

    def __call__(
        self, given: dict[str, Any], every: int
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The gradients, and those of h_t and c_t; arguments are given by name, None left out."""
        *gradients, dh, dc = self._run(*[given.get(name) for name in self._call._fields], every)
        return tuple(gradients), dh, dc

    def _fake(self, *args: Any) -> tuple[Tensor, ...]:
        *given, every = args
        call = self._call._make(given)
        length, batch, _ = call.input.shape
        gates, outputs = call.weight_hh.shape
        steps = (length + every - 1) // every  # traced_steps of csrc/recurrence/cpu/trace.h
        trace = (
            call.input.new_empty(steps, batch, size, dtype=sums(call.input.dtype))
            for size in (outputs, gates // 4)
        )
        return (*self._gradients(*given), *trace)
