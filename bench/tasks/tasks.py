"""The task that a configuration names."""

from __future__ import annotations

from pathlib import Path

from bench.tasks import copying, denoise, digits
from bench.tasks.config import Config
from bench.tasks.data import Task


def make(config: Config) -> Task:
    """The data of a run."""
    if config.task == "digits":
        return digits.make(
            mnist=None if config.mnist is None else Path(config.mnist),
            permute_seed=config.permute_seed if config.permute else None,
        )
    make = copying.make if config.task == "copying" else denoise.make
    return make(
        config.T,
        train_size=config.train_size,
        updates_per_epoch=config.updates_per_epoch,
        seed=config.seed,
        one_hot=config.one_hot,
    )
