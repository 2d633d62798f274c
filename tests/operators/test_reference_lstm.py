"""The reference against a hand-written loop, and its derivatives against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cases import (
    LOW_PRECISION,
    SMALL,
    Shape,
    as_dtype,
    call,
    options_for,
    plain_lstm,
    random_mask,
    results,
    tensors,
)
from closeness import assert_all_close
from throughtime import reference

pytestmark = pytest.mark.usefixtures("poison")


def test_the_inputs_are_not_trivial() -> None:
    named = tensors(SMALL)
    found = results(reference.lstm, named)
    assert all(x.abs().max() > 0.05 for x in found.values())
    cut = results(reference.lstm, named, detach_mask=random_mask(SMALL.T, p=0.5, seed=1))
    assert torch.equal(cut["output"], found["output"])
    assert (cut["grad weight_hh"] - found["grad weight_hh"]).abs().max() > 0.05


@pytest.mark.parametrize("without", ["bias_ih", "bias_hh", "both"])
def test_biases_are_optional(without: str) -> None:
    named = tensors(SMALL)
    for name in ("bias_ih", "bias_hh"):
        if without in (name, "both"):
            del named[name]
    assert_all_close(results(reference.lstm, named), results(plain_lstm, named))


def test_state_is_zero_without_hx() -> None:
    named = tensors(SMALL)
    del named["h_0"], named["c_0"]
    output, (h_n, c_n) = call(reference.lstm, named)
    zeros = tensors(SMALL)
    zeros["h_0"], zeros["c_0"] = torch.zeros(3, 5).double(), torch.zeros(3, 5).double()
    expected, (expected_h, expected_c) = call(reference.lstm, zeros)
    assert torch.equal(output, expected)
    assert torch.equal(h_n, expected_h) and torch.equal(c_n, expected_c)


@pytest.mark.parametrize("name", ["mask-T", "mask-TB", "mask-all", "all", "all-reverse"])
def test_h_detach_gradient_is_the_derivative_with_the_cut_states_frozen(name: str) -> None:
    """Finite differences of a function in which the detached states are constants."""
    shape = Shape(4, 2, 2, 3)
    named, options = tensors(shape), options_for(shape)[name]
    output, _ = call(plain_lstm, named, **options)
    h_0, reset = named["h_0"].detach().clone(), options.get("reset")
    lengths, back = options.get("lengths"), bool(options.get("reverse"))
    frozen = {}
    for b in range(shape.B):
        end = shape.T if lengths is None else int(lengths[b])
        for t in range(end):
            before = t + 1 if back else t - 1
            h = output[before, b].detach() if 0 <= before < end else h_0[b]
            frozen[t, b] = torch.zeros_like(h) if reset is not None and reset[t, b] else h

    def frozen_lstm(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, states = call(
            plain_lstm, dict(zip(named, leaves, strict=True)), frozen=frozen, **options
        )
        return out, *states

    leaves = tuple(named.values())
    assert gradcheck(frozen_lstm, leaves)
    found = results(reference.lstm, named, **options)
    expected = results(plain_lstm, named, frozen=frozen, **options)
    assert_all_close(found, expected)


@pytest.mark.parametrize("name", ["plain", "reverse", "lengths-reverse", "reset"])
@pytest.mark.parametrize("shape", [Shape(3, 2, 2, 3), Shape(3, 2, 2, 3, 2)], ids=str)
def test_gradcheck_and_gradgradcheck(shape: Shape, name: str) -> None:
    named, options = tensors(shape), options_for(shape)[name]

    def function(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, states = call(reference.lstm, dict(zip(named, leaves, strict=True)), **options)
        return out, *states

    leaves = tuple(named.values())
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_double_backward_with_a_mask_is_that_of_the_loop() -> None:
    named = tensors(SMALL)
    mask = random_mask(SMALL.T, SMALL.B, p=0.5, seed=4)
    second = []
    for function in (reference.lstm, plain_lstm):
        output, _ = call(function, named, detach_mask=mask)
        first = torch.autograd.grad(output.square().sum(), named["weight_hh"], create_graph=True)
        leaves = list(named.values())
        norm = first[0].square().sum()
        grads = torch.autograd.grad(norm, leaves, allow_unused=True, materialize_grads=True)
        second.append(dict(zip(named, grads, strict=True)))
    assert second[0]["input"].abs().max() > 1e-3
    assert_all_close(*second)


def test_backward_of_the_time_axis_is_linear() -> None:
    """Indexing by t would leave one full-sized gradient per step in the graph."""
    output, _ = call(reference.lstm, tensors(SMALL))
    names, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in names:
            names.add(node)
            stack += [following for following, _ in node.next_functions]
    assert not [node for node in names if node.name().startswith(("Select", "Index"))]


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    named = as_dtype(tensors(Shape(24, 2, 4, 12)), dtype)
    found, single = (results(reference.lstm, x) for x in (named, as_dtype(named, torch.float32)))
    for name in ("output", "h_n", "c_n"):
        assert torch.equal(found[name], single[name].to(dtype))


def test_works_under_vmap_and_on_the_meta_device() -> None:
    named = {name: x.detach() for name, x in tensors(SMALL).items()}
    masks = random_mask(4, SMALL.T, p=0.5, seed=5)

    def loss(weight_hh: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        output, _ = call(reference.lstm, named | {"weight_hh": weight_hh}, detach_mask=mask)
        return output.square().sum()

    per_mask = torch.func.vmap(torch.func.grad(loss), (None, 0))(named["weight_hh"], masks)
    for mask, gradient in zip(masks, per_mask, strict=True):
        expected = torch.func.grad(loss)(named["weight_hh"], mask)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)

    meta = {name: x.to("meta") for name, x in named.items()}
    output, (h_n, c_n) = call(reference.lstm, meta)
    assert output.shape == (6, 3, 5) and h_n.shape == c_n.shape == (3, 5)
    assert output.device.type == "meta"
