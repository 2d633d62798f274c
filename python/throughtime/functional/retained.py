"""Which keys were retained, listed for every query."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from throughtime.functional.checks import check_size


def retained_positions(last: Tensor, window_size: int, top_k: int, screen_every: int = 1) -> Tensor:
    """List the retained set of every query.

    Args:
        last: int64 ``[..., T]`` as ``relevancy_attention(..., return_retained=True)`` gives it for
            a call without a cache.
        window_size: as in that call.
        top_k: as in that call.
        screen_every: as in that call.

    Returns:
        int64 ``[..., T, min(top_k, T)]``: ascending positions, -1 behind them where empty.

    Raises:
        TypeError: if ``last`` is no int64 tensor.
        ValueError: if a size is wrong: ``last`` names more keys than that call can have retained.

    Example:
        >>> import torch
        >>> retained_positions(torch.tensor([3, 1, 2, 3]), window_size=1, top_k=1).tolist()
        [[-1], [0], [0], [0]]
    """
    if not isinstance(last, Tensor) or last.dtype != torch.int64:
        got = last.dtype if isinstance(last, Tensor) else type(last).__name__
        raise TypeError(f"retained_positions: last should be an int64 Tensor, got {got}")
    if last.dim() == 0:
        raise ValueError("retained_positions: last should have shape [..., T], got []")
    check_size("retained_positions", "window_size", window_size, least=1)
    check_size("retained_positions", "top_k", top_k, least=0)
    check_size("retained_positions", "screen_every", screen_every, least=1)
    length = last.size(-1)
    rows = last.reshape(math.prod(last.shape[:-1]), length)
    if rows.numel() and not -1 <= int(rows.min()) <= int(rows.max()) < length:
        raise ValueError(
            f"retained_positions: last should hold queries from -1 to T - 1 = {length - 1}, got "
            f"values from {int(rows.min())} to {int(rows.max())}"
        )
    key = torch.arange(length, device=last.device).expand_as(rows)
    # Key j is retained from the first border after query j + window_size - 1 to last[j]: one entry
    # for each of these queries. No sum of sizes overflows.
    window = min(window_size, length)
    every = min(screen_every, max(1, length + window))
    since = (key + window + every - 1) // every * every
    count = (rows - since + 1).clamp(min=0).flatten()
    begin = count.cumsum(0) - count
    entry = torch.arange(int(count.sum()), device=last.device) - begin.repeat_interleave(count)
    source = torch.arange(rows.numel(), device=last.device).repeat_interleave(count)
    position = source % max(1, length)
    query = source - position + since.flatten()[source] + entry  # row * T + i
    order = (query * max(1, length) + position).argsort()
    position, query = position[order], query[order]
    per_query = torch.bincount(query, minlength=rows.numel())
    slot = torch.arange(len(query), device=last.device) - (per_query.cumsum(0) - per_query)[query]
    width = min(top_k, length)
    if bool((slot >= width).any()):
        raise ValueError(
            f"retained_positions: top_k should be {int(slot.max()) + 1} or more with window_size = "
            f"{window_size}, as last names so many retained keys of one query, got {top_k}; give "
            "both as in the call that made it"
        )
    listed = last.new_full((rows.numel(), width), -1)
    listed[query, slot] = position
    return listed.view(*last.shape, width)
