"""``bench scaling``: with which power of a size a cost grows. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bench.errors import require

CONFIDENCE = 0.95
FIXED_SHARE = 0.2  # of a cost, at most, that may be there at any size
LEAST_POINTS = 3
LINEAR = 1.15  # a cache that a size outgrows adds some hundredths to a true 1
WIDEST = 0.25  # beyond which 1 and 1.5 could not be told apart

Verdict = Literal["linear", "more than linear", "unclear"]


@dataclass(frozen=True)
class Fit:
    """cost = factor * size ** exponent, between the sizes ``low`` and ``high``.

    The true exponent lies within ``exponent`` +- ``half_width`` with a confidence of 95 %, if the
    cost is a power of the size and its scatter is normal in the logarithm.
    """

    exponent: float
    half_width: float
    factor: float
    low: float
    high: float
    points: int

    def __str__(self) -> str:
        return f"{self.exponent:.2f} +- {self.half_width:.2f}"

    def at(self, size: float) -> float:
        """The fitted cost."""
        return self.factor * float(size**self.exponent)

    @property
    def verdict(self) -> Verdict:
        """Whether the cost is linear in the size, as far as the scatter lets one tell.

        ``linear``: exponent <= 1.15 + half_width; ``more than linear`` beyond; ``unclear`` instead
        of ``linear`` if half_width > 0.25.

        Example:
            >>> fit({1: 1.0, 2: 2.0, 4: 4.0}).verdict, fit({1: 1.0, 2: 4.0, 4: 16.0}).verdict
            ('linear', 'more than linear')
        """
        if self.exponent > LINEAR + self.half_width:
            return "more than linear"
        return "linear" if self.half_width <= WIDEST else "unclear"


def fit(costs: Mapping[float, float], fixed: float = 0.0) -> Fit | None:
    """Least squares in the logarithms of size and cost.

    Only sizes count at which the fixed cost is at most a fifth: below, the exponent is that of
    calling, not of computing.

    Args:
        costs: size -> cost.
        fixed: the cost that is there at any size, in the unit of the costs.

    Returns:
        The fit, or None if fewer than three sizes remain.

    Example:
        >>> print(fit({10.0: 1.0, 100.0: 3.0, 1000.0: 29.0, 10000.0: 280.0}, fixed=0.5))
        0.99 +- 0.00
    """
    used = {size: cost for size, cost in costs.items() if cost > 0 and cost * FIXED_SHARE >= fixed}
    if len(used) < LEAST_POINTS:
        return None
    x = [math.log(size) for size in used]
    y = [math.log(cost) for cost in used.values()]
    exponent, intercept = statistics.linear_regression(x, y)
    degrees = len(used) - 2
    scatter = sum((b - exponent * a - intercept) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    quantile = float(require("scipy.stats").t.ppf((1 + CONFIDENCE) / 2, degrees))
    half_width = quantile * math.sqrt(scatter / degrees / spread)
    return Fit(exponent, half_width, math.exp(intercept), min(used), max(used), len(used))
