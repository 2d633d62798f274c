"""Fixtures of the GPU tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cases_gpu import ON_GPU, force
from data_sheets import SMALL
from host_kernels import HostKernels, load, module, sanitized, tracer
from throughtime.backends import requirements
from throughtime.backends.backend import OPERATIONS

GPU_ONLY = (requirements.cuda_tensors, requirements.cuda_kernels)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compilers run while the tests do."""
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if not shutil.which(os.environ.get("CXX", "g++")):
        return
    if "trace" in wanted:
        tracer(session.config)
    if wanted & {"kernels", "stand_in"}:
        module(session.config)
    if "programs" in wanted:
        sanitized(session.config)


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    """The GPU kernels' sources as a module that runs them on the CPU; see tests/gpu/cuda_on_cpu."""
    return load(module(request.config).result())


@pytest.fixture(scope="session")
def programs(request: pytest.FixtureRequest) -> dict[str, Path]:
    """main.cpp under each sanitizer."""
    return {name: made.result() for name, made in sanitized(request.config).items()}


@pytest.fixture(scope="session")
def trace(request: pytest.FixtureRequest) -> Path:
    """trace.cpp, which prints what the threads of a kernel do."""
    return tracer(request.config).result()


@pytest.fixture
def stand_in(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HostKernels | None]:
    """Without a GPU: backend cuda runs its kernels' sources on the CPU."""
    if ON_GPU:
        yield None
        return
    kernels = request.getfixturevalue("kernels")
    made = HostKernels(kernels, partial(kernels.plan, **SMALL))
    cuda = OPERATIONS["lstm"]["cuda"]
    of_calls = tuple(x for x in cuda.requirements if x not in GPU_ONLY)
    monkeypatch.setitem(OPERATIONS["lstm"], "cuda", replace(cuda, requirements=of_calls))
    library = torch.library.Library("throughtime", "IMPL")
    library.impl("lstm_recurrence_forward", made.forward, "CPU")
    library.impl("lstm_recurrence_backward", made.backward, "CPU")
    yield made
    library._destroy()


@pytest.fixture(autouse=True, scope="session")
def least_products() -> None:
    """Triton's interpreter refuses a product that is too small for the compiler."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.backends.nvidia.compiler import min_dot_size
    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.codegen_fns["min_dot_size"] = min_dot_size(None)


@pytest.fixture(autouse=True)
def forced_tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backend cuda runs the tier of a test that has one."""
    if "tiered" in request.fixturenames:
        force(monkeypatch, request.getfixturevalue("tiered").tier)


@pytest.fixture
def gpu_poison() -> Iterator[None]:
    """What torch allocates uninitialised is NaN.

    The fixture ``poison`` makes an error of every library call that is not deterministic.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
