"""Relevancy attention in Triton: parallel passes, and one serial pass that chooses the keys.

Shapes: N = B * heads sequences, T queries, S = P + T positions of keys, features D and Dv. The
score is a pair of functions of ``scores.py``.

1. ``window_scores`` [parallel over N and blocks of queries]: scores of every query's window.
2. ``select`` [a program per sequence, serial in T]: scores of the retained set, log-sum-exp,
   relevance and the competition for the retained set. It writes the retained set of every query.
3. ``attend`` [parallel over N and blocks of queries]: output.

Backward, from ``last`` (see :mod:`throughtime.ops.relevancy`):

4. ``query_gradient`` [parallel over N and blocks of queries]: dq and a block's part of dw.
5. ``key_gradient`` [parallel over N and positions]: dk and dv of a key are sums over the unbroken
   run of queries that attend it. No atomics; bit-equal repeats.

The window's relevance lies in a ring: the slot of position p is p % window_size, so no value moves
from one thread to another. Lengths are run-time arguments; nothing recompiles for another T.
Offsets are 64-bit. Cost per query: (W + K) (D + Dv) multiply-adds, thrice that in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from throughtime.triton_kernels.common import (
    block,
    ends_of,
    load_tile,
    memory_after,
    memory_sizes,
    on_its_gpu,
    store_tile,
)
from throughtime.triton_kernels.scores import SCORES as SCORES_BY_NAME
from torch import Tensor

QUERIES = 16  # queries of a program in the parallel passes
POSITIONS = 512  # among which a program of query_gradient looks for keys at once


def programs(sequences: int, length: int) -> tuple[int]:
    """One per block of queries of a sequence. A grid's other dimensions end at 65,535."""
    return (sequences * triton.cdiv(length, QUERIES),)


def warps(features: int) -> int:
    """Warps of a program, for its registers to hold rows of so many features."""
    return 4 if features <= 64 else 8


_RUN_TIME = ["T", "S", "R", "W", "K", "CAPACITY"]


@triton.jit
def block_of_queries(T, BLOCK_Q: tl.constexpr):
    """A program's sequence n and queries i ``[BLOCK_Q]``."""
    at, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(T, BLOCK_Q)
    return at // blocks, at % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)


@triton.jit
def load_weight(weight, n, HEADS, D, BLOCK_D: tl.constexpr, dtype: tl.constexpr):
    """The head's weight of the score, ``[1, BLOCK_D]``; zeros for a score without one."""
    d = tl.arange(0, BLOCK_D)
    if weight is None:
        row = tl.zeros([1, BLOCK_D], dtype)
    else:
        row = tl.load(weight + (n % HEADS) * D + d, mask=d < D, other=0.0)[None, :]
    return row


