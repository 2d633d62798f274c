"""Small calls go straight to the operator, with the bits and the errors of the long way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import throughtime
from cases import SMALL, Shape, options_for, random, results, tensors
from throughtime import LSTM, LSTMCell, functional
from throughtime.functional import thin

pytestmark = pytest.mark.usefixtures("poison")

SHAPES = (SMALL, Shape(5, 3, 4, 6, 2))


@pytest.fixture(autouse=True)
def kernels() -> None:
    if throughtime._ext.extension is None:
        pytest.skip("the CPU kernels are not there")


def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the thin way gave a result, for each call from now on."""
    found: list[bool] = []
    run = thin.run

    def watched(*args: Any, **options: Any) -> Any:
        results = run(*args, **options)
        found.append(results is not None)
        return results

    monkeypatch.setattr(thin, "run", watched)
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_the_long_way(
    monkeypatch: pytest.MonkeyPatch, shape: Shape, recompute: bool
) -> None:
    for name, options in options_for(shape).items():
        named = tensors(shape, torch.float64)
        went = taken(monkeypatch)
        short = results(functional.lstm, named, recompute=recompute, **options)
        assert went == ([True] if options.get("lengths") is None else []), name
        with monkeypatch.context() as patch:
            patch.setattr(thin, "applies", lambda input, backend: False)
            long = results(functional.lstm, named, recompute=recompute, **options)
        assert all(torch.equal(short[key], long[key]) for key in long), name


def test_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    went = taken(monkeypatch)
    for lstm in (LSTM(3, 5, 2, detach_prob=0.5), LSTM(3, 5, proj_size=2), LSTMCell(3, 5)):
        x = random(4, 3, seed=0) if isinstance(lstm, LSTMCell) else random(6, 4, 3, seed=0)
        lstm.double()
        torch.manual_seed(0)
        short = lstm(x)
        assert went and all(went)
        went.clear()
        with monkeypatch.context() as patch:
            patch.setattr(thin, "applies", lambda input, backend: False)
            torch.manual_seed(0)
            long = lstm(x)
        weights = list(lstm.parameters())
        for one, other in zip((short[0], short[1][0]), (long[0], long[1][0]), strict=True):
            assert torch.equal(one, other)
            grads = [torch.autograd.grad(y.sum(), weights, retain_graph=True) for y in (one, other)]
            assert all(map(torch.equal, *grads))


WRONG: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a state of three": lambda given: {"hx": (*given["hx"], given["hx"][0])},
    "a state of another batch": lambda given: {"hx": tuple(x[:1] for x in given["hx"])},
    "no tensor": lambda given: {"weight_hh": None},
    "one dimension": lambda given: {"weight_hh": given["weight_hh"][0]},
    "another dtype": lambda given: {"bias_ih": given["bias_ih"].double()},
    "an input of two": lambda given: {"input": given["input"][0]},
    "no steps": lambda given: {"input": given["input"][:0]},
    "a mask of numbers": lambda given: {"detach_mask": torch.zeros(5)},
    "a mask of other steps": lambda given: {"detach_mask": torch.zeros(4, dtype=torch.bool)},
    "a mask that is none": lambda given: {"detach_mask": [True] * 5},
    "a reset without samples": lambda given: {"reset": torch.zeros(5, dtype=torch.bool)},
}


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("wrong", WRONG)
def test_errors_have_the_words_of_the_long_way(
    monkeypatch: pytest.MonkeyPatch, wrong: str, gradient: bool
) -> None:
    lstm = nn.LSTM(3, 4)
    weights = {name.removesuffix("_l0"): x for name, x in lstm.named_parameters()}
    hx = torch.zeros(2, 4), torch.zeros(2, 4)
    given: dict[str, Any] = {"input": torch.zeros(5, 2, 3), "hx": hx, **weights}
    given |= WRONG[wrong](given)
    words = []
    with torch.set_grad_enabled(gradient):
        for applies in (thin.applies, lambda input, backend: False):
            monkeypatch.setattr(thin, "applies", applies)
            with pytest.raises(Exception) as error:  # noqa: PT011
                functional.lstm(**given)
            words.append((type(error.value), str(error.value)))
    assert words[0] == words[1]


def test_what_must_see_every_call_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    went = taken(monkeypatch)
    lstm, x = LSTM(3, 4), torch.randn(5, 2, 3)
    with throughtime.gradient_flow(lstm) as flow:
        lstm(x)[0].sum().backward()
    assert not went and flow.layers
    with caplog.at_level(logging.DEBUG, "throughtime"):
        lstm(x)
    with throughtime.backend("reference"):
        lstm(x)
    with torch.autocast("cpu", torch.bfloat16):
        lstm(x)
    with torch.autograd.forward_ad.dual_level():
        lstm(x)
    assert not went
    lstm(x)
    assert went == [True]
