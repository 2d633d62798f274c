"""Time of contestants that alternate, and of what tells the rates of the machine meanwhile."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch

from throughtime import _ext
from throughtime.ops.precision import multiplies_bfloat16

Run = Callable[[], object]
Timer = Callable[[Run, int], float]  # seconds of so many runs

SAMPLE_SECONDS = 0.02
SLOW_SECONDS = 0.3  # of a run that is warmed up once
GEMM_SIZE, TILE_REPEATS = 2048, 1000
COPY_BYTES = 2**27  # beyond the caches


@dataclass(frozen=True)
class Plan:
    """Each contestant takes part for at least ``rounds`` rounds and ``seconds`` seconds."""

    rounds: int = 5
    seconds: float = 0.5


def alternate(
    contestants: Mapping[Hashable, Run], plan: Plan, timer: Timer | None = None
) -> pd.DataFrame:
    """Time the contestants in turns, so that a slow spell of the machine hits all of them.

    Each is warmed up first. Runs shorter than ``SAMPLE_SECONDS`` are repeated within a sample.
    The order rotates from round to round, because the caches depend on what ran before. Returns
    seconds per iteration, a column for each contestant and a row for each round; NaN where it no
    longer takes part.
    """
    timer = timer or _time
    repeats = {
        name: max(1, math.ceil(SAMPLE_SECONDS / _warm_up(run, timer)))
        for name, run in contestants.items()
    }
    spent = dict.fromkeys(contestants, 0.0)
    rounds: list[dict[Hashable, float]] = []
    names = list(contestants)
    collecting = gc.isenabled()
    gc.disable()
    try:
        while names:
            turn = len(rounds) % len(names)
            rounds.append({})
            for name in names[turn:] + names[:turn]:
                seconds = timer(contestants[name], repeats[name])
                rounds[-1][name] = seconds / repeats[name]
                spent[name] += seconds
            if len(rounds) >= plan.rounds:
                names = [name for name in names if spent[name] < plan.seconds]
    finally:
        if collecting:
            gc.enable()
    return pd.DataFrame(rounds, columns=pd.Index(list(contestants), tupleize_cols=False))


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


def roofs(dtype: torch.dtype, device: str) -> dict[str, tuple[Run, float]]:
    """What to time beside contestants, and its work: operations of products, bytes of a copy."""
    source, target = torch.zeros(2, COPY_BYTES, dtype=torch.int8, device=device)
    return {
        "matmul": _product(dtype, device),
        "copy": (lambda: target.copy_(source), 2.0 * COPY_BYTES),
    }


def _product(dtype: torch.dtype, device: str) -> tuple[Run, float]:
    """Of the dtype on a GPU, and on a CPU if that multiplies it.

    bfloat16: in the tiles of our kernels. Other 16-bit arithmetic is that of float32 on a CPU.
    """
    if device == "cpu" and dtype.itemsize == 2:
        if dtype == torch.bfloat16 and multiplies_bfloat16():
            count = _ext.extension.multiply_adds(1, 1)
            return partial(
                _ext.extension.multiply_adds, TILE_REPEATS, 1
            ), 2.0 * TILE_REPEATS * count
        dtype = torch.float32
    a, b, out = torch.randn(3, GEMM_SIZE, GEMM_SIZE, dtype=dtype, device=device)
    return lambda: torch.mm(a, b, out=out), 2.0 * GEMM_SIZE**3
