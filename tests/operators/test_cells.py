"""``return_cells``: every c_t, with its gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence

from cases import (
    DTYPES,
    LOW_PRECISION,
    OPTIONS,
    SMALL,
    Shape,
    call,
    options_for,
    plain_lstm,
    random,
    starts,
    tensors,
)
from closeness import assert_all_close, assert_close
from throughtime import LSTM, functional, reference
from throughtime.backends import Request, can_run

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.jit, by torch
]

SHAPES = (SMALL, Shape(5, 3, 4, 6, 2), Shape(12, 2, 3, 33))


def loop(*args: Any, **options: Any) -> Any:
    """``plain_lstm`` with every c_t, zero past the end."""
    steps: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    output, (h_n, c_n) = plain_lstm(*args, steps=steps, **options)
    rows = [
        torch.stack([steps[t, b][1] if (t, b) in steps else torch.zeros_like(c_n[b])
                     for b in range(output.size(1))])
        for t in range(output.size(0))
    ]  # fmt: skip
    return output, (h_n, c_n), torch.stack(rows)


def with_gradients(found: Any, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a loss on everything; its numbers are the same in float32."""
    output, (h_n, c_n), cells = found
    results = {"output": output, "h_n": h_n, "c_n": c_n, "cells": cells}
    loss = sum(
        (x * random(*x.shape, seed=60 + k).float().to(x.dtype)).sum()
        for k, x in enumerate(results.values())
    )
    grads = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return {name: x.detach() for name, x in results.items()} | dict(zip(named, grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    backend: str, shape: Shape, name: str, recompute: bool, dtype: torch.dtype
) -> None:
    options = options_for(shape)[name]
    named = tensors(shape, dtype)
    if "reset" in options:
        named |= starts(shape, dtype)
    exact = {key: x.detach().double().requires_grad_() for key, x in named.items()}
    wanted = with_gradients(call(loop, exact, **options), exact)
    run = partial(functional.lstm, return_cells=True, recompute=recompute, backend=backend)
    found = with_gradients(call(run, named, **options), named)
    assert_all_close(found, {key: x.to(dtype) for key, x in wanted.items()})


@pytest.mark.parametrize("dtype", [*DTYPES, *LOW_PRECISION], ids=str)
def test_everything_else_keeps_its_bits(backend: str, dtype: torch.dtype) -> None:
    named = tensors(Shape(9, 5, 3, 20), dtype)
    run = partial(functional.lstm, backend=backend)
    output, (h_n, c_n) = call(run, named)
    found = call(partial(run, return_cells=True), named)
    assert torch.equal(found[0], output) and torch.equal(found[1][0], h_n)
    assert torch.equal(found[1][1], c_n) and torch.equal(found[2][-1], c_n)
    assert found[2].dtype == dtype
    grads = [
        torch.autograd.grad(y.float().square().sum(), list(named.values()))
        for y in (output, found[0])
    ]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_derivatives_of_second_order_and_forward_mode(backend: str) -> None:
    named = tensors(Shape(3, 2, 2, 3))
    options = options_for(Shape(3, 2, 2, 3))["lengths"]

    def cells(*leaves: Tensor) -> Tensor:
        run = partial(functional.lstm, return_cells=True, backend=backend)
        found: Tensor = call(run, dict(zip(named, leaves, strict=True)), **options)[2]
        return found

    assert gradcheck(cells, tuple(named.values()), check_forward_ad=True)
    assert gradgradcheck(cells, tuple(named.values()))


@pytest.mark.parametrize("form", ["padded", "batch first", "no batch", "packed"])
def test_layers_and_directions(backend: str, form: str) -> None:
    """Each layer and direction alone, by the reference."""
    first = form == "batch first"
    lstm = LSTM(4, 5, 2, bidirectional=True, batch_first=first, backend=backend).double()
    x, lengths = random(6, 3, 4, seed=1), torch.tensor([3, 6, 4])
    if form == "no batch":
        x = x[:, :1]
    given: Any = {"padded": x, "batch first": x.transpose(0, 1), "no batch": x[:, 0]}.get(form)
    if form == "packed":
        given = pack_padded_sequence(x, lengths, enforce_sorted=False)
    _, (_, c_n), cells = lstm(given, return_cells=True)
    if first:
        cells = cells.transpose(1, 2)
    if form == "no batch":
        cells, c_n = cells.unsqueeze(2), c_n.unsqueeze(1)
    assert cells.shape == (4, *x.shape[:2], 5)
    ends = lengths if form == "packed" else None
    for layer in range(2):
        outputs = []
        for d in range(2):
            steps: dict[int, Tensor] = {}
            output, (_, c) = reference.lstm(
                x, None, *lstm._weights(layer, d), lengths=ends, reverse=d == 1,
                observe=lambda t, h_t, c_t, steps=steps: steps.update({t: c_t}),
            )  # fmt: skip
            outputs.append(output)
            wanted = torch.stack([steps[t] for t in range(len(steps))])
            if ends is not None:
                wanted = wanted * (torch.arange(6).view(-1, 1, 1) < ends.view(-1, 1))
            assert_close(cells[2 * layer + d], wanted)
            assert_close(c_n[2 * layer + d], c)
        x = torch.cat(outputs, 2)


def test_no_gradient_and_the_state_that_the_thin_way_takes(backend: str) -> None:
    lstm = LSTM(4, 5, backend=backend)
    x, hx = torch.randn(6, 3, 4), (torch.zeros(1, 3, 5), torch.zeros(1, 3, 5))
    expected = lstm(x, hx, return_cells=True)[2].detach()
    with torch.no_grad():
        found = lstm(x, hx, return_cells=True)[2]
    assert torch.equal(found, expected) and not found.requires_grad


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_other_backends_name_the_way_out(name: str) -> None:
    request = Request("lstm", 8, return_cells=True)
    assert "return_cells is not supported" in str(can_run(name, request))
    assert "backend='reference' or 'auto'" in str(can_run(name, request))


def test_one_graph() -> None:
    lstm = LSTM(4, 5, backend="cpu")
    x = torch.randn(6, 3, 4)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: lstm(x, return_cells=True)[2], fullgraph=True, backend="aot_eager"
    )
    found = torch.autograd.grad(compiled(x).square().sum(), lstm.weight_hh_l0)
    expected = torch.autograd.grad(lstm(x, return_cells=True)[2].square().sum(), lstm.weight_hh_l0)
    assert_close(found[0], expected[0])
