"""The LSTM cell in Triton, and the products with the four gates of W_hh.

    i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of the sums z_t
    c_t = f c_{t-1} + i g                      h_t = o tanh(c_t)

    dc_t += dh_t o (1 - tanh(c_t)^2)           da_o = dh_t tanh(c_t) o (1 - o)
    da_i = dc_t g i (1 - i)                    da_f = dc_t c_{t-1} f (1 - f)
    da_g = dc_t i (1 - g^2)                    dc_{t-1} = dc_t f

Tiles are of samples ``[BB]`` and units n ``[BN]``, four of them for the gates i, f, g, o.
"""

from __future__ import annotations

import triton
import triton.language as tl
from throughtime.triton_kernels.common import add_product, sigmoid, tanh


@triton.jit
def load_gates(at, mask, H):
    """Four tiles of a row; ``at`` points at the one of i, the next is H further."""
    return (
        tl.load(at, mask=mask, other=0.0),
        tl.load(at + H, mask=mask, other=0.0),
        tl.load(at + 2 * H, mask=mask, other=0.0),
        tl.load(at + 3 * H, mask=mask, other=0.0),
    )


@triton.jit
def store_gates(at, i, f, g, o, mask, H):
    """The reverse of ``load_gates``."""
    tl.store(at, i, mask=mask)
    tl.store(at + H, f, mask=mask)
    tl.store(at + 2 * H, g, mask=mask)
    tl.store(at + 3 * H, o, mask=mask)


@triton.jit
def gates_of(zi, zf, zg, zo):
    """The gates from their sums."""
    return sigmoid(zi), sigmoid(zf), tanh(zg), sigmoid(zo)


@triton.jit
def cell_forward(i, f, g, o, c):
    """h_t and c_t from the gates and c_{t-1}."""
    c_t = f * c + i * g
    return o * tanh(c_t), c_t


@triton.jit
def cell_backward(i, f, g, o, tanh_c, c, dh, dc, S: tl.constexpr):
    """da_t, four tiles of dtype S, and dc_t; ``c`` is c_{t-1}, dc lacks what comes from dh_t."""
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    ai, af = (dc * g * i * (1.0 - i)).to(S), (dc * c * f * (1.0 - f)).to(S)
    ag, ao = (dc * i * (1.0 - g * g)).to(S), (dh * tanh_c * o * (1.0 - o)).to(S)
    return ai, af, ag, ao, dc


@triton.jit
def load_weight(weight_hh, gate, k, n, stride_k, stride_n, H):
    """A tile ``[BK, BN]`` of a gate; the strides in W_hh are those of k, summed over, and of n."""
    at = weight_hh + tl.cast(H, tl.int64) * H * gate
    at = at + k[:, None] * stride_k + n[None, :] * stride_n
    return tl.load(at, mask=(k < H)[:, None] & (n < H)[None, :], other=0.0)


@triton.jit
def load_weights(weight_hh, n, stride_k, stride_n, H):
    """All of W_hh, a tile ``[BN, BN]`` of each gate.

    Without the barriers all loads would be in flight at once, in registers.
    """
    wi = load_weight(weight_hh, 0, n, n, stride_k, stride_n, H)
    tl.debug_barrier()
    wf = load_weight(weight_hh, 1, n, n, stride_k, stride_n, H)
    tl.debug_barrier()
    wg = load_weight(weight_hh, 2, n, n, stride_k, stride_n, H)
    tl.debug_barrier()
    return wi, wf, wg, load_weight(weight_hh, 3, n, n, stride_k, stride_n, H)


@triton.jit
def add_recurrent(source, present, n, weight_hh, zi, zf, zg, zo, H, BLOCK_K: tl.constexpr):
    """Adds h W_hh^T to the sums of the gates; ``source`` ``[BB]`` points at rows of h."""
    for start in range(0, H, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(
            source[:, None] + k[None, :], mask=present[:, None] & (k < H)[None, :], other=0.0
        )
        zi = add_product(h, load_weight(weight_hh, 0, k, n, 1, H, H), zi)
        zf = add_product(h, load_weight(weight_hh, 1, k, n, 1, H, H), zf)
        zg = add_product(h, load_weight(weight_hh, 2, k, n, 1, H, H), zg)
        zo = add_product(h, load_weight(weight_hh, 3, k, n, 1, H, H), zo)
    return zi, zf, zg, zo
