"""The tests of the GPU backends: on which device they run, cases, and how close results must be.

Without a GPU the kernels' own sources run on the CPU: those of backend cuda by cuda_on_cpu, those
of backend triton in Triton's interpreter. Sizes are smaller, and tests of CUDA itself are skipped.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import throughtime
from cases import (
    LOW_PRECISION,
    Result,
    Shape,
    as_dtype,
    call,
    options_for,
    plain_lstm,
    random,
    tensors,
)
from closeness import TOLERANCE
from throughtime import functional
from throughtime.backends import Request, can_run

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BACKENDS = ("cuda", "triton")

gpu = (pytest.mark.gpu, pytest.mark.usefixtures("stand_in"))
needs_cuda = pytest.mark.skipif(
    not ON_GPU, reason="there is no GPU: torch.cuda.is_available() is False"
)
# While a kernel waits for ever, Python sees no signal: only the thread method ends the test, and
# with it the process. So the time does not count how long a fixture waits for a compiler.
may_hang = pytest.mark.timeout(
    float(os.environ.get("PYTEST_TIMEOUT", "120")), method="thread", func_only=True
)

_TRITON = (
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
    # tests/conftest.py asks for the interpreter where nothing else is said.
    pytest.mark.skipif(
        (os.environ.get("TRITON_INTERPRET") == "1") == ON_GPU,
        reason="TRITON_INTERPRET=1 runs Triton on the CPU, TRITON_INTERPRET=0 on a GPU",
    ),
)
# The marks of a test by its backend.
MARKS: dict[str, tuple[pytest.MarkDecorator, ...]] = {"cuda": (), "triton": _TRITON}
each_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=MARKS[name]) for name in BACKENDS]
)

DTYPES = (torch.float64, torch.float32, *LOW_PRECISION)

# Two roundings of the largest entry for 16-bit numbers: a single result may be rounded luckily by
# plain PyTorch, so twice its error can be next to nothing. The others are closeness.py's.
FLOOR = TOLERANCE | {dtype: 2 * torch.finfo(dtype).eps for dtype in LOW_PRECISION}
# Triton's interpreter truncates where a GPU rounds, and its float32 exponential is numpy's, which
# is wrong by up to three roundings (AVX-512).
TRUNCATED = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 6e-2}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def why_not(backend: str, dtype: torch.dtype, proj_size: int = 0) -> str | None:
    return can_run(backend, Request("lstm", 128, proj_size, DEVICE, dtype))


def runs(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """A decorator: once per backend and dtype that it has, of ``dtypes`` if any are given.

    For a backend that is missing altogether, test_gpu.py's first test fails.
    """

    def present(backend: str, dtype: torch.dtype) -> bool:
        if ON_GPU:
            return why_not(backend, dtype) is None
        return backend == "triton" or dtype != torch.float64

    found = [
        pytest.param(backend, dtype, id=f"{backend}-{short(dtype)}", marks=MARKS[backend])
        for dtype in dtypes or DTYPES
        for backend in BACKENDS
        if present(backend, dtype)
    ]
    return pytest.mark.parametrize(("backend", "dtype"), found)


# Tier of csrc/lstm/cuda/plan.h, dtype, shape: what the plan chooses on an H100, and what every GPU
# runs where it fits; tests force the tier.
TIERS = (
    ("resident", torch.float32, Shape(6, 5, 3, 40)),  # one block
    ("resident", torch.bfloat16, Shape(6, 17, 8, 128)),  # clusters
    ("grid", torch.float32, Shape(5, 16, 8, 384)),
    ("grid", torch.bfloat16, Shape(4, 16, 8, 1024)),
    ("stepwise", torch.float32, Shape(4, 3, 8, 2048)),
    ("stepwise", torch.bfloat16, Shape(3, 33, 8, 1000)),
)


class Tiered(NamedTuple):
    """A backend, and what it runs while backend cuda is forced to run the tier."""

    backend: Any
    tier: str
    dtype: torch.dtype
    shape: Shape


def tiers() -> pytest.MarkDecorator:
    """A decorator: once per backend and tier, as the argument ``tiered``; see ``forced_tier``."""
    found = [
        pytest.param(
            Tiered(backend, tier, dtype, shape),
            id=f"{backend}-{tier}-{short(dtype)}",
            marks=[*MARKS[backend], *([pytest.mark.slow] if shape.H >= 1000 else [])],
        )
        for tier, dtype, shape in (TIERS if ON_GPU else TIERS[:1])
        for backend in (BACKENDS if ON_GPU else BACKENDS[:1])
        if not ON_GPU or why_not(backend, dtype) is None
    ]
    return pytest.mark.parametrize("tiered", found)


def force(patch: pytest.MonkeyPatch, tier: str) -> None:
    """Backend cuda runs the tier, on any GPU where it fits."""
    patch.setenv("THROUGHTIME_CUDA_TIER", tier)


def plan_of(shape: Shape, dtype: torch.dtype, **where: Any) -> list[str]:
    """The tiers of the forward and of the backward, as ``explain`` tells them."""
    sizes: dict[str, Any] = {"hidden_size": shape.H, "batch_size": shape.B, "steps": shape.T}
    lines = throughtime.explain("lstm", **sizes, dtype=dtype, **where).gpu_plan
    return [line.split(":")[1].strip() for line in lines[1:]]


def on_device(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors on the device, leaves again; other values unchanged."""
    return {
        name: x.detach().to(DEVICE).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for name, x in values.items()
    }


