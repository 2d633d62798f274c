"""How exact torch wants products of float32 to be, and what that means to an LSTM here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import throughtime
from closeness import rms
from throughtime import _ext, env

if _ext.extension is None:
    pytest.skip("the compiled kernels are not in this installation", allow_module_level=True)
kernels: Any = _ext.extension

PARTS = {"highest": 3, "high": 2, "medium": 1}
LARGE, SMALL = (20, 33, 40, 256), (20, 33, 40, 128)  # T, B, I, H
needs_amx = pytest.mark.skipif(kernels.isa() != "amx", reason="AMX does not run here")


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def parts(T: int, B: int, inputs: int, units: int) -> int:
    return int(kernels.float32_parts(T, B, inputs, units, units))


@pytest.mark.parametrize("asked", PARTS)
def test_the_kernels_ask_torch(asked: str) -> None:
    torch.set_float32_matmul_precision(asked)
    assert kernels.float32_parts_asked() == PARTS[asked]
    assert parts(*LARGE) == (PARTS[asked] if kernels.isa() == "amx" else 0)
    assert parts(*SMALL) == 0


def test_env_and_explain_name_what_multiplies() -> None:
    layer = throughtime.LSTM(512, 512, device="meta")
    told = str(throughtime.explain(layer, device="cpu", steps=100, batch_size=64, threads=2))
    if kernels.isa() == "amx":
        assert "float32 in 3 bfloat16 parts" in told
        assert "of large LSTMs by AMX in 3 bfloat16 parts (highest)" in env.report()
    else:
        assert "a worker (float32 from" in told and "by vectors" in env.report()


def iterate(sizes: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output and gradients."""
    T, B, inputs, units = sizes
    torch.manual_seed(0)
    layer = throughtime.LSTM(inputs, units, backend="cpu").to(dtype)
    x = torch.randn(T, B, inputs).to(dtype).requires_grad_()
    output, _ = layer(x)
    output.backward(torch.randn(T, B, units).to(dtype))
    grads = [x.grad, *(p.grad for p in layer.parameters())]
    return [output.detach(), *(g for g in grads if g is not None)]


@needs_amx
def test_errors_follow_the_precision() -> None:
    """The backward asks too, though autograd runs it on a thread of its own."""
    exact = iterate(LARGE, torch.float64)
    for asked, least, most in (
        ("highest", 0, 3e-7),
        ("high", 1e-6, 1.5e-5),
        ("medium", 5e-4, 1e-2),
    ):
        torch.set_float32_matmul_precision(asked)
        for found, wanted in zip(iterate(LARGE), exact, strict=True):
            assert least <= rms(found, wanted) <= most, asked


@needs_amx
def test_small_layers_stay_with_the_vectors() -> None:
    """Their bits are those of AVX-512."""
    alone = iterate(SMALL)
    try:
        kernels.set_isa("avx512")
        vectors, other = iterate(SMALL), iterate(LARGE)
    finally:
        kernels.set_isa("amx")
    assert all(torch.equal(a, b) for a, b in zip(alone, vectors, strict=True))
    assert not torch.equal(iterate(LARGE)[0], other[0])
