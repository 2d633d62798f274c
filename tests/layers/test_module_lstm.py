"""What ``throughtime.LSTM`` adds to ``nn.LSTM``, and the ways in which modules are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from cases import random, random_mask
from closeness import assert_close
from throughtime import LSTM, functional

T, B = 6, 3


def make(**options: object) -> LSTM:
    torch.manual_seed(1)
    return LSTM(4, 5, dtype=torch.float64, **options)


def make_input() -> Tensor:
    return random(T, B, 4, seed=1)


def gradient(lstm: LSTM, x: Tensor, hx: object = None, **options: object) -> Tensor:
    output, (h_n, c_n) = lstm(x, hx, **options)
    loss = output.square().sum() + h_n.sum() + c_n.square().sum()
    grads = torch.autograd.grad(loss, list(lstm.parameters()))
    return torch.cat([g.flatten() for g in grads])


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The mask that each layer and direction was run with, in order."""
    seen: list[Tensor | None] = []
    one, both = functional.lstm, functional.bidirectional_lstm

    def spy(*args: Any, detach_mask: Tensor | None, **options: Any) -> object:
        seen.append(detach_mask)
        return one(*args, detach_mask=detach_mask, **options)

    def spy_on_both(*args: Any, detach_mask: list[Tensor | None], **options: Any) -> object:
        seen.extend(detach_mask)
        return both(*args, detach_mask=detach_mask, **options)

    monkeypatch.setattr(functional, "lstm", spy)
    monkeypatch.setattr(functional, "bidirectional_lstm", spy_on_both)
    return seen


def test_draws_nothing_unless_it_trains_with_p(masks: list[Tensor | None]) -> None:
    lstm, x = make(detach_prob=0.5, num_layers=2), make_input()
    state = torch.get_rng_state()
    with torch.no_grad():
        lstm(x)
    with torch.inference_mode():
        lstm(x)
    lstm.eval()(x)
    lstm.train()
    lstm.detach_prob = 0.0
    lstm(x)
    assert masks == [None] * 8
    lstm.detach_prob = 0.5
    lstm(x, detach_mask=torch.zeros(T, dtype=torch.bool))
    assert torch.equal(torch.get_rng_state(), state)
    lstm(x)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_draws_a_mask_per_step_for_each_layer_and_direction(
    p: float, masks: list[Tensor | None]
) -> None:
    lstm = make(detach_prob=p, num_layers=2, bidirectional=True)
    x = random(1000, 1, 4, seed=1)
    lstm(x)
    lstm(x)
    assert [mask.shape for mask in masks] == [(1000,)] * 8
    drawn = torch.stack(masks)
    assert p == 1 or (drawn.unsqueeze(0) != drawn.unsqueeze(1)).any(2).sum() == 8 * 7
    assert (drawn.double().mean(1) - p).abs().max() < 0.06


def test_a_shared_mask(masks: list[Tensor | None]) -> None:
    make(detach_prob=0.5, num_layers=2, bidirectional=True, detach_shared=True)(make_input())
    assert len(masks) == 4 and all(torch.equal(mask, masks[0]) for mask in masks)


