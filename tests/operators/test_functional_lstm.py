"""One layer in one direction: every backend, and the reference itself, against a loop by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from cases import (
    DTYPES,
    OPTIONS,
    SMALL,
    Shape,
    as_dtype,
    call,
    options_for,
    plain_lstm,
    random_mask,
    results,
    runnable,
    starts,
    tensors,
)
from closeness import assert_all_close
from throughtime import functional, reference

pytestmark = pytest.mark.usefixtures("poison")


def test_the_inputs_are_not_trivial() -> None:
    named = tensors(SMALL)
    found = results(reference.lstm, named)
    assert all(x.abs().max() > 0.05 for x in found.values())
    detached = results(reference.lstm, named, detach_mask=random_mask(SMALL.T, p=0.5, seed=1))
    assert torch.equal(detached["output"], found["output"])
    assert (detached["grad weight_hh"] - found["grad weight_hh"]).abs().max() > 0.05


size = st.integers(1, 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    shape=st.builds(Shape, size, st.integers(0, 5), size, st.integers(4, 40), st.integers(0, 3)),
    without=st.sets(st.sampled_from(["bias_ih", "bias_hh", "h_0"])),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    recompute=st.booleans(),
    anew=st.booleans(),
)
def test_values_and_gradients(
    dtype: torch.dtype,
    name: str,
    shape: Shape,
    without: set[str],
    p: float,
    recompute: bool,
    anew: bool,
) -> None:
    options = options_for(shape)[name]
    if "detach_mask" in options:
        options["detach_mask"] = random_mask(*options["detach_mask"].shape, p=p, seed=7)
    absent = {*without, "c_0"} if "h_0" in without else without
    named = {key: x for key, x in tensors(shape, dtype).items() if key not in absent}
    if anew and "reset" in options:
        named |= starts(shape, dtype)
    steps = options.get("lengths", torch.tensor(shape.B)).any()
    loop = plain_lstm if steps else reference.lstm  # without a step the loop has no graph
    exact = results(loop, as_dtype(named, torch.float64), **options)
    expected = {key: x.to(dtype) for key, x in exact.items()}
    for backend in runnable(shape.P):
        run = partial(functional.lstm, backend=backend, recompute=recompute)
        assert_all_close(results(run, named, **options), expected)


@pytest.mark.parametrize("name", ["mask-T", "mask-TB", "mask-all", "all", "all-reverse"])
def test_h_detach_gradient_is_the_derivative_with_the_detached_states_frozen(name: str) -> None:
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

    def frozen_lstm(*leaves: Tensor) -> tuple[Tensor, ...]:
        out, states = call(
            plain_lstm, dict(zip(named, leaves, strict=True)), frozen=frozen, **options
        )
        return out, *states

    assert gradcheck(frozen_lstm, tuple(named.values()))
    expected = results(plain_lstm, named, frozen=frozen, **options)
    assert_all_close(results(reference.lstm, named, **options), expected)


@pytest.mark.parametrize("name", ["plain", "reverse", "lengths-reverse", "reset"])
@pytest.mark.parametrize("shape", [Shape(3, 2, 2, 3), Shape(3, 2, 2, 3, 2)], ids=str)
def test_second_derivatives_of_the_reference(shape: Shape, name: str) -> None:
    named, options = tensors(shape), options_for(shape)[name]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        out, states = call(reference.lstm, dict(zip(named, leaves, strict=True)), **options)
        return out, *states

    assert gradgradcheck(function, tuple(named.values()))


def test_double_backward_with_a_mask_is_that_of_the_loop() -> None:
    named = tensors(SMALL)
    mask = random_mask(SMALL.T, SMALL.B, p=0.5, seed=4)
    second = []
    for function in (reference.lstm, plain_lstm):
        output, _ = call(function, named, detach_mask=mask)
        first = torch.autograd.grad(output.square().sum(), named["weight_hh"], create_graph=True)
        grads = torch.autograd.grad(
            first[0].square().sum(), list(named.values()), materialize_grads=True
        )
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


def test_vmap_and_the_meta_device() -> None:
    named = {name: x.detach() for name, x in tensors(SMALL).items()}
    masks = random_mask(4, SMALL.T, p=0.5, seed=5)

    def loss(weight_hh: Tensor, mask: Tensor) -> Tensor:
        output, _ = call(reference.lstm, named | {"weight_hh": weight_hh}, detach_mask=mask)
        return output.square().sum()

    per_mask = torch.func.vmap(torch.func.grad(loss), (None, 0))(named["weight_hh"], masks)
    for mask, gradient in zip(masks, per_mask, strict=True):
        expected = torch.func.grad(loss)(named["weight_hh"], mask)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)

    meta = {name: x.to("meta") for name, x in named.items()}
    lengths = torch.tensor([6, 1, 3])  # may stay on the CPU
    output, (h_n, c_n) = call(functional.lstm, meta, lengths=lengths, backend="reference")
    assert output.shape == (6, 3, 5) and h_n.shape == c_n.shape == (3, 5) and output.is_meta
