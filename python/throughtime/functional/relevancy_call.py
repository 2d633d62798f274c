"""What relevancy attention of batches and that of packed samples share: checks, casts, the call."""

from __future__ import annotations

import math
import numbers
from typing import Literal, TypedDict

import torch
from torch import Tensor

from throughtime.backends.backend import BackendName, Request
from throughtime.backends.selection import chosen
from throughtime.functional.carried import check_cache
from throughtime.functional.checks import (
    autocast_dtype,
    check_cast,
    check_choice,
    check_flag,
    check_size,
    checked_lengths,
    without_autocast,
)
from throughtime.functional.relevancy_checks import (
    BATCH,
    PACKED,
    check_dtypes,
    check_tensors,
    checked_bounds,
    checked_relevance,
)
from throughtime.ops import watching
from throughtime.ops.relevancy import RelevancyArguments, RelevancyResults
from throughtime.states import RelevancyCache

Score = Literal["dot", "additive"]
Retain = Literal["relevant", "first"]


class Options(TypedDict, total=False):
    """What both functions take by keyword, for their overloads, which show no defaults."""

    score: Score
    score_weight: Tensor | None
    scale: float | None
    retain: Retain
    screen_every: int
    relevance: Tensor | None
    normalize: bool
    backend: BackendName


def attend(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int,
    top_k: int,
    *,
    score: Score,
    score_weight: Tensor | None,
    scale: float | None,
    lengths: Tensor | None = None,
    cache: RelevancyCache | None = None,
    cu_seqlens: Tensor | None = None,
    packed: bool = False,
    retain: Retain,
    screen_every: int,
    relevance: Tensor | None,
    normalize: bool,
    return_retained: bool,
    return_relevance: bool,
    backend: BackendName,
) -> Tensor | tuple[Tensor, ...]:
    """Check the arguments of ``op``, run, and list what was asked for.

    With ``packed`` tensors are ``[total, heads, D]``, and ``cu_seqlens`` tells samples apart.
    """
    check_size(op, "window_size", window_size, least=1)
    check_size(op, "top_k", top_k, least=0)
    check_size(op, "screen_every", screen_every, least=1)
    check_choice(op, "score", score, ("dot", "additive"))
    check_choice(op, "retain", retain, ("relevant", "first"))
    flags = {
        "normalize": normalize,
        "return_retained": return_retained,
        "return_relevance": return_relevance,
    }
    for name, flag in flags.items():
        check_flag(f"{op}: {name}", flag)
    layout = PACKED if packed else BATCH
    weight = check_tensors(op, layout, query, key, value, score, score_weight)
    lengths = checked_lengths(op, lengths, query.size(0), query.size(-2), query.device)
    given = checked_relevance(op, layout, relevance, key, retain, normalize, lengths)
    if packed:
        cu_seqlens = checked_bounds(op, cu_seqlens, query)
        query, key, value = (_batch_of_one(x) for x in (query, key, value))
        given = None if given is None else given.t().unsqueeze(0)
    _, heads, length, size = query.shape
    if scale is None:
        scale = float(size) ** -0.5  # a size is a tensor in a trace, and its power one of float32
    elif isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"{op}: scale should be a number or None, got {type(scale).__name__}")
    elif not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale should be finite, got {scale}; 1 / sqrt(D) is the default")
    dtype = autocast_dtype(query)
    if dtype is not None:
        tensors = {"key": key, "value": value, "score_weight": weight}
        check_cast(op, {name: x for name, x in tensors.items() if x is not None})
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        weight = None if weight is None else weight.to(dtype)
    check_dtypes(op, query, {"key": key, "value": value, "score_weight": weight})
    args = RelevancyArguments(
        query=query,
        key=key,
        value=value,
        score_weight=weight,
        lengths=lengths,
        relevance=None,
        retained=0,
        window_size=window_size,
        top_k=top_k,
        scale=float(scale),
        keep_first=retain == "first",
        screen_every=screen_every,
        seen=None,
        given=given,
        normalize=normalize,
        return_relevance=return_relevance,
        cu_seqlens=cu_seqlens,
    )
    if cache is not None:
        args = _continued(op, cache, args, score, retain)
    request = Request(
        op="relevancy_attention",
        hidden_size=size,
        device=query.device,
        dtype=query.dtype,
        beyond_paper=beyond_paper(
            screen_every,
            normalize,
            heads // key.size(1) if heads else 1,
            given is not None,
            return_relevance,
            packed,
        ),
    )
    runs = chosen(backend, request)
    with without_autocast(query, dtype):
        watching.begin(args)
        results: RelevancyResults = runs.run(args)
    last = results.last
    if cache is not None:
        _update(cache, args, results, key, value)
    found = [results.output]
    for wanted, rows in ((return_retained, last), (return_relevance, results.received)):
        if wanted:
            found.append(rows[..., -length:] if length else rows[..., :0])
    if packed:
        found = [x[0].transpose(0, 1) for x in found]
    return found[0] if len(found) == 1 else tuple(found)


