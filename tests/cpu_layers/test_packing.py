"""Packing: rows begin on cache lines, and a bias lies in the order of gates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ulps import DTYPES


@DTYPES
def test_rows_begin_on_cache_lines(layer: Any, dtype: torch.dtype) -> None:
    for columns in range(1, 300):
        needed, row = (
            n * dtype.itemsize
            for n in (columns, layer("leading", torch.empty(0, dtype=dtype), columns))
        )
        assert needed <= row < needed + 128
        assert row % 64 == 0 and row // 64 % 2 == 1


@DTYPES
@pytest.mark.parametrize("units", [1, 7, 16, 35])
@pytest.mark.parametrize("given", [False, True])
def test_gate_bias(layer: Any, dtype: torch.dtype, units: int, given: bool) -> None:
    """One worker packs all blocks, or two pack some each; zeros stand past the last unit."""
    lanes = layer.lanes(dtype)
    blocks = math.ceil(units / lanes)
    bias = torch.randn(4 * units, dtype=dtype)
    wanted = torch.zeros(4, blocks * lanes, dtype=dtype)
    if given:
        wanted[:, :units] = bias.view(4, units)
    wanted = wanted.view(4, blocks, lanes).transpose(0, 1).flatten()
    for middle in {0, blocks // 2}:
        found = torch.full((len(wanted) + 1,), math.nan, dtype=dtype)
        for begin, end in ((0, middle), (middle, blocks)):
            layer("gate_bias", bias if given else None, units, begin, end, found)
        assert torch.equal(found[:-1], wanted) and found[-1].isnan()
