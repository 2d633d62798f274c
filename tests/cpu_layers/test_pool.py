"""The caching allocator: alignment, reuse, its bound, threads, memory that runs out."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

MB = 1 << 20


class Statistics(NamedTuple):
    used: int
    idle: int
    peak: int


def statistics(layer: Any) -> Statistics:
    numbers = torch.zeros(3, dtype=torch.int64)
    layer("statistics", numbers)
    return Statistics(*numbers.tolist())


@pytest.fixture(autouse=True)
def empty(layer: Any) -> Iterator[None]:
    """Every test begins with an empty pool and gives back what it took."""
    layer("pool_empty")
    assert statistics(layer) == (0, 0, 0)
    yield
    assert statistics(layer).used == 0


def test_alignment(layer: Any) -> None:
    for bytes_each in (0, 1, 63, 64, 1000, MB // 4 - 1, MB // 4, 3 * MB + 1):
        blocks = [layer("acquire", bytes_each) for _ in range(3)]
        assert len(set(blocks)) == 3 and all(block and block % 64 == 0 for block in blocks)
        assert (statistics(layer).used > 0) == (bytes_each >= MB // 4)  # smaller: not counted
        for block in blocks:
            ctypes.memset(block, 1, bytes_each)
            layer("release", block)
    layer("release", 0)


def test_a_freed_block_is_used_again(layer: Any) -> None:
    block = layer("acquire", 5 * MB)
    assert statistics(layer) == (6 * MB, 0, 6 * MB)  # whole huge pages
    layer("release", block)
    assert statistics(layer) == (0, 6 * MB, 6 * MB)
    assert layer("acquire", 3 * MB) == block
    assert statistics(layer) == (6 * MB, 0, 6 * MB)
    layer("release", block)
    small = layer("acquire", MB)  # it would waste more than it takes
    assert small != block
    layer("release", small)


def test_the_best_fit_is_taken(layer: Any) -> None:
    blocks = {size: layer("acquire", size * MB) for size in (8, 4, 6)}
    for block in blocks.values():
        layer("release", block)
    assert [layer("acquire", 4 * MB) for _ in blocks] == [blocks[size] for size in (4, 6, 8)]
    for block in blocks.values():
        layer("release", block)


def test_used_and_idle_together_never_exceed_the_peak_of_used(layer: Any) -> None:
    choose = random.Random(1)
    held: list[int] = []
    most = 0
    for _ in range(2000):
        if held and choose.random() < 0.5:
            layer("release", held.pop(choose.randrange(len(held))))
        elif len(held) < 8:
            held.append(layer("acquire", int(MB * 2 ** choose.uniform(-3, 4))))
        now = statistics(layer)
        most = max(most, now.used)
        assert now.peak == most and now.used + now.idle <= now.peak
    for block in held:
        layer("release", block)


def test_empty_gives_idle_blocks_back_and_the_peak_starts_anew(layer: Any) -> None:
    first, second = layer("acquire", 4 * MB), layer("acquire", 8 * MB)
    layer("release", second)
    layer("pool_empty")
    assert statistics(layer) == (4 * MB, 0, 4 * MB)
    layer("release", first)


def test_idle_blocks_are_given_up_before_an_allocation_fails(layer: Any) -> None:
    blocks = [layer("acquire", 8 * MB) for _ in range(2)]
    for block in blocks:
        layer("release", block)
    layer("fail", 1)
    block = layer("acquire", 2 * MB)  # a block of 8 MB is too large for it
    assert block and statistics(layer) == (2 * MB, 0, 16 * MB)
    layer("release", block)
    layer("fail", 2)
    assert layer("acquire", 8 * MB) == 0
    assert statistics(layer) == (0, 0, 16 * MB)
    layer("fail", 1)
    assert layer("acquire", 100) == 0
    layer("fail", 0)


@pytest.mark.parametrize("bytes_each", [-1, 1 << 50], ids=["SIZE_MAX", "address space"])
def test_impossible_sizes(layer: Any, bytes_each: int) -> None:
    block = layer("acquire", 4 * MB)
    assert layer("acquire", bytes_each) == 0
    assert statistics(layer) == (4 * MB, 0, 4 * MB)
    layer("release", block)


def test_threads(layer: Any) -> None:
    """Blocks that threads hold at the same time are apart, and none is lost."""
    assert layer("hold", 4, 5000) == 0
    now = statistics(layer)
    assert now.used == 0 and now.idle <= now.peak


def test_a_child_of_a_process_whose_thread_held_the_lock(layer: Any) -> None:
    assert layer("forks", 100) == 0
