"""One RelLSTM layer, and its backends."""

from __future__ import annotations

from throughtime.backends.backend import offer
from throughtime.ops.rel_lstm import compiled, reference
from throughtime.ops.rel_lstm.arguments import RelLstmArguments, RelLstmResults

offer("rel_lstm", compiled.triton, compiled.cpu, reference.backend)

__all__ = ["RelLstmArguments", "RelLstmResults"]
