"""Layers that replace those of ``torch.nn``."""

from __future__ import annotations

from throughtime.nn.lstm import LSTM

__all__ = ["LSTM"]
