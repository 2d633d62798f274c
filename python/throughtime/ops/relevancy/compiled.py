"""Backends "cpu" and "triton" of relevancy attention.

Implementations: ``csrc/relevancy/cpu``, and under names that end in ``_triton``
``triton_kernels/relevancy.py``.
"""

from __future__ import annotations

from typing import Any

from throughtime.backends import requirements
from throughtime.backends.backend import Backend
from throughtime.ops.operation import Operation
from throughtime.ops.precision import in_float32
from throughtime.ops.relevancy import reference
from throughtime.ops.relevancy.arguments import SCREENING, RelevancyArguments, RelevancyResults
from throughtime.ops.triton import implementation


def _operation(**options: Any) -> Operation[RelevancyArguments, RelevancyResults]:
    return Operation(
        "relevancy",
        "relevancy",
        RelevancyArguments,
        RelevancyResults,
        reference.run,
        derived=SCREENING,
        **options,
    )


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
    (requirements.dtypes("Triton kernels"), requirements.triton),
    in_float32(
        _operation(
            suffix="_triton",
            forward=implementation("relevancy", "forward"),
            backward=implementation("relevancy", "backward"),
        )
    ),
)
