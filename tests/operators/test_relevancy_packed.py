"""Relevancy attention: heads of keys that several heads of queries share, and packed samples."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import throughtime
from cases import random
from closeness import assert_close
from throughtime import _ext
from throughtime.functional import (
    relevancy_attention,
    relevancy_attention_varlen,
    retained_positions,
)

LENGTHS = (13, 0, 1, 40, 6)
BOUNDS = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "borders": {"screen_every": 3},
    "normalized": {"normalize": True},
    "first": {"retain": "first"},
    "given": {"relevance": "given"},
    "additive": {"score": "additive"},
}
every_option = pytest.mark.parametrize("option", OPTIONS)


def grouped(B: int = 2, heads: int = 6, of_keys: int = 2, T: int = 30) -> list[Tensor]:
    shapes = ((B, heads, T, 5), (B, of_keys, T, 5), (B, of_keys, T, 4))
    return [random(*shape, seed=k).requires_grad_() for k, shape in enumerate(shapes)]


def repeated(rows: Tensor, group: int = 3) -> Tensor:
    """Keys for each head of queries."""
    return rows.repeat_interleave(group, 1)


def packed(heads: int = 4, of_keys: int = 2) -> list[Tensor]:
    total = sum(LENGTHS)
    shapes = ((total, heads, 5), (total, of_keys, 5), (total, of_keys, 4))
    return [random(*shape, seed=k).requires_grad_() for k, shape in enumerate(shapes)]


def test_grouped_heads_attend_the_keys_of_their_own_head(backend: str) -> None:
    q, k, v = grouped()
    relevance = random(2, 2, 30, seed=5).abs()
    options: dict[str, Any] = {"screen_every": 2, "return_retained": True, "backend": backend}
    output, last = relevancy_attention(q, k, v, 6, 4, relevance=relevance, **options)
    keys = (repeated(k), repeated(v))
    alone, each = relevancy_attention(q, *keys, 6, 4, relevance=repeated(relevance), **options)
    assert_close(output, alone, "output")
    assert torch.equal(repeated(last), each)
    grad = random(*output.shape, seed=7)
    found, wanted = (torch.autograd.grad(x, (q, k, v), grad) for x in (output, alone))
    for one, other, name in zip(found, wanted, ("query", "key", "value"), strict=True):
        assert_close(one, other, name)


@pytest.mark.parametrize("normalize", [False, True])
def test_relevance_is_the_sum_of_what_the_heads_pay(normalize: bool, backend: str) -> None:
    q, k, v = grouped()
    options: dict[str, Any] = {"normalize": normalize, "return_relevance": True, "backend": backend}
    relevance = relevancy_attention(q, k, v, 6, 0, **options)[1]
    each = relevancy_attention(q, repeated(k), repeated(v), 6, 0, **options)[1]
    assert_close(relevance, each.view(2, 2, 3, 30).sum(2), "relevance")


def test_the_group_decides_together(backend: str) -> None:
    """Two heads of queries that agree on nothing: the sum chooses, as a loop over keys says."""
    q, k, v = grouped(B=1, heads=2, of_keys=1, T=20)
    options: dict[str, Any] = {"return_retained": True, "backend": backend}
    _, last = relevancy_attention(q, k, v, 4, 2, **options)
    kept, relevance = [], torch.zeros(20, dtype=q.dtype)
    listed = retained_positions(last, 4, 2)[0, 0]
    for i in range(20):
        attended = kept + list(range(max(0, i - 3), i + 1))
        scores = 5**-0.5 * q[0, :, i].detach() @ k[0, 0, attended].detach().T
        relevance[attended[len(kept) :]] += scores.softmax(-1).sum(0)[len(kept) :]
        assert [p for p in listed[i].tolist() if p >= 0] == kept
        if i >= 3:
            kept = sorted([*kept, i - 3], key=lambda p: -relevance[p].item())[:2]
            kept.sort()
    assert (relevancy_attention(q[:, :1], k, v, 4, 2, **options)[1] != last).any()


def test_grouped_full_attention_is_sdpas(backend: str) -> None:
    q, k, v = grouped()
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_close(relevancy_attention(q, k, v, 30, 0, backend=backend), full, "output")


def test_grouped_chunks_with_a_cache_are_one_call(backend: str) -> None:
    q, k, v = grouped()
    whole = relevancy_attention(q, k, v, 6, 4, screen_every=4, backend=backend)
    cache = throughtime.RelevancyCache()
    chunks = zip(*(x.split((1, 7, 22), 2) for x in (q, k, v)), strict=True)
    parts = [
        relevancy_attention(*chunk, 6, 4, screen_every=4, cache=cache, backend=backend)
        for chunk in chunks
    ]
    assert cache.relevance is not None and cache.relevance.shape[:2] == (2, 2)
    assert_close(torch.cat(parts, 2), whole, "output")


@every_option
def test_packed_samples_are_those_alone(option: str, backend: str) -> None:
    """On a CPU to the bit, gradients too."""
    tensors = packed()
    options = {"return_retained": True, "return_relevance": True, "backend": backend}
    options |= OPTIONS[option]
    if option == "additive":
        tensors.append(random(4, 5, seed=8).requires_grad_())
        options["score_weight"] = tensors[3]
    if option == "given":
        options["relevance"] = random(len(tensors[0]), 2, seed=5).abs()
    found = relevancy_attention_varlen(*tensors[:3], BOUNDS, 4, 3, **options)
    grad = random(*found[0].shape, seed=9)
    gradients = torch.autograd.grad(found[0], tensors, grad)
    weights = []
    for begin, end in itertools.pairwise(BOUNDS.tolist()):
        own: list[Any] = [x[begin:end].transpose(0, 1).unsqueeze(0) for x in tensors[:3]]
        own_options = dict(options)
        if option == "given":
            own_options["relevance"] = options["relevance"][begin:end].t().unsqueeze(0)
        alone = relevancy_attention(*own, 4, 3, **own_options)
        for one, other in zip(found, alone, strict=True):
            assert torch.equal(one[begin:end], other[0].transpose(0, 1))
        if end == begin:
            continue
        back = grad[begin:end].transpose(0, 1).unsqueeze(0)
        wanted = torch.autograd.grad(alone[0], [*own, *tensors[3:]], back)
        for one, other in zip(gradients[:3], wanted, strict=False):
            rows = one[begin:end], other[0].transpose(0, 1)
            assert torch.equal(*rows) if backend == "cpu" else torch.allclose(*rows)
        weights.append(wanted[3:])
    for one, *others in zip(gradients[3:], *weights, strict=True):
        assert_close(one, sum(others), "score_weight")


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_gradcheck(score: str, backend: str) -> None:
    bounds = torch.tensor([0, 5, 5, 12])
    tensors = [x.detach()[:12].requires_grad_() for x in packed(heads=2, of_keys=1)]
    weight = [random(2, 5, seed=8).requires_grad_()] * (score == "additive")

    def call(q: Tensor, k: Tensor, v: Tensor, *weight: Tensor) -> Tensor:
        options: dict[str, Any] = {"score": score, "backend": backend}
        options["score_weight"] = weight[0] if weight else None
        return relevancy_attention_varlen(q, k, v, bounds, 3, 2, **options)

    assert torch.autograd.gradcheck(call, (*tensors, *weight))


def test_nothing_packed(backend: str) -> None:
    q, k, v = (x[:0] for x in packed())
    for bounds in ([0], [0, 0, 0]):
        bound = torch.tensor(bounds)
        output, last = relevancy_attention_varlen(
            q, k, v, bound, 4, 3, return_retained=True, backend=backend
        )
        assert output.shape == (0, 4, 4) and last.shape == (0, 2)
        output.sum().backward()


def test_compiled_packed_samples(backend: str) -> None:
    """One graph for any number of samples and rows; the numbers of cu_seqlens are not looked at."""
    if backend == "reference":
        pytest.skip("a loop over samples, whose numbers a graph does not know")
    tensors = packed()

    def call(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        return relevancy_attention_varlen(q, k, v, bounds, 4, 3, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for bounds in (BOUNDS, torch.tensor([0, 30, 60])):
        found, wanted = (f(*tensors, bounds) for f in (compiled, call))
        grad = random(*wanted.shape, seed=9)
        pairs = (torch.autograd.grad(x, tensors, grad) for x in (found, wanted))
        assert torch.equal(found, wanted)
        assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))
    with pytest.raises(RuntimeError, match="cu_seqlens should not fall, got 40 and then 20"):
        compiled(*tensors, torch.tensor([0, 40, 20, 60]))


def test_vmap_over_numbers_that_are_checked(backend: str) -> None:
    """Relevance, lengths and bounds differ from call to call; the kernels check them then."""
    q, k, v = (random(3, 2, 12, n, 4, seed=n) for n in (2, 1, 3))  # three calls of two samples
    q, k, v = (x.transpose(2, 3) for x in (q, k, v[:, :, :, :1]))
    gate, lengths = random(3, 2, 1, 12, seed=5).abs(), torch.tensor([[12, 3], [0, 7], [5, 5]])
    bounds = torch.tensor([[0, 4, 12], [0, 12, 12], [0, 0, 12]])

    def batch(*rows: Tensor) -> Tensor:
        options: dict[str, Any] = {"relevance": rows[3], "lengths": rows[4], "backend": backend}
        return relevancy_attention(*rows[:3], 2, 2, **options)

    def one_behind_the_other(*rows: Tensor) -> Tensor:
        one = (x[0].transpose(0, 1) for x in rows[:3])
        return relevancy_attention_varlen(*one, rows[3], 2, 2, backend=backend)

    for call, rows in (
        (batch, (q, k, v, gate, lengths)),
        (one_behind_the_other, (q, k, v, bounds)),
    ):
        each = torch.stack([call(*(x[n] for x in rows)) for n in range(3)])
        if call is batch or backend == "cpu":  # the reference reads where samples begin
            assert torch.equal(torch.func.vmap(call)(*rows), each)
    if backend == "cpu":
        with pytest.raises(RuntimeError, match="given should hold numbers from 0"):
            torch.func.vmap(batch)(q, k, v, -gate, lengths)
        with pytest.raises(RuntimeError, match="cu_seqlens should not fall"):
            torch.func.vmap(one_behind_the_other)(q, k, v, bounds - torch.tensor([0, 1, 0]))


def test_memory_follows_the_rows_and_not_the_longest_sample() -> None:
    if _ext.extension is None:
        pytest.skip("the compiled kernels are not in this installation")
    kernels = _ext.extension
    peaks = []
    for lengths in ([4000], [1] * 2000 + [2000]):
        q, k, v = (torch.randn(4000, 1, 16) for _ in range(3))
        bounds = torch.tensor([0, *itertools.accumulate(lengths)])
        kernels.empty_cache()
        relevancy_attention_varlen(q, k, v, bounds, 8, 8, backend="cpu")
        peaks.append(kernels.cache_statistics()["peak_used_bytes"])
    assert peaks[1] <= 1.1 * peaks[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_forward_mode_of_packed_samples_in_a_graph(backend: str) -> None:
    """The definition loops over samples, whose ends the graph of an operator does not know."""
    query, key, value = (x.detach() for x in packed())

    def tangent(query: Tensor, backend: str = "reference") -> Tensor:
        def call(query: Tensor) -> Tensor:
            return relevancy_attention_varlen(query, key, value, BOUNDS, 4, 3, backend=backend)

        return torch.func.jvp(call, (query,), (torch.ones_like(query),))[1]

    compiled = torch.compile(tangent, backend="aot_eager")
    if backend == "reference":
        assert_close(compiled(query), tangent(query))
        return
    assert_close(tangent(query, backend), tangent(query))
    with pytest.raises(RuntimeError, match=r"the numbers of cu_seqlens.*use backend=.reference"):
        compiled(query, backend)
