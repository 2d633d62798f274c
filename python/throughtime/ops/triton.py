"""What every operator of the Triton kernels checks before it imports them."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor


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
