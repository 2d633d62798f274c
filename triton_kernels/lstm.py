"""The recurrence of the LSTM in Triton, forward and backward.

    z_t = projected_t + bias + h_{t-1} W_hh^T        c_t, h_t: cell.py, h_t rounded to S
    dh_t += dL/doutput_t                             da_t, dc_{t-1}: cell.py
    dh_{t-1} = da_t W_hh, and zero where step t is detached

T steps, B samples, H units. S is the dtype of what is stored, A that of sums and of c (float32;
float64 for float64). The input projection before, and the gradients of weights, bias and input
after, are large products of torch; see :mod:`throughtime.ops.lstm.gpu`.

* ``walk_forward``, ``walk_backward`` [a program per tile of samples]: all steps in one launch; h,
  c, dh and dc stay in registers. HELD: W_hh is read once and stays on the chip (shared memory on
  NVIDIA), and a step touches only its own inputs and results. Otherwise a step streams W_hh from
  the L2 cache in slices, and reads h_{t-1} or da_t in slices from where it was stored, after a
  barrier.
* ``one_step_forward``, ``one_step_backward`` [tiles of samples x tiles of units]: one launch per
  step, for more units; c, dc and dh lie in the tensors in which they are returned.

A step costs 8 B H^2 operations either way. The backward pass skips them, and the barrier, for
every tile whose samples are all detached, reset or past their end. One program adds each sum in one
order: no atomics, bit-equal repeats. T, B and t are run-time arguments: nothing recompiles for
another length. Offsets are 64-bit.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from throughtime.triton_kernels.cell import add_recurrent, load_gates, load_weights
from throughtime.triton_kernels.common import (
    LEAST_DEPTH,
    add_product,
    add_rows_times_weight,
    block,
    ends_of,
    on_its_gpu,
)
from throughtime.triton_kernels.lstm_steps import (
    load_bias,
    open_samples,
    state_before,
    step_backward,
    step_forward,
    step_of,
)
from torch import Tensor

from throughtime.ops.lstm.recurrence import BackwardArguments, ForwardArguments, saved_gates

# Units of a walk by the bytes of S. Twice as many spill registers with any number of warps.
WALKED_UNITS = {2: 128, 4: 128, 8: 64}
SAMPLES = 16  # of a program of a walk: the least that a matrix unit takes

_RUN_TIME = ["T", "B", "t"]


@triton.jit(do_not_specialize=_RUN_TIME)
def walk_forward(
    projected, bias, h_0, weight_hh, ends, reset, output, h_n, c_n, gates, cells, B, H,
    REVERSE: tl.constexpr, SAVE: tl.constexpr, HELD: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All steps of a tile of samples; ``h_n`` and ``c_n`` begin as the initial state."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.arange(0, BLOCK_N)
    end = tl.load(ends + b, mask=b < B, other=0)
    state = b[:, None] * H + n[None, :]
    inside = (n < H)[None, :]
    mask = (b < B)[:, None] & inside
    h = tl.load(h_n + state, mask=mask, other=0.0)
    c = tl.load(c_n + state, mask=mask, other=0.0)
    nothing = tl.zeros_like(c)
    bi, bf, bg, bo = load_bias(bias, n, H)
    if HELD:
        wi, wf, wg, wo = load_weights(weight_hh, n, 1, H, H)
    longest = tl.max(end, axis=0)
    for step in range(longest):
        t = tl.zeros_like(end) + (longest - 1 - step if REVERSE else step)
        row, active, carries = step_of(t, b, end, reset, B)
        here = active[:, None] & inside
        # Loaded before the product, which hides their latency; padding may hold anything.
        xi, xf, xg, xo = load_gates(projected + row[:, None] * (4 * H) + n[None, :], here, H)
        xi, xf, xg, xo = xi + bi, xf + bf, xg + bg, xo + bo
        if HELD:
            entering = tl.where(carries[:, None], h, tl.zeros_like(h))
            zi, zf = add_product(entering, wi, nothing), add_product(entering, wf, nothing)
            zg, zo = add_product(entering, wg, nothing), add_product(entering, wo, nothing)
            zi, zf, zg, zo = zi + xi, zf + xf, zg + xg, zo + xo
        else:
            begins, before = state_before(t, b, row, end, B, REVERSE)
            source = tl.where(begins, h_0, output) + before * H
            zi, zf, zg, zo = add_recurrent(source, carries, n, weight_hh, xi, xf, xg, xo, H,
                                            BLOCK_K)  # fmt: skip
        entering_c = tl.where(carries[:, None], c, 0.0)
        h_t, c_t = step_forward(zi, zf, zg, zo, entering_c, row, n, here, output, gates, cells, H,
                                SAVE)  # fmt: skip
        h, c = tl.where(active[:, None], h_t, h), tl.where(active[:, None], c_t, c)
        if not HELD:
            tl.debug_barrier()  # the next step reads h_t of all units
    tl.store(h_n + state, h, mask=mask)
    tl.store(c_n + state, c, mask=mask)


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
    state = b[:, None] * H + n[None, :]
    t = tl.zeros_like(end) + t
    row, active, carries = step_of(t, b, end, reset, B)
    inside = (n < H)[None, :]
    mask = active[:, None] & inside
    c = tl.load(c_n + state, mask=carries[:, None] & inside, other=0.0)
    xi, xf, xg, xo = load_gates(
        projected + row[:, None] * (4 * H) + n[None, :], mask, H
    )  # padding may hold anything
    bi, bf, bg, bo = load_bias(bias, n, H)
    begins, before = state_before(t, b, row, end, B, REVERSE)
    source = tl.where(begins, h_0, output) + before * H
    zi, zf, zg, zo = add_recurrent(source, carries, n, weight_hh, xi + bi, xf + bf, xg + bg,
                                    xo + bo, H, BLOCK_K)  # fmt: skip
    h_t, c_t = step_forward(zi, zf, zg, zo, c, row, n, mask, output, gates, cells, H, SAVE)
    tl.store(h_n + state, h_t, mask=mask)
    tl.store(c_n + state, c_t, mask=mask)


@triton.jit(do_not_specialize=_RUN_TIME)
def walk_backward(
    grad_output, c_0, weight_hh, ends, gates, cells, reset, detach_mask,
    grad_gates, grad_h, grad_c, B, H, REVERSE: tl.constexpr, HELD: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
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
    if HELD:
        wi, wf, wg, wo = load_weights(weight_hh, n, H, 1, H)
    longest = tl.max(end, axis=0)
    for step in range(longest):
        t = tl.zeros_like(end) + (step if REVERSE else longest - 1 - step)
        row, active, carries = step_of(t, b, end, reset, B)
        flows = open_samples(carries, detach_mask, t, b, B)
        ai, af, ag, ao, dc_before = step_backward(dh, dc, t, b, row, end, n, active, carries,
            grad_output, c_0, gates, cells, grad_gates, B, H, REVERSE)  # fmt: skip
        given = tl.zeros_like(dh)
        # At most one round, none where h-detach spares the product. Inside an `if`, Triton would
        # convert the layout of W_hh at every step; out of a loop it moves the conversion.
        for _ in range(tl.max(flows.to(tl.int32), axis=0)):
            if HELD:
                given = add_product(af, wf, add_product(ai, wi, given))
                given = add_product(ao, wo, add_product(ag, wg, given))
            else:
                tl.debug_barrier()  # da_t of all units is read
                given = add_rows_times_weight(given, grad_gates + row * (4 * H), flows, weight_hh,
                                              n, H, tl.cast(4 * H, tl.int64), 1, H,
                                              BLOCK_K)  # fmt: skip
        given = tl.where(flows[:, None], given, 0.0)
        dh = tl.where(active[:, None], given, dh)
        dc = tl.where(active[:, None], dc_before, dc)
    tl.store(grad_h + state, dh, mask=mask)
    tl.store(grad_c + state, dc, mask=mask)


@triton.jit(do_not_specialize=_RUN_TIME)
def one_step_backward(
    t, grad_output, c_0, weight_hh, ends, gates, cells, reset, detach_mask,
    grad_gates, grad_h, grad_c, B, H, REVERSE: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Step t of a tile of samples and units, after the product of the step that follows in travel.

    The da of all units of that step is in memory. The last launch, with t outside of all samples,
    has the product only. ``grad_h`` and ``grad_c`` hold dh and dc, as in :func:`walk_backward`.
    """
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(ends + b, mask=b < B, other=0)
    state = b[:, None] * H + n[None, :]
    mask = (b < B)[:, None] & (n < H)[None, :]
    dh = tl.load(grad_h + state, mask=mask, other=0.0)
    dc = tl.load(grad_c + state, mask=mask, other=0.0)
    t = tl.zeros_like(end) + t
    later = t - 1 if REVERSE else t + 1
    row, followed, carries = step_of(later, b, end, reset, B)
    flows = open_samples(carries, detach_mask, later, b, B)
    # One chain of 4 H float32 terms would round more than a library's sum: one for each gate.
    chains: tl.constexpr = 1 if weight_hh.dtype.element_ty.primitive_bitwidth == 16 else 4
    given, depth = tl.zeros_like(dh), tl.cast(4 * H // chains, tl.int64)
    if tl.max(flows.to(tl.int32), axis=0) > 0:  # else h-detach spares the product
        for chain in range(chains):
            rows, weight = grad_gates + row * (4 * H) + chain * depth, weight_hh + chain * depth * H
            given += add_rows_times_weight(tl.zeros_like(dh), rows, flows, weight, n, H, depth, 1,
                                           H, BLOCK_K)  # fmt: skip
    dh = tl.where(followed[:, None], given, dh)
    row, active, carries = step_of(t, b, end, reset, B)
    _, _, _, _, dc_before = step_backward(dh, dc, t, b, row, end, n, active, carries, grad_output,
                                          c_0, gates, cells, grad_gates, B, H, REVERSE)  # fmt: skip
    tl.store(grad_h + state, dh, mask=mask)
    tl.store(grad_c + state, tl.where(active[:, None], dc_before, dc), mask=mask)


def fused(H: int, dtype: torch.dtype) -> bool:
    """Whether one program takes all units, and walks through all steps."""
    return WALKED_UNITS[dtype.itemsize] >= H


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Of shared memory, what one program may have."""
    if device.type == "cpu":  # the interpreter
        return 2**30
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


def options(B: int, H: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Blocks and warps of a walk, or of a step where units do not fit a walk.

    It leaves no register spilled (16 at most per thread where H is no multiple of 16; with Triton
    before 3.8, 10 and 72), as ``python -m throughtime.triton_kernels.compile`` shows.
    """
    size = dtype.itemsize
    if fused(H, dtype):
        # Tiles of fewer float32 spill on sm_80.
        units = block(H, least=64 if size == 4 else 16)
        # More than 16 bits are no operands of a matrix unit here: their layout has no room to stay.
        held = size == 2 and 4 * size * units**2 + 128 * units <= _shared_bytes(device)
        return {
            "HELD": held,
            "BLOCK_B": SAMPLES,
            "BLOCK_N": units,
            "BLOCK_K": max(LEAST_DEPTH, 32 // size),
            "num_warps": max(1, min(8, units // (8 if size == 8 else 16))),
        }
    return {
        "BLOCK_B": block(B, least=16, most=32),
        "BLOCK_N": 32,
        "BLOCK_K": 64 if size == 2 else 16,
        "num_warps": 4 if size == 2 else 8,
    }


def _numbers(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask for a kernel: bytes, but beside float64 integers of 32 bits.

    Triton before 3.8 divides the operands of a product among threads by the narrowest load that
    they depend on, be it of a mask, and fails where float64 depends on bytes.
    """
    if mask is None:
        return None
    return mask.to(torch.int32) if dtype == torch.float64 else mask.view(torch.uint8)


@on_its_gpu
def recurrence_forward(call: ForwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All steps of one direction after its input projection.

    The arguments of ``lstm_recurrence_forward`` without the axis of directions, contiguous and not
    checked. ``gates`` and ``cells`` hold anything past a sample's end.
    """
    (T, B, _), H, dtype = call.projected.shape, call.weight_hh.size(1), call.weight_hh.dtype
    output = call.h_0.new_empty(T, B, H) if call.lengths is None else call.h_0.new_zeros(T, B, H)
    h_n, c_n = call.h_0.clone(), call.c_0.clone()
    gates = call.h_0.new_empty((T if call.save else 0, B, 4 * H), dtype=saved_gates(dtype))
    cells = call.c_0.new_empty(T if call.save else 0, B, H)
    if B > 0:
        ends = ends_of(call.lengths, T, B, call.h_0.device)
        arguments = (
            call.projected, call.bias, call.h_0, call.weight_hh, ends,
            _numbers(call.reset, dtype), output, h_n, c_n, gates, cells, B, H,
        )  # fmt: skip
        chosen = options(B, H, dtype, call.h_0.device)
        chosen = {"REVERSE": call.reverse, "SAVE": call.save, **chosen}
        samples = triton.cdiv(B, chosen["BLOCK_B"])
        if fused(H, dtype):
            walk_forward[(samples,)](*arguments, **chosen)
        else:
            grid = (samples, triton.cdiv(H, chosen["BLOCK_N"]))
            for t in reversed(range(T)) if call.reverse else range(T):
                one_step_forward[grid](t, *arguments, **chosen)
    return output, h_n, c_n, gates, cells


@on_its_gpu
def recurrence_backward(call: BackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through all steps of one direction.

    The arguments of ``lstm_recurrence_backward`` without the axis of directions, contiguous and not
    checked. ``grad_gates`` is zero past a sample's end.
    """
    (T, B, H), dtype = call.cells.shape, call.weight_hh.dtype
    unset = call.weight_hh.new_empty if call.lengths is None else call.weight_hh.new_zeros
    grad_gates = unset(T, B, 4 * H)
    grad_h, grad_c = (
        torch.zeros_like(call.c_0) if grad is None else grad.to(call.c_0.dtype, copy=True)
        for grad in (call.grad_h_n, call.grad_c_n)
    )
    if B > 0:
        ends = ends_of(call.lengths, T, B, call.c_0.device)
        arguments = (
            call.grad_output, call.c_0, call.weight_hh, ends, call.gates, call.cells,
            _numbers(call.reset, dtype), _numbers(call.detach_mask, dtype),
            grad_gates, grad_h, grad_c, B, H,
        )  # fmt: skip
        chosen = {"REVERSE": call.reverse, **options(B, H, dtype, call.c_0.device)}
        samples = triton.cdiv(B, chosen["BLOCK_B"])
        if fused(H, dtype):
            walk_backward[(samples,)](*arguments, **chosen)
        else:
            grid = (samples, triton.cdiv(H, chosen["BLOCK_N"]))
            # One launch more than steps: the product of the last step gives dh_0.
            for t in range(T + 1) if call.reverse else range(T - 1, -2, -1):
                one_step_backward[grid](t, *arguments, **chosen)
    return grad_gates, grad_h, grad_c
