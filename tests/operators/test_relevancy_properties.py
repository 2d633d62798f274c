"""Properties of relevancy screening: ragged chunks, permutations, memory layout, NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import random, runnable
from closeness import assert_close
from throughtime import RelevancyCache, RelLSTM, RelState
from throughtime.functional import rel_lstm, relevancy_attention

sizes = settings(max_examples=15, deadline=None, derandomize=True)
# Per chunk the lengths of two samples; the chunk is as long as the longer of the two, and one more.
chunks = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4)
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
NAMES += ("weight_query", "weight_key", "weight_score")


def garbage(*shape: int) -> Tensor:
    """Padding: it must not be read."""
    return torch.full(shape, 1e3, dtype=torch.float64)


@pytest.mark.parametrize("name", runnable())
@sizes
@given(
    lengths=chunks,
    window_size=st.integers(1, 5),
    top_k=st.integers(0, 4),
    score=st.sampled_from(["dot", "additive"]),
    retain=st.sampled_from(["relevant", "first"]),
)
def test_ragged_chunks_of_attention_equal_one_call(
    name: str,
    lengths: list[tuple[int, int]],
    window_size: int,
    top_k: int,
    score: Any,
    retain: Any,
) -> None:
    """Every sample advances at its own pace; the cache ends with the same keys."""
    total = torch.tensor(lengths).sum(0)
    steps = max(1, int(total.max()))
    rows = [random(2, 2, steps, 3, seed=s) for s in range(3)]
    options: dict[str, Any] = {"score": score, "retain": retain, "backend": name}
    if score == "additive":
        options["score_weight"] = random(2, 3, seed=5)
    end = RelevancyCache()
    whole = relevancy_attention(*rows, window_size, top_k, lengths=total, cache=end, **options)

    cache, at, found = RelevancyCache(), [0, 0], torch.zeros_like(whole)
    for pair in lengths:
        now = [garbage(2, 2, max(pair) + 1, 3) for _ in rows]
        for b, count in enumerate(pair):
            for chunk, x in zip(now, rows, strict=True):
                chunk[b, :, :count] = x[b, :, at[b] : at[b] + count]
        each = torch.tensor(pair)
        part = relevancy_attention(*now, window_size, top_k, lengths=each, cache=cache, **options)
        for b, count in enumerate(pair):
            assert not part[b, :, count:].any(), "zero past the end"
            found[b, :, at[b] : at[b] + count] = part[b, :, :count]
            at[b] += count
    assert_close(found, whole)
    assert cache.position is not None and end.position is not None
    assert cache.length is not None and torch.equal(cache.length, total)
    for b in range(2):
        for head in range(2):
            held, wanted = cache.position[b, head], end.position[b, head]
            assert held[held >= 0].tolist() == wanted[wanted >= 0].tolist()


@pytest.mark.parametrize("name", runnable())
@sizes
@given(
    lengths=chunks,
    window_size=st.integers(1, 5),
    top_k=st.one_of(st.none(), st.integers(0, 4)),
    retain=st.sampled_from(["relevant", "first"]),
)
def test_ragged_chunks_of_a_layer_equal_one_call(
    name: str, lengths: list[tuple[int, int]], window_size: int, top_k: int | None, retain: Any
) -> None:
    torch.manual_seed(1)
    layer = RelLSTM(2, 4, dtype=torch.float64)
    options: dict[str, Any] = {n: getattr(layer, f"{n}_l0").detach() for n in NAMES}
    options |= {"window_size": window_size, "top_k": top_k, "retain": retain, "backend": name}
    total = torch.tensor(lengths).sum(0)
    x = random(max(1, int(total.max())), 2, 2, seed=0)
    whole, end = rel_lstm(x, None, lengths=total, **options)

    state: RelState | None = None
    at, found = [0, 0], torch.zeros_like(whole)
    for pair in lengths:
        now = garbage(max(pair) + 1, 2, 2)
        for b, count in enumerate(pair):
            now[:count, b] = x[at[b] : at[b] + count, b]
        part, state = rel_lstm(now, state, lengths=torch.tensor(pair), **options)
        for b, count in enumerate(pair):
            assert not part[count:, b].any(), "zero past the end"
            found[at[b] : at[b] + count, b] = part[:count, b]
            at[b] += count
    assert state is not None
    assert_close(found, whole)
    for part_name in ("h", "c", "context"):
        assert_close(getattr(state, part_name), getattr(end, part_name), part_name)
    assert torch.equal(state.length, total)
    for b in range(2):
        held, wanted = state.position[:, b], end.position[:, b]
        assert held[held >= 0].tolist() == wanted[wanted >= 0].tolist()


@pytest.mark.parametrize("name", runnable())
@sizes
@given(length=st.integers(1, 12), extra=st.integers(0, 3), top_k=st.integers(0, 4))
def test_a_layer_that_forgets_nothing(name: str, length: int, extra: int, top_k: int) -> None:
    """A window, a retained set, or both, as long as the sequence: all are full attention."""
    torch.manual_seed(1)
    x = random(length, 2, 2, seed=0)
    layer = RelLSTM(2, 4, window_size=2, top_k=None, dtype=torch.float64, backend=name)  # type: ignore[arg-type]
    full, _ = layer(x)
    for layer.window_size, layer.top_k in ((length + extra, top_k), (1, length), (3, length)):
        assert_close(layer(x)[0], full)


@pytest.mark.parametrize("name", runnable())
@sizes
@given(order=st.permutations(range(4)), window_size=st.integers(1, 4), top_k=st.integers(0, 4))
def test_permuting_the_batch_permutes_a_layer(
    name: str, order: list[int], window_size: int, top_k: int
) -> None:
    torch.manual_seed(1)
    layer = RelLSTM(
        2,
        4,
        window_size=window_size,
        top_k=top_k,
        dtype=torch.float64,
        backend=name,  # type: ignore[arg-type]
    )
    x = random(12, 4, 2, seed=0)
    (output, state), (permuted, other) = layer(x), layer(x[:, order])
    assert_close(permuted, output[:, order])
    assert torch.equal(other.position, state.position[:, :, order])


@pytest.mark.parametrize("name", runnable())
@sizes
@given(
    length=st.integers(1, 30),
    window_size=st.integers(1, 6),
    top_k=st.integers(0, 5),
    kinds=st.integers(1, 4),
)
def test_output_is_masked_attention_over_the_reported_keys(
    name: str, length: int, window_size: int, top_k: int, kinds: int
) -> None:
    """Whatever was chosen, ties included: ``last`` tells all of it, and no more keys than allowed.

    The keys are copies of a few, so that many are equally relevant.
    """
    q, v = random(2, 2, length, 3, seed=0), random(2, 2, length, 3, seed=1)
    k = random(2, 2, kinds, 3, seed=2)[:, :, torch.arange(length) % kinds]
    output, last = relevancy_attention(
        q,
        k,
        v,
        window_size,
        top_k,
        return_retained=True,
        backend=name,  # type: ignore[arg-type]
    )
    i, j = torch.arange(length).unsqueeze(1), torch.arange(length)
    allowed = (j <= i) & (i <= last.unsqueeze(2))
    assert (allowed.sum(-1) <= window_size + top_k).all()
    assert (allowed | (j > i) | (j <= i - window_size)).all(), "the window is always attended"
    scores = (q @ k.transpose(2, 3)) * 3**-0.5
    assert_close(output, scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v)


def test_nan_stays_in_its_sample_and_head(backend: Any) -> None:
    q, k, v = (random(2, 2, 12, 3, seed=s) for s in range(3))
    clean = relevancy_attention(q, k, v, 3, 2, backend=backend)
    k[0, 1, 4] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    output = relevancy_attention(*leaves, 3, 2, backend=backend)
    others = torch.tensor([[True, False], [True, True]])
    assert torch.equal(output[others], clean[others])
    assert output[0, 1, 4].isnan().all() and torch.equal(output[0, 1, :4], clean[0, 1, :4])
    for grad in torch.autograd.grad(output.sum(), leaves):
        assert grad[others].isfinite().all()

    layer = RelLSTM(2, 4, window_size=2, top_k=2, dtype=torch.float64, backend=backend)
    x = random(9, 3, 2, seed=0)
    clean, before = layer(x)
    x[3, 1] = torch.nan
    output, state = layer(x)
    assert torch.equal(output[:, [0, 2]], clean[:, [0, 2]])
    assert torch.equal(state.memory[:, :, [0, 2]], before.memory[:, :, [0, 2]])
    assert torch.equal(output[:3, 1], clean[:3, 1]) and output[3:, 1].isnan().all()


def test_a_layer_takes_any_strides(backend: Any) -> None:
    layer = RelLSTM(3, 4, window_size=2, top_k=2, dtype=torch.float64, backend=backend)
    states = random(1, 1, 4, seed=1).expand(1, 2, 4), random(1, 2, 8, seed=2)[..., 1::2]
    dense = [x.contiguous() for x in states]
    inputs = {
        "transposed": random(2, 9, 3, seed=3).transpose(0, 1),
        "sliced": random(18, 2, 6, seed=4)[1::2, :, ::2],
        "expanded": random(9, 1, 3, seed=5).expand(9, 2, 3),
    }
    grad = random(2, 9, 4, seed=6).transpose(0, 1)
    for name, x in inputs.items():
        leaves = [x.detach().requires_grad_(), x.contiguous().requires_grad_()]
        (found, end), (expected, other) = (
            layer(leaf, tuple(hx)) for leaf, hx in zip(leaves, (states, dense), strict=True)
        )
        assert_close(found, expected, name)
        assert_close(end.memory, other.memory, name)
        one, two = (
            torch.autograd.grad(y, leaf, g)[0]
            for y, leaf, g in zip((found, expected), leaves, (grad, grad.contiguous()), strict=True)
        )
        assert_close(one, two, name)
    swapped = {
        n: (w.t().contiguous().t() if w.dim() == 2 else torch.stack([w, w], 1)[:, 0])
        for n, w in ((n, getattr(layer, f"{n}_l0").detach()) for n in NAMES)
    }
    assert not any(w.is_contiguous() for n, w in swapped.items())
    x = inputs["sliced"]
    found, _ = rel_lstm(x, None, **swapped, window_size=2, top_k=2, backend=backend)
    assert_close(found, layer(x)[0])
