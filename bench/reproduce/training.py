"""Claims about training: sweeps over seeds, minutes each, one thread a run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from bench.train.config import Config
from bench.train.sweep import collect, run_all

SEEDS = range(5)
LEAST_FALL = 0.2  # of validation accuracy, below its best so far, that counts as a fall


@dataclass(frozen=True)
class Setup:
    """Where runs are kept, and how many go side by side."""

    runs: Path
    jobs: int


@dataclass(frozen=True)
class Sweep:
    """One experiment: each of ``kinds`` with each of ``seeds``."""

    name: str
    common: Mapping[str, Any]
    kinds: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int] = SEEDS
    delays: Sequence[int] = ()

    def __call__(self, setup: Setup) -> pd.DataFrame:
        """The epochs of all runs; an ``Unfinished`` with those so far after Ctrl-C."""
        runs = {
            f"{kind}, seed {seed}": Config(**{**self.common, **options, "seed": seed})
            for seed, (kind, options) in itertools.product(self.seeds, self.kinds.items())
        }
        out = setup.runs / self.name
        try:
            return shortened(run_all(runs, out, jobs=setup.jobs, delays=self.delays))
        except KeyboardInterrupt as stop:
            found = collect(runs, out)
            if found.empty:
                raise
            raise Unfinished(shortened(found)) from stop


class Unfinished(KeyboardInterrupt):
    """Ctrl-C during a sweep; ``rows`` are the epochs so far."""

    def __init__(self, rows: pd.DataFrame) -> None:
        super().__init__()
        self.rows = rows


def shortened(table: pd.DataFrame) -> pd.DataFrame:
    """Of the options those that differ, and a column ``kind``."""
    same = [
        entry.name
        for entry in fields(Config)
        if entry.name not in ("p", "seed") and table[entry.name].nunique(dropna=False) == 1
    ]
    kind = table.run.str.replace(r", seed \d+$", "", regex=True)
    return table.drop(columns=[*same, "run"]).assign(kind=kind)


def last(table: pd.DataFrame) -> pd.DataFrame:
    """The last row of each run that went as far as any, or could not go on.

    With its largest gradient norm, its falls and its cost.
    """
    groups = table.groupby(["kind", "seed"], sort=False)
    found = groups.tail(1).set_index(["kind", "seed"])
    found["grad_norm_max"] = groups.grad_norm_max.max()
    found["falls"] = groups.validation_accuracy.agg(falls)
    found["cpu_seconds"] = groups.cpu_seconds.sum()
    stopped = found.stopped.replace("", None).notna()
    return found[(found.updates == found.updates.max()) | stopped].reset_index()


def falls(accuracy: pd.Series) -> int:
    """How often the accuracy goes more than 0.2 below its best so far, from above that line."""
    low = accuracy < accuracy.cummax() - LEAST_FALL
    return int((low & ~low.shift(fill_value=False)).sum())
