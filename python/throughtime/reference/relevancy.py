"""Relevancy attention: causal attention over a short window and the most relevant past keys.

    e_ij = scale * q_i . k_j   or   w . tanh(q_i + k_j)         for j in candidates(i)
    out_i = sum_j softmax(e_i)_j v_j

The candidates are chosen by :class:`throughtime.reference.screening.Screening`. The choice is not
differentiated; everything else is.

Source: Kerg, Kanuparthi et al., "Untangling tradeoffs between recurrence and self-attention in
neural networks", NeurIPS 2020, arXiv 2006.09471.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughtime.reference.screening import Memory, Screening

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def dot(query: Tensor, keys: Tensor, w: Tensor | None, scale: float) -> Tensor:
    return scale * (keys @ query.unsqueeze(-1)).squeeze(-1)


def additive(query: Tensor, keys: Tensor, w: Tensor | None, scale: float = 1.0) -> Tensor:
    assert w is not None
    return (torch.tanh(query.unsqueeze(-2) + keys) @ w.unsqueeze(-1)).squeeze(-1)


# query [..., D], keys [..., C, D], w [..., D] of a score that has one, scale: scores [..., C]
SCORES: dict[str, Callable[[Tensor, Tensor, Tensor | None, float], Tensor]] = {
    "dot": dot,
    "additive": additive,
}


class RelevancyResult(NamedTuple):
    """What :func:`relevancy_attention` returns; S = P + T positions.

    Attributes:
        output: ``[B, heads, T, Dv]``.
        last: int64 ``[B, key heads, S]``: the last query that attends each position, -1 if none
            does.
        memory: what the next call needs, its tensors ``[B, key heads, P']``.
        received: ``[B, key heads, S]``: the relevance of each position after the last query.
    """

    output: Tensor
    last: Tensor
    memory: Memory
    received: Tensor


def relevancy_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor | None,
    lengths: Tensor | None,
    relevance: Tensor | None,
    *,
    retained: int,
    window_size: int,
    top_k: int,
    scale: float,
    keep_first: bool = False,
    screen_every: int = 1,
    seen: Tensor | None = None,
    given: Tensor | None = None,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> RelevancyResult:
    """Attend step by step, in plain PyTorch.

    The first P = S - T keys and values belong to the memory of an earlier call.
    :func:`throughtime.functional.relevancy_attention` makes and checks the arguments; this function
    checks nothing. float16 and bfloat16 are computed in float32 and rounded once, at the end.
    Relevance stays float32.

    heads / key heads consecutive heads of queries attend the keys of one. They share its retained
    set, and a key's relevance is the sum of what all of them pay to it.

    Args:
        query: ``[B, heads, T, D]``.
        key: ``[B, key heads, S, D]``.
        value: ``[B, key heads, S, Dv]``.
        score_weight: w ``[heads, D]`` for the additive score; None: the scaled dot product.
        lengths: int64 ``[B]``, 0 <= length <= T; past it the output is zero.
        relevance: ``[B, key heads, P]`` of an earlier call, negative where a slot is empty.
        retained: how many of the P are its retained set.
        window_size: >= 1.
        top_k: >= 0.
        scale: factor of the dot product.
        keep_first: retain the first ``top_k`` keys, whatever their relevance.
        screen_every: queries from one change of the retained set to the next, >= 1.
        seen: int64 ``[B]``, queries of earlier calls; None for none.
        given: ``[B, key heads, T]``, >= 0: relevance of this call's keys in place of attention.
        normalize: what a query pays to a key counts as often as the query has candidates.
        cu_seqlens: int64 ``[samples + 1]``: samples lie one behind the other in T, sample b from
            ``cu_seqlens[b]`` on; B is 1, there is no earlier call, and none follows.

    Returns:
        A named tuple of ``output [B, heads, T, Dv]``; ``last``, int64 ``[B, key heads, S]``, the
        last query that attends each position or -1; ``memory`` for the next call; and ``received
        [B, key heads, S]``, the relevance of each position.

    Example:
        >>> import torch
        >>> from throughtime import reference
        >>> q, k, v = torch.randn(3, 2, 4, 9, 8).unbind(0)
        >>> result = reference.relevancy_attention(
        ...     q, k, v, None, None, None, retained=0, window_size=3, top_k=2, scale=8**-0.5)
        >>> assert result.output.shape == q.shape and (result.last >= torch.arange(9)).all()
    """
    if cu_seqlens is not None:
        options = {"window_size": window_size, "top_k": top_k, "scale": scale}
        options |= {"keep_first": keep_first, "screen_every": screen_every, "normalize": normalize}
        rows = (query, key, value)
        return _packed(rows, score_weight, given, cu_seqlens.tolist(), options)
    out_dtype = query.dtype
    if out_dtype in _LOW_PRECISION:
        query, key, value = query.float(), key.float(), value.float()
        score_weight = None if score_weight is None else score_weight.float()
        relevance = None if relevance is None else relevance.float()
    batch, heads, length, _ = query.shape
    key_heads = key.size(1)
    group = heads // max(1, key_heads)
    sequences = batch * key_heads
    ends = torch.full((batch,), length, device=query.device) if lengths is None else lengths
    ends = ends.repeat_interleave(key_heads)  # [N]
    alive = torch.arange(length, device=query.device) < ends.unsqueeze(1)  # [N, T]
    if relevance is None:
        relevance = query.new_zeros(batch, key_heads, 0)
    score = SCORES["dot" if score_weight is None else "additive"]
    w = None if score_weight is None else score_weight.repeat(batch, 1)
    w = None if w is None else w.view(sequences, group, w.size(1))
    k, v = (x.reshape(sequences, *x.shape[2:]) for x in (key, value))
    q = query.reshape(sequences, group, length, query.size(3))
    q = torch.where(alive[:, None, :, None], q, 0.0)  # padding may be NaN
    if given is not None:
        given = torch.where(alive, given.reshape(sequences, length), 0.0)
    screening = Screening(
        relevance.reshape(sequences, relevance.size(2)),
        retained,
        length,
        window_size,
        top_k,
        keep_first,
        screen_every,
        None if seen is None else seen.repeat_interleave(key_heads),
        given,
        normalize,
    )

    chosen = []
    with torch.no_grad():
        for step in range(length):
            positions = screening.candidates(step, alive[:, step])
            keys = _gather(k, positions).unsqueeze(1)
            scores = score(q[:, :, step], keys, w, scale)  # [N, group, C]
            attention = attend(scores, (positions >= 0).unsqueeze(1))
            screening.advance(step, alive[:, step], attention.sum(1))
            chosen.append(positions)
        width = max((x.size(1) for x in chosen), default=0)
        positions = q.new_full((sequences, length, width), -1, dtype=torch.int64)  # [N, T, C]
        for step, x in enumerate(chosen):
            positions[:, step, : x.size(1)] = x

    flat = positions.flatten(1)
    keys, values = (_gather(x, flat).view(*positions.shape, x.size(2)) for x in (k, v))
    scores = score(q, keys.unsqueeze(1), None if w is None else w.unsqueeze(2), scale)
    attention = attend(scores, (positions >= 0).unsqueeze(1))
    output = (attention.unsqueeze(-1) * values.unsqueeze(1)).sum(-2)
    memory = screening.memory(ends)

    def shaped(x: Tensor) -> Tensor:
        return x.view(batch, key_heads, *x.shape[1:])

    state = Memory(shaped(memory.positions), shaped(memory.relevance), memory.retained)
    received = shaped(screening.relevance)
    output = output.view(batch, heads, *output.shape[2:]).to(out_dtype)
    return RelevancyResult(output, shaped(screening.last), state, received)


def _packed(
    rows: tuple[Tensor, Tensor, Tensor],
    score_weight: Tensor | None,
    given: Tensor | None,
    bounds: list[int],
    options: dict[str, Any],
) -> RelevancyResult:
    """Each sample alone, then one behind the other; ``rows`` are query, key and value."""
    found = []
    for begin, end in itertools.pairwise(bounds) if len(bounds) > 1 else [(0, 0)]:
        query, key, value = (x[:, :, begin:end] for x in rows)
        own = None if given is None else given[:, :, begin:end]
        found.append(
            relevancy_attention(
                *(query, key, value, score_weight, None, None), given=own, retained=0, **options
            )
        )
    output, last, received = (
        torch.cat([getattr(one, name) for one in found], 2)
        for name in ("output", "last", "received")
    )
    nothing = Memory(last[..., :0], received[..., :0], 0)
    return RelevancyResult(output, last, nothing, received)


def attend(scores: Tensor, valid: Tensor) -> Tensor:
    """Attention weights of candidates; zero where invalid, also where nothing is valid.

    Args:
        scores: ``[..., C]``.
        valid: bool ``[..., C]``.

    Returns:
        ``[..., C]``.
    """
    scores = torch.where(valid, scores, -torch.inf)
    scores = torch.where(valid.any(-1, keepdim=True), scores, 0.0)
    return torch.where(valid, scores.softmax(-1), 0.0)


def _gather(rows: Tensor, positions: Tensor) -> Tensor:
    """``rows [N, S, D]`` at ``positions [N, C]`` -> ``[N, C, D]``; zeros at -1.

    Not any row that is there: zero weights make NaN of an infinite one.
    """
    taken = rows.gather(1, positions.clamp(min=0).unsqueeze(-1).expand(-1, -1, rows.size(-1)))
    return torch.where(positions.unsqueeze(-1) >= 0, taken, 0.0)
