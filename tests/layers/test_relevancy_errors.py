"""Relevancy screening refuses what does not fit, by name, before a kernel sees it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from throughtime import RelevancyAttention, RelevancyCache, RelLSTM
from throughtime.functional import relevancy_attention, retained_positions


def small() -> RelLSTM:
    return RelLSTM(3, 4, window_size=2, top_k=2)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_a_packed_input_checks_the_batch_of_its_state(batch: int, enforce_sorted: bool) -> None:
    """Sorting a state that is too large would take some of its rows, and say nothing."""
    packed = pack_sequence([torch.zeros(3, 3), torch.zeros(2, 3)], enforce_sorted=enforce_sorted)
    layer = small()
    zeros = torch.zeros(1, batch, 4)
    _, state = layer(torch.zeros(5, batch, 3))
    for name, hx in (("hidden[0]", (zeros, zeros)), ("hx.h", state)):
        with pytest.raises(RuntimeError) as error:
            layer(packed, hx)
        assert str(error.value) == f"Expected {name} size (1, 2, 4), got [1, {batch}, 4]"


@pytest.mark.parametrize(
    ("hx", "got"),
    [
        ((1, 2), "a pair of int and int"),
        ([None, None], "a pair of NoneType and NoneType"),
        ((torch.zeros(1, 2, 4), None), "a pair of Tensor and NoneType"),
        ((1, 2, 3), "a tuple of 3"),
        (torch.zeros(1, 2, 4), "Tensor"),
        ({}, "dict"),
    ],
)
@pytest.mark.parametrize("form", ["padded", "unbatched", "packed"])
def test_states_of_another_kind(form: str, hx: Any, got: str) -> None:
    inputs = {
        "padded": torch.zeros(5, 2, 3),
        "unbatched": torch.zeros(5, 3),
        "packed": pack_sequence([torch.zeros(2, 3), torch.zeros(3, 3)], enforce_sorted=False),
    }
    with pytest.raises(RuntimeError if got.endswith("3") else TypeError) as error:
        small()(inputs[form], hx)
    assert str(error.value).endswith(f"a pair (h_0, c_0) of tensors or None, got {got}")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"length": torch.zeros(3, dtype=torch.int64)},
            RuntimeError,
            "Expected hx.length size (2,), got [3]",
        ),
        (
            {"relevance": torch.zeros(1, 3, 2, dtype=torch.float64)},
            ValueError,
            "hx.relevance should have dtype torch.float32 for an input of torch.float32, got",
        ),
        (
            {"relevance": torch.zeros(1, 2, 2)},
            RuntimeError,
            "Expected hx.relevance size (1, 3, 2), got [1, 2, 2]",
        ),
        ({"memory": 0.0}, TypeError, "hx.memory should be a Tensor, got float"),
        ({"length": None}, TypeError, "hx.length should be a Tensor, got NoneType"),
        (
            {"memory": torch.zeros(2, 3, 2, 4)},
            RuntimeError,
            "Expected hx.memory size (1, 3, 2, 4), got [2, 3, 2, 4]",
        ),
        (
            {"position": torch.zeros(1, 3, 2)},
            ValueError,
            "hx.position should have dtype torch.int64 for an input of torch.float32, got torch.f",
        ),
        (
            {"position": torch.full((1, 3, 2), -2)},
            ValueError,
            "hx.position should hold numbers from -1, got -2; begin anew with hx=(hx.h, hx.c)",
        ),
        (
            {"relevance": torch.full((1, 3, 2), torch.nan)},
            ValueError,
            "hx.relevance should hold numbers from -1, got nan; begin anew",
        ),
        (
            {"length": torch.tensor([5, -1])},
            ValueError,
            "hx.length should hold numbers from 0, got -1",
        ),
        (
            {"retained": -1},
            ValueError,
            "hx.retained should be an int from 0 to its 3 slots, got -1",
        ),
        (
            {"retained": 1.0},
            ValueError,
            "hx.retained should be an int from 0 to its 3 slots, got 1",
        ),
        ({"retained": 4}, ValueError, "hx.retained should be an int from 0 to its 3 slots, got 4"),
        (
            {"position": torch.zeros(1, 3, 2, dtype=torch.int64, device="meta")},
            RuntimeError,
            "hx.position should be on the input's device cpu, got meta; move it: hx.position.to('c",
        ),
    ],
)
def test_a_state_that_was_changed(
    backend: str, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    layer, x = small(), torch.zeros(5, 2, 3)
    layer.backend = backend  # type: ignore[assignment]
    _, state = layer(x)
    with pytest.raises(kind) as error:
        layer(x, dataclasses.replace(state, **change))
    assert message in str(error.value)
    packed = pack_sequence([x[:, 0], x[:, 1]], enforce_sorted=False)
    with pytest.raises(kind):
        layer(packed, dataclasses.replace(state, **change))


CACHE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"value": None}, ValueError, "cache holds no value; begin a new sequence with a new Relevan"),
    ({"key": None, "length": None}, ValueError, "cache holds no key and no length; begin a new"),
    ({"position": [0]}, TypeError, "cache.position should be a Tensor, got list"),
    (
        {"position": torch.zeros(1, 1, 3)},
        ValueError,
        "cache.position should have dtype torch.int64",
    ),
    (
        {"position": torch.zeros(1, 1, 2, dtype=torch.int64)},
        RuntimeError,
        "Expected cache.position size (1, 1, 3), got [1, 1, 2]",
    ),
    (
        {"value": torch.zeros(1, 1, 2, 2)},
        RuntimeError,
        "Expected cache.value size (1, 1, 3, 2), got [1, 1, 2, 2]",
    ),
    (
        {"position": torch.full((1, 1, 3), -7)},
        ValueError,
        "cache.position should hold numbers from",
    ),
    (
        {"relevance": torch.full((1, 1, 3), torch.nan)},
        ValueError,
        "cache.relevance should hold numbers from -1, got nan; begin a new sequence",
    ),
    (
        {"relevance": torch.zeros(1, 1, 3, dtype=torch.float64)},
        ValueError,
        "cache.relevance should have dtype torch.float32",
    ),
    ({"length": torch.tensor([-5])}, ValueError, "cache.length should hold numbers from 0, got -5"),
    (
        {"length": torch.zeros(2, dtype=torch.int64)},
        RuntimeError,
        "Expected cache.length size (1,)",
    ),
    ({"retained": 1.5}, ValueError, "cache.retained should be an int from 0 to its 3 slots, got"),
    ({"retained": 3}, ValueError, "cache holds 3 retained keys and 0 of the window, more than top"),
]


@pytest.mark.parametrize(("change", "kind", "message"), CACHE_ERRORS)
def test_a_cache_that_was_changed(
    backend: str, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    q, cache = torch.randn(1, 1, 5, 2), RelevancyCache()
    relevancy_attention(q, q, q, 2, 2, cache=cache, backend=backend)  # type: ignore[call-overload]
    with pytest.raises(kind) as error:
        relevancy_attention(
            q, q, q, 2, 2, cache=dataclasses.replace(cache, **change), backend=backend
        )  # type: ignore[call-overload]
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"scale": float("nan")}, ValueError, "scale should be finite, got nan; 1 / sqrt(D) is"),
        ({"scale": -float("inf")}, ValueError, "scale should be finite, got -inf"),
        ({"scale": "1"}, TypeError, "scale should be a number or None, got str"),
        ({"scale": True}, TypeError, "scale should be a number or None, got bool"),
        ({"return_retained": "no"}, TypeError, "return_retained should be of type bool, got: str"),
    ],
)
def test_scale_and_flags(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    q = torch.randn(1, 1, 5, 2)
    with pytest.raises(kind) as error:
        relevancy_attention(q, q, q, 2, 2, **options)
    assert message in str(error.value)
    with_numpy = relevancy_attention(q, q, q, 2, 2, scale=np.float32(0.5))
    assert torch.equal(with_numpy, relevancy_attention(q, q, q, 2, 2, scale=0.5))


def test_dropout_without_a_second_layer_warns_in_the_words_of_lstm() -> None:
    words = "dropout option adds dropout after all but last recurrent layer"
    with pytest.warns(UserWarning, match=words) as expected:
        nn.LSTM(3, 4, dropout=0.5)
    with pytest.warns(UserWarning, match=words) as found:
        RelLSTM(3, 4, dropout=0.5)
    assert [str(w.message) for w in found] == [str(w.message) for w in expected]
    assert found[0].filename == __file__, "the warning points at the caller"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "yes"}, "bias should be of type bool, got: str"),
        ({"batch_first": 1}, "batch_first should be of type bool, got: int"),
        ({"embed_dim": 8.0}, "embed_dim should be of type int, got float"),
        ({"num_heads": True}, "num_heads should be of type int, got bool"),
        ({"top_k": None}, "top_k should be of type int, got NoneType"),
    ],
)
def test_attention_options(options: dict[str, Any], message: str) -> None:
    sizes = {"embed_dim": 8, "num_heads": 2, "window_size": 2, "top_k": 2}
    with pytest.raises(TypeError) as error:
        RelevancyAttention(**{**sizes, **options})
    assert str(error.value) == f"RelevancyAttention: {message}"


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_inputs(autocast: bool) -> None:
    attention = RelevancyAttention(8, 2, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with pytest.raises(TypeError, match="input should be a Tensor, got list"):
            attention([1.0])
        for dtype in (torch.float64, torch.int64):
            with pytest.raises(ValueError, match=r"the weights' dtype torch\.float32") as error:
                attention(torch.zeros(2, 3, 8, dtype=dtype))
            assert str(error.value).endswith(f"got {dtype}; convert it: input.to(torch.float32)")
        half = torch.zeros(2, 3, 8, dtype=torch.bfloat16)
        if autocast:
            assert attention(half).dtype == torch.bfloat16
        else:
            with pytest.raises(ValueError, match=r"got torch\.bfloat16; convert it"):
                attention(half)


def test_retained_positions_of_another_call() -> None:
    q, k, v = torch.randn(3, 1, 1, 9, 2).unbind(0)
    _, last = relevancy_attention(q, k, v, 2, 3, return_retained=True)
    for sizes in ((2, 1), (1, 3)):
        with pytest.raises(ValueError, match=r"top_k should be [34] or more.*as in the call that"):
            retained_positions(last, *sizes)
    with pytest.raises(ValueError, match=r"last should have shape \[..., T\], got \[\]"):
        retained_positions(torch.tensor(3), 2, 3)
    with pytest.raises(ValueError, match=r"from -1 to T - 1 = 8, got values from -2 to 9"):
        retained_positions(torch.tensor([-2, *[9] * 8]), 2, 3)
    assert retained_positions(last[..., :0], 2, 3).shape == (1, 1, 0, 0)
    assert retained_positions(last[:0], 2, 3).shape == (0, 1, 9, 3)


def test_a_refused_call_leaves_the_cache_as_it_was() -> None:
    q = torch.randn(1, 1, 5, 2)
    cache = RelevancyCache()
    relevancy_attention(q, q, q, 2, 2, cache=cache)
    before = vars(cache).copy()
    with pytest.raises(ValueError, match="cache was begun with"):
        relevancy_attention(q, q, q, 3, 2, cache=cache)
    with pytest.raises(RuntimeError, match="cannot run this relevancy_attention"):
        relevancy_attention(q, q, q, 2, 2, cache=cache, backend="cuda")
    assert all(value is before[name] for name, value in vars(cache).items())


def test_states_are_equal_to_themselves_only() -> None:
    """Comparing fields would ask tensors for a truth value that they do not have."""
    layer, q = small(), torch.zeros(1, 1, 5, 2)
    _, one = layer(torch.zeros(5, 2, 3))
    caches = [RelevancyCache(), RelevancyCache()]
    for cache in caches:
        relevancy_attention(q, q, q, 2, 2, cache=cache)
    assert caches.index(caches[1]) == 1 and len({one, one.detach()}) == 2
