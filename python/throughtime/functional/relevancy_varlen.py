"""Relevancy attention of packed samples, as FlashAttention packs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from throughtime.backends.backend import BackendName
from throughtime.functional.relevancy_call import Options, Retain, Score, attend

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OP = "relevancy_attention_varlen"


@overload
def relevancy_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window_size: int, top_k: int,
    *, return_retained: Literal[False] = False, return_relevance: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip


@overload
def relevancy_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window_size: int, top_k: int,
    *, return_retained: Literal[True], return_relevance: Literal[False] = False,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def relevancy_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window_size: int, top_k: int,
    *, return_retained: Literal[False] = False, return_relevance: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def relevancy_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window_size: int, top_k: int,
    *, return_retained: Literal[True], return_relevance: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


@overload
def relevancy_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window_size: int, top_k: int,
    *, return_retained: bool = False, return_relevance: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, ...]: ...  # fmt: skip


def relevancy_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    window_size: int,
    top_k: int,
    *,
    score: Score = "dot",
    score_weight: Tensor | None = None,
    scale: float | None = None,
    retain: Retain = "relevant",
    screen_every: int = 1,
    relevance: Tensor | None = None,
    normalize: bool = False,
    return_retained: bool = False,
    return_relevance: bool = False,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Relevancy attention of samples of different lengths, packed without padding.

    Samples lie one behind the other, as ``flash_attn_varlen_func`` takes them. Each is a sequence
    of its own: the result has the numbers of one :func:`relevancy_attention` for each sample. On a
    CPU time and memory are proportional to ``total``, and the bits are those of single calls.
    Backend ``"triton"`` does not know it.

    Args:
        query: ``[total, heads, D]``, any strides.
        key: ``[total, key heads, D]``; key heads divide the query's.
        value: ``[total, key heads, Dv]``.
        cu_seqlens: int32 or int64 ``[B + 1]``: sample b has the rows from ``cu_seqlens[b]`` on,
            before ``cu_seqlens[b + 1]``. It begins with 0, does not fall, and ends with ``total``.
            Backend ``"cpu"`` checks its numbers.
        window_size: >= 1.
        top_k: size of the retained set, >= 0.
        score: as in :func:`relevancy_attention`, and so all that follow.
        score_weight: ``[D]`` or ``[heads, D]``; for the additive score only.
        scale: factor of the dot product, 1 / sqrt(D) by default.
        retain: ``"relevant"`` or ``"first"``.
        screen_every: queries from one change of the retained set to the next, >= 1.
        relevance: ``[total, key heads]``, >= 0: what a key competes with in place of attention.
        normalize: True counts what a query pays to a key as often as the query attends keys.
        return_retained: True also returns which keys were retained.
        return_relevance: True also returns the relevance of each key.
        backend: ``"auto"``, ``"cpu"`` or ``"reference"``.

    Returns:
        The output ``[total, heads, Dv]``. With ``return_retained`` also ``last``, int64
        ``[total, key heads]``: the last query that attends each key, counted in its own sample.
        With ``return_relevance`` then also the relevance ``[total, key heads]``, without a
        gradient.

    Raises:
        RuntimeError: if a shape or a device does not fit, or the chosen backend cannot run.
        TypeError: if an argument has the wrong type.
        ValueError: if a size, a dtype, a name or a number of ``cu_seqlens`` is wrong.

    Example:
        >>> import torch
        >>> from throughtime.functional import relevancy_attention, relevancy_attention_varlen
        >>> q, k, v = torch.randn(3, 50, 4, 8).unbind(0)
        >>> bounds = torch.tensor([0, 30, 50], dtype=torch.int32)
        >>> output = relevancy_attention_varlen(q, k, v, bounds, 5, 3)
        >>> second = (x[30:].transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, T, D]
        >>> alone = relevancy_attention(*second, 5, 3)
        >>> assert torch.allclose(output[30:], alone[0].transpose(0, 1), atol=1e-6)

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
        cu_seqlens=cu_seqlens,
        packed=True,
        retain=retain,
        screen_every=screen_every,
        relevance=relevance,
        normalize=normalize,
        return_retained=return_retained,
        return_relevance=return_relevance,
        backend=backend,
    )
