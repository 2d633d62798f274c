"""``throughtime.init`` and ``LSTM(forget_bias=...)``."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import throughtime
from throughtime.init import chrono_, forget_bias_

LAYERS: dict[str, Callable[..., Any]] = {
    "LSTM": throughtime.LSTM,
    "LSTMCell": throughtime.LSTMCell,
    "RelLSTM": throughtime.RelLSTM,
    "nn.LSTM": nn.LSTM,
    "nn.LSTMCell": nn.LSTMCell,
    "stacked": lambda i, h, **o: throughtime.LSTM(i, h, 2, bidirectional=True, **o),
}


def gates(layer: nn.Module, which: str) -> list[list[torch.Tensor]]:
    """The four gates of every bias of a kind."""
    named = layer.named_parameters()
    return [list(value.detach().chunk(4)) for key, value in named if key.startswith(which)]


@pytest.mark.parametrize("kind", LAYERS)
def test_forget_bias_sets_the_sum_of_both_and_nothing_else(kind: str) -> None:
    layer = LAYERS[kind](3, 5)
    before = copy.deepcopy(layer)
    assert forget_bias_(layer, 1.5) is layer
    counts = {"stacked": 4}.get(kind, 1)
    for which, value in (("bias_ih", 1.5), ("bias_hh", 0.0)):
        now, old = gates(layer, which), gates(before, which)
        assert len(now) == counts
        for i, (one, other) in enumerate(zip(now, old, strict=True)):
            assert (one[1] == value).all(), i
            assert all(torch.equal(one[k], other[k]) for k in (0, 2, 3))
    for (name, new), (_, old_weight) in zip(
        layer.named_parameters(), before.named_parameters(), strict=True
    ):
        assert new.requires_grad and (name.startswith("bias") or torch.equal(new, old_weight))


@pytest.mark.parametrize("kind", LAYERS)
def test_chrono_spreads_the_memory_evenly(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind](3, 4000)
    before = copy.deepcopy(layer)
    assert chrono_(layer, 100) is layer
    for ih, hh, old_ih, old_hh in zip(
        *(gates(x, which) for x in (layer, before) for which in ("bias_ih", "bias_hh")), strict=True
    ):
        i, f = ih[:2]
        steps = f.double().exp()  # uniform in [1, 99]
        assert steps.min() >= 1 - 1e-6 and steps.max() <= 99 * (1 + 1e-6)
        assert abs(steps.mean() - 50) < 5 * 98 / math.sqrt(12 * 4000)
        assert abs(steps.std() - 98 / math.sqrt(12)) < 1
        assert torch.equal(i, -f) and not hh[0].any() and not hh[1].any()
        assert all(torch.equal(ih[k], old_ih[k]) for k in (2, 3))
        assert all(torch.equal(hh[k], old_hh[k]) for k in (2, 3))


def test_parametrized_weights_are_no_matter_and_parametrized_biases_an_error() -> None:
    layer = parametrizations.weight_norm(nn.LSTM(3, 5), "weight_hh_l0")
    forget_bias_(layer, 1.5)
    assert (layer.bias_ih_l0[5:10] == 1.5).all()
    parametrize.register_parametrization(layer, "bias_ih_l0", nn.Identity())
    for call in (forget_bias_, chrono_):
        name = call.__name__
        with pytest.raises(
            ValueError, match=f"{name}: .* got parametrized ones; call {name} before"
        ):
            call(layer, 10.0)


def test_chrono_takes_a_generator() -> None:
    def drawn(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        bias: torch.Tensor = chrono_(nn.LSTM(2, 8), 50, generator).bias_ih_l0
        return bias.detach()[:16]

    state = torch.get_rng_state()
    nn.LSTM(2, 8)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    torch.set_rng_state(state)
    drawn(3)
    assert torch.equal(torch.get_rng_state(), after)  # no more than nn.LSTM itself draws


def test_the_option_holds_when_weights_are_drawn_again() -> None:
    torch.manual_seed(0)
    layer = throughtime.LSTM(3, 5, 2, forget_bias=2.0)
    torch.manual_seed(0)
    plain = throughtime.LSTM(3, 5, 2)
    assert torch.equal(layer.weight_hh_l1, plain.weight_hh_l1)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    for made in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        nn.init.zeros_(made.bias_ih_l1)
        made.reset_parameters()
        assert [set(one[1].tolist()) for one in gates(made, "bias_ih")] == [{2.0}, {2.0}]
    assert throughtime.LSTM(3, 5).forget_bias is None


@pytest.mark.parametrize(
    ("call", "kind", "wanted"),
    [
        (lambda: forget_bias_(nn.GRU(2, 3), 1.0), TypeError, "LSTMCell or RelLSTM, got GRU"),
        (lambda: chrono_(nn.Linear(2, 3), 9), TypeError, "got Linear"),
        (lambda: chrono_(nn.Sequential(nn.LSTM(2, 3)), 9), TypeError, "each such layer"),
        (lambda: chrono_(throughtime.RelLSTM(2, 3, cell="tanh"), 9), TypeError, "got RelLSTM"),
        (lambda: forget_bias_(nn.LSTM(2, 3, bias=False), 1.0), ValueError, "bias=False"),
        (lambda: throughtime.LSTM(2, 3, bias=False, forget_bias=1), ValueError, "bias=False"),
        (lambda: throughtime.LSTM(2, 3, forget_bias=math.inf), ValueError, "finite number"),
        (lambda: forget_bias_(nn.LSTM(2, 3), math.nan), ValueError, "finite number"),
        (lambda: chrono_(nn.LSTM(2, 3), 2), ValueError, "above 2"),
        (lambda: chrono_(nn.LSTM(2, 3), math.nan), ValueError, "above 2"),
    ],
)
def test_what_is_refused(call: Callable[[], object], kind: type[Exception], wanted: str) -> None:
    with pytest.raises(kind, match=wanted):
        call()
