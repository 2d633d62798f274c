"""RelLSTM in Triton: a program per tile of samples walks through all steps in one launch.

    s_t = (h_{t-1} + o_{t-1}) / 2      c_t, h_t: the cell (cell.py) of x_t W_ih^T + s_t W_hh^T
    q_t = s_t W_q^T, u_t = h_t W_u^T   o_t: attention of q_t over h and u of the window and the
                                       retained set, by additive scores (scores.py)

Shapes: T steps, S = P + T positions, B samples, H units, A attention units (see
:mod:`throughtime.ops.rel_lstm`). The input projection before the walk and the weight gradients
after it are large products of torch. Within a step the tile's state passes through memory from one
block of units to another, with a barrier between writing and reading, so any H and A fit. Float32
products are true float32. A step costs (6 H^2 + 2 A H + (W + K)(H + A)) multiply-adds per sample.

Saved for the backward pass, in one flat tensor: hidden ``[S, B, H]``, keys ``[S, B, A]``, gates i,
f, g, o and c ``[T, B, 5H]``, s ``[T, B, H]``, queries ``[T, B, A]``.

Backward: a program adds the gradients that attention gives keys and hidden states to rows of ``du``
and ``dh`` of its own samples: no atomics, bit-equal repeats.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from throughtime.triton_kernels.cell import (
    cell_backward,
    cell_forward,
    gates_of,
    load_gates,
    store_gates,
)
from throughtime.triton_kernels.common import (
    add_rows_times_weight,
    block,
    ends_of,
    load_tile,
    memory_after,
    memory_sizes,
    on_its_gpu,
    retained_positions,
    store_tile,
    tanh,
)
from throughtime.triton_kernels.scores import additive_gradients, additive_scores
from torch import Tensor

SAMPLES = 16  # of a program: the least that a matrix unit takes
WARPS = 8  # with 4 the walks spill registers

_RUN_TIME = ["T", "S", "R", "W", "K", "CAPACITY", "B"]


@triton.jit
def key_scores(
    queries, query_row, alive, keys, key_row, valid, weight_score, A, BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Scores of one candidate per sample ``[BB]``; -inf where there is none."""
    total = tl.zeros([BLOCK_B], queries.dtype.element_ty)
    for start in range(0, A, BLOCK_N):
        a = start + tl.arange(0, BLOCK_N)
        q = load_tile(queries, query_row, a, A, alive)
        u = load_tile(keys, key_row, a, A, valid)
        w = tl.load(weight_score + a, mask=a < A, other=0.0)
        total += additive_scores(q, u, w[None, :])
    return tl.where(valid, total, float("-inf"))


@triton.jit
def column_of(tile, columns, index):
    """Column ``index`` of a tile ``[BB, C]``."""
    return tl.sum(tl.where(columns[None, :] == index, tile, 0), axis=1)


@triton.jit
def of_candidate(window, retained, e, slot, c, W):
    """Column of candidate c in two tiles: of the window, then of the retained set."""
    return column_of(window, e, c) if c < W else column_of(retained, slot, c - W)


@triton.jit
def softmax(s, r, alive):
    """Weights of the window's scores and of the retained set's, ``[BB, C]`` each."""
    top = tl.maximum(tl.max(s, axis=1), tl.max(r, axis=1))
    top = tl.where(alive, top, 0.0)
    s, r = tl.exp(s - top[:, None]), tl.exp(r - top[:, None])
    total = tl.where(alive, tl.sum(s, axis=1) + tl.sum(r, axis=1), 1.0)
    return s / total[:, None], r / total[:, None]


