"""Parts of the LSTM's steps that a walk through time and single steps share; see ``lstm.py``.

Tiles are of samples b ``[BB]`` and units n ``[BN]``; ``row`` is t B + b, ``mask`` is where
something is there to load and store.
"""

from __future__ import annotations

import triton
import triton.language as tl
from throughtime.triton_kernels.common import sigmoid, tanh

# The interpreter keeps bfloat16 as bare 16 bits, and multiplies those.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def add_product(rows, weight, acc):
    """Acc [BB, BN] + rows [BB, BK] @ weight [BK, BN], summed in the dtype of acc."""
    if _INTERPRETED:
        rows, weight = rows.to(acc.dtype), weight.to(acc.dtype)
    return tl.dot(rows, weight, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def load_gates(source, row, n, mask, H):
    """Four tiles, i, f, g, o, of rows ``[4H]``."""
    at = source + row[:, None] * (4 * H) + n[None, :]
    return (
        tl.load(at, mask=mask, other=0.0),
        tl.load(at + H, mask=mask, other=0.0),
        tl.load(at + 2 * H, mask=mask, other=0.0),
        tl.load(at + 3 * H, mask=mask, other=0.0),
    )


@triton.jit
def store_gates(target, row, n, i, f, g, o, mask, H):
    """The reverse of ``load_gates``."""
    at = target + row[:, None] * (4 * H) + n[None, :]
    tl.store(at, i, mask=mask)
    tl.store(at + H, f, mask=mask)
    tl.store(at + 2 * H, g, mask=mask)
    tl.store(at + 3 * H, o, mask=mask)


@triton.jit
def load_weight(weight_hh, gate, k, n, stride_k, stride_n, H):
    """A tile ``[BK, BN]`` of a gate: column n sums over k, the strides say what of W_hh."""
    at = weight_hh + tl.cast(H, tl.int64) * H * gate
    at = at + k[:, None] * stride_k + n[None, :] * stride_n
    return tl.load(at, mask=(k < H)[:, None] & (n < H)[None, :], other=0.0)


@triton.jit
def load_weights(weight_hh, n, stride_k, stride_n, H):
    """All of W_hh, a tile ``[BN, BN]`` of each gate; barriers, or all would be on their way at once
    through registers.
    """
    wi = load_weight(weight_hh, 0, n, n, stride_k, stride_n, H)
    tl.debug_barrier()
    wf = load_weight(weight_hh, 1, n, n, stride_k, stride_n, H)
    tl.debug_barrier()
    wg = load_weight(weight_hh, 2, n, n, stride_k, stride_n, H)
    tl.debug_barrier()
    return wi, wf, wg, load_weight(weight_hh, 3, n, n, stride_k, stride_n, H)


@triton.jit
def step_of(t, b, end, reset, B):
    """Of samples b ``[BB]`` at step t: their rows, who takes the step, who brings a state to it."""
    row = t * B + b
    active = (t >= 0) & (t < end)
    carries = active
    if reset is not None:
        carries = active & (tl.load(reset + row, mask=active, other=1) == 0)
    return row, active, carries


@triton.jit
def state_before(t, b, row, end, B, REVERSE: tl.constexpr):
    """Whether a sample begins with step t, and the row of the state before it, there or in T."""
    if REVERSE:
        begins, before = t == end - 1, row + B
    else:
        begins, before = t == 0, row - B
    return begins, tl.where(begins, b, before)


@triton.jit
def stream_forward(source, carries, n, weight_hh, zi, zf, zg, zo, H, BLOCK_K: tl.constexpr):
    """Adds h W_hh^T to the sums of the gates, with h of ``source`` ``[BB]``, pointers to rows."""
    for start in range(0, H, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(
            source[:, None] + k[None, :], mask=carries[:, None] & (k < H)[None, :], other=0.0
        )
        zi = add_product(h, load_weight(weight_hh, 0, k, n, 1, H, H), zi)
        zf = add_product(h, load_weight(weight_hh, 1, k, n, 1, H, H), zf)
        zg = add_product(h, load_weight(weight_hh, 2, k, n, 1, H, H), zg)
        zo = add_product(h, load_weight(weight_hh, 3, k, n, 1, H, H), zo)
    return zi, zf, zg, zo


@triton.jit
def load_bias(bias, n, H):
    """Four tiles ``[1, BN]``, or zeros."""
    if bias is None:
        tiles = 0.0, 0.0, 0.0, 0.0
    else:
        tiles = load_gates(bias, tl.zeros([1], tl.int32), n, (n < H)[None, :], H)
    return tiles


@triton.jit
def recall_gates(i, f, g, o, A: tl.constexpr):
    """Gates in dtype A from what was saved; float16 holds sums, see csrc/lstm/cuda/cell.cuh."""
    sums: tl.constexpr = i.dtype == tl.float16
    i, f, g, o = i.to(A), f.to(A), g.to(A), o.to(A)
    if sums:
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    return i, f, g, o


@triton.jit
def forward_cell(zi, zf, zg, zo, c, row, n, mask, output, gates, cells, H, SAVE: tl.constexpr):
    """Stores and returns h_t, c_t, from the sums of the gates and from c_{t-1}."""
    i, f, g, o = sigmoid(zi), sigmoid(zf), tanh(zg), sigmoid(zo)
    sums: tl.constexpr = gates.dtype.element_ty == tl.float16  # see recall_gates
    if SAVE and sums:  # Sums leave registers here. Gates would spill some: c_t still needs them.
        store_gates(gates, row, n, zi, zf, zg, zo, mask, H)
    c_t = f * c + i * g
    h_t = (o * tanh(c_t)).to(output.dtype.element_ty)
    at = row[:, None] * H + n[None, :]
    tl.store(output + at, h_t, mask=mask)
    if SAVE:
        if not sums:
            store_gates(gates, row, n, i, f, g, o, mask, H)
        tl.store(cells + at, c_t, mask=mask)
    return h_t, c_t


@triton.jit
def backward_cell(
    dh, dc, t, b, row, end, n, active, carries, grad_output, c_0, gates, cells, grad_gates, B, H,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Stores and returns da_t (four tiles), and dc_{t-1}, from dh_t without dL/doutput_t."""
    inside = (n < H)[None, :]
    mask = active[:, None] & inside
    i, f, g, o = load_gates(gates, row, n, mask, H)
    at = row[:, None] * H + n[None, :]
    tanh_c = tanh(tl.load(cells + at, mask=mask, other=0.0))
    begins, before = state_before(t, b, row, end, B, REVERSE)
    source = tl.where(begins, c_0, cells) + before * H
    c = tl.load(source[:, None] + n[None, :], mask=carries[:, None] & inside, other=0.0)
    if grad_output is not None:
        dh += tl.load(grad_output + at, mask=mask, other=0.0)
    # Not before all is loaded: that would take more registers.
    i, f, g, o = recall_gates(i, f, g, o, dc.dtype)
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    S = grad_gates.dtype.element_ty
    ai, af = (dc * g * i * (1.0 - i)).to(S), (dc * c * f * (1.0 - f)).to(S)
    ag, ao = (dc * i * (1.0 - g * g)).to(S), (dh * tanh_c * o * (1.0 - o)).to(S)
    store_gates(grad_gates, row, n, ai, af, ag, ao, mask, H)
    return ai, af, ag, ao, tl.where(carries[:, None], dc * f, 0.0)


@triton.jit
def flow(carries, detach_mask, t, b, cut_step, cut_sample):
    """Who passes the gradient of the gates of step t on to h_{t-1}."""
    if detach_mask is not None:
        cut = tl.load(detach_mask + t * cut_step + b * cut_sample, mask=carries, other=1)
        carries = carries & (cut == 0)
    return carries


@triton.jit
def stream_backward(row, flows, n, weight_hh, grad_gates, acc, H, BLOCK_K: tl.constexpr):
    """Da W_hh, with da of ``grad_gates``, for the samples that ``flows``."""
    for start in range(0, 4 * H, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        known = k < 4 * H
        da = tl.load(grad_gates + row[:, None] * (4 * H) + k[None, :],
                     mask=flows[:, None] & known[None, :], other=0.0)  # fmt: skip
        w = tl.load(weight_hh + k[:, None] * H + n[None, :],
                    mask=known[:, None] & (n < H)[None, :], other=0.0)  # fmt: skip
        acc = add_product(da, w, acc)
    return acc
