"""Screening: the candidates of every query against the definition, by sorted lists."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ulps import DTYPES


class Case(NamedTuple):
    T: int
    window_size: int
    top_k: int
    length: int
    retained: int = 0  # slots of an earlier call, R
    window: int = 0  # and V
    keep_first: bool = False


MANY = 2**62  # both may be the largest number there is
CASES = (
    Case(1, 1, 0, 1),
    Case(12, 1, 3, 12),
    Case(12, 3, 0, 12),  # no retained set
    Case(12, 3, 2, 12),
    Case(12, 3, 1, 7),
    Case(12, 3, 4, 0),  # no step
    Case(5, 9, 3, 5),  # nothing leaves the window
    Case(9, 3, 30, 9),  # everything is retained
    Case(9, MANY, MANY, 9),
    Case(9, 2, MANY, 9),
    Case(30, 4, 5, 30),
    Case(30, 4, 5, 30, keep_first=True),
    Case(20, 4, 3, 20, 3, 3),
    Case(20, 4, 3, 11, 2, 1),
    Case(20, 4, 3, 20, 3, 3, keep_first=True),
    Case(3, 6, 3, 1, 3, 5),
    Case(2, 6, 3, 0, 3, 5),
    Case(0, 6, 3, 0, 3, 5),
)


class Found(NamedTuple):
    listed: list[list[int]]  # candidates by step
    last: list[int]
    memory: list[tuple[int, float]]  # position and relevance of every slot


@dataclass
class Definition:
    """Every step ranks all keys that have left the window anew."""

    case: Case
    relevance: list[float]
    left: list[int] = field(default_factory=list)

    def retained(self) -> list[int]:
        ranked = sorted(self.left, key=lambda j: (-self.relevance[j], j))
        return sorted(ranked[: self.case.top_k])

    def run(self, attention: list[list[float]]) -> Found:
        case, before = self.case, self.case.retained + self.case.window
        empty = [j for j in range(before) if self.relevance[j] < 0]
        self.left = [j for j in range(case.retained) if j not in empty]
        listed, last = [], [-1] * (before + case.T)
        for step in range(case.length):
            own = before + step
            window = [
                j
                for j in range(max(case.retained, own - case.window_size + 1), own + 1)
                if j not in empty
            ]
            listed.append(self.retained() + window)
            for j in listed[-1]:
                last[j] = step
            if not case.keep_first:
                for j in window:
                    self.relevance[j] += attention[step][j]
            oldest = own - case.window_size + 1
            if oldest in window and not math.isnan(self.relevance[oldest]):
                self.left.append(oldest)
        return Found(listed, last, self.memory(before + case.length, empty))

    def memory(self, end: int, empty: list[int]) -> list[tuple[int, float]]:
        case = self.case
        # What is in the window after the last step; the oldest of a whole window has left it.
        size = min(case.window_size - 1, case.window + case.T)
        window = [
            j if j >= case.retained and j not in empty else -1 for j in range(end - size, end)
        ]
        room = case.retained + max(0, case.window + case.T - (case.window_size - 1))
        kept = self.retained()
        kept += [-1] * (min(case.top_k, room) - len(kept))
        return [(j, self.relevance[j] if j >= 0 else -1.0) for j in kept + window]


def run_layer(layer: Any, case: Case, before: Tensor, attention: Tensor) -> tuple[Found, int]:
    positions = case.retained + case.window + case.T
    shape = torch.tensor(
        [
            case.T,
            case.retained + case.window,
            case.retained,
            case.window_size,
            case.top_k,
            case.length,
        ]
    )
    sizes, last = torch.zeros(2, dtype=torch.int64), torch.zeros(positions, dtype=torch.int64)
    layer("sizes_after", shape, sizes)
    index, relevance = (
        torch.zeros(int(sizes.sum()), dtype=torch.int64),
        before.new_zeros(int(sizes.sum())),
    )
    listed = torch.full((2, case.T, positions), -1)
    keep = int(case.keep_first)
    kept = layer("screen", shape, keep, before, attention, listed, last, index, relevance)
    forward, again = ([[j for j in x if j >= 0] for x in y[: case.length].tolist()] for y in listed)
    assert again == forward  # Replay lists what Screening did
    return Found(
        forward, last.tolist(), list(zip(index.tolist(), relevance.tolist(), strict=True))
    ), kept


def earlier(case: Case, dtype: torch.dtype, choose: torch.Generator) -> Tensor:
    """Relevance of an earlier call's slots; of its window the first slots may be empty."""
    before = torch.randint(0, 6, (case.retained + case.window,), generator=choose) / 4
    before[: case.retained][torch.rand(case.retained, generator=choose) < 0.3] = -1
    empty = int(torch.randint(0, case.window + 1, (), generator=choose))
    before[case.retained : case.retained + empty] = -1
    return before.to(dtype)


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_definition(layer: Any, case: Case, dtype: torch.dtype) -> None:
    """Attention in quarters: relevance is exact and full of ties."""
    for seed in range(12):
        choose = torch.Generator().manual_seed(seed)
        before = earlier(case, dtype, choose)
        positions = len(before) + case.T
        attention = torch.randint(0, 4, (case.T, positions), generator=choose).to(dtype) / 4
        relevance = [*before.tolist(), *[0.0] * case.T]
        definition = Definition(case, relevance)
        wanted = definition.run(attention.tolist())
        found, retained = run_layer(layer, case, before, attention)
        assert found == wanted
        if case.length > 0:
            window = max(case.retained, len(before) + case.length - case.window_size)
            assert retained == sum(
                j < window for j, last in enumerate(wanted.last) if last == case.length - 1
            )


@DTYPES
def test_nan_is_no_relevance(layer: Any, dtype: torch.dtype) -> None:
    case = Case(12, 2, 3, 12)
    attention = torch.ones(12, 12, dtype=dtype)
    attention[:, [1, 4, 5]] = math.nan
    found, _ = run_layer(layer, case, torch.empty(0, dtype=dtype), attention)
    assert found.listed == Definition(case, [0.0] * 12).run(attention.tolist()).listed
    assert found.listed[-1] == [0, 2, 3, 10, 11]


@DTYPES
def test_two_calls_screen_as_one(layer: Any, dtype: torch.dtype) -> None:
    """The memory of the first call stands for its keys in the second."""
    for window_size, top_k, first in ((3, 2, 9), (1, 2, 4), (5, 3, 2), (4, 0, 6)):
        choose = torch.Generator().manual_seed(first)
        attention = torch.randint(0, 4, (20, 20), generator=choose).to(dtype) / 4
        nothing = torch.empty(0, dtype=dtype)
        whole, _ = run_layer(layer, Case(20, window_size, top_k, 20), nothing, attention)
        part, _ = run_layer(
            layer,
            Case(first, window_size, top_k, first),
            nothing,
            attention[:first, :first].contiguous(),
        )
        slots = [j for j, _ in part.memory]
        retained = len(slots) - min(window_size - 1, first)
        original = [*slots, *range(first, 20)]  # position of the whole sequence, by slot and step
        second, _ = run_layer(
            layer,
            Case(20 - first, window_size, top_k, 20 - first, retained, len(slots) - retained),
            torch.tensor([r for _, r in part.memory], dtype=dtype),
            attention[first:, original].contiguous(),
        )
        assert part.listed == whole.listed[:first]
        assert [[original[j] for j in x] for x in second.listed] == whole.listed[first:]
