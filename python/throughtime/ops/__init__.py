"""Operations: what they take and give, and the backends of each.

``record`` says how arguments are spelled, ``operation`` makes operators of torch from them, one
folder per operation holds its record and its backends.
"""

from __future__ import annotations

from throughtime.ops import lstm, rel_lstm, relevancy

__all__ = ["lstm", "rel_lstm", "relevancy"]
