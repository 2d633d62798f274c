"""Refuses a run that this machine has no memory for, before the run takes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil

from bench.errors import UsageError
from bench.train.config import RECALL, Config

CGROUP = Path("/sys/fs/cgroup")


def check(config: Config, delays: Sequence[int] = ()) -> None:
    """Makes sure that the least memory that a run needs is free; it is evaluated at ``delays``."""
    steps = max([config.steps, *(delay + 20 for delay in delays)])
    batch = config.batch if config.task in RECALL else min(config.batch, 60_000)
    needed = {
        # Weights (3 H^2 float32 at least), gradients and Adam's two moments; but for the gradients
        # once more, as the checkpoint is made in memory.
        "--hidden": 7 * 4 * 3 * config.hidden**2,
        # Output, its gradient, and what the backward pass needs, in float32.
        "--T, --transfer, --batch and --hidden": 6 * 4 * steps * batch * config.hidden,
        # Answers and inputs.
        "--train-size and --T": config.train_size * (80 + steps),
        "--updates-per-epoch and --batch": 8 * config.updates_per_epoch * batch,
    }
    free, total = available(), sum(needed.values())
    if config.device == "cpu" and total > free:
        raise UsageError(
            f"{max(needed, key=lambda name: needed[name])}: wanted a run that fits into "
            f"{free / 2**30:.3g} GiB, the free memory, got one that needs at least "
            f"{total / 2**30:.3g} GiB; give smaller numbers"
        )


def available() -> int:
    """Bytes that this process may still take: of the machine, and of its container."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no container, or "max": no limit
        return free
    return min(free, limit - used)
