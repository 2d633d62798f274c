"""Kernels read and write numbers below the smallest normal one as zero, and only kernels do."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cases import Shape
from compiled_kernels import kernels
from samples import Attention, Given, Layer, Recurrence, Sample, expect, run

CONTROL = 0xFFC0  # bits of MXCSR without the flags that say what happened


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    kernels.pretend_cpus(request.param)
    yield
    kernels.pretend_cpus(0)
    torch.set_num_threads(before)


def subnormals(x: Tensor) -> int:
    return int(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).sum())


SMALL_ARGUMENTS = ("input", "h_0", "c_0", "context_0", "value")
CASES: dict[str, Sample] = {
    "lstm": Recurrence(Shape(30, 8, 5, 64)),
    "rel_lstm": Layer(30, 8, 5, 64, 64, 10, 15),
    "dot": Attention(2, 2, 60, 32, 32, 8, 8),
    "additive": Attention(2, 2, 60, 32, 32, 8, 8, additive=True),
}


def arguments(case: Sample, dtype: torch.dtype, x: float, dy: float) -> Given:
    """Arguments of size x without biases, and arriving gradients of size dy."""
    given = case.inputs()
    for name in given:
        if name.startswith("bias"):
            given[name] = None
        elif name.startswith("grad_"):
            given[name] = (dy * given[name]).to(dtype)
        elif isinstance(given[name], Tensor) and given[name].is_floating_point():
            size = x if name in SMALL_ARGUMENTS else 1.0
            given[name] = (size * given[name].detach()).to(dtype).requires_grad_()
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_result_of_a_kernel_is_subnormal(
    case: Sample, dtype: torch.dtype, threads: None
) -> None:
    tiny = torch.finfo(dtype).tiny
    small_input = arguments(case, dtype, 4 * tiny, 1.0)
    small_gradient = arguments(case, dtype, 1.0, tiny)
    assert subnormals(expect(case, small_input)["output"])
    for name, x in expect(case, small_gradient).items():
        if name.startswith("grad_"):
            assert subnormals(x), f"{name}: the test shows nothing"
    for given in (small_input, small_gradient):
        for name, x in run(case, given).items():
            assert not x.is_floating_point() or not subnormals(x), name


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_caller_keeps_its_own_setting(case: Sample, flush: bool, threads: None) -> None:
    small = torch.full((100_000,), 1e-40)  # more than torch leaves to one thread
    torch.set_flush_denormal(flush)
    try:
        before, kept = control(), small * 0.5 != 0
        run(case, case.inputs(torch.float32))
        assert control() == before
        assert torch.equal(small * 0.5 != 0, kept)
    finally:
        torch.set_flush_denormal(False)


def control() -> int:
    """The calling thread's MXCSR; 0 where this test cannot read it."""
    if platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        return 0
    environment = (ctypes.c_uint32 * 8)()
    assert ctypes.CDLL(None).fegetenv(environment) == 0
    return environment[7] & CONTROL
