"""sigmoid, tanh, e^x and their derivatives in the CPU kernels, over all floating point numbers.

A result that is no normal number may be zero; every other is within 4 units in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from throughtime import _ext
from throughtime.functional import lstm, relevancy_attention

if _ext.extension is None:
    pytest.skip("the compiled kernels are not in this installation", allow_module_level=True)
kernels: Any = _ext.extension

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
ULPS = 4.0
# Where e^x, and so sigmoid, is the least normal number.
LEAST_LOG = {torch.float32: -126 * math.log(2), torch.float64: -1022 * math.log(2)}


def every_exponent(dtype: torch.dtype, mantissas: int) -> Tensor:
    """Numbers of both signs and every exponent, subnormal ones included."""
    wide = torch.int32 if dtype == torch.float32 else torch.int64
    bits, exponents = (23, 255) if dtype == torch.float32 else (52, 2047)
    generator = torch.Generator().manual_seed(1)
    mantissa = torch.randint(0, 2**bits, (exponents, mantissas), generator=generator)
    mantissa[:, 0], mantissa[:, 1] = 0, 2**bits - 1
    x = ((torch.arange(exponents).unsqueeze(1) << bits) | mantissa).to(wide).view(dtype).flatten()
    return torch.cat([x, -x])


def arguments(dtype: torch.dtype) -> Tensor:
    """Every exponent, and densely where the functions change and where results become subnormal."""
    least, count = LEAST_LOG[dtype], 100_003 if dtype == torch.float32 else 1_003
    edge = torch.linspace(least - 0.5, least + 0.5, count, dtype=torch.float64)
    near = torch.linspace(-40, 40, count, dtype=torch.float64)
    dense = torch.cat([edge, -edge, near]).to(dtype)
    return torch.cat([every_exponent(dtype, 300 if dtype == torch.float32 else 3), dense])


def exact(function: str, x: Tensor) -> Tensor:
    """The nearest float64 of the true value."""
    if x.dtype == torch.float32:  # float64 has digits to spare, and must not flush
        return getattr(torch, function)(x.double()) if function != "exp" else x.double().exp()
    with mpmath.workdps(30):
        of = {"sigmoid": lambda v: 1 / (1 + mpmath.exp(-v)), "exp": mpmath.exp, "tanh": mpmath.tanh}
        values = [float(of[function](mpmath.mpf(v))) for v in x.tolist()]
    return torch.tensor(values, dtype=torch.float64)


def assert_few_ulps(found: Tensor, wanted: Tensor, x: Tensor, ulps: float = ULPS) -> None:
    info = torch.finfo(found.dtype)
    normal = wanted.abs() >= info.tiny
    rounded = wanted.to(found.dtype).abs()
    spacing = torch.nextafter(rounded, torch.full_like(rounded, math.inf)) - rounded
    error = torch.where(normal, (found.double() - wanted).abs() / spacing.double(), 0.0)
    worst = error.argmax()
    assert error[worst] <= ulps, f"{error[worst]:.1f} ulp at {x[worst].item()!r}"
    assert (found[~normal].double().abs() <= 2 * info.tiny).all()


@pytest.fixture(scope="module")
def cases() -> Callable[[str, torch.dtype], tuple[Tensor, Tensor]]:
    """Arguments and exact values; those of float64 are made once for all instruction sets."""
    known: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] = {}

    def get(function: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if (function, dtype) not in known:
            x = arguments(dtype)
            x = x[(x <= 0) & x.isfinite()] if function == "exp" else x
            known[function, dtype] = x, exact(function, x)
        return known[function, dtype]

    return get


def kernel(x: Tensor, function: str) -> Tensor:
    found = x.clone()
    is_double = x.dtype == torch.float64
    kernels.nonlinearity(found.data_ptr(), found.numel(), is_double, function == "tanh")
    return found


@DTYPES
@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_a_few_ulp_everywhere(isa: str, function: str, dtype: torch.dtype, cases: Any) -> None:
    x, wanted = cases(function, dtype)
    assert_few_ulps(kernel(x, function), wanted, x)


@DTYPES
@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_the_ends(isa: str, function: str, dtype: torch.dtype) -> None:
    x = torch.tensor([math.inf, -math.inf, 0.0, -0.0, -2000.0, 2000.0], dtype=dtype)
    found = kernel(x, function)
    assert torch.equal(found, getattr(torch, function)(x))
    assert torch.equal(found.signbit(), getattr(torch, function)(x).signbit())
    wide = torch.int32 if dtype == torch.float32 else torch.int64
    quiet = torch.tensor(math.nan, dtype=dtype).view(wide)
    payloads = quiet | torch.tensor([0, 1, 77, 2**20 - 1], dtype=wide)
    nan = torch.cat([payloads.view(dtype), -payloads.view(dtype)])
    assert nan.isnan().all() and kernel(nan, function).isnan().all()


@DTYPES
def test_softmax_is_exact_to_its_smallest_weights(isa: str, dtype: torch.dtype, cases: Any) -> None:
    """Of two keys with scores 0 and x the second has the weight e^x / (1 + e^x)."""
    x, _ = cases("exp", dtype)
    key = torch.stack([torch.zeros_like(x), x], 1).view(len(x), 1, 2, 1)
    value = torch.tensor([0.0, 1.0], dtype=dtype).view(1, 1, 2, 1).expand(len(x), 1, 2, 1)
    query = torch.ones(1, 1, 1, 1, dtype=dtype).expand(len(x), 1, 2, 1)
    weight = relevancy_attention(query, key, value, 2, 0, scale=1.0, backend="cpu")[:, 0, 1, 0]
    assert_few_ulps(weight, exact("sigmoid", x), x)


@DTYPES
def test_derivatives(isa: str, dtype: torch.dtype, cases: Any) -> None:
    """dL/da of the input gate with dL/dc = g = 1 is sigmoid'(a), and 0 where sigmoid is 0."""
    x, _ = cases("sigmoid", dtype)
    x = x[x < 0]
    hidden = len(x)
    bias = torch.zeros(4, hidden, dtype=dtype)
    bias[0], bias[2] = x, 50.0  # g = 1
    bias = bias.flatten().requires_grad_()
    zeros = torch.zeros(4 * hidden, 1, dtype=dtype)
    recurrent = torch.zeros(1, 1, dtype=dtype).expand(4 * hidden, 1)
    _, (_, c_n) = lstm(
        torch.zeros(1, 1, 1, dtype=dtype),
        None,
        zeros,
        recurrent,
        bias,
        weight_hr=torch.zeros(1, hidden, dtype=dtype),
        backend="cpu",
    )
    c_n.sum().backward()
    assert bias.grad is not None
    i = exact("sigmoid", x)
    assert_few_ulps(bias.grad[:hidden], i * (1 - i), x, ULPS + 2)
    assert not bias.grad[:hidden][x < LEAST_LOG[dtype] - 1.5].any()
    assert not bias.grad[2 * hidden : 3 * hidden].any()  # tanh'(50)
