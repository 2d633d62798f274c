"""Layers: ``torch.nn``'s LSTM and LSTMCell, and layers that screen their past."""

from __future__ import annotations

from throughtime.nn.lstm import LSTM
from throughtime.nn.lstm_cell import LSTMCell
from throughtime.nn.rel_lstm import RelLSTM
from throughtime.nn.relevancy import RelevancyAttention

__all__ = ["LSTM", "LSTMCell", "RelLSTM", "RelevancyAttention"]
