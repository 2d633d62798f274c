"""A walk through time with a new cell: Elman's network against ``nn.RNN`` in float64.

The cell is one file, tanh_cell.h: the package has no operator for it, and needs no other change.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

SIZES = pytest.mark.parametrize(
    ("steps", "batch", "inputs", "units"),
    [(1, 1, 1, 1), (9, 5, 3, 17), (30, 37, 60, 40), (4, 3, 2, 300)],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}
THREADS = pytest.mark.parametrize("threads", [1, 4])


class Network:
    """The walk; ``run`` has the parameters of ``expected``."""

    def __init__(self, layer: Any, dtype: torch.dtype, threads: int, operands: str = "") -> None:
        self.layer, self.dtype, self.threads, self.operands = layer, dtype, threads, operands

    def run(
        self,
        x: Tensor,
        h_0: Tensor,
        weights: list[Tensor],
        grads: tuple[Tensor, Tensor],
        lengths: Tensor | None,
        detach: Tensor | None,
        reverse: bool,
    ) -> list[Tensor]:
        x, h_0, *weights = (v.to(self.dtype).contiguous() for v in (x, h_0, *weights))
        steps, batch, inputs = x.shape
        units = h_0.size(1)
        sizes = torch.tensor([steps, batch, inputs, units, units, int(reverse), self.threads])
        order = torch.arange(batch)
        saved = x.new_full((self.layer("saved_size", x, sizes),), torch.nan)
        y, h_n, dx, dh_0 = (
            torch.full_like(v, torch.nan) for v in (x.new_empty(steps, batch, units), h_0, x, h_0)
        )
        weight_ih, weight_hh, bias = weights
        call = (sizes, 0 if lengths is None else lengths, order, x, h_0, weight_ih, weight_hh, 0)
        self.layer(f"forward{self.operands}", *call, bias, y, h_n, saved)
        if lengths is not None:
            dx.zero_()
        dw = [torch.full_like(v, torch.nan) for v in weights]
        dy, dh_n = (v.to(self.dtype).contiguous() for v in grads)
        mask = 0 if detach is None else detach
        self.layer(
            f"backward{self.operands}",
            *call,
            y,
            saved,
            mask,
            dy,
            dh_n,
            dx,
            dh_0,
            dw[0],
            dw[1],
            0,
            dw[2],
        )
        return [y, h_n, dx, dh_0, *dw]


def expected(
    x: Tensor,
    h_0: Tensor,
    weights: list[Tensor],
    grads: tuple[Tensor, Tensor],
    lengths: Tensor | None,
    detach: Tensor | None,
    reverse: bool,
) -> list[Tensor]:
    """By ``nn.RNN``; where steps are detached by a loop."""
    x, h_0, *weights = (v.clone().requires_grad_() for v in (x, h_0, *weights))
    weight_ih, weight_hh, bias = weights
    zero = torch.zeros_like(bias)
    if detach is not None:
        h, outputs = h_0, []
        for t, detached in enumerate(detach):
            gates = x[t] @ weight_ih.t() + bias + (h.detach() if detached else h) @ weight_hh.t()
            h = torch.tanh(gates)
            outputs.append(h)
        y, h_n = torch.stack(outputs), h
    else:
        net = nn.RNN(x.size(2), h_0.size(1), dtype=torch.float64)
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        sequence = x.flip(0) if reverse else x
        packed = sequence if lengths is None else pack_padded_sequence(sequence, lengths)
        called = dict(zip(names, (weight_ih, weight_hh, bias, zero), strict=True))
        y, h_n = torch.func.functional_call(net, called, (packed, h_0.unsqueeze(0)))
        h_n = h_n.squeeze(0)
        if lengths is not None:
            y, _ = pad_packed_sequence(y, total_length=len(x))
        y = y.flip(0) if reverse else y
    return [
        y,
        h_n,
        *torch.autograd.grad([y, h_n], [x, h_0, *weights], list(grads), materialize_grads=True),
    ]


def case(
    steps: int, batch: int, inputs: int, units: int
) -> tuple[Tensor, Tensor, list[Tensor], Any]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    weights = [randn(units, inputs) / 2, randn(units, units) / units**0.5, randn(units)]
    grads = randn(steps, batch, units), randn(batch, units)
    return randn(steps, batch, inputs) / 2, randn(batch, units), weights, grads


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        error = (one.double() - other.detach()).abs().max()
        assert error <= tolerance * other.detach().abs().max()


@SIZES
@DTYPES
@THREADS
@pytest.mark.parametrize("reverse", [False, True])
def test_against_rnn(
    layer: Any,
    steps: int,
    batch: int,
    inputs: int,
    units: int,
    dtype: torch.dtype,
    threads: int,
    reverse: bool,
) -> None:
    given = case(steps, batch, inputs, units)
    found = Network(layer, dtype, threads).run(*given, None, None, reverse)
    assert_same(found, expected(*given, None, None, reverse), TOLERANCE[dtype])


@DTYPES
@THREADS
def test_lengths(layer: Any, dtype: torch.dtype, threads: int) -> None:
    given = case(12, 6, 4, 21)
    lengths = torch.tensor([12, 12, 9, 4, 4, 1])
    found = Network(layer, dtype, threads).run(*given, lengths, None, False)
    assert_same(found, expected(*given, lengths, None, False), TOLERANCE[dtype])


@DTYPES
@THREADS
def test_detached_steps(layer: Any, dtype: torch.dtype, threads: int) -> None:
    given = case(12, 6, 4, 21)
    detach = torch.arange(12) % 3 != 1
    found = Network(layer, dtype, threads).run(*given, None, detach, False)
    assert_same(found, expected(*given, None, detach, False), TOLERANCE[dtype])


@THREADS
def test_operands_of_16_bits(layer: Any, threads: int) -> None:
    """bfloat16 operands with float32 sums: the same walk, with one storage type more."""
    given = case(30, 9, 20, 40)
    lengths = torch.tensor([30, 30, 30, 22, 22, 15, 9, 9, 1])
    found = Network(layer, torch.float32, threads, "_narrow").run(*given, lengths, None, False)
    assert_same(found, expected(*given, lengths, None, False), 2e-2)
    with pytest.raises(AssertionError):  # they are bfloat16
        assert_same(found, expected(*given, lengths, None, False), 1e-4)
