"""Relevancy screening under torch.compile, torch.export and torch.library.opcheck."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.config
from torch import Tensor

from cases import random, runnable
from cases_relevancy import ATTENTION, LAYERS, Attention, Layer, attention_inputs, layer_inputs, ops
from closeness import assert_close
from throughtime import RelevancyAttention, RelevancyCache, RelLSTM, RelState

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch warns of its own compiler
    pytest.mark.skipif("cpu" not in runnable(), reason="the compiled kernels are not here"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", [ATTENTION[1], ATTENTION[4], ATTENTION[6]], ids=str)
def test_attention_operators(case: Attention) -> None:
    given = attention_inputs(case, torch.float32)
    tensors = [given.get(name) for name in ("query", "key", "value", "score_weight")]
    tensors = [None if x is None else x.detach() for x in tensors]
    rest = (given["lengths"], given["relevance"], given["retained"])
    sizes = (case.window_size, case.top_k, case.scale, case.keep_first)
    torch.library.opcheck(ops.relevancy_forward, (*tensors, *rest, *sizes))
    output, lse, last, _, _ = ops.relevancy_forward(*tensors, *rest, *sizes)
    saved = (given["lengths"], output, lse, last, given["retained"], case.window_size, case.scale)
    torch.library.opcheck(ops.relevancy_backward, (torch.ones_like(output), *tensors, *saved))


@pytest.mark.parametrize("case", [LAYERS[1], LAYERS[3], LAYERS[4]], ids=str)
def test_layer_operators(case: Layer) -> None:
    given = {
        n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in layer_inputs(case).items()
    }
    initial = [given[n] for n in ("input", "h_0", "c_0", "context_0")]
    initial += [given.get("memory"), given["relevance"]]
    weights = [given["weight_ih"], given["weight_hh"]]
    attention = [given[n] for n in ("weight_query", "weight_key", "weight_score")]
    sizes = (given["lengths"], None, given["retained"], case.window_size, case.top_k, False)
    args = (*initial, *weights, given["bias"], None, *attention, *sizes)
    torch.library.opcheck(ops.rel_lstm_forward, (*args, False))
    # Saved rows past a sample's end are never written, so their values cannot be compared.
    static = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.rel_lstm_forward, (*args, True), test_utils=static)
    *outputs, last, _, _, saved = ops.rel_lstm_forward(*args, True)
    grads = [torch.ones_like(x) for x in outputs]
    backward = (given["lengths"], given["mask"], last, saved, given["retained"], case.window_size)
    for wanted in ((True, True), (False, False)):
        torch.library.opcheck(
            ops.rel_lstm_backward,
            (*grads, given["input"], given["c_0"], *weights, *attention, *backward, *wanted),
        )


def test_layer_compiles_once_for_many_lengths() -> None:
    layer = RelLSTM(3, 4, num_layers=2, window_size=2, top_k=2, backend="cpu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def check(length: int) -> None:
        x = random(length, 2, 3, seed=length, dtype=torch.float32)
        (found, state), (expected, end) = compiled(x), layer(x)
        assert_close(found, expected)
        assert torch.equal(state.position, end.position)
        grads = [
            torch.autograd.grad(y.square().sum(), list(layer.parameters()))
            for y in (found, expected)
        ]
        for one, other in zip(*grads, strict=True):
            assert_close(one, other)

    check(8)
    check(11)  # from here on the length is symbolic
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (9, 30, 17):
            check(length)


def test_attention_compiles_once_for_many_lengths() -> None:
    attention = RelevancyAttention(8, 2, 3, 2, backend="cpu")
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")

    def check(length: int) -> None:
        x = random(2, length, 8, seed=length, dtype=torch.float32).requires_grad_()
        found, expected = compiled(x), attention(x)
        assert_close(found, expected)
        one, other = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
        assert_close(one, other)

    check(8)
    check(11)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (9, 30, 17):
            check(length)


def test_a_stream_of_a_layer_compiles_no_longer_once_its_memory_is_full() -> None:
    layer = RelLSTM(3, 4, num_layers=2, window_size=2, top_k=2, backend="cpu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    state: RelState | None = None
    expected: RelState | None = None

    def check(length: int) -> None:
        nonlocal state, expected
        x = random(length, 2, 3, seed=length, dtype=torch.float32)
        found, state = compiled(x, state)
        wanted, expected = layer(x, expected)
        state, expected = state.detach(), expected.detach()
        assert_close(found, wanted)
        assert torch.equal(state.position, expected.position)
        assert state.retained == expected.retained

    for length in (8, 11, 9, 7):
        check(length)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (30, 5, 17):
            check(length)


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_a_stream_of_queries_compiles_no_longer_once_its_cache_is_full(score: Any) -> None:
    attention = RelevancyAttention(8, 2, 3, 2, score=score, backend="cpu")

    def step(x: Tensor, cache: RelevancyCache) -> Tensor:
        return attention(x, cache=cache)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = random(2, 16, 8, seed=0, dtype=torch.float32)
    cache = RelevancyCache()
    with torch.no_grad():
        parts = [compiled(x[:, t : t + 1], cache) for t in range(8)]
        with torch._dynamo.config.patch(error_on_recompile=True):
            parts += [compiled(x[:, t : t + 1], cache) for t in range(8, 16)]
        assert_close(torch.cat(parts, 1), attention(x))
    assert cache.length is not None and cache.length.tolist() == [16, 16]


def test_export_keeps_the_operator_as_one_node() -> None:
    attention = RelevancyAttention(8, 2, 3, 2, backend="cpu").eval()
    x = torch.randn(2, 9, 8)
    with torch.no_grad():
        exported = torch.export.export(attention, (x,))
    assert "throughtime.relevancy_forward" in str(exported.graph)
    assert_close(exported.module()(x), attention(x))