@triton.jit(do_not_specialize=_RUN_TIME)
def window_scores(
    query, key, weight, first, ends, scores, T, S, R, W, HEADS, D,
    SCORES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores [N, T, W]: query i and the key W - 1 - w steps before it; -inf where there is none."""
    n, i = block_of_queries(T, BLOCK_Q)
    begin, end = tl.load(first + n), tl.load(ends + n)
    alive, d = i < end, tl.arange(0, BLOCK_D)
    q = load_tile(query, n * T + i, d, D, alive)
    w_row = load_weight(weight, n, HEADS, D, BLOCK_D, q.dtype)
    for w in range(W):
        position = S - T + i - W + 1 + w
        valid = alive & (position >= begin)
        k = load_tile(key, n * S + position, d, D, valid)
        s = SCORES(q, k, w_row)
        tl.store(scores + (n * T + i) * W + w, tl.where(valid, s, float("-inf")), mask=alive)


@triton.jit(do_not_specialize=_RUN_TIME)
def select(
    query, key, weight, relevance, first, ends, scores, kept_scores, kept_positions, lse, last,
    final_positions, final_relevance, window_relevance, T, S, R, W, K, CAPACITY, HEADS, D,
    SCORES: tl.constexpr, KEEP_FIRST: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One sequence from its first query to its last: the keys attended, and log-sum-exp."""
    n = tl.program_id(0).to(tl.int64)
    P = S - T
    begin, end = tl.load(first + n), tl.load(ends + n)
    d, e, slot = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_K)
    features = d < D
    w_row = load_weight(weight, n, HEADS, D, BLOCK_D, query.dtype.element_ty)

    # The retained set: position (-1 empty) and relevance of every slot.
    kept = tl.where(slot < R, slot, -1).to(tl.int64)
    kept_relevance = tl.load(relevance + n * P + slot, mask=slot < R, other=-1.0)
    kept = tl.where(kept_relevance < 0, -1, kept)
    # The window of the step before the first: the last W positions before P.
    earlier = P - 1 - (P - 1 - e + W) % W
    known = (e < W) & (earlier >= begin)  # none if P is 0
    ring = tl.load(relevance + n * P + earlier, mask=known, other=0.0)

    for i in range(end):
        own = P + i
        position = own - (own - e + W) % W  # of ring slot e
        valid = (e < W) & (position >= begin)
        ring = tl.where(position == own, 0.0, ring)
        w = position - own + W - 1
        s = tl.load(scores + (n * T + i) * W + w, mask=valid, other=float("-inf"))

        q = tl.load(query + (n * T + i) * D + d, mask=features, other=0.0)[None, :]
        k = load_tile(key, n * S + kept, d, D, kept >= 0)
        r = tl.where(kept >= 0, SCORES(q, k, w_row), float("-inf"))
        tl.store(kept_positions + (n * T + i) * CAPACITY + slot, kept.to(tl.int32),
                 mask=slot < CAPACITY)  # fmt: skip
        tl.store(kept_scores + (n * T + i) * CAPACITY + slot, r, mask=slot < CAPACITY)
        top = tl.maximum(tl.max(s, axis=0), tl.max(r, axis=0))
        total = tl.sum(tl.exp(s - top), axis=0) + tl.sum(tl.exp(r - top), axis=0)
        log_sum = top + tl.log(total)
        tl.store(lse + n * T + i, log_sum)
        if not KEEP_FIRST:
            ring += tl.where(valid, tl.exp(s - log_sum), 0.0)

        # The oldest of a full window competes.
        leaving = own - W + 1
        newcomer = tl.sum(tl.where(position == leaving, ring, 0.0), axis=0)
        leaves = leaving >= begin
        accepted = leaves & (newcomer >= 0)  # NaN is no relevance
        count = tl.sum((kept >= 0).to(tl.int32), axis=0)
        free = tl.min(tl.where(kept < 0, slot, BLOCK_K), axis=0)
        lowest = tl.min(tl.where(kept >= 0, kept_relevance, float("inf")), axis=0)
        loser = tl.max(tl.where((kept >= 0) & (kept_relevance == lowest), kept, -1), axis=0)
        joins = accepted & (count < K)
        replaces = accepted & (count >= K) & (newcomer > lowest)
        forgotten = tl.where(replaces, loser, leaving)
        tl.store(last + n * S + forgotten, i, mask=leaves & (joins == 0))
        target = (joins & (slot == free)) | (replaces & (kept == loser))
        kept = tl.where(target, leaving, kept)
        kept_relevance = tl.where(target, newcomer, kept_relevance)

    own = P + end - 1
    position = own - (own - e + W) % W
    window = (e < W) & (position >= begin)
    if end > 0:  # the last query attends every key that is left
        tl.store(last + n * S + kept, end - 1, mask=kept >= 0)
        staying = window & (position > own - W + 1)
        tl.store(last + n * S + position, end - 1, mask=staying)
    tl.store(final_positions + n * CAPACITY + slot, kept, mask=slot < CAPACITY)
    tl.store(final_relevance + n * CAPACITY + slot, kept_relevance, mask=slot < CAPACITY)
    tl.store(window_relevance + n * S + position, ring, mask=window)


