"""Packing: rows begin on cache lines, and a bias lies in the order of gates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ulps import DTYPES

SIZES = pytest.mark.parametrize(("units", "columns"), [(1, 1), (7, 5), (16, 33), (35, 70)])


def padded(x: Tensor, *sizes: int) -> Tensor:
    """x with zeros up to the sizes."""
    whole = x.new_zeros(sizes)
    whole[tuple(slice(0, size) for size in x.shape)] = x
    return whole


def packed(pack: Callable[[int, int, Tensor], object], parts: int, wanted: Tensor) -> None:
    """One worker packs all parts, then two pack some each; both fill exactly what is wanted."""
    for middle in {0, parts // 2}:
        found = torch.full((len(wanted) + 1,), math.nan, dtype=wanted.dtype)
        pack(0, middle, found)
        pack(middle, parts, found)
        assert torch.equal(found[:-1], wanted) and found[-1].isnan()


def gates_in_vectors(weight: Tensor, size: int) -> Tensor:
    """[4H, columns] as [blocks, gates, vector, columns], zero past the last unit."""
    units = len(weight) // 4
    blocks = math.ceil(units / size)
    whole = padded(weight.view(4, units, -1), 4, blocks * size, weight.size(1))
    return whole.view(4, blocks, size, -1).transpose(0, 1)


def vector(layer: Any, x: Tensor) -> int:
    size: int = layer("elements", x)
    return size


@DTYPES
def test_rows_begin_on_cache_lines(layer: Any, dtype: torch.dtype) -> None:
    x = torch.empty(0, dtype=dtype)
    for columns in range(1, 300):
        row = layer("leading", x, columns)
        assert row >= columns and row * dtype.itemsize // 64 % 2 == 1
        assert (
            row * dtype.itemsize % 64 == 0 and row * dtype.itemsize < columns * dtype.itemsize + 128
        )


@DTYPES
@SIZES
def test_gate_bias(layer: Any, dtype: torch.dtype, units: int, columns: int) -> None:
    bias = torch.randn(4 * units, dtype=dtype)
    wanted = gates_in_vectors(bias.unsqueeze(1), vector(layer, bias)).flatten()
    parts = len(wanted) // (4 * vector(layer, bias))
    packed(lambda b, e, to: layer("gate_bias", bias, units, b, e, to), parts, wanted)
    packed(lambda b, e, to: layer("no_gate_bias", units, b, e, to), parts, torch.zeros_like(wanted))