@triton.jit(do_not_specialize=_RUN_TIME)
def walk_forward(
    x_gates, h_0, cells, context, weight_hh, weight_query, weight_key, weight_score, relevance,
    first, ends, hidden, keys, gates, states, queries, last, final_positions, final_relevance,
    rings, T, S, R, W, K, CAPACITY, B, H: tl.int32, A, KEEP_FIRST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All steps of a tile of samples; ``cells`` and ``context`` begin as the initial state.

    H has a type, so that 1 is no constant: Triton 3.9 would abort.
    """
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    present = b < B
    P = S - T
    begin = tl.load(first + b, mask=present, other=0)
    end = tl.load(ends + b, mask=present, other=0)
    e, slot = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_C)

    # The retained set of every sample: position (-1 empty) and relevance of every slot.
    kept_relevance = tl.load(relevance + slot[None, :].to(tl.int64) * B + b[:, None],
                             mask=present[:, None] & (slot < R)[None, :], other=-1.0)  # fmt: skip
    kept = tl.where((kept_relevance < 0) | (slot >= R)[None, :], -1, slot[None, :]).to(tl.int64)
    # Relevance of the window in a ring: position p has slot p % W.
    earlier = P - 1 - (P - 1 - e + W) % W
    known = present[:, None] & ((e < W)[None, :] & (earlier[None, :] >= begin[:, None]))
    ring = tl.load(relevance + earlier[None, :].to(tl.int64) * B + b[:, None], mask=known,
                   other=0.0)  # fmt: skip

    for t in range(tl.max(end, axis=0)):
        own = P + t
        alive = t < end
        row = t * B + b  # 64-bit, as b and t are
        own_row = own * B + b
        for start in range(0, H, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            if t > 0:
                h = load_tile(hidden, own_row - B, n, H, alive)
            else:
                h = load_tile(h_0, b, n, H, alive)
            store_tile(states, row, n, H, alive, 0.5 * (h + load_tile(context, b, n, H, alive)))
        tl.debug_barrier()

        for start in range(0, H, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            mask = alive[:, None] & (n < H)[None, :]
            # One gate after the other: four sums at once would spill registers.
            at = x_gates + row[:, None] * (4 * H) + n[None, :]
            zi = add_rows_times_weight(tl.load(at, mask=mask, other=0.0), states + row * H, alive,
                                       weight_hh, n, H, H, H, 1, BLOCK_K)  # fmt: skip
            zf = add_rows_times_weight(tl.load(at + H, mask=mask, other=0.0), states + row * H,
                                       alive, weight_hh + H * H, n, H, H, H, 1,
                                       BLOCK_K)  # fmt: skip
            zg = add_rows_times_weight(tl.load(at + 2 * H, mask=mask, other=0.0), states + row * H,
                                       alive, weight_hh + 2 * H * H, n, H, H, H, 1,
                                       BLOCK_K)  # fmt: skip
            zo = add_rows_times_weight(tl.load(at + 3 * H, mask=mask, other=0.0), states + row * H,
                                       alive, weight_hh + 3 * H * H, n, H, H, H, 1,
                                       BLOCK_K)  # fmt: skip
            i, f, g, o = gates_of(zi, zf, zg, zo)
            h, c = cell_forward(i, f, g, o, load_tile(cells, b, n, H, alive))
            store_tile(cells, b, n, H, alive, c)
            store_tile(hidden, own_row, n, H, alive, h)
            saved = gates + row[:, None] * (5 * H) + n[None, :]
            store_gates(saved, i, f, g, o, mask, H)
            tl.store(saved + 4 * H, c, mask=mask)
        tl.debug_barrier()

        for start in range(0, A, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            zero = tl.zeros([BLOCK_B, BLOCK_N], hidden.dtype.element_ty)
            q = add_rows_times_weight(zero, states + row * H, alive, weight_query, n, A, H, H, 1,
                                      BLOCK_K)  # fmt: skip
            u = add_rows_times_weight(zero, hidden + own_row * H, alive, weight_key, n, A, H, H, 1,
                                      BLOCK_K)  # fmt: skip
            store_tile(queries, row, n, A, alive, q)
            store_tile(keys, own_row, n, A, alive, u)
        tl.debug_barrier()

        # Scores of the window (by ring slot) and of the retained set (by slot).
        s = tl.full([BLOCK_B, BLOCK_W], float("-inf"), ring.dtype)
        r = tl.full([BLOCK_B, BLOCK_C], float("-inf"), ring.dtype)
        for c in range(W + CAPACITY):
            if c < W:
                place = own - (own - c + W) % W + 0 * b
                valid = alive & (place >= begin)
            else:
                place = column_of(kept, slot, c - W)
                valid = alive & (place >= 0)
            one = key_scores(queries, row, alive, keys, place * B + b, valid, weight_score, A,
                             BLOCK_N, BLOCK_B)  # fmt: skip
            if c < W:
                s = tl.where((e == c)[None, :], one[:, None], s)
            else:
                r = tl.where((slot == c - W)[None, :], one[:, None], r)
        s, r = softmax(s, r, alive)

        for start in range(0, H, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            out = tl.zeros([BLOCK_B, BLOCK_N], ring.dtype)
            for c in range(W):  # not one loop over both: that would spill registers
                place = own - (own - c + W) % W + 0 * b
                valid = alive & (place >= begin)
                h = load_tile(hidden, place * B + b, n, H, valid)
                out += column_of(s, e, c)[:, None] * h
            for c in range(CAPACITY):
                place = column_of(kept, slot, c)
                valid = alive & (place >= 0)
                h = load_tile(hidden, place * B + b, n, H, valid)
                out += column_of(r, slot, c)[:, None] * h
            store_tile(context, b, n, H, alive, out)

        # Relevance, and the competition for the retained set.
        position = own - (own - e + W) % W
        ring = tl.where(alive[:, None] & (position == own)[None, :], 0.0, ring)
        if not KEEP_FIRST:
            ring += tl.where(alive[:, None], s, 0.0)
        leaving = own - W + 1
        newcomer = tl.sum(tl.where((position == leaving)[None, :], ring, 0.0), axis=1)
        leaves = alive & (leaving >= begin)
        accepted = leaves & (newcomer >= 0)  # NaN is no relevance
        count = tl.sum((kept >= 0).to(tl.int32), axis=1)
        free = tl.min(tl.where(kept < 0, slot[None, :], BLOCK_C), axis=1)
        lowest = tl.min(tl.where(kept >= 0, kept_relevance, float("inf")), axis=1)
        equal = (kept >= 0) & (kept_relevance == lowest[:, None])
        loser = tl.max(tl.where(equal, kept, -1), axis=1)
        joins = accepted & (count < K)
        replaces = accepted & (count >= K) & (newcomer > lowest)
        forgotten = tl.where(replaces, loser, leaving)
        tl.store(last + forgotten * B + b, own_row * 0 + t, mask=leaves & (joins == 0))
        target = (joins[:, None] & (slot[None, :] == free[:, None])) | (
            replaces[:, None] & (kept == loser[:, None])
        )
        kept = tl.where(target, leaving, kept)
        kept_relevance = tl.where(target, newcomer[:, None], kept_relevance)
        tl.debug_barrier()

    ran = end > 0
    newest = P + end - 1
    place = newest[:, None] - (newest[:, None] - e[None, :] + W) % W
    window = present[:, None] & (e < W)[None, :] & (place >= begin[:, None])
    tl.store(last + kept * B + b[:, None], (end - 1)[:, None] + 0 * kept,
             mask=(kept >= 0) & ran[:, None])  # fmt: skip
    tl.store(last + place * B + b[:, None], (end - 1)[:, None] + 0 * place,
             mask=window & ran[:, None] & (place > (newest - W + 1)[:, None]))  # fmt: skip
    listed = present[:, None] & (slot < CAPACITY)[None, :]
    tl.store(final_positions + b[:, None] * CAPACITY + slot[None, :], kept, mask=listed)
    tl.store(final_relevance + b[:, None] * CAPACITY + slot[None, :], kept_relevance, mask=listed)
    tl.store(rings + b[:, None] * S + place, ring, mask=window)


@triton.jit
def candidate(c, own, begin, alive, kept, b, W):
    """Positions ``[BB]`` of candidate c, and where there is one: of the window, oldest first, then
    of the retained sets, to which ``kept`` ``[BB]`` points.
    """
    if c < W:
        place = own - W + 1 + c + 0 * b
        valid = alive & (place >= begin)
    else:
        place = tl.load(kept + c - W, mask=alive, other=-1).to(tl.int64)
        valid = alive & (place >= 0)
    return place, valid


@triton.jit(do_not_specialize=_RUN_TIME)
def walk_backward(
    grad, weight_hh, weight_query, weight_key, weight_score, first, ends, detached, c_0, hidden,
    keys, gates, queries, kept, direct, cells, context, da, dq, du, dh, dw, T, S, W, CAPACITY, B, H,
    A, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All steps of a tile, the last one first.

    ``direct``, ``cells`` and ``context`` begin as the gradients of the final h, c and o, and end as
    those of the initial ones.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program * BLOCK_B + tl.arange(0, BLOCK_B)
    present = b < B
    P = S - T
    begin = tl.load(first + b, mask=present, other=0)
    end = tl.load(ends + b, mask=present, other=0)
    e, slot = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_C)
    longest = tl.max(end, axis=0)
    for back in range(longest):
        t = longest - 1 - back
        own = P + t
        alive = t < end
        row = t * B + b
        own_row = own * B + b

        # Scores, and gradients of the weights: dp_c = do . h_c.
        s = tl.full([BLOCK_B, BLOCK_W], float("-inf"), dw.dtype.element_ty)
        r = tl.full([BLOCK_B, BLOCK_C], float("-inf"), dw.dtype.element_ty)
        ds = tl.zeros([BLOCK_B, BLOCK_W], dw.dtype.element_ty)
        dr = tl.zeros([BLOCK_B, BLOCK_C], dw.dtype.element_ty)
        for c in range(W + CAPACITY):
            place, valid = candidate(c, own, begin, alive, kept + (b * T + t) * CAPACITY, b, W)
            one = key_scores(queries, row, alive, keys, place * B + b, valid, weight_score, A,
                             BLOCK_N, BLOCK_B)  # fmt: skip
            dp = tl.zeros([BLOCK_B], dw.dtype.element_ty)
            for start in range(0, H, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                h = load_tile(hidden, place * B + b, n, H, valid)
                go = load_tile(context, b, n, H, valid)
                dp += tl.sum(h * go, axis=1)
            if c < W:
                s = tl.where((e == c)[None, :], one[:, None], s)
                ds = tl.where((e == c)[None, :], dp[:, None], ds)
            else:
                r = tl.where((slot == c - W)[None, :], one[:, None], r)
                dr = tl.where((slot == c - W)[None, :], dp[:, None], dr)
        s, r = softmax(s, r, alive)
        mean = tl.sum(s * ds, axis=1) + tl.sum(r * dr, axis=1)
        ds, dr = s * (ds - mean[:, None]), r * (dr - mean[:, None])

        for start in range(0, A, BLOCK_N):
            a = start + tl.arange(0, BLOCK_N)
            inside = a < A
            q = load_tile(queries, row, a, A, alive)
            w = tl.load(weight_score + a, mask=inside, other=0.0)
            to_q = tl.zeros([BLOCK_B, BLOCK_N], dw.dtype.element_ty)
            to_w = tl.load(dw + program * A + a, mask=inside, other=0.0)
            for c in range(W + CAPACITY):
                place, valid = candidate(c, own, begin, alive, kept + (b * T + t) * CAPACITY, b, W)
                part = of_candidate(ds, dr, e, slot, c, W)
                key_row = place * B + b
                u = load_tile(keys, key_row, a, A, valid)
                part = tl.where(valid, part, 0.0)
                of_q, of_u, of_w = additive_gradients(part, q, u, w[None, :])
                to_q += of_q
                to_w += tl.sum(of_w, axis=0)
                store_tile(du, key_row, a, A, valid, load_tile(du, key_row, a, A, valid) + of_u)
            store_tile(dq, row, a, A, alive, to_q)
            tl.store(dw + program * A + a, to_w, mask=inside)
        for start in range(0, H, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            go = load_tile(context, b, n, H, alive)
            for c in range(W + CAPACITY):
                place, valid = candidate(c, own, begin, alive, kept + (b * T + t) * CAPACITY, b, W)
                part = of_candidate(s, r, e, slot, c, W)[:, None]
                key_row = place * B + b
                of_h = load_tile(dh, key_row, n, H, valid) + part * go
                store_tile(dh, key_row, n, H, valid, of_h)
        tl.debug_barrier()

        # No later step attends this one: its du and dh are complete. Through the cell.
        for start in range(0, H, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            mask = alive[:, None] & (n < H)[None, :]
            d = load_tile(dh, own_row, n, H, alive)
            d = add_rows_times_weight(d, du + own_row * A, alive, weight_key, n, H, A, 1, H,
                                      BLOCK_K)  # fmt: skip
            d += load_tile(direct, b, n, H, alive)
            d += load_tile(grad, row, n, H, alive)
            saved = gates + row[:, None] * (5 * H) + n[None, :]
            i, f, g, o = load_gates(saved, mask, H)
            tanh_c = tanh(tl.load(saved + 4 * H, mask=mask, other=0.0))
            if t > 0:
                before = tl.load(saved - B * 5 * H + 4 * H, mask=mask, other=0.0)
            else:
                before = load_tile(c_0, b, n, H, alive)
            dc = load_tile(cells, b, n, H, alive)
            ai, af, ag, ao, dc = cell_backward(i, f, g, o, tanh_c, before, d, dc, d.dtype)
            store_tile(cells, b, n, H, alive, dc * f)
            store_gates(da + row[:, None] * (4 * H) + n[None, :], ai, af, ag, ao, mask, H)
        tl.debug_barrier()

        detach = tl.load(detached + row, mask=alive, other=0) != 0
        for start in range(0, H, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            half = tl.zeros([BLOCK_B, BLOCK_N], dw.dtype.element_ty)
            half = add_rows_times_weight(half, da + row * (4 * H), alive, weight_hh, n, H, 4 * H, 1,
                                         H, BLOCK_K)  # fmt: skip
            half = 0.5 * add_rows_times_weight(half, dq + row * A, alive, weight_query, n, H, A, 1,
                                               H, BLOCK_K)  # fmt: skip
            # Not by store_tile: that spills registers on sm_80.
            mask = alive[:, None] & (n < H)[None, :]
            state = b[:, None] * H + n[None, :]
            tl.store(context + state, half, mask=mask)
            tl.store(direct + state, tl.where(detach[:, None], 0.0, half), mask=mask)
        tl.debug_barrier()


def saved_numbers(length: int, batch: int, prefix: int, hidden: int, attention: int) -> int:
    """Size of the flat tensor that the forward pass leaves for the backward pass."""
    keys = (prefix + length) * (hidden + attention)
    return batch * (keys + length * (6 * hidden + attention))


def _views(saved: Tensor, T: int, B: int, S: int, H: int, A: int) -> list[Tensor]:
    """hidden, keys, gates, states, queries."""
    shapes = ((S, B, H), (S, B, A), (T, B, 5 * H), (T, B, H), (T, B, A))
    sizes = [a * b * c for a, b, c in shapes]
    return [x.view(shape) for x, shape in zip(saved.split(sizes), shapes, strict=True)]


def _weights(call: Any) -> list[Tensor]:
    """The weights of the walk, contiguous."""
    names = ("weight_hh", "weight_query", "weight_key", "weight_score")
    return [getattr(call, name).contiguous() for name in names]


def blocks(H: int, A: int, W: int, capacity: int) -> dict[str, int]:
    widest = max(H, A)
    return {
        "BLOCK_B": SAMPLES,
        "BLOCK_N": block(widest, least=16, most=32),
        "BLOCK_K": block(widest, least=16, most=32),
        "BLOCK_W": block(W),
        "BLOCK_C": block(capacity),
    }


@on_its_gpu
def forward(call: Any) -> tuple[Tensor, ...]:
    """``throughtime::rel_lstm_forward``: see :mod:`throughtime.ops.rel_lstm`."""
    (T, B, _), H, A = call.input.shape, call.weight_hh.size(1), call.weight_score.size(0)
    P = 0 if call.memory is None else call.memory.size(0)
    S, device = P + T, call.input.device
    W = min(call.window_size, S + 1)  # of S positions none leaves a longer window
    capacity = max(1, min(call.top_k, S))
    ends = ends_of(call.lengths, T, B, device)
    alive = torch.arange(T, device=device).unsqueeze(1) < ends
    x = torch.where(alive.unsqueeze(2), call.input, 0.0)  # padding may hold anything
    # Rows past a sample's end stay zero: the weight gradients sum over all rows.
    saved = call.input.new_zeros(saved_numbers(T, B, P, H, A))
    hidden, keys, gates, states, queries = _views(saved, T, B, S, H, A)
    before = call.input.new_zeros(0, B) if call.relevance is None else call.relevance
    if call.memory is not None:
        unattended = (before < 0) | (ends == 0)
        hidden[:P] = torch.where(unattended.unsqueeze(2), 0.0, call.memory)
        keys[:P] = hidden[:P] @ call.weight_key.T
    taken = (~(before[call.retained :] < 0)).sum(0)
    first = P - taken
    cells, context = call.c_0.clone(), call.context_0.clone(memory_format=torch.contiguous_format)
    cells = cells.contiguous()
    last = torch.full((S, B), -1, dtype=torch.int64, device=device)
    final = torch.full((B, capacity), -1, dtype=torch.int64, device=device)
    final_relevance = call.input.new_full((B, capacity), -1.0)
    rings = torch.cat([before.T, before.new_zeros(B, T)], 1)
    initial = call.h_0.contiguous()
    if B > 0:
        x_gates = x @ call.weight_ih.T
        for bias in (call.bias_ih, call.bias_hh):
            x_gates = x_gates if bias is None else x_gates + bias
        walk_forward[(triton.cdiv(B, SAMPLES),)](
            x_gates, initial, cells, context, *_weights(call), before.contiguous(), first, ends,
            hidden, keys, gates, states, queries, last, final, final_relevance, rings, T, S,
            call.retained, W, min(call.top_k, capacity), capacity, B, H, A,
            KEEP_FIRST=call.keep_first, **blocks(H, A, W, capacity), num_warps=WARPS,
        )  # fmt: skip
    output = hidden[P:].clone()
    at = (P + ends - 1).clamp(min=0).view(1, B, 1).expand(1, B, H)
    h_n = torch.where((ends > 0).unsqueeze(1), hidden.gather(0, at)[0], initial)
    sizes = memory_sizes(T, P, call.retained, call.window_size, call.top_k)
    index, left = memory_after(final, final_relevance, rings, first, P + ends, *sizes)
    index, left = index.T.contiguous(), left.T.contiguous()
    saved = saved if call.save else call.input.new_empty(0)
    return output, h_n, cells, context, last, index, left, saved


@on_its_gpu
def backward(call: Any) -> tuple[Tensor, ...]:
    """``throughtime::rel_lstm_backward``: see :mod:`throughtime.ops.rel_lstm`."""
    (T, B, I), H, A = call.input.shape, call.weight_hh.size(1), call.weight_score.size(0)  # noqa: E741
    S, device = call.last.size(0), call.input.device
    P = S - T
    W = min(call.window_size, S + 1)
    ends = ends_of(call.lengths, T, B, device)
    hidden, keys, gates, states, queries = _views(call.saved, T, B, S, H, A)

    def initial(grad: Tensor | None, *shape: int) -> Tensor:
        if grad is None:
            return torch.zeros(shape, dtype=call.input.dtype, device=device)
        return grad.clone(memory_format=torch.contiguous_format)

    states_after = (call.grad_h_n, call.grad_c_n, call.grad_context_n)
    direct, cells, context = (initial(grad, B, H) for grad in states_after)
    grad = initial(call.grad_output, T, B, H)
    mask = call.detach_mask
    detached = torch.zeros(T, B, dtype=torch.bool, device=device) if mask is None else mask
    detached = detached.to(torch.int32).contiguous()
    da, dq = call.input.new_zeros(T, B, 4 * H), call.input.new_zeros(T, B, A)
    du, dh = call.input.new_zeros(S, B, A), call.input.new_zeros(S, B, H)
    programs = triton.cdiv(B, SAMPLES)
    dw = call.input.new_zeros(programs, A)
    if B > 0:
        first = P - (call.last[call.retained : P] >= 0).sum(0)
        # A key without a query has none before it in the window either.
        kept = retained_positions(
            call.last.T.contiguous(), ends, T, call.retained, call.window_size
        )
        walk_backward[(programs,)](
            grad, *_weights(call), first, ends, detached, call.c_0.contiguous(), hidden, keys,
            gates, queries, kept, direct, cells, context, da, dq, du, dh, dw, T, S, W,
            kept.size(2), B, H, A, **blocks(H, A, W, kept.size(2)), num_warps=WARPS,
        )  # fmt: skip
    none = call.input.new_empty(0)
    grads = [da @ call.weight_ih if call.need_input else none, direct, cells, context]
    grads.append(dh[:P] + du[:P] @ call.weight_key)
    if not call.need_weights:
        return (*grads, *[none] * 7)
    alive = torch.arange(T, device=device).unsqueeze(1) < ends
    x = torch.where(alive.unsqueeze(2), call.input, 0.0).reshape(T * B, I)
    rows, s = da.view(T * B, 4 * H), states.view(T * B, H)
    bias = rows.sum(0)
    return (
        *grads,
        rows.T @ x,
        rows.T @ s,
        bias,
        bias.clone(),
        dq.view(T * B, A).T @ s,
        du.view(S * B, A).T @ hidden.view(S * B, H),
        dw.sum(0),
    )
