"""One LSTM layer in one direction, and its backends."""

from __future__ import annotations

from throughtime.backends.backend import offer
from throughtime.ops.lstm import cpu, gpu, reference
from throughtime.ops.lstm.arguments import LstmArguments, LstmCellsResults, LstmResults

offer("lstm", gpu.cuda, gpu.triton, cpu.backend, reference.backend)

__all__ = ["LstmArguments", "LstmCellsResults", "LstmResults"]
