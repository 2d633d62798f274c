"""relevancy_attention and rel_lstm as functions: against a loop by hand, in chunks, properties."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from by_hand import ByHand, additive
from cases import random, random_mask, runnable
from closeness import assert_close
from throughtime import RelevancyCache
from throughtime.functional import rel_lstm, relevancy_attention, retained_positions

sizes = settings(max_examples=20, deadline=None, derandomize=True)
on_every_backend = pytest.mark.parametrize("name", runnable())
retains = st.sampled_from(["relevant", "first"])


def qkv(*shape: int) -> list[Tensor]:
    return [random(*shape, seed=s).requires_grad_() for s in range(3)]


def layer(gates: int = 4, hidden: int = 4) -> dict[str, Tensor]:
    """Weights of a RelLSTM layer of two features."""
    shapes = {"weight_ih": (gates * hidden, 2), "weight_hh": (gates * hidden, hidden)}
    shapes |= dict.fromkeys(("bias_ih", "bias_hh"), (gates * hidden,))
    shapes |= dict.fromkeys(("weight_query", "weight_key"), (3, hidden)) | {"weight_score": (3,)}
    return {
        name: random(*shape, seed=40 + k).requires_grad_()
        for k, (name, shape) in enumerate(shapes.items())
    }


@on_every_backend
@sizes
@given(
    window_size=st.integers(1, 16),
    top_k=st.sampled_from([0, 1, 2, 3, 5, 100]),
    score=st.sampled_from(["dot", "additive"]),
    retain=retains,
    screen_every=st.sampled_from([1, 2, 3, 5, 50]),
    kind=st.sampled_from(["sum", "normalized", "given"]),
)
@example(2, 2, "dot", "relevant", 4, "sum")
@example(2, 2, "dot", "relevant", 1, "normalized")
@example(2, 2, "dot", "relevant", 1, "given")
def test_attention_is_the_definition(
    name: Any, window_size: int, top_k: int, score: Any, retain: Any, screen_every: int, kind: str
) -> None:
    if name == "triton":
        screen_every, kind = 1, "sum"
    given = random(2, 2, 13, seed=6).abs() if kind == "given" else None
    retain = "relevant" if given is not None else retain
    rows = q, k, v = qkv(2, 2, 13, 3)
    w = random(2, 3, seed=5) if score == "additive" else None
    options: dict[str, Any] = {"score": score, "score_weight": w, "retain": retain}
    if name != "triton":
        options |= {"normalize": kind == "normalized", "relevance": given}
        options |= {"screen_every": screen_every, "return_relevance": True}
    output, last, *others = relevancy_attention(
        *rows, window_size, top_k, return_retained=True, backend=name, **options
    )
    listed = retained_positions(last, window_size, top_k, screen_every)
    assert listed.shape == (2, 2, 13, min(top_k, 13))

    def by_hand(b: int, h: int) -> Iterator[Tensor]:
        own = None if given is None else given[b, h]
        hand = ByHand(window_size, top_k, retain, screen_every, own, kind == "normalized")
        score = (lambda q, k: q @ k / math.sqrt(3)) if w is None else additive(w[h])
        for i, query in enumerate(q[b, h]):
            assert [j for j in listed[b, h, i].tolist() if j >= 0] == sorted(hand.retained)
            yield hand.attend(query, k[b, h, : i + 1], v[b, h], score)
        for relevance in others:
            wanted = [hand.relevance[j] for j in range(13)]
            assert_close(relevance[b, h], torch.tensor(wanted, dtype=relevance.dtype))

    expected = torch.stack(
        [torch.stack([torch.stack(list(by_hand(b, h))) for h in range(2)]) for b in range(2)]
    )
    assert_close(output, expected)
    assert_same_gradients(output, expected, rows)


@sizes
@given(length=st.integers(1, 20), window_size=st.integers(1, 22), top_k=st.integers(0, 3))
def test_nothing_retained_is_a_sliding_window(length: int, window_size: int, top_k: int) -> None:
    """And a window as long as the sequence is full attention."""
    q, k, v = qkv(2, 2, length, 4)
    i, j = torch.arange(length).unsqueeze(1), torch.arange(length)
    banded = F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & (j > i - window_size))
    top_k = 0 if window_size < length else top_k
    assert_close(relevancy_attention(q, k, v, window_size, top_k), banded)


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


def held(position: Tensor, retained: int) -> list[list[int]]:
    """Positions ``[..., slots]`` without empty slots: last in the retained set, first after it."""
    rows = []
    for row in position.flatten(0, -2).tolist():
        rows.append([slot for slot in row if slot >= 0])
        kept = sorted(slot for slot in row[:retained] if slot >= 0)
        assert row[:retained] == kept + [-1] * (retained - len(kept))
        assert row[retained:] == sorted(row[retained:])  # empty slots are first
    return rows


Call = Callable[[Sequence[Tensor], Tensor, Any], tuple[Tensor, Any]]


def streamed(
    op: str, steps: int, options: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor], Call]:
    """Rows ``[2, T, ...]``, weights, and a call that goes on from a state."""
    if op == "rel_lstm":
        weights = layer()

        def run_layer(rows: Sequence[Tensor], lengths: Tensor, state: Any) -> tuple[Tensor, Any]:
            x = rows[0].transpose(0, 1)
            output, state = rel_lstm(x, state, **weights, lengths=lengths, **options)
            return output.transpose(0, 1), state

        x = random(2, steps, 2, seed=0).requires_grad_()
        return [x], list(weights.values()), run_layer
    weight = {"score": op, "score_weight": random(2, 3, seed=5) if op == "additive" else None}

    def attend(rows: Sequence[Tensor], lengths: Tensor, state: Any) -> tuple[Tensor, Any]:
        cache = RelevancyCache() if state is None else copy.copy(state)
        given = [x.transpose(1, 2) for x in rows]
        output = relevancy_attention(*given, **options, **weight, lengths=lengths, cache=cache)
        return output.transpose(1, 2), cache

    return qkv(2, steps, 2, 3), [], attend


@on_every_backend
@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    lengths=chunks,
    window_size=st.integers(1, 9),
    top_k=st.integers(0, 6),
    op=st.sampled_from(["dot", "additive", "rel_lstm"]),
    retain=retains,
    screen_every=st.integers(1, 5),
)
def test_ragged_chunks_equal_one_call(
    name: str,
    lengths: list[tuple[int, int]],
    window_size: int,
    top_k: int,
    op: str,
    retain: str,
    screen_every: int,
) -> None:
    """Every sample advances at its own pace; the state ends with the same keys."""
    total = torch.tensor(lengths).sum(0)
    options = {"window_size": window_size, "top_k": top_k, "retain": retain, "backend": name}
    if op != "rel_lstm" and name != "triton":
        options["screen_every"] = screen_every
    rows, weights, call = streamed(op, max(1, int(total.max())), options)
    whole, end = call(rows, total, None)
    parts, state = [], None
    for *now, pair in zip(*(pieces(lengths, x) for x in rows), lengths, strict=True):
        part, state = call(now, torch.tensor(pair), state)
        parts.append(part)
    found = joined(lengths, parts, whole)
    assert_close(found, whole)
    assert_same_gradients(found, whole, [*rows, *weights])
    assert torch.equal(state.length, total)
    slots = [x.position.T if op == "rel_lstm" else x.position for x in (state, end)]
    assert held(slots[0], state.retained) == held(slots[1], end.retained)
    if op == "rel_lstm":
        for part_name in ("h", "c", "context"):
            assert_close(getattr(state, part_name), getattr(end, part_name), part_name)
    else:
        index = state.position.clamp(min=0).unsqueeze(-1).expand_as(state.key)
        taken = rows[1].transpose(1, 2).gather(2, index)
        assert torch.equal(state.key, torch.where((state.position >= 0).unsqueeze(-1), taken, 0.0))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_scores_of_retention_go_on_in_a_cache(name: Any) -> None:
    rows, gate = [x.detach() for x in qkv(2, 2, 21, 3)], random(2, 2, 21, seed=6).abs()
    for options in ({"relevance": gate}, {"normalize": True}):
        call = {"return_relevance": True, "screen_every": 3, "backend": name}
        whole, relevance = relevancy_attention(*rows, 2, 3, **call, **options)
        cache, parts = RelevancyCache(), []
        for at in torch.arange(21).split(5):  # type: ignore[no-untyped-call]
            own = {"relevance": gate[:, :, at]} if "relevance" in options else options
            now = [x[:, :, at] for x in rows]
            parts.append(relevancy_attention(*now, 2, 3, cache=cache, **call, **own)[0])
        assert_close(torch.cat(parts, 2), whole)
        if "relevance" in options:
            assert torch.equal(relevance, gate)


def test_uniform_attention_gives_every_key_the_window_size_where_it_is_normalized() -> None:
    rows = [torch.zeros(1, 1, 30, 2, dtype=torch.float64)] * 3
    plain, normalized = (
        relevancy_attention(*rows, 4, 5, normalize=x, return_relevance=True)[1][0, 0, :27]
        for x in (False, True)
    )
    assert_close(normalized, torch.full_like(normalized, 4))
    assert plain[0] > 4 * plain[-1]


def test_a_retention_gate_learns() -> None:
    """The last query needs the few keys with a flag, which only a gate can know of beforehand."""
    generator = torch.Generator().manual_seed(0)
    flag = (torch.rand(8, 1, 60, generator=generator) < 0.06).float()
    features = torch.stack([flag, 1 - flag], 3)
    gate = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(gate.weight)
    key, value = 4 * flag.unsqueeze(3), (2 * flag - 1).unsqueeze(3)

    def attend() -> Tensor:
        g = torch.sigmoid(gate(features)).squeeze(3)
        through = value * (1 + g - g.detach()).unsqueeze(3)
        query = torch.ones_like(key)
        return relevancy_attention(query, key, through, 3, 5, relevance=g)[:, :, -1]

    before = attend()
    optimizer = torch.optim.SGD(gate.parameters(), lr=2.0)
    for _ in range(40):
        optimizer.zero_grad()
        (attend() - 1).square().mean().backward()
        optimizer.step()
    flagged = flag.sum(2) > 0
    assert (before[flagged] < 0).any() and (attend()[flagged] > 0.7).all()


def test_a_detached_cache_ends_the_graph() -> None:
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


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize("largest", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_size_may_be_the_largest_integer(name: Any, score: str, largest: tuple[int, ...]) -> None:
    rows, weight = qkv(1, 2, 9, 3), random(2, 3, seed=5) if score == "additive" else None
    found, wanted = [], []
    for results, most in ((found, sys.maxsize), (wanted, 100)):
        window_size, top_k, every = (most if k in largest else 2 for k in range(3))
        call: dict[str, Any] = {"score": score, "score_weight": weight, "screen_every": every}
        call |= {"return_retained": True, "backend": name}
        output, last = relevancy_attention(*rows, window_size, top_k, **call)
        results += [output, last, *torch.autograd.grad(output.square().sum(), rows)]
        results.append(retained_positions(last, window_size, top_k, every))
        cache = RelevancyCache()
        for at in ((0, 4), (4, 4), (4, 9)):
            now = [x[:, :, slice(*at)] for x in rows]
            results += relevancy_attention(*now, window_size, top_k, cache=cache, **call)
            assert results[-1].size(2) == at[1] - at[0]
    assert all(map(torch.equal, found, wanted))


def test_relevance_past_a_length_is_not_looked_at(backend: Any) -> None:
    rows, gate = [x.detach() for x in qkv(2, 2, 9, 3)], random(2, 2, 9, seed=6).abs()
    lengths = torch.tensor([4, 0])
    call: dict[str, Any] = {"lengths": lengths, "return_relevance": True, "backend": backend}
    found = []
    for padding in (1.0, math.nan, -1.0):
        gate[0, :, 4:], gate[1] = padding, padding
        found.append(relevancy_attention(*rows, 2, 3, relevance=gate, **call))
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


@pytest.mark.parametrize("narrow", ["bfloat16", "autocast"])
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_relevance_of_16_bits_is_float32_and_has_no_gradient(
    backend: Any, narrow: str, score: str
) -> None:
    """Numbers that bfloat16 does not tell apart choose keys."""
    gate = (1 + torch.arange(9) / 1e4).requires_grad_()
    rows = [x.detach().float().requires_grad_() for x in qkv(1, 1, 9, 3)]
    weight = random(3, seed=5).float() if score == "additive" else None
    if narrow == "bfloat16":
        rows, weight = [x.bfloat16() for x in rows], None if weight is None else weight.bfloat16()
    options: dict[str, Any] = {"return_retained": True, "return_relevance": True}
    options |= {"score": score, "score_weight": weight, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow == "autocast"):
        output, last, relevance = relevancy_attention(
            *rows, 1, 1, relevance=gate.expand(1, 1, 9), **options
        )
    assert output.dtype == torch.bfloat16 and output.requires_grad
    assert torch.equal(relevance, gate.detach().expand(1, 1, 9)) and not relevance.requires_grad
    assert last[0, 0].tolist() == [*range(1, 9), 8]  # each replaces the one before


def test_a_compiler_may_leave_every_size_open() -> None:
    call = torch.compile(relevancy_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for heads, of_keys, *sizes in ((6, 3, 2, 3, 1), (8, 4, 3, 1, 2), (8, 2, 4, 5, sys.maxsize)):
        query, key = random(2, heads, 9, 3, seed=0), random(2, of_keys, 9, 3, seed=1)
        given, every = (query, key, key, *sizes[:2]), sizes[2]
        options: dict[str, Any] = {"screen_every": every, "backend": "cpu"}
        assert torch.equal(call(*given, **options), relevancy_attention(*given, **options))


def test_empty_batch_and_no_steps(backend: Any) -> None:
    for shape in ((0, 2, 5, 3), (2, 2, 0, 3)):
        q, k, v = qkv(*shape)
        output = relevancy_attention(q, k, v, 2, 2, backend=backend)
        assert output.shape == shape
        torch.autograd.grad(output.sum(), (q, k, v))


def layer_by_hand(
    x: Tensor, h: Tensor, c: Tensor, w: dict[str, Tensor], hand: ByHand, mask: Tensor, cell: str
) -> Tensor:
    """One sample ``[T, I]`` as the paper's code has it: attention at the start of step t + 1."""
    hidden: list[Tensor] = []
    s = h.detach() if mask[0] else h
    for t in range(len(x)):
        if t > 0:
            keys = [w["weight_key"] @ row for row in hidden]
            context = hand.attend(w["weight_query"] @ s, keys, hidden, additive(w["weight_score"]))
            s = 0.5 * ((h.detach() if mask[t] else h) + context)
        gates = w["weight_ih"] @ x[t] + w["weight_hh"] @ s + w["bias_ih"] + w["bias_hh"]
        if cell == "tanh":
            h = torch.tanh(gates)
        else:
            i_, f, g, o = gates.chunk(4)
            c = torch.sigmoid(f) * c + torch.sigmoid(i_) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        hidden.append(h)
    return torch.stack(hidden)


