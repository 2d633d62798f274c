"""``throughtime.integrations.torchrl`` beside TorchRL's own module."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchrl", reason="TorchRL is not installed: pip install torchrl")

from tensordict import TensorDict
from torchrl.modules import LSTMModule as Theirs
from torchrl.modules import set_recurrent_mode

from closeness import assert_close
from throughtime.integrations import torchrl
from throughtime.integrations.torchrl import LSTMModule as Ours

B, T, I, H = 5, 9, 3, 4  # noqa: E741
KEYS = {"in_key": "obs", "out_key": "embed"}
NEXT = [("next", "recurrent_state_h"), ("next", "recurrent_state_c")]


def modules(**options: Any) -> tuple[Ours, Theirs]:
    torch.manual_seed(1)
    theirs = Theirs(input_size=I, hidden_size=H, **KEYS, **options).double()
    ours = Ours(input_size=I, hidden_size=H, **KEYS, **options).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def data(layers: int, *, starts: float, stored: str, batch: tuple[int, ...] = (B, T)) -> TensorDict:
    """``stored``: "none", "zero at starts" as a rollout leaves it, or "any" as a sampler does."""
    generator = torch.Generator().manual_seed(3)
    made = {
        "obs": torch.randn(*batch, I, generator=generator, dtype=torch.float64),
        "is_init": torch.rand(*batch, 1, generator=generator) < starts,
    }
    if stored != "none":
        for name in ("recurrent_state_h", "recurrent_state_c"):
            state = torch.randn(*batch, layers, H, generator=generator, dtype=torch.float64)
            if stored == "zero at starts":
                state = state * ~made["is_init"].unsqueeze(-1)
            made[name] = state
    return TensorDict(made, batch)


def outcome(module: Any, given: TensorDict, layers: int) -> dict[str, Tensor]:
    """Output, states at the ends of rows, and gradients of weights and input."""
    leaf = given["obs"].clone().requires_grad_()
    with set_recurrent_mode(True):
        found = module(given.clone().set("obs", leaf))
    output, (h, c) = found["embed"], (found[key] for key in NEXT)
    leaves = [leaf, *module.parameters()]
    loss = output.square().sum() + h[..., -1, :, :].sum() + c[..., -1, :, :].square().sum()
    grads = torch.autograd.grad(loss, leaves)
    named = {f"grad {k}": grad for k, grad in enumerate(grads)}
    ends = h if layers == 1 else h[..., -1, :, :]  # h of one layer at the ends of episodes too
    return {"output": output, "h": ends, "c": c[..., -1, :, :]} | named


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("starts", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("stored", ["none", "zero at starts", "any"])
@pytest.mark.parametrize("batch", [(B, T), (T,), (2, 3, T)], ids=str)
def test_rows_of_episodes(layers: int, starts: float, stored: str, batch: tuple[int, ...]) -> None:
    ours, theirs = modules(num_layers=layers)
    given = data(layers, starts=starts, stored=stored, batch=batch)
    found, expected = (outcome(module, given, layers) for module in (ours, theirs))
    for name, x in expected.items():
        assert_close(found[name], x, name)


def test_a_state_that_is_stored_has_a_gradient() -> None:
    ours, theirs = modules()
    given = data(1, starts=0.3, stored="any")
    grads = []
    for module in (ours, theirs):
        leaf = given["recurrent_state_c"].clone().requires_grad_()
        with set_recurrent_mode(True):
            found = module(given.clone().set("recurrent_state_c", leaf))
        grads += torch.autograd.grad(found["embed"].square().sum(), leaf)
    assert_close(*grads)
    assert grads[0].abs().sum() > 0.1


@pytest.mark.parametrize("layers", [1, 2])
def test_steps_of_a_rollout(layers: int) -> None:
    ours, theirs = modules(num_layers=layers)
    given = data(layers, starts=0.3, stored="any")[:, 0]
    with torch.no_grad():
        found, expected = (module(given.clone()) for module in (ours, theirs))
    for key in ("embed", *NEXT):
        assert_close(found[key], expected[key])


def test_the_primer_and_a_layer_that_is_given() -> None:
    layer = torch.nn.LSTM(I, H, batch_first=True)
    weight = layer.weight_hh_l0
    ours = Ours(lstm=layer, **KEYS)
    assert ours.lstm.weight_hh_l0 is weight
    made, due = (module.make_tensordict_primer() for module in (ours, Theirs(lstm=layer, **KEYS)))
    assert made.primers == due.primers


def test_what_it_cannot_do_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"should not be bidirectional.*use torchrl"):
        Ours(input_size=I, hidden_size=H, bidirectional=True, **KEYS)
    with pytest.raises(TypeError, match=r"lstm should be a throughtime\.LSTM or an nn\.LSTM"):
        Ours(input_size=I, hidden_size=H, python_based=True, **KEYS)


def test_the_example() -> None:
    failed, tried = doctest.testmod(torchrl)
    assert tried and not failed
