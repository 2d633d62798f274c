"""Backends "cpu" and "triton" of relevancy attention.

Implementations: ``csrc/relevancy/cpu``, and under names that end in ``_triton``
``triton_kernels/relevancy.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from throughtime.backends import requirements
from throughtime.backends.backend import Backend
from throughtime.ops.operation import Operation
from throughtime.ops.precision import in_float32
from throughtime.ops.relevancy import reference
from throughtime.ops.relevancy.arguments import RelevancyArguments, RelevancyResults, left
from throughtime.ops.triton import implementation


def _operation(**options: Any) -> Operation[RelevancyArguments, RelevancyResults]:
    return Operation(
        "relevancy",
        "relevancy",
        RelevancyArguments,
        RelevancyResults,
        reference.run,
        derived={"left": lambda sizes, args: left(sizes, args, args.screen_every)},
        **options,
    )


def _every_query(name: str) -> Callable[[Any], tuple[Tensor, ...]]:
    """A pass of the Triton kernels, which a call of the operator may ask for what they lack."""
    run = implementation("relevancy", name)

    def checked(call: Any) -> tuple[Tensor, ...]:
        if call.screen_every != 1:
            raise RuntimeError(
                "throughtime: the Triton kernels of relevancy attention screen after every query, "
                f"got screen_every={call.screen_every}; use backend='reference'"
            )
        return run(call)

    return checked


cpu = Backend(
    "cpu",
    (
        requirements.cpu_tensors,
        requirements.dtypes("compiled CPU kernels"),
        requirements.cpu_kernels,
    ),
    in_float32(_operation()),
)

triton = Backend(
    "triton",
    (
        requirements.dtypes("Triton kernels"),
        requirements.screens_every_query("Triton kernels"),
        requirements.triton,
    ),
    in_float32(
        _operation(
            suffix="_triton",
            forward=_every_query("forward"),
            backward=_every_query("backward"),
        )
    ),
)
