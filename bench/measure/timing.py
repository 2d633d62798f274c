"""Time of contestants that alternate, and the rates that the machine itself reaches meanwhile."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import pandas as pd
import torch

Run = Callable[[], object]
Timer = Callable[[Run, int], float]  # seconds of so many runs
Name = TypeVar("Name", bound=Hashable)

SAMPLE_SECONDS = 0.02
SLOW_FACTOR, SLOW_SECONDS, SLOW_ROUNDS = 4.0, 0.3, 3
GEMM_SIZE = 2048
COPY_MB = 128  # beyond the caches
RATE_INTERVAL = 0.5


@dataclass(frozen=True)
class Plan:
    """At least ``rounds`` rounds and ``seconds`` seconds; ``exactly``: the rounds alone count."""

    rounds: int = 5
    seconds: float = 1.5
    exactly: bool = False

    def done(self, rounds: int, seconds: float) -> bool:
        return rounds >= self.rounds and (self.exactly or seconds >= self.seconds)


def quartiles(samples: pd.Series) -> tuple[float, float, float]:
    low, middle, high = samples.quantile([0.25, 0.5, 0.75])
    return low, middle, high


def ratios(samples: pd.Series, others: pd.Series) -> pd.Series:
    """``samples / others`` of the rounds in which both took part."""
    return (samples / others).dropna()


def alternate(
    contestants: Mapping[Name, Run],
    plan: Plan,
    *,
    between: Run | None = None,
    timer: Timer | None = None,
) -> dict[Name, pd.Series]:
    """Time the contestants in turns, so that a slow spell of the machine hits all of them.

    Each is warmed up first. Runs shorter than ``SAMPLE_SECONDS`` are repeated within a sample.
    The order rotates from round to round, because the caches depend on what ran before. A
    contestant ``SLOW_FACTOR`` times slower than the fastest leaves after ``plan.rounds`` rounds, or
    after ``SLOW_ROUNDS`` if they took ``plan.seconds`` by themselves. ``between`` is called after
    every round, outside of all timings. Returns seconds per iteration, indexed by round.
    """
    timer = timer or _time
    estimates = {name: _warm_up(run, timer) for name, run in contestants.items()}
    fastest = min(estimates.values())
    repeats = {name: max(1, math.ceil(SAMPLE_SECONDS / s)) for name, s in estimates.items()}
    samples: dict[Name, dict[int, float]] = {name: {} for name in contestants}
    names = list(contestants)
    rounds, spent = 0, 0.0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while not plan.done(rounds, spent):
            turn = rounds % len(names)
            for name in names[turn:] + names[:turn]:
                slow = estimates[name] > SLOW_FACTOR * fastest
                if slow and _enough(samples[name], plan):
                    continue
                seconds = timer(contestants[name], repeats[name])
                samples[name][rounds] = seconds / repeats[name]
                spent += seconds
            if between is not None:
                between()
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: pd.Series(taken) for name, taken in samples.items()}


def _enough(samples: Mapping[int, float], plan: Plan) -> bool:
    long = not plan.exactly and sum(samples.values()) >= plan.seconds
    return len(samples) >= (min(SLOW_ROUNDS, plan.rounds) if long else plan.rounds)


def _warm_up(run: Run, timer: Timer) -> float:
    seconds = timer(run, 1)
    for _ in range(3):
        if seconds > SLOW_SECONDS:
            break
        seconds = min(seconds, timer(run, 1))
    return max(seconds, 1e-7)


def _time(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - start


class Rate:
    """10^9 units of work per second, sampled at most every ``RATE_INTERVAL`` seconds.

    Called between the rounds of a benchmark, it belongs to the same minutes as the timings.
    """

    def __init__(self, run: Run, work: float, timer: Timer | None) -> None:
        self._run, self._work, self._timer = run, work, timer
        self._rates: list[float] = []
        self._last = -math.inf
        run()

    def __call__(self) -> None:
        """Take a sample, if it is time."""
        if time.perf_counter() - self._last >= RATE_INTERVAL:
            self._rates.append(1e-9 * self._work / (self._timer or _time)(self._run, 1))
            self._last = time.perf_counter()

    def median(self) -> float:
        """Median of the samples so far, at least one."""
        if not self._rates:
            self()
        return statistics.median(self._rates)


def matmul_rate(
    dtype: torch.dtype, *, device: str = "cpu", timer: Timer | None = None, size: int = GEMM_SIZE
) -> Rate:
    a, b, out = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(3))
    return Rate(lambda: torch.mm(a, b, out=out), 2.0 * size**3, timer)


def copy_rate(*, device: str = "cpu", timer: Timer | None = None, mb: int = COPY_MB) -> Rate:
    """GB/s of copying a large tensor: every byte is read and written."""
    source, target = torch.zeros(2, mb * 2**18, device=device)
    return Rate(lambda: target.copy_(source), 2.0 * mb * 2**20, timer)
