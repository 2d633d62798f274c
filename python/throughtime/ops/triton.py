"""Implementations of operators by Triton kernels."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor


def implementation(module: str, name: str) -> Callable[[Any], tuple[Tensor, ...]]:
    """The function ``name`` of ``throughtime.triton_kernels.module``, as an implementation.

    Its module is imported when it is first called: Triton may be missing.
    """

    def run(call: Any) -> tuple[Tensor, ...]:
        check_runnable(call)
        function = getattr(import_module(f"throughtime.triton_kernels.{module}"), name)
        return function(call)  # type: ignore[no-any-return]

    return run


def check_runnable(args: tuple[Any, ...]) -> None:
    """Check that no tensor is on the CPU, where only Triton's interpreter runs kernels.

    Raises:
        RuntimeError: if one is, outside of the interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if any(isinstance(arg, Tensor) and arg.is_cpu for arg in args):
        raise RuntimeError(
            "throughtime: the Triton kernels run on a GPU, got tensors on the CPU; use "
            "backend='cpu', or for tests set TRITON_INTERPRET=1 before Triton is imported"
        )
