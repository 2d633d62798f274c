"""The relevancy attention operators.

``throughtime::relevancy_forward`` attends, for every query i, the keys that relevancy screening
lets it attend (see :mod:`throughtime.reference.screening`), and ``throughtime::relevancy_backward``
is its gradient. Of the choice of keys the backward pass needs ``last`` alone: for every key the
last query that attends it.

Positions of keys: P slots of an earlier call, ``retained`` of them its retained set, then the T
keys of this call. ``memory_index`` and ``memory_relevance`` are what the next call needs: the
retained set, then the window; -1 where a slot is empty.

Schemas and fakes are here; the C++ implementation is in ``csrc/relevancy``, the Triton one, under
names that end in ``_triton``, in ``triton_kernels/relevancy.py``.

Source: Kerg, Kanuparthi et al., NeurIPS 2020, arXiv 2006.09471.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from throughtime import reference
from throughtime.ops.differentiable import Differentiable
from throughtime.ops.fakes import check_dims, check_sizes
from throughtime.ops.registration import register
from throughtime.ops.triton import check_runnable

_FORWARD = (
    "(Tensor query, Tensor key, Tensor value, Tensor? score_weight, Tensor? lengths, "
    "Tensor? relevance, SymInt retained, SymInt window_size, SymInt top_k, float scale, "
    "bool keep_first) -> (Tensor output, Tensor lse, Tensor last, Tensor memory_index, "
    "Tensor memory_relevance)"
)
_BACKWARD = (
    "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? score_weight, "
    "Tensor? lengths, Tensor output, Tensor lse, Tensor last, SymInt retained, "
    "SymInt window_size, float scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
    "Tensor grad_score_weight)"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)

for _suffix in ("", "_triton"):
    register(torch.library.define, f"relevancy_forward{_suffix}", _FORWARD, tags=_TAGS)
    register(torch.library.define, f"relevancy_backward{_suffix}", _BACKWARD, tags=_TAGS)


def memory_sizes(
    length: int, prefix: int, retained: int, window_size: int, top_k: int
) -> tuple[int, int]:
    """Slots of the retained set and of the window after a call.

    Args:
        length: queries of the call, T.
        prefix: slots of an earlier call, P.
        retained: how many of them are its retained set, R.
        window_size: >= 1.
        top_k: >= 0.

    Example:
        >>> memory_sizes(length=20, prefix=0, retained=0, window_size=5, top_k=3)
        (3, 4)
    """
    window = prefix - retained + length
    leaving = window - (window_size - 1)
    # Not min and max: the sizes may be symbolic.
    leaving = torch.sym_max(0, leaving)  # type: ignore[no-untyped-call]
    after = torch.sym_min(top_k, retained + leaving)  # type: ignore[no-untyped-call]
    return after, torch.sym_min(window_size - 1, window)  # type: ignore[no-untyped-call]


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor | None,
    lengths: Tensor | None,
    relevance: Tensor | None,
    retained: int,
    window_size: int,
    top_k: int,
    scale: float,
    keep_first: bool,
) -> tuple[Tensor, ...]:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_dims("relevancy_forward", name, tensor, "B, heads, T, features")
    batch, heads, length, features = query.shape
    positions = key.shape[2]
    check_sizes(
        "relevancy_forward",
        query,
        key=(key, (batch, heads, positions, features)),
        value=(value, (batch, heads, positions, value.shape[3])),
        score_weight=(score_weight, (heads, features)),
        lengths=(lengths, (batch,)),
        relevance=(relevance, (batch, heads, positions - length)),
    )
    left = sum(memory_sizes(length, positions - length, retained, window_size, top_k))
    return (
        query.new_empty(batch, heads, length, value.shape[3]),
        query.new_empty(batch, heads, length),
        query.new_empty(batch, heads, positions, dtype=torch.int64),
        query.new_empty(batch, heads, left, dtype=torch.int64),
        query.new_empty(batch, heads, left),
    )


def _backward_fake(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor | None,
    lengths: Tensor | None,
    output: Tensor,
    lse: Tensor,
    last: Tensor,
    retained: int,
    window_size: int,
    scale: float,
) -> tuple[Tensor, ...]:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_dims("relevancy_backward", name, tensor, "B, heads, T, features")
    batch, heads, length, features = query.shape
    positions, values = key.shape[2], value.shape[3]
    check_sizes(
        "relevancy_backward",
        query,
        grad_output=(grad_output, (batch, heads, length, values)),
        key=(key, (batch, heads, positions, features)),
        value=(value, (batch, heads, positions, values)),
        score_weight=(score_weight, (heads, features)),
        lengths=(lengths, (batch,)),
        output=(output, (batch, heads, length, values)),
        lse=(lse, (batch, heads, length)),
        last=(last, (batch, heads, positions)),
    )
    return (
        query.new_empty(query.shape),
        query.new_empty(key.shape),
        query.new_empty(value.shape),
        query.new_empty((0,) if score_weight is None else score_weight.shape),
    )


def _triton(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """The Triton implementation, imported when it is first called: Triton may be missing."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        check_runnable(args)
        module = import_module("throughtime.triton_kernels.relevancy")
        return getattr(module, name)(*args)  # type: ignore[no-any-return]

    return run


for _suffix in ("", "_triton"):
    register(torch.library.register_fake, f"relevancy_forward{_suffix}", _forward_fake)
    register(torch.library.register_fake, f"relevancy_backward{_suffix}", _backward_fake)
for _name in ("forward", "backward"):
    register(torch.library.impl, f"relevancy_{_name}_triton", ("cpu", "cuda"), _triton(_name))


def _definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor | None,
    lengths: Tensor | None,
    relevance: Tensor | None,
    retained: int,
    window_size: int,
    top_k: int,
    scale: float,
    keep_first: bool,
) -> tuple[Tensor, ...]:
    output, last, left = reference.relevancy_attention(
        query, key, value, score_weight, lengths, relevance, retained=retained,
        window_size=window_size, top_k=top_k, scale=scale, keep_first=keep_first,
    )  # fmt: skip
    lse = query.new_empty(query.shape[:3])
    return output, lse, last, left.positions, left.relevance


_KERNELS = {
    backend: Differentiable("relevancy", "relevancy", _definition, suffix=suffix)
    for backend, suffix in (("cpu", ""), ("triton", "_triton"))
}


def relevancy_attention(
    backend: str,
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
    keep_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Relevancy attention on compiled kernels; arguments are taken as checked.

    Args:
        backend: ``"cpu"`` or ``"triton"``.
        query: ``[B, heads, T, D]``, float32 or float64, like all other floating arguments.
        key, value: ``[B, heads, P + T, D]`` and ``[B, heads, P + T, Dv]``.
        score_weight: ``[heads, D]`` for the additive score, or None.
        lengths: int64 ``[B]`` or None.
        relevance: ``[B, heads, P]``, or None if P = 0.
        retained, window_size, top_k, scale, keep_first: see :mod:`throughtime.ops.relevancy`.

    Returns:
        output ``[B, heads, T, Dv]``, differentiable once; last int64 ``[B, heads, P + T]``;
        memory_index int64 and memory_relevance ``[B, heads, P']``.
    """
    output, _, last, memory_index, memory_relevance = _KERNELS[backend](
        query, key, value, score_weight, lengths, relevance, retained, window_size, top_k, scale,
        keep_first,
    )  # fmt: skip
    return output, last, memory_index, memory_relevance
