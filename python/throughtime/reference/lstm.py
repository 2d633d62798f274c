"""One LSTM layer in one direction, as a loop over time: the definition the kernels are held to.

    i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of (W_ih x_t + b_ih + W_hh h~_{t-1} + b_hh)
    c_t = f * c_{t-1} + i * g
    h_t = o * tanh(c_t)                        (W_hr times that, with a projection)

    h~_{t-1} = h_{t-1}.detach()  where detach_mask[t], else h_{t-1}
    dL/dW_hh = sum over t of dgates_t^T h_{t-1}, detached steps included: W_hh is never detached

Source: Kanuparthi et al., "h-detach: Modifying the LSTM Gradient Towards Better Optimization",
ICLR 2019, arXiv 1810.03023, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    detach_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_hx: tuple[Tensor, Tensor] | None = None,
    reverse: bool = False,
    observe: Callable[[int, Tensor, Tensor], object] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run one LSTM layer in one direction, step by step, in plain PyTorch.

    The arguments are those of :func:`throughtime.functional.lstm`, which checks them; nothing is
    checked here. float16 and bfloat16 are computed in float32 and rounded once, at the end.

    Args:
        input: ``[T, B, I]``.
        hx: ``(h_0 [B, H or P], c_0 [B, H])``, zeros if None.
        weight_ih: ``[4H, I]``, gate rows i, f, g, o.
        weight_hh: ``[4H, H or P]``.
        bias_ih: ``[4H]`` or None.
        bias_hh: ``[4H]`` or None.
        weight_hr: projection ``[P, H]`` or None.
        detach_mask: bool ``[T]`` or ``[T, B]``; True detaches ``h_{t-1}`` at step t.
        lengths: int64 ``[B]``, 0 <= length <= T.
        reset: bool ``[T, B]``; True lets the state start anew before step t.
        reset_hx: ``(h [T, B, H or P], c [T, B, H])``, from which it starts anew; zeros if None.
        reverse: travel from the last position to the first.
        observe: called with ``t, h_t [B, H or P], c_t [B, H]`` at every step, of which nothing is
            used past the length of a sample; a hook on them sees their whole gradients.

    Returns:
        ``(output [T, B, H or P], (h_n [B, H or P], c_n [B, H]))`` in the dtype of ``input``.

    Example:
        >>> import torch
        >>> from throughtime import reference
        >>> weight_ih, weight_hh = torch.randn(8, 3), torch.randn(8, 2)
        >>> output, (h_n, c_n) = reference.lstm(torch.randn(5, 4, 3), None, weight_ih, weight_hh)
        >>> assert output.shape == (5, 4, 2) and torch.equal(output[-1], h_n)
    """
    out_dtype = input.dtype
    if out_dtype in _LOW_PRECISION:
        input, weight_ih, weight_hh = input.float(), weight_ih.float(), weight_hh.float()
        weight_hr = None if weight_hr is None else weight_hr.float()
    length, batch, _ = input.shape
    if hx is None:
        h = input.new_zeros(batch, weight_hh.size(1))
        c = input.new_zeros(batch, weight_hh.size(0) // 4)
    else:
        h, c = hx[0].to(input.dtype), hx[1].to(input.dtype)

    valid = None
    if lengths is not None:
        position = torch.arange(length, device=input.device).unsqueeze(1)
        valid = (position < lengths).unsqueeze(2)  # [T, B, 1]
        # A gradient of zero times a NaN activation is NaN: padding, and below the state of samples
        # that have ended, has to be harmless before the first product; masking what comes out of it
        # would be too late.
        input = torch.where(valid, input, 0.0)
        reset = None if reset is None else reset & valid.squeeze(2)

    # Indexing x[t] would add a full-sized gradient per step; unbind's backward is one stack.
    x_gates = F.linear(input, weight_ih, _sum_bias(bias_ih, bias_hh, input.dtype)).unbind(0)
    detached_at = _steps(detach_mask, length)
    resets = _steps(reset, length)
    new_h, new_c = (
        ((0.0,) * length,) * 2
        if reset_hx is None
        else (x.to(input.dtype).unbind(0) for x in reset_hx)
    )
    valids = (None,) * length if valid is None else valid.unbind(0)

    outputs: list[Tensor] = [h] * length
    for t in reversed(range(length)) if reverse else range(length):
        detached, restart, alive = detached_at[t], resets[t], valids[t]
        if restart is not None:
            h, c = torch.where(restart, new_h[t], h), torch.where(restart, new_c[t], c)
        h_in, c_in = h if detached is None else torch.where(detached, h.detach(), h), c
        if alive is not None:
            h_in, c_in = torch.where(alive, h_in, 0.0), torch.where(alive, c_in, 0.0)
        i, f, g, o = (x_gates[t] + F.linear(h_in, weight_hh)).chunk(4, dim=1)
        c_t = f.sigmoid() * c_in + i.sigmoid() * g.tanh()
        h_t = o.sigmoid() * c_t.tanh()
        if weight_hr is not None:
            h_t = F.linear(h_t, weight_hr)
        if observe is not None:
            observe(t, h_t, c_t)
        if alive is None:
            h, c = h_t, c_t
            outputs[t] = h_t
        else:
            h, c = torch.where(alive, h_t, h), torch.where(alive, c_t, c)
            outputs[t] = torch.where(alive, h_t, 0.0)
    return torch.stack(outputs).to(out_dtype), (h.to(out_dtype), c.to(out_dtype))


def _sum_bias(bias_ih: Tensor | None, bias_hh: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if bias_ih is None or bias_hh is None:
        only = bias_hh if bias_ih is None else bias_ih
        return None if only is None else only.to(dtype)
    return bias_ih.to(dtype) + bias_hh.to(dtype)


def _steps(mask: Tensor | None, length: int) -> tuple[Tensor | None, ...]:
    """Split a mask [T] or [T, B] into one mask per step that broadcasts against [B, H]."""
    if mask is None:
        return (None,) * length
    return (mask.unsqueeze(-1) if mask.dim() == 2 else mask).unbind(0)
