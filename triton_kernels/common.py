"""What the Triton kernels share: the GPU, nonlinearities, products, block sizes, retained sets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter stores bfloat16 as 16-bit integers, and would multiply those.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Terms of the shortest sums in a product of float32 or float64 (16 of 16 bits) that Triton takes.
LEAST_DEPTH = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 16

_Run = TypeVar("_Run", bound=Callable[..., tuple[Tensor, ...]])


def on_its_gpu(run: _Run) -> _Run:
    """Makes the GPU of the tensors current during ``run``: Triton launches on the current GPU."""

    @functools.wraps(run)
    def guarded(call: tuple[object, ...]) -> tuple[Tensor, ...]:
        device = next(arg.device for arg in call if isinstance(arg, Tensor))
        if device.type == "cpu":  # the interpreter
            return run(call)
        with torch.cuda.device(device):
            return run(call)

    return guarded  # type: ignore[return-value]


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x); no overflow to NaN."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """1 - 2 / (e^2x + 1); no overflow to NaN."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def load_tile(array, row, column, width, present):
    """Tile ``[X, Y]`` of an array ``[.., width]`` by its rows and columns; 0 where absent."""
    return tl.load(array + row[:, None] * width + column[None, :],
                   mask=present[:, None] & (column < width)[None, :], other=0.0)  # fmt: skip


@triton.jit
def store_tile(array, row, column, width, present, value):
    """The reverse of ``load_tile``."""
    tl.store(array + row[:, None] * width + column[None, :], value,
             mask=present[:, None] & (column < width)[None, :])  # fmt: skip


@triton.jit
def add_product(rows, weight, acc):
    """Acc [BB, BN] + rows [BB, BK] @ weight [BK, BN], summed in the dtype of acc."""
    if _INTERPRETED:
        rows, weight = rows.to(acc.dtype), weight.to(acc.dtype)
    return tl.dot(rows, weight, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def add_rows_times_weight(
    acc, rows, row_mask, weight, n, N, depth, stride_n, stride_depth, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Acc [BB, BN] + rows [BB, depth] @ weight [depth, N], by blocks of the depth.

    ``rows`` ``[BB]`` points at rows, n ``[BN]`` are the columns of the weight. Offsets
    have the integer type of ``depth``.
    """
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < depth
        a = tl.load(rows[:, None] + k[None, :],
                    mask=row_mask[:, None] & inside[None, :], other=0.0)  # fmt: skip
        w = tl.load(weight + k[:, None] * stride_depth + n[None, :] * stride_n,
                    mask=inside[:, None] & (n < N)[None, :], other=0.0)  # fmt: skip
        acc = add_product(a, w, acc)
    return acc


def block(size: int, *, least: int = 1, most: int = 2**20) -> int:
    """The power of two that covers ``size``, within bounds that are powers of two.

    Example:
        >>> block(20), block(3, least=16), block(300, most=64)
        (32, 16, 64)
    """
    return int(min(most, max(least, triton.next_power_of_2(max(1, size)))))


def ends_of(lengths: Tensor | None, T: int, B: int, device: torch.device) -> Tensor:
    """Steps of each sample, int64 ``[B]``."""
    if lengths is None:
        return torch.full((B,), T, device=device)
    return lengths.to(torch.int64).contiguous()


def memory_sizes(
    length: int, prefix: int, retained: int, window_size: int, top_k: int
) -> tuple[int, int]:
    """Slots of the retained set and of the window after a call, as in ``throughtime.ops``."""
    window = prefix - retained + length
    leaving = max(0, window - (window_size - 1))
    return min(top_k, retained + leaving), min(window_size - 1, window)


def memory_after(
    final: Tensor,
    final_relevance: Tensor,
    rings: Tensor,
    first: Tensor,
    newest: Tensor,
    kept: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Positions and relevance ``[N, kept + window]`` that a call leaves; -1 where empty.

    Args:
        final, final_relevance: the retained set ``[N, K]`` in any order; made oldest first.
        rings: relevance ``[N, S]`` by position, of the window.
        first: first position of each window, ``[N]``.
        newest: position after the last of each sequence, ``[N]``.
        kept, window: slots, of :func:`memory_sizes`.
    """
    S = rings.size(1)
    oldest_first = torch.where(final < 0, S, final).argsort(1)[:, :kept]
    retained = final.gather(1, oldest_first)
    retained_relevance = final_relevance.gather(1, oldest_first).masked_fill(retained < 0, -1.0)
    places = newest.unsqueeze(1) + torch.arange(-window, 0, device=final.device)
    places = torch.where(places < first.unsqueeze(1), -1, places)
    relevance = rings.gather(1, places.clamp(min=0)) if S else rings
    relevance = relevance.masked_fill(places < 0, -1.0)
    return torch.cat([retained, places], 1), torch.cat([retained_relevance, relevance], 1)


def retained_positions(
    last: Tensor, ends: Tensor, length: int, retained: int, window_size: int
) -> Tensor:
    """The retained set of every query, from the last query that attends each key.

    Args:
        last: int64 ``[N, S]``.
        ends: int64 ``[N]``, queries of each sequence.
        length: T.
        retained: R, positions of an earlier call's retained set.
        window_size: >= 1.

    Returns:
        int32 ``[N, T, K]``, K the largest set that occurs; -1 where empty.
    """
    rows, positions = last.shape
    device = last.device
    own = torch.arange(positions, device=device)
    # The first query that finds a key in the retained set.
    first = torch.where(own < retained, 0, own - (positions - length) + window_size)
    until = torch.minimum(last, ends.unsqueeze(1) - 1)
    count = (until - first + 1).clamp(min=0)
    count = torch.where(last < 0, 0, count).flatten()
    begin = count.cumsum(0) - count
    source = torch.arange(count.numel(), device=device).repeat_interleave(count)
    entry = torch.arange(len(source), device=device) - begin.repeat_interleave(count)
    row, position = source // positions, source % positions
    query = row * length + first[position] + entry
    order = (query * positions + position).argsort()
    query, position = query[order], position[order]
    per_query = torch.bincount(query, minlength=rows * length)
    slot = torch.arange(len(query), device=device) - (per_query.cumsum(0) - per_query)[query]
    width = int(per_query.max()) if len(query) else 0
    listed = torch.full((rows * length, width), -1, dtype=torch.int32, device=device)
    listed[query, slot] = position.to(torch.int32)
    return listed.view(rows, length, width)
