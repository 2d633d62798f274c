"""How gradients travel through time in a model: what each step of each layer gets."""

from __future__ import annotations

from throughtime.diagnostics.attention import KeyFlow
from throughtime.diagnostics.flow import GradientFlow, gradient_flow
from throughtime.diagnostics.parts import Hops, StepGradients
from throughtime.diagnostics.rel_parts import AttentionFlow

__all__ = ["AttentionFlow", "GradientFlow", "Hops", "KeyFlow", "StepGradients", "gradient_flow"]
