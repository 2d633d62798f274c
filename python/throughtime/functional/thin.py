"""Small calls: straight to the CPU operator, which checks what it is given.

A few steps take microseconds, and the checks and choices of :func:`functional.lstm` take tens. So a
call that needs nothing of them (no autocast, no compiler, no watcher, plain tensors of one dtype,
backend "cpu" or "auto") asks the operator at once. Where the operator refuses, the long way runs
and finds the words.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from throughtime import _ext
from throughtime.backends.selection import preferred
from throughtime.ops import watching
from throughtime.ops.autograd import plain
from throughtime.ops.lstm import LstmArguments, LstmResults
from throughtime.ops.lstm.cpu import run as kernels

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.float64)
_logger = logging.getLogger("throughtime")


def applies(input: Tensor, backend: str) -> bool:
    """Whether a call on this input may go straight to the operator."""
    return (
        plain()
        and type(input) in _PLAIN
        and input.is_cpu
        and input.dtype in _DTYPES
        and not torch.is_autocast_enabled("cpu")
        and _ext.why_missing() is None
        and watching.watcher() is None
        and preferred(backend)[0] in ("auto", "cpu")
        and not _logger.isEnabledFor(logging.DEBUG)  # which is told of every choice
    )


def run(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    *,
    detach_mask: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    recompute: bool = False,
) -> LstmResults | None:
    """One layer in one direction, or None where the long way has to say why not.

    Args:
        input: ``[T, B, I]``, to which the thin way :func:`applies`.
        hx: as in :func:`throughtime.functional.lstm`, like all that follow.
        weights: as in :func:`throughtime.functional.bidirectional_lstm`.
        detach_mask: bool ``[T]`` or ``[T, B]``, or None.
        reset: bool ``[T, B]``, or None.
        reverse: True travels from the last step to the first.
        recompute: True computes the gates again in the backward pass.
    """
    dtype = input.dtype
    states = () if hx is None else hx
    for x in (*states, *weights):
        if x is not None and (type(x) not in _PLAIN or x.dtype is not dtype or not x.is_cpu):
            return None
    for mask in (detach_mask, reset):
        if mask is not None and type(mask) is not Tensor:
            return None
    weight_hh = weights[1]
    if weight_hh is None or weight_hh.dim() != 2 or input.dim() != 3:
        return None
    batch = input.size(1)
    if hx is None:
        h_0 = input.new_zeros(batch, weight_hh.size(1))
        c_0 = input.new_zeros(batch, weight_hh.size(0) // 4)
    elif len(hx) == 2:
        h_0, c_0 = hx
    else:
        return None
    mask = detach_mask
    if mask is not None and mask.dim() == 1:
        mask = mask.unsqueeze(1).expand(-1, batch)
    try:
        return kernels(
            LstmArguments(
                input, h_0, c_0, *weights, None, reset, None, None, mask, reverse, recompute
            )
        )
    except RuntimeError:
        return None
