"""Parts of the LSTM's steps that a walk through time and single steps share; see ``lstm.py``.

Tiles are of samples b ``[BB]`` and units n ``[BN]``; ``row`` is t B + b, ``mask`` is where
elements exist.
"""

from __future__ import annotations

import triton
import triton.language as tl
from throughtime.triton_kernels.cell import (
    cell_backward,
    cell_forward,
    gates_of,
    load_gates,
    store_gates,
)
from throughtime.triton_kernels.common import tanh


@triton.jit
def step_of(t, b, end, reset, B):
    """Of samples b ``[BB]`` at step t: rows, which ones are active, which ones carry a state in."""
    row = t * B + b
    active = (t >= 0) & (t < end)
    carries = active
    if reset is not None:
        carries = active & (tl.load(reset + row, mask=active, other=1) == 0)
    return row, active, carries


@triton.jit
def state_before(t, b, row, end, B, REVERSE: tl.constexpr):
    """Whether a sample begins with step t, and the row of the state before it: b of the initial
    state if it begins, else one of the steps.
    """
    if REVERSE:
        begins, before = t == end - 1, row + B
    else:
        begins, before = t == 0, row - B
    return begins, tl.where(begins, b, before)


@triton.jit
def load_bias(bias, n, H):
    """Four tiles ``[1, BN]``, or zeros."""
    if bias is None:
        tiles = 0.0, 0.0, 0.0, 0.0
    else:
        tiles = load_gates(bias + n[None, :], (n < H)[None, :], H)
    return tiles


@triton.jit
def step_forward(zi, zf, zg, zo, c, row, n, mask, output, gates, cells, H, SAVE: tl.constexpr):
    """Stores and returns h_t, c_t, from the sums of the gates and from c_{t-1}."""
    i, f, g, o = gates_of(zi, zf, zg, zo)
    saved = gates + row[:, None] * (4 * H) + n[None, :]
    sums: tl.constexpr = gates.dtype.element_ty == tl.float16  # csrc/lstm/cuda/cell.cuh says why
    if SAVE and sums:  # Here sums leave their registers. Gates would spill: c_t still needs them.
        store_gates(saved, zi, zf, zg, zo, mask, H)
    h_t, c_t = cell_forward(i, f, g, o, c)
    h_t = h_t.to(output.dtype.element_ty)
    at = row[:, None] * H + n[None, :]
    tl.store(output + at, h_t, mask=mask)
    if SAVE:
        if not sums:
            store_gates(saved, i, f, g, o, mask, H)
        tl.store(cells + at, c_t, mask=mask)
    return h_t, c_t


@triton.jit
def step_backward(
    dh, dc, t, b, row, end, n, active, carries, grad_output, c_0, gates, cells, grad_gates, B, H,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Stores and returns da_t (four tiles), and dc_{t-1}, from dh_t without dL/doutput_t."""
    inside = (n < H)[None, :]
    mask = active[:, None] & inside
    of_gates, at = row[:, None] * (4 * H) + n[None, :], row[:, None] * H + n[None, :]
    i, f, g, o = load_gates(gates + of_gates, mask, H)
    tanh_c = tanh(tl.load(cells + at, mask=mask, other=0.0))
    begins, before = state_before(t, b, row, end, B, REVERSE)
    source = tl.where(begins, c_0, cells) + before * H
    c = tl.load(source[:, None] + n[None, :], mask=carries[:, None] & inside, other=0.0)
    if grad_output is not None:
        dh += tl.load(grad_output + at, mask=mask, other=0.0)
    # Only now, after all loads: earlier it would take more registers.
    sums: tl.constexpr = i.dtype == tl.float16
    i, f, g, o = i.to(dc.dtype), f.to(dc.dtype), g.to(dc.dtype), o.to(dc.dtype)
    if sums:
        i, f, g, o = gates_of(i, f, g, o)
    S: tl.constexpr = grad_gates.dtype.element_ty
    ai, af, ag, ao, dc = cell_backward(i, f, g, o, tanh_c, c, dh, dc, S)
    store_gates(grad_gates + of_gates, ai, af, ag, ao, mask, H)
    return ai, af, ag, ao, tl.where(carries[:, None], dc * f, 0.0)


@triton.jit
def open_samples(carries, detach_mask, t, b, B):
    """Which samples pass the gradient of the gates of step t on to h_{t-1}."""
    if detach_mask is not None:
        at = detach_mask + t * B + b
        carries = carries & (tl.load(at, mask=carries, other=1) == 0)
    return carries
