"""The definition of every operator in plain PyTorch: any device, dtype, order of derivative."""

from __future__ import annotations

from throughtime.reference.lstm import lstm
from throughtime.reference.rel_lstm import rel_lstm
from throughtime.reference.relevancy import relevancy_attention

__all__ = ["lstm", "rel_lstm", "relevancy_attention"]
