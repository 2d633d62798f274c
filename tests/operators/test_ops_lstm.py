"""The operators themselves: schema, fake, registration, errors, and what the gradient refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import PROJECTED, SHAPES, Shape, random, random_mask, tensors
from throughtime import _ext
from throughtime.ops.lstm import lstm_layer

if _ext.extension is None:
    pytest.skip("the compiled kernels are not in this installation", allow_module_level=True)

ops: Any = torch.ops.throughtime


def forward_arguments(shape: Shape, option: str, save: bool) -> tuple[Any, ...]:
    named = {name: x.detach() for name, x in tensors(shape, torch.float32).items()}
    lengths = torch.arange(shape.B) % (shape.T + 1) if option != "plain" else None
    reset = random_mask(shape.T, shape.B, p=0.3, seed=0) if option != "plain" else None
    bias = named["bias_ih"] if option != "plain" else None
    states = (named["h_0"], named["c_0"], named["weight_ih"], named["weight_hh"])
    weight_hr = named.get("weight_hr")
    optional = (bias, None, weight_hr, lengths, reset, None)
    return (named["input"], *states, *optional, option == "reverse", save)


def backward_arguments(shape: Shape, option: str) -> tuple[Any, ...]:
    arguments = forward_arguments(shape, option, True)
    output, h_n, c_n, saved = ops.lstm_forward(*arguments)
    mask = random_mask(shape.T, p=0.5, seed=1) if option != "plain" else None
    grads = (None, h_n, c_n) if option == "reverse" else (random_like(output), None, None)
    inputs, (_, _, *optional, _, reverse, _) = arguments[:5], arguments[5:]
    return (*grads, *inputs, *optional, mask, output, saved, reverse, True, True)


def random_like(x: Tensor) -> Tensor:
    return random(*x.shape, seed=3, dtype=x.dtype)


@pytest.mark.parametrize("option", ["plain", "all", "reverse"])
@pytest.mark.parametrize("shape", SHAPES + PROJECTED, ids=str)
def test_opcheck(shape: Shape, option: str) -> None:
    torch.library.opcheck(ops.lstm_forward.default, forward_arguments(shape, option, False))
    # What is saved for steps past the end of a sample is never read and so never written: two
    # calls differ there, which the checks that compare values would take for an error.
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = forward_arguments(shape, option, True)
    torch.library.opcheck(ops.lstm_forward.default, arguments, test_utils=checks)
    torch.library.opcheck(ops.lstm_backward.default, backward_arguments(shape, option))


def test_only_the_gradients_asked_for_are_computed() -> None:
    arguments = backward_arguments(PROJECTED[0], "plain")
    without_weights = ops.lstm_backward(*arguments[:-2], True, False)
    assert [x.numel() > 0 for x in without_weights] == [True, True, True, *[False] * 5]
    without_input = ops.lstm_backward(*arguments[:-2], False, True)
    assert [x.numel() > 0 for x in without_input] == [False, *[True] * 7]
    for x, y in zip(without_weights[1:3], without_input[1:3], strict=True):
        assert torch.equal(x, y)


def test_double_backward_names_the_way_out() -> None:
    named = tensors(SHAPES[4])
    states = (named["input"], named["h_0"], named["c_0"], named["weight_ih"], named["weight_hh"])
    output, _, _ = lstm_layer(*states, *[None] * 6, False)
    (first,) = torch.autograd.grad(output.sum(), named["weight_hh"], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        first.square().sum().backward()


def replaced(arguments: tuple[Any, ...], position: int, value: Any) -> tuple[Any, ...]:
    return (*arguments[:position], value, *arguments[position + 1 :])


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(5, 4), r"input should be \[T, B, I\], got 2 dimensions"),
        (0, torch.zeros(5, 4, 9, dtype=torch.float16), r"float32 or float64, got Half"),
        (0, torch.zeros(0, 4, 9), r"Expected sequence length to be larger than 0 in RNN"),
        (1, torch.zeros(3, 8), r"h_0 should have shape \[4, 8\], got \[3, 8\]"),
        (2, torch.zeros(4, 8, dtype=torch.float64), r"c_0 should have dtype Float, got Double"),
        (3, torch.zeros(32, 8), r"weight_ih should have shape \[32, 9\], got \[32, 8\]"),
        (4, torch.zeros(32), r"weight_hh should be \[4H, H or P\]"),
        (5, torch.zeros(31), r"bias_ih should have shape \[32\], got \[31\]"),
        (6, torch.zeros(31), r"bias_hh should have shape \[32\], got \[31\]"),
        (7, torch.zeros(8, 7), r"weight_hr should have shape \[8, 8\], got \[8, 7\]"),
        (8, torch.tensor([1, 2, 3, 6]), r"lengths should be in \[0, 5\].*got 6 for sample 3"),
        (8, torch.tensor([1, 2, -3, 5]), r"lengths should be in \[0, 5\].*got -3 for sample 2"),
        (9, torch.zeros(5, 4), r"reset should have dtype Bool, got Float"),
    ],
)
def test_forward_refuses(position: int, value: Tensor, message: str) -> None:
    arguments = forward_arguments(Shape(5, 4, 9, 8), "plain", True)
    with pytest.raises(RuntimeError, match=message):
        ops.lstm_forward(*replaced(arguments, position, value))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(5, 4, 7), r"grad_output should have shape \[5, 4, 8\]"),
        (1, torch.zeros(4, 7), r"grad_h_n should have shape \[4, 8\]"),
        (11, torch.zeros(4, dtype=torch.bool), r"detach_mask should have shape \[5\]"),
        (11, torch.zeros(5), r"detach_mask should have dtype Bool"),
        (13, torch.zeros(7), r"saved should have shape \[1601\], got \[7\]"),
    ],
)
def test_backward_refuses(position: int, value: Tensor, message: str) -> None:
    arguments = backward_arguments(Shape(5, 4, 9, 8), "plain")
    with pytest.raises(RuntimeError, match=message):
        ops.lstm_backward(*replaced(arguments, position, value))
