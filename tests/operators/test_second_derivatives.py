"""Second derivatives of the compiled kernels: those of the definition, where they are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian
from torch.utils import _pytree as pytree

import calls
from cases import random, runnable
from closeness import assert_all_close
from throughtime import LSTM, accelerate

COMPILED = [name for name in runnable() if name != "reference"]


def outputs(name: str, backend: str, leaves: list[Tensor]) -> list[Tensor]:
    found = pytree.tree_leaves(calls.CALLS[name][0](backend, *leaves))
    return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]


def loss(tensors: Any) -> Tensor:
    return torch.stack([x.square().sum() for x in tensors if x is not None]).sum()


def derivatives(name: str, backend: str, order: int) -> dict[str, Tensor]:
    """Gradients of a loss of gradients, and so on."""
    leaves = calls.leaves(name)
    found: Any = outputs(name, backend, leaves)
    for left in reversed(range(order)):
        found = torch.autograd.grad(
            loss(found), leaves, create_graph=left > 0, materialize_grads=True
        )
    return {str(k): x for k, x in enumerate(found)}


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("name", calls.CALLS)
def test_they_are_the_definitions(name: str, backend: str, order: int) -> None:
    found = derivatives(name, backend, order)
    assert any(x.abs().max() > 1e-3 for x in found.values())
    assert_all_close(found, derivatives(name, "reference", order))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("name", calls.CALLS)
def test_the_first_ones_stay_the_kernels(name: str, backend: str) -> None:
    leaves = calls.leaves(name)
    for one, other in zip(
        *(
            torch.autograd.grad(loss(outputs(name, backend, leaves)), leaves, create_graph=graph)
            for graph in (False, True)
        ),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_gradgradcheck_with_everything_trainable() -> None:
    lstm = LSTM(2, 3, proj_size=2, dtype=torch.float64)
    names = dict(lstm.named_parameters())
    leaves = [random(3, 2, 2, seed=0), random(1, 2, 2, seed=1), random(1, 2, 3, seed=2)]

    def run(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, weights, strict=True))
        output, states = functional_call(lstm, given, (x, (h, c)))
        return output, *states

    assert torch.autograd.gradgradcheck(
        run, (*(x.requires_grad_() for x in leaves), *names.values())
    )


def test_a_gradient_penalty_trains_in_float32_and_bfloat16() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        lstm = LSTM(3, 4, dtype=dtype)
        x = random(5, 2, 3, seed=1).to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(lstm(x)[0].sum(), x, create_graph=True)
        first.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lstm.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}, {"bias": False}]
)
def test_those_of_an_accelerated_nn_lstm_are_torchs(options: dict[str, Any]) -> None:
    lstm = nn.LSTM(3, 4, dtype=torch.float64, **options)
    leaves = [random(5, 2, 3, seed=1).requires_grad_(), *lstm.parameters()]

    def run() -> dict[str, Tensor]:
        first = torch.autograd.grad(loss([lstm(leaves[0])[0]]), leaves, create_graph=True)
        second = torch.autograd.grad(loss(first), leaves)
        return {str(k): x for k, x in enumerate(second)}

    expected = run()
    with accelerate() as handle:
        found = run()
    assert set(handle.calls) == {"cpu kernels"}
    assert_all_close(found, expected)


def test_an_argument_changed_in_between_is_refused() -> None:
    """The kernels do not read a bias again; the definition does."""
    lstm = LSTM(3, 4, dtype=torch.float64)
    x = random(5, 2, 3, seed=1).requires_grad_()
    output, _ = lstm(x)
    with torch.no_grad():
        lstm.bias_ih_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation since the forward"):
        torch.autograd.grad(output.sum(), x, create_graph=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_where_torch_transforms_they_are_refused() -> None:
    lstm = LSTM(3, 4, dtype=torch.float64)

    def total(x: Tensor) -> Tensor:
        return lstm(x)[0].square().sum()

    for run in (hessian(total), grad(lambda x: grad(total)(x).square().sum())):
        with pytest.raises(RuntimeError, match=r'second derivative.*backend="reference"'):
            run(random(5, 2, 3, seed=1))
