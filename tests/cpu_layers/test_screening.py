"""Screening: the candidates of every query, and what is left, against the reference."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from throughtime.reference.screening import Screening
from ulps import DTYPES


class Case(NamedTuple):
    T: int
    window_size: int
    top_k: int
    length: int
    retained: int = 0  # slots of an earlier call, R
    window: int = 0  # and V
    keep_first: bool = False
    screen_every: int = 1
    seen: int = 0  # queries of earlier calls


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
    Case(30, 4, 5, 30, screen_every=3),
    Case(30, 1, 2, 28, screen_every=7),
    Case(30, 4, 0, 30, screen_every=4),
    Case(30, 4, 2, 30, screen_every=8),  # more keys compete than there is room for
    Case(30, 4, 5, 30, keep_first=True, screen_every=4),
    Case(20, 4, 3, 17, 3, 5, screen_every=4, seen=38),
    Case(20, 4, 3, 20, 2, 4, screen_every=3, seen=25),
    Case(2, 3, 3, 1, 3, 3, screen_every=4, seen=21),  # no border
    Case(2, 6, 3, 0, 3, 6, screen_every=4, seen=38),
    Case(9, MANY, MANY, 9, screen_every=MANY),
    Case(9, 2, MANY, 9, screen_every=MANY),
)


class Found(NamedTuple):
    listed: list[list[int]]  # candidates by step
    last: list[int]
    memory: list[tuple[int, float]]  # position and relevance of every slot


def expected(case: Case, before: Tensor, attention: Tensor) -> Found:
    top_k = min(case.top_k, case.T + len(before))
    sizes = case.retained, case.T, case.window_size, top_k, case.keep_first, case.screen_every
    screening = Screening(before.unsqueeze(0), *sizes, torch.tensor([case.seen]))
    alive, listed = torch.ones(1, dtype=torch.bool), []
    for step in range(case.length):
        positions = screening.candidates(step, alive)
        screening.advance(step, alive, attention[step][positions.clamp(min=0)])
        listed.append([j for j in positions[0].tolist() if j >= 0])
    for step in range(case.length, case.T):  # past its end a sequence stays as it is
        positions = screening.candidates(step, ~alive)
        screening.advance(step, ~alive, torch.zeros_like(positions, dtype=before.dtype))
    left = screening.memory(torch.tensor([case.length]))
    slots = zip(left.positions[0].tolist(), left.relevance[0].tolist(), strict=True)
    return Found(listed, screening.last[0].tolist(), list(slots))


def run_layer(layer: Any, case: Case, before: Tensor, attention: Tensor) -> tuple[Found, int]:
    positions = len(before) + case.T
    sizes = case.T, len(before), case.retained, case.window_size, case.top_k, case.length
    sizes += case.screen_every, case.seen
    shape, left = torch.tensor(sizes), torch.zeros(2, dtype=torch.int64)
    layer("sizes_after", shape, left)
    index, relevance = left.new_zeros(int(left.sum())), before.new_zeros(int(left.sum()))
    last, listed = left.new_zeros(positions), left.new_full((2, case.T, positions), -1)
    results = listed, last, index, relevance
    kept = layer("screen", shape, int(case.keep_first), before, attention, *results)
    forward, again = ([[j for j in x if j >= 0] for x in y[: case.length].tolist()] for y in listed)
    assert again == forward  # Replay lists what Screening did
    memory = list(zip(index.tolist(), relevance.tolist(), strict=True))
    return Found(forward, last.tolist(), memory), kept


def earlier(case: Case, dtype: torch.dtype, choose: torch.Generator) -> Tensor:
    """Relevance of an earlier call's slots; of its window the first slots may be empty."""
    before = torch.randint(0, 6, (case.retained + case.window,), generator=choose) / 4
    before[: case.retained][torch.rand(case.retained, generator=choose) < 0.3] = -1
    empty = int(torch.randint(0, case.window + 1, (), generator=choose))
    before[case.retained : case.retained + empty] = -1
    return before.to(dtype)


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference(layer: Any, case: Case, dtype: torch.dtype) -> None:
    """Attention in quarters: relevance is exact and full of ties."""
    for seed in range(12):
        choose = torch.Generator().manual_seed(seed)
        before = earlier(case, dtype, choose)
        sizes = case.T, len(before) + case.T
        attention = torch.randint(0, 4, sizes, generator=choose).to(dtype) / 4
        wanted = expected(case, before, attention)
        found, retained = run_layer(layer, case, before, attention)
        assert found == wanted
        if case.length > 0:
            pending = (case.seen + case.length - 1) % case.screen_every
            window = len(before) + case.length - case.window_size - pending
            assert retained == sum(
                j < max(case.retained, window)
                for j, last in enumerate(wanted.last)
                if last == case.length - 1
            )


@DTYPES
def test_nan_is_no_relevance(layer: Any, dtype: torch.dtype) -> None:
    case = Case(12, 2, 3, 12)
    attention = torch.ones(12, 12, dtype=dtype)
    attention[:, [1, 4, 5]] = math.nan
    nothing = torch.empty(0, dtype=dtype)
    found, _ = run_layer(layer, case, nothing, attention)
    assert found.listed == expected(case, nothing, attention).listed
    assert found.listed[-1] == [0, 2, 3, 10, 11]
