"""Kernels read and write numbers below the smallest normal one as zero, and only kernels do."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import throughtime
from cases import random
from throughtime import _ext
from throughtime.functional import relevancy_attention

if _ext.extension is None:
    pytest.skip("the compiled kernels are not in this installation", allow_module_level=True)
kernels: Any = _ext.extension

CONTROL = 0xFFC0  # of MXCSR: without the flags that say what happened


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


def recurrent(
    kind: Callable[..., torch.nn.Module], backend: str, dtype: torch.dtype, x: float, dy: float
) -> dict[str, Tensor]:
    """The output for an input of size x, and the gradients for one of the output of size dy."""
    layer = kind(5, 64, backend=backend, dtype=dtype)
    for seed, (name, parameter) in enumerate(layer.named_parameters()):
        size = 0.0 if name.startswith("bias") else 0.2
        parameter.data = (size * random(*parameter.shape, seed=seed)).to(dtype)
    steps = (x * random(30, 8, 5, seed=1)).to(dtype).requires_grad_()
    output = layer(steps)[0]
    leaves = {"input": steps, **dict(layer.named_parameters())}
    grad = (dy * random(30, 8, 64, seed=2)).to(dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad)
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def attention(
    additive: bool, backend: str, dtype: torch.dtype, x: float, dy: float
) -> dict[str, Tensor]:
    query, key, value = (random(2, 2, 60, 32, seed=seed) for seed in range(3))
    leaves = {"query": query, "key": key, "value": x * value}
    if additive:
        leaves["score_weight"] = random(2, 32, seed=4)
    leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
    output = relevancy_attention(
        leaves["query"],
        leaves["key"],
        leaves["value"],
        window_size=8,
        top_k=8,
        score="additive" if additive else "dot",
        score_weight=leaves.get("score_weight"),
        backend=backend,  # type: ignore[arg-type]
    )
    grad = (dy * random(2, 2, 60, 32, seed=5)).to(dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad)
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


OPS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "lstm": lambda *args: recurrent(throughtime.LSTM, *args),
    "rel_lstm": lambda *args: recurrent(throughtime.RelLSTM, *args),
    "dot": lambda *args: attention(False, *args),
    "additive": lambda *args: attention(True, *args),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_no_result_of_a_kernel_is_subnormal(op: str, dtype: torch.dtype, threads: None) -> None:
    tiny = torch.finfo(dtype).tiny
    results = {
        backend: [OPS[op](backend, dtype, *sizes) for sizes in ((4 * tiny, 1.0), (1.0, tiny))]
        for backend in ("reference", "cpu")
    }
    (small_input, _), (_, small_gradient) = results["reference"], results["reference"]
    assert subnormals(small_input["output"])
    for name, x in small_gradient.items():
        assert name == "output" or subnormals(x), f"{name}: the test shows nothing"
    for result in results["cpu"]:
        for name, x in result.items():
            assert not subnormals(x), name


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_the_caller_keeps_its_own_setting(op: str, flush: bool, threads: None) -> None:
    small = torch.full((100_000,), 1e-40)  # more than torch leaves to one thread
    torch.set_flush_denormal(flush)
    try:
        before, kept = control(), small * 0.5 != 0
        OPS[op]("cpu", torch.float32, 1.0, 1.0)
        assert control() == before
        assert torch.equal(small * 0.5 != 0, kept)
    finally:
        torch.set_flush_denormal(False)


def control() -> int:
    """The calling thread's MXCSR; 0 where that is not known how to read."""
    if platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        return 0
    environment = (ctypes.c_uint32 * 8)()
    assert ctypes.CDLL(None).fegetenv(environment) == 0
    return environment[7] & CONTROL


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def test_a_loss_on_the_last_step_costs_no_more_than_on_every_step() -> None:
    """Only where the processor is slow with subnormals; some are not."""
    normal, small = torch.full((2, 1 << 16), 1.0), torch.full((2, 1 << 16), 1e-39)
    cost = [
        statistics.median(seconds(lambda x=x: x * 0.7) for _ in range(20)) for x in (normal, small)
    ]
    if cost[1] < 4 * cost[0]:
        pytest.skip(f"subnormals cost this processor {cost[1] / cost[0]:.1f} times a normal number")
    layer = throughtime.LSTM(1, 64, backend="cpu")
    x = torch.randn(500, 16, 1)
    grad = torch.randn(500, 16, 64)
    times: dict[str, list[float]] = {"last": [], "every": []}
    for _ in range(5):
        for name, steps in (("last", slice(-1, None)), ("every", slice(None))):
            output = layer(x)[0][steps]
            times[name].append(seconds(lambda y=output, g=grad[steps]: y.backward(g)))
    assert statistics.median(times["last"]) < 2 * statistics.median(times["every"])
