"""Backend "reference" of relevancy attention."""

from __future__ import annotations

from functools import partial

from throughtime import reference
from throughtime.backends import requirements
from throughtime.backends.backend import Backend
from throughtime.ops import watching
from throughtime.ops.relevancy.arguments import RelevancyArguments, RelevancyResults


def run(args: RelevancyArguments, observe: watching.Observe | None = None) -> RelevancyResults:
    """The definition in plain PyTorch; there are no states to ``observe``."""
    given = args._asdict()
    wanted = given.pop("return_relevance")
    output, last, memory, received = reference.relevancy_attention(**given)
    lse = output.new_empty(output.shape[:3])
    received = received if wanted else received[..., :0]
    return RelevancyResults(output, lse, last, memory.positions, memory.relevance, received)


backend = Backend("reference", (requirements.floating_point,), partial(watching.watched, run))
