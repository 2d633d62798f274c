"""A sentence on a recorded gradient: what travels on which path, and what to try."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from throughtime.diagnostics import statistics
from throughtime.diagnostics.attention import KeyParts
from throughtime.diagnostics.call import Call, norm_of
from throughtime.diagnostics.parts import Parts
from throughtime.diagnostics.rel_parts import RelParts

# Powers of ten over the whole way, by distance from the last step.
GROWS = 1.0  # more than this
VANISHES = -2.0  # less than this
NEGLIGIBLE = -4.0  # a cell path that brings less than this of the gradient of the last step
_NOTHING = "the loss asks for nothing that lies more than a step back: nothing travels"
_ONE_STEP = (
    "one step of each call is kept, and so no way back: flow.table() lists them; longer calls, a "
    "smaller stride, a throughtime.LSTM with the weights of a cell, or a cell that gets the very "
    "(h, c) it gave, with reset= where an episode starts, show one"
)


class _Way(NamedTuple):
    """From a sample's last step to its first."""

    steps: int
    decades: float  # of what decides which call is spoken of; NaN comes first
    said: str
    advice: str


def sentence(calls: list[tuple[Call, Parts | KeyParts]]) -> str:
    """The verdict on the call whose gradient grows or falls most."""
    ways = [_way(call, parts) for call, parts in calls]
    known = [k for k, way in enumerate(ways) if way is not None]
    if not known:
        return _NOTHING if any(len(call.steps) > 1 for call, _ in calls) else _ONE_STEP
    worst = max(known, key=lambda k: _extent(ways[k]))
    call, way = calls[worst][0], ways[worst]
    assert way is not None
    where = f"{call.layer}, direction {call.direction}: " if len(calls) > 1 else ""
    everywhere = ""
    if call.recurrent and not math.isnan(way.decades) and _on_every_step(call):
        everywhere = " (the loss, or a layer above, asks of most steps: paths are short everywhere)"
    return f"{where}{way.said}{everywhere}: {way.advice}"


def _way(call: Call, parts: Parts | KeyParts) -> _Way | None:
    ill = _not_finite(call, parts)
    if ill is not None:
        return ill
    if isinstance(parts, KeyParts):
        return _to_keys(call, parts)
    if isinstance(parts, RelParts):
        return _through_attention(call, parts)
    return _through_h(call, parts)


def _not_finite(call: Call, parts: Parts | KeyParts) -> _Way | None:
    """Where the gradient is infinite or NaN, which no norm tells."""
    found = parts.vectors().values() if isinstance(parts, KeyParts) else call.whole()
    fine = torch.stack([x.isfinite().all(2) for x in found]).all(0)
    samples = (call.kept(call.inside()) & ~fine).sum(1)
    steps = [step for step, count in zip(call.steps, samples.tolist(), strict=True) if count]
    if not steps:
        return None
    first = steps[0] if call.reverse else steps[-1]
    said = (
        f"the gradient is infinite or NaN at {len(steps)} of {len(samples)} steps, and on the way "
        f"back first at step {first}"
    )
    advice = (
        "look for it in the loss, the input and the weights, and try detach_prob 0.25 if it grew"
    )
    return _Way(len(samples), math.nan, said, advice)


def _extent(way: _Way | None) -> float:
    assert way is not None
    if math.isnan(way.decades):
        return math.inf
    return abs(way.decades) if math.isfinite(way.decades) else 1e9


def _by_distance(call: Call, norms: Tensor) -> Tensor:
    return statistics.median(statistics.by_distance(norms, call))


def _through_h(call: Call, parts: Parts) -> _Way | None:
    """What an LSTM's gradient does on the way through h, and on the way through the cell."""
    vectors = parts.vectors()
    first, far = (_by_distance(call, norm_of(vectors[name])) for name in ("dc", "rest"))
    cells = _by_distance(call, parts.transport())
    known, start = (~cells.isnan()).nonzero(), first[0].item()
    if not len(known) or not start > 0 or not int(known[-1]):
        return None
    end = int(known[-1])
    h, cell, steps = _log(far[end].item()) - _log(start), _log(cells[end].item()), end * call.stride
    said = f"the h path {_changes(h)} over {steps} steps, the cell path {_changes(cell)}"
    return _Way(steps, h, said, _advice(h, cell, steps, _chrono(call)))


def _through_attention(call: Call, parts: RelParts) -> _Way | None:
    """What a RelLSTM's gradient by h does, and what of it attention brings to the first step."""
    dh = _by_distance(call, norm_of(call.whole()[0]))
    share = _by_distance(call, parts.shares()["attention"])
    known, start = (~dh.isnan()).nonzero(), dh[0].item()
    if not len(known) or not start > 0 or not int(known[-1]):
        return None
    end = int(known[-1])
    h, steps = _log(dh[end].item()) - _log(start), end * call.stride
    said = f"the gradient by h {_changes(h)} over {steps} steps"
    remember = f"try {'' if parts.keeps_all() else 'a larger top_k, or '}{_chrono(call)}"
    if h == -math.inf:
        return _Way(steps, h, said, f"nothing travels so far; {remember}")
    brought = share[end].item()
    said += f", and attention brings {100 * brought:.0f} % of it there"
    if h > GROWS:
        advice = "clip the gradient"
        if brought < 0.9:
            advice += ", or try detach_prob 0.25, which leaves attention as it is"
    elif h < VANISHES:
        advice = f"little arrives; {remember}"
    else:
        advice = "the gradient arrives"
    return _Way(steps, h, said, advice)


def _to_keys(call: Call, parts: KeyParts) -> _Way | None:
    """Over how many keys the weights of attention are spread."""
    flow = parts.keys()
    if not flow.kappa.any():
        return None
    kappa, effective = (
        x[flow.kappa > 0].to(call.dtype).mean().item() for x in (flow.kappa, flow.effective)
    )
    said = (
        f"a query attends {kappa:.1f} keys on average, and spreads its weight as an even one over "
        f"{effective:.1f} would"
    )
    return _Way(len(flow.by_distance), 0.0, said, "one hop to each, so nothing grows or falls")


def _log(x: float) -> float:
    return math.log10(x) if x > 0 else -math.inf


def _on_every_step(call: Call) -> bool:
    asked = (call.direct() != 0).any(2)[call.inside()]
    return asked.numel() > 1 and bool(asked.to(torch.float32).mean() > 0.5)


def _changes(decades: float) -> str:
    if decades == -math.inf:
        return "falls to 0"
    if decades > 0:
        return f"grows 10^{decades:.1f}"
    return f"falls to 10^{decades:.1f}"


def _chrono(call: Call) -> str:
    """The call that makes new units remember."""
    names = [f"[{x}]" if x.isdigit() else f".{x}" for x in call.module.split(".") if x]
    return f"throughtime.init.chrono_(model{''.join(names)}, T_max={max(3, call.length)})"


def _advice(h: float, cell: float, steps: int, chrono: str) -> str:
    gates = f"the forget gates keep {10 ** (cell / steps):.2f} of the cell a step"
    if cell == -math.inf:  # a reset lies between
        gates = "no way through the cell is left"
    if h > GROWS and cell > NEGLIGIBLE:
        return "try detach_prob 0.25, or clip the gradient"
    if h > GROWS:
        return f"clip the gradient; h-detach would leave nothing, as {gates}: try {chrono} first"
    if h < VANISHES and cell < VANISHES:
        return f"both vanish, as {gates}: try {chrono}"
    return "the gradient arrives, and h-detach has nothing to mend"
