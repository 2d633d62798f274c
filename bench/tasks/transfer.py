"""How a trained model does at other lengths, without further training."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.tasks import tasks
from bench.tasks.trainer import Trainer

SEQUENCES = 500
BATCH = 100


def accuracies(trainer: Trainer, delays: Sequence[int]) -> dict[int, float]:
    """Accuracy on ``SEQUENCES`` test sequences at every T; the trained one comes first."""
    config = trainer.config
    return {
        delay: trainer.accuracy(
            tasks.make(replace(config, T=delay)).test, count=SEQUENCES, batch=BATCH
        )
        for delay in dict.fromkeys((config.T, *delays))
    }


def write(path: Path, found: dict[int, float], trainer: Trainer) -> None:
    """One line per T in a CSV file."""
    config = trainer.config
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "layer", "seed", "trained_T", "updates", "T", "accuracy", "count"])
        for delay, accuracy in found.items():
            writer.writerow(
                [
                    config.task,
                    config.layer,
                    config.seed,
                    config.T,
                    trainer.history[-1].updates if trainer.history else 0,
                    delay,
                    f"{accuracy:.4f}",
                    SEQUENCES,
                ]
            )
