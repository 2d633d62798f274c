"""Timing: alternated runs, medians and quartiles, and the rates that the machine itself reaches."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

Run = Callable[[], object]
Timer = Callable[[Run, int], float]
Name = TypeVar("Name", bound=Hashable)

SAMPLE_SECONDS = 0.02
SLOW_FACTOR = 4.0
SLOW_SECONDS = 0.3
SLOW_ROUNDS = 3
GEMM_SIZE = 2048
COPY_MB = 128  # beyond the caches


@dataclass(frozen=True)
class Plan:
    """How long to measure one cell.

    Args:
        rounds: at least this many rounds, every contestant once in each.
        seconds: and at least this long, counted over all contestants.
        exactly: stop after ``rounds`` whatever the time.
    """

    rounds: int = 5
    seconds: float = 1.5
    exactly: bool = False

    def done(self, rounds: int, seconds: float) -> bool:
        """Whether ``rounds`` rounds in ``seconds`` s are enough.

        Example:
            >>> Plan(5, 1.0).done(5, 0.5), Plan(5, 1.0, exactly=True).done(5, 0.5)
            (False, True)
        """
        return rounds >= self.rounds and (self.exactly or seconds >= self.seconds)


@dataclass
class Samples:
    """Seconds per iteration, one entry per round that the contestant took part in."""

    seconds: dict[int, float] = field(default_factory=dict)

    def quartiles_ms(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile in milliseconds."""
        low, middle, high = quartiles(list(self.seconds.values()))
        return low * 1e3, middle * 1e3, high * 1e3

    def ratio_to(self, other: Samples) -> tuple[float, float, float]:
        """Quartiles of self / other over the rounds in which both ran.

        Example:
            >>> Samples({0: 4.0, 1: 6.0}).ratio_to(Samples({0: 2.0, 1: 2.0, 2: 9.0}))
            (2.25, 2.5, 2.75)
        """
        common = self.seconds.keys() & other.seconds.keys()
        return quartiles([self.seconds[r] / other.seconds[r] for r in common])


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile, interpolated linearly.

    Example:
        >>> quartiles([3.0, 1.0, 2.0])
        (1.5, 2.0, 2.5)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def alternate(
    contestants: Mapping[Name, Run],
    plan: Plan,
    *,
    between: Run | None = None,
    timer: Timer | None = None,
) -> dict[Name, Samples]:
    """Times the contestants in turns, so that a slow spell of the machine hits all of them.

    Each is warmed up first. Runs shorter than ``SAMPLE_SECONDS`` are repeated within a sample.
    The order rotates from round to round, because who runs after whom matters to the caches. A
    contestant ``SLOW_FACTOR`` times slower than the fastest sits out after ``plan.rounds``
    rounds, or after ``SLOW_ROUNDS`` if they took ``plan.seconds`` by themselves; ratios are taken
    over common rounds.

    Args:
        contestants: name -> one iteration.
        plan: when to stop.
        between: called after every round, outside of all timings.
        timer: ``timer(run, repeats)`` runs it so often and returns the seconds; by default the
            processor's clock.

    Example:
        >>> samples = alternate({"a": lambda: None}, Plan(rounds=3, exactly=True))
        >>> len(samples["a"].seconds)
        3
    """
    timer = timer or _time
    estimates = {name: _warm_up(run, timer) for name, run in contestants.items()}
    fastest = min(estimates.values())
    repeats = {n: max(1, math.ceil(SAMPLE_SECONDS / e)) for n, e in estimates.items()}
    slow = {n for n, e in estimates.items() if e > SLOW_FACTOR * fastest}

    samples = {name: Samples() for name in contestants}
    names = list(contestants)
    rounds, spent = 0, 0.0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while not plan.done(rounds, spent):
            turn = rounds % len(names)
            for name in names[turn:] + names[:turn]:
                if name in slow and _enough(samples[name], plan):
                    continue
                seconds = timer(contestants[name], repeats[name])
                samples[name].seconds[rounds] = seconds / repeats[name]
                spent += seconds
            if between is not None:
                between()
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def _enough(samples: Samples, plan: Plan) -> bool:
    taken = len(samples.seconds)
    long = not plan.exactly and sum(samples.seconds.values()) >= plan.seconds
    return taken >= (min(SLOW_ROUNDS, plan.rounds) if long else plan.rounds)


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
    """What the machine itself reaches, sampled on the way.

    Called between the rounds of a benchmark it measures at most every ``interval`` seconds, so
    that the rate belongs to the same minutes as the timings that are compared with it.
    """

    def __init__(
        self, run: Run, work: float, *, interval: float = 0.5, timer: Timer | None = None
    ) -> None:
        self._run = run
        self._work = work
        self._interval = interval
        self._timer = timer
        self._rates: list[float] = []
        self._last = -math.inf
        run()

    def __call__(self) -> None:
        if time.perf_counter() - self._last < self._interval:
            return
        self._rates.append(1e-9 * self._work / (self._timer or _time)(self._run, 1))
        self._last = time.perf_counter()

    def median(self) -> float:
        """Median of the samples so far, in 10^9 per second; takes one if there is none yet."""
        if not self._rates:
            self()
        return statistics.median(self._rates)


class GemmRate(Rate):
    """The rate of a ``2048^3`` matrix product, in GFLOP/s.

    Example:
        >>> rate = GemmRate(torch.float32, size=64)
        >>> rate()
        >>> rate.median() > 0
        True
    """

    def __init__(
        self, dtype: torch.dtype, *, size: int = GEMM_SIZE, device: str = "cpu", **options: Any
    ) -> None:
        a, b, out = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(3))
        super().__init__(lambda: torch.mm(a, b, out=out), 2.0 * size**3, **options)


class CopyRate(Rate):
    """The memory bandwidth of copying a large tensor, in GB/s: every byte is read and written.

    Example:
        >>> CopyRate(mb=1).median() > 0
        True
    """

    def __init__(self, *, mb: int = COPY_MB, device: str = "cpu", **options: Any) -> None:
        source, target = torch.zeros(2, mb * 2**18, device=device)
        super().__init__(lambda: target.copy_(source), 2.0 * mb * 2**20, **options)
