"""Backends "cpu" and "triton" of relevancy attention.

Implementations: ``csrc/relevancy/cpu``, and under names that end in ``_triton``
``triton_kernels/relevancy.py``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from throughtime.backends import requirements
from throughtime.backends.backend import Backend
from throughtime.ops import cpu_plan
from throughtime.ops.operation import Operation
from throughtime.ops.precision import in_float32
from throughtime.ops.relevancy import reference
from throughtime.ops.relevancy.arguments import ATTENTION, RelevancyArguments, RelevancyResults
from throughtime.ops.triton import implementation


def _definition(args: RelevancyArguments) -> RelevancyResults:
    """What forward mode differentiates; a loop over packed samples, whose ends a graph hides."""
    if args.cu_seqlens is not None and is_fake(args.cu_seqlens):
        raise RuntimeError(
            "throughtime: forward-mode differentiation of packed samples reads the numbers of "
            'cu_seqlens, which a graph does not have; use backend="reference", or stay outside of '
            "torch.compile"
        )
    return reference.run(args)


def _operation(**options: Any) -> Operation[RelevancyArguments, RelevancyResults]:
    return Operation(
        "relevancy",
        "relevancy",
        RelevancyArguments,
        RelevancyResults,
        _definition,
        derived=ATTENTION,
        **options,
    )


def _check_paper(call: Any) -> None:
    """Check that a call of a Triton operator asks for what those kernels know."""
    beyond = call.given is not None or call.normalize or call.return_relevance
    shared = call.query.size(1) != call.key.size(1) or call.cu_seqlens is not None
    if beyond or shared or call.screen_every != 1:
        raise RuntimeError(
            "throughtime: the Triton kernels of relevancy attention screen as the paper does, "
            "without screen_every, relevance, normalize, return_relevance, grouped-query heads and "
            "cu_seqlens; use backend='reference'"
        )


def _forward_of_the_paper(call: Any) -> tuple[Tensor, ...]:
    _check_paper(call)
    results = implementation("relevancy", "forward")(call)
    return (*results, call.query.new_empty(*call.query.shape[:2], 0))


def _backward_of_the_paper(call: Any) -> tuple[Tensor, ...]:
    _check_paper(call)
    return implementation("relevancy", "backward")(call)


relevancy = _operation()

cpu = Backend(
    "cpu",
    (
        requirements.cpu_tensors,
        requirements.dtypes("compiled CPU kernels"),
        requirements.cpu_kernels,
    ),
    in_float32(relevancy, bfloat16=lambda args: args.score_weight is None),
    describe=cpu_plan.relevancy,
)

triton = Backend(
    "triton",
    (
        requirements.dtypes("Triton kernels"),
        requirements.screens_as_the_paper("Triton kernels"),
        requirements.triton,
    ),
    in_float32(
        _operation(
            suffix="_triton",
            forward=_forward_of_the_paper,
            backward=_backward_of_the_paper,
        )
    ),
)
