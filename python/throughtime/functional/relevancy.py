"""Relevancy attention as a function: a window and the most relevant of the keys before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from throughtime.backends.backend import BackendName
from throughtime.functional.relevancy_call import Options, Retain, Score, attend
from throughtime.states import RelevancyCache

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OP = "relevancy_attention"


class BatchOptions(Options, total=False):
    lengths: Tensor | None
    cache: RelevancyCache | None


@overload
def relevancy_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: int, top_k: int,
    *, return_retained: Literal[False] = False, return_relevance: Literal[False] = False,
    **options: Unpack[BatchOptions],
) -> Tensor: ...  # fmt: skip


@overload
def relevancy_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: int, top_k: int,
    *, return_retained: Literal[True], return_relevance: Literal[False] = False,
    **options: Unpack[BatchOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def relevancy_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: int, top_k: int,
    *, return_retained: Literal[False] = False, return_relevance: Literal[True],
    **options: Unpack[BatchOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def relevancy_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: int, top_k: int,
    *, return_retained: Literal[True], return_relevance: Literal[True],
    **options: Unpack[BatchOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


@overload
def relevancy_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: int, top_k: int,
    *, return_retained: bool = False, return_relevance: bool = False,
    **options: Unpack[BatchOptions],
) -> Tensor | tuple[Tensor, ...]: ...  # fmt: skip


def relevancy_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int,
    top_k: int,
    *,
    score: Score = "dot",
    score_weight: Tensor | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    cache: RelevancyCache | None = None,
    retain: Retain = "relevant",
    screen_every: int = 1,
    relevance: Tensor | None = None,
    normalize: bool = False,
    return_retained: bool = False,
    return_relevance: bool = False,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Causal attention over a short window and the ``top_k`` most relevant keys before it.

    Query i attends the last ``window_size`` keys, its own included, and the retained set. A key's
    relevance is the attention that it receives while it is in the window. A key that leaves the
    window joins the retained set, replaces its least relevant member, or is dropped for good; of
    two equally relevant keys the earlier stays. Time is O(T (window_size + top_k)), memory O(T).

    With ``screen_every=m`` the retained set changes only after every m-th query of the sequence. A
    key that leaves the window in between is attended until then, with its relevance as it was, and
    then competes. So a query attends at most ``window_size + top_k + m - 1`` keys. On a CPU m = 16
    and 32 take as long as 1 (0 to 7 % longer with window and top_k of 64), which goes by blocks of
    queries too. More keys are attended, so accuracy does not fall: a small Transformer on denoise
    over 100 steps (window and top_k of 15, 5 seeds) had a median of 50 % with m = 1, 74 % with 16,
    86 % with 32, 75 % with 64, and 92 % with full attention.

    ``relevance`` gives each key's relevance in place of attention: a learned gate, recency, random
    numbers. It chooses keys and has no gradient. A gate g learns if its values carry it, as
    straight-through estimators do: ``value * (1 + g - g.detach()).unsqueeze(-1)`` has the numbers
    of ``value``, and tells g how useful each value was to the queries that attended it.

    ``key`` and ``value`` may have fewer heads, which divide those of ``query``: grouped-query
    heads. heads / key heads consecutive heads of queries attend the keys of one. They share its
    retained set, and a key's relevance is the sum of what all of them pay to it.

    The selection of keys has no gradient; everything else has. ``window_size >= T`` is full causal
    attention, ``top_k=0`` a sliding window.

    Args:
        query: ``[B, heads, T, D]``, any strides.
        key: ``[B, key heads, T, D]``; fewer heads than the query's not with ``"triton"``.
        value: ``[B, key heads, T, Dv]``.
        window_size: >= 1, may exceed T.
        top_k: size of the retained set, >= 0, may exceed T.
        score: ``"dot"``: ``scale * q . k``; ``"additive"``: ``w . tanh(q + k)``.
        score_weight: w, ``[D]`` or ``[heads, D]``; for the additive score only.
        scale: factor of the dot product, 1 / sqrt(D) by default.
        lengths: int64 ``[B]``, 0 <= length <= T. Past its length a sample is not read, and its
            output is zero.
        cache: state of earlier calls on the same sequences; this call updates it.
        retain: ``"relevant"``, or the baseline ``"first"``, which keeps the first ``top_k`` keys.
        screen_every: queries from one change of the retained set to the next, >= 1; 1 is the paper,
            and all that backend ``"triton"`` knows.
        relevance: ``[B, key heads, T]``, >= 0: what a key competes with, in place of the attention
            that it has received; not with ``"triton"``.
        normalize: True counts what a query pays to a key as often as the query attends keys. Early
            queries attend few keys and pay much to each; so every key that gets the mean of each
            query ends with ``window_size``, times the query heads that share it. Not with
            ``"triton"``.
        return_retained: True also returns which keys were retained.
        return_relevance: True also returns the relevance of each key; not with ``"triton"``.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        The output ``[B, heads, T, Dv]``. With ``return_retained`` also ``last``, int64
        ``[B, key heads, T]``, which holds the last query that attends each key, and -1 past the
        length. Key j is attended from outside the window of query i if
        ``j + window_size <= i <= last[j]``; :func:`retained_positions` lists the retained sets.
        With ``return_relevance`` then also the relevance ``[B, key heads, T]`` of this call's keys
        after its last query, without a gradient: attention that each received in its window, or
        what was given.

    Raises:
        RuntimeError: if a shape or a device does not fit, or the chosen backend cannot run.
        TypeError: if an argument has the wrong type.
        ValueError: if a size, a dtype, a length, the cache or a name is wrong.

    Example:
        >>> import torch
        >>> from throughtime.functional import relevancy_attention
        >>> q, k, v = torch.randn(3, 2, 4, 50, 8).unbind(0)
        >>> output, last = relevancy_attention(q, k, v, 5, 3, return_retained=True)
        >>> assert output.shape == q.shape and (last[..., -1] == 49).all()
        >>> full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> assert torch.allclose(relevancy_attention(q, k, v, 50, 0), full, atol=1e-5)

    Source: Kerg, Kanuparthi et al., NeurIPS 2020, arXiv 2006.09471.
    """
    return attend(
        _OP,
        query,
        key,
        value,
        window_size,
        top_k,
        score=score,
        score_weight=score_weight,
        scale=scale,
        lengths=lengths,
        cache=cache,
        retain=retain,
        screen_every=screen_every,
        relevance=relevance,
        normalize=normalize,
        return_retained=return_retained,
        return_relevance=return_relevance,
        backend=backend,
    )
