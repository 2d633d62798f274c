"""Backend "reference" of relevancy attention."""

from __future__ import annotations

from throughtime import reference
from throughtime.backends import requirements
from throughtime.backends.backend import Backend
from throughtime.ops.relevancy.arguments import RelevancyArguments, RelevancyResults


def run(args: RelevancyArguments) -> RelevancyResults:
    """The definition in plain PyTorch."""
    output, last, memory = reference.relevancy_attention(**args._asdict())
    lse = output.new_empty(output.shape[:3])
    return RelevancyResults(output, lse, last, memory.positions, memory.relevance)


backend = Backend("reference", (requirements.floating_point,), run)
