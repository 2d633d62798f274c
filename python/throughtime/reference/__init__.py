"""The definition of every operator in plain PyTorch: any device, dtype, order of derivative."""

from __future__ import annotations

from throughtime.reference.lstm import lstm

__all__ = ["lstm"]
