"""Small calls without a gradient: straight to the CPU operator, which checks what it is given.

A step of a rollout takes microseconds, and the checks and choices of :func:`functional.lstm` take
tens. So a call that needs nothing of them (no gradient, no autocast, no compiler, plain tensors of
one dtype, backend "cpu" or "auto") asks the operator at once. Where the operator refuses, the long
way runs and finds the words.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from throughtime import _ext
from throughtime.backends.selection import preferred
from throughtime.ops.autograd import plain
from throughtime.ops.lstm import LstmArguments, LstmResults
from throughtime.ops.lstm.cpu import lstm as operation

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.float64)
_logger = logging.getLogger("throughtime")


def applies(input: Tensor, backend: str) -> bool:
    """Whether a call on this input may go straight to the operator."""
    return (
        not torch.is_grad_enabled()
        and type(input) is Tensor
        and input.is_cpu
        and input.dtype in _DTYPES
        and plain()
        and not torch.is_autocast_enabled("cpu")
        and _ext.extension is not None
        and preferred(backend)[0] in ("auto", "cpu")
        and not _logger.isEnabledFor(logging.DEBUG)  # which is told of every choice
    )


def run(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    reset: Tensor | None = None,
) -> LstmResults | None:
    """One layer in one direction, or None where the long way has to say why not.

    Args:
        input: ``[T, B, I]``, to which the thin way :func:`applies`.
        h_0: ``[B, H or P]``.
        c_0: ``[B, H]``.
        weights: as in :func:`throughtime.functional.bidirectional_lstm`.
        reset: bool ``[T, B]``, or None.
    """
    dtype = input.dtype
    for x in (h_0, c_0, *weights):
        if x is not None and (type(x) not in _PLAIN or x.dtype is not dtype or not x.is_cpu):
            return None
    try:
        return operation.without_gradient(
            LstmArguments(input, h_0, c_0, *weights, None, reset, None, None, None, False, False)
        )
    except RuntimeError:
        return None
