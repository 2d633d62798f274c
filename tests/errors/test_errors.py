"""Bad input: ``nn.LSTM``'s error where it has one, otherwise argument, wanted, got, way out.

``messages.txt`` lists the calls and their errors.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import throughtime
from throughtime import LSTM, RelevancyAttention, RelevancyCache, RelLSTM, functional, masks
from throughtime.functional import relevancy_attention, retained_positions

T, B = 6, 3
KINDS = {"RuntimeError": RuntimeError, "TypeError": TypeError, "ValueError": ValueError}
LINES = (Path(__file__).parent / "messages.txt").read_text(encoding="utf-8").splitlines()
CASES = [line.split(" => ") for line in LINES if line and not line.startswith("#")]
THEIRS = [case for case in CASES if case[1].startswith("as nn.LSTM")]
OURS = [case for case in CASES if not case[1].startswith("as nn.LSTM")]
zeros = torch.zeros


def packed(features: int = 4, dtype: torch.dtype = torch.float32) -> PackedSequence:
    return pack_sequence([zeros(3, features, dtype=dtype), zeros(1, features, dtype=dtype)])


def shuffled() -> PackedSequence:
    return pack_sequence([zeros(1, 4), zeros(3, 4)], enforce_sorted=False)


def good(function: Callable[..., object], **arguments: object) -> Callable[..., object]:
    """A call of which single arguments can be changed."""
    return lambda **changed: function(**arguments | changed)


def calling(layer_type: type[nn.Module], batch_first: bool = False) -> Callable[..., object]:
    def call(x: Any, hx: object = None, **options: object) -> object:
        layer = layer_type(4, 5, 2, batch_first=batch_first)
        return layer(x.transpose(0, 1) if batch_first and x.dim() > 2 else x, hx, **options)

    return call


def go_on(x: Tensor | None = None, **changed: object) -> object:
    """RelLSTM from a state that was changed; padded, and if that is refused packed."""
    layer, x = RelLSTM(3, 4, window_size=2, top_k=2), zeros(5, 2, 3) if x is None else x
    state = dataclasses.replace(layer(zeros(5, 2, 3))[1], **changed)
    try:
        return layer(x, state)
    except (RuntimeError, TypeError, ValueError) as error:
        with pytest.raises(type(error)):
            layer(pack_sequence(list(x.unbind(1)), enforce_sorted=False), state)
        raise


def cache(**changed: object) -> RelevancyCache:
    made = RelevancyCache()
    relevancy_attention(Q, Q, Q, 2, 2, cache=made)
    return dataclasses.replace(made, **changed)


def last() -> Tensor:
    q, k, v = torch.randn(3, 1, 1, 9, 2).unbind(0)
    return relevancy_attention(q, k, v, 2, 3, return_retained=True)[1]


Q = zeros(2, 3, 5, 4)
W = (zeros(20, 4), zeros(20, 5), zeros(20), zeros(20), None)
GOOD = {
    "lstm": good(functional.lstm, input=zeros(T, B, 4), hx=(zeros(B, 5), zeros(B, 5)),
                 weight_ih=W[0], weight_hh=W[1], bias_ih=W[2], bias_hh=W[3]),
    "both": good(functional.bidirectional_lstm, input=zeros(T, B, 4), hx=None, weights=(W, W)),
    "rel": good(functional.rel_lstm, input=zeros(5, 2, 3), hx=None, weight_ih=zeros(16, 3),
                weight_hh=zeros(16, 4), bias_ih=zeros(16), bias_hh=None, weight_query=zeros(5, 4),
                weight_key=zeros(5, 4), weight_score=zeros(5), window_size=2, top_k=2),
    "attend": good(relevancy_attention, query=Q, key=Q, value=Q, window_size=2, top_k=2),
    "pack": good(functional.relevancy_attention_varlen, query=Q[0], key=Q[0], value=Q[0],
                 cu_seqlens=torch.tensor([0, 2, 3]), window_size=2, top_k=2),
    "go_on": go_on,
}  # fmt: skip
NAMES = vars(throughtime) | vars(functional) | globals() | GOOD
NAMES |= {
    "x": zeros(T, B, 4),
    "call": calling(LSTM),
    "first": calling(LSTM, True),
    "nan": math.nan,
    "inf": math.inf,
}
NAMES["int64"] = lambda *numbers: torch.tensor(numbers, dtype=torch.int64)


def error_of(function: Callable[[], object]) -> tuple[type[BaseException], str]:
    """Type and words of the error, to be compared with those of another."""
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        function()
    return caught.type, str(caught.value)


@pytest.mark.parametrize("name", GOOD)
def test_the_good_calls_are_good(name: str, backend: str) -> None:
    with throughtime.backend(backend):  # type: ignore[arg-type]
        GOOD[name]()


@pytest.mark.parametrize("grad", [True, False])  # there is a short way without
@pytest.mark.parametrize(("call", "error"), OURS, ids=[call for call, _ in OURS])
def test_error(call: str, error: str, backend: str, grad: bool) -> None:
    kind, words = error.split(": ", 1)
    end = "$" if words.endswith("$") else ""
    match = ".*".join(re.escape(part) for part in words.removesuffix("$").split(" ... ")) + end
    inputs = (zeros(T, B, 4), packed(), zeros(T, 4)) if "any_input" in call else (None,)
    for x in inputs:
        with (
            torch.set_grad_enabled(grad),
            throughtime.backend(backend),  # type: ignore[arg-type]
            pytest.raises(KINDS[kind], match=match),
        ):
            eval(call, NAMES | {"any_input": x})


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("call", "since"), THEIRS, ids=[call for call, _ in THEIRS])
def test_error_of_theirs(call: str, since: str, batch_first: bool, grad: bool) -> None:
    if since.endswith("2.11") and torch.__version__ < (2, 11):
        pytest.skip("nn.LSTM of torch 2.10 has other words")
    with torch.set_grad_enabled(grad):
        theirs, ours = (
            error_of(lambda names=names: eval(call, NAMES | names))
            for names in (
                {"LSTM": kind, "call": calling(kind, batch_first)} for kind in (nn.LSTM, LSTM)
            )
        )
    assert ours == theirs


@pytest.mark.parametrize("layer_type", [LSTM, RelLSTM])
def test_dropout_with_one_layer_warns_as_theirs_does(layer_type: type[nn.Module]) -> None:
    with pytest.warns(UserWarning, match="dropout option adds") as theirs:
        nn.LSTM(4, 5, dropout=0.5)
    with pytest.warns(UserWarning, match="dropout option adds") as ours:
        layer_type(4, 5, dropout=0.5)
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]
    if layer_type is RelLSTM:
        assert ours[0].filename == __file__, "the warning points at the caller"


@pytest.mark.parametrize("p", [0.5, np.float32(0.5), np.float64(0.5), np.int64(1), Fraction(1, 2)])
def test_numbers_that_are_probabilities(p: float) -> None:
    """What nn.LSTM takes for dropout is taken for detach_prob and RelLSTM too."""
    assert nn.LSTM(4, 5, 2, dropout=p).dropout == LSTM(4, 5, 2, dropout=p).dropout == float(p)
    for layer in (LSTM(4, 5, detach_prob=p), RelLSTM(4, 5, 2, dropout=p, detach_prob=p)):
        assert type(layer.detach_prob) is float and layer.detach_prob == float(p)
    assert layer.dropout == float(p) and masks.detach_mask(3, p).shape == (3,)


@pytest.mark.parametrize(
    "p", [-0.1, 1.1, float("nan"), "0.5", None, True, np.bool_(True), np.array(0.5), 1j]
)
def test_probabilities(p: object) -> None:
    message = re.escape(f"should be a number in range [0, 1], got {p!r}")
    lstm = LSTM(4, 5)
    for attempt in (
        lambda: LSTM(4, 5, detach_prob=p),
        lambda: setattr(lstm, "detach_prob", p),
        lambda: masks.detach_mask(3, p),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert lstm.detach_prob == 0.0


DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float64, torch.float8_e4m3fn, torch.half)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("argument", ["input", "hx", "weight"])
@pytest.mark.parametrize("layer_type", [LSTM, RelLSTM])
def test_autocast_casts_what_theirs_does(
    layer_type: type[nn.Module], argument: str, dtype: torch.dtype
) -> None:
    """No integer, bool, complex or double is cast in silence: a RuntimeError, as nn.LSTM's."""
    arguments = {"input": zeros(T, B, 4), "hx": zeros(1, B, 5), "weight": zeros(20, 5)}
    arguments[argument] = arguments[argument].to(dtype)

    def run(layer: nn.Module) -> object:
        layer.weight_hh_l0 = nn.Parameter(arguments["weight"], requires_grad=False)
        with torch.autocast("cpu", torch.bfloat16):
            return layer(arguments["input"], (arguments["hx"], arguments["hx"]))

    if dtype == torch.half:
        run(layer_type(4, 5))
        return
    if dtype != torch.float8_e4m3fn:
        assert error_of(lambda: run(nn.LSTM(4, 5)))[0] is RuntimeError
    kind, words = error_of(lambda: run(layer_type(4, 5)))
    assert kind is RuntimeError and str(dtype) in words and words.count(":")


