"""relevancy_attention and rel_lstm as functions: against a loop by hand, and in chunks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import random
from closeness import assert_close, assert_no_worse_than_plain
from throughtime import RelevancyCache, RelState
from throughtime.functional import rel_lstm, relevancy_attention, retained_positions

sizes = settings(max_examples=25, deadline=None, derandomize=True)


def qkv(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [random(*shape, seed=s, dtype=dtype).requires_grad_() for s in range(3)]


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, window_size: int, top_k: int, w: Tensor | None = None
) -> tuple[Tensor, list[list[int]]]:
    """One sequence ``[T, D]``, one key at a time: outputs, and the retained set of every query."""
    relevance: dict[int, float] = {}
    retained: list[int] = []
    outputs, sets = [], []
    for i in range(len(q)):
        window = [j for j in range(i + 1) if j > i - window_size]
        keys = retained + window
        if w is None:
            scores = torch.stack([q[i] @ k[j] for j in keys]) / math.sqrt(q.size(1))
        else:
            scores = torch.stack([w @ torch.tanh(q[i] + k[j]) for j in keys])
        alpha = scores.softmax(0)
        outputs.append(sum(a * v[j] for a, j in zip(alpha, keys, strict=True)))
        sets.append(sorted(retained))
        for a, j in zip(alpha, keys, strict=True):
            if j in window:
                relevance[j] = relevance.get(j, 0.0) + a.item()
        if i - window_size + 1 >= 0:
            everybody = [*retained, i - window_size + 1]
            retained = sorted(everybody, key=lambda j: (-relevance[j], j))[:top_k]
    return torch.stack(outputs), sets


@pytest.mark.parametrize(
    ("window_size", "top_k"), [(1, 0), (3, 2), (2, 5), (4, 100), (100, 3), (1, 1)]
)
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_attention_is_the_definition(
    backend: str, window_size: int, top_k: int, score: str
) -> None:
    q, k, v = qkv(2, 2, 13, 3)
    w = random(2, 3, seed=5) if score == "additive" else None
    output, last = relevancy_attention(
        q,
        k,
        v,
        window_size,
        top_k,
        score=score,  # type: ignore[arg-type]
        score_weight=w,
        return_retained=True,
        backend=backend,  # type: ignore[arg-type]
    )
    listed = retained_positions(last, window_size, top_k)
    assert listed.shape == (2, 2, 13, min(top_k, 13))
    for b in range(2):
        for h in range(2):
            expected, sets = by_hand(
                q[b, h], k[b, h], v[b, h], window_size, top_k, None if w is None else w[h]
            )
            assert_close(output[b, h], expected)
            assert [[j for j in row if j >= 0] for row in listed[b, h].tolist()] == sets


@sizes
@given(
    length=st.integers(1, 24),
    window_size=st.integers(1, 9),
    top_k=st.integers(0, 6),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_chunks_equal_one_call(
    length: int, window_size: int, top_k: int, cuts: list[int], seed: int
) -> None:
    q, k, v = (random(2, 1, length, 3, seed=seed + s).requires_grad_() for s in range(3))
    whole, last = relevancy_attention(q, k, v, window_size, top_k, return_retained=True)
    cache, parts, at = RelevancyCache(), [], 0
    while at < length:
        steps = slice(at, at + cuts[len(parts) % len(cuts)])
        now = [x[:, :, steps] for x in (q, k, v)]
        parts.append(relevancy_attention(*now, window_size, top_k, cache=cache))
        at = steps.stop
    output = torch.cat(parts, 2)
    assert_close(output, whole)
    grad = random(*whole.shape, seed=7)
    for one, other in zip(
        torch.autograd.grad(output, (q, k, v), grad),
        torch.autograd.grad(whole, (q, k, v), grad),
        strict=True,
    ):
        assert_close(one, other)
    # What the cache holds is what the next query would attend.
    assert cache.position is not None and cache.key is not None and cache.length is not None
    alive = (last[:, :, : max(0, length)] == length - 1).sum(-1)
    leaving = 1 if length >= window_size else 0
    assert ((cache.position >= 0).sum(-1) - alive).abs().max() <= leaving
    held = cache.position.clamp(min=0).unsqueeze(-1).expand_as(cache.key)
    taken = torch.where((cache.position >= 0).unsqueeze(-1), k.gather(2, held), 0.0)
    assert torch.equal(cache.key, taken) and cache.length.tolist() == [length] * 2


@sizes
@given(length=st.integers(1, 20), extra=st.integers(0, 3), top_k=st.integers(0, 3))
def test_a_window_as_long_as_the_sequence_is_full_attention(
    length: int, extra: int, top_k: int
) -> None:
    q, k, v = qkv(2, 2, length, 4)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(relevancy_attention(q, k, v, length + extra, top_k), full)


@sizes
@given(length=st.integers(1, 20), window_size=st.integers(1, 22), seed=st.integers(0, 99))
def test_nothing_retained_is_a_sliding_window(length: int, window_size: int, seed: int) -> None:
    q, k, v = (random(1, 2, length, 4, seed=seed + s) for s in range(3))
    i, j = torch.arange(length).unsqueeze(1), torch.arange(length)
    mask = (j <= i) & (j > i - window_size)
    banded = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_close(relevancy_attention(q, k, v, window_size, 0), banded)


@sizes
@given(order=st.permutations(range(4)), window_size=st.integers(1, 5), top_k=st.integers(0, 4))
def test_permuting_the_batch_permutes_the_result(
    order: list[int], window_size: int, top_k: int
) -> None:
    q, k, v = qkv(4, 2, 15, 3)
    output = relevancy_attention(q, k, v, window_size, top_k)
    assert torch.equal(
        relevancy_attention(q[order], k[order], v[order], window_size, top_k), output[order]
    )


def test_the_first_keys_as_a_fixed_policy(backend: str) -> None:
    q, k, v = qkv(1, 1, 20, 3)
    _, last = relevancy_attention(
        q, k, v, 3, 2, retain="first", return_retained=True, backend=backend  # type: ignore[arg-type]
    )  # fmt: skip
    assert last[0, 0].tolist() == [19, 19, *range(4, 19), 19, 19, 19][:20]


def test_lengths_end_a_sequence(backend: str) -> None:
    q, k, v = qkv(3, 2, 9, 3)
    lengths = torch.tensor([9, 0, 4])
    cache = RelevancyCache()
    output = relevancy_attention(q, k, v, 2, 3, lengths=lengths, cache=cache, backend=backend)  # type: ignore[call-overload]
    short = relevancy_attention(q[2:, :, :4], k[2:, :, :4], v[2:, :, :4], 2, 3, backend=backend)  # type: ignore[call-overload]
    assert_close(output[2:, :, :4], short)
    assert not output[1].any() and not output[2, :, 4:].any()
    assert cache.length is not None and cache.length.tolist() == [9, 0, 4]
    assert cache.position is not None and cache.position[2].max() == 3
    assert (cache.position[1] == -1).all() and cache.key is not None and not cache.key[1].any()


def test_a_detached_cache_cuts_the_graph() -> None:
    q, k, v = qkv(1, 1, 6, 3)
    cache = RelevancyCache()
    relevancy_attention(q[:, :, :3], k[:, :, :3], v[:, :, :3], 2, 2, cache=cache)
    detached = cache.detach()
    assert "retained=2" in repr(cache) and repr(RelevancyCache()) == "RelevancyCache(empty)"
    now = [x[:, :, 3:] for x in (q, k, v)]
    for leaf in (k, v):
        gradients = [
            torch.autograd.grad(relevancy_attention(*now, 2, 2, cache=c).square().sum(), leaf)[0]
            for c in (copy.copy(detached), copy.copy(cache))
        ]
        assert not gradients[0][:, :, :3].any() and gradients[1][:, :, :3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(backend: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 1, 12, 4, dtype=dtype)
    output = relevancy_attention(q, k, v, 3, 2, backend=backend)  # type: ignore[call-overload]
    exact = relevancy_attention(q.double(), k.double(), v.double(), 3, 2, backend="reference")
    assert output.dtype == dtype
    torch.testing.assert_close(output, exact.to(dtype), rtol=0, atol=torch.finfo(dtype).eps * 4)
    cache = RelevancyCache()
    relevancy_attention(q, k, v, 3, 2, cache=cache, backend=backend)  # type: ignore[call-overload]
    assert cache.relevance is not None and cache.relevance.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = relevancy_attention(*(x.float() for x in (q, k, v)), 3, 2, backend=backend)  # type: ignore[call-overload]
    assert cast.dtype == torch.bfloat16


def test_any_strides(backend: str) -> None:
    q, k, v = (random(2, 9, 3, 4, seed=s).transpose(1, 2) for s in range(3))
    wide = random(2, 3, 9, 8, seed=9)[..., 1::2]
    expanded = random(1, 1, 9, 4, seed=8).expand(2, 3, 9, 4)
    for key in (k, wide, expanded):
        found = relevancy_attention(q, key, v, 3, 2, backend=backend)  # type: ignore[call-overload]
        dense = [x.contiguous() for x in (q, key, v)]
        assert torch.equal(found, relevancy_attention(*dense, 3, 2, backend=backend))  # type: ignore[call-overload]


def test_empty_batch_and_no_steps(backend: str) -> None:
    for shape in ((0, 2, 5, 3), (2, 2, 0, 3)):
        q, k, v = qkv(*shape)
        output = relevancy_attention(q, k, v, 2, 2, backend=backend)  # type: ignore[call-overload]
        assert output.shape == shape
        torch.autograd.grad(output.sum(), (q, k, v))


def layer(
    hidden: int = 4, attention: int = 3, features: int = 2, gates: int = 4
) -> dict[str, Tensor]:
    shapes = {
        "weight_ih": (gates * hidden, features),
        "weight_hh": (gates * hidden, hidden),
        "bias_ih": (gates * hidden,),
        "bias_hh": (gates * hidden,),
        "weight_query": (attention, hidden),
        "weight_key": (attention, hidden),
        "weight_score": (attention,),
    }
    return {
        name: random(*shape, seed=40 + k).requires_grad_()
        for k, (name, shape) in enumerate(shapes.items())
    }


def lstm_by_hand(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w: dict[str, Tensor],
    window_size: int,
    top_k: int | None,
    cell: str = "lstm",
) -> Tensor:
    """One sample ``[T, I]`` as the paper's code has it: attention at the start of step t + 1."""
    hidden: list[Tensor] = []
    relevance: dict[int, float] = {}
    retained: list[int] = []
    s = h
    for t in range(len(x)):
        if t > 0:
            i = t - 1
            window = [j for j in range(t) if j > i - window_size]
            keys = retained + window
            query = w["weight_query"] @ s
            scores = [
                w["weight_score"] @ torch.tanh(query + w["weight_key"] @ hidden[j]) for j in keys
            ]
            alpha = torch.stack(scores).softmax(0)
            context = sum(a * hidden[j] for a, j in zip(alpha, keys, strict=True))
            for a, j in zip(alpha, keys, strict=True):
                if j in window:
                    relevance[j] = relevance.get(j, 0.0) + a.item()
            if i - window_size + 1 >= 0:
                everybody = [*retained, i - window_size + 1]
                retained = sorted(everybody, key=lambda j: (-relevance[j], j))[:top_k]
            s = 0.5 * (h + context)
        gates = w["weight_ih"] @ x[t] + w["weight_hh"] @ s + w["bias_ih"] + w["bias_hh"]
        if cell == "tanh":
            h = torch.tanh(gates)
        else:
            i_, f, g, o = gates.chunk(4)
            c = torch.sigmoid(f) * c + torch.sigmoid(i_) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        hidden.append(h)
    return torch.stack(hidden)


