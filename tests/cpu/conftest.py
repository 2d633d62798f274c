"""Fixtures of the tests of the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from throughtime import _ext


@pytest.fixture
def threads() -> Iterator[None]:
    """The test sets the number of threads; kernels take as many workers on any machine."""
    kernels: Any = _ext.extension
    before = torch.get_num_threads()
    kernels.pretend_cpus(64)
    yield
    kernels.pretend_cpus(0)
    torch.set_num_threads(before)
