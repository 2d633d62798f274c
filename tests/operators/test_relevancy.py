"""relevancy_attention and rel_lstm as functions: against a loop by hand, in chunks, properties."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import random, runnable
from closeness import assert_close, assert_no_worse_than_plain
from throughtime import RelevancyCache, RelState
from throughtime.functional import rel_lstm, relevancy_attention, retained_positions

sizes = settings(max_examples=20, deadline=None, derandomize=True)


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
    backend: Any, window_size: int, top_k: int, score: str
) -> None:
    q, k, v = qkv(2, 2, 13, 3)
    w = random(2, 3, seed=5) if score == "additive" else None
    options: dict[str, Any] = {"score": score, "score_weight": w, "backend": backend}
    output, last = relevancy_attention(q, k, v, window_size, top_k, return_retained=True, **options)
    listed = retained_positions(last, window_size, top_k)
    assert listed.shape == (2, 2, 13, min(top_k, 13))
    for b in range(2):
        for h in range(2):
            expected, sets = by_hand(
                q[b, h], k[b, h], v[b, h], window_size, top_k, None if w is None else w[h]
            )
            assert_close(output[b, h], expected)
            assert [[j for j in row if j >= 0] for row in listed[b, h].tolist()] == sets


# Per chunk the lengths of two samples; the chunk is as long as the longer of the two, and one more.
chunks = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4)


def pieces(lengths: list[tuple[int, int]], rows: Tensor) -> Iterator[Tensor]:
    """Rows ``[2, T, ...]`` chunk by chunk, each sample at its own pace; the padding is garbage."""
    at = [0, 0]
    for pair in lengths:
        chunk = torch.full((2, max(pair) + 1, *rows.shape[2:]), 1e3, dtype=rows.dtype)
        for b, count in enumerate(pair):
            chunk[b, :count] = rows[b, at[b] : at[b] + count]
            at[b] += count
        yield chunk


def joined(lengths: list[tuple[int, int]], parts: list[Tensor], like: Tensor) -> Tensor:
    """The valid rows of all chunks ``[2, T, ...]``; the others are zero."""
    samples = []
    for b in range(2):
        for part, pair in zip(parts, lengths, strict=True):
            assert not part[b, pair[b] :].any(), "zero past the end"
        rows = torch.cat([part[b, : pair[b]] for part, pair in zip(parts, lengths, strict=True)])
        samples.append(torch.cat([rows, like.new_zeros(like.size(1) - len(rows), *rows.shape[1:])]))
    return torch.stack(samples)


def assert_same_gradients(one: Tensor, other: Tensor, leaves: list[Tensor]) -> None:
    grad = random(*one.shape, seed=7)
    options: dict[str, Any] = {"materialize_grads": True}
    for x, y in zip(
        torch.autograd.grad(one, leaves, grad, **options),
        torch.autograd.grad(other, leaves, grad, **options),
        strict=True,
    ):
        assert_close(x, y)


def held(position: Tensor) -> list[list[int]]:
    return [[slot for slot in row if slot >= 0] for row in position.flatten(0, -2).tolist()]


@pytest.mark.parametrize("name", runnable())
@sizes
@given(
    lengths=chunks,
    window_size=st.integers(1, 9),
    top_k=st.integers(0, 6),
    score=st.sampled_from(["dot", "additive"]),
    retain=st.sampled_from(["relevant", "first"]),
)
def test_ragged_chunks_of_attention_equal_one_call(
    name: str, lengths: list[tuple[int, int]], window_size: int, top_k: int, score: str, retain: str
) -> None:
    """Every sample advances at its own pace; the cache ends with the same keys."""
    total = torch.tensor(lengths).sum(0)
    rows = qkv(2, 2, max(1, int(total.max())), 3)
    options: dict[str, Any] = {"score": score, "retain": retain, "backend": name}
    if score == "additive":
        options["score_weight"] = random(2, 3, seed=5)
    end, cache = RelevancyCache(), RelevancyCache()
    whole = relevancy_attention(*rows, window_size, top_k, lengths=total, cache=end, **options)
    cut = [pieces(lengths, x.transpose(1, 2)) for x in rows]
    parts = [
        relevancy_attention(
            *(x.transpose(1, 2) for x in now), window_size, top_k,
            lengths=torch.tensor(pair), cache=cache, **options,
        )
        for *now, pair in zip(*cut, lengths, strict=True)
    ]  # fmt: skip
    whole = whole.transpose(1, 2)
    found = joined(lengths, [part.transpose(1, 2) for part in parts], whole)
    assert_close(found, whole)
    assert_same_gradients(found, whole, rows)
    assert torch.equal(cache.length, total) and held(cache.position) == held(end.position)
    taken = rows[1].gather(2, cache.position.clamp(min=0).unsqueeze(-1).expand_as(cache.key))
    assert torch.equal(cache.key, torch.where((cache.position >= 0).unsqueeze(-1), taken, 0.0))


@pytest.mark.parametrize("name", runnable())
@sizes
@given(
    lengths=chunks,
    window_size=st.integers(1, 5),
    top_k=st.one_of(st.none(), st.integers(0, 4)),
    retain=st.sampled_from(["relevant", "first"]),
)
def test_ragged_chunks_of_a_layer_equal_one_call(
    name: str, lengths: list[tuple[int, int]], window_size: int, top_k: int | None, retain: str
) -> None:
    w, total = layer(), torch.tensor(lengths).sum(0)
    options: dict[str, Any] = {**w, "window_size": window_size, "top_k": top_k}
    options |= {"retain": retain, "backend": name}
    x = random(2, max(1, int(total.max())), 2, seed=0).requires_grad_()
    whole, end = rel_lstm(x.transpose(0, 1), None, lengths=total, **options)
    state: RelState | None = None
    parts = []
    for now, pair in zip(pieces(lengths, x), lengths, strict=True):
        part, state = rel_lstm(now.transpose(0, 1), state, lengths=torch.tensor(pair), **options)
        parts.append(part.transpose(0, 1))
    assert state is not None
    whole = whole.transpose(0, 1)
    found = joined(lengths, parts, whole)
    assert_close(found, whole)
    assert_same_gradients(found, whole, [x, *w.values()])
    for part_name in ("h", "c", "context"):
        assert_close(getattr(state, part_name), getattr(end, part_name), part_name)
    assert torch.equal(state.length, total)
    assert held(state.position.T) == held(end.position.T)


@pytest.mark.parametrize("name", runnable())
@sizes
@given(length=st.integers(1, 12), extra=st.integers(0, 3), top_k=st.integers(0, 4))
def test_a_layer_that_forgets_nothing(name: str, length: int, extra: int, top_k: int) -> None:
    """A window, a retained set, or both, as long as the sequence: all are full attention."""
    options: dict[str, Any] = {**layer(), "backend": name}
    x = random(length, 2, 2, seed=0)
    full, _ = rel_lstm(x, None, **options, window_size=2, top_k=None)
    for window_size, k in ((length + extra, top_k), (1, length), (3, length)):
        assert_close(rel_lstm(x, None, **options, window_size=window_size, top_k=k)[0], full)


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


@pytest.mark.parametrize("name", runnable())
@sizes
@given(order=st.permutations(range(4)), window_size=st.integers(1, 5), top_k=st.integers(0, 4))
def test_permuting_the_batch_permutes_the_result(
    name: str, order: list[int], window_size: int, top_k: int
) -> None:
    rows, options = qkv(4, 2, 15, 3), {"backend": name}
    whole = relevancy_attention(*rows, window_size, top_k, **options)
    permuted = relevancy_attention(*(x[order] for x in rows), window_size, top_k, **options)
    assert torch.equal(permuted, whole[order])
    options |= {**layer(), "window_size": window_size, "top_k": top_k}
    x = random(12, 4, 2, seed=0)
    (output, state), (other, end) = (rel_lstm(y, None, **options) for y in (x, x[:, order]))
    assert_close(other, output[:, order])
    assert torch.equal(end.position, state.position[:, order])


def test_the_first_keys_as_a_fixed_policy(backend: Any) -> None:
    q, k, v = qkv(1, 1, 20, 3)
    options: dict[str, Any] = {"retain": "first", "return_retained": True, "backend": backend}
    _, last = relevancy_attention(q, k, v, 3, 2, **options)
    assert last[0, 0].tolist() == [19, 19, *range(4, 19), 19, 19, 19][:20]


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
def test_low_precision_is_rounded_once(backend: Any, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 1, 12, 4, dtype=dtype)
    output = relevancy_attention(q, k, v, 3, 2, backend=backend)
    exact = relevancy_attention(q.double(), k.double(), v.double(), 3, 2, backend="reference")
    assert output.dtype == dtype
    torch.testing.assert_close(output, exact.to(dtype), rtol=0, atol=torch.finfo(dtype).eps * 4)
    cache = RelevancyCache()
    relevancy_attention(q, k, v, 3, 2, cache=cache, backend=backend)
    assert cache.relevance is not None and cache.relevance.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = relevancy_attention(*(x.float() for x in (q, k, v)), 3, 2, backend=backend)
    assert cast.dtype == torch.bfloat16


def test_any_strides(backend: Any) -> None:
    q, k, v = (random(2, 9, 3, 4, seed=s).transpose(1, 2) for s in range(3))
    wide = random(2, 3, 9, 8, seed=9)[..., 1::2]
    expanded = random(1, 1, 9, 4, seed=8).expand(2, 3, 9, 4)
    for key in (k, wide, expanded):
        found = relevancy_attention(q, key, v, 3, 2, backend=backend)
        dense = [x.contiguous() for x in (q, key, v)]
        assert torch.equal(found, relevancy_attention(*dense, 3, 2, backend=backend))


def test_a_layer_takes_any_strides(backend: Any) -> None:
    strange = {
        n: (w.t().contiguous().t() if w.dim() == 2 else torch.stack([w, w], 1)[:, 0])
        for n, w in layer(features=3).items()
    }
    h, c = random(1, 4, seed=1).expand(2, 4), random(2, 8, seed=2)[..., 1::2]
    inputs = (
        random(2, 9, 3, seed=3).transpose(0, 1),
        random(18, 2, 6, seed=4)[1::2, :, ::2],
        random(9, 1, 3, seed=5).expand(9, 2, 3),
    )
    assert not any(x.is_contiguous() for x in (*strange.values(), h, c, *inputs))
    grad = random(2, 9, 4, seed=6).transpose(0, 1)
    for x in inputs:
        found = []
        for change in (Tensor.detach, Tensor.contiguous):
            leaf = change(x).requires_grad_()
            weights = {name: change(w.detach()) for name, w in strange.items()}
            output, state = rel_lstm(
                leaf, (change(h), change(c)), **weights, window_size=2, top_k=2, backend=backend
            )
            found.append((output, state.memory, *torch.autograd.grad(output, leaf, change(grad))))
        for one, other in zip(*found, strict=True):
            assert_close(one, other)


def test_empty_batch_and_no_steps(backend: Any) -> None:
    for shape in ((0, 2, 5, 3), (2, 2, 0, 3)):
        q, k, v = qkv(*shape)
        output = relevancy_attention(q, k, v, 2, 2, backend=backend)
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
def test_layer_is_the_definition(backend: Any, window_size: int, top_k: int | None) -> None:
    x, h, c = (
        random(*s, seed=k).requires_grad_() for k, s in enumerate([(9, 2, 2), (2, 4), (2, 4)])
    )
    w = layer()
    output, _ = rel_lstm(x, (h, c), **w, window_size=window_size, top_k=top_k, backend=backend)
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
            rel_lstm(x, None, **w, window_size=2, top_k=2, cell="tanh", backend=backend)


def test_a_detached_step_cuts_the_direct_term_only(backend: Any) -> None:
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


def test_gradcheck(backend: Any) -> None:
    q, k, v = qkv(1, 2, 7, 3)
    weight = random(2, 3, seed=6).requires_grad_()

    def additive(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        options: dict[str, Any] = {"score": "additive", "score_weight": weight}
        return relevancy_attention(q, k, v, 2, 2, **options, backend=backend)

    def dot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return relevancy_attention(q, k, v, 2, 2, backend=backend)

    assert torch.autograd.gradcheck(additive, (q, k, v, weight))
    assert torch.autograd.gradcheck(dot, (q, k, v))
    w = layer(2, 2, 1)

    def recurrent(x: Tensor, h: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(w, weights, strict=True))
        output, state = rel_lstm(x, (h, h), **named, window_size=2, top_k=1, backend=backend)
        return output, state.c, state.context, state.memory

    x, h = (random(*s, seed=k).requires_grad_() for k, s in enumerate([(6, 1, 1), (1, 2)]))
    assert torch.autograd.gradcheck(recurrent, (x, h, *w.values()))


def test_second_derivatives_of_the_reference() -> None:
    q, k, v = qkv(1, 1, 4, 2)
    run = lambda q: relevancy_attention(q, k, v, 2, 1, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (q,))


def test_nothing_is_saved_without_gradients(backend: Any) -> None:
    q, k, v = (x.detach() for x in qkv(1, 1, 5, 2))
    assert relevancy_attention(q, k, v, 2, 2, backend=backend).grad_fn is None
    w = {name: x.detach() for name, x in layer().items()}
    output, state = rel_lstm(
        random(3, 1, 2, seed=0), None, **w, window_size=2, top_k=1, backend=backend
    )
    assert output.grad_fn is None and state.memory.grad_fn is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_low_precision(backend: Any, dtype: torch.dtype) -> None:
    x, w = random(8, 2, 2, seed=0).to(dtype), {n: y.detach().to(dtype) for n, y in layer().items()}
    exact = {n: y.double() for n, y in w.items()}
    found, state = rel_lstm(x, None, **w, window_size=2, top_k=2, backend=backend)
    plain, _ = rel_lstm(x, None, **w, window_size=2, top_k=2, backend="reference")
    wanted, _ = rel_lstm(x.double(), None, **exact, window_size=2, top_k=2, backend="reference")
    assert found.dtype == state.memory.dtype == dtype and state.relevance.dtype == torch.float32
    assert_no_worse_than_plain({"output": found}, {"output": plain}, {"output": wanted})
