"""Relevancy attention as a function: a window and the most relevant of the keys before it."""

from __future__ import annotations

import math
import numbers
from typing import Literal, NoReturn, overload

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
    readable,
    without_autocast,
    wrong_shape,
)
from throughtime.ops import watching
from throughtime.ops.precision import LOW_PRECISION
from throughtime.ops.relevancy import RelevancyArguments, RelevancyResults
from throughtime.states import RelevancyCache

Score = Literal["dot", "additive"]
Retain = Literal["relevant", "first"]

_OP = "relevancy_attention"


@overload
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
    return_retained: Literal[False] = False,
    return_relevance: Literal[False] = False,
    backend: BackendName = "auto",
) -> Tensor: ...


@overload
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
    return_retained: Literal[True],
    return_relevance: Literal[False] = False,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
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
    return_retained: Literal[False] = False,
    return_relevance: Literal[True],
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
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
    return_retained: Literal[True],
    return_relevance: Literal[True],
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
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
) -> Tensor | tuple[Tensor, ...]: ...


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
    and 32 take as long as 1 (0 to 6 % longer with window and top_k of 64), which goes by blocks of
    queries too.

    ``relevance`` gives each key's relevance in place of attention: a learned gate, recency, random
    numbers. It chooses keys and has no gradient. A gate g learns if its values carry it, as
    straight-through estimators do: ``value * (1 + g - g.detach()).unsqueeze(-1)`` has the numbers
    of ``value``, and tells g how useful each value was to the queries that attended it.

    The selection of keys has no gradient; everything else has. ``window_size >= T`` is full causal
    attention, ``top_k=0`` a sliding window.

    Args:
        query: ``[B, heads, T, D]``, any strides.
        key: ``[B, heads, T, D]``.
        value: ``[B, heads, T, Dv]``.
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
        relevance: ``[B, heads, T]``, >= 0: what a key competes with, in place of the attention that
            it has received; not with ``"triton"``.
        normalize: True counts what a query pays to a key as often as the query attends keys. Early
            queries attend few keys and pay much to each; so every key that gets the mean of each
            query ends with ``window_size``. Not with ``"triton"``.
        return_retained: True also returns which keys were retained.
        return_relevance: True also returns the relevance of each key; not with ``"triton"``.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        The output ``[B, heads, T, Dv]``. With ``return_retained`` also ``last``, int64
        ``[B, heads, T]``, which holds the last query that attends each key, and -1 past the length.
        Key j is attended from outside the window of query i if ``j + window_size <= i <= last[j]``;
        :func:`retained_positions` lists the retained sets. With ``return_relevance`` then also the
        relevance ``[B, heads, T]`` of this call's keys after its last query, without a gradient:
        attention that each received in its window, or what was given.

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
    check_size(_OP, "window_size", window_size, least=1)
    check_size(_OP, "top_k", top_k, least=0)
    check_size(_OP, "screen_every", screen_every, least=1)
    check_choice(_OP, "score", score, ("dot", "additive"))
    check_choice(_OP, "retain", retain, ("relevant", "first"))
    flags = {
        "normalize": normalize,
        "return_retained": return_retained,
        "return_relevance": return_relevance,
    }
    for name, flag in flags.items():
        check_flag(f"{_OP}: {name}", flag)
    weight = _check_tensors(query, key, value, score, score_weight)
    given = _checked_relevance(relevance, query, retain, normalize)
    batch, _, length, size = query.shape
    lengths = checked_lengths(_OP, lengths, batch, length, query.device)
    if scale is None:
        scale = float(size) ** -0.5  # a size is a tensor in a trace, and its power one of float32
    elif isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"{_OP}: scale should be a number or None, got {type(scale).__name__}")
    elif not -math.inf < scale < math.inf:
        raise ValueError(f"{_OP}: scale should be finite, got {scale}; 1 / sqrt(D) is the default")
    dtype = autocast_dtype(query)
    if dtype is not None:
        tensors = {"key": key, "value": value, "score_weight": weight}
        check_cast(_OP, {name: x for name, x in tensors.items() if x is not None})
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        weight = None if weight is None else weight.to(dtype)
    _check_dtypes(query, {"key": key, "value": value, "score_weight": weight})
    new_key, new_value = key, value
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
    )
    if cache is not None:
        sizes = (window_size, top_k, screen_every)
        others = (score, args.scale, retain, normalize)
        check_cache(_OP, cache, key, value, sizes, others)
        if cache.key is not None and cache.value is not None:
            args = args._replace(
                key=torch.cat([cache.key, key], 2),
                value=torch.cat([cache.value, value], 2),
                relevance=cache.relevance,
                retained=cache.retained,
                seen=cache.length,
            )
    request = Request(
        op=_OP,
        hidden_size=size,
        device=query.device,
        dtype=query.dtype,
        beyond_paper=beyond_paper(screen_every, normalize, given is not None, return_relevance),
    )
    runs = chosen(backend, request)
    with without_autocast(query, dtype):
        watching.begin(args)
        results: RelevancyResults = runs.run(args)
    last = results.last
    if cache is not None:
        _update(cache, args, results, new_key, new_value)
    found = [results.output]
    for wanted, rows in ((return_retained, last), (return_relevance, results.received)):
        if wanted:
            found.append(rows[..., -length:] if length else rows[..., :0])
    return found[0] if len(found) == 1 else tuple(found)


