"""Fixtures of the GPU tests."""

from __future__ import annotations

from types import ModuleType

import pytest

from host_kernels import load_module


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The GPU kernels' sources as a module that runs them on the CPU; see tests/gpu/cuda_on_cpu."""
    return load_module(tmp_path_factory.mktemp("cuda_on_cpu"))