def leaves(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    return on_device(tensors(shape, dtype))


def results(
    function: Callable[..., Result], named: dict[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    """Outputs, states, and the gradients of all leaves through all three of them."""
    return with_gradients(call(function, named, **options), named)


def with_gradients(
    result: Result, named: Mapping[str, Tensor], through: tuple[str, ...] = ("output", "h_n", "c_n")
) -> dict[str, Tensor]:
    """The results of those names, and the gradients of the leaves for random gradients of them."""
    output, (h_n, c_n) = result
    found = {"output": output, "h_n": h_n, "c_n": c_n}
    found = {name: found[name] for name in through}
    incoming = {
        name: random(*x.shape, seed=100 + k, dtype=x.dtype).to(x.device)
        for k, (name, x) in enumerate(found.items())
    }
    # An output of no steps is zeros, without a history.
    reached = {name: x for name, x in found.items() if x.requires_grad}
    # A leaf that is detached from everything, as h_0 may be, has a gradient of zero.
    gradients = torch.autograd.grad(
        list(reached.values()),
        list(named.values()),
        [incoming[name] for name in reached],
        materialize_grads=True,
    )
    values = {name: x.detach() for name, x in found.items()}
    return values | {f"grad {name}": x for name, x in zip(named, gradients, strict=True)}


@functools.lru_cache(maxsize=4)
def expected(
    shape: Shape, dtype: torch.dtype, option: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Plain PyTorch sample by sample, in ``dtype`` and, from the same numbers, in float64."""
    named, options = leaves(shape, dtype), options_for(shape)[option]  # read by Python's if
    plain = results(plain_lstm, named, **options)
    if dtype == torch.float64:
        return plain, plain
    return plain, results(plain_lstm, as_dtype(named, torch.float64), **options)


def check(backend: str, dtype: torch.dtype, shape: Shape, option: str) -> None:
    """Values and gradients of one call against ``expected``."""
    named, options = leaves(shape, dtype), on_device(options_for(shape)[option])
    found = results(functional.lstm, named, backend=backend, **options)
    assert_as_close_as_plain(found, *expected(shape, dtype, option), backend)


def assert_as_close_as_plain(
    actual: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    backend: str,
) -> None:
    """FlashAttention's rule: at most twice plain PyTorch's error in the same dtype, and a floor."""
    floor = FLOOR | TRUNCATED if backend == "triton" and not ON_GPU else FLOOR
    assert list(actual) == list(plain) == list(exact)
    for name, wanted in exact.items():
        got = actual[name]
        assert (got.shape, got.dtype) == (wanted.shape, plain[name].dtype), name
        if not wanted.numel():
            continue
        assert torch.isfinite(got).all(), f"{name}: not finite"
        scale = max(1e-3, wanted.abs().max().item())
        error, theirs = (
            (x.double() - wanted.double()).abs().max().item() / scale for x in (got, plain[name])
        )
        allowed = 2 * theirs + floor[got.dtype]
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def against_reference(
    backend: str,
    run: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]],
    named: dict[str, Tensor],
) -> None:
    """``run`` by a backend with some leaves, against the reference with the same and in float64."""
    found, plain = (run(name, named) for name in (backend, "reference"))
    exact = run("reference", as_dtype(named, torch.float64))
    assert_as_close_as_plain(found, plain, exact, backend)


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert list(actual) == list(expected)
    different = [name for name, x in actual.items() if not torch.equal(x, expected[name])]
    assert not different, f"not bit-equal: {', '.join(different)}"