def test_generator(masks: list[Tensor | None]) -> None:
    lstm, x = make(detach_prob=0.2), random(50, 1, 4, seed=1)
    state = torch.get_rng_state()
    for seed in (7, 7, 8):
        lstm(x, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert 1 <= masks[0].sum() <= 25


def test_a_seed_gives_the_same_gradient_on_every_backend(backend: str) -> None:
    lstm, x = make(detach_prob=0.5, num_layers=2), make_input()
    found = []
    for name in (backend, "reference"):
        lstm.backend = name
        torch.manual_seed(3)
        found.append(gradient(lstm, x))
    assert_close(*found)


def test_detach_prob_may_change_at_any_time(backend: str) -> None:
    lstm, x = make(detach_prob=1.0, backend=backend), make_input()
    every = gradient(lstm, x, detach_mask=torch.ones(T, dtype=torch.bool))
    assert_close(gradient(lstm, x), every)
    lstm.detach_prob = 0
    assert lstm.detach_prob == 0.0
    assert (gradient(lstm, x) - every).abs().max() > 1e-2


def test_masks_and_resets_of_every_form_mean_the_same(backend: str) -> None:
    lstm, x = make(num_layers=2, bidirectional=True, backend=backend), make_input()
    mask, reset = random_mask(T, p=0.5, seed=1), random_mask(T, B, p=0.3, seed=2)
    expected = gradient(lstm, x, detach_mask=mask, reset=reset)
    assert (gradient(lstm, x, reset=reset) - expected).abs().max() > 1e-3
    by_sample = mask.view(T, 1).expand(T, B)
    for same in (by_sample, mask.view(1, T, 1).expand(4, T, 1), by_sample.expand(4, T, B)):
        assert_close(gradient(lstm, x, detach_mask=same, reset=reset), expected)
    alone = gradient(lstm, x[:, :1], detach_mask=mask, reset=reset[:, :1])
    assert_close(gradient(lstm, x[:, 0], detach_mask=mask, reset=reset[:, 0]), alone)
    lstm.batch_first = True  # masks and resets follow
    by_batch = x.transpose(0, 1)
    for same in (
        mask,
        by_sample.t(),
        mask.view(1, 1, T).expand(4, 1, T),
        by_sample.t().expand(4, B, T),
    ):
        assert_close(gradient(lstm, by_batch, detach_mask=same, reset=reset.t()), expected)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_resets_as_programs_of_reinforcement_learning_have_them(
    dtype: torch.dtype, first: bool
) -> None:
    """As numbers, with a dimension of size 1 behind, and in the layout of a square input."""
    lstm, x, reset = (
        make(batch_first=first),
        random(4, 4, 4, seed=1),
        random_mask(4, 4, p=0.4, seed=2),
    )
    expected, _ = make()(x, reset=reset)
    assert not torch.equal(expected, make()(x, reset=reset.t())[0])
    given = (x.transpose(0, 1), reset.t()) if first else (x, reset)
    output, _ = lstm(given[0], reset=given[1].to(dtype).unsqueeze(2))
    assert torch.equal(output.transpose(0, 1) if first else output, expected)


def test_each_layer_and_direction_gets_its_own_mask(masks: list[Tensor | None]) -> None:
    mask = random_mask(4, T, B, p=0.5, seed=1)
    make(num_layers=2, bidirectional=True)(make_input(), detach_mask=mask)
    assert all(torch.equal(seen, given) for seen, given in zip(masks, mask, strict=True))


def test_reset_equals_episodes_run_alone_in_both_directions(backend: str) -> None:
    lstm, x = make(num_layers=2, bidirectional=True, backend=backend), make_input()
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[4] = True
    output, states = lstm(x, reset=reset)
    first, first_states = lstm(x[:4])
    second, second_states = lstm(x[4:])
    assert_close(output, torch.cat([first, second]))
    for state, begin, end in zip(states, first_states, second_states, strict=True):
        assert_close(state[::2], end[::2])
        assert_close(state[1::2], begin[1::2])


def test_repr_shows_what_is_not_default() -> None:
    assert repr(LSTM(2, 3)) == "LSTM(2, 3)"
    lstm = LSTM(2, 3, num_layers=2, batch_first=True, detach_prob=0.25, detach_shared=True)
    lstm.backend = "reference"
    assert repr(lstm) == (
        "LSTM(2, 3, num_layers=2, batch_first=True, detach_prob=0.25, detach_shared=True, "
        "backend='reference')"
    )
    assert repr(LSTM(2, 3, proj_size=1)) == repr(nn.LSTM(2, 3, proj_size=1))


def test_a_pickle_of_a_version_without_the_newer_attributes() -> None:
    lstm = make(num_layers=2)
    state = lstm.__getstate__()
    for name in ("_detach_prob", "detach_shared", "_backend"):
        del state[name]
    old = LSTM.__new__(LSTM)
    old.__setstate__(state)
    assert old.detach_prob == 0.0 and not old.detach_shared and old.backend == "auto"
    assert torch.equal(old(make_input())[0], lstm(make_input())[0])


def test_parametrizations_are_read_at_every_call(backend: str) -> None:
    lstm, x = make(backend=backend), make_input()
    before, _ = lstm(x)
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    assert_close(lstm(x)[0], before)
    with torch.no_grad():
        lstm.parametrizations.weight_hh_l0.original0.mul_(2)
    assert (lstm(x)[0] - before).abs().max() > 1e-2
    lstm(x)[0].sum().backward()
    assert lstm.parametrizations.weight_hh_l0.original0.grad.abs().max() > 1e-3


def test_weight_drop_by_attribute() -> None:
    """The old recipe: rename the parameter, set a plain tensor in its place before each call."""
    lstm, x = make(), make_input()
    raw = lstm.weight_hh_l0
    del lstm._parameters["weight_hh_l0"]
    lstm.register_parameter("weight_hh_l0_raw", raw)
    lstm.weight_hh_l0 = raw * 0.5
    other = make()
    with torch.no_grad():
        other.weight_hh_l0.mul_(0.5)
    assert torch.equal(lstm(x)[0], other(x)[0])
    lstm(x)[0].sum().backward()
    assert raw.grad.abs().max() > 1e-3


def test_checkpointing_repeats_the_mask(backend: str) -> None:
    lstm, x = make(detach_prob=0.5, backend=backend), make_input().requires_grad_()
    found = []
    for run in (lstm, lambda x: checkpoint(lstm, x, use_reentrant=False)):
        torch.manual_seed(3)
        output, _ = run(x)
        found.append(torch.autograd.grad(output.square().sum(), x)[0])
    assert_close(*found)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_from_torch_and_back(bidirectional: bool) -> None:
    theirs = nn.LSTM(4, 5, 2, False, True, 0.5, bidirectional, 3, dtype=torch.float64).eval()
    theirs.weight_hh_l1.requires_grad_(False)
    state = torch.get_rng_state()
    ours = LSTM.from_torch(theirs, detach_prob=0.25, detach_shared=True, backend="reference")
    again = ours.to_torch()
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again) is nn.LSTM and repr(again) == repr(theirs)
    assert ours.detach_prob == 0.25 and ours.detach_shared and ours.backend == "reference"
    x = random(B, T, 4, seed=1)
    for layer in (ours, again):
        assert not layer.training and not layer.weight_hh_l1.requires_grad
        assert layer.weight_hh_l0.requires_grad
        assert_close(layer(x)[0], theirs(x)[0])
        for name, weight in layer.named_parameters():
            assert weight is not theirs.get_parameter(name)
            assert weight.data_ptr() != theirs.get_parameter(name).data_ptr()


def test_from_torch_takes_the_value_of_a_parametrized_weight() -> None:
    theirs = parametrizations.weight_norm(nn.LSTM(4, 5), "weight_hh_l0")
    with torch.no_grad():
        theirs.parametrizations.weight_hh_l0.original0.mul_(2)
    ours, x = LSTM.from_torch(theirs), torch.randn(T, B, 4)
    assert_close(ours(x)[0], theirs(x)[0])
    assert isinstance(ours.weight_hh_l0, nn.Parameter)
