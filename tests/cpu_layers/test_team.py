"""Teams of workers: the barrier, shares of work, the order of a run, scratch memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ulps import DTYPES


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    "weights", [(1,), (5,), (1, 1), (1, 3), (2, 1, 2), (1, 1, 1, 1, 1)], ids=str
)
def test_no_thread_passes_a_barrier_early(layer: Any, weights: tuple[int, ...]) -> None:
    assert layer("meet", numbers(*weights), len(weights), 300) == 0


def test_shares_hold_every_item_once(layer: Any) -> None:
    """The share of several workers is that of each together."""
    own = torch.zeros(2, dtype=torch.int64)
    for count, workers in itertools.product((0, 1, 2, 7, 16, 1000, 1 << 40), range(1, 18)):
        bounds = [0]
        for index in range(workers):
            layer("share", count, index, index + 1, workers, own)
            assert own[0] == bounds[-1]
            bounds.append(int(own[1]))
        sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
        assert bounds[-1] == count and max(sizes) - min(sizes) <= 1
        for first, last in itertools.combinations(range(workers + 1), 2):
            layer("share", count, first, last, workers, own)
            assert own.tolist() == [bounds[first], bounds[last]]


@pytest.mark.parametrize(
    ("teams", "team", "ends"),
    [
        (1, 1, [1]),
        (1, 4, [1, 2, 3, 4]),
        (1, 4, [4]),  # one thread stands for the team
        (1, 5, [2, 5]),
        (3, 1, [1, 2, 3]),
        (3, 1, [3]),  # one thread takes all teams, one after the other
        (2, 3, [3, 6]),
        (2, 3, [2, 3, 5, 6]),
        (2, 3, [2, 5, 6]),  # the second thread belongs to both teams
        (3, 2, [4, 6]),  # whole teams beside a whole team
    ],
    ids=str,
)
def test_run_workers(layer: Any, teams: int, team: int, ends: list[int]) -> None:
    for blocks in (0, 1, 7, 20):
        prepared, finished = torch.zeros(2, blocks, dtype=torch.int64).unbind()
        walked = torch.zeros(teams * team, dtype=torch.int64)
        early = layer("run", teams, team, numbers(*ends), blocks, 50, prepared, walked, finished)
        assert early == 0
        assert all((x == 1).all() for x in (prepared, walked, finished))


@DTYPES
def test_spans_of_scratch_memory(layer: Any, dtype: torch.dtype) -> None:
    counts = numbers(3, 0, 1, 64, 17, 1000)
    offsets = torch.zeros_like(counts)
    layer("spans", torch.empty(0, dtype=dtype), counts, len(counts), offsets)
    assert (offsets % 64 == 0).all() and (offsets.diff() >= 0).all()
