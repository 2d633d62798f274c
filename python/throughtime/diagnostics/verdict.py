"""A sentence on a recorded gradient: what travels on which path, and what to try."""

from __future__ import annotations

import math

import torch

from throughtime.diagnostics import statistics
from throughtime.diagnostics.call import Call
from throughtime.diagnostics.parts import Parts

# Powers of ten over the whole way, by distance from the last step.
GROWS = 1.0  # more than this
VANISHES = -2.0  # less than this
NEGLIGIBLE = -4.0  # a cell path that brings less than this of the gradient of the last step


def sentence(calls: list[tuple[Call, Parts]]) -> str:
    """The verdict on the call whose gradient grows or falls most."""
    ways = [_ways(call, parts) for call, parts in calls]
    known = [k for k, (steps, _, _) in enumerate(ways) if steps > 0]
    if not known:
        return "the loss asks for nothing that lies more than a step back: nothing travels"
    worst = max(known, key=lambda k: abs(ways[k][1]) if math.isfinite(ways[k][1]) else 1e9)
    call = calls[worst][0]
    steps, h, cell = ways[worst]
    where = f"{call.layer}, direction {call.direction}: " if len(calls) > 1 else ""
    everywhere = ""
    if _on_every_step(call):
        everywhere = " (a loss on every step brings short paths everywhere)"
    return f"{where}{_said(h, cell, steps)}{everywhere}: {_advice(h, cell)}"


def _ways(call: Call, parts: Parts) -> tuple[int, float, float]:
    """Steps from a sample's last to its first, and decades on the way through h and the cell."""
    dc = call.whole()[1]
    rest = (dc - parts.cell_part()).norm(dim=2)
    first, far = (
        statistics.median(statistics.by_distance(x, call)) for x in (dc.norm(dim=2), rest)
    )
    cell = statistics.median(statistics.by_distance(parts.transport(), call))
    known, start = (~cell.isnan()).nonzero(), first[0].item()
    if not len(known) or not start > 0:
        return 0, -math.inf, -math.inf
    end = int(known[-1])
    return end, _log(far[end].item() / start), _log(cell[end].item())


def _log(x: float) -> float:
    return math.log10(x) if x > 0 else -math.inf


def _on_every_step(call: Call) -> bool:
    asked = (call.direct() != 0).any(2)[call.inside()]
    return asked.numel() > 1 and bool(asked.to(torch.float32).mean() > 0.5)


def _said(h: float, cell: float, steps: int) -> str:
    return f"the h path {_changes(h)} over {steps} steps, the cell path {_changes(cell)}"


def _changes(decades: float) -> str:
    if decades == -math.inf:
        return "falls to 0"
    if decades > 0:
        return f"grows 10^{decades:.1f}"
    return f"falls to 10^{decades:.1f}"


def _advice(h: float, cell: float) -> str:
    if h > GROWS and cell > NEGLIGIBLE:
        return "try detach_prob 0.25, or clip the gradient"
    if h > GROWS:
        return (
            "clip the gradient; h-detach would leave nothing, as the forget gates are closed: try "
            "throughtime.init.chrono_ first"
        )
    if h < VANISHES and cell < VANISHES:
        return "both vanish, the forget gates are closed: try throughtime.init.chrono_"
    return "the gradient arrives, and h-detach has nothing to mend"
