"""Recurrent layers and relevancy attention as functions: checks, casts, the choice of a backend."""

from __future__ import annotations

from throughtime.functional.checks import autocast_dtype
from throughtime.functional.lstm import bidirectional_lstm, lstm
from throughtime.functional.rel_lstm import rel_lstm
from throughtime.functional.relevancy import relevancy_attention
from throughtime.functional.relevancy_varlen import relevancy_attention_varlen
from throughtime.functional.retained import retained_positions

__all__ = [
    "autocast_dtype",
    "bidirectional_lstm",
    "lstm",
    "rel_lstm",
    "relevancy_attention",
    "relevancy_attention_varlen",
    "retained_positions",
]