@pytest.mark.parametrize(
    ("name", "cell"), [*((name, "lstm") for name in runnable()), ("reference", "tanh")]
)
@sizes
@given(
    window_size=st.integers(1, 12),
    top_k=st.sampled_from([0, 1, 2, 5, None]),
    retain=retains,
    p=st.sampled_from([0.0, 0.5, 1.0]),
    per_sample=st.booleans(),
)
def test_layer_is_the_definition(
    name: Any,
    cell: Any,
    window_size: int,
    top_k: int | None,
    retain: Any,
    p: float,
    per_sample: bool,
) -> None:
    x, h, c = (
        random(*s, seed=k).requires_grad_() for k, s in enumerate([(9, 2, 2), (2, 4), (2, 4)])
    )
    w, mask = layer(4 if cell == "lstm" else 1), random_mask(9, 2, p=p, seed=4)
    mask = mask if per_sample else mask[:, 0]
    options: dict[str, Any] = {"cell": cell, "retain": retain, "detach_mask": mask}
    output, _ = rel_lstm(
        x, (h, c), **w, window_size=window_size, top_k=top_k, backend=name, **options
    )
    by_sample = mask if per_sample else mask.unsqueeze(1).expand(9, 2)
    expected = [
        layer_by_hand(
            x[:, b], h[b], c[b], w, ByHand(window_size, top_k, retain), by_sample[:, b], cell
        )
        for b in range(2)
    ]
    assert_close(output, torch.stack(expected, 1))
    assert_same_gradients(output, torch.stack(expected, 1), [x, h, c, *w.values()])


def test_a_plain_cell_runs_on_the_reference_only() -> None:
    x, h, w = random(6, 1, 2, seed=0), random(1, 4, seed=1), layer(gates=1)
    _, state = rel_lstm(x, (h, h), **w, window_size=2, top_k=2, cell="tanh")
    assert torch.equal(state.c, h)
    for backend in ("cpu", "triton"):
        with pytest.raises(RuntimeError, match=r"cell='tanh' runs on backend 'reference' only"):
            rel_lstm(x, None, **w, window_size=2, top_k=2, cell="tanh", backend=backend)


def test_second_derivatives_of_the_reference() -> None:
    q, k, v = qkv(1, 1, 4, 2)
    run = lambda q: relevancy_attention(q, k, v, 2, 1, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (q,))
