"""Scores, softmax and sums of rows against autograd of plain PyTorch in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from closeness import assert_close
from ulps import DTYPES, assert_few_ulps, exact, known


def leaves(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """float64 tensors whose values the dtype holds."""
    return [torch.randn(shape).to(dtype).double().requires_grad_() for shape in shapes]


def padded(x: Tensor) -> Tensor:
    """NaN up to whole vectors, which hold 16 numbers at most."""
    return torch.cat([x, x.new_full((-len(x) % 16,), math.nan)])


@DTYPES
@pytest.mark.parametrize(("count", "size"), [(1, 2), (3, 5), (16, 16), (70, 33), (200, 64)])
def test_scores_and_gradients(layer: Any, dtype: torch.dtype, count: int, size: int) -> None:
    q, k, w = leaves(dtype, (size,), (count, size), (size,))
    wanted = (w * torch.tanh(q + k)).sum(-1)
    arguments = [x.detach().to(dtype) for x in (q, k, w)]
    found = torch.full((count + 16,), math.nan, dtype=dtype)
    layer("scores", *arguments, size, count, found)
    assert_close(found[:count], wanted.detach().to(dtype), "scores")

    grad = torch.randn(count).to(dtype)
    due = torch.autograd.grad(wanted, (q, k, w), grad.double(), materialize_grads=True)
    got = [torch.zeros_like(q, dtype=dtype), torch.ones_like(k, dtype=dtype)]  # k: added to
    got += [torch.zeros_like(w, dtype=dtype), torch.zeros_like(w, dtype=dtype)]
    layer("gradients", *arguments, size, count, padded(grad), *got)
    for name, x, y in zip(("q", "k", "w"), got, due, strict=False):
        assert_close(x, (y + 1 if name == "k" else y).to(dtype), name)


@DTYPES
def test_an_additive_score_is_tanh_of_the_sum(layer: Any, dtype: torch.dtype) -> None:
    """Of any two numbers: small ones keep their digits, and far ones do not overflow."""
    sizes = torch.cat([torch.logspace(-30, -3, 40), torch.linspace(1e-2, 60, 900)])
    sizes = torch.cat([sizes, torch.tensor([0.0, 15.99, 16.01, 300.0, 1e30, math.inf, math.nan])])
    keys = torch.cat([sizes, -sizes]).to(dtype)
    one, found = torch.ones(1, dtype=dtype), torch.empty(len(keys) + 16, dtype=dtype)
    for q in keys[::7].tolist() + keys[-7:].tolist():
        query = torch.tensor([q], dtype=dtype)
        near = torch.cat([keys[::2], (-query * (1 + 1e-3 * torch.randn(len(keys) // 2)).to(dtype))])
        layer("scores", query, near, one, 1, len(near), found)
        # float64 has one rounding of its own, of the sum
        wanted = torch.tanh(query.double() + near.double())
        assert torch.equal(found[: len(near)].isnan(), wanted.isnan())
        scale = torch.finfo(dtype).eps * torch.tanh(query.abs() + near.abs()).double()
        error = ((found[: len(near)].double() - wanted).abs() / scale).nan_to_num(0.0)
        assert error.max() <= 2, f"{error.max()} roundings at {q} + {near[error.argmax()]}"


@DTYPES
def test_the_gradient_of_the_weight_is_compensated(layer: Any, dtype: torch.dtype) -> None:
    """Ten thousand small terms and a large one; a plain sum would lose the small ones."""
    q, k, w = (torch.full((1,), x, dtype=dtype) for x in (20.0, 20.0, 1.0))  # t = 1
    eps = torch.finfo(dtype).eps
    into = [torch.zeros(1, dtype=dtype) for _ in range(4)]
    for grad in (1.0, *[eps / 4] * 10_000):
        due = padded(torch.tensor([grad], dtype=dtype))
        layer("gradients", q, k, w, 1, 1, due, *into)
    assert into[2].item() == pytest.approx(1 + 2500 * eps, rel=2 * eps, abs=0)


@DTYPES
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 100])
def test_softmax(layer: Any, dtype: torch.dtype, count: int) -> None:
    for size in (1.0, 30.0, 1000.0):
        (scores,) = leaves(dtype, (count,))
        scores = (size * scores).detach().to(dtype).double().requires_grad_()
        wanted = scores.softmax(0)
        found, log_sum = padded(scores.detach().to(dtype)), torch.zeros((), dtype=dtype)
        layer("attention_weights", found, count, log_sum)
        assert_close(found[:count], wanted.detach().to(dtype), "weights")
        assert_close(log_sum, scores.logsumexp(0).detach().to(dtype), "log-sum-exp")

        grad = torch.randn(count).to(dtype)
        (due,) = torch.autograd.grad(wanted, scores, grad.double())
        got = padded(grad)
        layer("attention_gradient", found, got, count)
        assert_close(got[:count], due.to(dtype), "gradient")


@DTYPES
def test_softmax_is_exact_to_its_smallest_weights(layer: Any, dtype: torch.dtype) -> None:
    """Of two keys with scores 0 and x the second has the weight e^x / (1 + e^x)."""
    x, _ = known("exp", dtype)
    x = x[:: len(x) // 2000]
    found, log_sum = torch.zeros_like(x), torch.zeros((), dtype=dtype)
    for i, score in enumerate(x.tolist()):
        pair = padded(torch.tensor([0.0, score], dtype=dtype))
        layer("attention_weights", pair, 2, log_sum)
        found[i] = pair[1]
    assert_few_ulps(found, exact("sigmoid", x), x)


@DTYPES
@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 1), (5, 17), (200, 64), (3, 70)])
def test_sums_of_rows(layer: Any, dtype: torch.dtype, count: int, size: int) -> None:
    weights, x, rows = (torch.rand(s).to(dtype) for s in ((count,), (size,), (count, size)))
    factor = torch.tensor(0.7, dtype=dtype)
    found = torch.full((size,), math.nan, dtype=dtype)
    layer("sum_of_rows", padded(weights), rows, count, size, factor, found)
    exact_sum = factor.double() * (weights.double() @ rows.double())
    assert_close(found, exact_sum.to(dtype), "weighted sum")
    wanted = rows.double() + factor.double() * torch.outer(weights.double(), x.double())
    layer("add_rows", padded(weights), x, count, size, factor, rows)
    assert_close(rows, wanted.to(dtype), "rows")


@DTYPES
def test_a_long_sum_is_made_of_short_chains(layer: Any, dtype: torch.dtype) -> None:
    """One chain of float32 additions would be wrong by 1e-4."""
    count = 20_000
    weights, rows = torch.full((count,), 0.1, dtype=dtype), torch.full((count, 5), 0.3, dtype=dtype)
    found = torch.zeros(5, dtype=dtype)
    layer("sum_of_rows", weights, rows, count, 5, torch.tensor(1.0, dtype=dtype), found)
    assert_close(found, (weights.double() @ rows.double()).to(dtype))
