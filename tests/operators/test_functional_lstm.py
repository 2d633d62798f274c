"""One layer in one direction, on every backend that can run here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import (
    DTYPES,
    LOW_PRECISION,
    OPTIONS,
    PROJECTED,
    SHAPES,
    SMALL,
    Shape,
    as_dtype,
    call,
    options_for,
    plain_lstm,
    random,
    random_mask,
    results,
    runnable,
    tensors,
    with_gradients,
)
from closeness import assert_all_close, assert_close, assert_no_worse_than_plain
from throughtime import functional

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES + PROJECTED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(backend: str, dtype: torch.dtype, shape: Shape, name: str) -> None:
    named, options = tensors(shape, dtype), options_for(shape)[name]
    exact = results(plain_lstm, as_dtype(named, torch.float64), **options)
    expected = {key: x.to(dtype) for key, x in exact.items()}
    assert_all_close(results(functional.lstm, named, backend=backend, **options), expected)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.builds(
        Shape, st.integers(1, 9), st.integers(0, 5), st.integers(1, 9), st.integers(1, 40)
    ),
    name=st.sampled_from(OPTIONS),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]),
)
def test_every_backend_agrees_with_the_reference(
    shape: Shape, name: str, bias: bool, p: float
) -> None:
    named, options = tensors(shape, bias=bias), options_for(shape)[name]
    if "detach_mask" in options:
        options["detach_mask"] = random_mask(*options["detach_mask"].shape, p=p, seed=7)
    expected = results(functional.lstm, named, backend="reference", **options)
    for backend in runnable():
        assert_all_close(results(functional.lstm, named, backend=backend, **options), expected)


def test_masks_of_all_kinds_mean_the_same(backend: str) -> None:
    named = tensors(SMALL)

    def found(mask: Tensor | None) -> dict[str, Tensor]:
        return results(functional.lstm, named, detach_mask=mask, backend=backend)

    mask, without = random_mask(SMALL.T, p=0.5, seed=1), found(None)
    by_step, by_sample = found(mask), found(mask.unsqueeze(1).expand(SMALL.T, SMALL.B))
    assert_all_close(by_sample, by_step)
    never = found(mask & False)
    assert all(torch.equal(never[name], without[name]) for name in without)
    for name in ("output", "h_n", "c_n"):
        assert torch.equal(by_step[name], without[name]), "a mask does not touch the forward pass"


@pytest.mark.parametrize("reverse", [False, True])
def test_the_first_step_detaches_h_0_but_not_c_0(backend: str, reverse: bool) -> None:
    named = tensors(SMALL)
    mask = torch.zeros(SMALL.T, dtype=torch.bool)
    mask[-1 if reverse else 0] = True
    found = results(functional.lstm, named, detach_mask=mask, reverse=reverse, backend=backend)
    assert not found["grad h_0"].any()
    assert found["grad c_0"].abs().min() > 1e-6


def test_weight_hh_keeps_its_gradient_at_detached_steps(backend: str) -> None:
    """With one step the gradient of weight_hh is dgates^T h_0, detached or not."""
    named = tensors(Shape(1, 3, 4, 5))
    detached, full = (
        results(functional.lstm, named, detach_mask=torch.tensor([on]), backend=backend)
        for on in (True, False)
    )
    assert detached["grad weight_hh"].abs().max() > 1e-3
    assert_close(detached["grad weight_hh"], full["grad weight_hh"])


@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_equal_each_sample_run_alone(backend: str, reverse: bool) -> None:
    named = tensors(SMALL)
    lengths = [4, 0, 6]
    options = {"reverse": reverse, "backend": backend}
    output, (h_n, c_n) = call(functional.lstm, named, lengths=torch.tensor(lengths), **options)
    for b, length in enumerate(lengths):
        assert not output[length:, b].any()
        if length == 0:
            assert torch.equal(h_n[b], named["h_0"][b]) and torch.equal(c_n[b], named["c_0"][b])
            continue
        alone = named | {name: named[name][b : b + 1] for name in ("h_0", "c_0")}
        alone["input"] = named["input"][:length, b : b + 1]
        expected, (expected_h, expected_c) = call(functional.lstm, alone, **options)
        assert_close(output[:length, b : b + 1], expected)
        assert_close(h_n[b : b + 1], expected_h)
        assert_close(c_n[b : b + 1], expected_c)


def test_reset_equals_each_episode_run_alone(backend: str) -> None:
    named = tensors(SMALL)
    reset = torch.zeros(SMALL.T, SMALL.B, dtype=torch.bool)
    reset[4] = True
    found = results(functional.lstm, named, reset=reset, backend=backend)
    start = results(functional.lstm, named | {"input": _part(named, 0, 4)}, backend=backend)
    zeros = {name: torch.zeros_like(named[name]).requires_grad_() for name in ("h_0", "c_0")}
    end = results(functional.lstm, named | zeros | {"input": _part(named, 4, 6)}, backend=backend)
    assert_close(found["output"], torch.cat([start["output"], end["output"]]))
    assert_close(found["h_n"], end["h_n"])
    assert_close(found["c_n"], end["c_n"])


def _part(named: dict[str, Tensor], begin: int, end: int) -> Tensor:
    return named["input"].detach()[begin:end].requires_grad_()


def test_a_reset_past_the_end_changes_nothing(backend: str) -> None:
    named, lengths = tensors(SMALL), torch.tensor([2, 6, 3])
    reset = torch.zeros(SMALL.T, SMALL.B, dtype=torch.bool)
    reset[4, 0] = reset[3, 2] = True
    options = {"lengths": lengths, "backend": backend}
    expected = results(functional.lstm, named, **options)
    assert_all_close(results(functional.lstm, named, reset=reset, **options), expected)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-2, -1).contiguous().transpose(-2, -1) if x.dim() > 1 else sliced(x)


def offset(x: Tensor) -> Tensor:
    return torch.cat([x.flatten()[:3], x.flatten()])[3:].view(x.shape)


def sliced(x: Tensor) -> Tensor:
    wide = torch.full([2 * size + 1 for size in x.shape], 1e30 if x.is_floating_point() else 1)
    index = tuple(slice(1, None, 2) for _ in x.shape)
    wide = wide.to(x.dtype)
    wide[index] = x
    return wide[index]


def expanded(x: Tensor) -> Tensor:
    """Equal along the batch, in one place; weights as they are."""
    return x[..., :1, :].expand(x.shape) if x.dim() > 1 and x.size(-2) == SMALL.B else x


@pytest.mark.parametrize("layout", [sliced, transposed, expanded, offset], ids=lambda f: f.__name__)
def test_any_strides(backend: str, layout: Callable[[Tensor], Tensor]) -> None:
    named, options = tensors(SMALL), options_for(SMALL)["all"]
    strange = {name: layout(x.detach()).requires_grad_() for name, x in named.items()}
    # A mask [T, B] is expanded over the batch.
    masks = {
        name: layout(x.T).T if x.dim() == 2 and layout is expanded else layout(x)
        for name, x in options.items()
    }
    dense = {name: x.detach().contiguous().requires_grad_() for name, x in strange.items()}
    expected = results(
        functional.lstm, dense, backend=backend, **{n: x.contiguous() for n, x in masks.items()}
    )
    changed = [x for x in (*strange.values(), *masks.values()) if not x.is_contiguous()]
    assert len(changed) >= 4 or layout is offset
    found = results(functional.lstm, strange, backend=backend, **masks)
    assert_all_close(found, expected)


@pytest.mark.parametrize("kind", ["transposed", "expanded", "sliced"])
def test_gradients_that_arrive_with_strange_strides(backend: str, kind: str) -> None:
    named = tensors(SMALL)
    output, states = call(functional.lstm, named, backend=backend)
    found, leaves = (output, *states), list(named.values())
    strange = {
        "transposed": lambda x, k: random(*reversed(x.shape), seed=k).permute(
            *reversed(range(x.dim()))
        ),
        "expanded": lambda x, k: torch.ones((), dtype=x.dtype).expand(x.shape),
        "sliced": lambda x, k: random(*x.shape, 2, seed=k)[..., 1],
    }[kind]
    grads = [strange(x, k) for k, x in enumerate(found)]
    dense = [grad.contiguous() for grad in grads]
    assert not any(grad.is_contiguous() for grad in grads)
    for name, x, y in zip(
        named,
        torch.autograd.grad(found, leaves, grads, retain_graph=True),
        torch.autograd.grad(found, leaves, dense),
        strict=True,
    ):
        assert_close(x, y, name)


@pytest.mark.parametrize("used", ["output", "h_n", "c_n"])
def test_gradient_through_one_result_alone(backend: str, used: str) -> None:
    named = tensors(SMALL)
    found = []
    for function, options in ((functional.lstm, {"backend": backend}), (plain_lstm, {})):
        output, (h_n, c_n) = call(function, named, **options)
        loss = {"output": output, "h_n": h_n, "c_n": c_n}[used].square().sum()
        grads = torch.autograd.grad(loss, list(named.values()))
        found.append(dict(zip(named, grads, strict=True)))
    assert_all_close(*found)


@pytest.mark.parametrize("wanted", ["input", "h_0", "c_0", "weight_ih", "weight_hh", "bias_ih"])
def test_gradient_of_one_argument_alone(backend: str, wanted: str) -> None:
    named = tensors(SMALL)
    options = options_for(SMALL)["mask-TB"] | {"backend": backend}
    expected = results(functional.lstm, named, **options)[f"grad {wanted}"]
    alone = {name: x.detach().requires_grad_(name == wanted) for name, x in named.items()}
    output, (h_n, c_n) = call(functional.lstm, alone, **options)
    loss = sum((x * random(*x.shape, seed=100 + k)).sum() for k, x in enumerate((output, h_n, c_n)))
    (gradient,) = torch.autograd.grad(loss, alone[wanted])
    assert_close(gradient, expected)


def test_gradcheck(backend: str) -> None:
    named = tensors(Shape(3, 2, 2, 3))
    lengths = torch.tensor([3, 1])

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        made = dict(zip(named, leaves, strict=True))
        out, states = call(functional.lstm, made, lengths=lengths, backend=backend)
        return out, *states

    assert torch.autograd.gradcheck(function, tuple(named.values()))


def test_empty_batch(backend: str) -> None:
    shape = Shape(4, 0, 3, 5)
    found = results(functional.lstm, tensors(shape), backend=backend, **options_for(shape)["all"])
    assert found["output"].shape == (4, 0, 5)
    assert found["h_n"].shape == found["c_n"].shape == (0, 5)
    assert found["grad weight_hh"].shape == (20, 5) and not found["grad weight_hh"].any()


def test_nan_stays_in_its_sample(backend: str) -> None:
    named = tensors(SMALL)
    dirty = named["input"].detach().clone()
    dirty[2, 1] = torch.nan
    found, clean = {}, {}
    for store, x in ((found, dirty), (clean, named["input"].detach())):
        leaves = named | {"input": x.requires_grad_()}
        output, (h_n, c_n) = call(functional.lstm, leaves, backend=backend)
        (grad,) = torch.autograd.grad(output.sum() + h_n.sum() + c_n.sum(), leaves["input"])
        store |= {"output": output, "h_n": h_n, "c_n": c_n, "grad": grad}
    others = [0, 2]
    assert found["output"][2:, 1].isnan().all() and not found["output"][:2, 1].isnan().any()
    assert found["h_n"][1].isnan().all()
    for name in ("output", "grad"):
        assert_close(found[name][:, others], clean[name][:, others])
    assert_close(found["c_n"][others], clean["c_n"][others])


def test_nan_in_the_padding_reaches_nothing(backend: str) -> None:
    named = tensors(SMALL)
    options = {"lengths": torch.tensor([2, 6, 0]), "backend": backend}
    options["detach_mask"] = random_mask(SMALL.T, SMALL.B, p=0.5, seed=3)
    clean = results(functional.lstm, named, **options)
    dirty = named["input"].detach().clone()
    dirty[2:, 0] = dirty[:, 2] = torch.nan
    named["input"] = dirty.requires_grad_()
    assert_all_close(results(functional.lstm, named, **options), clean)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_low_precision(backend: str, dtype: torch.dtype, name: str) -> None:
    shape = Shape(10, 3, 4, 16)
    named, options = as_dtype(tensors(shape), dtype), options_for(shape)[name]
    exact = results(plain_lstm, as_dtype(named, torch.float64), **options)
    plain = results(plain_lstm, named, **options)
    found = results(functional.lstm, named, backend=backend, **options)
    assert_no_worse_than_plain(found, plain, exact)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_autocast_is_the_same_as_casting(backend: str, dtype: torch.dtype) -> None:
    named = tensors(SMALL, torch.float32)
    with torch.autocast("cpu", dtype):
        result = call(functional.lstm, named, backend=backend)
    found = with_gradients(result, named)
    expected = results(functional.lstm, as_dtype(named, dtype), backend=backend)
    assert found["output"].dtype == found["c_n"].dtype == dtype
    assert found["grad weight_hh"].dtype == torch.float32
    for name in ("output", "h_n", "c_n"):
        assert torch.equal(found[name], expected[name])
    assert torch.equal(found["grad weight_hh"].to(dtype), expected["grad weight_hh"])


def test_autocast_leaves_float64_alone(backend: str) -> None:
    named = tensors(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(functional.lstm, named, backend=backend)
    expected = results(functional.lstm, named, backend=backend)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_results_are_bit_equal_from_run_to_run_and_arguments_unchanged(backend: str) -> None:
    shape = Shape(20, 9, 5, 33)
    named, options = tensors(shape, torch.float32), options_for(shape)["all"]
    before = {name: x.detach().clone() for name, x in named.items()}
    first = results(functional.lstm, named, backend=backend, **options)
    again = results(functional.lstm, named, backend=backend, **options)
    assert all(torch.equal(again[name], x) for name, x in first.items())
    assert all(torch.equal(named[name], x) for name, x in before.items())


def test_states_may_be_the_same_tensor(backend: str) -> None:
    named = tensors(SMALL)
    zeros = torch.zeros(SMALL.B, SMALL.H, dtype=torch.float64)
    weights = [named[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    output, _ = functional.lstm(named["input"], (zeros, zeros), *weights, backend=backend)
    expected, _ = functional.lstm(named["input"], None, *weights, backend=backend)
    assert torch.equal(output, expected)


def test_lengths_on_the_cpu_or_beside_the_input(backend: str) -> None:
    named = {name: x.detach() for name, x in tensors(SMALL).items()}
    lengths = torch.tensor([6, 1, 3], dtype=torch.int64)
    output, _ = call(functional.lstm, named, lengths=lengths, backend=backend)
    assert (output.abs().sum(2) > 0).sum(0).tolist() == [6, 1, 3]
    meta = {name: x.to("meta") for name, x in named.items()}
    output, _ = call(functional.lstm, meta, lengths=lengths, backend="reference")
    assert output.shape == (6, 3, 5)
