"""Checks of the tensors of relevancy attention, in a batch or packed."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from throughtime.functional.checks import readable, wrong_shape


class Layout(NamedTuple):
    """The sizes of a query but for the last one, its features."""

    letters: tuple[str, ...]

    def spelled(self, *rest: str) -> str:
        """The sizes with those of the features behind them."""
        return f"[{', '.join((*self.letters, *rest))}]"


BATCH = Layout(("B", "heads", "T"))
PACKED = Layout(("total", "heads"))
_HEADS = 1  # where the heads are, in each


def check_tensors(
    op: str,
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: str,
    score_weight: Tensor | None,
) -> Tensor | None:
    """Check types, shapes and devices; return ``score_weight`` as ``[heads, D]``.

    Raises:
        RuntimeError: if a shape or a device does not fit.
        TypeError: if one is no tensor.
        ValueError: if a dtype is wrong, or the score and its weight do not go together.
    """
    named = {"query": query, "key": key, "value": value}
    if score_weight is not None:
        named["score_weight"] = score_weight
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} should be a Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise ValueError(
                f"{op}: {name} should have a floating point dtype, got {x.dtype}; "
                f"convert it: {name}.float()"
            )
        if x.device != query.device:
            raise RuntimeError(
                f"{op}: {name} should be on the query's device {query.device}, got {x.device}; "
                f"move it: {name}.to({str(query.device)!r})"
            )
    for name in ("query", "key", "value"):
        if named[name].dim() != len(layout.letters) + 1:
            letters = layout.spelled("Dv" if name == "value" else "D")
            wrong_shape(op, name, letters, named[name])
    if query.size(-1) == 0:
        wrong_shape(op, "query", layout.spelled("D") + " with D >= 1", query)
    _check_heads(op, layout, query, key, value)
    heads, size = query.size(_HEADS), query.size(-1)
    if (score == "additive") != (score_weight is not None):
        advice = "give score_weight=w [D] or [heads, D]" if score_weight is None else "leave it out"
        raise ValueError(
            f"{op}: score={score!r} {'needs' if score_weight is None else 'takes no'} "
            f"score_weight; {advice}, or use "
            f"score={'dot' if score_weight is None else 'additive'!r}"
        )
    if score_weight is None:
        return None
    if tuple(score_weight.shape) not in ((size,), (heads, size)):
        wanted = f"[{size}] or [{heads}, {size}] ([D] or [heads, D])"
        wrong_shape(op, "score_weight", wanted, score_weight)
    return score_weight.expand(heads, size)


def _check_heads(op: str, layout: Layout, query: Tensor, key: Tensor, value: Tensor) -> None:
    if key.shape != query.shape:
        heads, of_keys = query.size(_HEADS), key.size(_HEADS)
        like_query = list(query.shape)
        like_query[_HEADS] = of_keys
        if list(key.shape) != like_query or of_keys == 0 or heads % of_keys:
            wanted = f"the query's shape {list(query.shape)}"
            wrong_shape(op, "key", f"{wanted}, or fewer heads that divide its {heads}", key)
    if value.shape[:-1] != key.shape[:-1]:
        sizes = ", ".join(map(str, key.shape[:-1]))
        names = f"{', '.join(layout.letters[:-1])} and {layout.letters[-1]} of the key"
        wrong_shape(op, "value", f"[{sizes}, Dv] ({names})", value)


def checked_relevance(
    op: str,
    layout: Layout,
    relevance: Tensor | None,
    key: Tensor,
    retain: str,
    normalize: bool,
    lengths: Tensor | None,
) -> Tensor | None:
    """Check what is given in place of attention; return it in the dtype of relevance.

    Past ``lengths``, which are checked, its numbers are not looked at.

    Raises:
        RuntimeError: if its shape or device does not fit.
        TypeError: if it is no tensor.
        ValueError: if its dtype or a number is wrong, or another option contradicts it.
    """
    if relevance is None:
        return None
    if not isinstance(relevance, Tensor):
        raise TypeError(f"{op}: relevance should be a Tensor, got {type(relevance).__name__}")
    if retain != "relevant" or normalize:
        other = f"retain={retain!r}" if retain != "relevant" else "normalize=True"
        raise ValueError(f"{op}: relevance takes the place of attention; leave {other} out")
    if relevance.shape != key.shape[:-1]:
        letters = layout.spelled().replace("heads", "key heads")
        wrong_shape(op, "relevance", f"{list(key.shape[:-1])} ({letters})", relevance)
    if not relevance.is_floating_point():
        raise ValueError(
            f"{op}: relevance should have a floating point dtype, got {relevance.dtype}; "
            "convert it: relevance.float()"
        )
    if relevance.device != key.device:
        raise RuntimeError(
            f"{op}: relevance should be on the query's device {key.device}, got "
            f"{relevance.device}; move it: relevance.to({str(key.device)!r})"
        )
    relevance = relevance.detach()
    if relevance.numel() and readable(relevance):
        seen = relevance
        if lengths is not None:
            steps = torch.arange(relevance.size(-1), device=relevance.device)
            seen = torch.where(steps < lengths.view(-1, 1, 1), relevance, 0)
        least = seen.min().item()
        if not least >= 0:  # nor is NaN
            raise ValueError(
                f"{op}: relevance should hold numbers from 0, got {least}; shift it: only the "
                "order counts"
            )
    return relevance.to(torch.float64 if key.dtype == torch.float64 else torch.float32)


def checked_bounds(op: str, cu_seqlens: Tensor | None, query: Tensor) -> Tensor:
    """Check where packed samples begin; return it as int64 on the query's device.

    Raises:
        RuntimeError: if its shape or device does not fit.
        TypeError: if it is no tensor.
        ValueError: if its dtype or a number is wrong.
    """
    advice = "give torch.tensor([0, length of sample 0, lengths of samples 0 and 1, ...])"
    if not isinstance(cu_seqlens, Tensor):
        got = type(cu_seqlens).__name__
        raise TypeError(f"{op}: cu_seqlens should be a Tensor, got {got}; {advice}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{op}: cu_seqlens should have dtype torch.int32 or torch.int64, got "
            f"{cu_seqlens.dtype}; convert it: cu_seqlens.long()"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.size(0) == 0:
        wrong_shape(op, "cu_seqlens", f"[B + 1]; {advice}", cu_seqlens)
    if cu_seqlens.device.type != "cpu" and cu_seqlens.device != query.device:
        raise RuntimeError(
            f"{op}: cu_seqlens should be on the CPU or on the query's device {query.device}, got "
            f"{cu_seqlens.device}"
        )
    if readable(cu_seqlens):
        bounds, total = cu_seqlens.tolist(), query.size(0)
        if bounds[0] != 0 or bounds[-1] != total:
            raise ValueError(
                f"{op}: cu_seqlens should begin with 0 and end with the query's total of {total}, "
                f"got {bounds[0]} and {bounds[-1]}; {advice}"
            )
        for before, after in itertools.pairwise(bounds):
            if after < before:
                raise ValueError(
                    f"{op}: cu_seqlens should not fall, got {before} and then {after}; {advice}"
                )
    return cu_seqlens.to(query.device, torch.int64)


def check_dtypes(op: str, query: Tensor, others: dict[str, Tensor | None]) -> None:
    """Check that all have the query's dtype.

    Raises:
        ValueError: if one has another.
    """
    for name, x in others.items():
        if x is not None and x.dtype != query.dtype:
            raise ValueError(
                f"{op}: {name} should have the query's dtype {query.dtype}, got {x.dtype}; "
                f"convert it: {name}.to({query.dtype})"
            )
