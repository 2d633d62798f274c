"""Fixtures and settings for all tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Triton decides when a kernel is defined whether the interpreter will run it.
os.environ.setdefault("TRITON_INTERPRET", "1")

from cases import runnable
from throughtime import _ext

# Fixtures that compile.
COMPILED = {"kernels", "layer", "programs", "stand_in", "trace"}


def pytest_configure(config: pytest.Config) -> None:
    # torch finds compiled code by its graph, which does not tell what our fakes said when it was
    # compiled: an earlier revision's would be taken.
    cache = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="throughtime-inductor-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    # The reference is slow on purpose here; test_backends looks at the warning itself.
    config.addinivalue_line("filterwarnings", "ignore:throughtime runs its slow:RuntimeWarning")
    # Sizes are tiny: threads that wait for each other cost more than they do, a hundred times so
    # on a busy machine. Tests about threads ask for them.
    torch.set_num_threads(1)
    # float32 is float32 here, nn.LSTM's too; TF32 has tests of its own.
    torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The time of a test does not count how long its fixtures wait for compilers."""
    for item in items:
        waits = COMPILED & set(getattr(item, "fixturenames", ()))
        if waits and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(func_only=True))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill everything that torch allocates uninitialised with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=_ext.extension.runnable_isas() if _ext.extension else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the compiled kernels that can run here."""
    kernels: Any = _ext.extension
    best = kernels.isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(best)


@pytest.fixture(params=runnable())
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run here."""
    name: str = request.param
    return name