def beyond_paper(
    screen_every: int, normalize: bool, relevance: bool = False, return_relevance: bool = False
) -> tuple[str, ...]:
    """What a call asks for that the paper does not have; see ``Request``."""
    asked = {
        f"screen_every={screen_every}": screen_every != 1,
        "normalize=True": normalize,
        "relevance": relevance,
        "return_relevance=True": return_relevance,
    }
    return tuple([name for name, is_asked in asked.items() if is_asked])


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
    """Rows at ``index [B, heads, P']`` of ``[before, rows]``, zeros where it is negative.

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


def _check_tensors(
    query: Tensor, key: Tensor, value: Tensor, score: str, score_weight: Tensor | None
) -> Tensor | None:
    """Check types, shapes and devices; return ``score_weight`` as ``[heads, D]``."""
    named = {"query": query, "key": key, "value": value}
    if score_weight is not None:
        named["score_weight"] = score_weight
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{_OP}: {name} should be a Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise ValueError(
                f"{_OP}: {name} should have a floating point dtype, got {x.dtype}; "
                f"convert it: {name}.float()"
            )
        if x.device != query.device:
            raise RuntimeError(
                f"{_OP}: {name} should be on the query's device {query.device}, got {x.device}; "
                f"move it: {name}.to({str(query.device)!r})"
            )
    for name in ("query", "key", "value"):
        if named[name].dim() != 4:
            letters = "[B, heads, T, Dv]" if name == "value" else "[B, heads, T, D]"
            _wrong(name, letters, named[name])
    batch, heads, length, size = query.shape
    if size == 0:
        _wrong("query", "[B, heads, T, D] with D >= 1", query)
    if tuple(key.shape) != (batch, heads, length, size):
        _wrong("key", f"the query's shape {list(query.shape)}", key)
    if tuple(value.shape[:3]) != (batch, heads, length):
        _wrong("value", f"[{batch}, {heads}, {length}, Dv] (B, heads and T of the query)", value)
    if (score == "additive") != (score_weight is not None):
        advice = "give score_weight=w [D] or [heads, D]" if score_weight is None else "leave it out"
        raise ValueError(
            f"{_OP}: score={score!r} {'needs' if score_weight is None else 'takes no'} "
            f"score_weight; {advice}, or use "
            f"score={'dot' if score_weight is None else 'additive'!r}"
        )
    if score_weight is None:
        return None
    if tuple(score_weight.shape) not in ((size,), (heads, size)):
        _wrong("score_weight", f"[{size}] or [{heads}, {size}] ([D] or [heads, D])", score_weight)
    return score_weight.expand(heads, size)


def _checked_relevance(
    relevance: Tensor | None, query: Tensor, retain: str, normalize: bool
) -> Tensor | None:
    """Check what is given in place of attention; return it in the dtype of relevance."""
    if relevance is None:
        return None
    if not isinstance(relevance, Tensor):
        raise TypeError(f"{_OP}: relevance should be a Tensor, got {type(relevance).__name__}")
    if retain != "relevant" or normalize:
        other = f"retain={retain!r}" if retain != "relevant" else "normalize=True"
        raise ValueError(f"{_OP}: relevance takes the place of attention; leave {other} out")
    if tuple(relevance.shape) != tuple(query.shape[:3]):
        _wrong("relevance", f"{list(query.shape[:3])} ([B, heads, T])", relevance)
    if not relevance.is_floating_point():
        raise ValueError(
            f"{_OP}: relevance should have a floating point dtype, got {relevance.dtype}; "
            "convert it: relevance.float()"
        )
    if relevance.device != query.device:
        raise RuntimeError(
            f"{_OP}: relevance should be on the query's device {query.device}, got "
            f"{relevance.device}; move it: relevance.to({str(query.device)!r})"
        )
    relevance = relevance.detach()
    if relevance.numel() and readable(relevance) and not relevance.min().item() >= 0:  # nor is NaN
        raise ValueError(
            f"{_OP}: relevance should hold numbers from 0, got {relevance.min().item()}; shift it: "
            "only the order counts"
        )
    dtype = autocast_dtype(query) or query.dtype
    return relevance.to(torch.float32 if dtype in LOW_PRECISION else dtype)


def _check_dtypes(query: Tensor, others: dict[str, Tensor | None]) -> None:
    for name, x in others.items():
        if x is not None and x.dtype != query.dtype:
            raise ValueError(
                f"{_OP}: {name} should have the query's dtype {query.dtype}, got {x.dtype}; "
                f"convert it: {name}.to({query.dtype})"
            )


def _wrong(name: str, wanted: str, got: Tensor) -> NoReturn:
    wrong_shape(_OP, name, wanted, got)
