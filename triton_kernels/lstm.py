"""The recurrence of the LSTM in Triton, forward and backward.

    z_t = projected_t + bias + h_{t-1} W_hh^T;  i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of z_t
    c_t = f c_{t-1} + i g;  h_t = o tanh(c_t), rounded to S

    dh_t += dL/doutput_t;  dc_t += dh_t o (1 - tanh(c_t)^2)
    da_t = dL/dz_t;  dc_{t-1} = dc_t f;  dh_{t-1} = da_t W_hh, and zero where step t is detached

T steps, B samples, H units. S is the dtype of what is stored, A that of sums and of c (float32;
float64 for float64). The input projection before, and the gradients of weights, bias and input
after, are large products of torch; see :mod:`throughtime.ops.lstm_gpu`.

* ``walk_forward``, ``walk_backward`` [a program per tile of samples]: all steps in one launch, for
  units that fit one tile (``FUSED_UNITS``). c, dc and dh stay in registers; h, and da as S, go
  through the memory in which they are returned, with one barrier per step.
* ``one_step_forward``, ``one_step_backward`` [tiles of samples x tiles of units]: one launch per
  step, for more units; c, dc and dh lie in the tensors in which they are returned.

A step costs 8 B H^2 operations either way. The backward pass leaves those out for every tile whose
samples are all detached, reset or past their end. Every number is summed by one program in one
order: no atomics, bit-equal from run to run. T, B and t are run-time arguments; nothing recompiles
for another length. Offsets are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from throughtime.triton_kernels.common import block, sigmoid, tanh
from torch import Tensor

FUSED_UNITS = {2: 256, 4: 128, 8: 64}  # by the bytes of S: what leaves no register spilled
SAMPLES = 16  # of a program of a walk: the least that a matrix unit takes

# The interpreter keeps bfloat16 as bare 16 bits, and multiplies those.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_RUN_TIME = ["T", "B", "t", "cut_step", "cut_sample"]


@triton.jit
def add_product(rows, weight, acc):
    """Acc [BB, BN] + rows [BB, BK] @ weight [BK, BN], summed in the dtype of acc."""
    if _INTERPRETED:
        rows, weight = rows.to(acc.dtype), weight.to(acc.dtype)
    return tl.dot(rows, weight, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def forward_step(
    t, b, n, end, c, projected, bias, h_0, weight_hh, reset, output, h_n, gates, cells, B, H,
    REVERSE: tl.constexpr, SAVE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Step t of samples b ``[BB]`` and units n ``[BN]``: stores all of it but c_t, returned."""
    t = tl.zeros_like(end) + t
    active = t < end
    row = t * B + b
    if REVERSE:
        first, last = t == end - 1, active & (t == 0)
        before = tl.where(first, b, row + B)
    else:
        first, last = active & (t == 0), t == end - 1
        before = tl.where(first, b, row - B)
    carries = active
    if reset is not None:
        carries = active & (tl.load(reset + row, mask=active, other=0) == 0)
    inside = n < H
    mask = active[:, None] & inside[None, :]

    # Asked for before the product, which hides how long they take.
    at = projected + row[:, None] * (4 * H) + n[None, :]
    xi = tl.load(at, mask=mask, other=0.0)  # padding may hold anything
    xf = tl.load(at + H, mask=mask, other=0.0)
    xg = tl.load(at + 2 * H, mask=mask, other=0.0)
    xo = tl.load(at + 3 * H, mask=mask, other=0.0)

    if bias is not None:
        xi += tl.load(bias + n, mask=inside, other=0.0).to(c.dtype)[None, :]
        xf += tl.load(bias + H + n, mask=inside, other=0.0).to(c.dtype)[None, :]
        xg += tl.load(bias + 2 * H + n, mask=inside, other=0.0).to(c.dtype)[None, :]
        xo += tl.load(bias + 3 * H + n, mask=inside, other=0.0).to(c.dtype)[None, :]

    zi = tl.zeros([BLOCK_B, BLOCK_N], c.dtype)
    zf = tl.zeros([BLOCK_B, BLOCK_N], c.dtype)
    zg = tl.zeros([BLOCK_B, BLOCK_N], c.dtype)
    zo = tl.zeros([BLOCK_B, BLOCK_N], c.dtype)
    gate = tl.cast(H, tl.int64) * H  # weights of a gate
    source = tl.where(first[:, None], h_0, output) + before[:, None] * H
    for start in range(0, H, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(source + k[None, :], mask=carries[:, None] & (k < H)[None, :], other=0.0)
        w = weight_hh + n[None, :] * H + k[:, None]
        known = (k < H)[:, None] & inside[None, :]
        zi = add_product(h, tl.load(w, mask=known, other=0.0), zi)
        zf = add_product(h, tl.load(w + gate, mask=known, other=0.0), zf)
        zg = add_product(h, tl.load(w + 2 * gate, mask=known, other=0.0), zg)
        zo = add_product(h, tl.load(w + 3 * gate, mask=known, other=0.0), zo)

    i, f, g, o = sigmoid(zi + xi), sigmoid(zf + xf), tanh(zg + xg), sigmoid(zo + xo)
    c_t = f * tl.where(carries[:, None], c, 0.0) + i * g
    h_t = o * tanh(c_t)
    tl.store(output + row[:, None] * H + n[None, :], h_t, mask=mask)
    tl.store(h_n + b[:, None] * H + n[None, :], h_t, mask=last[:, None] & inside[None, :])
    if SAVE:
        at = gates + row[:, None] * (4 * H) + n[None, :]
        tl.store(at, i, mask=mask)
        tl.store(at + H, f, mask=mask)
        tl.store(at + 2 * H, g, mask=mask)
        tl.store(at + 3 * H, o, mask=mask)
        tl.store(cells + row[:, None] * H + n[None, :], c_t, mask=mask)
    return tl.where(active[:, None], c_t, c)


@triton.jit(do_not_specialize=_RUN_TIME)
def walk_forward(
    projected, bias, h_0, weight_hh, ends, reset, output, h_n, c_n, gates, cells, B, H,
    REVERSE: tl.constexpr, SAVE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All steps of a tile of samples; ``h_n`` and ``c_n`` begin as the initial state."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.arange(0, BLOCK_N)
    end = tl.load(ends + b, mask=b < B, other=0)
    state = c_n + b[:, None] * H + n[None, :]
    mask = (b < B)[:, None] & (n < H)[None, :]
    c = tl.load(state, mask=mask, other=0.0)
    longest = tl.max(end, axis=0)
    for step in range(longest):
        t = longest - 1 - step if REVERSE else step
        c = forward_step(t, b, n, end, c, projected, bias, h_0, weight_hh, reset, output, h_n,
                         gates, cells, B, H, REVERSE, SAVE, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
        tl.debug_barrier()  # the next step reads h_t of all units
    tl.store(state, c, mask=mask)


@triton.jit(do_not_specialize=_RUN_TIME)
def one_step_forward(
    t, projected, bias, h_0, weight_hh, ends, reset, output, h_n, c_n, gates, cells, B, H,
    REVERSE: tl.constexpr, SAVE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Step t of a tile of samples and units; ``c_n`` holds c_{t-1}, then c_t."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(ends + b, mask=b < B, other=0)
    state = c_n + b[:, None] * H + n[None, :]
    mask = (b < B)[:, None] & (n < H)[None, :]
    c = tl.load(state, mask=mask, other=0.0)
    c = forward_step(t, b, n, end, c, projected, bias, h_0, weight_hh, reset, output, h_n,
                     gates, cells, B, H, REVERSE, SAVE, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
    tl.store(state, c, mask=mask)


@triton.jit
def backward_step(
    t, b, n, end, dh, dc, grad_output, c_0, weight_hh, gates, cells, reset, detach_mask, cut_step,
    cut_sample, grad_gates, B, H, REVERSE: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Step t of samples b ``[BB]`` and units n ``[BN]``, after the step that follows in travel.

    dh and dc are gradients of h_t and c_t, but for what the following step's gates give h_t, which
    is added first: by then da of all its units is in memory. Returned are those of the state before
    step t, again but for what the gates of t give. A walk therefore ends with one step more, with t
    outside of all samples, which only adds.
    """
    t = tl.zeros_like(end) + t
    active = (t >= 0) & (t < end)
    row = t * B + b
    if REVERSE:
        first, later = t == end - 1, t - 1
        before = tl.where(first, b, row + B)
    else:
        first, later = active & (t == 0), t + 1
        before = tl.where(first, b, row - B)
    carries = active
    if reset is not None:
        carries = active & (tl.load(reset + row, mask=active, other=0) == 0)
    inside = n < H
    mask = active[:, None] & inside[None, :]

    # Asked for before the product, which hides how long they take.
    at = gates + row[:, None] * (4 * H) + n[None, :]
    i = tl.load(at, mask=mask, other=0.0).to(dc.dtype)
    f = tl.load(at + H, mask=mask, other=0.0).to(dc.dtype)
    g = tl.load(at + 2 * H, mask=mask, other=0.0).to(dc.dtype)
    o = tl.load(at + 3 * H, mask=mask, other=0.0).to(dc.dtype)
    c = tl.load(cells + row[:, None] * H + n[None, :], mask=mask, other=0.0)
    c_before = tl.load(tl.where(first[:, None], c_0, cells) + before[:, None] * H + n[None, :],
                       mask=carries[:, None] & inside[None, :], other=0.0)  # fmt: skip

    followed = (later >= 0) & (later < end)
    later_row = later * B + b
    flows = followed
    if reset is not None:
        flows = flows & (tl.load(reset + later_row, mask=followed, other=1) == 0)
    if detach_mask is not None:
        cut = tl.load(detach_mask + later * cut_step + b * cut_sample, mask=followed, other=1)
        flows = flows & (cut == 0)
    given = tl.zeros([BLOCK_B, BLOCK_N], dc.dtype)
    if tl.max(flows.to(tl.int32), axis=0) > 0:  # else h-detach spares the product
        for start in range(0, 4 * H, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K).to(tl.int64)
            known = k < 4 * H
            da = tl.load(grad_gates + later_row[:, None] * (4 * H) + k[None, :],
                         mask=flows[:, None] & known[None, :], other=0.0)  # fmt: skip
            w = tl.load(weight_hh + k[:, None] * H + n[None, :],
                        mask=known[:, None] & inside[None, :], other=0.0)  # fmt: skip
            given = add_product(da, w, given)
    dh = tl.where(followed[:, None], given, dh)

    if grad_output is not None:
        dh += tl.load(grad_output + row[:, None] * H + n[None, :], mask=mask, other=0.0)
    tanh_c = tanh(c)
    dc_t = dc + dh * o * (1.0 - tanh_c * tanh_c)
    at = grad_gates + row[:, None] * (4 * H) + n[None, :]
    tl.store(at, dc_t * g * i * (1.0 - i), mask=mask)
    tl.store(at + H, dc_t * c_before * f * (1.0 - f), mask=mask)
    tl.store(at + 2 * H, dc_t * i * (1.0 - g * g), mask=mask)
    tl.store(at + 3 * H, dh * tanh_c * o * (1.0 - o), mask=mask)
    dc = tl.where(active[:, None], tl.where(carries[:, None], dc_t * f, 0.0), dc)
    return dh, dc


@triton.jit(do_not_specialize=_RUN_TIME)
def walk_backward(
    grad_output, c_0, weight_hh, ends, gates, cells, reset, detach_mask, cut_step, cut_sample,
    grad_gates, grad_h, grad_c, B, H, REVERSE: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All steps of a tile of samples.

    ``grad_h`` and ``grad_c`` begin as gradients of the final state and end as those of the initial.
    """
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.arange(0, BLOCK_N)
    end = tl.load(ends + b, mask=b < B, other=0)
    state = b[:, None] * H + n[None, :]
    mask = (b < B)[:, None] & (n < H)[None, :]
    dh = tl.load(grad_h + state, mask=mask, other=0.0)
    dc = tl.load(grad_c + state, mask=mask, other=0.0)
    longest = tl.max(end, axis=0)
    for step in range(longest + 1):
        t = step if REVERSE else longest - 1 - step
        dh, dc = backward_step(t, b, n, end, dh, dc, grad_output, c_0, weight_hh, gates, cells,
                               reset, detach_mask, cut_step, cut_sample, grad_gates, B, H, REVERSE,
                               BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
        tl.debug_barrier()  # the next step reads da of all units
    tl.store(grad_h + state, dh, mask=mask)
    tl.store(grad_c + state, dc, mask=mask)


@triton.jit(do_not_specialize=_RUN_TIME)
def one_step_backward(
    t, grad_output, c_0, weight_hh, ends, gates, cells, reset, detach_mask, cut_step, cut_sample,
    grad_gates, grad_h, grad_c, B, H, REVERSE: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Step t of a tile of samples and units; ``grad_h`` and ``grad_c`` hold dh and dc."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(ends + b, mask=b < B, other=0)
    state = b[:, None] * H + n[None, :]
    mask = (b < B)[:, None] & (n < H)[None, :]
    dh = tl.load(grad_h + state, mask=mask, other=0.0)
    dc = tl.load(grad_c + state, mask=mask, other=0.0)
    dh, dc = backward_step(t, b, n, end, dh, dc, grad_output, c_0, weight_hh, gates,
                           cells, reset, detach_mask, cut_step, cut_sample, grad_gates, B, H,
                           REVERSE, BLOCK_B, BLOCK_N, BLOCK_K)  # fmt: skip
    tl.store(grad_h + state, dh, mask=mask)
    tl.store(grad_c + state, dc, mask=mask)


def fused(H: int, dtype: torch.dtype) -> bool:
    """Whether one program holds all units, and walks through all steps."""
    return FUSED_UNITS[dtype.itemsize] >= H


def options(B: int, H: int, dtype: torch.dtype) -> dict[str, int]:
    """Blocks and warps of a walk, or of a step where units do not fit a walk."""
    if fused(H, dtype):
        units = block(H, least=16)
        return {
            "BLOCK_B": SAMPLES,
            "BLOCK_N": units,
            "BLOCK_K": min(units, 64 // dtype.itemsize),
            "num_warps": max(1, min(8, units // 16)),
        }
    return {
        "BLOCK_B": block(B, least=16, most=32),
        "BLOCK_N": 32,
        "BLOCK_K": 128 // dtype.itemsize,
        "num_warps": 4,
    }


def _ends(lengths: Tensor | None, T: int, B: int, device: torch.device) -> Tensor:
    return torch.full((B,), T, device=device) if lengths is None else lengths


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def recurrence_forward(
    projected: Tensor,
    bias: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All steps of the LSTM after its input projection. Arguments are contiguous and not checked.

    Args:
        projected: A ``[T, B, 4H]``, x W_ih^T; anything past a sample's end.
        bias: S ``[4H]`` or None.
        h_0: S ``[B, H]``.
        c_0: A ``[B, H]``.
        weight_hh: S ``[4H, H]``, gate rows i, f, g, o.
        lengths: int64 ``[B]`` or None.
        reset: bool ``[T, B]`` or None.
        reverse: travel from the last position to the first.
        save: for the backward pass.

    Returns:
        output S ``[T, B, H]``, h_n S, c_n A ``[B, H]``, gates S ``[T, B, 4H]``, cells A
        ``[T, B, H]``; the last two hold anything past a sample's end, and are empty without
        ``save``.
    """
    (T, B, _), H, dtype = projected.shape, weight_hh.size(1), weight_hh.dtype
    output = h_0.new_empty(T, B, H) if lengths is None else h_0.new_zeros(T, B, H)
    h_n, c_n = h_0.clone(), c_0.clone()
    gates = h_0.new_empty((T, B, 4 * H) if save else 0)
    cells = c_0.new_empty((T, B, H) if save else 0)
    if B > 0:
        arguments = (
            projected, bias, h_0, weight_hh, _ends(lengths, T, B, h_0.device), _bytes(reset),
            output, h_n, c_n, gates, cells, B, H,
        )  # fmt: skip
        chosen = {"REVERSE": reverse, "SAVE": save, **options(B, H, dtype)}
        samples = triton.cdiv(B, chosen["BLOCK_B"])
        if fused(H, dtype):
            walk_forward[(samples,)](*arguments, **chosen)
        else:
            grid = (samples, triton.cdiv(H, chosen["BLOCK_N"]))
            for t in reversed(range(T)) if reverse else range(T):
                one_step_forward[grid](t, *arguments, **chosen)
    return output, h_n, c_n, gates, cells


def recurrence_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    c_0: Tensor,
    weight_hh: Tensor,
    gates: Tensor,
    cells: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    detach_mask: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through all steps. Arguments are contiguous and not checked.

    Args:
        grad_output: S ``[T, B, H]`` or None; anything past a sample's end.
        grad_h_n: S ``[B, H]`` or None.
        grad_c_n: A ``[B, H]`` or None.
        c_0, weight_hh, lengths, reset, reverse: as given to :func:`recurrence_forward`.
        gates, cells: what it saved.
        detach_mask: bool ``[T]`` or ``[T, B]``, True cuts the gradient into the h that enters step
            t; or None.

    Returns:
        grad_gates S ``[T, B, 4H]``, before the nonlinearities and zero past a sample's end;
        grad_h_0 and grad_c_0 A ``[B, H]``.
    """
    (T, B, H), dtype = cells.shape, weight_hh.dtype
    grad_gates = torch.empty_like(gates) if lengths is None else torch.zeros_like(gates)
    grad_h = torch.zeros_like(c_0) if grad_h_n is None else grad_h_n.to(c_0.dtype, copy=True)
    grad_c = torch.zeros_like(c_0) if grad_c_n is None else grad_c_n.clone()
    if B > 0:
        per_sample = detach_mask is not None and detach_mask.dim() == 2
        arguments = (
            grad_output, c_0, weight_hh, _ends(lengths, T, B, c_0.device), gates, cells,
            _bytes(reset), _bytes(detach_mask), B if per_sample else 1, int(per_sample),
            grad_gates, grad_h, grad_c, B, H,
        )  # fmt: skip
        chosen = {"REVERSE": reverse, **options(B, H, dtype)}
        samples = triton.cdiv(B, chosen["BLOCK_B"])
        if fused(H, dtype):
            walk_backward[(samples,)](*arguments, **chosen)
        else:
            grid = (samples, triton.cdiv(H, chosen["BLOCK_N"]))
            # One launch more than steps: it adds what the gates of the last one give h_0.
            for t in range(T + 1) if reverse else range(T - 1, -2, -1):
                one_step_backward[grid](t, *arguments, **chosen)
    return grad_gates, grad_h, grad_c
