"""What the tests of training share: a tiny run and small sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from bench.train.config import Config
from bench.train.trainer import Epoch, Trainer

TINY = Config(
    "copying",
    T=3,
    hidden=8,
    batch=4,
    p=0.5,
    anneal=1,
    epochs=4,
    updates_per_epoch=3,
    train_size=20,
    threads=1,
)
SCREENING: dict[str, Any] = {
    "layer": "rel-lstm",
    "p": 0.0,
    "anneal": 0,
    "train_size": 0,
    "one_hot": True,
    "window_size": 2,
    "top_k": 3,
}
TIMES = ("seconds", "sequences_per_s")


def trained(**changes: Any) -> Trainer:
    trainer = Trainer(dataclasses.replace(TINY, **changes))
    trainer.run(lambda epoch: None)
    return trainer


def without_times(history: Iterable[Epoch]) -> list[dict[str, Any]]:
    rows = [dataclasses.asdict(epoch) for epoch in history]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