@triton.jit(do_not_specialize=_RUN_TIME)
def attend(
    value, first, ends, scores, kept_scores, kept_positions, lse, output, T, S, W, CAPACITY, DV,
    BLOCK_Q: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Output [N, T, Dv] from the scores and their log-sum-exp."""
    n, i = block_of_queries(T, BLOCK_Q)
    d = tl.arange(0, BLOCK_DV)
    begin, end = tl.load(first + n), tl.load(ends + n)
    alive = i < end
    log_sum = tl.load(lse + n * T + i, mask=alive, other=0.0)
    out = tl.zeros([BLOCK_Q, BLOCK_DV], log_sum.dtype)
    for c in range(W + CAPACITY):
        if c < W:
            position = S - T + i - W + 1 + c
            valid = alive & (position >= begin)
            s = tl.load(scores + (n * T + i) * W + c, mask=valid, other=float("-inf"))
        else:
            at = (n * T + i) * CAPACITY + c - W
            position = tl.load(kept_positions + at, mask=alive, other=-1).to(tl.int64)
            valid = alive & (position >= 0)
            s = tl.load(kept_scores + at, mask=valid, other=float("-inf"))
        p = tl.where(valid, tl.exp(s - log_sum), 0.0)
        v = load_tile(value, n * S + position, d, DV, valid)
        out += p[:, None] * v
    store_tile(output, n * T + i, d, DV, i < T, out)


@triton.jit
def score_gradient(q, k, w_row, v, go, log_sum, mean, attends, SCORES: tl.constexpr):
    """Weights p and gradients of the scores ``[X]`` of pairs of a query and a key, 0 where none."""
    p = tl.where(attends, tl.exp(SCORES(q, k, w_row) - log_sum), 0.0)
    return p, tl.where(attends, p * (tl.sum(go * v, axis=1) - mean), 0.0)


@triton.jit
def add_gradient(
    dq, dw, q, k, w_row, v, go, log_sum, mean, attends, SCORES: tl.constexpr,
    GRADIENTS: tl.constexpr,
):  # fmt: skip
    """Dq and dw ``[BQ, D]`` of queries, and what one key of each, or one of all, adds to them."""
    _, ds = score_gradient(q, k, w_row, v, go, log_sum, mean, attends, SCORES)
    to_q, _, to_w = GRADIENTS(ds, q, k, w_row)
    return dq + to_q, dw + to_w


@triton.jit(do_not_specialize=_RUN_TIME)
def query_gradient(
    grad, query, key, value, weight, first, ends, last, lse, delta, grad_query, grad_weight,
    T, S, R, W, HEADS, D, DV, SCORES: tl.constexpr, GRADIENTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Dq of a block of queries, and their part of dw."""
    n, i = block_of_queries(T, BLOCK_Q)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    begin, end = tl.load(first + n), tl.load(ends + n)
    alive, features, outputs = i < end, d < D, dv < DV
    q = load_tile(query, n * T + i, d, D, alive)
    go = load_tile(grad, n * T + i, dv, DV, alive)
    log_sum = tl.load(lse + n * T + i, mask=alive, other=0.0)
    mean = tl.load(delta + n * T + i, mask=alive, other=0.0)
    w_row = load_weight(weight, n, HEADS, D, BLOCK_D, q.dtype)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], q.dtype)
    dw = tl.zeros([BLOCK_Q, BLOCK_D], q.dtype)
    for c in range(W):
        position = S - T + i - W + 1 + c
        valid = alive & (position >= begin)
        k = load_tile(key, n * S + position, d, D, valid)
        v = load_tile(value, n * S + position, dv, DV, valid)
        dq, dw = add_gradient(dq, dw, q, k, w_row, v, go, log_sum, mean, valid, SCORES, GRADIENTS)

    # The retained set: one after the other the positions before the window that a query of this
    # block attends.
    lowest, highest = tl.min(i, axis=0), tl.minimum(tl.max(i, axis=0), end - 1)
    for start in range(0, tl.maximum(R, S - T + highest - W + 1), BLOCK_S):
        position = start + tl.arange(0, BLOCK_S).to(tl.int64)
        until = tl.load(last + n * S + position, mask=position < S, other=-1)
        since = tl.where(position < R, 0, position - (S - T) + W)
        left = (until >= lowest) & (since <= highest) & (since <= until)
        for _ in range(tl.sum(left.to(tl.int32), axis=0)):
            one = tl.min(tl.where(left, position, S), axis=0)
            here = position == one
            attends = alive & (i >= tl.sum(tl.where(here, since, 0), axis=0))
            attends = attends & (i <= tl.sum(tl.where(here, until, 0), axis=0))
            k = tl.load(key + (n * S + one) * D + d, mask=features, other=0.0)[None, :]
            v = tl.load(value + (n * S + one) * DV + dv, mask=outputs, other=0.0)[None, :]
            dq, dw = add_gradient(dq, dw, q, k, w_row, v, go, log_sum, mean, attends, SCORES,
                                  GRADIENTS)  # fmt: skip
            left = left & (position != one)
    store_tile(grad_query, n * T + i, d, D, i < T, dq)
    if weight is not None:
        part = tl.program_id(0).to(tl.int64)
        tl.store(grad_weight + part * D + d, tl.sum(dw, axis=0), mask=features)


