"""Relevancy attention and its backends."""

from __future__ import annotations

from throughtime.backends.backend import offer
from throughtime.ops.relevancy import compiled, reference
from throughtime.ops.relevancy.arguments import RelevancyArguments, RelevancyResults

offer("relevancy_attention", compiled.triton, compiled.cpu, reference.backend)

__all__ = ["RelevancyArguments", "RelevancyResults"]
