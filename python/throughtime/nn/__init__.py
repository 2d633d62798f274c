"""Layers: a replacement of ``torch.nn.LSTM``, and layers that screen their past."""

from __future__ import annotations

from throughtime.nn.lstm import LSTM
from throughtime.nn.rel_lstm import RelLSTM
from throughtime.nn.relevancy import RelevancyAttention

__all__ = ["LSTM", "RelLSTM", "RelevancyAttention"]
