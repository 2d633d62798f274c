"""Accuracy of a trained model at other lengths, without further training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from bench.train import recall
from bench.train.trainer import Trainer

FILE = "transfer.csv"
SEQUENCES, BATCH = 200, 100


def transfer(trainer: Trainer, delays: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for the trained T and for each other one, as they are measured."""
    config = trainer.config
    for delay in dict.fromkeys((config.T, *delays)):
        test = recall.make(replace(config, T=delay)).test
        row = {"task": config.task, "layer": config.layer, "seed": config.seed}
        row |= {"trained_T": config.T, "updates": trainer.history[-1].updates, "T": delay}
        accuracy = trainer.evaluate(test, count=SEQUENCES, batch=BATCH).accuracy
        yield row | {"accuracy": accuracy, "count": SEQUENCES}
