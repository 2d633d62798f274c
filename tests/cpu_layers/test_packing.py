"""Packing: a packed weight holds the weight's numbers where its layout says, and zeros beside."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ulps import DTYPES

SIZES = pytest.mark.parametrize(("units", "columns"), [(1, 1), (7, 5), (16, 33), (35, 70)])
WIDTHS = pytest.mark.parametrize("width", [1, 3, 4])


def padded(x: Tensor, *sizes: int) -> Tensor:
    """x with zeros up to the sizes."""
    whole = x.new_zeros(sizes)
    whole[tuple(slice(0, size) for size in x.shape)] = x
    return whole


def panels(matrix: Tensor, size: int, width: int) -> Tensor:
    """[k, columns] in k-major panels of `width` vectors of columns; the last may be narrower."""
    k_count, columns = matrix.shape
    whole = padded(matrix, k_count, math.ceil(columns / size) * size)
    return torch.cat([panel.flatten() for panel in whole.split(width * size, dim=1)])


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
def test_gate_panels(layer: Any, dtype: torch.dtype, units: int, columns: int) -> None:
    weight = torch.randn(4 * units, columns, dtype=dtype)
    blocks = gates_in_vectors(weight, vector(layer, weight))
    packed(
        lambda begin, end, to: layer("gate_panels", weight, units, columns, begin, end, to),
        len(blocks),
        blocks.permute(0, 3, 1, 2).flatten(),
    )


@DTYPES
@SIZES
def test_gate_bias(layer: Any, dtype: torch.dtype, units: int, columns: int) -> None:
    bias = torch.randn(4 * units, dtype=dtype)
    wanted = gates_in_vectors(bias.unsqueeze(1), vector(layer, bias)).flatten()
    parts = len(wanted) // (4 * vector(layer, bias))
    packed(lambda b, e, to: layer("gate_bias", bias, units, b, e, to), parts, wanted)
    packed(lambda b, e, to: layer("no_gate_bias", units, b, e, to), parts, torch.zeros_like(wanted))


@DTYPES
@SIZES
@WIDTHS
def test_column_panels(
    layer: Any, dtype: torch.dtype, units: int, columns: int, width: int
) -> None:
    weight = torch.randn(4 * units, columns, dtype=dtype)
    size = vector(layer, weight)
    rows = gates_in_vectors(weight, size).reshape(-1, columns)
    packed(
        lambda b, e, to: layer("column_panels", weight, units, columns, width, b, e, to),
        math.ceil(columns / (size * width)),
        panels(rows, size, width),
    )


@DTYPES
@SIZES
@WIDTHS
def test_plain_and_transposed_panels(
    layer: Any, dtype: torch.dtype, units: int, columns: int, width: int
) -> None:
    weight = torch.randn(units, columns, dtype=dtype)
    size = vector(layer, weight)
    for name, matrix in (("plain_panels", weight), ("transposed_panels", weight.t())):
        packed(
            lambda b, e, to, name=name: layer(name, weight, units, columns, width, b, e, to),
            math.ceil(matrix.size(1) / (size * width)),
            panels(matrix, size, width),
        )


@DTYPES
@SIZES
def test_chosen_rows(layer: Any, dtype: torch.dtype, units: int, columns: int) -> None:
    weight = torch.randn(units, columns, dtype=dtype)
    size = vector(layer, weight)
    at = torch.randint(-1, units, (math.ceil(units / size) * size,))
    chosen = torch.where(at.unsqueeze(1) < 0, 0.0, weight[at])
    packed(
        lambda b, e, to: layer("rows", weight, columns, at, len(at), b, e, to),
        math.ceil(columns / (size * 4)),
        panels(chosen, size, 4),
    )
    packed(
        lambda b, e, to: layer("rows_as_columns", weight, columns, at, len(at) // size, b, e, to),
        math.ceil(len(at) / (size * 4)),
        panels(chosen.t(), size, 4),
    )
