"""How gradients travel through time in a model: what each step of each LSTM gets."""

from __future__ import annotations

from throughtime.diagnostics.flow import GradientFlow, StepGradients, gradient_flow
from throughtime.diagnostics.parts import Hops

__all__ = ["GradientFlow", "Hops", "StepGradients", "gradient_flow"]