@triton.jit(do_not_specialize=_RUN_TIME)
def key_gradient(
    grad, query, key, value, weight, lse, delta, last, grad_key, grad_value, T, S, HEADS, D,
    DV, SCORES: tl.constexpr, GRADIENTS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Dk and dv of one position: a sum over the queries from its own to ``last``."""
    at = tl.program_id(0).to(tl.int64)  # n * S + position
    n, position = at // S, at % S
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    features, outputs = d < D, dv < DV
    k = tl.load(key + at * D + d, mask=features, other=0.0)[None, :]
    v = tl.load(value + at * DV + dv, mask=outputs, other=0.0)[None, :]
    w_row = load_weight(weight, n, HEADS, D, BLOCK_D, k.dtype)
    dk = tl.zeros([BLOCK_D], k.dtype)
    dvalue = tl.zeros([BLOCK_DV], k.dtype)
    until = tl.load(last + at)
    begin = tl.maximum(position - (S - T), 0)
    for start in range(begin, until + 1, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        attends = i <= until
        q = load_tile(query, n * T + i, d, D, attends)
        go = load_tile(grad, n * T + i, dv, DV, attends)
        log_sum = tl.load(lse + n * T + i, mask=attends, other=0.0)
        mean = tl.load(delta + n * T + i, mask=attends, other=0.0)
        p, ds = score_gradient(q, k, w_row, v, go, log_sum, mean, attends, SCORES)
        _, to_k, _ = GRADIENTS(ds, q, k, w_row)
        dk += tl.sum(to_k, axis=0)
        dvalue += tl.sum(p[:, None] * go, axis=0)
    tl.store(grad_key + at * D + d, dk, mask=features)
    tl.store(grad_value + at * DV + dv, dvalue, mask=outputs)


class _Sequences:
    """The sizes of a call, its tensors as sequences, and where each one begins and ends."""

    def __init__(self, call: Any) -> None:
        query, weight = call.query, call.score_weight
        self.B, self.heads, self.T, self.D = query.shape
        self.S, self.Dv = call.key.size(2), call.value.size(3)
        self.N = self.B * self.heads
        self.W = min(call.window_size, self.S + 1)  # of S positions none leaves a longer window
        # Scaled once, here: a float argument of a kernel would be rounded to float32.
        query = query * call.scale if weight is None else query
        self.query, self.key, self.value = (x.contiguous() for x in (query, call.key, call.value))
        self.weight = None if weight is None else weight.contiguous()
        ends = ends_of(call.lengths, self.T, self.B, query.device)
        self.ends = ends.repeat_interleave(self.heads)
        self.warps = warps(max(self.D, self.Dv))
        score = SCORES_BY_NAME["dot" if weight is None else "additive"]
        self.scores = {"SCORES": score["SCORES"], "BLOCK_D": block(self.D), "num_warps": self.warps}
        self.gradients = {**self.scores, **score, "BLOCK_Q": QUERIES, "BLOCK_DV": block(self.Dv)}
        self.grid = programs(self.N, self.T)

    def first(self, taken: Tensor, retained: int) -> Tensor:
        """First position of each window; ``taken [N, P]`` says which of the prefix are."""
        window = taken[:, retained:].to(torch.int64)
        return retained + window.size(1) - window.sum(1)


@on_its_gpu
def forward(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``throughtime::relevancy_forward``: see :mod:`throughtime.ops.relevancy`."""
    c, query = _Sequences(call), call.query
    P = c.S - c.T
    before = query.new_zeros(c.N, 0) if call.relevance is None else call.relevance.reshape(c.N, P)
    capacity = max(1, min(call.top_k, c.S))
    output = query.new_zeros(c.B, c.heads, c.T, c.Dv)
    lse = query.new_zeros(c.B, c.heads, c.T)
    last = torch.full((c.N, c.S), -1, dtype=torch.int64, device=query.device)
    first = c.first(~(before < 0), call.retained)
    # A sequence without a query keeps the memory of the earlier call.
    final = torch.full((c.N, capacity), -1, dtype=torch.int64, device=query.device)
    final_relevance = query.new_full((c.N, capacity), -1.0)
    rings = torch.cat([before, before.new_zeros(c.N, c.T)], 1)
    if c.N > 0:
        scores = query.new_empty(c.N, c.T, c.W)
        kept_scores = query.new_empty(c.N, c.T, capacity)
        kept_positions = torch.empty(c.N, c.T, capacity, dtype=torch.int32, device=query.device)
        prefix = before.contiguous()
        if c.T > 0:
            window_scores[c.grid](
                c.query, c.key, c.weight, first, c.ends, scores, c.T, c.S, call.retained, c.W,
                c.heads, c.D, BLOCK_Q=QUERIES, **c.scores,
            )  # fmt: skip
        select[(c.N,)](
            c.query, c.key, c.weight, prefix, first, c.ends, scores, kept_scores, kept_positions,
            lse, last, final, final_relevance, rings, c.T, c.S, call.retained, c.W,
            min(call.top_k, capacity), capacity, c.heads, c.D, KEEP_FIRST=call.keep_first,
            BLOCK_W=block(c.W), BLOCK_K=block(capacity), **c.scores,
        )  # fmt: skip
        if c.T > 0:
            attend[c.grid](
                c.value, first, c.ends, scores, kept_scores, kept_positions, lse, output, c.T, c.S,
                c.W, capacity, c.Dv, BLOCK_Q=QUERIES, BLOCK_DV=block(c.Dv), num_warps=c.warps,
            )  # fmt: skip
    sizes = memory_sizes(c.T, P, call.retained, call.window_size, call.top_k)
    index, left = memory_after(final, final_relevance, rings, first, P + c.ends, *sizes)
    shape = (c.B, c.heads)
    return (
        output,
        lse,
        last.view(*shape, c.S),
        index.view(*shape, -1),
        left.view(*shape, -1),
    )


@on_its_gpu
def backward(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``throughtime::relevancy_backward``: see :mod:`throughtime.ops.relevancy`."""
    c = _Sequences(call)
    grads = [torch.zeros_like(x) for x in (c.query, c.key, c.value)]
    parts = call.query.new_zeros(c.N, triton.cdiv(c.T, QUERIES), c.D)
    if c.N > 0 and c.T > 0:
        grad, lse = call.grad_output.contiguous(), call.lse.contiguous()
        until = call.last.reshape(c.N, c.S).contiguous()
        first = c.first(until[:, : c.S - c.T] >= 0, call.retained)
        delta = torch.where(  # padding may hold anything
            torch.arange(c.T, device=call.query.device) < c.ends.unsqueeze(1),
            (grad * call.output).sum(-1).view(c.N, c.T),
            0.0,
        )
        query_gradient[c.grid](
            grad, c.query, c.key, c.value, c.weight, first, c.ends, until, lse, delta, grads[0],
            parts, c.T, c.S, call.retained, c.W, c.heads, c.D, c.Dv, BLOCK_S=POSITIONS,
            **c.gradients,
        )  # fmt: skip
        key_gradient[(c.N * c.S,)](
            grad, c.query, c.key, c.value, c.weight, lse, delta, until, grads[1], grads[2],
            c.T, c.S, c.heads, c.D, c.Dv, **c.gradients,
        )  # fmt: skip
    if call.score_weight is None:
        grads[0] *= call.scale
        return (*grads, call.query.new_zeros(0))
    return (*grads, parts.sum(1).view(c.B, c.heads, c.D).sum(0))
