"""Backend "reference" of RelLSTM."""

from __future__ import annotations

from functools import partial

from throughtime import reference
from throughtime.backends import requirements
from throughtime.backends.backend import Backend
from throughtime.ops import watching
from throughtime.ops.rel_lstm.arguments import RelLstmArguments, RelLstmResults


def run(args: RelLstmArguments, observe: watching.Observe | None = None) -> RelLstmResults:
    """The definition in plain PyTorch; weights of one gate are those of a plain tanh cell."""
    gates, hidden = args.weight_hh.shape
    cell = "tanh" if gates == hidden else "lstm"
    results = reference.rel_lstm(**args._asdict(), cell=cell, observe=observe)
    memory = results.memory
    return RelLstmResults(*results[:5], memory.positions, memory.relevance)


backend = Backend("reference", (requirements.floating_point,), partial(watching.watched, run))
