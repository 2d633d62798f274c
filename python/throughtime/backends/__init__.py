"""Which implementation runs a layer, and why the others do not."""

from __future__ import annotations

from throughtime.backends.backend import (
    NAMES,
    ORDER,
    BackendName,
    Request,
    can_run,
    passed_over,
)
from throughtime.backends.explanation import Explanation, explain
from throughtime.backends.selection import backend, choose

__all__ = [
    "NAMES",
    "ORDER",
    "BackendName",
    "Explanation",
    "Request",
    "backend",
    "can_run",
    "choose",
    "explain",
    "passed_over",
]
