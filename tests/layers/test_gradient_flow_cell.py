"""``gradient_flow`` of loops over an LSTMCell: the numbers of an LSTM with the cell's weights."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import throughtime
from cases import random, random_mask
from closeness import assert_close
from throughtime import LSTM, LSTMCell
from throughtime.diagnostics import GradientFlow

T, B, I, H = 9, 3, 2, 4  # noqa: E741
X = random(T, B, I, seed=1)
RESET = random_mask(T, B, p=0.2, seed=3)
W = random(T, B, H, seed=4)


def cell_and_lstm(backend: Any, dtype: torch.dtype = torch.float64) -> tuple[LSTMCell, LSTM]:
    torch.manual_seed(2)
    cell = LSTMCell(I, H, backend=backend).to(dtype)
    lstm = LSTM(I, H, backend=backend).to(dtype)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(lstm, f"{name}_l0", getattr(cell, name))
    return cell, lstm


def loop(
    cell: LSTMCell, x: Tensor = X, reset: Tensor | None = None, state: Any = None, **options: Any
) -> tuple[Tensor, Any]:
    found = []
    for t, x_t in enumerate(x):
        # One step has no reset, and one has the state by its name.
        given = {} if reset is None or t == 1 else {"reset": reset[t]}
        state = cell(x_t, hx=state, **given) if t == 3 else cell(x_t, state, **given)
        found.append(state[0])
    return torch.stack(found), state


def loss_of(output: Tensor, state: Any, every: bool) -> Tensor:
    return (output * W).sum() + state[1].square().sum() if every else output[-1].sum()


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("resets", [True, False])
def test_all_numbers_are_those_of_a_layer(
    backend: str, every: bool, resets: bool, stride: int
) -> None:
    cell, lstm = cell_and_lstm(backend)
    reset = RESET.clone() if resets else None
    if reset is not None:
        reset[1] = False
    given = {"reset": reset} if resets else {}
    with throughtime.gradient_flow(cell, stride=stride) as flow:
        loss_of(*loop(cell, X, reset), every).backward()
    with throughtime.gradient_flow(lstm, stride=stride) as whole:
        loss_of(*lstm(X, **given), every).backward()
    assert flow.layers == ["cell"] and flow.updates == 1
    for name, x in flow.gradients()._asdict().items():
        assert_close(x, getattr(whole.gradients(), name), name)
    assert_close(flow.hops(3).spectrum, whole.hops(3).spectrum)
    rows = [(flow.table(), whole.table()), (flow.horizon(), whole.horizon())]
    if stride == 1:
        rows.append((flow.parameters(), whole.parameters()))
    for found, wanted in rows:
        assert len(found) == len(wanted)
        for row, its in zip(found, wanted, strict=True):
            assert row.pop("layer") == "cell" and its.pop("layer") == "l0"
            assert row == pytest.approx(its, rel=1e-9, abs=1e-13, nan_ok=True)
    assert str(flow) == str(whole)


def test_16_bits_a_scaler_and_no_batch(backend: str) -> None:
    cell, lstm = cell_and_lstm(backend, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = X.float()
    with throughtime.gradient_flow(lstm) as whole:
        loss_of(*lstm(x), True).backward()
    with throughtime.gradient_flow(cell, scaler=scaler) as flow, torch.autocast("cpu"):
        scaler.scale(loss_of(*loop(cell, x), True)).backward()
    for found, wanted in zip(flow.gradients(), whole.gradients(), strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).norm() <= 0.03 * wanted.norm()
    with throughtime.gradient_flow(cell) as flow:
        (loop(cell, x[:, 0])[0] * W[:, 0]).sum().backward()
    with throughtime.gradient_flow(lstm) as whole:
        (lstm(x[:, :1])[0] * W[:, :1]).sum().backward()
    assert_close(flow.gradients().direct, whole.gradients().direct)


def test_gradients_keep_their_bits_and_an_update_follows_another(
    backend: str, tmp_path: Path
) -> None:
    cell, _ = cell_and_lstm(backend, torch.float32)

    def run() -> list[Tensor]:
        cell.zero_grad()
        output, state = loop(cell, X.float())
        (loss_of(output, state, True) + output.square().sum() + output.exp().sum()).backward()
        return [p.grad.clone() for p in cell.parameters() if p.grad is not None]

    plain = run()
    with throughtime.gradient_flow(cell) as flow:
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(run(), plain, strict=True))
    assert flow.updates == 3 and len(flow.table()) == T
    pytest.importorskip("matplotlib")
    flow.plot(tmp_path / "flow.svg")
    text = (tmp_path / "flow.svg").read_text()
    assert "update" in text and text.count('<g id="axes_') == 3


def shapes(flow: GradientFlow) -> list[int]:
    """Steps of each call."""
    numbers = [row["call"] for row in flow.table()]
    return [numbers.count(k) for k in range(max(numbers) + 1)]


@pytest.mark.parametrize("interleaved", [True, False])
def test_two_loops_in_one_update(backend: str, interleaved: bool) -> None:
    """Of other batches too."""
    cell, lstm = cell_and_lstm(backend)
    one, two = X, random(T - 2, B + 1, I, seed=7)
    with throughtime.gradient_flow(cell) as flow:
        if interleaved:
            a = b = None
            for t, x_t in enumerate(one):
                a = cell(x_t, a)
                b = cell(two[t], b) if t < len(two) else b
        else:
            (_, a), (_, b) = loop(cell, one), loop(cell, two)
        assert a is not None and b is not None
        (a[0].sum() + b[0].square().sum()).backward()
    with throughtime.gradient_flow(lstm) as whole:
        (lstm(one)[0][-1].sum() + lstm(two)[0][-1].square().sum()).backward()
    assert shapes(flow) == [T, T - 2]
    for k in range(2):
        for x, y in zip(flow.gradients(call=k), whole.gradients(call=k), strict=True):
            assert_close(x, y)


def detached(h: Tensor, c: Tensor) -> Any:
    return h, c.detach()


def product(h: Tensor, c: Tensor) -> Any:
    return h * 0.5, c


def in_place(h: Tensor, c: Tensor) -> Any:
    c[0] = 0
    return h, c


def swapped(h: Tensor, c: Tensor) -> Any:
    return c, h


def without_gradient(h: Tensor, c: Tensor) -> Any:
    return h.detach(), c.detach()


@pytest.mark.parametrize(
    "between", [detached, product, in_place, swapped, without_gradient], ids=lambda f: f.__name__
)
def test_a_state_that_is_not_as_the_cell_gave_it_begins_another_call(
    backend: str, between: Any
) -> None:
    """What the first call gets from the second then counts as asked of its end."""
    cell, lstm = cell_and_lstm(backend)
    flows = []
    for layer in (cell, lstm):
        with throughtime.gradient_flow(layer) as flow:
            if layer is cell:
                first, state = loop(cell, X[:5])
                second, _ = loop(cell, X[5:], state=between(*state))
            else:
                first, state = lstm(X[:5])
                h, c = between(*(x[0] for x in state))
                second, _ = lstm(X[5:], (h.unsqueeze(0), c.unsqueeze(0)))
            (first.sum() + second.sum()).backward()
        assert shapes(flow) == [5, T - 5]
        flows.append(flow)
    for k in range(2):
        for x, y in zip(*(flow.gradients(call=k) for flow in flows), strict=True):
            assert_close(x, y)


def test_two_loops_from_one_state(backend: str) -> None:
    """The first goes on, and the second begins another call."""
    cell, _ = cell_and_lstm(backend)
    with throughtime.gradient_flow(cell) as flow:
        _, state = loop(cell, X[:5])
        ends = [loop(cell, X[5:] * k, state=state)[1] for k in (1, 2)]
        (ends[0][0].sum() + ends[1][0].sum()).backward()
    assert shapes(flow) == [T, T - 5]
    direct = flow.gradients().direct
    assert direct[4].any() and not direct[:4].any() and not direct[5:-1].any()


def test_a_recording_ends_with_its_flow(backend: str) -> None:
    cell, _ = cell_and_lstm(backend)
    hidden = X * torch.ones(I, requires_grad=True, dtype=X.dtype)
    with throughtime.gradient_flow(cell):
        output, state = loop(cell, hidden)
        output.sum().backward()
    gone = weakref.ref(output), weakref.ref(hidden), weakref.ref(state[0])
    del output, hidden, state
    gc.collect()
    assert [x() for x in gone] == [None] * 3
