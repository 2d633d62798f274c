"""Vectors: every operation against PyTorch, over all lengths of a part and all numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ulps import DTYPES, assert_few_ulps, every_exponent, known

SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1.5, -2.5]


def special(dtype: torch.dtype) -> Tensor:
    """Zeros, infinities, NaN, the smallest and the largest numbers; 16 elements."""
    info = torch.finfo(dtype)
    edges = [info.max, info.min, info.tiny, -info.tiny, info.tiny / 8, -info.tiny / 8, 1.0, -1.0]
    return torch.tensor(SPECIAL + edges, dtype=torch.float64).to(dtype)


def assert_same_bits(found: Tensor, wanted: Tensor) -> None:
    wide = torch.int32 if found.dtype == torch.float32 else torch.int64
    assert torch.equal(found.view(wide), wanted.view(wide))


def whole_vectors(layer: Any, x: Tensor) -> Tensor:
    """x and zeros up to whole vectors."""
    size = layer.lanes(x.dtype)
    return torch.cat([x, x.new_zeros(-len(x) % size)])


def mapped(layer: Any, function: str, x: Tensor, y: Tensor | None = None) -> Tensor:
    """A function of x, and of y where it has two arguments."""
    x = whole_vectors(layer, x)
    found = torch.full_like(x, 7.0)
    layer(function, x, x if y is None else whole_vectors(layer, y), found, len(x))
    return found


@DTYPES
def test_load_and_store(layer: Any, dtype: torch.dtype) -> None:
    x = special(dtype)
    for function in ("copy", "copy_streamed"):
        assert_same_bits(mapped(layer, function, x), whole_vectors(layer, x))
    # At any address of an element.
    shifted, found = torch.cat([x[:1], x, x])[1:17], torch.zeros(17, dtype=dtype)
    layer("copy", shifted, shifted, found[1:], 16)
    assert_same_bits(found[1:], shifted)


@DTYPES
def test_parts(layer: Any, dtype: torch.dtype) -> None:
    x = special(dtype)
    size = layer.lanes(x.dtype)
    for count in range(-1, size + 2):
        kept = min(max(count, 0), size)
        seen, found = x.new_full((size,), 7.0), x.new_full((size,), 7.0)
        layer("copy_part", x, count, seen, found)
        assert_same_bits(seen, torch.cat([x[:kept], x.new_zeros(size - kept)]))
        assert_same_bits(found, torch.cat([x[:kept], x.new_full((size - kept,), 7.0)]))
        if 0 <= count <= size:
            layer("copy_part_at_the_end", x, count, seen)
            assert_same_bits(seen[:kept], x[:kept])


@DTYPES
def test_numbers_are_broadcast_and_signs_copied(layer: Any, dtype: torch.dtype) -> None:
    x = special(dtype)
    for value in x[::2]:
        found = mapped(layer, "broadcast", x, value.reshape(1))
        assert_same_bits(found, torch.full_like(found, value.item()))
    assert_same_bits(mapped(layer, "magnitude", x), x.abs())
    size = x.flip(0).abs()
    assert_same_bits(mapped(layer, "copy_sign", size, x), torch.where(x.signbit(), -size, size))


@DTYPES
def test_an_upper_bound_lets_nan_through(layer: Any, dtype: torch.dtype) -> None:
    x = special(dtype)
    found = mapped(layer, "bounded", x, torch.tensor([1.25], dtype=dtype))
    assert_same_bits(found, torch.where(x > 1.25, torch.full_like(x, 1.25), x))


@DTYPES
@pytest.mark.parametrize("function", ["sigmoid", "tanh", "exp"])
def test_a_few_ulp_everywhere(layer: Any, function: str, dtype: torch.dtype) -> None:
    x, wanted = known(function, dtype)
    assert_few_ulps(mapped(layer, f"map_{function}", x)[: len(x)], wanted, x)


@DTYPES
@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_the_ends(layer: Any, function: str, dtype: torch.dtype) -> None:
    x = torch.tensor([math.inf, -math.inf, 0.0, -0.0, -2000.0, 2000.0], dtype=dtype)
    found = mapped(layer, f"map_{function}", x)[: len(x)]
    assert_same_bits(found, getattr(torch, function)(x))


@DTYPES
def test_the_ends_of_exp(layer: Any, dtype: torch.dtype) -> None:
    least = math.log(torch.finfo(dtype).tiny)
    x = torch.tensor([0.0, -0.0, least - 1e-4, least - 2, -2000.0, -math.inf], dtype=dtype)
    assert mapped(layer, "map_exp", x)[:6].tolist() == [1, 1, 0, 0, 0, 0]


@DTYPES
@pytest.mark.parametrize("function", ["sigmoid", "tanh", "exp"])
def test_nan_stays_nan(layer: Any, function: str, dtype: torch.dtype) -> None:
    wide = torch.int32 if dtype == torch.float32 else torch.int64
    quiet = torch.tensor(math.nan, dtype=dtype).view(wide)
    payloads = quiet | torch.tensor([0, 1, 77, 2**20 - 1], dtype=wide)
    nan = torch.cat([payloads.view(dtype), -payloads.view(dtype)])
    assert nan.isnan().all() and mapped(layer, f"map_{function}", nan)[:8].isnan().all()


@DTYPES
def test_transpose(layer: Any, dtype: torch.dtype) -> None:
    size = layer.lanes(dtype)
    x = every_exponent(dtype, 2)[: size * size].view(size, size)  # only moved, never computed with
    found = torch.zeros_like(x)
    layer("transposed", x, found)
    assert_same_bits(found, x.t().contiguous())


@DTYPES
def test_transpose_of_rows(layer: Any, dtype: torch.dtype) -> None:
    size = layer.lanes(dtype)
    for columns in (0, 1, size - 1, size, size + 1, 2 * size + 3):
        x = torch.randn(size, columns, dtype=dtype)
        missing = torch.arange(size) % 3 == 1
        found = torch.full((columns + 1, 2 * size), 7.0, dtype=dtype)
        layer("transposed_rows", x, missing.long(), columns, found, 2 * size)
        wanted = torch.full_like(found, 7.0)
        wanted[:columns, :size] = torch.where(missing.unsqueeze(1), 0.0, x).t()
        assert torch.equal(found, wanted)


@DTYPES
def test_sums_of_rows(layer: Any, dtype: torch.dtype) -> None:
    size = layer.lanes(dtype)
    whole = torch.randint(-1000, 1000, (size, size)).to(dtype)  # sums are exact in any order
    with_ends = whole.clone()
    with_ends[0, -1], with_ends[1, 0] = math.nan, -math.inf
    for x in (whole, with_ends):
        found = torch.zeros(size, dtype=dtype)
        layer("row_sums", x, found)
        assert torch.equal(found.nan_to_num(1e9), x.sum(1).nan_to_num(1e9))
