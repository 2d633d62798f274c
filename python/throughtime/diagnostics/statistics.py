"""Norms of a batch as numbers of each step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from throughtime.diagnostics.attention import KeyParts
from throughtime.diagnostics.call import Call, norm_of
from throughtime.diagnostics.parts import Parts

_KEPT = 16  # samples of an earlier update, spread over the batch: a few milliseconds at most


def history(call: Call) -> Tensor:
    """What stays of a call when another update follows: |dc| ``[steps, samples]``, NaN outside."""
    assert call.dc is not None
    dc = call.dc if call.split is None else call.kept(call.arranged(call.dc))
    every = max(1, dc.size(1) // _KEPT)
    found = norm_of(dc[:, ::every]) / call.scale
    return torch.where(call.kept(call.inside())[:, ::every], found, torch.nan)


def columns(call: Call, parts: Parts | KeyParts) -> dict[str, Tensor]:
    """The columns of the table, of each step that is kept, of one call."""
    inside, vectors = call.kept(call.inside()), parts.vectors()
    found: dict[str, Tensor] = {}
    for name, x in vectors.items():
        found |= quantiles(name, norm_of(x), inside)
    for name, x in parts.shares().items():
        found[name] = median(torch.where(inside, x, torch.nan))
    return found | shares(vectors["dc" if call.recurrent else "value"], inside)


def median(norms: Tensor) -> Tensor:
    """``[steps]`` of ``[steps, B]``, which is NaN where a sample has no such step."""
    return _quantiles(norms, 0.5)[0]


def quantiles(name: str, norms: Tensor, inside: Tensor) -> dict[str, Tensor]:
    """Median and quantiles of 10 and 90 % ``[steps]`` of the samples that have the step."""
    found = _quantiles(torch.where(inside, norms, torch.nan), 0.5, 0.1, 0.9)
    return {f"{name}{suffix}": x for suffix, x in zip(("", "_10", "_90"), found, strict=True)}


def _quantiles(norms: Tensor, *points: float) -> Tensor:
    """``[points, steps]`` of ``[steps, B]``."""
    if norms.size(1) == 0:
        return norms.new_full((len(points), len(norms)), torch.nan)
    return norms.nanquantile(norms.new_tensor(points), dim=1)


def shares(x: Tensor, inside: Tensor) -> dict[str, Tensor]:
    """Shares of zeros and of subnormal numbers of each step ``[steps]``."""
    least, count = torch.finfo(x.dtype).tiny, inside.sum(1) * x.size(2)
    zero = ((x == 0) & inside.unsqueeze(2)).sum((1, 2)) / count
    small = ((x != 0) & (x.abs() < least) & inside.unsqueeze(2)).sum((1, 2)) / count
    return {"zeros": zero, "subnormals": small}


def by_distance(x: Tensor, call: Call) -> Tensor:
    """``[steps, B]``, of those kept, by place before a sample's last; NaN past its first."""
    inside = call.kept(call.inside())
    steps = torch.arange(len(inside), device=x.device).unsqueeze(1)
    at = steps if call.reverse else inside.sum(0) - 1 - steps
    known = (at >= 0) & (steps < inside.sum(0))
    return torch.where(known, x.gather(0, at.clamp(min=0).expand_as(x)), torch.nan)


def reach(norms: Tensor, fraction: float, stride: int) -> float:
    """Steps until the norms, by distance in strides, are below a fraction of the first.

    NaN if that is infinite or NaN.
    """
    if not norms[0].isfinite():
        return math.nan
    below = (norms < fraction * norms[0]).nonzero()
    return float(stride * below[0].item()) if len(below) else math.inf


def decades(norms: Tensor, stride: int) -> float:
    """Powers of ten by which the norms, by distance, grow in 100 steps; NaN for one norm."""
    known = (norms > 0).nonzero()
    if not len(known) or not norms[0] > 0 or not known[-1] > 0:
        return math.nan
    end = int(known[-1])
    grown = math.log10(norms[end].item()) - math.log10(norms[0].item())
    return 100 * grown / (end * stride)