def test_attention_under_autocast() -> None:
    attention = RelevancyAttention(8, 2, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(zeros(2, 3, 8).bfloat16()).dtype == torch.bfloat16
        for x in (zeros(2, 3, 8).double(), zeros(2, 3, 8).long()):
            with pytest.raises(ValueError, match=r"the weights' dtype torch\.float32"):
                attention(x)


def test_what_is_no_error() -> None:
    states = [zeros(1, B, 5), zeros(1, B, 5)]
    assert LSTM(4, 5)(zeros(T, B, 4), states)[0].shape == (T, B, 5)
    assert retained_positions(last()[..., :0], 2, 3).shape == (1, 1, 0, 0)
    assert retained_positions(last()[:0], 2, 3).shape == (0, 1, 9, 3)
    scaled = [relevancy_attention(Q + 1, Q, Q, 2, 2, scale=s) for s in (np.float32(0.5), 0.5)]
    assert torch.equal(*scaled)


def test_a_refused_call_leaves_the_cache_as_it_was() -> None:
    kept = cache()
    before = vars(kept).copy()
    with pytest.raises(ValueError, match="cache was begun with"):
        relevancy_attention(Q, Q, Q, 3, 2, cache=kept)
    with pytest.raises(RuntimeError, match="cannot run this relevancy_attention"):
        relevancy_attention(Q, Q, Q, 2, 2, cache=kept, backend="cuda")
    assert all(value is before[name] for name, value in vars(kept).items())


def test_states_are_equal_to_themselves_only() -> None:
    """Comparing fields would ask tensors for a truth value that they do not have."""
    _, one = RelLSTM(3, 4)(zeros(5, 2, 3))
    caches = [cache(), cache()]
    assert caches.index(caches[1]) == 1 and len({one, one.detach()}) == 2
