"""Calls of a cell, end to end as the steps of one sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from throughtime.diagnostics.call import Call

_OF_STEPS = ("input", "output", "reset")
# What the loss asks of every state itself, in place of what came to the end of each call.
_OWN = {"grad_output": (Call.rows_direct, 0), "grad_cells": (Call.rows_direct_of_cells, 1)}


class Loop(Call):
    """Calls of a cell, each with the state that the one before gave.

    Args:
        calls: in their order.
        number: of this loop among those of the cell.
    """

    def __init__(self, calls: list[Call], number: int) -> None:
        first = calls[0]
        super().__init__(first.layer, number, first.direction, first.stride)
        self._calls = calls
        self.module, self.scale, self.dtype = first.module, first.scale, first.dtype
        self.dh, self.dc = (
            self.kept(torch.cat(x)) for x in zip(*((c.dh, c.dc) for c in calls), strict=True)
        )

    @property
    def length(self) -> int:
        return len(self._calls)

    def rows_inside(self) -> Tensor:
        return torch.cat([call.rows_inside() for call in self._calls])

    def read(self, name: str) -> Tensor | None:
        if name not in _OF_STEPS:
            return self._calls[0].read(name)
        found = [call.read(name) for call in self._calls]
        if all(x is None for x in found):
            return None
        nothing = torch.zeros_like(self._calls[0].rows_inside())  # of a step without reset
        return torch.cat([nothing if x is None else x for x in found])

    def gradient(self, name: str) -> Tensor | None:
        if name not in _OWN:
            return None
        ask, k = _OWN[name]
        found = [ask(call) for call in self._calls]
        for t, after in enumerate(self._calls[1:]):
            entering = after.entering[k].view_as(found[t]).to(self.dtype)
            found[t] = found[t] - entering / self.scale
        return torch.cat(found)


def end_to_end(calls: Sequence[Call]) -> list[Call]:
    """The same with each loop over a cell as one call."""
    loops: list[list[Call]] = []
    by_last: dict[Call | None, list[Call]] = {}
    for call in calls:
        loop = by_last.pop(call.before, None) if call.before is not None else None
        if loop is None:
            loop = []
            loops.append(loop)
        loop.append(call)
        by_last[call] = loop
    numbers: Counter[str] = Counter()
    found: list[Call] = []
    for loop in loops:
        call = loop[0]
        if call.of_cell:
            call = Loop(loop, numbers[call.layer])
            numbers[call.layer] += 1
        found.append(call)
    return found