def beyond_paper(
    screen_every: int,
    normalize: bool,
    group: int = 1,
    relevance: bool = False,
    return_relevance: bool = False,
    packed: bool = False,
) -> tuple[str, ...]:
    """What a call asks for that the paper does not have; see ``Request``.

    Args:
        screen_every: as in the call.
        normalize: as in the call.
        group: heads of queries that share the keys of one head.
        relevance: whether the call gives it.
        return_relevance: as in the call.
        packed: whether the call gives cu_seqlens.
    """
    asked = {
        f"screen_every={_spelled(screen_every)}": screen_every != 1,
        "normalize=True": normalize,
        f"{_spelled(group)} query heads for one key head": group != 1,
        "relevance": relevance,
        "return_relevance=True": return_relevance,
        "cu_seqlens": packed,
    }
    return tuple([name for name, is_asked in asked.items() if is_asked])


def _spelled(number: int) -> str:
    """A number in a message; one that is traced need not have a value yet."""
    return "n" if torch.compiler.is_compiling() else str(number)


def _batch_of_one(rows: Tensor) -> Tensor:
    """``[total, heads, D]`` as ``[1, heads, total, D]``."""
    return rows.transpose(0, 1).unsqueeze(0)


def _continued(
    op: str, cache: RelevancyCache, args: RelevancyArguments, score: str, retain: str
) -> RelevancyArguments:
    """The arguments of a call that goes on where the cache's last one ended."""
    sizes = (args.window_size, args.top_k, args.screen_every)
    others = (score, args.scale, retain, args.normalize, args.given is not None)
    check_cache(op, cache, args.key, args.value, sizes, others)
    if cache.key is None or cache.value is None:
        return args
    return args._replace(
        key=torch.cat([cache.key, args.key], 2),
        value=torch.cat([cache.value, args.value], 2),
        relevance=cache.relevance,
        retained=cache.retained,
        seen=cache.length,
    )


def _update(
    cache: RelevancyCache,
    args: RelevancyArguments,
    results: RelevancyResults,
    key: Tensor,
    value: Tensor,
) -> None:
    """Put what a call left into the cache; ``key`` and ``value`` are this call's own."""
    index = results.memory_index
    batch, _, length, _ = key.shape
    seen = index.new_zeros(batch) if cache.length is None else cache.length
    position = seen.view(-1, 1, 1) + torch.arange(length, device=index.device)
    position = position.expand(*key.shape[:2], length)
    if cache.position is not None:
        position = torch.cat([cache.position, position], 2)
    empty = index < 0
    cache.key = _take(cache.key, key, index)
    cache.value = _take(cache.value, value, index)
    cache.position = position.gather(2, index.clamp(min=0)).masked_fill(empty, -1)
    cache.relevance = results.memory_relevance
    later = args.key.size(2) - args.retained
    cache.retained = index.size(-1) - min(args.window_size + args.screen_every - 2, later)
    cache.length = seen + (length if args.lengths is None else args.lengths)


def _take(before: Tensor | None, rows: Tensor, index: Tensor) -> Tensor:
    """Rows at ``index [B, key heads, P']`` of ``[before, rows]``, zeros where it is negative.

    The two are gathered from apart: together they would be copied, and their gradient be as long as
    the sequence, at every call.
    """
    prefix = 0 if before is None else before.size(2)

    def gathered(source: Tensor, at: Tensor) -> Tensor:
        at = at.clamp(0, max(0, source.size(2) - 1)).unsqueeze(-1)
        return source.gather(2, at.expand(*index.shape, source.size(3)))

    if rows.size(2) == 0:
        taken = rows.new_zeros(*index.shape, rows.size(3))
    else:
        taken = gathered(rows, index - prefix)
    if before is not None and prefix:
        taken = torch.where((index < prefix).unsqueeze(-1), gathered(before, index), taken)
    return torch.where((index < 0).unsqueeze(-1), 0.0, taken)