@pytest.mark.parametrize(("window_size", "top_k"), [(2, 2), (1, 0), (3, None), (20, 1)])
def test_layer_is_the_definition(backend: str, window_size: int, top_k: int | None) -> None:
    x, h, c = (
        random(*s, seed=k).requires_grad_() for k, s in enumerate([(9, 2, 2), (2, 4), (2, 4)])
    )
    w = layer()
    output, _ = rel_lstm(x, (h, c), **w, window_size=window_size, top_k=top_k, backend=backend)  # type: ignore[arg-type]
    expected = torch.stack(
        [lstm_by_hand(x[:, b], h[b], c[b], w, window_size, top_k) for b in range(2)], 1
    )
    assert_close(output, expected)
    leaves, grad = [x, h, c, *w.values()], random(*output.shape, seed=3)
    for one, other in zip(
        torch.autograd.grad(output, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        assert_close(one, other)


def test_a_plain_cell_runs_on_the_reference_only() -> None:
    x, h, w = random(6, 1, 2, seed=0), random(1, 4, seed=1), layer(gates=1)
    output, state = rel_lstm(x, (h, h), **w, window_size=2, top_k=2, cell="tanh")
    assert_close(output[:, 0], lstm_by_hand(x[:, 0], h[0], h[0], w, 2, 2, "tanh"))
    assert torch.equal(state.c, h)
    for backend in ("cpu", "triton"):
        with pytest.raises(RuntimeError, match=r"cell='tanh' runs on backend 'reference' only"):
            rel_lstm(x, None, **w, window_size=2, top_k=2, cell="tanh", backend=backend)  # type: ignore[arg-type]


@sizes
@given(
    cuts=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    window_size=st.integers(1, 5),
    top_k=st.integers(0, 4),
)
def test_a_layer_in_chunks_equals_one_call(cuts: list[int], window_size: int, top_k: int) -> None:
    x, w = random(sum(cuts), 2, 2, seed=0).requires_grad_(), layer()
    options: dict[str, Any] = {**w, "window_size": window_size, "top_k": top_k}
    whole, end = rel_lstm(x, None, **options)
    state: RelState | None = None
    parts = []
    for chunk in x.split(cuts):
        part, state = rel_lstm(chunk, state, **options)
        parts.append(part)
    assert state is not None
    assert_close(torch.cat(parts), whole)
    for name in ("h", "c", "context", "memory", "relevance"):
        assert_close(getattr(state, name), getattr(end, name), name)
    assert torch.equal(state.position, end.position) and torch.equal(state.length, end.length)
    grads = [
        torch.autograd.grad(y.square().sum(), [x, *w.values()]) for y in (torch.cat(parts), whole)
    ]
    for one, other in zip(*grads, strict=True):
        assert_close(one, other)


def test_a_detached_step_cuts_the_direct_term_only(backend: str) -> None:
    x, w = random(6, 1, 2, seed=0), layer()
    h, c = (random(1, 4, seed=k).requires_grad_() for k in (1, 2))
    options: dict[str, Any] = {**w, "window_size": 2, "top_k": 2, "backend": backend}
    everywhere = torch.ones(6, dtype=torch.bool)
    first = torch.zeros(6, dtype=torch.bool)
    first[0] = True

    def grads(mask: Tensor | None) -> tuple[Tensor, ...]:
        output, _ = rel_lstm(x, (h, c), **options, detach_mask=mask)
        return torch.autograd.grad(
            output[-1].sum(), (h, c, w["weight_query"]), materialize_grads=True
        )

    dh, dc, dquery = grads(everywhere)
    assert not dh.any(), "s_0 is h_0: all of it is cut at the first step"
    assert dc.any() and dquery.any(), "the cell and attention are never cut"
    assert not grads(first)[0].any() and grads(None)[0].any()
    assert not torch.equal(dquery, grads(None)[2])
    per_sample = everywhere.unsqueeze(1)
    for one, other in zip(grads(per_sample), grads(everywhere), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_gradcheck(name: str) -> None:
    from cases import runnable

    if name not in runnable():
        pytest.skip("the compiled kernels are not in this installation")
    q, k, v = qkv(1, 2, 7, 3)
    weight = random(2, 3, seed=6).requires_grad_()

    def additive(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        return relevancy_attention(
            q, k, v, 2, 2, score="additive", score_weight=weight, backend=name  # type: ignore[call-overload]
        )  # fmt: skip

    def dot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return relevancy_attention(q, k, v, 2, 2, backend=name)  # type: ignore[call-overload]

    assert torch.autograd.gradcheck(additive, (q, k, v, weight))
    assert torch.autograd.gradcheck(dot, (q, k, v))
    w = layer(2, 2, 1)

    def recurrent(x: Tensor, h: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(w, weights, strict=True))
        output, state = rel_lstm(x, (h, h), **named, window_size=2, top_k=1, backend=name)  # type: ignore[arg-type]
        return output, state.c, state.context, state.memory

    x, h = (random(*s, seed=k).requires_grad_() for k, s in enumerate([(6, 1, 1), (1, 2)]))
    assert torch.autograd.gradcheck(recurrent, (x, h, *w.values()))


def test_second_derivatives(backend: str) -> None:
    q, k, v = qkv(1, 1, 4, 2)

    def run(q: Tensor) -> Tensor:
        return relevancy_attention(q, k, v, 2, 1, backend=backend)  # type: ignore[call-overload]

    if backend == "reference":
        assert torch.autograd.gradgradcheck(run, (q,))
        return
    (grad,) = torch.autograd.grad(run(q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r'second derivative.*backend="reference"'):
        grad.sum().backward()


def test_nothing_is_saved_without_gradients(backend: str) -> None:
    q, k, v = (x.detach() for x in qkv(1, 1, 5, 2))
    assert relevancy_attention(q, k, v, 2, 2, backend=backend).grad_fn is None  # type: ignore[call-overload]
    w = {name: x.detach() for name, x in layer().items()}
    output, state = rel_lstm(
        random(3, 1, 2, seed=0), None, **w, window_size=2, top_k=1, backend=backend
    )  # type: ignore[arg-type]
    assert output.grad_fn is None and state.memory.grad_fn is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_low_precision(backend: str, dtype: torch.dtype) -> None:
    x, w = random(8, 2, 2, seed=0).to(dtype), {n: y.detach().to(dtype) for n, y in layer().items()}
    exact = {n: y.double() for n, y in w.items()}
    found, state = rel_lstm(x, None, **w, window_size=2, top_k=2, backend=backend)  # type: ignore[arg-type]
    plain, _ = rel_lstm(x, None, **w, window_size=2, top_k=2, backend="reference")
    wanted, _ = rel_lstm(x.double(), None, **exact, window_size=2, top_k=2, backend="reference")
    assert found.dtype == state.memory.dtype == dtype and state.relevance.dtype == torch.float32
    assert_no_worse_than_plain({"output": found}, {"output": plain}, {"output": wanted})
