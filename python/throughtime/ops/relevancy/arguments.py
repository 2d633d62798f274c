"""Relevancy attention: its arguments and results.

Every query i attends the keys that relevancy screening lets it attend (see
:mod:`throughtime.reference.screening`). Of the choice of keys the backward pass needs ``last``
alone: for every key the last query that attends it.

Positions of keys: P slots of an earlier call, ``retained`` of them its retained set, then the T
keys of this call. ``memory_index`` and ``memory_relevance`` are what the next call needs: the
retained set, then pending keys and the window; -1 where a slot is empty.

B samples, N heads of queries, K of keys, D features of a key, V of a value. N is a multiple of K:
N / K consecutive heads of queries attend the keys of one, which share a retained set.

With ``cu_seqlens`` B is 1, and samples lie one behind the other in T: sample b has the queries and
keys from ``cu_seqlens[b]`` on, before ``cu_seqlens[b + 1]``. No call goes on after such a one.

Source: Kerg, Kanuparthi et al., NeurIPS 2020, arXiv 2006.09471.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from throughtime.ops.precision import sums
from throughtime.ops.record import Derived, Real, Size, Sizes, Whole


def dtype_of_sums(args: Any) -> torch.dtype:
    """The dtype of relevance and of the logsumexp."""
    return sums(args.query.dtype)


class RelevancyArguments(NamedTuple):
    """Arguments; floating point tensors have one dtype, but for the relevance."""

    query: Annotated[Tensor, Real("B, N, T, D")]
    key: Annotated[Tensor, Real("B, K, P + T, D")]
    value: Annotated[Tensor, Real("B, K, P + T, V")]
    score_weight: Annotated[Tensor | None, Real("N, D")]  # of the additive score
    lengths: Annotated[Tensor | None, Whole("B")]
    relevance: Annotated[
        Tensor | None, Real("B, K, P", dtype=dtype_of_sums, differentiable=False, backward=False)
    ]
    retained: int
    window_size: int
    top_k: int
    scale: float
    keep_first: bool  # retain the first keys, whatever their relevance
    screen_every: int  # queries from one change of the retained set to the next
    seen: Annotated[Tensor | None, Whole("B")]  # queries of earlier calls; None: none
    # relevance of the T keys in place of attention
    given: Annotated[
        Tensor | None, Real("B, K, T", dtype=dtype_of_sums, differentiable=False, backward=False)
    ]
    normalize: bool  # what a query pays to a key counts as often as the query has candidates
    return_relevance: bool
    cu_seqlens: Annotated[Tensor | None, Whole("starts")]


class RelevancyResults(NamedTuple):
    """Results of every backend; ``lse``, the logsumexp of the scores, is for the backward pass."""

    output: Annotated[Tensor, Real("B, N, T, V")]
    lse: Annotated[Tensor, Real("B, N, T", dtype=dtype_of_sums, differentiable=False)]
    last: Annotated[Tensor, Whole("B, K, P + T")]
    memory_index: Annotated[Tensor, Whole("B, K, left", backward=False)]
    memory_relevance: Annotated[
        Tensor, Real("B, K, left", dtype=dtype_of_sums, differentiable=False, backward=False)
    ]
    # relevance of every position after the last query; empty unless return_relevance
    received: Annotated[
        Tensor, Real("B, K, positions", dtype=dtype_of_sums, differentiable=False, backward=False)
    ]


def memory_sizes(
    length: Size,
    prefix: Size,
    retained: Size,
    window_size: Size,
    top_k: Size,
    screen_every: Size = 1,
) -> tuple[Size, Size]:
    """Slots of the retained set, and of the window with pending keys, after a call.

    Args:
        length: queries of the call, T.
        prefix: slots of an earlier call, P.
        retained: how many of them are its retained set, R.
        window_size: >= 1.
        top_k: >= 0.
        screen_every: >= 1.

    Example:
        >>> memory_sizes(length=20, prefix=0, retained=0, window_size=5, top_k=3)
        (3, 4)
    """
    window = prefix - retained + length
    leaving = window - (window_size - 1)
    # Not min and max: the sizes may be symbolic.
    leaving = torch.sym_max(0, leaving)  # type: ignore[no-untyped-call]
    after = torch.sym_min(top_k, retained + leaving)  # type: ignore[no-untyped-call]
    most = window_size + screen_every - 2
    return after, torch.sym_min(most, window)  # type: ignore[no-untyped-call]


def left(sizes: Sizes, args: Any, screen_every: Size = 1) -> Size:
    """Slots that a call leaves for the next one."""
    options = (args.retained, args.window_size, args.top_k, screen_every)
    retained, window = memory_sizes(sizes["T"], sizes["P"], *options)
    return retained + window


SCREENING: Derived = {"left": left}
ATTENTION: Derived = {
    "left": lambda sizes, args: (
        left(sizes, args, args.screen_every) if args.cu_seqlens is None else 0
    ),
    "positions": lambda sizes, args: sizes["P"] + sizes["T"] if args.return_relevance else 0,
}
