"""Arguments at every exponent, exact values of the nonlinearities, errors in ulps.

A result that is no normal number may be zero; every other is within 4 units in the last place.
"""

from __future__ import annotations

import functools
import math

import mpmath
import pytest
import torch
from torch import Tensor

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
        found: Tensor = getattr(torch, function)(x.double())
        return found
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


@functools.cache
def known(function: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Arguments of a function and its exact values; those of exp are finite, not positive."""
    x = arguments(dtype)
    x = x[(x <= 0) & x.isfinite()] if function == "exp" else x
    return x, exact(function, x)
