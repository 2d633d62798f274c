"""``throughtime.LSTMCell``, and the thin way of calls without a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import throughtime
from cases import random, random_mask
from closeness import assert_close
from throughtime import LSTM, LSTMCell
from throughtime.functional import thin

B = 3


def make(**options: object) -> LSTMCell:
    torch.manual_seed(1)
    return LSTMCell(4, 5, dtype=torch.float64, **options)


def given(*batch: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    x, h, c = (random(*batch, size, seed=size) for size in (4, 5, 5))
    return x.requires_grad_(), (h.requires_grad_(), c.flip(-1).requires_grad_())


def test_the_state_under_autocast_is_of_its_dtype_whatever_went_in(backend: str) -> None:
    cell, x, states = LSTMCell(4, 5, backend=backend), torch.randn(B, 4), (torch.randn(B, 5),) * 2
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            assert [part.dtype for part in cell(x, states)] == [torch.bfloat16] * 2
            with torch.autocast("cpu", enabled=False):  # the way out of the docstring
                assert [part.dtype for part in cell(x, states)] == [torch.float32] * 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (B,), (0,)], ids=str)
@pytest.mark.parametrize("states", [True, False])
def test_parity_with_theirs(backend: str, bias: bool, batch: tuple[int, ...], states: bool) -> None:
    """Parameters by seed, their names, values and all gradients."""
    ours = make(bias=bias, backend=backend)
    torch.manual_seed(1)
    theirs = nn.LSTMCell(4, 5, bias=bias, dtype=torch.float64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    x, hx = given(*batch)
    found = []
    for cell in (ours, theirs):
        h, c = cell(x, hx if states else None)
        leaves = [x, *(hx if states else ()), *cell.parameters()]
        grads = torch.autograd.grad(h.square().sum() + c.sum(), leaves)
        found.append([h, c, *grads])
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_loop_of_steps_is_a_layer_that_shares_the_parameters(
    backend: str, grad: bool, dtype: torch.dtype
) -> None:
    cell, lstm = make(backend=backend), LSTM(4, 5, dtype=torch.float64, backend=backend)
    for name, weight in cell.named_parameters():
        setattr(lstm, f"{name}_l0", weight)
    x, done = random(6, B, 4, seed=1), random_mask(6, B, p=0.4, seed=2)
    with torch.set_grad_enabled(grad):
        expected, _ = lstm(x, reset=done)
        state: Any = None
        for t in range(6):
            one = None if state is None else (state[0][0], state[1][0])
            alone, _ = cell(x[t, 0], one, reset=done[t, 0].to(dtype))
            state = cell(x[t], state, reset=done[t].to(dtype))
            assert_close(state[0], expected[t])
            assert_close(alone, expected[t, 0])


def _calls(kind: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    reset = torch.tensor([True, False, False])
    if kind == "cell":
        cell = LSTMCell(4, 5, dtype=dtype)
        x, h, c = (random(B, size, seed=size, dtype=dtype) for size in (4, 5, 5))
        return cell, (x, (h, c)), {"reset": reset}
    first = kind == "batch first"
    layers = 2 if kind == "two layers" else 1
    lstm = LSTM(4, 5, layers, batch_first=first, dtype=dtype)
    x = random(*((B, 7) if first else (7, B)), 4, seed=1, dtype=dtype)
    h, c = (random(layers, B, 5, seed=seed, dtype=dtype) for seed in (2, 3))
    marks = random_mask(7, B, p=0.3, seed=4)
    return lstm, (x, (h, c)), {"reset": marks.t() if first else marks}


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for part in result for x in flat(part)]


@pytest.mark.parametrize("kind", ["cell", "one layer", "two layers", "batch first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_thin_way_has_the_bits_and_forms_of_the_long_one(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, args, options = _calls(kind, dtype)
    taken: list[object] = []
    run = thin.run
    monkeypatch.setattr(
        thin, "run", lambda *args, **named: taken.append(found := run(*args, **named)) or found
    )
    for given in ({}, options):
        with torch.no_grad():
            thinly = flat(module(*args, **given))
        assert taken and None not in taken, "the thin way was not taken"
        taken.clear()
        with monkeypatch.context() as patch:
            patch.setattr(thin, "applies", lambda input, backend: False)
            found = flat(module(*args, **given))
        assert not taken
        for one, other in zip(thinly, found, strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride()
            assert one._is_view() == other._is_view()


@pytest.mark.parametrize("kind", ["cell", "one layer"])
def test_the_thin_way_is_not_taken_where_more_is_asked_for(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, args, _ = _calls(kind, torch.float32)

    def run(*args: object, **named: object) -> None:
        raise AssertionError("the thin way was taken")

    monkeypatch.setattr(thin, "run", run)
    with torch.no_grad():
        with throughtime.backend("reference"):
            module(*args)
        with torch.autocast("cpu", torch.bfloat16):
            assert flat(module(*args))[0].dtype == torch.bfloat16
        torch.func.vmap(lambda x: module(x, args[1]))(args[0].unsqueeze(0))
        monkeypatch.setenv("THROUGHTIME_BACKEND", "reference")
        module(*args)


@pytest.mark.parametrize("hidden", [64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sample_of_one_step_has_the_bits_it_has_alone(
    isa: str, hidden: int, dtype: torch.dtype
) -> None:
    """Whatever the batch, the number of threads, and whether a gradient is wanted."""
    cell = LSTMCell(150, hidden, dtype=dtype)
    x, h, c = (random(700, n, seed=n, dtype=dtype) for n in (150, hidden, hidden))
    whole = cell(x, (h, c))
    for rows in (slice(0, 1), slice(5, 8), slice(10, 23), slice(100, 500)):
        with torch.no_grad():
            part = cell(x[rows], (h[rows], c[rows]))
        assert all(torch.equal(one, other[rows]) for one, other in zip(part, whole, strict=True))
