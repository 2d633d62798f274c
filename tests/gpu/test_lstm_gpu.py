"""The LSTM as GPUs run it - projection, recurrence, products - through Triton's interpreter."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

import throughtime
from cases import NAMES, Shape, as_dtype, random, random_mask, results, tensors
from closeness import assert_all_close
from throughtime import functional

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

# Relative to the largest entry. The interpreter truncates to bfloat16 where a GPU rounds.
LOW_PRECISION = {torch.float16: 4e-3, torch.bfloat16: 6e-2}
SHAPE = Shape(4, 3, 2, 5)
LENGTHS = torch.tensor([3, 0, 4])
RESET = random_mask(4, 3, p=0.4, seed=1)
MASK = random_mask(4, 3, p=0.5, seed=2)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"detach_mask": MASK[:, 0]},
    {"detach_mask": MASK, "reset": RESET, "reverse": True},
    {"detach_mask": MASK, "reset": RESET, "lengths": LENGTHS},
    {"detach_mask": MASK, "reset": RESET, "lengths": LENGTHS, "reverse": True},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_layer_matches_the_reference(options: dict[str, Any], dtype: torch.dtype) -> None:
    given = {name: x.detach() for name, x in tensors(SHAPE, dtype).items()}
    expected = results(functional.lstm, as_dtype(given, dtype), backend="reference", **options)
    if "lengths" in options:
        given["input"][torch.arange(4).unsqueeze(1) >= LENGTHS] = torch.nan
    assert_all_close(
        results(functional.lstm, as_dtype(given, dtype), backend="triton", **options), expected
    )


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[4]], ids=lambda o: "-".join(o))
def test_low_precision_is_close(options: dict[str, Any], dtype: torch.dtype) -> None:
    given = {name: x.detach() for name, x in tensors(SHAPE, dtype).items()}
    exact = results(functional.lstm, as_dtype(given, torch.float64), backend="reference", **options)
    found = results(functional.lstm, as_dtype(given, dtype), backend="triton", **options)
    for name, wanted in exact.items():
        assert found[name].dtype == dtype, name
        error = (found[name].double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)
        assert error < LOW_PRECISION[dtype], f"{name}: {error:.2e}"


@pytest.mark.parametrize(
    "left_out", [("bias_ih",), ("bias_hh",), ("bias_ih", "bias_hh"), ("h_0", "c_0")]
)
def test_what_may_be_missing(left_out: tuple[str, ...]) -> None:
    given = {n: x for n, x in tensors(SHAPE).items() if n not in left_out}
    expected = results(functional.lstm, given, backend="reference")
    assert_all_close(results(functional.lstm, given, backend="triton"), expected)


def test_only_what_needs_a_gradient_gets_one() -> None:
    given = {name: x.detach() for name, x in tensors(SHAPE).items()}
    for name in NAMES[:7]:
        leaf = given[name].clone().requires_grad_()
        args = {**given, name: leaf}
        got = []
        for backend in ("triton", "reference"):
            output, _ = functional.lstm(
                args["input"], (args["h_0"], args["c_0"]), *(args[n] for n in NAMES[3:7]),
                backend=backend, reset=RESET,
            )  # fmt: skip
            got.append(torch.autograd.grad(output.sum(), leaf)[0])
        assert_all_close({name: got[0]}, {name: got[1]})


def test_strides_one_state_for_both_and_no_grad() -> None:
    given = tensors(Shape(4, 3, 2, 2))
    input = given["input"].transpose(0, 1).contiguous().transpose(0, 1)
    weights = [given[name] for name in NAMES[3:7]]
    hx = (given["h_0"], given["h_0"])
    wanted, _ = functional.lstm(input, hx, *weights, backend="reference")
    found, _ = functional.lstm(input, hx, *weights, backend="triton")
    assert_all_close({"output": found.detach()}, {"output": wanted.detach()})
    with torch.no_grad():
        found, _ = functional.lstm(input, hx, *weights, backend="triton")
    assert not found.requires_grad
    assert_all_close({"output": found}, {"output": wanted.detach()})


def spread(x: Tensor) -> Tensor:
    """The same values, each between two that are not."""
    if x.dtype == torch.bool:
        return torch.stack((~x, x, ~x), -1)[..., 1]
    return torch.stack((torch.full_like(x, 9), x, torch.full_like(x, 9)), -1)[..., 1]


@pytest.mark.parametrize("reverse", [False, True])
def test_operators_take_any_strides(reverse: bool) -> None:
    T, B, H = 4, 3, 5
    forward = torch.ops.throughtime.lstm_recurrence_forward_triton
    backward = torch.ops.throughtime.lstm_recurrence_backward_triton
    bias, h_0, c_0, weight_hh = (
        random(*shape, seed=k) for k, shape in enumerate(((4 * H,), (B, H), (B, H), (4 * H, H)))
    )
    whole = random(T, 1, 4 * H, seed=5).expand(T, B, -1)
    mask = MASK[:, :1].expand(T, B)
    given = (whole, bias, h_0, c_0, weight_hh, LENGTHS, mask)
    assert not (whole.is_contiguous() or mask.is_contiguous())
    dense = forward(*(x.contiguous() for x in given), reverse, True)
    strided = forward(*given[:1], *map(spread, given[1:]), reverse, True)
    valid = torch.arange(T).unsqueeze(1) < LENGTHS
    for one, other in zip(dense, strided, strict=True):
        assert torch.equal(*((x[valid] if x.dim() == 3 else x) for x in (one, other)))
    grads = (random(B, T, H, seed=6).transpose(0, 1), random(B, H, seed=7), random(B, H, seed=8))
    after = (*grads, c_0, weight_hh, *(x.nan_to_num() for x in dense[3:]), LENGTHS, mask, mask)
    found = backward(*after[:1], *map(spread, after[1:]), reverse)
    for one, other in zip(backward(*(x.contiguous() for x in after), reverse), found, strict=True):
        assert torch.equal(one, other) and one.any()


def test_a_second_derivative_is_refused() -> None:
    given = tensors(SHAPE)
    weights = [given[name] for name in NAMES[3:7]]
    output, _ = functional.lstm(given["input"], None, *weights, backend="triton")
    (grad,) = torch.autograd.grad(output.sum(), given["input"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"LSTM kernels can be differentiated once.*reference"):
        grad.sum().backward()


def test_module_runs_where_it_is_asked_to() -> None:
    layer = throughtime.LSTM(
        2, 3, num_layers=2, bidirectional=True, detach_prob=0.5, backend="triton"
    )
    x = torch.randn(4, 2, 2)
    mask = random_mask(4, 4, 1, p=0.5, seed=3)
    grads = []
    for backend in ("triton", "reference"):
        layer.zero_grad()
        layer.backend = backend
        output, _ = layer(x, detach_mask=mask)
        output.square().sum().backward()
        grads.append({"output": output.detach()} | {
            n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None
        })  # fmt: skip
    assert len(grads[0]) == 17
    assert_all_close(*grads)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_operators_pass_opcheck(lengths: Tensor | None) -> None:
    forward = torch.ops.throughtime.lstm_recurrence_forward_triton.default
    backward = torch.ops.throughtime.lstm_recurrence_backward_triton.default
    T, B, H = 4, 3, 5
    states = (random(B, H, seed=2), random(B, H, seed=3), random(4 * H, H, seed=4))
    projected, bias = random(T, B, 4 * H, seed=1), random(4 * H, seed=5)
    # Fakes and schemas; gradients are lstm_gpu_forward's.
    checks = ("test_schema", "test_faketensor")
    args = (projected, bias, *states, lengths, RESET, True, True)
    torch.library.opcheck(forward, args, test_utils=checks)
    output, h_n, c_n, gates, cells = forward(*args)
    # Past the end they are unset; opcheck compares all of what it gets.
    gates, cells = gates.nan_to_num(), cells.nan_to_num()
    grads = (output, h_n, c_n, *states[1:], gates, cells, lengths, RESET, MASK, True)
    torch.library.opcheck(backward, grads, test_utils=checks)
