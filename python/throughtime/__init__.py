"""Recurrent layers for PyTorch: a drop-in LSTM with h-detach, and attention that screens its past.

Shapes: T is the number of time steps, B the batch size, I the input size, H the hidden size.

Example:
    >>> import torch, throughtime
    >>> lstm = throughtime.LSTM(3, 8, detach_prob=0.25)
    >>> output, (h_n, c_n) = lstm(torch.randn(50, 4, 3))
    >>> assert output.shape == (50, 4, 8)
"""

from __future__ import annotations

from importlib import import_module as _import_module
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as _error:
    # A torch that is installed but broken shows its own error.
    if _error.name != "torch":
        raise
    raise ImportError(
        "throughtime needs PyTorch 2.10 or newer; install it with: pip install torch"
    ) from None

from throughtime import functional, init, nn, reference
from throughtime.acceleration import Acceleration, accelerate
from throughtime.acceleration import accelerate_if_asked as _accelerate_if_asked
from throughtime.backends import Explanation, backend, explain
from throughtime.backends.cpu import empty_cache
from throughtime.backends.selection import configure_logging as _configure_logging
from throughtime.nn import LSTM, LSTMCell, RelevancyAttention, RelLSTM
from throughtime.replacement import Replacement, replace, restore
from throughtime.schedule import DetachSchedule
from throughtime.serialization import register as _register
from throughtime.states import RelevancyCache, RelState

try:
    __version__ = _version("throughtime")
except _PackageNotFoundError:
    # A source tree that was never installed: only pyproject.toml holds the number.
    __version__ = "0+unknown"

if _TYPE_CHECKING:
    from throughtime import diagnostics
    from throughtime.diagnostics import GradientFlow, gradient_flow
else:

    def __getattr__(name: str) -> object:
        """Diagnostics come with their first use: few programs need them."""
        if name not in ("GradientFlow", "diagnostics", "gradient_flow"):
            raise AttributeError(f"module 'throughtime' has no attribute {name!r}")
        module = _import_module("throughtime.diagnostics")
        return module if name == "diagnostics" else getattr(module, name)


_configure_logging()
_register()
_accelerate_if_asked()

__all__ = [
    "LSTM",
    "Acceleration",
    "DetachSchedule",
    "Explanation",
    "GradientFlow",
    "LSTMCell",
    "RelLSTM",
    "RelState",
    "RelevancyAttention",
    "RelevancyCache",
    "Replacement",
    "__version__",
    "accelerate",
    "backend",
    "diagnostics",
    "empty_cache",
    "explain",
    "functional",
    "gradient_flow",
    "init",
    "nn",
    "reference",
    "replace",
    "restore",
]
