"""Calls of the functions in ``throughtime.functional``, by backend and leaves, one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cases import random
from throughtime import RelevancyCache, functional

T, B, I, H = 5, 2, 3, 4  # noqa: E741
MASK = torch.tensor([True, False, True, False, True])


def lstm(backend: Any, x: Tensor, *weights: Tensor | None, **options: Any) -> Any:
    return functional.lstm(x, None, *weights, detach_mask=MASK, backend=backend, **options)


def both(backend: Any, x: Tensor, *weights: Tensor) -> Any:
    pair = ((*weights[:2], None, None, None), (*weights[2:], None, None, None))
    masks = (MASK, None)
    return functional.bidirectional_lstm(x, None, pair, detach_mask=masks, backend=backend)


def rel_lstm(backend: Any, x: Tensor, *weights: Tensor) -> Any:
    first = (*weights[:2], None, None, *weights[2:])
    return functional.rel_lstm(x, None, *first, 2, 2, detach_mask=MASK, backend=backend)


def attention(backend: Any, *rows: Tensor) -> Any:
    cache = RelevancyCache()
    return functional.relevancy_attention(*rows, 2, 2, cache=cache, backend=backend), cache


def packed(backend: Any, *rows: Tensor) -> Any:
    bounds = torch.tensor([0, 3, T], dtype=torch.int32)
    return functional.relevancy_attention_varlen(*rows, bounds, 2, 2, backend=backend)


GATES = ((4 * H, I), (4 * H, H))
CALLS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "lstm": (lstm, ((T, B, I), *GATES)),
    "lstm-projected": (
        lambda b, x, ih, hh, hr: lstm(b, x, ih, hh, None, None, hr),
        ((T, B, I), (4 * H, I), (4 * H, 2), (2, H)),
    ),
    "lstm-recompute": (
        lambda b, x, *weights: lstm(b, x, *weights, recompute=True),
        ((T, B, I), *GATES, (4 * H,)),
    ),
    "bidirectional_lstm": (both, ((T, B, I), *GATES, *GATES)),
    "rel_lstm": (rel_lstm, ((T, B, I), *GATES, (3, H), (3, H), (3,))),
    "relevancy_attention": (attention, ((B, 1, T, 2),) * 3),
    "relevancy_attention_varlen": (packed, ((T, 4, 2), (T, 2, 2), (T, 2, 3))),
}


def leaves(name: str) -> list[Tensor]:
    """What a call takes after the backend."""
    return [random(*shape, seed=k).requires_grad_() for k, shape in enumerate(CALLS[name][1])]
